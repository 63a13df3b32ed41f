"""Break runs in every way that comes to mind, and see whether anything is lost. A command, not a test:

    python tests/tools/faults.py                               50 kills, 100 damages of each kind, 10 full disks
    python tests/tools/faults.py --kills 5 --damages 10 --seed 1

A run is a nano ViT on pictures of shapes, 4 epochs of it, in a forked process. After each fault the same command is
given again, and what it leaves must be what a run leaves that nothing happened to: every bit of the parameters, every
loss, the accuracy. A full disk is a limit of the size of files. Prints a table; the status is 1 if anything was lost.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402
import vit  # noqa: E402

ARGV = ['--task', 'where_blue', '--model', 'vit_nano_patch8_48', '--method', 'ivpt', '--weights', 'random', '--set']
SMALL = ['epochs=4', 'n_train=24', 'n_val=8', 'n_test=8', 'batch=16', 'workers=0', 'img_size=16']
WRITES = 13  # a checkpoint and a log before the first epoch and after each one, parameters, predictions, the result


def child(runs, before=lambda: None):
    """Start `python train.py` in a forked process, which has imported all and calls `before` first: its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 99
    try:
        for number, name in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(f'{runs}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        torch.set_num_threads(1)
        torch.accelerator.is_available = lambda: False  # a GPU cannot be used in a fork
        before()
        sys.argv = [train.__file__, *ARGV, *SMALL, f'runs={runs}']
        runpy.run_path(train.__file__, run_name='__main__')
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)  # a traceback is a status of 99


def ended(pid):
    """The exit status of a child; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(runs, stream='out'):
    return Path(f'{runs}.{stream}').read_text()


def folder_of(runs):
    """The folder of the one run in the folder of all runs, if there is one."""
    return next(Path(runs).glob('*/*/*/seed0'), Path(runs, 'no', 'run'))


def outcome(runs):
    """All that a finished run leaves and that does not depend on the clock."""
    folder = folder_of(runs)
    result, params = json.loads((folder / 'result.json').read_text()), (folder / 'params.pth').read_bytes()
    log = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    losses = [(line['epoch'], line['loss'], line['lr']) for line in log]
    return losses, params, [result[name] for name in ('accuracy', 'final_loss', 'params_digest')]


def broken(runs):
    """Which file of a run is there and not whole, and why; None if all are."""
    folder = folder_of(runs)
    try:
        if (folder / 'checkpoint.pth').exists():
            vit.check_zip(folder / 'checkpoint.pth')
        if (folder / 'log.jsonl').exists():
            [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        if (folder / 'result.json').exists() and not train.read_result(folder):
            return 'result.json, or a file that it was measured with'
    except Exception as error:
        return str(error) or type(error).__name__


def lost_after(runs, whole):
    """Go on to the end. Returns in words what is not as it is in the run `whole`, '' if all is."""
    epochs = [int(line.split('/')[0][6:]) for line in said(runs).splitlines() if line.startswith('epoch ')]
    if status := ended(child(runs)):
        return f'going on ended with status {status}: {said(runs, "err").strip()[-300:]}'
    resumed = [int(line.split()[3].strip(',')) for line in said(runs).splitlines() if line.startswith('resumed ')]
    if max(epochs, default=0) > max(resumed, default=0) and 'finished before' not in said(runs):
        return f'epoch {max(epochs)} was announced, and it went on after {resumed}'
    return '' if outcome(runs) == outcome(whole) else 'it ended with other numbers'


def die(where, n, part):
    """For a child: kill yourself in the n-th write (from 0) when `part` of its bytes are written, or at its rename."""
    def before():
        calls, fsync, replace = collections.Counter(), os.fsync, Path.replace

        def kill_at(name):
            calls[name] += 1
            if where == name and calls[name] == n + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_fsync(number):
            if where == 'fsync' and calls['fsync'] == n:
                os.ftruncate(number, int(part * os.fstat(number).st_size))
            kill_at('fsync')
            fsync(number)

        def dying_replace(path, target):
            kill_at('rename')
            replace(path, target)
            kill_at('renamed')
        os.fsync, Path.replace = dying_fsync, dying_replace
    return before


def kill(runs, i, dice, whole, seconds):
    """One run that is killed, and killed again once in a while. Returns where, and what was lost."""
    where, times = ['any moment', 'fsync', 'rename', 'renamed'][i % 4], 0
    while True:
        if where == 'any moment':
            pid = child(runs)
            time.sleep(dice.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            pid = child(runs, die(where, dice.randrange(WRITES), dice.random()))
        status, times = ended(pid), times + 1
        if times == 1 and where != 'any moment' and status != -signal.SIGKILL:
            return where, f'there was no such moment: the run ended with status {status}'
        if bad := broken(runs):
            return where, f'not whole after the kill: {bad}'
        if dice.random() < 0.7:
            return where, lost_after(runs, whole)


def cut(content, dice):
    return content[:dice.randrange(len(content))]


def flip(content, dice):
    i = dice.randrange(len(content))
    return content[:i] + bytes([content[i] ^ dice.randrange(1, 256)]) + content[i + 1:]


def damage(runs, source, name, change, dice, whole):
    """A copy of a run with one damaged file. Returns what was lost."""
    shutil.copytree(source, runs)
    Path(f'{runs}.out').write_text('')
    file = folder_of(runs) / name
    file.write_bytes(change(file.read_bytes(), dice))
    return lost_after(runs, whole)


def full_disk(runs, dice, whole):
    """A disk that becomes full at some write, and then has room again. Returns what was lost."""
    limit = dice.choice([3000, 10_000, 50_000])

    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    status, err = ended(child(runs, before)), said(runs, 'err')
    if status != 2 or err.count('\n') != 1 or 'cannot be written' not in err or 'Make room' not in err:
        return f'status {status}: {err[-300:]}'
    if bad := broken(runs) or [path.name for path in runs.rglob('*.part')]:
        return f'not whole on the full disk: {bad}'
    return lost_after(runs, whole)


def faults(folder, kills, damages, disks, seed):
    """Try them all in a folder. Returns {fault: [what was lost of each try]}, '' for nothing."""
    dice, table = random.Random(seed), collections.defaultdict(list)
    start, whole, stopped = time.perf_counter(), folder / 'whole', folder / 'stopped'
    assert ended(child(whole)) == 0, said(whole, 'err')
    seconds = time.perf_counter() - start
    ended(child(stopped, die('fsync', 6, 0)))  # while it writes the checkpoint of epoch 3
    for i in range(1, kills + 1):
        where, lost = kill(folder / f'kill{i}', i, dice, whole, seconds)
        table[f'SIGKILL, {where}'].append(lost)
    files = 'checkpoint.pth', 'params.pth', 'predictions.csv', 'result.json'
    for name, change in itertools.product(files, (cut, flip)):
        for i in range(damages if name == 'checkpoint.pth' else -(-damages // 5)):
            runs = folder / f'{name}.{change.__name__}{i}'
            source = stopped if name == 'checkpoint.pth' else whole
            table[f'{name}: {change.__name__}'].append(damage(runs, source, name, change, dice, whole))
            shutil.rmtree(runs)
    for i in range(disks):
        table['full disk'].append(full_disk(folder / f'disk{i}', dice, whole))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--damages', type=int, default=100, help='of the checkpoint; a fifth of it of each other file')
    parser.add_argument('--disks', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = faults(Path(folder), args.kills, args.damages, args.disks, args.seed)
    print('| fault | tried | survived | lost |\n| --- | --- | --- | --- |')
    for fault, lost in table.items():
        print(f'| {fault} | {len(lost)} | {lost.count("")} | {len(lost) - lost.count("")} |')
    for fault, lost in table.items():
        for what in filter(None, lost):
            print(f'LOST: {fault}: {what}')
    return 1 if any(filter(None, sum(table.values(), []))) else 0


if __name__ == '__main__':
    sys.exit(main())
