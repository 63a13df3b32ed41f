"""What a run was made of: its pictures, its backbone as it was loaded, and its code. None of these is a path."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from pictures import NANO, folders_of, no_network, oxford, run, save_picture, task_of, tiny, vtab  # noqa: F401

import data
import train
import vit

HOW = dict(img_size=24, epochs=1, k=2, batch=8, n_train=8, n_val=3, n_test=5)


@pytest.fixture
def pets(tmp_path, capfd):
    """`python train.py --task pets`, tiny. Returns its status and what it said."""
    def pets(data='data', **changes):
        argv = '--task', 'pets', '--model', NANO, '--method', 'ivpt', '--data', str(tmp_path / data)
        status = run(tmp_path / 'runs', *argv, **HOW | changes)
        return status, ''.join(capfd.readouterr())
    return pets


def line(file, text):
    """For a change: the first line of a list becomes another one."""
    return lambda root: (root / file).write_text(text + '\n' + (root / file).read_text().partition('\n')[2])


CHANGES = {
    'train labels': line('train800.txt', 'images/train800/000000.jpg 5'),
    'train names': line('train800.txt', 'images/val200/000000.jpg 0'),
    'val labels': line('val200.txt', 'images/val200/000000.jpg 9'),
    'test names': line('test.txt', 'images/val200/000000.jpg 2'),
    'test sizes': lambda root: save_picture(root / 'images' / 'test' / '000001.jpg', 77, 90, 80),
}


@pytest.mark.parametrize('what', CHANGES)
def test_a_run_is_not_taken_up_again_on_other_pictures(what, tmp_path, pets):
    root = vtab(tmp_path / 'data')
    assert pets()[0] == 0
    CHANGES[what](root)
    status, said = pets()
    assert status == 2 and f"{what} '" in said and 'finished before' not in said


def test_pets_does_not_go_on_after_the_official_lists_have_appeared(tmp_path, pets):
    oxford(tmp_path / 'data', trainval=11, test=5)
    assert pets()[0] == 0
    vtab(tmp_path / 'data')
    status, said = pets()
    assert status == 2 and "test names '" in said


def test_moving_the_data_folder_is_no_difference(tmp_path, pets):
    vtab(tmp_path / 'data')
    assert pets()[0] == 0
    (tmp_path / 'data').rename(tmp_path / 'moved')
    status, said = pets(data='moved')
    assert status == 0 and 'finished before' in said


def test_pictures_in_memory_are_told_apart_by_their_pixels_and_labels_of_any_kind_by_their_values():
    masks = [(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)) for _ in range(2)]
    task = task_of(pictures=masks)
    told = data.digest(task, 'data')
    for part, changed in enumerate(('train names', 'train labels')):
        masks[1][part].view(-1)[3] += 1
        other = data.digest(task, 'data')
        assert {name for name in told if told[name] != other[name]} == {changed}
        masks[1][part].view(-1)[3] -= 1
    assert data.digest(replace(task, classes=['a', 'b', 'c']), 'data')['class names'] != told['class names']


def backbone(path, seed=0):
    torch.manual_seed(seed)
    torch.save(vit.build(NANO).state_dict(), path)
    return str(path)


def test_a_run_is_not_taken_up_again_on_another_backbone_at_the_same_path(tmp_path, capfd):
    file = backbone(tmp_path / 'a.pth', 0)
    how = dict(epochs=1, n_train=8, n_val=2, n_test=4)
    assert run(tmp_path / 'runs', '--method', 'vpt', weights=file, **how) == 0
    shutil.copy(file, tmp_path / 'copy.pth')
    backbone(file, 1)
    capfd.readouterr()
    assert run(tmp_path / 'runs', '--method', 'vpt', weights=file, **how) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and 'backbone' in err and '->' in err
    # the same file by another path is the same run
    assert run(tmp_path / 'runs', '--method', 'vpt', weights=tmp_path / 'copy.pth', **how) == 0
    assert 'finished before' in capfd.readouterr().out


def test_the_head_of_a_backbone_which_no_method_keeps_is_no_part_of_its_identity(tmp_path):
    """`full` and `linear` start with a head of their own: all methods have the same backbone."""
    file = backbone(tmp_path / 'a.pth')
    found = {train.make_model(tiny(method=method, weights=file), task_of(n=9))[1]['backbone']
             for method in ('full', 'linear', 'bias', 'ivpt')}
    assert len(found) == 1 and len(found.pop()) == 12


@pytest.mark.parametrize('change', [{}, {'mean': '[0.1, 0.2, 0.3]'}])
def test_the_header_says_what_weights_were_loaded_and_what_pixels_are_normalised_with(change, tmp_path, capfd):
    file = backbone(tmp_path / 'a.pth')
    how = dict(weights=file, epochs=1, n_train=8, n_val=2, n_test=4)
    assert run(tmp_path / 'runs', '--method', 'linear', **how, **change) == 0
    folder, = folders_of(tmp_path / 'runs')
    identity = json.loads((folder / 'result.json').read_text())['identity']
    out, mean = capfd.readouterr().out, change.get('mean', '[0.5, 0.5, 0.5]')
    assert f'weights {file} ({identity["backbone"]})' in out
    assert f'pixels    mean {mean}, std [0.5, 0.5, 0.5]; if the weights were trained with others' in out


def test_the_code_of_a_task_a_method_and_a_backbone_in_a_file_is_a_part_of_the_run(tmp_path):
    """By what stands in the file. Its path is in the settings, its name in the message."""
    (tmp_path / 'mine.py').write_text('import vit\nimport data\n\n\n'
                                      'def task(settings):\n    return data.Task([], [], [], ["a"])\n\n\n'
                                      'def backbone(settings, num_classes):\n    return vit.ViT(16, 8, (12, 2, 2))\n')
    (tmp_path / 'method.py').write_text('from torch import nn\n\n\n'
                                        'def head(vit, num_classes, settings):\n    return nn.Linear(1, 1)\n')
    config = tiny(f'{tmp_path}/mine.py:task', f'{tmp_path}/method.py:head', img_size=16)
    config = replace(config, backbone=replace(config.backbone, build=f'{tmp_path}/mine.py:backbone'))
    first = train.make_model(config, data.load(config))[1]
    assert set(first) == {'backbone', 'pictures by', 'code of mine.py:task', 'code of mine.py:backbone',
                          'code of method.py:head'}
    (tmp_path / 'method.py').write_text((tmp_path / 'method.py').read_text().replace('(1, 1)', '(1, 2)'))
    other = train.make_model(config, data.load(config))[1]
    assert {name for name in first if first[name] != other[name]} == {'code of method.py:head'}
