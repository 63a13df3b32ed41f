"""What the tests of section 4 share: small settings, and fake data sets in the real layouts."""

from contextlib import contextmanager
from dataclasses import replace
from inspect import ismodule
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

import data
import train
import vit

CONFIGS = train.read_configs()
NANO = 'vit_nano_patch8_48'
TINY = dict(weights='random', precision='float32', n_train=40, n_val=10, n_test=20, epochs=2, batch=16, workers=0)


def tiny(task='where_blue', method='ivpt', **changes):
    """The settings of a tiny run with a random nano ViT, as train.py puts them together."""
    changes = {name: str(x) if isinstance(x, Path) else x for name, x in changes.items()}
    return train.settings_of(CONFIGS, task, NANO, method, TINY | changes)


def run(folder, *argv, program=train, **changes):
    """`python train.py ARGV`, or another program, tiny, with its results in a folder. Returns the exit status."""
    argv = argv if '--task' in argv else ['--task', 'where_blue', *argv]
    given = {word.partition('=')[0] for word in argv[[*argv, '--set'].index('--set'):]}
    given |= {word.removeprefix('--') for word in argv}
    changes = {name: x for name, x in (TINY | {'runs': folder} | changes).items() if name not in given}
    return program.main([*argv, '--set', *(f'{name}={value}' for name, value in changes.items())])


def task_of(pictures=(), n=3):
    """A task of pictures in memory, all for training."""
    return data.Task(list(pictures), [], [], [str(c) for c in range(n)])


def load_with(monkeypatch, **parts):
    """From now on every task that is loaded has other parts, as a loss of its own."""
    load = data.load
    monkeypatch.setattr(data, 'load', lambda settings: replace(load(settings), **parts))


def folders_of(runs):
    """The folders of finished runs below a folder, in order."""
    return sorted(path.parent for path in runs.rglob('result.json'))


def table(text):
    """The rows of the Markdown tables in a text, as lists of cells."""
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]


def save_picture(path, seed, width=64, height=56):
    """A coloured noise picture that no other seed gives; coarse, so that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height)).save(path)


def oxford(data, trainval=30, test=12, labels=(1, 2, 3)):
    """A small Oxford-IIIT Pet in the layout that torchvision reads, labels from 1. Returns its folder."""
    folder = data / 'oxford-iiit-pet'
    for part, (split, n) in enumerate([('trainval', trainval), ('test', test)]):
        given = [labels[i % len(labels)] for i in range(n)]
        names = [(f'breed_{c}_{1000 * part + i}', c) for i, c in enumerate(given)]
        for i, (name, _) in enumerate(names):
            save_picture(folder / 'images' / f'{name}.jpg', 1000 * part + i)
        (folder / 'annotations').mkdir(exist_ok=True)
        lines = ''.join(f'{name} {c} 1 1\n' for name, c in names)
        (folder / 'annotations' / f'{split}.txt').write_text(lines)
    return folder


def vtab(data, train800=8, val200=3, test=5, classes=37, name='oxford_iiit_pet'):
    """A small data set, Pets if no other is named, in the layout of VTAB-1k's lists. Returns its folder."""
    folder = data / 'vtab-1k' / name
    for part, (split, n) in enumerate([('train800', train800), ('val200', val200), ('test', test)]):
        names = [(f'images/{split}/{i:06d}.jpg', (part + i) % classes) for i in range(n)]
        for i, (name, _) in enumerate(names):
            save_picture(folder / name, 10_000 + 1000 * part + i)
        (folder / f'{split}.txt').write_text(''.join(f'{name} {c}\n' for name, c in names))
    return folder


LEVEL = 40  # of grey, of the second class


def grey(label, size=32):
    """The picture of a class, of one grey level: [size, size, 3]."""
    return np.full((size, size, 3), LEVEL * label, dtype=np.uint8)


def save(path, label):
    """Save the picture of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey(label)).save(path)


def labels_of(pictures):
    """The classes of a set of pictures; that each picture is one of its class is asserted here."""
    labels = []
    for image, label in pictures:
        assert abs(image.float().mean() - LEVEL * label) < 2 and type(label) is int
        labels.append(label)
    return labels


def write(path, content):
    """A file with some bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def refusal(task, folder, **changes):
    """The one line with which the pictures of a task in a folder are refused."""
    with pytest.raises(vit.InputError) as error:
        data.load(tiny(task, data=str(folder), **changes))
    said = str(error.value)
    assert len(said.splitlines()) == 1
    return said


@contextmanager
def images_tested():
    """A list that fills with the batches of images that models are given outside of training, whoever gives them."""
    seen = []

    def hook(module, inputs):
        if isinstance(module, vit.PatchEmbed) and not torch.is_grad_enabled():
            seen.append(inputs[0].clone())
    handle = register_module_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture
def refused(tmp_path, capfd):
    """Runs train.py, tiny; returns the one line on stderr. There must be one, and no more than one."""
    def line(*argv, **changes):
        capfd.readouterr()
        status = run(tmp_path / 'runs', *argv, **changes)
        out, err = capfd.readouterr()
        assert status == 2 and err.startswith('error: ') and err.count('\n') == 1, err
        assert 'Traceback' not in out + err and 'File "' not in err and len(err) < 900, err
        return err
    return line


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail at once. A test module imports this by name."""
    def fail(url, *args, **kwargs):
        raise OSError('no network in tests')
    for module in filter(ismodule, vars(torchvision.datasets).values()):
        for name in ('download_and_extract_archive', 'download_url', 'download_file_from_google_drive'):
            monkeypatch.setattr(module, name, fail, raising=False)
