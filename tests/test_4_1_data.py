"""Section 4.1, the data: which pictures are learned from, which are tested on, and how they become batches.

The protocol is VTAB-1k's: 800 pictures to train on, 200 to choose settings on, every test picture to test on.
"""

import io
import itertools
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pictures import CONFIGS, no_network, oxford, save_picture, tiny, vtab  # noqa: F401
from torchvision import transforms

import data
import shapes
import train
from vit import InputError

CPU = torch.device('cpu')


def pets(folder, **changes):
    """The settings of Pets in a folder, and the task."""
    config = tiny('pets', data=str(folder), **changes)
    return config, data.load(config)


def paths(task):
    """The files of a task's three sets."""
    return [[str(path) for path, _ in part.samples] for part in (task.train, task.val, task.test)]


def epoch_of(pictures, config, epoch=None):
    """All images and labels of an epoch, in its order."""
    images, labels = zip(*data.batches(pictures, config, CPU, epoch))
    return torch.cat(images), torch.cat(labels)


def grey_levels(images, config):
    """Back from normalised images to 0 ... 255."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    return (images * std + mean) * 255


def numbered(n, size=4):
    """n pictures, each of one colour and with its number as its label."""
    return [(torch.full((3, size, size), i % 256, dtype=torch.uint8), i) for i in range(n)]


# ---- Which pictures -------------------------------------------------------------------------------------


def test_pets_are_read_from_torchvisions_folder(tmp_path):
    oxford(tmp_path, trainval=30, test=12, labels=range(1, 38))
    config, task = pets(tmp_path)
    assert (len(task.train), len(task.val), len(task.test)) == (24, 6, 12)
    assert 'not the official VTAB-1k split' in task.notes[0]
    for path, label in task.train.samples + task.val.samples + task.test.samples:
        assert path.name.startswith(f'breed_{label + 1}_')  # ids count from 0
    assert all(path.stem.split('_')[2] >= '1000' for path, _ in task.test.samples)


def test_the_classes_of_pets_are_torchvisions(tmp_path):
    oxford(tmp_path, trainval=37, labels=range(1, 38))
    assert pets(tmp_path)[1].classes == [f'Breed {i}' for i in range(1, 38)]


def test_a_copy_of_pets_without_some_breeds_can_still_be_learned(tmp_path):
    oxford(tmp_path, labels=(1, 2, 37))
    _, task = pets(tmp_path)
    assert max(label for _, label in task.train.samples + task.test.samples) < len(task.classes)


def test_official_lists_take_precedence(tmp_path):
    oxford(tmp_path)
    folder = vtab(tmp_path, 8, 3, 5)
    _, task = pets(tmp_path)
    assert [len(part) for part in paths(task)] == [8, 3, 5]
    assert all(path.startswith(str(folder)) for part in paths(task) for path in part)
    assert task.train.samples[7] == (folder / 'images/train800/000007.jpg', 7)
    assert len(task.classes) == 37 and 'official' in task.notes[0]


def test_a_list_may_have_windows_line_ends_and_names_with_spaces(tmp_path):
    folder = vtab(tmp_path)
    save_picture(folder / 'images' / 'a b.jpg', 0)
    (folder / 'test.txt').write_bytes(b'images/a b.jpg 7\r\nimages/test/000000.jpg 8\r\n')
    expected = [(folder / 'images/a b.jpg', 7), (folder / 'images/test/000000.jpg', 8)]
    assert pets(tmp_path)[1].test.samples == expected


@given(st.integers(1, 3000), st.integers(1, 900), st.integers(0, 300))
def test_train_and_val_are_disjoint_in_proportion_and_always_the_same(n, n_train, n_val):
    train_set, val_set = data.draw(range(n), n_train, n_val)
    assert len(set(train_set) | set(val_set)) == len(train_set) + len(val_set) == min(n, n_train + n_val)
    assert set(train_set) | set(val_set) <= set(range(n))
    assert abs(len(val_set) - len(train_set + val_set) * n_val / (n_train + n_val)) <= 0.5
    torch.manual_seed(n)  # which has no part in it
    assert data.draw(range(n), n_train, n_val) == (train_set, val_set)


def test_the_draw_is_800_and_200_of_all_breeds():
    """Section 4.1. The split of the 3,680 trainval pictures does not change from one version to the next."""
    train_set, val_set = data.draw(range(3680), 800, 200)
    assert (len(train_set), len(val_set)) == (800, 200)
    assert len({i * 37 // 3680 for i in train_set}) == 37
    assert (train_set[:3], val_set[:3]) == ([2589, 676, 2579], [364, 1303, 133])


def test_no_picture_is_in_two_sets(tmp_path):
    oxford(tmp_path)
    for folder in (tmp_path, vtab(tmp_path).parent.parent):
        sets = [set(part) for part in paths(pets(folder)[1])]
        assert all(not a & b for a, b in itertools.combinations(sets, 2))


@pytest.mark.parametrize('score_on, learned, scored', [('test', 11, 5), ('val', 8, 3)])
def test_val_is_learned_from_only_when_test_is_scored(score_on, learned, scored, tmp_path, monkeypatch):
    vtab(tmp_path, 8, 3, 5)
    seen = {}
    monkeypatch.setattr(train, 'train', lambda model, optimizer, pictures, *rest: seen.update(learn=pictures) or [
        {'epoch': 1, 'loss': 0.0, 'lr': 0.0, 'seconds': 1.0, 'images_per_second': 1.0}])
    monkeypatch.setattr(train, 'accuracy', lambda model, pictures, *rest: seen.update(score=pictures) or 0.5)
    config, task = pets(tmp_path, score_on=score_on, runs=str(tmp_path / 'runs'))
    result = train.run(config)
    val = {task.val[i][0].numpy().tobytes() for i in range(3)}
    learn, score = ({x.numpy().tobytes() for x, _ in seen[name]} for name in ('learn', 'score'))
    assert (len(learn), len(score), result['images']) == (learned, scored, scored)
    assert (val <= learn) == (score_on == 'test') and (score == val) == (score_on == 'val')
    assert not learn & score


# ---- What tells them from others ------------------------------------------------------------------------


def differing(one, two):
    """The parts of two digests that are not the same."""
    assert one.keys() == two.keys()
    return {name for name in one if one[name] != two[name]}


def test_moving_the_data_folder_is_no_difference(tmp_path):
    vtab(tmp_path / 'here')
    config, task = pets(tmp_path / 'here')
    before = data.digest(task, config)
    (tmp_path / 'here').rename(tmp_path / 'there')
    config, task = pets(tmp_path / 'there')
    assert data.digest(task, config) == before
    assert len(before) == 10 and before['test names'].startswith('5 ') and before['class names'].startswith('37 ')


@pytest.mark.parametrize('change, parts', [
    (lambda folder: save_picture(folder / 'images/test/000003.jpg', 99, width=80), {'test sizes'}),
    (lambda folder: (folder / 'val200.txt').write_text(
        ''.join(f'images/val200/00000{i}.jpg {i + 5}\n' for i in range(3))), {'val labels'}),
    (lambda folder: (folder / 'test.txt').write_text(
        ''.join(f'images/test/00000{i}.jpg {i + 2}\n' for i in range(4))), {'test names', 'test labels', 'test sizes'}),
    (lambda folder: (folder / 'images/train800').rename(folder / 'images/a') and (folder / 'train800.txt').write_text(
        (folder / 'train800.txt').read_text().replace('train800', 'a')), {'train names'})])
def test_other_pictures_labels_and_names_are_differences(change, parts, tmp_path):
    folder = vtab(tmp_path)
    config, task = pets(tmp_path)
    before = data.digest(task, config)
    change(folder)
    config, task = pets(tmp_path)
    assert differing(before, data.digest(task, config)) == parts


def test_other_classes_and_another_order_are_differences():
    samples = [(torch.full((3, 4, 4), i, dtype=torch.uint8), i) for i in range(3)]
    config, task = tiny(), data.Task(samples, samples[:2], samples[:1], ['a', 'b', 'c'], [])
    other = data.Task(samples[::-1], samples[:2], [(samples[1][0], 0)], ['a', 'c', 'b'], [])
    assert differing(data.digest(task, config), data.digest(other, config)) == {
        'class names', 'train names', 'train labels', 'test names'}


# ---- From files to pictures -----------------------------------------------------------------------------


def png(array, **more):
    """A picture in a file in memory; PNG, so that no value changes."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'png', **more)
    file.seek(0)
    return file


def test_every_kind_of_picture_becomes_rgb():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for array in (grey, np.stack([grey] * 3, -1), np.stack([grey] * 4, -1)):
        picture = data.read_image(png(array), (8, 8))
        assert picture.dtype == torch.uint8 and torch.equal(picture, torch.from_numpy(grey).expand(3, 8, 8))


@pytest.mark.parametrize('kind, dtype', [('png', '<u2'), ('tiff', '<u2'), ('tiff', '>u2')])
def test_grey_levels_of_16_bits_go_from_black_to_white(kind, dtype, tmp_path):
    levels = np.linspace(0, 65535, 64).round().reshape(8, 8)
    Image.fromarray(levels.astype(dtype)).save(tmp_path / f'a.{kind}')
    picture = data.read_image(tmp_path / f'a.{kind}', (8, 8))
    naive = torch.from_numpy(levels / 65535 * 255).expand(3, 8, 8)
    torch.testing.assert_close(picture.double(), naive, rtol=0, atol=0.51)


def test_a_16_bit_picture_that_older_versions_of_pillow_read_in_32_bits_is_the_same():
    image = Image.fromarray(np.full((8, 8), 65535, dtype=np.int32))
    assert np.asarray(data.eight_bits(image, 'PNG')).max() == 255


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_grey_levels_whose_range_is_not_known_are_refused_by_name(dtype, tmp_path):
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(dtype)).save(tmp_path / 'a.tiff')
    with pytest.raises(InputError, match='a.tiff: not an image.*range is not known.*8 or 16'):
        data.read_image(tmp_path / 'a.tiff', (8, 8))


def test_a_photograph_that_was_taken_sideways_stands_upright():
    array = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it by a quarter, clockwise
    picture = data.read_image(png(array, exif=exif), (6, 8))
    assert torch.equal(picture, torch.from_numpy(np.rot90(array, -1).copy()).permute(2, 0, 1))


@pytest.mark.parametrize('img_size, side', [(224, 256), (112, 128), (28, 32)])
def test_pictures_are_resized_to_256_for_a_crop_of_224_and_in_proportion(img_size, side):
    assert data.resized(tiny('pets', img_size=img_size)) == side
    assert data.resized(tiny('pets', img_size=img_size, augment='none')) == (img_size, img_size)


@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 99))
def test_a_test_picture_is_resized_cropped_in_the_middle_and_normalised(width, height, seed):
    """Section 4.1: torchvision's transforms are the naive way to say it."""
    config = tiny('pets', img_size=28)
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = data.read_image(png(array), data.resized(config))
    (images, _), = data.batches([(picture, 0)], config, CPU)
    naive = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(),
                                transforms.Normalize(config.mean, config.std)])
    torch.testing.assert_close(images[0], naive(Image.fromarray(array)), rtol=0, atol=1e-5)


@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_in_memory_are_those_in_the_files(workers, tmp_path):
    oxford(tmp_path)
    config, task = pets(tmp_path, workers=workers)
    kept = data.in_memory(task.train, config, CPU)
    assert isinstance(kept, list) and len(kept) == len(task.train)
    for (picture, label), (kept_picture, kept_label) in zip((task.train[i] for i in range(len(kept))), kept):
        assert label == kept_label and torch.equal(picture, kept_picture)


def test_pictures_in_memory_are_on_the_device_and_are_cropped_and_flipped_there(tmp_path):
    """Torch's meta device stands for a GPU: it has shapes and no values."""
    oxford(tmp_path)
    config, task = pets(tmp_path)
    kept = [picture for picture, _ in data.in_memory(task.train, config, torch.device('meta'))]
    images = data.augment(kept, config.img_size, torch.rand(len(kept), 3))
    assert {x.device.type for x in (*kept, images)} == {'meta'}
    assert images.shape == (len(kept), 3, config.img_size, config.img_size) and images.dtype == torch.uint8


def test_what_does_not_fit_in_memory_stays_in_its_files(tmp_path):
    oxford(tmp_path)
    config, task = pets(tmp_path, cache_gb=0)
    assert data.in_memory(task.train, config, CPU) is task.train


@pytest.mark.parametrize('free, moved', [(2.0, True), (1.9, False)])
def test_pictures_take_no_more_than_half_of_what_is_free_on_a_gpu(free, moved, tmp_path, monkeypatch):
    """A machine without a GPU is told what one has free, and what is sent there is watched."""
    oxford(tmp_path)
    config, task = pets(tmp_path)
    needed, sent = sum(picture.nbytes for picture, _ in task.train), []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(free * needed), 10 * needed))
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, device: sent.append(device) or x)
    kept = data.in_memory(task.train, config, torch.device('cuda'))
    assert isinstance(kept, list) and len(kept) == len(task.train)
    assert sent == [torch.device('cuda')] * len(kept) * moved


def test_a_batch_goes_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    x, did = torch.zeros(3), []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: did.append('pinned') or x)
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, device, non_blocking: did.append((device.type, non_blocking)))
    for device in (torch.device('cuda'), CPU):
        data.send(x, device)
    assert did == ['pinned', ('cuda', True), ('cpu', False)]


@pytest.mark.parametrize('cache_gb, looks', [(8.0, 1), (0.0, 2)])
def test_no_test_picture_is_decoded_twice_but_where_there_is_no_room_to_keep_it(cache_gb, looks, tmp_path, monkeypatch):
    vtab(tmp_path)
    read_image, seen = data.read_image, []
    monkeypatch.setattr(data, 'read_image', lambda path, size: [seen.append(path), read_image(path, size)][1])
    config = tiny('pets', data=str(tmp_path), runs=str(tmp_path / 'runs'), cache_gb=cache_gb, img_size=24, k=2, epochs=1)
    train.run(config)
    test = [path for path, _ in data.load(config).test.samples]
    assert sorted(path for path in seen if path in test) == sorted(test * looks)


@pytest.mark.parametrize('cache_gb', [8.0, 0.0])
def test_a_broken_test_picture_is_named_before_training_begins(cache_gb, tmp_path, monkeypatch):
    (broken := vtab(tmp_path) / 'images/test/000003.jpg').write_bytes(b'<html>')
    monkeypatch.setattr(train, 'train', lambda *args: pytest.fail('it trains'))
    with pytest.raises(InputError, match=f'{broken}: not an image'):
        train.run(tiny('pets', data=str(tmp_path), runs=str(tmp_path / 'runs'), cache_gb=cache_gb, img_size=24, k=2))


# ---- Threads that decode --------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 1, 3, 50])
def test_what_is_decoded_by_threads_comes_in_order(workers):
    def work(i):
        time.sleep((7 * i % 5) / 1000)
        return i
    assert list(data.decoded(work, range(20), workers)) == list(range(20))
    assert list(data.decoded(work, [], workers)) == []


def test_as_many_pictures_are_decoded_at_a_time_as_there_are_workers():
    together = threading.Barrier(3)
    assert [*data.decoded(lambda i: (together.wait(10), i)[1], range(9), 3)] == [*range(9)]


def test_a_set_that_does_not_fit_in_memory_is_not_decoded_ahead_without_end():
    begun = []
    for n, _ in zip(range(30), data.decoded(begun.append, range(1000), 3)):
        time.sleep(0.001)  # a training step, longer than it takes to decode
        assert n < len(begun) <= n + 6


def test_an_error_of_a_thread_is_raised_as_it_is_in_its_turn():
    def work(i):
        if i == 5:
            raise InputError('image 5')
        return i
    found = data.decoded(work, range(20), 3)
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(InputError, match='^image 5$'):
        next(found)


def test_threads_end_with_the_epoch_even_where_it_is_left_early():
    before = threading.active_count()
    found = data.decoded(lambda i: time.sleep(0.001), range(1000), 4)
    next(found)
    assert before < threading.active_count() <= before + 4  # one that is idle is taken again
    found.close()
    assert threading.active_count() == before


def test_ctrl_c_while_pictures_are_decoded_is_no_traceback_of_a_thread(capfd):
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        for _ in data.decoded(lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 9 else time.sleep(0.01), range(99), 2):
            pass
    assert threading.active_count() == before and capfd.readouterr() == ('', '')


def test_a_run_on_pictures_in_files_needs_few_open_files_and_no_processes(tmp_path, monkeypatch):
    """A container may have next to no shared memory, through which processes would hand pictures over."""
    vtab(tmp_path)
    config = tiny('pets', data=str(tmp_path), runs=str(tmp_path), cache_gb=0.0, workers=4, img_size=24, k=2, epochs=1)
    monkeypatch.setattr(os, 'fork', lambda: pytest.fail('a process is started'))
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), open(os.devnull)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened.fileno() + 6, limits[1]))  # one for each thread, and one
        assert train.run(config)['images'] == 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        opened.close()


@pytest.mark.parametrize('cpus, processes, threads', [(12, None, 8), (3, None, 3), (1, None, 1), (12, 2, 4), (12, 16, 1)])
def test_auto_is_a_thread_for_each_cpu_of_the_process_at_most_8_divided_among_processes(
        cpus, processes, threads, monkeypatch):
    if processes:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    config = tiny(workers=3)
    assert data.workers_of(config) == 3
    config.workers = 'auto'
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cpus)), raising=False)
    assert data.workers_of(config) == threads
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(os, 'cpu_count', lambda: cpus)
    assert data.workers_of(config) == threads


# ---- From pictures to batches ---------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
def test_normalisation_is_minus_mean_by_std_of_each_colour(mean, std):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    config = tiny(img_size=16, mean=mean, std=std)
    (images, _), = data.batches([(levels, 0)], config, CPU)
    for i in range(3):
        naive = (levels[i].double() / 255 - mean[i]) / std[i]
        torch.testing.assert_close(images[0, i].double(), naive, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5), st.integers(0, 100))
def test_every_picture_comes_exactly_once_an_epoch(n, batch, seed, epoch):
    config = tiny(img_size=4, batch=batch, seed=seed)
    sizes = [len(labels) for _, labels in data.batches(numbered(n), config, CPU, epoch)]
    assert sizes == [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    images, labels = epoch_of(numbered(n), config, epoch)
    assert sorted(labels.tolist()) == list(range(n))
    assert torch.equal(grey_levels(images, config)[:, 0, 0, 0].round().long(), labels)  # with its own label


def test_test_pictures_come_in_order():
    assert epoch_of(numbered(40), tiny(img_size=4))[1].tolist() == list(range(40))


def test_one_seed_and_epoch_give_the_same_batches_and_no_other_does():
    pictures, config = numbered(40, size=9), tiny(img_size=8, augment='crop_flip')
    images, labels = epoch_of(pictures, config, 3)
    torch.manual_seed(99)  # torch's own random numbers have no part in it
    same_images, same_labels = epoch_of(pictures, config, 3)
    assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    for other, epoch in ((config, 4), (tiny(img_size=8, augment='crop_flip', seed=1), 3)):
        assert not torch.equal(labels, epoch_of(pictures, other, epoch)[1])


def test_an_epoch_is_the_same_from_files_from_memory_and_from_workers(tmp_path):
    oxford(tmp_path)
    config, task = pets(tmp_path)
    with_workers = tiny('pets', workers=2)
    images, labels = epoch_of(task.train, config, 1)
    for pictures, how in ((task.train, with_workers), (data.in_memory(task.train, config, CPU), config)):
        other_images, other_labels = epoch_of(pictures, how, 1)
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


pairs = st.tuples(st.integers(0, 4293), st.integers(0, 999_999))  # seed and epoch


@given(pairs, pairs)
@example((0, 1), (1, 0))
@example((0, 999_999), (1, 0))
@example((0, 0), (4293, 999_999))
def test_no_two_pairs_of_seed_and_epoch_share_an_order_of_images(one, other):
    """Torch takes 32 bits of a seed: further up two of them may be one."""
    orders = [epoch_of(numbered(40, 1), tiny(img_size=1, seed=seed, batch=40), epoch)[1].tolist() for seed, epoch in (one, other)]
    assert (orders[0] == orders[1]) == (one == other)
    assert max(1_000_003 * seed + epoch for seed, epoch in (one, other)) < 2 ** 32


def windows(n, augment, epoch=0):
    """(top, left, flipped) of each of n windows of 6 x 6, cut from one picture of 9 x 11 whose colours are
    its coordinates. That it is a window at all is asserted here."""
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(11), indexing='ij')
    picture = torch.stack([rows, columns, 0 * rows]).to(torch.uint8)
    config = tiny(img_size=6, augment=augment, batch=64)
    found = []
    for window in grey_levels(epoch_of([(picture, 0)] * n, config, epoch)[0], config).round().to(torch.uint8):
        top, left = window[0].min().item(), window[1].min().item()
        flipped = bool(window[1, 0, 0] > window[1, 0, 5])
        expected = picture[:, top:top + 6, left:left + 6]
        assert torch.equal(window, expected.flip(-1) if flipped else expected)
        found.append((top, left, flipped))
    return found


def test_training_crops_are_windows_of_the_picture_and_reach_all_of_it():
    """Section 4.1, "random cropping and horizontal flip"."""
    found = windows(1000, 'crop_flip')
    assert {(top, left) for top, left, _ in found} == set(itertools.product(range(4), range(6)))
    assert {flipped for *_, flipped in found} == {True, False}
    assert max(found.count(window) for window in set(found)) < 60  # of 1000 in 48 kinds: none is preferred


def test_every_window_occurs_flipped_and_not_flipped_equally_often():
    found = windows(2000, 'crop_flip')
    assert set(found) == set(itertools.product(range(4), range(6), (False, True)))
    for axis in (0, 1):  # a flip says nothing of where the window is
        for place in {window[axis] for window in found}:
            assert 0.4 < np.mean([flipped for *at, flipped in found if at[axis] == place]) < 0.6


def test_about_half_of_the_training_pictures_are_flipped():
    assert 0.45 < np.mean([flipped for *_, flipped in windows(1000, 'crop_flip')]) < 0.55


def test_the_crop_is_another_one_in_the_next_epoch():
    assert windows(20, 'crop_flip', 0) != windows(20, 'crop_flip', 1)


def test_a_test_picture_is_never_flipped_and_always_cropped_in_the_middle():
    assert set(windows(50, 'crop_flip', epoch=None)) == {(2, 2, False)}


def test_without_augmentation_a_training_picture_is_the_picture():
    pictures, config = data.load(tiny(n_train=30)).train, tiny(n_train=30)
    images, labels = epoch_of(pictures, config, 0)
    plain = {picture.numpy().tobytes() for picture, _ in pictures}
    assert {x.numpy().tobytes() for x in grey_levels(images, config).round().to(torch.uint8)} == plain


# ---- Pictures of shapes ---------------------------------------------------------------------------------

FOUR = list(shapes.COLOURS)[:4]
PLACES = [(slice(3 + 14 * (c // 3), 17 + 14 * (c // 3)), slice(3 + 14 * (c % 3), 17 + 14 * (c % 3))) for c in range(9)]


def of_colour(images, colour):
    """Which pixels have just this colour: [n, 48, 48]."""
    return (np.abs(images.astype(int) - np.array(shapes.COLOURS[colour])[:, None, None]) <= 1).all(1)


def seen_in(images, colour):
    """In which of the nine cells a colour is seen: [n, 9]."""
    pixels = of_colour(images, colour)
    return np.stack([pixels[:, rows, columns].any((1, 2)) for rows, columns in PLACES], axis=1)


def draw(ask, n=200, seed=0, **look):
    return shapes.draw_shapes(n, ask, grain=0, seed=seed, **look)


@pytest.mark.parametrize('colours', [['cyan'], FOUR, list(shapes.COLOURS)])
def test_each_colour_has_a_cell_of_its_own(colours):
    images, _ = draw(f'where_{colours[0]}', colours=colours)
    cells = np.stack([seen_in(images, colour) for colour in colours])
    assert (cells.sum(2) == 1).all() and (cells.sum(0) <= 1).all()
    assert not any(seen_in(images, colour).any() for colour in set(shapes.COLOURS) - set(colours))


@pytest.mark.parametrize('look', shapes.LOOKS)
@pytest.mark.parametrize('colour', FOUR)
def test_where_is_the_cell_of_the_colour_that_is_asked_for_and_no_other(colour, look):
    images, answer = draw(f'where_{colour}', look=look)
    assert (seen_in(images, colour) == np.eye(9, dtype=bool)[answer]).all()


def covered(ask, n=40):
    """A scene, the answers, and which pixels the red shape covers when a picture is 480 pixels high: [n, 480, 480]."""
    scene = shapes.arrange(n, 4, np.random.default_rng(0))
    return scene, draw(ask, n)[1], shapes.cover(scene, 0, 480)[:, 0] > 0.5


def test_a_large_shape_is_wider_than_11_pixels_of_48_and_a_small_one_narrower_than_10():
    scene, answer, pixels = covered('size_red')
    for axis in (1, 2):
        width = pixels.any(axis).sum(1) / 10
        assert (np.abs(width - 2 * scene.radius[:, 0]) < 0.3).all()
        assert (np.where(answer == 1, 11 < width, width < 10)).all() and 10 < answer.sum() < 30


def test_a_ring_is_empty_in_its_middle_and_a_cross_in_its_corners():
    scene, answer, pixels = covered('shape_red')
    row, column, radius = (x[:, 0] for x in (scene.row, scene.column, scene.radius))
    middle, corner = (pixels[np.arange(40), (10 * (row + part * radius)).astype(int), (10 * (column + part * radius)).astype(int)]
                      for part in (0, 0.6))
    expected = {'disc': (True, True), 'ring': (False, True), 'cross': (True, False)}
    assert [*zip(middle, corner)] == [expected[shapes.SHAPES[shape]] for shape in answer]
    assert set(answer) == {0, 1, 2}


def test_colour_is_what_is_seen_in_the_centre_or_nothing():
    images, answer = draw('colour')
    seen = np.stack([seen_in(images, colour)[:, 4] for colour in FOUR], axis=1)
    assert (seen == np.eye(5, dtype=bool)[answer][:, :4]).all()
    assert shapes.names_of('colour', FOUR) == [*FOUR, 'nothing']


@pytest.mark.parametrize('colour', FOUR[1:])
def test_side_is_on_which_side_of_the_red_one(colour):
    images, answer = draw(f'side_{colour}')
    column, red = (seen_in(images, name).argmax(1) % 3 for name in (colour, 'red'))
    assert [shapes.names_of('side', FOUR)[a] for a in answer] == [
        'left' if a < b else 'right' if a > b else 'above or below' for a, b in zip(column, red)]


def test_count_is_how_many_are_there_and_only_then_some_are_missing():
    images, answer = draw('count')
    count = sum(seen_in(images, colour).any(1).astype(int) for colour in FOUR)
    assert [shapes.names_of('count', FOUR)[a] for a in answer] == [str(n) for n in count]
    assert np.bincount(count, minlength=5)[1:].min() > 25


def test_waves_change_the_background_alone():
    images, _ = draw('where_red', look='waves')
    coloured = sum(of_colour(images, colour) for colour in FOUR)
    grey = np.ptp(images.astype(int), axis=1) == 0
    deviation = np.where(grey, images[:, 0], np.nan)
    assert (np.nanstd(deviation, axis=(1, 2)) > 10).all() and (coloured.sum((1, 2)) > 60).all()


def sides_of(picture):
    """The pixels in the middle of the frame, of which there are 3: top, bottom, left, right, [4, 48, 3]."""
    return np.stack([picture[:, 1], picture[:, -2], picture[:, :, 1], picture[:, :, -2]]).transpose(0, 2, 1)


def test_the_frame_asks_what_the_picture_answers():
    """All around: where. Top and left: size. Bottom and right: shape. White with black marks: the colour there."""
    images, answer = draw('frame', n=400)
    offset = np.cumsum([0] + [len(shapes.names_of(name, FOUR)) for name in shapes.ASKED])
    scene = shapes.arrange(400, 4, np.random.default_rng(0))
    questions = set()
    for i, picture in enumerate(images.astype(int)):
        top, bottom, left, right = (side[5:-5] for side in sides_of(picture))  # without the corners
        coloured = [any((np.abs(side - rgb) <= 1).all() for rgb in shapes.COLOURS.values()) for side in (top, bottom, left, right)]
        question = {(1, 1, 1, 1): 'where', (1, 0, 1, 0): 'size', (0, 1, 0, 1): 'shape', (0, 0, 0, 0): 'colour'}[tuple(coloured)]
        questions.add(question)
        k = shapes.ASKED.index(question)
        if question == 'colour':
            row, column = ((side == 0).all(1).nonzero()[0].mean() for side in sides_of(picture)[[2, 0]])
            asked = 3 * int((row - 3) // 14) + int((column - 3) // 14)
        else:
            edge = (bottom if question == 'shape' else top)[0]
            asked = next(c for c, rgb in enumerate(shapes.COLOURS.values()) if (np.abs(edge - rgb) <= 1).all())
        one = shapes.Scene(*(x[i:i + 1] for x in scene))
        assert answer[i] == offset[k] + shapes.QUESTIONS[question](one, np.arange(1), np.array([asked]))[0]
    assert questions == set(shapes.ASKED)


def test_pictures_downstream_have_no_frame():
    corners = draw('where_blue')[0][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[:, :1, :1]).all()  # grey, as the background
    assert len(set(corners[:, 0, 0].tolist())) > 30


def test_every_cell_is_the_answer_about_as_often():
    counts = np.bincount(shapes.draw_shapes(1800, 'where_blue', size=16)[1], minlength=9)
    assert len(counts) == 9 and (abs(counts - 200) < 60).all()


@pytest.mark.parametrize('size', [24, 96])
def test_pictures_of_other_sizes_show_the_same(size):
    images, answer = shapes.draw_shapes(50, 'where_blue', grain=0, size=size)
    small, same = draw('where_blue', n=50)
    assert (answer == same).all()
    scaled = F.interpolate(torch.from_numpy(images).float(), (48, 48), mode='area').numpy()
    assert np.abs(scaled - small).mean() < 6


def test_grain_has_the_standard_deviation_that_was_asked_for():
    noisy, plain = (shapes.draw_shapes(50, 'where_blue', grain=noise)[0].astype(float) for noise in (8, 0))
    inside = (plain > 40) & (plain < 215)  # where nothing is clipped
    assert abs((noisy - plain)[inside].std() - 8) < 0.2


def test_one_seed_draws_the_same_pictures_and_another_seed_others():
    images, labels = shapes.draw_shapes(20, 'where_blue', seed=1)
    np.random.seed(99)  # numpy's own random numbers have no part in it
    same_images, same_labels = shapes.draw_shapes(20, 'where_blue', seed=1)
    assert (images == same_images).all() and (labels == same_labels).all()
    assert (images != shapes.draw_shapes(20, 'where_blue', seed=2)[0]).any()


@pytest.mark.parametrize('ask', ['frame', 'where_blue'])
def test_no_picture_of_shapes_is_in_two_sets(ask):
    task = data.load(tiny(ask=ask, n_train=50, n_val=50, n_test=50))
    pictures = [x.numpy().tobytes() for part in (task.train, task.val, task.test) for x, _ in part]
    assert len(set(pictures)) == 150


def test_the_questions_are_asked_about_the_same_pictures_but_not_about_those_of_pre_training():
    blue, red, framed = (data.load(tiny(ask=ask, grain=0.0)).test for ask in ('where_blue', 'shape_red', 'frame'))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(blue, red))
    assert [label for _, label in blue] != [label for _, label in red]
    inside = [{picture[:, 3:-3, 3:-3].numpy().tobytes() for picture, _ in part} for part in (blue, framed)]
    assert not inside[0] & inside[1]


@pytest.mark.parametrize('ask', ['where_purple', 'pink', 'where', 'count_red', 'when_red', 'side_red'])
def test_a_question_that_is_none_is_refused(ask):
    with pytest.raises(InputError, match=f'{ask}:.*red, green, blue, yellow.*frame, colour, count, where_red'):
        data.load(tiny(ask=ask))


@pytest.mark.parametrize('name', [*CONFIGS['groups']['shapes'], 'shapes_framed'])
def test_every_offline_task_has_its_classes_and_all_of_them_occur(name):
    for task in train.tasks_of(CONFIGS, [name]):
        found = data.load(tiny(task, n_train=300, n_val=20, n_test=20))
        assert {label for _, label in found.train} == set(range(len(found.classes)))


@pytest.mark.parametrize('setting', [{'look': 'waves'}, {'grain': 8.0}, {'colours': ['red', 'cyan', 'blue', 'green']}])
def test_the_settings_of_a_task_reach_its_pictures_and_the_answers_stay(setting):
    plain, other = (data.load(tiny(ask='where_blue', **changes)).test for changes in ({}, setting))
    assert [label for _, label in plain] == [label for _, label in other]
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(plain, other))
