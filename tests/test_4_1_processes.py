"""Number formats and devices; and many processes: a sweep that is divided by torchrun, and one run that is shared."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from pictures import CONFIGS, folder_of, run, tiny
from torch import distributed as dist

import data
import train

CPU = torch.device('cpu')
SMALL = dict(img_size=24, epochs=2, k=2)

# ---- Number formats -------------------------------------------------------------------------------------


def settings(model='vit_base_patch16_224', **changes):
    return train.settings(CONFIGS, 'where_blue', 'ivpt', model, {'weights': 'random'} | changes)[0]


@pytest.mark.parametrize('bfloat16, capability, expected', [
    (True, (8, 0), 'bfloat16'), (True, (9, 0), 'bfloat16'),  # A100, H100
    (False, (7, 5), 'float16'), (False, (7, 0), 'float16'),  # T4 and 2080 Ti, V100
    (False, (6, 1), 'float32'), (False, (7, 2), 'float32')])  # no tensor cores; and a chip that nobody here knows
def test_on_a_gpu_auto_is_the_fastest_format_that_it_has_in_hardware(bfloat16, capability, expected, monkeypatch):
    def supported(including_emulation):
        assert not including_emulation
        return bfloat16
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert train.number_format(settings(), torch.device('cuda'))[0] == expected


@pytest.mark.parametrize('has', [{}, {'avx512_bf16': True}, {'amx_bf16': True}, {'avx512_bf16': False, 'amx_bf16': False}])
@pytest.mark.parametrize('model, wide', [('vit_nano_patch8_48', False), ('vit_tiny_patch16_224', True),
                                         ('vit_small_patch16_224', True), ('vit_base_patch16_224', True)])
def test_on_a_cpu_auto_is_bfloat16_where_it_has_instructions_for_it_and_the_model_is_wide(has, model, wide, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    assert train.number_format(settings(model), CPU)[0] == ('bfloat16' if wide and any(has.values()) else 'float32')


def test_a_format_that_is_asked_for_is_taken_whatever_the_device():
    for name in 'float32', 'bfloat16', 'float16':
        assert train.number_format(settings(precision=name), CPU)[0] == name


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_the_logits_of_a_run_are_in_its_format_and_the_header_and_the_result_say_so(precision, tmp_path, capsys, monkeypatch):
    seen, loss = set(), F.cross_entropy
    monkeypatch.setattr(F, 'cross_entropy', lambda logits, labels: seen.add(logits.dtype) or loss(logits, labels))
    result = train.run(tiny(runs=str(tmp_path), precision=precision, **SMALL))
    assert seen == {getattr(torch, precision)}
    assert result['config']['precision'] == precision and f'numbers   {precision}: as asked for' in capsys.readouterr().out


def test_a_run_does_not_go_on_in_another_format(tmp_path):
    train.run(tiny(runs=str(tmp_path), precision='bfloat16', **SMALL))
    with pytest.raises(train.InputError, match="precision 'bfloat16' -> 'float32'"):
        train.run(tiny(runs=str(tmp_path), precision='auto', **SMALL))  # float32 for a nano ViT on any CPU


def test_an_interrupted_float16_run_ends_as_an_uninterrupted_one_and_its_scaler_with_it(tmp_path, monkeypatch):
    """Its scale is halved where a gradient is infinite, here in the second step, and is part of the checkpoint."""
    loss, steps = F.cross_entropy, []

    def cross_entropy(*args):
        steps.append(1)
        return loss(*args) * (1e30 if len(steps) == 2 else 1)  # the scaled gradient is infinite, the loss is not
    monkeypatch.setattr(F, 'cross_entropy', cross_entropy)
    how = dict(precision='float16', img_size=24, epochs=3, k=2, method='linear')
    whole = train.run(tiny(runs=str(tmp_path / 'whole'), **how))
    steps.clear()

    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'train', stopped)
        train.run(tiny(runs=str(tmp_path / 'parts'), **how))
    kept = train.read_checkpoint(folder_of(tmp_path / 'parts', 'linear') / train.CHECKPOINTS[1])
    assert kept['scaler']['scale'] == 2.0 ** 15  # it starts with 2^16
    parts = train.run(tiny(runs=str(tmp_path / 'parts'), **how))
    assert parts['params_digest'] == whole['params_digest'] and parts['final_loss'] == whole['final_loss']


# ---- Devices --------------------------------------------------------------------------------------------


def test_auto_is_the_accelerator_of_this_process_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.find_device() == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert train.find_device().type == 'meta' and train.find_device('cpu') == CPU


def test_a_device_that_is_not_there_is_one_line(tmp_path, capfd):
    for action in [], ['--show'], ['--noise', '0']:
        assert run(tmp_path, '--method', 'linear', *action, device='xpu:7', **SMALL) == 2
        err = capfd.readouterr().err
        assert err.count('\n') == 1 and 'device xpu:7 cannot be used' in err and '--set device=cpu' in err


# ---- Parts of a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_the_parts_of_the_processes_are_the_batch_augmented_as_by_one(world):
    config = tiny(img_size=24, batch=4, augment='crop_flip')
    pictures = [(torch.randint(256, (3, 30, 33), dtype=torch.uint8), i) for i in range(9)]  # the last batch has one
    whole = list(data.batches(pictures, config, CPU, epoch=3))
    each = [list(data.batches(pictures, config, CPU, 3, slice(rank, None, world))) for rank in range(world)]
    for step, (images, labels) in enumerate(whole):
        for rank in range(world):
            part = slice(rank, None, world) if len(labels) > rank else slice(0, 1)  # who has none gets the first
            assert torch.equal(each[rank][step][0], images[part]) and torch.equal(each[rank][step][1], labels[part])


# ---- torchrun -------------------------------------------------------------------------------------------


def in_two_processes(folder, *argv):
    """`python train.py ARGV` in two forked processes, with the store and the environment that torchrun gives them, but
    without the seconds that it takes to start one. Returns their statuses and what each said."""
    store, pids = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False), []
    shared = {'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(store.port),
              'TORCHELASTIC_USE_AGENT_STORE': 'True'}
    for rank in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 99  # of a traceback
        try:
            os.environ.update(shared, RANK=str(rank))
            out = os.open(folder / f'{rank}.out', os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
            status = train.main(argv)
        finally:
            os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses, [(folder / f'{rank}.out').read_text() for rank in range(2)]


def torchrun(script, *argv, restarts=0, **env):
    """`torchrun --nproc-per-node 2 SCRIPT ARGV`. Returns its status and what it said."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '0', '--standalone',
               '--max-restarts', str(restarts), str(script), *argv]
    env = {name: value for name, value in os.environ.items() if name not in ('RANK', 'WORLD_SIZE')} | {'OMP_NUM_THREADS': '1'} | env
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    return done.returncode, done.stdout + done.stderr


def changes(folder):
    how = dict(weights='random', n_train=40, n_val=10, n_test=20, batch=16, precision='float32', **SMALL, runs=folder)
    return ['--set', *(f'{name}={value}' for name, value in how.items())]


def left(folder):
    """What finished runs leave that does not depend on the clock: by folder, the parameters' bytes and the accuracy."""
    return {str(file.parent.relative_to(folder)): (
        (file.parent / 'params.pth').read_bytes(), json.loads(file.read_text())['accuracy'])
        for file in folder.rglob('result.json')}


DIES = '''
import os, runpy, signal, sys
sys.path.insert(0, {project!r})
import torch
save, saved = os.replace, []
def fsync(number, real=os.fsync):
    real(number)
    saved.append(1)
    if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and len(saved) == 9:
        os.kill(os.getpid(), signal.SIGKILL)  # in the second of its runs
os.fsync = fsync
sys.argv[0] = {project!r} + '/train.py'
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_a_sweep_in_two_processes_of_which_one_is_killed_leaves_what_one_process_leaves(tmp_path):
    argv = ['--method', 'linear,vpt', '--seed', '0,1', '--search', *changes(tmp_path / 'two'), 'grid={lr: [0.1, 0.05]}']
    (tmp_path / 'worker.py').write_text(DIES.format(project=str(train.HERE)))
    status, said = torchrun(tmp_path / 'worker.py', *argv, restarts=3)
    assert status == 0 and 'finished before' in said, said
    assert sum(line.startswith('where_blue  ') for line in said.splitlines()) == 4  # the table, once
    assert train.main([*argv[:-2], f'runs={tmp_path / "one"}', argv[-1]]) == 0
    assert left(tmp_path / 'two') == left(tmp_path / 'one') and len(left(tmp_path / 'one')) == 8


def test_what_is_wrong_with_one_run_of_a_divided_sweep_is_one_line_and_the_status(tmp_path):
    statuses, said = in_two_processes(tmp_path, '--task', 'kitti,where_blue', '--method', 'linear', *changes(tmp_path))
    assert statuses == [2, 0] and len(left(tmp_path)) == 1, said
    assert ''.join(said).count('train.py: data/vtab-1k/kitti: no such folder') == 1


def test_one_run_in_two_processes_has_the_losses_of_one_to_rounding(tmp_path):
    """41 + 10 pictures: the last batch, of 3, has two for the one and one for the other."""
    statuses, said = in_two_processes(tmp_path, '--method', 'express', *changes(tmp_path / 'two'), 'n_train=41')
    assert statuses == [0, 0] and [x.count('test accuracy') for x in said] == [1, 0], said
    assert train.main(['--method', 'express', *changes(tmp_path / 'one'), 'n_train=41']) == 0
    two, one = ([json.loads(line)['loss'] for line in (folder_of(tmp_path / name, 'express') / 'log.jsonl').read_text().splitlines()]
                for name in ('two', 'one'))
    assert two == pytest.approx(one, rel=1e-5)
    two, one = (torch.load(folder_of(tmp_path / name, 'express') / 'params.pth', weights_only=True) for name in ('two', 'one'))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_without_torchrun_there_is_one_process():
    assert train.parts() == (0, 1) and not dist.is_initialized()
