"""What a run belongs to: its pictures, and its backbone as it was loaded. Neither is their path."""

import json
import shutil

import pytest
import torch
from pictures import NANO, folder_of, no_network, oxford, run, save_picture, vtab  # noqa: F401

import data
import train
import vit

HOW = dict(img_size=24, epochs=1, k=2, batch=8, n_train=8, n_val=3, n_test=5)


@pytest.fixture
def pets(tmp_path, capfd):
    """`python train.py --task pets`, tiny. Returns its status and what it said."""
    def pets(*argv, data='data', method='ivpt', **changes):
        argv = '--task', 'pets', '--model', NANO, '--method', method, '--data', str(tmp_path / data), *argv
        status = run(tmp_path / 'runs', *argv, **HOW | changes)
        return status, ''.join(capfd.readouterr())
    return pets


def rewrite(file, change):
    file.write_text(change(file.read_text()))


# ---- Pictures -------------------------------------------------------------------------------------------


def first_becomes(text):
    """A list whose first line is another."""
    return lambda lines: text + '\n' + lines.split('\n', 1)[1]


CHANGES = {
    'train labels': lambda root: rewrite(root / 'train800.txt', first_becomes('images/train800/000000.jpg 5')),
    'train names': lambda root: rewrite(root / 'train800.txt', first_becomes('images/val200/000000.jpg 0')),
    'val labels': lambda root: rewrite(root / 'val200.txt', first_becomes('images/val200/000000.jpg 9')),
    'test names': lambda root: rewrite(root / 'test.txt', lambda text: '\n'.join(text.split('\n')[::-1]).strip() + '\n'),
    'test sizes': lambda root: save_picture(root / 'images' / 'test' / '000001.jpg', 77, 90, 80),
}


@pytest.mark.parametrize('what', CHANGES)
def test_a_run_is_not_taken_up_again_on_other_pictures(what, tmp_path, pets):
    root = vtab(tmp_path / 'data')
    assert pets()[0] == 0
    CHANGES[what](root)
    status, said = pets()
    assert status == 2 and f"{what} '" in said and 'finished before' not in said
    for action in ['--noise', '0'], ['--show']:
        status, said = pets(*action)
        assert status == 2 and f"{what} '" in said


def test_an_interrupted_run_does_not_go_on_with_permuted_labels(tmp_path, pets, monkeypatch):
    root = vtab(tmp_path / 'data')

    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train', stopped)
        assert pets(epochs=2)[0] == 130
    CHANGES['train labels'](root)
    status, said = pets(epochs=2)
    assert status == 2 and "train labels '" in said and 'resumed' not in said


def test_pets_does_not_go_on_after_the_official_lists_have_appeared(tmp_path, pets):
    oxford(tmp_path / 'data')
    assert pets()[0] == 0
    vtab(tmp_path / 'data')
    status, said = pets()
    assert status == 2 and "test names '" in said


def test_a_model_is_not_scored_on_a_task_with_other_classes(tmp_path, capfd):
    for name, classes in ('three', 3), ('eleven', 11):
        for part, n in ('train', 2), ('test', 1):
            for c in range(classes):
                for i in range(n):
                    save_picture(tmp_path / name / part / f'class{c:02d}' / f'{i}.png', 100 * c + i)
    argv = '--task', 'folder', '--model', NANO, '--method', 'linear', '--data'
    assert run(tmp_path / 'runs', *argv, str(tmp_path / 'three'), **HOW) == 0
    capfd.readouterr()
    assert run(tmp_path / 'runs', *argv, str(tmp_path / 'eleven'), '--noise', '0', **HOW) == 2
    out, err = capfd.readouterr()
    assert "class names '3 " in err and '|' not in out


def test_moving_the_data_folder_is_no_difference(tmp_path, pets):
    vtab(tmp_path / 'data')
    assert pets()[0] == 0
    (tmp_path / 'data').rename(tmp_path / 'moved')
    status, said = pets(data='moved')
    assert status == 0 and 'finished before' in said
    for action in ['--noise', '0'], ['--show']:
        assert pets(*action, data='moved')[0] == 0


def test_drawn_pictures_are_told_apart_by_their_pixels(tmp_path, capfd):
    assert run(tmp_path, '--method', 'linear', img_size=24, epochs=1) == 0
    config = train.settings(train.read_configs(), 'where_blue')[0]
    task = data.load(config)
    told = data.digest(task, config)
    task.train[3][0][0, 0, 0] += 1
    other = data.digest(task, config)
    assert {name for name in told if told[name] != other[name]} == {'train names'}


# ---- Weights --------------------------------------------------------------------------------------------


def backbone(path, seed):
    torch.manual_seed(seed)
    torch.save(vit.build(NANO).state_dict(), path)
    return str(path)


def test_a_run_is_not_taken_up_again_on_another_backbone_at_the_same_path(tmp_path, capfd):
    file = backbone(tmp_path / 'a.pth', 0)
    argv = '--method', 'vpt'
    how = dict(weights=file, epochs=1)
    assert run(tmp_path / 'runs', *argv, **how) == 0
    shutil.copy(file, tmp_path / 'copy.pth')
    backbone(file, 1)
    for action in [], ['--noise', '0'], ['--show']:
        capfd.readouterr()
        assert run(tmp_path / 'runs', *argv, *action, **how) == 2
        err = capfd.readouterr().err
        assert err.count('\n') == 1 and 'backbone' in err and '->' in err
    how['weights'] = str(tmp_path / 'copy.pth')  # the same file by another path is the same run
    for action in [], ['--noise', '0'], ['--show']:
        assert run(tmp_path / 'runs', *argv, *action, **how) == 0
    assert 'finished before' in capfd.readouterr().out
    result = json.loads((folder_of(tmp_path / 'runs', 'vpt') / 'result.json').read_text())
    assert result['noise']['0'] == result['accuracy']


def test_a_run_that_trained_everything_needs_no_other_file_to_be_looked_at(tmp_path, capfd):
    file = backbone(tmp_path / 'a.pth', 0)
    for method in 'full', 'bias':
        assert run(tmp_path / 'runs', '--method', method, weights=file, epochs=1) == 0
    (tmp_path / 'a.pth').unlink()
    for method, status in ('full', 0), ('bias', 2):
        argv = '--show', '--run', str(folder_of(tmp_path / 'runs', method))
        assert train.main(list(argv)) == status
    assert f'{file}: there is no such file' in capfd.readouterr().err


def test_the_weights_that_a_frozen_backbone_was_loaded_with_are_in_the_header_and_the_result(tmp_path, capfd):
    file = backbone(tmp_path / 'a.pth', 0)
    assert run(tmp_path / 'runs', '--method', 'linear', weights=file, epochs=1) == 0
    result = json.loads((folder_of(tmp_path / 'runs', 'linear') / 'result.json').read_text())
    assert f'weights {file} ({result["config"]["backbone"]})' in capfd.readouterr().out


@pytest.mark.parametrize('change', [{}, {'mean': '[0.1, 0.2, 0.3]'}])
def test_the_header_says_what_pixels_are_normalised_with(change, tmp_path, capfd):
    file = backbone(tmp_path / 'a.pth', 0)
    assert run(tmp_path / 'runs', '--method', 'linear', weights=file, epochs=1, **change) == 0
    mean = change.get('mean', '[0.5, 0.5, 0.5]')
    assert f'pixels    mean {mean}, std [0.5, 0.5, 0.5]; if the weights were trained with others' in capfd.readouterr().out
