"""What the user got wrong is one line: `error: what, where, and what to do`, and exit status 2."""

import math
import os

import pytest
import torch
from pictures import NANO, no_network, oxford, run, save_picture, vtab  # noqa: F401

import data
import train

SMALL = dict(img_size=16, k=2, n_train=24, n_val=8, n_test=8)  # two steps an epoch


@pytest.fixture
def refusal(tmp_path, capfd):
    """Runs train.py, tiny; returns the one line on stderr. There must be one, and no more than one."""
    def refused(*argv, **changes):
        capfd.readouterr()
        status = run(tmp_path / 'runs', *argv, **changes)
        out, err = capfd.readouterr()
        assert status == 2 and err.startswith('error: ') and err.count('\n') == 1, err
        assert 'Traceback' not in out + err and 'File "' not in err and len(err) < 900, err
        return err
    return refused


@pytest.fixture
def pets(tmp_path, refusal):
    """The same for Pets in the test's folder, with a nano ViT."""
    def refused(*argv, **changes):
        return refusal('--task', 'pets', '--model', NANO, '--data', str(tmp_path), *argv, **changes)
    return refused


# ---- The command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize('argv, said', [
    ('--task pet', "unknown task 'pet': did you mean 'pets'?"),
    ('--task yachts', "unknown task 'yachts': one of cifar100"),
    ('--task pets,', "unknown task ''"),
    ('--method ivtp', "unknown method 'ivtp': did you mean 'ivpt'?"),
    ('--method ivpt,magic', "unknown method 'magic': one of full, linear, bias, vpt_shallow, vpt"),
    ('--model resnet50', "unknown model 'resnet50'"),
    ('--model vit_nano_patch64_48', 'an image of 48 pixels is no whole number of patches of 64'),
    ('--seed one', "seed is a whole number from 0 to 4293, not 'one'"),
    ('--seed 1:30', "seed is a whole number from 0 to 4293, not '1:30'"),
    ('--seed 0,,1', "seed is a whole number from 0 to 4293, not ''"),
    ('--seed -1', "seed is a whole number from 0 to 4293, not '-1'"),
    ('--seed 4294', "seed is a whole number from 0 to 4293, not '4294'"),
    ('--seeds 0,1', '--seeds'),
    ('--lr 0.5', '--lr 0.5; a setting is changed by --set NAME=VALUE'),
    ('--report', 'unrecognized arguments: --report'),
    ('--set seed=3', '--set seed=3: write --seed 3'),
    ('--data no/such', 'no/such: there is no such folder of data sets'),
    ('--model vit_small_patch14_224.dino2', "did you mean 'vit_small_patch14_224.dinov2'?"),
    ('--model vit_nano_patch8_48,vit_base_patch16_224.orig', "unknown model 'vit_base_patch16_224.orig'"),
    ('--epochs 3', '--epochs'),
    ('--set', '--set'),
    ('--set lr', "--set: lr is a number from 1e-12 to 1e+06, not ''"),
    ('--set mean=[1', '--set mean: not YAML'),
    ('--set mean=!!python/object/apply:os.getcwd{}', '--set mean: not YAML'),
    ('--set grid={}', "unknown setting 'grid'"),
    ('--set ask=frame --task pets', "unknown setting 'ask'"),  # of the shapes, and not of Pets
    ('pets', 'pets'),
])
def test_a_wrong_command_line_is_refused_with_the_nearest_known_name(argv, said, refusal):
    assert said in refusal(*argv.split())


@pytest.mark.parametrize('change, said', [
    ('learning_rate=1', "unknown setting 'learning_rate'"),
    ('epoch=3', "unknown setting 'epoch': did you mean 'epochs'?"),
    ('lr=fast', "lr is a number from 1e-12 to 1e+06, not 'fast'"),
    ('lr=true', 'lr is a number from 1e-12'),
    ('lr=nan', 'lr is a number from 1e-12'),
    ('lr=inf', 'lr is a number from 1e-12'),
    ('lr=-1', 'lr is a number from 1e-12'),
    ('lr=[0.1, 0.2]', 'lr is a number from 1e-12'),
    ('epochs=2.5', "epochs is a whole number from 1 to 1e+06, not '2.5'"),
    ('epochs=0', 'epochs is a whole number from 1'),
    ('batch=0', 'batch is a whole number from 1'),
    ('workers=-2', 'workers is a whole number from -1 to 1000'),
    ('n_train=0', 'n_train is a whole number from 1'),
    ('warmup=1.5', 'warmup is a number from 0 to 0.99'),
    ('aggregation=yes please', 'aggregation is true or false'),
    ('aggregation=1', 'aggregation is true or false'),
    ('precision=bf16', 'precision is one of auto, float32, bfloat16, float16'),
    ('device=gpu', 'device gpu cannot be used'),
    ('device=cuda:9', 'device cuda:9 cannot be used'),
    ('mean=0.5', 'mean is three numbers from -1e+06 to 1e+06'),
    ('mean=[0.5, 0.5]', 'mean is three numbers'),
    ('mean=[a, b, c]', 'mean is three numbers'),
    ('mean=[true, 0.5, 0.5]', 'mean is three numbers'),
    ('std=[1, 1, .nan]', 'std is three numbers from 1e-06'),
    ('std=[0, 0.5, 0.5]', 'std is three numbers from 1e-06'),
    ('structure=cdcc', 'structure is one of vpt, vanilla_cdc, cdc'),
    ('reinforcement=most', 'reinforcement is one of topk, all, none'),
    ('optimizer=Adam', 'optimizer is one of SGD, AdamW'),
    ('schedule=steps', 'schedule is one of cosine, poly'),
    ('augment=flip', 'augment=flip: for where_blue it is crop_flip or none'),
    ('source=cifar', 'source is one of vtab, fgvc, folder, FILE.py:NAME'),
    ('readout=max', 'readout is one of cls, mean'),
    ('tune=some', 'tune is one of prompts, bias, head, all'),
    ('build=swin', "build is one of FILE.py:NAME, not 'swin'"),
    ('score_on=train', 'score_on is one of test, val'),
    ('N=0', 'N is a whole number from 1 to 1000, not'),
    ('k=-3', 'k is a whole number from 0'),
    ('k=37', '0 to M=36 of the image tokens, not k=37'),
    ('img_size=4', 'an image of 4 pixels is no whole number of patches of 8'),
])
def test_a_setting_of_the_wrong_name_type_or_range_is_refused(change, said, tmp_path, refusal):
    """And nothing is left behind by a run that cannot start."""
    name, _, value = change.partition('=')
    assert said in refusal('--method', 'ivpt', **{name: value})
    assert not list(tmp_path.rglob('*'))


def test_settings_that_do_not_fit_each_other_are_refused_with_the_numbers(refusal):
    assert '0 to M=9 of the image tokens, not k=10' in refusal('--method', 'ivpt', k=10, img_size=24)
    assert '40 images to train on and 0 of val to score' in refusal('--method', 'linear', n_val=0, score_on='val')


def test_a_backbone_of_random_weights_has_to_be_asked_for_and_is_called_so(tmp_path, capfd, refusal):
    argv = '--method', 'vpt', '--model', 'vit_tiny_patch16_48'
    said = 'vit_tiny_patch16_48 has no weights of its own: name a file with --weights FILE'
    assert said in refusal(*argv, weights='')
    changes = f'runs={tmp_path}', 'n_train=8', 'n_val=2', 'n_test=4', 'epochs=1'
    assert train.main([*argv, '--seed', '0,1', '--weights', 'random', '--set', *changes]) == 0
    out = capfd.readouterr().out
    assert out.count(', random weights. ') == out.count(', random weights\n') == 2


# ---- Data -----------------------------------------------------------------------------------------------


def test_missing_data_and_a_failed_download_say_what_to_unpack_where(tmp_path, pets):
    said = pets()
    for part in (str(tmp_path / 'oxford-iiit-pet'), 'images.tar.gz', 'annotations.tar.gz', '--data',
                 'no network in tests', 'python train.py alone needs no download'):
        assert part in said


@pytest.mark.parametrize('change, said', [
    (lambda text: text[:-5], 'annotations'),
    (lambda text: '', 'no image in OxfordIIITPet'),
    (lambda text: text.replace(' 2 1 1', ' 0 1 1', 1), 'of class -1 in OxfordIIITPet'),
    (lambda text: text.replace(' 2 1 1', ' 38 1 1', 1), 'of class 37 in OxfordIIITPet'),
    (lambda text: text.replace(' 2 1 1', ' 99 1 1', 1), 'of class 98 in OxfordIIITPet')])
def test_an_annotation_file_that_is_cut_empty_or_out_of_range_is_refused(change, said, tmp_path, pets):
    file = oxford(tmp_path, trainval=6, test=3) / 'annotations' / 'trainval.txt'
    file.write_text(change(file.read_text()))
    assert said in pets()


@pytest.mark.parametrize('line, said', [
    *((line, 'expected "FILE CLASS"') for line in (
        'images/train800/000001.jpg', 'images/train800/000001.jpg seven', 'images/train800/000001.jpg -1',
        'images/train800/000001.jpg 1.0', 'images/train800/000001.jpg ٣', '', '7',
        'images/train800/000001.jpg ' + 5000 * '9')),
    ('images/train800/000001.jpg 37', 'class 37 of 37; ids count from 0'),
    ('images/train800/000000.jpg 1', "'images/train800/000000.jpg' stands there twice"),
    ('../../../secret.jpg 1', 'lies outside of'),
    ('/secret.jpg 1', 'lies outside of'),
    ('images/../../../secret.jpg 1', 'lies outside of'),
])
def test_a_bad_line_of_a_list_is_refused_with_its_file_and_number(line, said, tmp_path, pets):
    folder = vtab(tmp_path)
    save_picture(tmp_path / 'secret.jpg', 0)
    lines = (folder / 'train800.txt').read_text().splitlines()
    lines[1] = line
    (folder / 'train800.txt').write_text('\n'.join(lines), encoding='utf-8')
    err = pets()
    assert f'{folder / "train800.txt"}, line 2: ' in err and said in err


def test_a_list_that_is_missing_empty_or_not_text_is_refused_by_name(tmp_path, pets):
    file = vtab(tmp_path) / 'val200.txt'
    file.write_text('')
    assert f'{file}, line 1: expected "FILE CLASS"' in pets()
    file.write_bytes(b'\xff\xfe\x00images')
    assert f'{file}: not a readable list' in pets()
    file.unlink()
    assert f'{file}: not a readable list' in pets()


def test_a_picture_that_a_list_or_torchvision_names_and_that_is_missing_is_refused_by_name(tmp_path, pets):
    (missing := oxford(tmp_path) / 'images' / 'breed_2_1.jpg').unlink()
    assert f'{missing}: no such image' in pets()
    (missing := vtab(tmp_path) / 'images' / 'test' / '000003.jpg').unlink()
    assert f'{missing}: no such image (and 0 more of 5)' in pets()
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('split', ['train800', 'test'])
@pytest.mark.parametrize('content', [
    lambda whole: b'', lambda whole: b'<html>moved</html>', lambda whole: whole[:-200]])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_broken_picture_is_refused_by_name_before_training(split, content, workers, tmp_path, pets):
    broken = vtab(tmp_path) / 'images' / split / '000002.jpg'
    broken.write_bytes(content(broken.read_bytes()))
    err = pets(epochs=1, img_size=24, k=2, workers=workers)
    assert err.startswith(f'error: {broken}: not an image that can be decoded')
    assert not (tmp_path / 'runs').exists()


def test_a_broken_test_picture_leaves_the_result_that_again_was_to_replace(tmp_path, refusal):
    changes = dict(epochs=1, img_size=24, k=2)
    for folder in ('whole', 'broken'):
        vtab(tmp_path / folder)
    argv = '--task', 'pets', '--model', NANO, '--again', '--data'
    assert run(tmp_path / 'runs', *argv, str(tmp_path / 'whole'), **changes) == 0
    before = sorted(path.read_bytes() for path in (tmp_path / 'runs').rglob('*') if path.is_file())
    broken = tmp_path / 'broken' / 'vtab-1k' / 'oxford_iiit_pet' / 'images' / 'test' / '000002.jpg'
    broken.write_bytes(b'<html>moved</html>')
    assert f'{broken}: not an image' in refusal(*argv, str(tmp_path / 'broken'), **changes)
    after = sorted(path.read_bytes() for path in (tmp_path / 'runs').rglob('*') if path.is_file())
    assert len(before) == 4 and before == after


# ---- Weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('content, said', [
    (None, 'there is no such file'), (b'', 'cut short'), (b'<html>moved</html>', 'it is a web page'),
    ({'norm.bias': torch.zeros(64)}, 'holds no ViT'), ({'epoch': 3}, 'holds no ViT'),
    ({'patch_embed.proj.weight': torch.zeros(64, 3, 8, 8)}, 'missing: blocks.0.attn.proj.bias')])
def test_weights_that_are_missing_damaged_or_of_another_model_are_refused_by_name(content, said, tmp_path, refusal):
    file = tmp_path / 'weights.pth'
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    err = refusal('--weights', str(file))
    assert str(file) in err and said in err


def test_weights_that_cannot_be_downloaded_are_refused_with_where_to_put_them(tmp_path, refusal, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    url = (tmp_path / 'moved.bin').as_uri()
    err = refusal('--weights', url)
    assert url in err and str(tmp_path / 'hub' / 'checkpoints') in err and 'by hand' in err


# ---- While it runs --------------------------------------------------------------------------------------


def folder_in(tmp_path):
    """The folder of the one run of a test."""
    folder, = (tmp_path / 'runs').glob('where_blue/*/*/seed0')
    return folder


def loss_that_breaks(monkeypatch, step):
    """From a step on, counted from 1, the loss is not a number."""
    calls, batches = [], data.batches

    def broken(pictures, settings, device, epoch=None, *augment):
        for images, labels in batches(pictures, settings, device, epoch, *augment):
            calls.append(1)
            yield images * (math.nan if len(calls) >= step else 1), labels
    monkeypatch.setattr(data, 'batches', broken)
    return calls


def test_a_learning_rate_that_is_far_too_high_is_named_and_a_lower_one_proposed(refusal):
    err = refusal('--method', 'ivpt', **SMALL | dict(lr=1e6, weight_decay=1e6, epochs=9))
    assert 'the loss is' in err and 'Lower the learning rate: --set lr=250000' in err


@pytest.mark.parametrize('epochs', [2, 3, 4, 5])
def test_what_is_reported_and_kept_is_finite(epochs, tmp_path, capfd):
    """The last step of all may be the one that is too far: no loss comes after it."""
    far = dict(lr=1e6, weight_decay=1e6, epochs=epochs, batch=64, img_size=16)  # one step an epoch
    status = run(tmp_path, '--method', 'linear', **far)
    for file in tmp_path.rglob('params.pth'):
        assert all(x.isfinite().all() for x in torch.load(file, weights_only=True).values())
    assert (status == 2) == (not list(tmp_path.rglob('result.json')))
    capfd.readouterr()


@pytest.mark.parametrize('step, epochs, said', [(1, 0, 'epoch 1, step 1'), (6, 2, 'epoch 3, step 2')])
def test_a_loss_that_is_not_a_number_stops_the_run_and_the_last_good_epoch_is_kept(
        step, epochs, said, tmp_path, refusal, monkeypatch):
    calls = loss_that_breaks(monkeypatch, step)
    err = refusal('--method', 'ivpt', **SMALL | dict(epochs=5))
    assert f'the loss is nan in {said}' in err and len(calls) == 2 * epochs + 2  # at that epoch's end
    folder = folder_in(tmp_path)
    assert f'{epochs} of 5 epochs are kept in {folder}' in err
    kept = torch.load(folder / 'checkpoint.pth', weights_only=True)
    assert len(kept['records']) == epochs and all(x.isfinite().all() for x in kept['trained'].values())
    assert len((folder / 'log.jsonl').read_text().splitlines()) == epochs
    assert not (folder / 'result.json').exists()


@pytest.mark.parametrize('where', [(train.IVPT, 'forward'), (data, 'in_memory')])
def test_a_gpu_with_too_little_memory_is_said_and_what_to_do_and_the_next_run_has_its_turn(
        where, tmp_path, refusal, monkeypatch):
    """Whether the model needs it, or the training pictures."""
    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr(*where, full)
    err = refusal('--method', 'ivpt,linear', **SMALL)
    assert len(list(tmp_path.rglob('result.json'))) == (where[1] == 'forward')  # of linear
    assert 'too little memory' in err and '--set batch=8' in err and '--set cache_gb=0' in err


@pytest.mark.parametrize('epoch, kept', [(0, 0), (2, 2), (None, 4)])
def test_ctrl_c_says_how_far_it_got(epoch, kept, tmp_path, capfd, monkeypatch):
    """Also while the last epoch's model is scored."""
    batches = data.batches

    def interrupted(pictures, settings, device, now=None, *augment):
        if now == epoch:
            raise KeyboardInterrupt
        yield from batches(pictures, settings, device, now, *augment)
    monkeypatch.setattr(data, 'batches', interrupted)
    assert run(tmp_path / 'runs', '--method', 'ivpt', **SMALL | dict(epochs=4)) == 130
    assert capfd.readouterr().err == (f'error: stopped. {kept} of 4 epochs are kept in {folder_in(tmp_path)}; '
                                      'the same command goes on from there\n')


def test_ctrl_c_before_the_first_epoch_is_one_line_too(tmp_path, capfd, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, 'load', interrupted)
    assert run(tmp_path / 'runs', '--method', 'ivpt') == 130
    assert capfd.readouterr().err == 'error: stopped; what is finished is kept\n'


def test_what_an_error_says_of_a_file_with_an_odd_name_is_one_printable_line(tmp_path, refusal):
    odd = tmp_path / 'a\nb\x1b[31m'
    assert 'there is no such file' in refusal('--weights', os.fspath(odd))
