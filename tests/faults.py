"""Break runs in every way that comes to mind, and see whether anything is lost. A command, not a test:

    python tests/faults.py                               50 kills, 100 damages of each kind, 10 full disks
    python tests/faults.py --kills 5 --damages 10 --seed 1

A run is a nano ViT on pictures of shapes, 6 epochs of it, in a forked process; every tenth kill is
of `python train.py`, started anew. After each fault the same command is given again, and what it leaves must be what a
run leaves that nothing happened to: every bit of the parameters, every loss, the accuracy. Prints a table; the status
is 1 if anything was lost.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402

ARGV = ['--model', 'vit_nano_patch8_48', '--method', 'ivpt', '--weights', 'random', '--set', 'epochs=6', 'n_train=40', 'n_val=10',
        'n_test=20', 'batch=16', 'workers=0', 'img_size=24']
WRITES = 14  # of an uninterrupted run: a checkpoint and a log for each epoch, the parameters, the result
FILES = (*train.CHECKPOINTS, 'params.pth', 'result.json')


def folder_of(runs):
    return Path(runs) / 'where_blue' / 'vit_nano_patch8_48' / 'ivpt' / 'seed0'


def child(runs, before=lambda: None, *changes):
    """Start `python train.py` in a forked process, which has imported all and calls `before` first. Returns its
    process id."""
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
        torch.cuda.is_available = lambda: False  # a GPU cannot be used in a fork
        before()
        sys.argv = [train.__file__, *ARGV, *changes, f'runs={runs}']
        runpy.run_path(train.__file__, run_name='__main__')
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)  # a traceback is a status of 99


def process(runs):
    """Start the run as a user does. Returns its process id."""
    argv = [sys.executable, train.__file__, *ARGV, f'runs={runs}']
    with open(f'{runs}.out', 'w') as out, open(f'{runs}.err', 'w') as err:
        return subprocess.Popen(argv, stdout=out, stderr=err, env=os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}).pid


def ended(pid):
    """The exit status of a child; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(runs, stream='out'):
    return Path(f'{runs}.{stream}').read_text()


def outcome(runs):
    """All that a finished run leaves and that does not depend on the clock."""
    folder = folder_of(runs)
    result = json.loads((folder / 'result.json').read_text())
    losses = [(r['epoch'], r['loss'], r['lr']) for r in map(json.loads, (folder / 'log.jsonl').read_text().splitlines())]
    params = torch.load(folder / 'params.pth', weights_only=True)
    return ({name: x.numpy().tobytes() for name, x in params.items()}, losses,
            [result[name] for name in ('accuracy', 'final_loss', 'params_digest')])


def broken(runs):
    """The files of a run that are there and not whole."""
    folder, bad = folder_of(runs), []
    for name in train.CHECKPOINTS:
        content = train.read(folder / name)
        if content is not None and train.digest(content[64:]).encode() != content[:64]:
            bad.append(name)
    for name in ('log.jsonl', 'result.json'):
        try:
            for line in (train.read(folder / name) or b'').splitlines() if name == 'log.jsonl' else []:
                json.loads(line)
            if name == 'result.json' and (content := train.read(folder / name)):
                if json.loads(content)['params_digest'] != train.digest(train.read(folder / 'params.pth') or b''):
                    bad.append('params.pth')
        except ValueError:
            bad.append(name)
    return bad


def lost_after(runs, start=child):
    """Go on to the end. Returns in words what is not as it would be without the fault, '' if all is."""
    announced = max([int(line.split('/')[0][6:]) for line in said(runs).splitlines() if line.startswith('epoch ')], default=0)
    if status := ended(start(runs)):
        return f'going on ended with status {status}: {said(runs, "err").strip()[-300:]}'
    resumed = [int(line.split()[3]) for line in said(runs).splitlines() if line.startswith('resumed ')]
    if announced > (resumed or [0])[0] and 'finished before' not in said(runs):
        return f'epoch {announced} was announced, and it went on after {resumed}'
    return '' if outcome(runs) == WHOLE['outcome'] else 'it ended with other numbers'


WHOLE = {}  # what the run leaves that nothing happens to: its outcome, its folder, how many seconds it takes


def uninterrupted(folder):
    """Do that run, and stop another one after its fourth epoch."""
    start = time.perf_counter()
    assert ended(child(folder / 'whole')) == 0, said(folder / 'whole', 'err')
    WHOLE.update(seconds=time.perf_counter() - start, outcome=outcome(folder / 'whole'), runs=folder / 'whole')
    ended(child(folder / 'stopped', die('fsync', 9, 0)))  # while it writes the checkpoint of epoch 5
    WHOLE['stopped'] = folder / 'stopped'


# ---- Kills ----------------------------------------------------------------------------------------------


def die(where, n, part):
    """For a child: kill yourself in the n-th write (from 0) when `part` of its bytes are written, or around its rename."""
    def before():
        calls, fsync, replace = collections.Counter(), os.fsync, Path.replace

        def counted(name):
            calls[name] += 1
            return where == name and calls[name] == n + 1

        def dying_fsync(number):
            if counted('fsync'):
                os.ftruncate(number, int(part * os.fstat(number).st_size))
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(number)

        def dying_replace(path, target):
            if counted('rename'):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(path, target)
            if counted('renamed'):
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync, Path.replace = dying_fsync, dying_replace
    return before


def kill(runs, i, dice):
    """One run that is killed, and killed again once in a while. Returns where, and what was lost."""
    where = ['any moment', 'fsync', 'rename', 'renamed'][i % 4] if i % 10 else 'any moment, python train.py'
    start = child if i % 10 else process
    while True:
        if where.startswith('any'):
            pid = start(runs)
            if start is process:  # it takes seconds to start: the clock runs from its first epoch on
                while not folder_of(runs).exists():
                    time.sleep(0.001)
            time.sleep(dice.uniform(0, WHOLE['seconds']) * (0.7 if start is process else 1))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            pid = child(runs, die(where, dice.randrange(WRITES), dice.random()))
        ended(pid)
        if bad := broken(runs):
            return where, f'{bad} not whole after the kill'
        if start is process or dice.random() < 0.7:
            return where, lost_after(runs, start)


# ---- Damage ---------------------------------------------------------------------------------------------


def cut(content, dice):
    return content[:dice.randrange(len(content))]


def flip(content, dice):
    i = dice.randrange(len(content))
    return content[:i] + bytes([content[i] ^ dice.randrange(1, 256)]) + content[i + 1:]


def damage(runs, name, change, to_the_end, dice):
    """One damaged file. Returns what was lost: it is loaded right or not at all."""
    source = WHOLE['stopped'] if name in train.CHECKPOINTS else WHOLE['runs']
    shutil.copytree(source, runs)
    Path(f'{runs}.out').write_text('')
    file = folder_of(runs) / name
    right = file.read_bytes()
    file.write_bytes(change(right, dice))
    if to_the_end:
        return lost_after(runs)
    with contextlib.redirect_stdout(io.StringIO()):
        if name == 'params.pth':
            return 'it is loaded' if train.has_params(file.parent, train.read_result(file.parent)) else ''
        loaded = train.read_checkpoint(file) if name in train.CHECKPOINTS else train.read_result(file.parent)
    return '' if loaded is None or name == 'result.json' and loaded == json.loads(right) else 'it is half-loaded'


# ---- A full disk ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own in a folder, where this machine allows it: yields whether it does."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
    mounted = shutil.which('mount') and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(['umount', str(folder)], check=True)


def full_disk(folder, dice, mounting=True):
    """A disk that becomes full at some write, and then has room again. Returns the means, and what was lost."""
    size = 2 ** 20
    with small_disk(folder, size) if mounting else contextlib.nullcontext(False) as mounted:
        folder.mkdir(exist_ok=True)
        if mounted:
            means, before = 'a tmpfs of 1 MB', lambda: None
            (folder / 'ballast').write_bytes(bytes(size - dice.randrange(1, 260) * 1024))  # a run needs about 270 kB
        else:
            means, limit = 'RLIMIT_FSIZE', dice.choice([100, 300, 1000, 10_000, 50_000])

            def before():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        runs = folder / 'runs'
        log = runs.with_name('runs')  # what it says has to go elsewhere: the disk is full
        for stream in ('out', 'err'):
            Path(f'{log}.{stream}').symlink_to(folder.parent / f'{folder.name}.{stream}')
        status, err = ended(child(runs, before)), said(runs, 'err')
        if status != 2 or err.count('\n') != 1 or 'cannot be written' not in err or 'Make room' not in err:
            return means, f'status {status}: {err[-300:]}'
        if bad := broken(runs) + [path.name for path in runs.rglob('*.part')]:
            return means, f'{bad} not whole on the full disk'
        (folder / 'ballast').unlink(missing_ok=True)
        return means, lost_after(runs)


# ---- All of it ------------------------------------------------------------------------------------------


def faults(folder, kills, damages, disks, seed, mounting=True):
    """Try them all in a folder. Returns {fault: [what was lost of each try]}, '' for nothing."""
    dice, table = random.Random(seed), collections.defaultdict(list)
    uninterrupted(folder)
    for i in range(1, kills + 1):
        where, lost = kill(folder / f'kill{i}', i, dice)
        table[{'fsync': 'SIGKILL when a part of a file is written', 'rename': 'SIGKILL before a rename',
               'renamed': 'SIGKILL after a rename'}.get(where, f'SIGKILL at {where}')].append(lost)
    kinds = [(name, change) for name in FILES for change in (cut, flip)]
    kinds.remove(('result.json', flip))  # its digits are not checked
    for name, change in kinds:
        newest = 'checkpoint' in name
        for i in range(damages if name == 'checkpoint-0.pth' else -(-damages // 5)):
            runs = folder / f'{name}.{change.__name__}{i}'
            to_the_end = i < damages // (20 if newest else 100)
            table[f'{name}: {change.__name__}{", to the end" * to_the_end}'].append(damage(runs, name, change, to_the_end, dice))
            shutil.rmtree(runs)
    for i in range(disks):
        means, lost = full_disk(folder / f'disk{i}', dice, mounting)
        table[f'full disk ({means})'].append(lost)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--damages', type=int, default=100, help='of the newest checkpoint; a fifth of it of each other file')
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
