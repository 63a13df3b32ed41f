"""What the user got wrong is one line: `train.py: what, where, and what to do`, and exit status 2."""

import math

import pytest
import torch
import torch.nn.functional as F
from pictures import no_network, oxford, run, save_picture, tiny, vtab  # noqa: F401

import data
import train

NANO = ('--model', 'vit_nano_patch8_48')


@pytest.fixture
def refusal(tmp_path, capfd):
    """Runs train.py, tiny; returns the one line on stderr. There must be one, and no more than one."""
    def refused(*argv, **changes):
        capfd.readouterr()
        status = run(tmp_path / 'runs', *argv, **changes)
        out, err = capfd.readouterr()
        assert status == 2 and err.startswith('train.py: ') and err.count('\n') == 1, err
        assert 'Traceback' not in out + err and 'File "' not in err and len(err) < 900, err
        return err
    return refused


@pytest.fixture
def pets(tmp_path, refusal):
    """The same for Pets in the test's folder, with a nano ViT."""
    def refused(*argv, **changes):
        return refusal('--task', 'pets', *NANO, '--data', str(tmp_path), *argv, **changes)
    return refused


# ---- The command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize('argv, said', [
    (['--task', 'pet'], "unknown task 'pet': did you mean 'pets'?"),
    (['--task', 'yachts'], "unknown task 'yachts': one of cifar100"),
    (['--task', 'pets,'], "unknown task ''"),
    (['--method', 'ivtp'], "unknown method 'ivtp': did you mean 'ivpt'?"),
    (['--method', 'ivpt,magic'], "unknown method 'magic': one of full, linear, bias, vpt_shallow, vpt"),
    (['--model', 'resnet50'], "unknown model 'resnet50'"),
    (['--model', 'vit_nano_patch64_48'], 'an image of 48 pixels holds no patch of 64'),
    (['--seed', 'one'], "seed is a int, as 0, not 'one'"),
    (['--seed', '1:30'], "seed is a int, as 0, not '1:30'"),
    (['--seeds', '0,1'], '--seeds'),
    (['--lr', '0.5'], '--lr 0.5; a setting is changed by --set NAME=VALUE'),
    (['--set', 'seed=3'], '--set seed=3: write --seed 3'),
    (['--report', '--search'], 'not allowed with argument'),
    (['--noise', '0.1', '--report'], 'not allowed with argument'),
    (['--run', 'runs/x'], '--run runs/x is for --show, --image and --noise'),
    (['--data', 'no/such'], 'no/such: there is no such folder of data sets'),
    (['--model', 'vit_small_patch14_224.dino2'], "unknown model 'vit_small_patch14_224.dino2': did you mean 'vit_small_patch14_224.dinov2'?"),
    (['--model', 'vit_nano_patch8_48,vit_base_patch16_224.orig'], "unknown model 'vit_base_patch16_224.orig'"),
    (['--seed', '0,,1'], 'seed is a int'),
    (['--seed', '-1'], 'seed goes from 0'),
    (['--epochs', '3'], '--epochs'),
    (['--set'], '--set'),
    (['--set', 'lr'], "--set: lr is a float, as 0.25, not ''"),
    (['--set', 'mean=[1'], '--set mean: not YAML'),
    (['--set', 'grid=!!python/object/apply:os.getcwd []'], '--set grid: not YAML'),
    (['pets'], 'pets'),
])
def test_a_wrong_command_line_is_refused_with_the_nearest_known_name(argv, said, refusal):
    assert said in refusal(*argv)


@pytest.mark.parametrize('change, said', [
    ('learning_rate=1', "unknown setting 'learning_rate'"),
    ('epoch=3', "unknown setting 'epoch': did you mean 'epochs'?"),
    ('lr=fast', "lr is a float, as 0.25, not 'fast'"),
    ('lr=true', 'lr is a float'),
    ('lr=nan', 'lr goes from 1e-12'),
    ('lr=inf', 'lr goes from 1e-12'),
    ('lr=-1', 'lr goes from 1e-12'),
    ('lr=[0.1, 0.2]', 'lr is a float'),
    ('epochs=2.5', "epochs is a int, as 100, not '2.5'"),
    ('epochs=0', 'epochs goes from 1'),
    ('batch=0', 'batch goes from 1'),
    ('workers=-1', 'workers is auto, or a number'),
    ('n_train=0', 'n_train goes from 1'),
    ('warmup=1.5', 'warmup goes from 0 to 0.99'),
    ('aggregation=yes please', 'aggregation is a bool'),
    ('precision=bf16', 'precision is one of auto, float32, bfloat16, float16'),
    ('device=gpu', 'device gpu cannot be used'),
    ('device=cuda:9', 'device cuda:9 cannot be used'),
    ('aggregation=1', 'aggregation is a bool'),
    ('mean=0.5', 'mean is a list'),
    ('mean=[0.5, 0.5]', 'mean is three numbers'),
    ('std=[1, 1, .nan]', 'std is three numbers'),
    ('std=[0, 0.5, 0.5]', 'std'),
    ('structure=cdcc', 'structure is one of vpt_shallow, vpt, provp, express, vanilla_cdc, cdc'),
    ('reinforcement=most', 'reinforcement is one of topk, all, none'),
    ('optimizer=Adam', 'optimizer is one of SGD, AdamW'),
    ('augment=flip', 'augment is one of crop_flip, scale_crop, none'),
    ('source=cifar', 'source is one of vtab, fgvc, folder, ade20k, FILE.py:NAME'),
    ('ask=pink', 'pink'),
    ('runs=', 'runs is the name of a folder'),
    ('tune=some', 'tune is one of prompts, bias, head, all'),
    ('score_on=train', 'score_on is one of test, val'),
    ('save_dtype=int8', 'save_dtype is one of float32, float16'),
])
def test_a_setting_of_the_wrong_name_type_or_range_is_refused(change, said, refusal):
    name, _, value = change.partition('=')
    assert said in refusal(**{name: value})


@pytest.mark.parametrize('changes, said', [
    (dict(N=0), 'N goes from 1 to 1000, not 0'),
    (dict(k=-3), 'k goes from 0'),
    (dict(k=37), '0 to M=36 of the image tokens, not k=37'),
    (dict(k=10, img_size=24), '0 to M=9 of the image tokens, not k=10'),
    (dict(img_size=4), 'an image of 4 pixels holds no patch of 8'),
])
def test_numbers_that_do_not_fit_the_vit_are_refused_with_the_numbers(changes, said, refusal):
    assert said in refusal('--method', 'ivpt', **changes)


def test_a_backbone_of_random_weights_has_to_be_asked_for_and_is_called_so(tmp_path, capfd, refusal):
    argv = '--method', 'vpt', '--model', 'vit_tiny_patch16_48'
    assert 'vit_tiny_patch16_48 has no weights of its own: name a file with --weights FILE' in refusal(*argv, weights='')
    changes = f'runs={tmp_path}', 'n_train=8', 'n_val=2', 'n_test=4', 'epochs=1'
    assert train.main([*argv, '--seed', '0,1', '--weights', 'random', '--set', *changes]) == 0
    out = capfd.readouterr().out
    assert out.count(', random weights. ') == out.count(', random weights\n') == 2
    for action in (['--report'], ['--noise', '0', *argv]):
        assert train.main([*action, '--set', f'runs={tmp_path}']) == 0
        assert 'vit_tiny_patch16_48, random weights' in capfd.readouterr().out


def test_nothing_is_left_behind_by_a_run_that_cannot_start(tmp_path, refusal):
    refusal('--method', 'ivpt', k=37)
    assert not list(tmp_path.rglob('*'))


def test_a_folder_for_the_results_that_cannot_be_made_is_refused_by_name(tmp_path, refusal):
    (tmp_path / 'file').write_text('')
    assert str(tmp_path / 'file') in refusal(runs=tmp_path / 'file' / 'runs')


def test_scoring_on_val_without_validation_pictures_is_refused(refusal):
    assert 'val' in refusal('--method', 'linear', n_val=0, score_on='val')


# ---- Data -----------------------------------------------------------------------------------------------


def test_missing_data_and_a_failed_download_say_what_to_unpack_where(tmp_path, pets):
    said = pets()
    for part in (str(tmp_path / 'oxford-iiit-pet'), 'images.tar.gz', 'annotations.tar.gz', '--data',
                 'no network in tests', 'python train.py alone needs no download'):
        assert part in said


def test_an_annotation_file_that_is_cut_is_refused_by_name(tmp_path, pets):
    file = oxford(tmp_path) / 'annotations' / 'trainval.txt'
    file.write_text(file.read_text()[:-5])
    assert 'annotations' in pets()


def test_an_annotation_file_without_a_picture_is_refused(tmp_path, pets):
    (oxford(tmp_path) / 'annotations' / 'trainval.txt').write_text('')
    assert 'no image in OxfordIIITPet' in pets()


@pytest.mark.parametrize('label', [0, 38, 99])
def test_an_annotation_with_a_breed_out_of_range_is_refused(label, tmp_path, pets):
    file = oxford(tmp_path) / 'annotations' / 'trainval.txt'
    file.write_text(file.read_text().replace(' 2 1 1', f' {label} 1 1', 1))
    assert f'of class {label - 1} in OxfordIIITPet' in pets()


@pytest.mark.parametrize('line, said', [
    ('images/train800/000001.jpg', 'expected "FILE CLASS"'),
    ('images/train800/000001.jpg seven', 'expected "FILE CLASS"'),
    ('images/train800/000001.jpg -1', 'expected "FILE CLASS"'),
    ('images/train800/000001.jpg 1.0', 'expected "FILE CLASS"'),
    ('images/train800/000001.jpg ٣', 'expected "FILE CLASS"'),
    ('', 'expected "FILE CLASS"'),
    ('images/train800/000001.jpg ' + 5000 * '9', 'expected "FILE CLASS"'),
    ('7', 'expected "FILE CLASS"'),
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


def test_a_missing_picture_of_a_list_is_refused_by_name_before_training(tmp_path, pets):
    (missing := vtab(tmp_path) / 'images' / 'test' / '000003.jpg').unlink()
    assert f'{missing}: no such image (and 0 more of 5)' in pets()
    assert not (tmp_path / 'runs').exists()


def test_a_missing_picture_of_torchvisions_folder_is_refused_by_name(tmp_path, pets):
    (missing := oxford(tmp_path) / 'images' / 'breed_2_1.jpg').unlink()
    assert f'{missing}: no such image' in pets()


@pytest.mark.parametrize('content', [b'', b'<html>moved</html>'])
@pytest.mark.parametrize('split', ['train800', 'test'])
def test_a_broken_picture_is_refused_by_name_before_training(content, split, tmp_path, pets):
    (broken := vtab(tmp_path) / 'images' / split / '000002.jpg').write_bytes(content)
    assert f'{broken}: not an image' in pets(epochs=1, img_size=24, k=2)
    assert not (tmp_path / 'runs').exists()


def test_a_broken_test_picture_leaves_the_result_that_again_would_replace(tmp_path, refusal):
    changes = dict(epochs=1, img_size=24, k=2)
    for folder in ('whole', 'broken'):
        vtab(tmp_path / folder)
    argv = '--task', 'pets', *NANO, '--again', '--data'
    assert run(tmp_path / 'runs', *argv, str(tmp_path / 'whole'), **changes) == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'runs').rglob('*') if path.is_file()}
    broken = tmp_path / 'broken' / 'vtab-1k' / 'oxford_iiit_pet' / 'images' / 'test' / '000002.jpg'
    broken.write_bytes(b'<html>moved</html>')
    assert f'{broken}: not an image' in refusal(*argv, str(tmp_path / 'broken'), **changes)
    assert len(before) > 3 and all(path.read_bytes() == content for path, content in before.items())


def test_a_broken_picture_is_one_line_where_worker_processes_read_it_too(tmp_path, pets):
    (broken := vtab(tmp_path) / 'images' / 'train800' / '000002.jpg').write_bytes(b'')
    assert pets(workers=2).startswith(f'train.py: {broken}: not an image that can be decoded')


def test_a_picture_that_is_cut_short_is_refused_by_name(tmp_path, pets):
    cut = vtab(tmp_path) / 'images' / 'train800' / '000002.jpg'
    cut.write_bytes(cut.read_bytes()[:-200])
    assert f'{cut}: not an image' in pets()


# ---- Weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('content, said', [
    (None, 'there is no such file'), (b'', 'cut short'), (b'<html>moved</html>', 'not a PyTorch state dict')])
def test_weights_that_are_missing_or_damaged_are_refused_by_name(content, said, tmp_path, refusal):
    file = tmp_path / 'weights.pth'
    if content is not None:
        file.write_bytes(content)
    err = refusal('--weights', str(file))
    assert str(file) in err and said in err


@pytest.mark.parametrize('state, said', [
    ({'norm.bias': torch.zeros(64)}, 'missing: blocks.0.attn.proj.bias'),
    ({'epoch': 3}, 'holds no state dict'),
    ([torch.zeros(3)], 'holds no state dict')])
def test_weights_of_another_model_are_refused_by_name(state, said, tmp_path, refusal):
    torch.save(state, tmp_path / 'weights.pth')
    err = refusal('--weights', str(tmp_path / 'weights.pth'))
    assert str(tmp_path / 'weights.pth') in err and said in err


def test_weights_that_cannot_be_downloaded_are_refused_with_where_to_put_them(tmp_path, refusal, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    url = (tmp_path / 'moved.bin').as_uri()
    err = refusal('--weights', url)
    assert url in err and str(tmp_path / 'hub' / 'checkpoints') in err and 'by hand' in err


# ---- While it runs --------------------------------------------------------------------------------------


def folder_of(tmp_path):
    return tmp_path / 'runs' / 'where_blue' / 'vit_nano_patch8_48' / 'ivpt' / 'seed0'


def loss_that_breaks(monkeypatch, step):
    """From a step on, counted from 1, the loss is not a number."""
    calls, loss = [], F.cross_entropy

    def cross_entropy(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) >= step else 1)
    monkeypatch.setattr(train.F, 'cross_entropy', cross_entropy)
    return calls


def test_a_learning_rate_that_is_far_too_high_is_named_and_a_lower_one_proposed(refusal):
    err = refusal('--method', 'ivpt', lr=1e6, weight_decay=1e6, epochs=9)
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


def test_a_loss_that_is_not_a_number_stops_the_run_and_the_last_good_epoch_is_kept(
        tmp_path, refusal, monkeypatch):
    calls = loss_that_breaks(monkeypatch, step=10)  # 4 steps an epoch: the second one of the third
    err = refusal('--method', 'ivpt', epochs=5)
    assert 'the loss is nan in epoch 3, step 2' in err and len(calls) <= 12  # that epoch's end at the latest
    assert f'2 of 5 epochs are kept in {folder_of(tmp_path)}' in err
    kept = train.read_checkpoint(folder_of(tmp_path) / 'checkpoint-0.pth')
    assert len(kept['records']) == 2 and all(x.isfinite().all() for x in kept['trained'].values())
    assert len((folder_of(tmp_path) / 'log.jsonl').read_text().splitlines()) == 2
    assert not (folder_of(tmp_path) / 'result.json').exists()


@pytest.mark.parametrize('where', [(train.ivpt.IVPT, 'forward'), (train.data, 'in_memory')])
def test_a_gpu_with_too_little_memory_is_said_and_what_to_do_and_the_next_run_has_its_turn(
        where, tmp_path, refusal, monkeypatch):
    """Whether the model needs it, or the training pictures."""
    def full(*args):
        raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr(*where, full)
    err = refusal('--method', 'ivpt,linear')
    assert len(list(tmp_path.rglob('result.json'))) == (where[1] == 'forward')  # of linear
    assert 'too little memory' in err and '--set batch=8' in err and '--set cache_gb=0' in err


def test_a_loss_that_is_not_a_number_from_the_start_leaves_nothing_to_keep(refusal, monkeypatch):
    loss_that_breaks(monkeypatch, step=1)
    assert '0 of 2 epochs are kept' in refusal('--method', 'ivpt')


@pytest.mark.parametrize('epoch', [0, 2])
def test_ctrl_c_says_how_far_it_got(epoch, tmp_path, capfd, monkeypatch):
    batches = data.batches

    def interrupted(pictures, config, device, now=None, *part):
        if now == epoch:
            raise KeyboardInterrupt
        yield from batches(pictures, config, device, now, *part)
    monkeypatch.setattr(data, 'batches', interrupted)
    assert run(tmp_path / 'runs', '--method', 'ivpt', epochs=4) == 130
    err = capfd.readouterr().err
    assert err.startswith(f'train.py: stopped. {epoch} of 4 epochs are kept in {folder_of(tmp_path)}')
    assert err.count('\n') == 1
    assert (folder_of(tmp_path) / 'checkpoint-0.pth').exists() == (epoch > 0)


def test_ctrl_c_after_the_last_epoch_says_what_is_kept(tmp_path, capfd, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, 'accuracy', interrupted)
    assert run(tmp_path / 'runs', '--method', 'ivpt') == 130
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and str(folder_of(tmp_path)) in err
