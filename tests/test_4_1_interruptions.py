"""Whatever happens to a run, what was computed is there, and going on gives what never stopping gives."""

import io
import json
import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pictures import CONFIGS, no_network, oxford, run, tiny  # noqa: F401

import data
import faults
import paper
import train

CPU = torch.device('cpu')


def settings(folder, **changes):
    return tiny(runs=str(folder), epochs=4, img_size=24, **changes)


def outcome(config):
    """All that a finished run leaves and that does not depend on the clock."""
    folder = train.folder_of(config)
    result = train.read_result(folder)
    params = torch.load(folder / 'params.pth', weights_only=True)
    losses = [(r['epoch'], r['loss'], r['lr']) for r in map(json.loads, (folder / 'log.jsonl').read_text().splitlines())]
    return params, losses, [result[name] for name in ('accuracy', 'final_loss', 'params_digest')]


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(x, b[0][name]) for name, x in a[0].items())


def stop_at(monkeypatch, epoch, step, error=KeyboardInterrupt):
    """The next run ends with an error in a step of an epoch, both counted from 0."""
    batches = data.batches

    def stopped(pictures, config, device, now=None, *part):
        for i, batch in enumerate(batches(pictures, config, device, now, *part)):
            if (now, i) == (epoch, step):
                monkeypatch.setattr(data, 'batches', batches)
                raise error
            yield batch
    monkeypatch.setattr(data, 'batches', stopped)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """What runs that were never stopped leave, by method."""
    left = {}

    def run_once(method, **changes):
        if (key := (method, *changes.items())) not in left:
            config = settings(tmp_path_factory.mktemp('whole'), method=method, **changes)
            train.run(config)
            left[key] = outcome(config)
        return left[key]
    return run_once


@pytest.mark.parametrize('method, changes', [('ivpt', {}), ('full', {'optimizer': 'AdamW', 'lr': 0.001})])
@pytest.mark.parametrize('epoch, step', [(0, 1), (1, 0), (2, 2), (3, 3), (None, 0)])
def test_a_run_that_was_stopped_and_went_on_leaves_what_one_that_never_stopped_leaves(
        method, changes, epoch, step, tmp_path, monkeypatch, uninterrupted, capsys):
    config = settings(tmp_path, method=method, **changes)
    stop_at(monkeypatch, epoch, step)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    train.run(config)
    said = capsys.readouterr().out
    assert (f'resumed   after epoch {4 if epoch is None else epoch} of 4' in said) == (epoch != 0)
    assert same(outcome(config), uninterrupted(method, **changes))


@pytest.mark.parametrize('nth', range(4))
def test_a_run_that_was_stopped_between_a_checkpoint_and_the_log_has_the_whole_log(nth, tmp_path, monkeypatch, uninterrupted):
    """Also after the last epoch, when going on writes neither of them again."""
    write, logs = train.write, []

    def stopped(path, content):
        logs.extend([path] * (path.name == 'log.jsonl'))
        if path.name == 'log.jsonl' and len(logs) == nth + 1:
            raise KeyboardInterrupt
        write(path, content)
    monkeypatch.setattr(train, 'write', stopped)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(tmp_path, method='ivpt'))
    train.run(settings(tmp_path, method='ivpt'))
    assert same(outcome(settings(tmp_path)), uninterrupted('ivpt'))


def test_other_random_numbers_are_the_same_after_an_interruption_too(tmp_path, monkeypatch):
    """A student who adds dropout keeps this property: the loop seeds all generators, epoch by epoch."""
    make_model = train.make_model

    def with_dropout(*args):
        model = make_model(*args)
        model.head = torch.nn.Sequential(torch.nn.Dropout(0.5), model.head)
        return model
    monkeypatch.setattr(train, 'make_model', with_dropout)
    results = []
    for name, stop in (('whole', None), ('stopped', (2, 1))):
        config = settings(tmp_path / name)
        if stop:
            stop_at(monkeypatch, *stop)
            with pytest.raises(KeyboardInterrupt):
                train.run(config)
            torch.rand(17)  # another process has drawn other numbers
        train.run(config)
        results.append(outcome(config))
    assert same(*results)


def test_each_epoch_of_each_seed_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    batches, seeds = data.batches, []

    def watched(pictures, config, device, now=None, *part):
        seeds.extend([torch.initial_seed()] if now is not None else [])
        return batches(pictures, config, device, now, *part)
    monkeypatch.setattr(data, 'batches', watched)
    for seed in (0, 1):
        train.run(settings(tmp_path, method='linear', seed=seed))
    assert len(seeds) == len(set(seeds)) == 8


@pytest.mark.parametrize('name', ['params.pth', 'result.json'])
def test_a_result_is_there_only_when_its_parameters_are(name, tmp_path, monkeypatch):
    write = train.write

    def stopped(path, content):
        if path.name == name:
            raise KeyboardInterrupt
        write(path, content)
    monkeypatch.setattr(train, 'write', stopped)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(tmp_path, method='linear'))
    assert not list(tmp_path.rglob('result.json')) and len(list(tmp_path.rglob('params.pth'))) == (name == 'result.json')


def test_pictures_in_files_leave_the_same_bits_with_and_without_worker_processes(tmp_path):
    oxford(tmp_path)
    outcomes = []
    for workers, cache_gb in ((0, 0.0), (2, 0.0), (2, 8.0)):
        config = tiny('pets', data=str(tmp_path), runs=str(tmp_path / f'{workers}{cache_gb}'), workers=workers,
                      cache_gb=cache_gb, img_size=24, k=2, n_train=20, n_val=5)
        train.run(config)
        outcomes.append(outcome(config))
    assert same(outcomes[0], outcomes[1]) and same(outcomes[0], outcomes[2])


def test_a_result_holds_what_its_bits_depend_on_beside_the_settings(tmp_path):
    train.run(config := settings(tmp_path, method='linear'))
    result = json.loads((train.folder_of(config) / 'result.json').read_text())
    assert {name: result[name] for name in ('torch', 'torchvision', 'threads', 'device')} == {
        'torch': str(torch.__version__), 'torchvision': torchvision.__version__, 'threads': torch.get_num_threads(),
        'device': train.find_device().type}


def test_what_is_finished_is_not_run_again_but_by_again(tmp_path, monkeypatch, capsys):
    config = settings(tmp_path)
    first = train.run(config)
    monkeypatch.setattr(train, 'train', lambda *args: pytest.fail('it trains'))
    assert train.run(config) == first
    assert 'finished before' in capsys.readouterr().out
    monkeypatch.undo()
    assert train.run(config, again=True)['params_digest'] == first['params_digest']


@pytest.mark.parametrize('stopped', [False, True])
def test_other_settings_are_refused_with_the_difference_and_again_takes_them(stopped, tmp_path, monkeypatch):
    if stopped:
        stop_at(monkeypatch, 2, 0)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(tmp_path))
    else:
        train.run(settings(tmp_path))
    changes = dict(lr=0.5, N=3, n_train=20, score_on='val', epochs=5)
    for name, value in changes.items():
        config, changed = settings(tmp_path), settings(tmp_path)
        vars(changed)[name] = value
        with pytest.raises(train.InputError, match=f'{name} {getattr(config, name)!r} -> {value!r}.*--again'):
            train.run(changed)
    vars(changed).update(changes)
    assert train.run(changed, again=True)['config'].items() >= changes.items()


FREE = ['data', 'runs', 'point', 'workers', 'device', 'cache_gb', 'grid', 'weights', 'paper_accuracy', 'paper_params',
        'paper_backbone_params']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Goes on with a finished run as if it had been begun with other settings: a new value, or None for none."""
    config = tiny(runs=str(tmp_path_factory.mktemp('finished')), method='linear', img_size=24, epochs=1)
    result = train.run(config)

    def begun_with(name, value):
        begun = {**vars(config), name: value} if value else {x: vars(config)[x] for x in vars(config) if x != name}
        train.write_result(train.folder_of(config), result | {'config': begun})
        return train.run(config)['accuracy'] == result['accuracy']
    return begun_with


@pytest.mark.parametrize('name', FREE)
@pytest.mark.parametrize('value', ['another', None])
def test_a_setting_of_this_list_may_change_or_be_missing(name, value, finished):
    assert finished(name, value)


@pytest.mark.parametrize('name', sorted({*CONFIGS['defaults'], 'of_old'} - {*FREE}))
def test_any_other_setting_is_refused_when_it_changes_and_when_only_one_of_two_runs_has_it(name, finished):
    for value in ('another', *([None] if name in CONFIGS['defaults'] else [])):
        with pytest.raises(train.InputError, match=rf'\b{name} .*--again'):
            finished(name, value)


def test_settings_that_change_no_number_are_free(tmp_path, monkeypatch, uninterrupted):
    stop_at(monkeypatch, 2, 0)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(tmp_path))
    config = settings(tmp_path, data='elsewhere', workers=1, cache_gb=0.5)
    train.run(config)
    assert same(outcome(config), uninterrupted('ivpt'))


def test_another_machine_is_said(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 2, 0)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(tmp_path))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 99)
    train.run(settings(tmp_path))
    assert 'threads 1 -> 99: not the same bits' in capsys.readouterr().out


# ---- Damage ---------------------------------------------------------------------------------------------


def cut(content):
    return content[:len(content) // 2]


def flip(content):
    return content[:-100] + bytes([content[-100] ^ 4]) + content[-99:]


@pytest.mark.parametrize('damage', [cut, flip, lambda content: b''])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
        damage, tmp_path, monkeypatch, uninterrupted, capsys):
    config = settings(tmp_path)
    stop_at(monkeypatch, 3, 1)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    newest = train.folder_of(config) / 'checkpoint-1.pth'  # of 3 epochs
    newest.write_bytes(damage(newest.read_bytes()))
    train.run(config)
    said = capsys.readouterr().out
    assert f'{newest} is damaged and is not used' in said and 'after epoch 2 of 4' in said
    assert same(outcome(config), uninterrupted('ivpt'))


def test_with_both_checkpoints_damaged_a_run_starts_over(tmp_path, monkeypatch, uninterrupted):
    config = settings(tmp_path)
    stop_at(monkeypatch, 3, 1)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    for name in train.CHECKPOINTS:
        (train.folder_of(config) / name).write_bytes(b'x' * 1000)
    train.run(config)
    assert same(outcome(config), uninterrupted('ivpt'))


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    for seed in (0, 1):
        stop_at(monkeypatch, 2, 0)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(tmp_path, seed=seed))
    zero, one = (train.folder_of(settings(tmp_path, seed=seed)) for seed in (0, 1))
    (zero / 'checkpoint-0.pth').write_bytes((one / 'checkpoint-0.pth').read_bytes())
    with pytest.raises(train.InputError, match='seed 1 -> 0'):
        train.run(settings(tmp_path))


def test_a_damaged_result_is_measured_again(tmp_path, capsys):
    config = settings(tmp_path)
    first = train.run(config)
    file = train.folder_of(config) / 'result.json'
    for content in b'', b'{', b'[1]', b'null', b'{"accuracy": 0.99}', b'[' * 100_000, b'\xff':
        file.write_bytes(content)
        assert train.run(config) == first == json.loads(file.read_text())
        assert 'after epoch 4 of 4' in capsys.readouterr().out


def test_lost_parameters_are_made_again_from_the_last_checkpoint(tmp_path, capsys):
    config = settings(tmp_path)
    train.run(config)
    file = train.folder_of(config) / 'params.pth'
    whole = file.read_bytes()
    for content in None, whole[:-9]:
        file.unlink() if content is None else file.write_bytes(content)
        train.run(config)
        said = capsys.readouterr().out
        assert 'params.pth is not what result.json was measured with' in said and 'after epoch 4 of 4' in said
        assert file.read_bytes() == whole


class Code:
    """What a pickle can hold: a call."""

    def __reduce__(self):
        return print, ('this was run',)


def test_a_checkpoint_with_a_right_digest_and_code_in_it_is_not_run(tmp_path, capsys):
    config, file = settings(tmp_path), io.BytesIO()
    torch.save(Code(), file)
    path = train.folder_of(config) / train.CHECKPOINTS[0]
    train.write(path, train.digest(file.getvalue()).encode() + file.getvalue())
    train.run(config)
    out = capsys.readouterr().out
    assert 'is damaged and is not used' in out and 'this was run' not in out


# ---- Files that cannot be written -----------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_one_line_before_the_first_epoch(tmp_path, capfd):
    (tmp_path / 'file').write_text('')
    assert run(tmp_path / 'file', '--method', 'linear', img_size=24) == 2
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and 'cannot be written' in err and 'epoch  ' not in out


def test_a_disk_that_is_full_is_one_line_and_the_epochs_before_are_whole(tmp_path, monkeypatch, capfd, uninterrupted):
    fsync, calls = train.os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) > 6:  # the log, then two files an epoch: the checkpoint of the third is written, its log is not
            raise OSError(28, 'No space left on device')
        fsync(number)
    monkeypatch.setattr(train.os, 'fsync', full)
    argv = '--method', 'ivpt', '--seed', '0,1'
    assert run(tmp_path, *argv, epochs=4, img_size=24) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and 'log.jsonl cannot be written (No space left on device)' in err
    assert not list(tmp_path.rglob('*.part'))
    monkeypatch.setattr(train.os, 'fsync', fsync)
    assert run(tmp_path, *argv, epochs=4, img_size=24) == 0
    assert 'after epoch 3 of 4' in capfd.readouterr().out
    assert same(outcome(settings(tmp_path)), uninterrupted('ivpt'))


def test_a_write_that_is_killed_half_way_leaves_the_file_before_it(tmp_path, monkeypatch):
    train.write(tmp_path / 'file', b'before')

    def killed(number):
        raise KeyboardInterrupt
    monkeypatch.setattr(train.os, 'fsync', killed)
    with pytest.raises(KeyboardInterrupt):
        train.write(tmp_path / 'file', b'after')
    assert [path.name for path in tmp_path.iterdir()] == ['file'] and (tmp_path / 'file').read_bytes() == b'before'


def test_kills_damages_and_a_full_disk_lose_nothing(tmp_path):
    """A few; `python tests/faults.py` tries many."""
    table = faults.faults(tmp_path, kills=3, damages=10, disks=1, seed=1, mounting=False)
    assert sum(map(len, table.values())) == 34 and not list(filter(None, sum(table.values(), []))), table


# ---- One run that does not stop the others --------------------------------------------------------------


def test_what_is_wrong_with_one_run_does_not_keep_the_next_from_its_turn(tmp_path, capfd):
    assert run(tmp_path, '--task', 'pets,where_blue', '--method', 'vpt,ivpt', data=str(tmp_path), img_size=24) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and 'oxford' in err  # once, not once a method
    assert len(list(tmp_path.rglob('result.json'))) == 2


# ---- Signals, and two at once: in processes of their own ------------------------------------------------


def signal_at(number, step):
    """For a child: send yourself a signal in a step, counted from 0."""
    steps, loss = [], F.cross_entropy

    def cross_entropy(*args):
        steps.append(1)
        if len(steps) == step + 1:
            os.kill(os.getpid(), number)
        return loss(*args)
    F.cross_entropy = cross_entropy


@pytest.mark.parametrize('name, status, said', [
    ('SIGINT', 130, '2 of 4 epochs are kept in'), ('SIGTERM', -signal.SIGTERM, '')])
def test_after_ctrl_c_and_sigterm_a_run_goes_on_as_if_nothing_had_been(name, status, said, tmp_path, uninterrupted):
    runs = tmp_path / 'runs'
    pid = faults.child(runs, lambda: signal_at(getattr(signal, name), step=10), 'epochs=4')  # 4 steps an epoch
    assert faults.ended(pid) == status
    err = faults.said(runs, 'err')
    assert err.count('\n') == bool(said) and said in err and ('the same command goes on from there' in err) == bool(said)
    assert faults.ended(faults.child(runs, lambda: None, 'epochs=4')) == 0
    assert 'resumed   after epoch 2 of 4' in faults.said(runs)
    assert same(outcome(settings(runs)), uninterrupted('ivpt'))


def test_two_processes_on_the_same_run_leave_what_one_leaves(tmp_path, uninterrupted):
    def slow():
        fsync = os.fsync
        os.fsync = lambda number: (time.sleep(0.02), fsync(number))  # they write at the same time
    pids = [faults.child(tmp_path / 'runs', slow, 'epochs=4') for _ in range(2)]
    assert [faults.ended(pid) for pid in pids] == [0, 0]
    assert not list(tmp_path.rglob('*.part'))
    config = settings(tmp_path / 'runs')
    paper.open_run(train.folder_of(config), CPU)  # the result is of the parameters beside it
    assert same(outcome(config), uninterrupted('ivpt'))
