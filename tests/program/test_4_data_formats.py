"""Section 4.1, the data sets: the lists of VTAB-1k and FGVC and folders of images, each small in its real layout.

Pictures have one grey level, LEVEL times their class: what is decoded says which class it has to be.
"""

import json
import tempfile
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import features
from pictures import CONFIGS, NANO, labels_of, refusal, save, tiny, vtab, write
from pictures import no_network  # noqa: F401

import data
import train

CPU = torch.device('cpu')
TASKS = CONFIGS['tasks']


def tasks_of(source):
    return [name for name, task in TASKS.items() if task['source'] == source]


def load(task, folder, **changes):
    """The settings of a task as configs.yaml has them, but for a nano ViT, and the task."""
    settings = train.settings_of(CONFIGS, task, NANO, 'ivpt', {'data': str(folder)} | changes)
    return settings, data.load(settings)


@pytest.mark.parametrize('task, itself', [
    *((task, False) for task in tasks_of('vtab')), ('pets', True), ('dmlab', True)])
def test_each_of_the_19_tasks_is_read_from_its_lists(task, itself, tmp_path):
    """--data may name vtab-1k/ itself, as NOAH's and RepAdapter's code does."""
    C, n_test = TASKS[task]['classes'], TASKS[task]['n_test']
    folder = vtab(tmp_path, 4, 2, 3, C, TASKS[task]['dir'])
    settings, found = load(task, folder.parent if itself else tmp_path)
    assert found.train.samples == [(folder / f'images/train800/00000{i}.jpg', i % C) for i in range(4)]
    assert found.test.samples == [(folder / f'images/test/00000{i}.jpg', (2 + i) % C) for i in range(3)]
    assert found.classes == [str(i) for i in range(C)]
    missing = [f'{C - 4} of {C} classes have no training image'] * (C > 4)
    assert found.notes == [
        f'official lists in {folder}', '4 images to train on, and not 800', '2 images to validate on, and not 200',
        f'3 images to test on, and not {n_test}', *missing]
    as_many = dict(n_train=4, n_val=2, n_test=3)
    assert load(task, settings.machine.data, **as_many)[1].notes == [f'official lists in {folder}', *missing]
    assert next(data.batches(found.train, settings, CPU, 0))[0].shape == (4, 3, 48, 48)


def test_a_task_without_its_folder_that_cannot_be_downloaded_says_which_folder_should_hold_what(tmp_path):
    """And nothing is downloaded in between the official lists."""
    said = refusal('dogs', tmp_path)
    assert str(tmp_path / 'fgvc' / 'dogs' / 'Images') in said and 'train.json, val.json and test.json' in said
    folder = vtab(tmp_path / 'lists').parent
    for task in tasks_of('vtab'):
        if 'instead' not in TASKS[task]:
            said = refusal(task, tmp_path)
            assert f'{tmp_path}/vtab-1k/{TASKS[task]["dir"]}' in said and 'images/, train800.txt, val200.txt' in said
    assert f'{folder / "cifar"}: no such folder; put images/' in refusal('cifar100', folder)
    assert [path.name for path in folder.iterdir()] == ['oxford_iiit_pet']


def test_the_groups_contain_each_of_the_19_and_of_the_5_tasks_once():
    groups = CONFIGS['groups']
    assert [name for part in groups['vtab'] for name in groups[part]] == tasks_of('vtab')
    assert (len(tasks_of('vtab')), groups['fgvc']) == (19, tasks_of('fgvc'))


IDS = [3, 5, 20, 100]  # of classes in a list: any numbers


def lists(root, task, train=('100', 20, '005', 3), val=IDS[:2], test=IDS[1:]):
    """A small data set with VPT's lists, in which classes may be in quotes. Returns its folder."""
    folder = root / 'fgvc' / TASKS[task]['dir']
    for name, ids in (('train', train), ('val', val), ('test', test)):
        named = {f'some class/{name} {i}.jpg': c for i, c in enumerate(ids)}
        write(folder / f'{name}.json', json.dumps(named).encode())
        for file, c in named.items():
            save(folder / TASKS[task].get('images', '') / file, IDS.index(int(c)))
    return folder


@pytest.mark.parametrize('task, under', [
    ('cub', 'images'), ('nabirds', 'images'), ('flowers', ''), ('dogs', 'Images'), ('cars', '')])
def test_each_of_the_5_tasks_is_read_from_vpts_lists_whose_classes_may_be_in_quotes(task, under, tmp_path):
    folder = lists(tmp_path, task)
    settings, found = load(task, tmp_path)
    how = settings.pictures
    assert [labels_of(part) for part in (found.train, found.val, found.test)] == [[3, 2, 1, 0], [0, 1], [1, 2, 3]]
    assert found.train.samples[0][0] == tmp_path / 'fgvc' / task / under / 'some class' / 'train 0.jpg'
    assert found.classes == [str(c) for c in IDS]
    assert found.notes == [
        f"VPT's lists in {folder}", f'4 images to train on, and not {how.n_train}',
        f'2 images to validate on, and not {how.n_val}', f'3 images to test on, and not {how.n_test}',
        f'{how.classes - 4} of {how.classes} classes have no training image']


def test_classes_that_are_not_trained_on_or_more_than_the_papers_are_refused(tmp_path):
    folder = lists(tmp_path, 'cub', train=[3, 5], val=[3], test=[5, 20])
    assert f'{folder / "test.json"}, entry 2: class 20 is not in train.json' in refusal('cub', tmp_path)
    assert 'train.json: 2 classes, and not 1' in refusal('cub', tmp_path, classes=1)


PICTURE_1 = 'images/train800/000001.jpg'


@pytest.mark.parametrize('said, lines', [
    ('expected "FILE CLASS"', [PICTURE_1, '', '7', *(f'{PICTURE_1} {c}' for c in (
        'seven', '-1', '1.0', '٣', '9' * 5000))]),
    ('class 37 of 37; ids count from 0', [f'{PICTURE_1} 37']),
    ("'images/train800/000000.jpg' stands there twice", ['images/train800/000000.jpg 1']),
    ('lies outside of', ['../../../secret.jpg 1', '/secret.jpg 1', 'images/../../../secret.jpg 1'])])
def test_a_bad_line_of_a_list_is_refused_with_its_file_and_number(said, lines, tmp_path):
    file = vtab(tmp_path) / 'train800.txt'
    save(tmp_path / 'secret.jpg', 0)
    first, _, *others = file.read_text().splitlines()
    for line in lines:
        file.write_text('\n'.join([first, line, *others]), encoding='utf-8')
        err = refusal('pets', tmp_path)
        assert f'{file}, line 2: ' in err and said in err


@pytest.mark.parametrize('said, contents', [
    ('not a readable list', [b'', b'{"a.jpg": 1', b'[' * 10 ** 6, b'{"a":' * 10 ** 6, b'{"a": ' + b'9' * 5000 + b'}']),
    ('expected a JSON object', [b'[]', b'{}', b'[["a.jpg", 1]]', b'3', b'null']),
    ('is a number from 0, not', [b'{"a.jpg": ' + x + b'}' for x in (
        b'-1', b'true', b'1.0', b'NaN', b'null', b'[1]', b'{}', b'""', b'"one"', b'"\xd9\xa3"', b'9999999999')]),
    ("'a.jpg' stands there twice", [b'{"a.jpg": 1, "a.jpg": 2}']),
    ('lies outside of', [b'{"../a.jpg": 1}', b'{"/a.jpg": 1}', b'{"a/../../b": 1}']),
    ('no such image', [b'{"a.jpg": 3}', b'{"": 3}', b'{"a\\u0000.jpg": 3}', b'{"\\ud800.jpg": 3}',
                       b'{"' + b'a' * 5000 + b'": 3}'])])
def test_a_bad_json_list_is_refused_by_name(said, contents, tmp_path):
    folder = lists(tmp_path, 'flowers', val=[3], test=[3])
    for content in contents:
        (folder / 'train.json').write_bytes(content)
        err = refusal('flowers', tmp_path)
        assert said in err and str(folder) in err, content[:80]


def test_a_list_that_is_missing_empty_or_not_text_is_refused_by_name(tmp_path):
    for task, file in ('dogs', lists(tmp_path, 'dogs') / 'val.json'), ('pets', vtab(tmp_path) / 'val200.txt'):
        file.write_bytes(b'\xff\xfe\0images')
        assert f'{file}: not a readable list' in refusal(task, tmp_path)
        file.unlink()
        assert f'{file}: not a readable list' in refusal(task, tmp_path)
    file.write_bytes(b'')
    assert f'{file}, line 1: expected "FILE CLASS"' in refusal('pets', tmp_path)


# Any name of a file in a folder but one that a line cannot hold.
names = st.text(st.characters(exclude_characters='\n\r\0', exclude_categories=['Cs']), min_size=1, max_size=20).filter(
    lambda name: not Path(name).is_absolute() and '..' not in Path(name).parts and name == name.strip(' \t\ufeff'))
samples = st.dictionaries(names, st.integers(0, 36), min_size=1, max_size=5).filter(
    lambda found: len({Path(name) for name in found}) == len(found))


def read(name, content):
    """What `read_list` makes of a file's content."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / name).write_bytes(content)
        found = data.read_list(path, path.parent, range(37))
        return [(str(file.relative_to(folder)), label) for file, label in found]


@given(samples)
@example({'a b.jpg': 1, ' ä "x" 3.jpg': 2, 'a\u2028b\x85c\x0cd': 3, "it's 4": 4})
def test_a_list_may_hold_any_name_of_a_file(found):
    expected = [(str(Path(name)), label) for name, label in found.items()]
    assert read('list.txt', ''.join(f'{name} {label}\n' for name, label in found.items()).encode()) == expected
    assert read('list.json', json.dumps(found).encode()) == expected
    assert read('list.json', json.dumps(found, ensure_ascii=False).encode()) == expected


@pytest.mark.parametrize('change', [
    lambda text: text + b'\n', lambda text: text.rstrip(), lambda text: text + b' \t\r\n\n',
    lambda text: text.replace(b' ', b'\t'), lambda text: text.replace(b' ', b'   '),
    lambda text: text.replace(b' ', b' \t '), lambda text: b'\xef\xbb\xbf' + text,
    lambda text: text.replace(b'\n', b'\r\n')])
def test_a_list_may_be_written_by_any_editor(change):
    assert read('list.txt', change(b'a/a.jpg 7\na/b.jpg 36\n')) == [('a/a.jpg', 7), ('a/b.jpg', 36)]
    assert read('list.json', b'\xef\xbb\xbf{"a.jpg": 7}') == [('a.jpg', 7)]


def test_a_link_to_a_folder_of_images_elsewhere_is_followed_and_a_circle_of_links_is_not(tmp_path):
    folder = vtab(tmp_path / 'data')
    (folder / 'images').rename(tmp_path / 'elsewhere')
    (folder / 'images').symlink_to(tmp_path / 'elsewhere')
    assert len(load('pets', tmp_path / 'data')[1].train) == 8
    (folder / 'images').unlink()
    (folder / 'images').symlink_to(folder / 'images')
    assert 'train800/000000.jpg: no such image (and 7 more of 8)' in refusal('pets', tmp_path / 'data')


def own(root, **parts):
    """own(root, train={'cat': 10, 'dog': 5}) saves so many pictures of the classes. Their ids are those in train."""
    for part, counts in parts.items():
        for name, n in counts.items():
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                save(root / part / name / f'{i}.png', sorted(set(parts['train']) | {name}).index(name))


def labels_in(folder):
    """The notes of a folder of one's own, its classes, and the labels of its three sets."""
    task = load('folder', folder)[1]
    return task.notes, task.classes, [labels_of(part) for part in (task.train, task.val, task.test)]


@pytest.mark.parametrize('val', [{'val': {'cat': 1, 'ähre': 2}}, {'valid': {'cat': 1, 'ähre': 2}},
                                 {'val': {'cat': 1}, 'valid': {'ähre': 2}}])
def test_classes_are_the_folders_of_train_and_test_may_have_fewer_or_empty_ones(val, tmp_path):
    own(tmp_path, train={'cat': 6, 'a dog': 5, 'ähre': 4}, test={'cat': 3, 'ähre': 0}, **val)
    assert labels_in(tmp_path) == (
        [f'images in {tmp_path}', '2 of 3 classes have no test image, as a dog'],
        ['a dog', 'cat', 'ähre'],
        [[0] * 5 + [1] * 6 + [2] * 4, [1, 2, 2], [1] * 3])


def test_without_val_a_fifth_of_train_takes_its_place(tmp_path):
    own(tmp_path, train={'cat': 10, 'dog': 14}, test={'dog': 2})
    (_, found), (_, again) = load('folder', tmp_path), load('folder', tmp_path, seed=3)
    assert found.val.samples == again.val.samples and len(set(labels_of(found.val))) == 2
    assert (len(found.val), len(found.train)) == (4, 20)
    assert sorted(found.train.samples + found.val.samples) == sorted(
        (str(path), int(path.parent.name == 'dog')) for path in tmp_path.glob('train/*/*'))
    assert 'no val/: 4 of the training images' in found.notes[0]


def test_a_class_name_in_two_unicode_forms_is_one_class(tmp_path):
    """é is one letter, or e and an accent, as macOS writes it; both look the same."""
    one, two = (normalize(form, 'café') for form in ('NFC', 'NFD'))
    own(tmp_path, train={one: 2, 'dog': 2}, val={'dog': 1}, test={'dog': 1})
    for part, n in ('train', 1), ('val', 3), ('test', 2):
        for i in range(n):
            save(tmp_path / part / two / f'{i}.png', 0)
    assert one != two
    assert labels_in(tmp_path)[1:] == ([one, 'dog'], [[0, 0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1]])


def test_files_that_are_no_images_by_their_names_are_counted_and_noted(tmp_path):
    own(tmp_path, train={'cat': 3}, val={'cat': 1}, test={'cat': 2})
    train, test = tmp_path / 'train', tmp_path / 'test'
    for file in train / 'cat' / 'a.gif', train / 'cat' / 'more' / 'b.txt', test / 'cat' / 'c.GIF':
        write(file, b'')
    notes, _, labels = labels_in(tmp_path)
    note = 'are left out, no images by their names'
    assert notes[1].startswith(f'2 files in {train} {note}: {train / "cat"}')
    assert notes[2:] == [f'1 files in {test} {note}: {test / "cat" / "c.GIF"}']
    assert labels == [[0] * 3, [0], [0] * 2]
    write(train / 'gifs' / 'a.gif', b'')
    assert f'{train / "gifs"}: no image' in refusal('folder', tmp_path)


@pytest.mark.parametrize('suffix', ['.JFIF', *['.avif'] * features.check('avif')])
def test_images_that_pillow_reads_and_torchvision_does_not_name_are_taken(suffix, tmp_path):
    own(tmp_path, train={'cat': 1}, val={'cat': 1}, test={'cat': 1})
    save(tmp_path / 'train' / 'cat' / f'more{suffix}', 0)
    assert labels_in(tmp_path) == ([f'images in {tmp_path}'], ['cat'], [[0, 0], [0], [0]])


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '__MACOSX', '.git', '__pycache__', '@eaDir'])
def test_what_an_operating_system_leaves_is_no_class_and_no_image(name, tmp_path):
    own(tmp_path, train={'cat': 2, 'dog__1.5': 2}, val={'cat': 1}, test={'cat': 2, 'dog__1.5': 1})
    for file in (f'train/{name}/0.png', f'test/{name}/0.png', f'train/cat/{name}/0.png', 'train/cat/._0.png',
                 'train/cat/.DS_Store', 'train/cat/Thumbs.db', 'test/cat/desktop.ini'):
        write(tmp_path / file, b'')
    assert labels_in(tmp_path) == ([f'images in {tmp_path}'], ['cat', 'dog__1.5'], [[0, 0, 1, 1], [0], [0, 0, 1]])


CAT = {'cat': 2}


@pytest.mark.parametrize('parts, classes, said', [
    (dict(train=CAT), 0, 'test: no folder of images by class'),
    (dict(train={}), 0, 'train: no folder of images by class'),
    (dict(train=CAT, test={'cat': 1, 'dog': 1}), 0, 'test/dog: no such class in'),
    (dict(train=CAT, test=CAT, val={'dog': 1}), 0, 'val/dog: no such class in'),
    (dict(train=CAT, test=CAT, valid={'dog': 1}), 0, 'valid/dog: no such class in'),
    (dict(train=CAT | {'dog': 0}, test=CAT), 0, 'train/dog: no image'),
    (dict(train=CAT | {'dog': 2}, test=CAT), 3, 'train: 2 classes, and not 3')])
def test_a_folder_that_lacks_something_is_refused(parts, classes, said, tmp_path):
    own(tmp_path, **parts)
    assert f'{tmp_path}/{said}' in refusal('folder', tmp_path, classes=classes)


@pytest.mark.parametrize('link, to', [('cat/loop', '.'), ('cat/loop', '../../train'), ('loop', 'loop')])
def test_a_circle_of_links_is_refused(link, to, tmp_path):
    own(tmp_path, train={'cat': 2, 'dog': 2}, test={'cat': 1})
    (tmp_path / 'train' / link).symlink_to(to)
    said = refusal('folder', tmp_path)
    assert f'{tmp_path}/train: ' in said and ('a file is there twice' in said or link == 'loop')


def test_a_picture_whose_class_a_crop_or_a_flip_would_change_is_only_resized_and_others_are_cropped_and_flipped():
    """The tasks of the group `structured`, and SVHN's digits. What `augment` does is in test_4_1_data.py."""
    resized = [*CONFIGS['groups']['structured'], 'svhn']
    for task in (*tasks_of('vtab'), *tasks_of('fgvc'), 'folder'):
        assert tiny(task, k=1).pictures.augment == ('none' if task in resized else 'crop_flip')
