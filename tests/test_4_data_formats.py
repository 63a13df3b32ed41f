"""Section 4.1, the data sets: every task of configs.yaml is read from a small folder in its real layout.

What torchvision reads with scipy or h5py, which this project does without, is read here by numpy in their
place. Pictures have one grey level, LEVEL times their class: what is decoded says which class it has to be.
"""

import io
import itertools
import json
import pickle
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pictures import CONFIGS, no_network, save_picture, tiny, vtab  # noqa: F401

import data
import train
from vit import InputError

CPU = torch.device('cpu')
LEVEL = 40
TASKS = {name: CONFIGS['defaults'] | task for name, task in CONFIGS['tasks'].items()}


def tasks_of(source):
    return [name for name, task in TASKS.items() if task['source'] == source]


def load(task, folder, **changes):
    """The settings of a task as configs.yaml has them, but for a nano ViT, and the task."""
    changes = {'data': str(folder), 'weights': 'random', 'workers': 0} | changes
    config, = train.settings(CONFIGS, task, 'ivpt', 'vit_nano_patch8_48', changes)
    return config, data.load(config)


def refusal(task, folder, **changes):
    """The one line with which a task is refused."""
    with pytest.raises(InputError) as error:
        load(task, folder, **changes)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    return said


def grey(label, size=32):
    """The picture of a class."""
    return np.full((size, size, 3), LEVEL * label, dtype=np.uint8)


def save(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey(label)).save(path)


def labels_of(pictures):
    """The classes of a set of pictures; that each picture is one of its class is asserted here."""
    labels = []
    for image, label in pictures:
        assert abs(image.float().mean() - LEVEL * label) < 2 and type(label) is int
        labels.append(label)
    return labels


# ---- VTAB-1k --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', tasks_of('vtab'))
def test_each_of_the_19_tasks_is_read_from_its_lists(task, tmp_path):
    C, n_test = TASKS[task]['classes'], TASKS[task]['n_test']
    folder = vtab(tmp_path, 8, 3, 5, C, TASKS[task]['dir'])
    config, found = load(task, tmp_path)
    assert [label for _, label in found.train.samples] == [i % C for i in range(8)]
    assert [path.name for path, _ in found.test.samples] == [f'00000{i}.jpg' for i in range(5)]
    assert found.classes == [str(i) for i in range(C)]
    said = [f'official lists in {folder}', '8 images to train on, and not 800', '3 images to validate on, and not 200',
            f'5 images to test on, and not {n_test}']
    assert found.notes == said + [f'{C - 8} of {C} classes have no training image'] * (C > 8)
    assert next(data.batches(found.train, config, CPU, 0))[0].shape == (8, 3, 48, 48)


def test_nothing_is_noted_where_the_lists_are_as_long_as_they_should_be(tmp_path):
    folder = vtab(tmp_path, 8, 3, 5, 6, 'dmlab')
    assert load('dmlab', tmp_path, n_train=8, n_val=3, n_test=5)[1].notes == [f'official lists in {folder}']


@pytest.mark.parametrize('task', [task for task in tasks_of('vtab') if not TASKS[task]['torchvision']])
def test_a_task_that_cannot_be_downloaded_says_which_folder_should_hold_what(task, tmp_path):
    said = refusal(task, tmp_path)
    assert str(tmp_path / 'vtab-1k' / TASKS[task]['dir']) in said and 'images/, train800.txt, val200.txt' in said


def test_groups_are_the_19_and_the_5_tasks_each_once():
    groups = CONFIGS['groups']
    assert [name for part in groups['vtab'] for name in groups[part]] == tasks_of('vtab')
    assert (len(tasks_of('vtab')), groups['fgvc']) == (19, tasks_of('fgvc'))


# ---- VTAB-1k by way of torchvision ----------------------------------------------------------------------


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


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


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


def test_every_task_that_can_be_downloaded_is_tried_here():
    assert set(MAKE) == {task for task in TASKS if TASKS[task]['torchvision']}


@pytest.mark.parametrize('task', MAKE)
def test_without_the_lists_torchvisions_data_set_is_drawn_from(task, tmp_path, readers):
    MAKE[task](tmp_path, splits(task))
    config, found = load(task, tmp_path, n_train=16, n_val=4, n_test=12)
    whole = len(data.TORCHVISION[config.torchvision]) == 4  # it has a test split
    assert [len(part) for part in (found.train, found.val, found.test)] == [16, 4, 12]
    assert '20 of 40 training images, drawn by us: not the official VTAB-1k split' in found.notes[0]
    labels = [labels_of(part) for part in (found.train, found.val, found.test)]
    assert labels[2] == splits(task)[1] or not whole
    assert len(set(labels[0])) > 1 and len(found.classes) == config.classes
    files = [{str(path) for path, _ in part.samples} for part in (found.train, found.val, found.test)]
    assert not any(a & b for a, b in itertools.combinations(files[:2] if whole else files, 2))
    assert len(files[0] | files[1]) == 20


@pytest.mark.parametrize('task, classes, names', [
    ('cifar100', 100, ['class 0', 'class 99']), ('caltech101', 6, ['BACKGROUND_Google', 'barrel']),
    ('dtd', 6, ['class_0', 'class_5']), ('pets', 6, ['Breed 0', 'Breed 5']), ('sun397', 397, ['place_0', 'place_396']),
    ('eurosat', 6, ['Land_0', 'Land_5']), ('eurosat', 10, ['0', '9']), ('svhn', 10, ['0', '9'])])
def test_classes_have_torchvisions_names_where_it_knows_them_all(task, classes, names, tmp_path, readers):
    MAKE[task](tmp_path, splits(task))
    found = load(task, tmp_path, n_test=12, classes=classes)[1].classes
    assert [found[0], found[-1]] == names and len(found) == classes


def test_what_is_held_out_for_the_test_does_not_depend_on_the_order_on_disk(tmp_path, monkeypatch):
    sun397(tmp_path, splits('sun397'))
    once, rglob = load('sun397', tmp_path, n_test=12)[1], Path.rglob
    monkeypatch.setattr(Path, 'rglob', lambda self, pattern: sorted(rglob(self, pattern), key=str, reverse=True))
    assert load('sun397', tmp_path, n_test=12)[1].test.samples == once.test.samples


@pytest.mark.parametrize('task', MAKE)
def test_a_failed_download_says_what_to_put_where(task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', SimpleNamespace())
    said, (folder, url, *_) = refusal(task, tmp_path), data.TORCHVISION[TASKS[task]['torchvision']]
    for part in ('no network in tests', f'Unpack {url} there', str(tmp_path / folder), '--data',
                 str(tmp_path / 'vtab-1k' / TASKS[task]['dir'])):
        assert part in said


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


# ---- FGVC -----------------------------------------------------------------------------------------------

IDS = [3, 5, 20, 100]  # of classes in a list: any numbers


def lists(root, task, train=None, val=None, test=None):
    """A small data set with VPT's lists. Returns its folder."""
    folder = root / 'fgvc' / TASKS[task]['dir']
    for name, ids in (('train', train or IDS[::-1]), ('val', val or IDS[:2]), ('test', test or IDS[1:])):
        named = {f'some class/{name} {i}.jpg': c for i, c in enumerate(ids)}
        write(folder / f'{name}.json', json.dumps(named).encode())
        for file, c in named.items():
            save(folder / TASKS[task]['images'] / file, IDS.index(int(c)))
    return folder


@pytest.mark.parametrize('task', tasks_of('fgvc'))
def test_each_of_the_5_tasks_is_read_from_vpts_lists(task, tmp_path):
    folder = lists(tmp_path, task)
    config, found = load(task, tmp_path)
    assert [labels_of(part) for part in (found.train, found.val, found.test)] == [[3, 2, 1, 0], [0, 1], [1, 2, 3]]
    assert found.classes == [str(c) for c in IDS]
    assert found.notes == [
        f"VPT's lists in {folder}", f'4 images to train on, and not {config.n_train}',
        f'2 images to validate on, and not {config.n_val}', f'3 images to test on, and not {config.n_test}',
        f'{config.classes - 4} of {config.classes} classes have no training image']


def test_pictures_lie_under_the_subfolders_of_vpts_lists():
    assert [f'{TASKS[task]["dir"]}/{TASKS[task]["images"]}' for task in tasks_of('fgvc')] == [
        'cub/images', 'nabirds/images', 'flowers/', 'dogs/Images', 'cars/']


def test_classes_may_be_numbers_in_quotes(tmp_path):
    lists(tmp_path, 'cub', train=['003', '20'], val=['20'], test=[3])
    assert load('cub', tmp_path)[1].classes == ['3', '20']


def test_missing_lists_say_which_folder_should_hold_what(tmp_path):
    said = refusal('dogs', tmp_path)
    assert str(tmp_path / 'fgvc' / 'dogs' / 'Images') in said and 'train.json, val.json and test.json' in said
    lists(tmp_path, 'dogs')
    (file := tmp_path / 'fgvc' / 'dogs' / 'val.json').unlink()
    assert f'{file}: not a readable list' in refusal('dogs', tmp_path)


def test_a_class_that_is_not_trained_on_is_refused(tmp_path):
    folder = lists(tmp_path, 'cub', train=[3, 5], val=[3], test=[5, 20])
    assert f'{folder / "test.json"}, entry 2: class 20 is not in train.json' in refusal('cub', tmp_path)


def test_more_classes_than_there_are_in_the_paper_are_refused(tmp_path):
    lists(tmp_path, 'cub')
    assert 'train.json: 4 classes, and not 3' in refusal('cub', tmp_path, classes=3)


NUMBER = 'is a number from 0, not'


@pytest.mark.parametrize('content, said', [
    (b'', 'not a readable list'), (b'{"a.jpg": 1', 'not a readable list'),
    (b'{"\xff.jpg": 1}', 'not a readable list'), (b'[' * 10 ** 6, 'not a readable list'),
    (b'{"a":' * 10 ** 6, 'not a readable list'), (b'{"a.jpg": ' + b'9' * 5000 + b'}', 'not a readable list'),
    (b'[]', 'expected a JSON object'), (b'{}', 'expected a JSON object'), (b'[["a.jpg", 1]]', 'expected a JSON object'),
    (b'3', 'expected a JSON object'), (b'null', 'expected a JSON object'),
    (b'{"a.jpg": -1}', NUMBER), (b'{"a.jpg": true}', NUMBER), (b'{"a.jpg": 1.0}', NUMBER), (b'{"a.jpg": NaN}', NUMBER),
    (b'{"a.jpg": null}', NUMBER), (b'{"a.jpg": [1]}', NUMBER), (b'{"a.jpg": {}}', NUMBER), (b'{"a.jpg": ""}', NUMBER),
    (b'{"a.jpg": "one"}', NUMBER), (b'{"a.jpg": "\xd9\xa3"}', NUMBER), (b'{"a.jpg": 9999999999}', NUMBER),
    (b'{"a.jpg": 1, "a.jpg": 2}', "'a.jpg' stands there twice"),
    (b'{"../a.jpg": 1}', 'lies outside of'), (b'{"/a.jpg": 1}', 'lies outside of'),
    (b'{"a/../../b": 1}', 'lies outside of'),
    (b'{"a.jpg": 3}', 'no such image'), (b'{"": 3}', 'no such image'), (b'{"a\\u0000.jpg": 3}', 'no such image'),
    (b'{"\\ud800.jpg": 3}', 'no such image'), (b'{"' + b'a' * 5000 + b'": 3}', 'no such image'),
])
def test_a_bad_json_list_is_refused_by_name(content, said, tmp_path):
    folder = lists(tmp_path, 'flowers', val=[3], test=[3])
    (folder / 'train.json').write_bytes(content)
    err = refusal('flowers', tmp_path)
    assert said in err and str(folder) in err


# ---- Lists with anything in them ------------------------------------------------------------------------

# Any name of a file in a folder but one that a line cannot hold.
names = st.text(st.characters(exclude_characters='\n\r\0', exclude_categories=['Cs']), min_size=1, max_size=20).filter(
    lambda name: not Path(name).is_absolute() and '..' not in Path(name).parts and name == name.strip(' \t\ufeff'))
samples = st.dictionaries(names, st.integers(0, 36), min_size=1, max_size=5).filter(
    lambda found: len({Path(name) for name in found}) == len(found))


def read(reader, content, name):
    """What a reader makes of a file's content."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / name).write_bytes(content)
        return [(str(file.relative_to(folder)), label) for file, label in reader(path)]


def read_list(content):
    return read(lambda path: data.read_list(path, path.parent, range(37)), content, 'list.txt')


def read_json(content):
    return read(lambda path: data.read_list(path, path.parent), content, 'list.json')


@given(samples)
@example({'a b.jpg': 1, ' ä "x" 3.jpg': 2, 'a\u2028b\x85c\x0cd': 3, "it's 4": 4})
def test_lists_hold_any_name_of_a_file(found):
    expected = [(str(Path(name)), label) for name, label in found.items()]
    assert read_list(''.join(f'{name} {label}\n' for name, label in found.items()).encode()) == expected
    assert read_json(json.dumps(found).encode()) == expected
    assert read_json(json.dumps(found, ensure_ascii=False).encode()) == expected


@pytest.mark.parametrize('change', [
    lambda text: text + b'\n', lambda text: text.rstrip(), lambda text: text + b' \t\r\n\n',
    lambda text: text.replace(b' ', b'\t'), lambda text: text.replace(b' ', b'   '),
    lambda text: text.replace(b' ', b' \t '), lambda text: b'\xef\xbb\xbf' + text,
    lambda text: text.replace(b'\n', b'\r\n')])
def test_a_list_may_be_written_by_any_editor(change):
    text = b'images/a.jpg 7\nimages/b.jpg 36\n'
    assert read_list(change(text)) == [('images/a.jpg', 7), ('images/b.jpg', 36)]


def test_a_json_list_may_start_with_a_byte_order_mark():
    assert read_json(b'\xef\xbb\xbf{"a.jpg": 7}') == [('a.jpg', 7)]


values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
contents = st.binary(max_size=60) | values.map(lambda x: json.dumps(x).encode()) | st.text(
    ' \t\n\r\x0b\x85./:"{}[],\\0123456789ab٣', max_size=30).map(str.encode)


@given(contents)
def test_anything_else_is_one_line(content):
    for reader in (read_list, read_json):
        try:
            found = reader(content)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert found and all(label >= 0 and '..' not in Path(name).parts for name, label in found)


def test_a_link_to_a_folder_of_images_elsewhere_is_followed_and_a_circle_of_links_is_not(tmp_path):
    folder = vtab(tmp_path / 'data')
    (folder / 'images').rename(tmp_path / 'elsewhere')
    (folder / 'images').symlink_to(tmp_path / 'elsewhere')
    assert len(load('pets', tmp_path / 'data')[1].train) == 8
    (folder / 'images').unlink()
    (folder / 'images').symlink_to(folder / 'images')
    assert 'train800/000000.jpg: no such image (and 7 more of 8)' in refusal('pets', tmp_path / 'data')


# ---- A folder of your own -------------------------------------------------------------------------------


def own(root, **parts):
    """own(root, train={'cat': 10, 'dog': 5}) saves so many pictures of the classes. Their ids are those in train."""
    for part, counts in parts.items():
        for name, n in counts.items():
            for i in range(n):
                save(root / part / name / f'{i}.png', sorted(set(parts['train']) | {name}).index(name))


def test_classes_are_the_folders_of_train_and_test_may_have_fewer(tmp_path):
    own(tmp_path, train={'cat': 6, 'a dog': 5, 'ähre': 4}, val={'cat': 1, 'ähre': 2}, test={'cat': 3})
    _, found = load('folder', tmp_path)
    assert found.classes == ['a dog', 'cat', 'ähre']
    assert found.notes == [f'images in {tmp_path}', '2 of 3 classes have no test image, as a dog']
    assert [labels_of(part) for part in (found.train, found.val, found.test)] == [
        [0] * 5 + [1] * 6 + [2] * 4, [1, 2, 2], [1] * 3]


def test_without_val_a_fifth_of_train_takes_its_place(tmp_path):
    own(tmp_path, train={'cat': 10, 'dog': 14}, test={'dog': 2})
    (_, found), (_, again) = load('folder', tmp_path), load('folder', tmp_path, seed=3)
    assert found.val.samples == again.val.samples and len(set(labels_of(found.val))) == 2
    assert (len(found.val), len(found.train)) == (4, 20)
    assert sorted(found.train.samples + found.val.samples) == sorted(
        (str(path), int(path.parent.name == 'dog')) for path in tmp_path.glob('train/*/*'))
    assert 'no val/: 4 of the training images' in found.notes[0]


def test_a_folder_of_ones_own_is_learned(tmp_path, monkeypatch):
    own(tmp_path / 'data', train={'cat': 10, 'dog': 10}, test={'cat': 2, 'dog': 2})
    result = train.run(tiny('folder', data=str(tmp_path / 'data'), runs=str(tmp_path / 'runs'), epochs=1))
    assert result['classes'] == ['cat', 'dog'] and result['images'] == 4


def test_files_that_are_no_images_for_torchvision_are_counted_and_told(tmp_path):
    own(tmp_path, train={'cat': 3}, val={'cat': 1}, test={'cat': 2})
    for file in ('train/cat/a.gif', 'train/cat/more/b.txt', 'test/cat/c.GIF'):
        write(tmp_path / file, b'')
    _, found = load('folder', tmp_path)
    assert [len(part) for part in (found.train, found.val, found.test)] == [3, 1, 2]
    note = 'are left out, no images for torchvision'
    assert found.notes[1].startswith(f'2 files in {tmp_path / "train"} {note}: {tmp_path / "train" / "cat"}')
    assert found.notes[2:] == [f'1 files in {tmp_path / "test"} {note}: {tmp_path / "test" / "cat" / "c.GIF"}']


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '__MACOSX', '.git', '__pycache__'])
def test_what_is_hidden_is_no_class_and_no_image(name, tmp_path):
    own(tmp_path, train={'cat': 2, 'dog__1.5': 2}, val={'cat': 1}, test={'cat': 2, 'dog__1.5': 1})
    for file in (f'train/{name}/0.png', f'test/{name}/0.png', f'train/cat/{name}/0.png', 'train/cat/._0.png',
                 'train/cat/.DS_Store'):
        write(tmp_path / file, b'')
    _, found = load('folder', tmp_path)
    assert found.classes == ['cat', 'dog__1.5'] and found.notes == [f'images in {tmp_path}']
    assert [labels_of(part) for part in (found.train, found.test)] == [[0, 0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize('parts, said', [
    (dict(train={'cat': 2}), 'test: no folder of images by class'),
    (dict(train={'cat': 2}, test={'cat': 1, 'dog': 1}), 'test/dog: no such class in'),
    (dict(train={'cat': 2}, test={'cat': 1}, val={'dog': 1}), 'val/dog: no such class in'),
    (dict(train={}), 'train: no folder of images by class'),
])
def test_a_folder_that_lacks_something_is_refused(parts, said, tmp_path):
    own(tmp_path, **parts)
    assert f'{tmp_path}/{said}' in refusal('folder', tmp_path)


def test_classes_that_are_said_and_not_there_are_refused(tmp_path):
    own(tmp_path, train={'cat': 2, 'dog': 2}, test={'cat': 1})
    assert f'{tmp_path}/train: 2 classes, and not 3' in refusal('folder', tmp_path, classes=3)


def test_a_class_without_a_picture_is_refused_by_name(tmp_path):
    own(tmp_path, train={'cat': 2}, test={'cat': 1})
    (tmp_path / 'train' / 'empty').mkdir()
    assert 'empty' in refusal('folder', tmp_path)
    write(tmp_path / 'train' / 'empty' / 'a.gif', b'')
    assert f'{tmp_path / "train" / "empty"}: no image' in refusal('folder', tmp_path)


@pytest.mark.parametrize('to', ['.', 'loop', '../../train'])
def test_a_circle_of_links_is_refused(to, tmp_path):
    own(tmp_path, train={'cat': 2, 'dog': 2}, test={'cat': 1})
    (tmp_path / 'train' / 'cat' / 'loop').symlink_to(to)
    (tmp_path / 'train' / 'loop').symlink_to('loop')
    assert f'{tmp_path}/train: ' in refusal('folder', tmp_path)
    (tmp_path / 'train' / 'loop').unlink()
    if to != 'loop':  # which is no folder, and no image
        assert f'{tmp_path}/train: a file is there twice' in refusal('folder', tmp_path)


# ---- Crops and flips ------------------------------------------------------------------------------------

STRUCTURED = CONFIGS['groups']['structured']


def flips(task, pictures):
    """How often a picture of an epoch is the picture, is it flipped, and is neither."""
    config = tiny(task, img_size=16, batch=50, N=10, k=1)
    plain = pictures[0][0]
    images = torch.cat([images for images, _ in data.batches(pictures, config, CPU, 0)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    images = ((images * std + mean) * 255).round().to(torch.uint8)
    same = sum(torch.equal(image, plain) for image in images)
    flipped = sum(torch.equal(image, plain.flip(-1)) for image in images)
    return same, flipped, len(images) - same - flipped


PICTURE = (torch.arange(3 * 16 * 16) % 251).to(torch.uint8).view(3, 16, 16)


@pytest.mark.parametrize('task', [*STRUCTURED, 'svhn'])
def test_a_picture_whose_class_a_crop_or_a_flip_would_change_is_only_resized(task):
    config = tiny(task, img_size=16, N=10, k=1)
    assert data.resized(config) == (16, 16)
    assert flips(task, [(PICTURE, 0)] * 50) == (50, 0, 0)


@pytest.mark.parametrize('task', [name for name in (*tasks_of('vtab'), *tasks_of('fgvc'), 'folder')
                                  if name not in [*STRUCTURED, 'svhn']])
def test_pictures_of_all_other_tasks_are_cropped_and_flipped(task):
    assert data.resized(tiny(task, img_size=224, k=1)) == 256
    same, flipped, other = flips(task, [(PICTURE, 0)] * 50)
    assert same > 10 and flipped > 10 and other == 0  # a picture of the size of the crop: only flips are left
    wide = torch.cat([PICTURE, PICTURE], dim=2)
    assert flips(task, [(wide[:, :, :20], 0)] * 50)[2] > 10


# ---- A look at every picture before training ------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cache_gb', [8.0, 0.0])
def test_every_picture_is_decoded_and_a_broken_one_named(cache_gb, workers, tmp_path):
    folder = vtab(tmp_path)
    config, task = load('pets', tmp_path, workers=workers, cache_gb=cache_gb)
    for part in (task.test, task.train + task.val):  # the second of two sets, too
        data.in_memory(part, config, CPU)
        path, _ = getattr(part, 'datasets', [part])[-1].samples[2]
        path.write_bytes(b'<html>')
        with pytest.raises(InputError) as error:
            data.in_memory(part, config, CPU)
        assert str(error.value).startswith(f'{path}: not an image') and folder in path.parents


def test_pictures_in_memory_need_no_look():
    task = data.load(tiny())
    assert data.in_memory(task.train, tiny(cache_gb=0), CPU) is task.train
