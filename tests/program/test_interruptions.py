"""Whatever happens to a run, what was computed is there, and going on gives what never stopping gives."""

import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import outcome
from pictures import NANO, no_network, oxford, run, save_picture, tiny, vtab  # noqa: F401

import data
import train

HOW = dict(epochs=4, img_size=16, n_train=24, n_val=8, n_test=8)  # two steps an epoch; as in faults.py


def config_of(folder, **changes):
    return tiny(runs=folder, **HOW | changes)


def run_and_stop(monkeypatch, config, epoch=2, step=0):
    """A run that is interrupted in a step of an epoch, both counted from 0, or while it is scored (epoch None): it says
    how far it got."""
    batches, done = data.batches, 4 if epoch is None else epoch

    def stopped(pictures, config, device, now=None, *part):
        for i, batch in enumerate(batches(pictures, config, device, now, *part)):
            if (now, i) == (epoch, step) and len(pictures) > 1:  # not at the rehearsal
                raise KeyboardInterrupt
            yield batch
    with monkeypatch.context() as patch:
        patch.setattr(data, 'batches', stopped)
        with pytest.raises(KeyboardInterrupt, match=f'{done} of 4 epochs are kept in .*/seed0;'):
            train.run(config)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """What runs that were never stopped leave, by method."""
    @cache
    def run_once(**changes):
        train.run(config_of(folder := tmp_path_factory.mktemp('whole'), **changes))
        return outcome(folder)
    return run_once


@pytest.mark.parametrize('at, changes', [((0, 1), {}), ((1, 0), {}), ((3, 1), {}), ((None, 0), {}),
                                         ((2, 1), {'method': 'full', 'optimizer': 'AdamW', 'lr': 0.001})])
def test_a_run_that_was_stopped_and_went_on_leaves_what_one_that_never_stopped_leaves(
        at, changes, tmp_path, monkeypatch, uninterrupted, capsys):
    """Also with other settings of the machine. at: the epoch and the step in which the run is stopped."""
    run_and_stop(monkeypatch, config_of(tmp_path, **changes), *at)
    train.run(config_of(tmp_path, **changes, data='elsewhere', workers=1, cache_gb=0.5))
    assert f'resumed   after epoch {4 if at[0] is None else at[0]}, ' in capsys.readouterr().out
    assert outcome(tmp_path) == uninterrupted(**changes)


@pytest.mark.parametrize('name, nth', [('checkpoint.pth', 0), ('checkpoint.pth', 3), ('log.jsonl', 0), ('log.jsonl', 2),
                                       ('log.jsonl', 4), ('params.pth', 0), ('predictions.csv', 0),
                                       ('result.json', 0)])
def test_a_run_that_was_stopped_in_a_write_has_no_result_and_goes_on_to_the_same_result(
        name, nth, tmp_path, monkeypatch, uninterrupted):
    """After the last log no epoch is left to write it again. A result is there only when its parameters are."""
    write, names = train.write, []

    def stopped(path, content):
        names.append(path.name)
        if path.name == name and names.count(name) == nth + 1:
            raise KeyboardInterrupt
        write(path, content)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'write', stopped)
        train.run(config_of(tmp_path))
    assert not list(tmp_path.rglob('result.json'))
    assert len(list(tmp_path.rglob('params.pth'))) == (name in ('predictions.csv', 'result.json'))
    train.run(config_of(tmp_path))
    assert outcome(tmp_path) == uninterrupted()


@pytest.mark.parametrize('moment', ['rmtree', 'rename', 'checkpoint.pth', 'params.pth', 'predictions.csv',
                                    'result.json', 'end'])
def test_a_run_with_again_that_is_killed_goes_on_and_the_old_or_the_new_run_is_whole(
        moment, tmp_path, monkeypatch, uninterrupted):
    """Killed before the older one is removed, before the old one has its new name, before a file is written."""
    config = config_of(tmp_path, epochs=1)
    folder = train.folder_of(config)
    train.run(config)
    old = train.run(config, again=True)

    def killed(work, name):
        def call(*args, **more):
            if name == moment or getattr(args[0], 'name', '') == moment:
                raise KeyboardInterrupt
            return work(*args, **more)
        return call
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(train.shutil, 'rmtree', killed(shutil.rmtree, 'rmtree'))
        patch.setattr(train.Path, 'rename', killed(Path.rename, 'rename'))
        patch.setattr(train, 'write', killed(train.write, ''))
        train.run(config, again=True)
    whole = [train.read_result(place) for place in (folder, folder.with_name('seed0.before'))]
    assert {result['params_digest'] for result in whole if result} == {old['params_digest']}
    train.run(config, again=True)
    assert outcome(tmp_path) == uninterrupted(epochs=1) and train.read_result(folder.with_name('seed0.before'))


def test_random_numbers_of_all_generators_are_the_same_after_an_interruption(tmp_path, monkeypatch):
    """A student who adds dropout keeps this property: the loop seeds all generators, epoch by epoch."""
    class Noise(torch.nn.Dropout):
        def forward(self, x):
            return super().forward(x) * random.random() + np.random.rand() if self.training else x

    def with_dropout(*args, make_model=train.make_model):
        model, identity = make_model(*args)
        model.head = torch.nn.Sequential(Noise(), model.head)
        return model, identity
    monkeypatch.setattr(train, 'make_model', with_dropout)
    train.run(config_of(tmp_path / 'whole'))
    run_and_stop(monkeypatch, config_of(tmp_path / 'stopped'), 2, 1)
    torch.rand(17), np.random.rand(17), random.random()  # another process has drawn other numbers
    train.run(config_of(tmp_path / 'stopped'))
    assert outcome(tmp_path / 'stopped') == outcome(tmp_path / 'whole')


def test_each_epoch_of_each_seed_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    numbers, set_lr = [], train.set_lr
    monkeypatch.setattr(train, 'set_lr', lambda *args: (numbers.append(torch.initial_seed()), set_lr(*args)))
    for seed in (0, 1):
        train.run(config_of(tmp_path, method='linear', seed=seed))
    assert len(numbers) == 2 * len(set(numbers)) == 16  # two steps an epoch


def test_pictures_in_files_leave_the_same_bits_in_memory_or_not_and_with_threads_or_without(tmp_path):
    oxford(tmp_path)
    outcomes = []
    for workers, cache_gb in ((0, 0.0), (2, 0.0), (2, 8.0)):
        runs = tmp_path / f'{workers}{cache_gb}'
        train.run(tiny('pets', data=tmp_path, runs=runs, workers=workers, cache_gb=cache_gb, img_size=24, k=2,
                       n_train=20, n_val=5))
        outcomes.append(outcome(runs))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(tmp_path, monkeypatch):
    """What the command line changes has another folder. An entry of configs.yaml may have been changed."""
    run_and_stop(monkeypatch, config := config_of(tmp_path))
    changed = replace(config, loop=replace(config.loop, lr=0.5), prompts=replace(config.prompts, N=3))
    with pytest.raises(train.InputError, match='N 10 -> 3, lr 0.07 -> 0.5.*--again'):
        train.run(changed)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Goes on with a finished run as if it had been begun with another value of a setting; None: without it."""
    config = config_of(tmp_path_factory.mktemp('finished'), method='linear', epochs=1)
    result = train.run(config)

    def begun_with(group, name, value):
        begun = json.loads(json.dumps(result))
        where = begun['identity'] if group == 'identity' else begun['settings'][group]
        where[name] = value
        if value is None:
            del where[name]
        (train.folder_of(config) / 'result.json').write_text(json.dumps(train.signed(begun)))
        return train.run(config) == begun
    return begun_with


@pytest.mark.parametrize('group, name', [*(('machine', x.name) for x in fields(train.Machine)), ('loop', 'precision')])
def test_what_is_finished_is_not_run_again_and_what_changes_no_number_may_change_or_be_missing(
        group, name, finished, capsys):
    """As the path of the weights. Of the precision counts what is computed in: `auto` differs between devices."""
    assert finished(group, name, 'another') and finished(group, name, None)
    assert capsys.readouterr().out.count('finished before') == 2


@pytest.mark.parametrize('group, name', [
    ('options', 'ask'), ('options', 'grain'),
    *((group, x.name) for group, kind in train.GROUPS.items() for x in fields(kind)
      if group != 'machine' and x.name != 'precision')])
def test_any_other_setting_is_refused_when_it_changes_and_when_only_one_of_two_runs_has_it(group, name, finished):
    for value in 'another', None:
        with pytest.raises(train.InputError, match=rf'\b{name} .*--again'):
            finished(group, name, value)


@pytest.mark.parametrize('group, name', [
    ('identity', 'precision'), ('identity', 'backbone'), ('identity', 'train sizes'), ('loop', 'a setting of old')])
def test_a_run_that_was_made_of_something_else_is_refused(group, name, finished):
    """That other weights are another backbone is in test_weights.py."""
    with pytest.raises(train.InputError, match=rf"\b{name} 'another' -> .*--again"):
        finished(group, name, 'another')


def test_a_run_goes_on_where_its_pictures_were_moved_to_and_not_on_others(tmp_path, capfd):
    """Nor after the official lists have appeared. What counts of the pictures is in test_4_1_data.py."""
    def pets(folder, status, said):
        argv = '--task', 'pets', '--model', NANO, '--method', 'linear', '--data', str(tmp_path / folder)
        how = dict(img_size=24, epochs=1, n_train=8, n_val=3, n_test=5)
        assert run(tmp_path / 'runs', *argv, **how) == status
        assert said in ''.join(capfd.readouterr())
    oxford(tmp_path / 'data', trainval=11, test=5)
    pets('data', 0, 'test accuracy')
    (tmp_path / 'data').rename(tmp_path / 'moved')
    pets('moved', 0, 'finished before')
    save_picture(tmp_path / 'moved/oxford-iiit-pet/images/breed_1_1000.jpg', 77, 90, 80)
    pets('moved', 2, "test sizes '")
    vtab(tmp_path / 'moved')
    pets('moved', 2, "test names '")


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


def test_a_result_from_another_machine_is_named(tmp_path, monkeypatch, capsys):
    run_and_stop(monkeypatch, config_of(tmp_path))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 99)
    train.run(config_of(tmp_path))
    assert 'threads 1 -> 99: not the same bits' in capsys.readouterr().out


class Code:
    """What a pickle can hold: a call."""

    def __reduce__(self):
        return print, ('this was run',)


def saved(x):
    torch.save(x, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize('damage', [
    lambda content: content[:len(content) // 2],
    lambda content: content[:5000] + bytes([content[5000] ^ 4]) + content[5001:],
    lambda content: b'', lambda content: saved(Code()), lambda content: saved({'b': torch.zeros(64)})])
def test_a_damaged_checkpoint_is_named_and_the_run_starts_over(damage, tmp_path, monkeypatch, uninterrupted, capsys):
    """So is one with code in it, which is not run, and another file of tensors."""
    config = config_of(tmp_path)
    run_and_stop(monkeypatch, config, 3, 1)
    file = train.folder_of(config) / 'checkpoint.pth'
    file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    train.run(config)
    said = capsys.readouterr().out
    assert f'{file} is damaged and is not used' in said and 'resumed' not in said and 'this was run' not in said
    assert outcome(tmp_path) == uninterrupted()


@pytest.mark.parametrize('name, contents', [
    ('result.json', [b'', b'{', b'[1]', b'null', b'{"accuracy": 0.99}', b'[' * 100_000, b'\xff']),
    ('params.pth', [b'', b'x' * 27_000])])
def test_a_damaged_result_or_parameters_of_another_run_are_made_again_from_the_checkpoint(
        name, contents, tmp_path, capsys):
    config = config_of(tmp_path)
    first = train.run(config)
    file = train.folder_of(config) / name
    whole = file.read_bytes()
    for content in contents:
        file.write_bytes(content)
        assert train.run(config) == first and file.read_bytes() == whole
        assert 'after epoch 4' in capsys.readouterr().out
    file.unlink()
    assert train.run(config) == first and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_ends_all_runs_with_one_line_before_the_first_epoch(tmp_path, capfd):
    (tmp_path / 'file').write_text('')
    assert run(tmp_path / 'file', '--method', 'linear', '--seed', '0,1', img_size=24) == 2
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and 'cannot be written' in err and 'epoch  ' not in out


def test_kills_damages_and_a_full_disk_lose_nothing(tmp_path):
    """A few; `python tests/tools/faults.py` tries many."""
    table = faults.faults(tmp_path, kills=3, damages=1, disks=1, seed=1)
    assert sum(map(len, table.values())) == 12 and not list(filter(None, sum(table.values(), []))), table


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_after_ctrl_c_and_sigterm_a_run_goes_on_and_ends_as_an_unstopped_one(number, status, tmp_path, uninterrupted):
    def stopped_in_step_6():
        steps, backward = iter(range(99)), torch.Tensor.backward
        torch.Tensor.backward = lambda *args: (next(steps) == 5 and os.kill(os.getpid(), number), backward(*args))
    runs = tmp_path / 'runs'
    assert faults.ended(faults.child(runs, stopped_in_step_6)) == status
    said = re.escape(f'2 of 4 epochs are kept in {faults.folder_of(runs)}; the same command goes on from there\n')
    assert re.fullmatch(f'error: stopped. {said}' if status == 130 else '', faults.said(runs, 'err'))
    assert faults.ended(faults.child(runs)) == 0
    assert 'resumed   after epoch 2' in faults.said(runs)
    assert outcome(runs) == uninterrupted()


def test_two_processes_on_the_same_run_leave_what_one_leaves(tmp_path, uninterrupted):
    def slow():
        fsync = os.fsync
        os.fsync = lambda number: (time.sleep(0.02), fsync(number))  # they write at the same time
    runs = tmp_path / 'runs'
    pids = [faults.child(runs, slow) for _ in range(2)]
    assert [faults.ended(pid) for pid in pids] == [0, 0]
    assert not list(tmp_path.rglob('*.part')) and not faults.broken(runs)
    assert outcome(runs) == uninterrupted()


def test_a_stream_that_nobody_reads_any_more_ends_a_run_as_it_ends_other_commands(tmp_path):
    def head():
        read, write = os.pipe()
        os.close(read)
        sys.stdout = os.fdopen(write, 'w')
    assert faults.ended(faults.child(tmp_path / 'runs', head)) == -signal.SIGPIPE
    assert faults.said(tmp_path / 'runs', 'err') == ''


def test_a_full_output_stream_ends_a_run_with_one_line(tmp_path):
    def full():
        sys.stdout = open('/dev/full', 'w')
    assert faults.ended(faults.child(tmp_path / 'runs', full)) == 2
    err = faults.said(tmp_path / 'runs', 'err')
    assert err.count('\n') == 1 and err.startswith('error: '), err
