"""What the user got wrong is one line: `error: what, where, and what to do`, and exit status 2."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pictures import NANO, load_with, no_network, oxford, refused, run, vtab  # noqa: F401

import data
import train

SMALL = dict(img_size=16, k=2, n_train=24, n_val=8, n_test=8)  # two steps an epoch
PETS = '--task', 'pets', '--model', NANO, '--data'  # and a folder
WORDS = {name: get_args(kind)[1:] for name, kind in train.TYPES.items() if get_args(kind)[:1] == (str,)}


@pytest.mark.parametrize('said, wrong', {  # what the line says, and of which command lines
    "unknown task 'pet': did you mean 'pets'?": ['--task pet'],
    "a name is missing in '": ['--task pets,', '--seed 0,,1', '--seed=', '--method=', '--model='],
    "unknown method 'ivtp': did you mean 'ivpt'?": ['--method ivtp'],
    "unknown method 'magic': one of full, linear, bias, vpt_shallow, vpt": ['--method ivpt,magic'],
    "unknown model 'resnet50'": ['--model resnet50'],
    'seed is a whole number from 0 to 4293, not': [f'--seed {x}' for x in ('one', '1:30', '-1', '4294')],
    'unrecognized arguments: ': ['--seeds 0,1', '--report', '--epochs 3', 'pets'],
    '; a setting is changed by --set NAME=VALUE': ['--lr 0.5', '--set'],
    **{f'--set {name}=x: write --{name} x': [f'--set {name}=x'] for name in ('seed', 'task', 'method', 'model')},
    'no/such: there is no such folder of data sets': ['--data no/such'],
    'no/such.pth: there is no such file': ['--weights no/such.pth'],
    "--set: lr is a number from 1e-12 to 1e+06, not ''": ['--set lr'],
    '--set mean: not YAML': ['--set mean=[1', '--set mean=!!python/object/apply:os.getcwd{}'],
    "unknown setting 'grid'": ['--set grid={}'],
    "unknown setting 'ask'": ['--set ask=frame --task pets'],  # of the shapes, and not of Pets
    'vit_tiny_patch16_48 has no weights of its own: name a file with --weights FILE': [
        '--model vit_tiny_patch16_48 --set weights='],
}.items())
def test_a_wrong_command_line_is_refused_with_the_nearest_known_name(said, wrong, refused):
    """Random weights have to be asked for."""
    for argv in wrong:
        assert said in refused(*argv.split())


@pytest.mark.parametrize('said, wrong', {  # what the line says, and of which values
    "unknown setting 'epoch': did you mean 'epochs'?": ['epoch=3'],
    'lr is a number from 1e-12 to 1e+06, not': [f'lr={x}' for x in ('fast', 'true', 'nan', 'inf', '-1', '[0.1, 0.2]')],
    '{} is a whole number from 1 to': ['epochs=2.5', 'epochs=0', 'batch=0', 'n_train=0', 'N=0'],
    'k is a whole number from 0 to': ['k=-3'],
    'workers is a whole number from -1 to 1000, not': ['workers=-2'],
    'warmup is a number from 0 to 0.99, not': ['warmup=1.5'],
    'aggregation is true or false, not': ['aggregation=yes please', 'aggregation=1'],
    'mean is three numbers from -1e+06 to 1e+06, not': [
        'mean=0.5', 'mean=[0.5, 0.5]', 'mean=[a, b, c]', 'mean=[true, 0.5, 0.5]'],
    'std is three numbers from 1e-06 to 1e+06, not': ['std=[1, 1, .nan]', 'std=[0, 0.5, 0.5]'],
    '--set device=cpu always can': ['device=gpu', 'device=cuda:9', 'device=xpu:7'],
    'source is one of vtab, fgvc, folder, FILE.py:NAME': ['source=mine.txt:greys', 'source='],
    **{f"{name} is one of {', '.join(filter(None, words))}, not 'swin'": [f'{name}=swin']
       for name, words in WORDS.items()},
    'grain is a number, not': ['grain=nan', 'grain=inf'],
    'augment=flip: for where_blue it is crop_flip or none': ['augment=flip'],
    '0 to M=36 of the image tokens, not k=37': ['k=37'],
    'an image of 4 pixels is no whole number of patches of 8': ['img_size=4'],
}.items())
def test_a_setting_of_the_wrong_name_type_or_range_is_refused(said, wrong, tmp_path, refused):
    """And nothing is left behind by a run that cannot start."""
    for change in wrong:
        name, _, value = change.partition('=')
        assert said.format(name) in refused('--method', 'ivpt', **{name: value})
    assert not list(tmp_path.rglob('*'))


def test_an_annotation_file_that_is_cut_empty_or_out_of_range_is_refused(tmp_path, refused):
    file = oxford(tmp_path, trainval=6, test=3) / 'annotations' / 'trainval.txt'
    whole = file.read_text()
    for text, said in ((whole[:-5], 'annotations'), ('', 'no image in OxfordIIITPet'),
                       *((whole.replace(' 2 1 1', f' {c} 1 1', 1), f'of class {c - 1} in OxfordIIITPet')
                         for c in (0, 38, 99))):
        file.write_text(text)
        assert said in refused(*PETS, str(tmp_path))


def test_a_picture_that_a_list_or_torchvision_names_and_that_is_missing_is_refused_by_name(tmp_path, refused):
    for make, name in (oxford, 'breed_2_1.jpg'), (vtab, 'test/000003.jpg'):
        (missing := make(tmp_path) / 'images' / name).unlink()
        assert f'{missing}: no such image (and 0 more of ' in refused(*PETS, str(tmp_path))
    assert not (tmp_path / 'runs').exists()


def test_a_broken_test_picture_leaves_the_result_that_again_was_to_replace(tmp_path, refused):
    def left():
        return sorted(path.read_bytes() for path in (tmp_path / 'runs').rglob('*') if path.is_file())
    changes, folder = dict(epochs=1, img_size=24, k=2), vtab(tmp_path)
    argv = '--again', *PETS, str(tmp_path)
    assert run(tmp_path / 'runs', *argv, **changes) == 0
    before = left()
    (broken := folder / 'images/test/000002.jpg').write_bytes(b'<html>moved</html>')
    assert f'{broken}: not an image' in refused(*argv, **changes)
    assert len(before) == 5 and before == left()


@pytest.mark.parametrize('epochs', [2, 3, 4, 9])
def test_what_is_reported_and_kept_is_finite_and_a_lower_learning_rate_is_proposed(epochs, tmp_path, capfd):
    """The last step of all may be the one that is too far: no loss comes after it."""
    far = dict(lr=1e6, weight_decay=1e6, epochs=epochs, batch=64, img_size=16)  # one step an epoch
    status = run(tmp_path, '--method', 'linear', **far)
    for file in tmp_path.rglob('params.pth'):
        assert all(x.isfinite().all() for x in torch.load(file, weights_only=True).values())
    assert (status == 2) == (not list(tmp_path.rglob('result.json'))) and (status == 2 or epochs < 9)
    assert ('Lower the learning rate: --set lr=250000' in capfd.readouterr().err) == (status == 2)


@pytest.mark.parametrize('step, epochs, said', [(1, 0, 'epoch 1, step 1'), (6, 2, 'epoch 3, step 2')])
def test_a_loss_that_is_not_a_number_stops_the_run_and_the_last_good_epoch_is_kept(
        step, epochs, said, tmp_path, refused, monkeypatch):
    calls = []

    def loss(logits, labels):
        calls.append(1)
        return F.cross_entropy(logits, labels) * (math.nan if len(calls) == step else 1)
    load_with(monkeypatch, loss=loss)
    err = refused('--method', 'ivpt', **SMALL | dict(epochs=5))
    folder, = (tmp_path / 'runs').glob('where_blue/*/*/seed0')
    assert f'the loss is nan in {said}' in err and len(calls) == 2 * epochs + 2  # at that epoch's end
    assert f'{epochs} of 5 epochs are kept in {folder}' in err
    kept = torch.load(folder / 'checkpoint.pth', weights_only=True)
    assert len(kept['records']) == epochs and all(x.isfinite().all() for x in kept['trained'].values())
    assert len((folder / 'log.jsonl').read_text().splitlines()) == epochs
    assert not (folder / 'result.json').exists()


@pytest.mark.parametrize('where', [(train.IVPT, 'forward'), (data, 'in_memory')])
def test_a_gpu_with_too_little_memory_is_reported_with_what_to_do_and_the_next_run_starts(
        where, tmp_path, refused, monkeypatch):
    """Whether the model needs it, or the training pictures."""
    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr(*where, full)
    err = refused('--method', 'ivpt,linear', **SMALL)
    assert len(list(tmp_path.rglob('result.json'))) == (where[1] == 'forward')  # of linear
    assert 'too little memory' in err and '--set batch=8' in err and '--set cache_gb=0' in err


def test_ctrl_c_before_the_first_epoch_ends_a_run_with_one_line(tmp_path, capfd, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, 'load', interrupted)
    assert run(tmp_path / 'runs', '--method', 'ivpt') == 130
    assert capfd.readouterr().err == 'error: stopped; what is finished is kept\n'
