"""VTAB-1k without its lists: torchvision's data sets are read from a small folder in their real layout.

What torchvision reads with scipy or h5py, which this project does without, is read here by numpy in their place.
"""

import io
import itertools
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from pictures import CONFIGS, grey, labels_of, no_network, refusal, save, tiny, vtab, write  # noqa: F401

import data
import torchvision_sets
from vit import InputError

TASKS = {name: task for name, task in CONFIGS['tasks'].items() if 'instead' in task}


def load(task, folder, **changes):
    """The settings of a task and the task, of a small folder."""
    settings = tiny(task, data=str(folder), **{'n_train': 16, 'n_val': 4, 'n_test': 12} | changes)
    return settings, data.load(settings)


def cifar100(root, splits):
    for name, labels in zip(('train', 'test'), splits):
        pixels = np.array([grey(c).transpose(2, 0, 1).ravel() for c in labels])
        write(root / 'cifar-100-python' / name, pickle.dumps({'data': pixels, 'fine_labels': labels}))
    write(root / 'cifar-100-python' / 'meta', pickle.dumps({'fine_label_names': [f'class {i}' for i in range(100)]}))


def caltech101(root, splits):
    names = ['BACKGROUND_Google', 'accordion', 'airplanes', 'anchor', 'ant', 'barrel']
    for i, label in enumerate(sum(splits, [])):
        save(root / 'caltech101' / '101_ObjectCategories' / names[label] / f'image_{i:04d}.jpg', label)


def dtd(root, splits):
    for name, labels in zip(('train', 'test'), splits):
        files = [f'class_{label}/{name}_{i}.jpg' for i, label in enumerate(labels)]
        write(root / 'dtd' / 'dtd' / 'labels' / f'{name}1.txt', '\n'.join(files).encode())
        for file, label in zip(files, labels):
            save(root / 'dtd' / 'dtd' / 'images' / file, label)


def flowers102(root, splits):
    labels, n = sum(splits, []), len(splits[0])
    for i, label in enumerate(labels, start=1):
        save(root / 'flowers-102' / 'jpg' / f'image_{i:05d}.jpg', label)
    arrays(root / 'flowers-102' / 'imagelabels.mat', labels=np.array(labels) + 1)
    arrays(root / 'flowers-102' / 'setid.mat', trnid=np.arange(n) + 1, tstid=np.arange(n, len(labels)) + 1)


def pets(root, splits):
    folder = root / 'oxford-iiit-pet'
    for name, labels in zip(('trainval', 'test'), splits):
        files = [f'breed_{label}_{name}{i}' for i, label in enumerate(labels)]
        lines = [f'{file} {label + 1} 1 1' for file, label in zip(files, labels)]
        write(folder / 'annotations' / f'{name}.txt', '\n'.join(lines).encode())
        for file, label in zip(files, labels):
            save(folder / 'images' / f'{file}.jpg', label)


def svhn(root, splits):
    for name, labels in zip(('train', 'test'), splits):
        pixels = np.stack([grey(c) for c in labels], axis=-1)
        arrays(root / f'{name}_32x32.mat', X=pixels, y=np.array([[c or 10] for c in labels], dtype=np.uint8))


def sun397(root, splits):
    names = [f'/{"abc"[i % 3]}/place_{i}' for i in range(397)]
    write(root / 'SUN397' / 'ClassName.txt', '\n'.join(names).encode())
    for i, label in enumerate(sum(splits, [])):
        save(root / 'SUN397' / names[label][1:] / f'sun_{i}.jpg', label)


def camelyon(root, splits):
    for name, labels in zip(('train', 'test'), splits):
        file = root / 'pcam' / f'camelyonpatch_level_2_split_{name}'
        arrays(Path(f'{file}_x.h5'), x=np.stack([grey(c) for c in labels]))
        arrays(Path(f'{file}_y.h5'), y=np.array(labels, dtype=np.uint8).reshape(-1, 1, 1, 1))


def eurosat(root, splits):
    for i, label in enumerate(sum(splits, [])):
        save(root / 'eurosat' / '2750' / f'Land_{label}' / f'Land_{label}_{i}.jpg', label)


def clevr_count(root, splits, least=3):
    for name, labels in zip(('train', 'val'), splits):
        folder, scenes = root / 'clevr' / 'CLEVR_v1.0', []
        for i, label in enumerate(labels):
            save(folder / 'images' / name / f'CLEVR_{name}_{i:06d}.png', label)
            scenes.append({'image_filename': f'CLEVR_{name}_{i:06d}.png', 'objects': [{}] * (label + least)})
        write(folder / 'scenes' / f'CLEVR_{name}_scenes.json', json.dumps({'scenes': scenes}).encode())


MAKE = {make.__name__: make for make in (cifar100, caltech101, dtd, flowers102, pets, svhn, sun397, camelyon, eurosat,
                                        clevr_count)}


def arrays(path, **named):
    """Arrays by name, in numpy's format and not that of the file's name."""
    file = io.BytesIO()
    np.savez(file, **named)
    write(path, file.getvalue())


@pytest.fixture
def readers(monkeypatch):
    """numpy in the place of scipy and h5py, and no checksums, which small files cannot have."""
    scipy_io = SimpleNamespace(loadmat=lambda path, squeeze_me=False: dict(np.load(path)))
    for name, module in (('scipy', SimpleNamespace(io=scipy_io)), ('scipy.io', scipy_io),
                         ('h5py', SimpleNamespace(File=np.load))):
        monkeypatch.setitem(sys.modules, name, module)
    for module in (torchvision.datasets.cifar, torchvision.datasets.svhn, torchvision.datasets.flowers102):
        monkeypatch.setattr(module, 'check_integrity', lambda file, _: Path(file).exists())
        monkeypatch.setattr(module, 'download_url', lambda *_: None, raising=False)


def splits(task, n_train=40, n_test=12):
    C = min(6, TASKS[task]['classes'])
    return [i % C for i in range(n_train)], [i * 5 % C for i in range(n_test)]


@pytest.mark.parametrize('task', TASKS)
def test_without_the_lists_torchvisions_data_set_is_drawn_from(task, tmp_path, readers):
    MAKE[task](tmp_path / 'here', splits(task))
    settings, found = load(task, tmp_path / 'here')
    whole = len(torchvision_sets.SETS[settings.pictures.dir]) == 5  # it has a test split
    assert '20 of 40 training images, drawn by us: not the official VTAB-1k split' in found.notes[0]
    labels = [labels_of(part) for part in (found.train, found.val, found.test)]
    assert [*map(len, labels)] == [16, 4, 12] and (labels[2] == splits(task)[1] or not whole)
    assert len(set(labels[0])) > 1 and len(found.classes) == settings.pictures.classes
    files = [{str(path) for path, _ in part.samples} for part in (found.train, found.val, found.test)]
    assert not any(a & b for a, b in itertools.combinations(files[:2] if whole else files, 2))
    assert len(files[0] | files[1]) == 20
    before = data.fingerprint(found, tmp_path / 'here')
    (tmp_path / 'here').rename(tmp_path / 'there')
    assert before == data.fingerprint(load(task, tmp_path / 'there')[1], tmp_path / 'there')


def test_official_lists_take_precedence(tmp_path):
    pets(tmp_path, splits('pets'))
    folder, found = vtab(tmp_path, 8, 3, 5), load('pets', tmp_path)[1]
    assert [len(part) for part in (found.train, found.val, found.test)] == [8, 3, 5]
    assert all(folder in path.parents for part in (found.train, found.val, found.test) for path, _ in part.samples)


@pytest.mark.parametrize('task, classes, names', [
    ('cifar100', 100, ['class 0', 'class 99']), ('caltech101', 6, ['BACKGROUND_Google', 'barrel']),
    ('dtd', 6, ['class_0', 'class_5']), ('pets', 6, ['Breed 0', 'Breed 5']), ('sun397', 397, ['place_0', 'place_396']),
    ('eurosat', 6, ['Land_0', 'Land_5']), ('eurosat', 10, ['0', '9']), ('svhn', 10, ['0', '9'])])
def test_classes_have_torchvisions_names_where_it_knows_them_all(task, classes, names, tmp_path, readers):
    MAKE[task](tmp_path, splits(task))
    found = load(task, tmp_path, classes=classes)[1].classes
    assert [found[0], found[-1]] == names and len(found) == classes


def test_what_is_held_out_for_the_test_does_not_depend_on_the_order_on_disk(tmp_path, monkeypatch):
    sun397(tmp_path, splits('sun397'))
    once, rglob = load('sun397', tmp_path)[1], Path.rglob
    monkeypatch.setattr(Path, 'rglob', lambda self, pattern: sorted(rglob(self, pattern), key=str, reverse=True))
    assert load('sun397', tmp_path)[1].test.samples == once.test.samples


@pytest.mark.parametrize('task', TASKS)
def test_a_failed_download_says_what_to_put_where(task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', SimpleNamespace())
    said, (_, folder, url, *_) = refusal(task, tmp_path), torchvision_sets.SETS[TASKS[task]['dir']]
    for part in ('no network in tests', f'Unpack {url} there', str(tmp_path / folder), '--data',
                 str(tmp_path / 'vtab-1k' / TASKS[task]['dir'])):
        assert part in said
    assert ('Unpack 101_ObjectCategories.tar.gz, which lies in caltech-101.zip of' in said) == (task == 'caltech101')


@pytest.mark.parametrize('task, module', [('svhn', 'scipy'), ('flowers102', 'scipy'), ('camelyon', 'h5py')])
def test_a_package_that_is_missing_is_named(task, module, tmp_path, readers, monkeypatch):
    MAKE[task](tmp_path, splits(task))
    for name in list(sys.modules):
        if name.split('.')[0] == module:
            monkeypatch.setitem(sys.modules, name, None)
    said = refusal(task, tmp_path)
    assert module in said and 'install the package that is missing' in said


@pytest.mark.parametrize('least, said', [(2, 'of class -1 in'), (8, 'of class 8 in')])
def test_a_class_out_of_range_is_refused(least, said, tmp_path):
    clevr_count(tmp_path, splits('clevr_count'), least)
    assert said in refusal('clevr_count', tmp_path)


def test_a_picture_in_an_array_is_named_by_its_place(tmp_path, readers, monkeypatch):
    cifar100(tmp_path, splits('cifar100'))
    test = load('cifar100', tmp_path)[1].test
    monkeypatch.setattr(torchvision.datasets.CIFAR100, '__getitem__', lambda *_: [None])
    with pytest.raises(InputError, match='CIFAR100, image 3: not an image'):
        test[3]
