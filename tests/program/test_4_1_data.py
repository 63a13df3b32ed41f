"""Section 4.1, the data: which pictures are learned from, which are tested on, and how they become batches.

The protocol is VTAB-1k's: 800 pictures to train on, 200 to choose settings on, every test picture to test on.
"""

import io
import itertools
import os
import resource
import signal
import struct
import threading
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pictures import no_network, save_picture, task_of, tiny, vtab  # noqa: F401
from torchvision import transforms

import data
import train
from vit import InputError

CPU = torch.device('cpu')
SMALL = dict(img_size=24, k=2, epochs=1)


def pets(folder, **changes):
    """The settings of Pets in a folder, small if it is not there yet, and the task."""
    if not (folder / 'vtab-1k').exists():
        vtab(folder)
    settings = tiny('pets', data=str(folder), **changes)
    return settings, data.load(settings)


def epoch_of(pictures, settings, epoch=None):
    """All images and labels of an epoch, in its order."""
    augment = data.Task([], [], [], []).augments[settings.pictures.augment]
    images, labels = zip(*data.batches(pictures, settings, CPU, epoch, data.centre if epoch is None else augment))
    return torch.cat(images), torch.cat(labels)


def grey_levels(images, settings):
    """Back from normalised images to 0 ... 255."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (settings.backbone.mean, settings.backbone.std))
    return (images * std + mean) * 255


def numbered(n, size=4):
    """n pictures, each of one colour and with its number as its label."""
    return [(torch.full((3, size, size), i % 256, dtype=torch.uint8), i) for i in range(n)]


@given(st.integers(1, 3000), st.integers(1, 900), st.integers(0, 300))
def test_train_and_val_are_disjoint_in_proportion_and_always_the_same(n, n_train, n_val):
    train_set, val_set = data.draw(range(n), n_train, n_val)
    both = set(train_set) | set(val_set)
    assert len(both) == len(train_set) + len(val_set) == min(n, n_train + n_val) and both <= set(range(n))
    assert abs(len(val_set) - len(both) * n_val / (n_train + n_val)) <= 0.5
    torch.manual_seed(n)  # which has no part in it
    assert data.draw(range(n), n_train, n_val) == (train_set, val_set)


def test_the_draw_of_pets_has_800_and_200_pictures_of_all_breeds():
    """Section 4.1. The split of the 3,680 trainval pictures does not change from one version to the next."""
    train_set, val_set = data.draw(range(3680), 800, 200)
    assert (len(train_set), len(val_set)) == (800, 200)
    assert len({i * 37 // 3680 for i in train_set}) == 37
    assert (train_set[:3], val_set[:3]) == ([2589, 676, 2579], [364, 1303, 133])


def test_val_is_learned_from_only_when_test_is_scored():
    task = data.Task([1, 2], [3], [4], [])
    assert train.sets(task, tiny(score_on='test')) == ([1, 2, 3], [4])
    assert train.sets(task, tiny(score_on='val')) == ([1, 2], [3])


@pytest.mark.parametrize('sizes, score_on', [((0, 0, 3), 'test'), ((3, 0, 3), 'val'), ((3, 3, 0), 'test')])
def test_a_set_without_pictures_is_refused(sizes, score_on):
    task = data.Task(*map(numbered, sizes), ['a', 'b', 'c'])
    with pytest.raises(InputError, match='images to train on and . of .* to score: look at n_train and n_val'):
        train.sets(task, tiny(score_on=score_on))


def differing(one, two):
    """The parts of two digests that are not the same."""
    assert one.keys() == two.keys() and len(one) == 10
    return {name for name in one if one[name] != two[name]}


def rewrite(file, old, new):
    """For a change of a folder: a list with another word in it."""
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new))


@pytest.mark.parametrize('change, parts', [
    (lambda folder: save_picture(folder / 'images/test/000003.jpg', 99, width=80), {'test sizes'}),
    (rewrite('val200.txt', 'jpg 2', 'jpg 9'), {'val labels'}),
    (rewrite('train800.txt', 'jpg 2', 'jpg 9'), {'train labels'}),
    (rewrite('test.txt', 'images/test/000004.jpg 6\n', ''), {'test names', 'test labels', 'test sizes'}),
    (lambda folder: (folder / 'images/train800').rename(folder / 'images/a') and rewrite(
        'train800.txt', 'train800', 'a')(folder), {'train names'})])
def test_other_pictures_labels_and_names_are_differences(change, parts, tmp_path):
    folder = vtab(tmp_path)
    before = data.fingerprint(pets(tmp_path)[1], tmp_path)
    change(folder)
    assert differing(before, data.fingerprint(pets(tmp_path)[1], tmp_path)) == parts


def test_other_classes_other_pixels_and_another_order_are_differences():
    samples = numbered(3)
    task = data.Task(samples, samples[:2], samples[:1], ['a', 'b', 'c'])
    other = data.Task(samples[::-1], samples[:2], [(samples[1][0], 0)], ['a', 'c', 'b'])
    assert differing(data.fingerprint(task, ''), data.fingerprint(other, '')) == {
        'class names', 'train names', 'train labels', 'test names'}


def test_another_pixel_or_another_file_of_a_mask_is_a_difference(tmp_path):
    other, folder = torch.eye(4, dtype=torch.uint8), vtab(tmp_path)
    names = [folder / f'images/train800/00000{i}.jpg' for i in range(3)]
    for one, two in (torch.zeros_like(other), other), (np.zeros((4, 4), np.uint8), other.numpy()), names[1:]:
        tasks = [data.Task(data.Files([(names[0], mask)], None), [], [], ['a']) for mask in (one, two)]
        assert differing(*(data.fingerprint(task, tmp_path) for task in tasks)) == {'train labels'}


def test_pictures_made_of_arrays_with_the_colours_last_are_those_that_are_copied():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).permute(2, 0, 1)
    one, other = (task_of(pictures=[(x, 0)]) for x in (image, image.contiguous()))
    assert not image.is_contiguous() and data.fingerprint(one, '') == data.fingerprint(other, '')
    images = [epoch_of(task.train, tiny(img_size=20), 0)[0] for task in (one, other)]
    assert torch.equal(*images)


def png(array):
    """A picture in a file in memory; PNG, so that no value changes."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'png')
    file.seek(0)
    return file


def test_every_kind_of_picture_becomes_rgb_and_a_line_is_no_picture():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for array in (grey, np.stack([grey] * 3, -1), np.stack([grey] * 4, -1)):
        picture = data.read_image(png(array), (8, 8))
        assert picture.dtype == torch.uint8 and torch.equal(picture, torch.from_numpy(grey).expand(3, 8, 8))
    assert data.read_image(png(np.zeros((1, 100), np.uint8)), None).shape == (3, 1, 100)
    with pytest.raises(InputError, match='101 x 1 pixels are a line and no picture'):
        data.read_image(png(np.zeros((1, 101), np.uint8)), None)


def tiff_of_12_bits(levels):
    """A TIFF file with 12 bits for each pixel, two pixels in three bytes, from the first bit on."""
    (height, width), bits = levels.shape, ''.join(f'{level:012b}' for level in levels.ravel())
    pixels = int(bits, 2).to_bytes(len(bits) // 8, 'big')
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b''.join(struct.pack('<HHII', tag, 3, 1, value) for tag, value in tags.items())
    return struct.pack('<4sI', b'II*', 8 + len(pixels)) + pixels + struct.pack('<H', len(tags)) + entries + bytes(4)


@pytest.mark.parametrize('kind, dtype, white', [
    ('png', '<u2', 65535), ('tiff', '<u2', 65535), ('tiff', '>u2', 65535), ('tiff', None, 4095)])
def test_grey_levels_go_from_black_to_what_the_file_says_is_white(kind, dtype, white, tmp_path):
    levels, path = np.linspace(0, white, 64).round().reshape(8, 8), tmp_path / f'a.{kind}'
    if dtype:
        Image.fromarray(levels.astype(dtype)).save(path)
    else:
        path.write_bytes(tiff_of_12_bits(levels.astype(int)))
    naive = torch.from_numpy(levels / white * 255).expand(3, 8, 8)
    torch.testing.assert_close(data.read_image(path, (8, 8)).double(), naive, rtol=0, atol=0.51)


def test_a_16_bit_picture_that_older_versions_of_pillow_read_in_32_bits_is_the_same():
    image = Image.fromarray(np.full((8, 8), 65535, dtype=np.int32))
    image.format = 'PNG'
    assert np.asarray(data.eight_bits(image)).max() == 255


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_grey_levels_whose_range_is_not_known_are_refused_by_name(dtype, tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype)).save(tmp_path / 'a.tiff')
    with pytest.raises(InputError, match='a.tiff: not an image.*range is not known.*8 or 16'):
        data.read_image(tmp_path / 'a.tiff', (8, 8))


NOISE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
UPRIGHT = [NOISE, NOISE[:, ::-1], NOISE[::-1, ::-1], NOISE[::-1], NOISE.swapaxes(0, 1), np.rot90(NOISE, -1),
           NOISE[::-1, ::-1].swapaxes(0, 1), np.rot90(NOISE)]  # by EXIF's orientation, from 1


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photograph_that_was_taken_sideways_stands_upright(orientation, tmp_path):
    (exif := Image.Exif())[0x0112] = orientation
    expected = torch.from_numpy(UPRIGHT[orientation - 1].copy()).permute(2, 0, 1)
    for kind in 'png', 'tiff':
        Image.fromarray(NOISE).save(path := tmp_path / f'a.{kind}', exif=exif)
        assert torch.equal(data.read_image(path, None), expected)


def chunk(kind, content):
    """A chunk of a PNG file."""
    return len(content).to_bytes(4, 'big') + kind + content + zlib.crc32(kind + content).to_bytes(4, 'big')


def exif(*entries):
    """EXIF data of (tag, type, count, four bytes)."""
    rows = b''.join(struct.pack('<HHI4s', *entry) for entry in entries)
    return b'II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + rows + bytes(4)


TURN = 0x0112, 3, 1, b'\x06\0\0\0'


@pytest.mark.parametrize('kind, content, orientation', [
    (b'eXIf', b'garbage', 1), (b'eXIf', b'', 1), (b'eXIf', exif((0x0112, 2, 4, b'six\0')), 1),
    (b'eXIf', exif((0x0112, 11, 1, struct.pack('<f', float('nan')))), 1),
    (b'eXIf', exif((0x0100, 2, 4, b'abc\0'), TURN), 6),  # a text where a number should be
    (b'eXIf', exif(TURN, (0x011a, 5, 1, b'\xff\xff\xff\xff')), 6),  # a value outside of the file
    (b'zTXt', b'Raw profile type exif\0\0' + zlib.compress(b'\nexif\n  9\nthis is not hex\n'), 1)])
def test_metadata_that_cannot_be_read_are_not_the_picture(kind, content, orientation, tmp_path):
    """What turns the picture is read if it can be; torchvision, too, reads the pixels."""
    file, path = png(NOISE).getvalue(), tmp_path / 'a.png'
    expected = torch.from_numpy(UPRIGHT[orientation - 1].copy()).permute(2, 0, 1)
    for at in 33, len(file) - 12:  # after the first chunk or before the last
        path.write_bytes(file[:at] + chunk(kind, content) + file[at:])
        assert torch.equal(data.read_image(path, None), expected)


@pytest.mark.parametrize('img_size, side', [(224, 256), (112, 128), (28, 32)])
def test_pictures_are_resized_to_256_for_a_crop_of_224_and_in_proportion(img_size, side):
    assert data.resized(tiny('pets', img_size=img_size)) == side
    assert data.resized(tiny('pets', img_size=img_size, augment='none')) == (img_size, img_size)


colours = st.lists(st.floats(0.1, 1), min_size=3, max_size=3)


@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 99), colours, colours)
def test_a_test_picture_is_resized_cropped_in_the_middle_and_normalised(width, height, seed, mean, std):
    """Section 4.1: torchvision's transforms are the naive way to say it."""
    settings = tiny('pets', img_size=28, mean=mean, std=std)
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = data.read_image(png(array), data.resized(settings))
    images, _ = epoch_of([(picture, 0)], settings)
    naive = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(),
                                transforms.Normalize(mean, std)])
    torch.testing.assert_close(images[0], naive(Image.fromarray(array)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('more, fits', [(0.5, True), (-0.5, False)])
def test_pictures_and_masks_that_do_not_fit_in_memory_to_the_byte_stay_in_their_files(more, fits, tmp_path):
    class Masks(data.Files):
        def __getitem__(self, index):
            image, _ = super().__getitem__(index)
            return image, image[0]
    settings, task = pets(tmp_path)
    for kind, channels in (data.Files, 3), (Masks, 4):
        pictures = kind(task.train.samples, (48, 40))
        needed = len(pictures) * channels * 48 * 40
        machine = replace(settings.machine, cache_gb=(needed + more) / 1e9)
        kept = data.in_memory(pictures, machine, CPU)
        assert isinstance(kept, list) if fits else kept is pictures
    assert data.in_memory(listed := numbered(3), machine, CPU) is listed  # it is in memory


@pytest.mark.parametrize('free, moved', [(2.0, True), (1.9, False)])
def test_pictures_take_no_more_than_half_of_what_is_free_on_a_gpu(free, moved, tmp_path, monkeypatch):
    """The test says what is free, for a machine without a GPU, and watches what is sent there."""
    settings, task = pets(tmp_path)
    needed, sent = sum(picture.nbytes for picture, _ in task.train), []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(free * needed), 10 * needed))
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, device: sent.append(device) or x)
    kept = data.in_memory(task.train, settings.machine, torch.device('cuda'))
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
    read_image, seen = data.read_image, []
    monkeypatch.setattr(data, 'read_image', lambda path, size: [seen.append(path), read_image(path, size)][1])
    settings, task = pets(tmp_path, runs=str(tmp_path / 'runs'), cache_gb=cache_gb, **SMALL)
    train.run(settings)
    test = [path for path, _ in task.test.samples]
    assert sorted(path for path in seen if path in test) == sorted(test * looks)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cache_gb', [8.0, 0.0])
def test_every_picture_is_decoded_before_training_and_a_broken_one_is_named(cache_gb, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'train', lambda *args: pytest.fail('it trains'))
    settings, task = pets(tmp_path, cache_gb=cache_gb, workers=workers, runs=str(tmp_path / 'runs'), **SMALL)
    for part, change in (task.train, lambda x: b''), (task.val, lambda x: b'<html>'), (task.test, lambda x: x[:-200]):
        path, _ = part.samples[2]
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        with pytest.raises(InputError, match=f'^{path}: not an image that can be decoded'):
            train.run(settings)
        path.write_bytes(whole)
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('workers', [0, 1, 3, 50])
def test_as_many_pictures_are_decoded_at_a_time_as_there_are_workers_and_come_in_order(workers):
    together = threading.Barrier(min(workers, 10) or 1)

    def work(i):
        together.wait(10)
        time.sleep((7 * i % 5) / 1000)
        return i
    assert [*data.decoded(work, range(30), workers)] == [*range(30)] and not [*data.decoded(work, [], workers)]


def test_pictures_that_wait_are_not_decoded_any_more_where_an_epoch_is_left_early():
    begun, gate = [], threading.Event()
    found = data.decoded(lambda i: begun.append(i) or i == 0 or gate.wait(10), range(99), 2)
    next(found)
    threading.Timer(0.3, gate.set).start()
    found.close()
    assert len(begun) <= 3  # of four: the first, and one for each thread


def test_a_set_that_does_not_fit_in_memory_is_not_decoded_ahead_without_end():
    begun = []
    for n, _ in zip(range(30), data.decoded(begun.append, range(1000), 3)):
        time.sleep(0.001)  # a training step, longer than it takes to decode
        assert n < len(begun) <= n + 6


def fails(i):
    if i == 5:
        raise InputError('image 5')
    return i


def interrupts(i):
    os.kill(os.getpid(), signal.SIGINT) if i == 9 else time.sleep(0.01)


@pytest.mark.parametrize('work, taken, error', [
    (fails, 99, InputError), (interrupts, 99, KeyboardInterrupt), (fails, 2, None)])
def test_threads_end_with_the_epoch_its_error_or_where_it_is_left_early(work, taken, error, capfd):
    """An error is raised as it is, in its turn; Ctrl-C is no traceback of a thread."""
    before, found, i = threading.active_count(), data.decoded(work, range(99), 4), -1
    with pytest.raises(error, match='^image 5$|^$') if error else nullcontext():
        for i, _ in enumerate(islice(found, taken)):
            assert before < threading.active_count() <= before + 4  # one that is idle is taken again
    found.close()
    assert threading.active_count() == before and capfd.readouterr() == ('', '')
    assert work is interrupts or i == min(taken, 5) - 1


def test_a_run_on_pictures_in_files_needs_few_open_files_and_no_processes(tmp_path, monkeypatch):
    """A container may have next to no shared memory, through which processes would hand pictures over."""
    settings, _ = pets(tmp_path, runs=str(tmp_path), cache_gb=0.0, workers=4, **SMALL)
    monkeypatch.setattr(os, 'fork', lambda: pytest.fail('a process is started'))
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), open(os.devnull)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened.fileno() + 6, limits[1]))  # one for each thread, and one
        assert train.run(settings)['images'] == 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        opened.close()


@pytest.mark.parametrize('cpus, processes, threads', [(12, 1, 8), (3, 1, 3), (1, 1, 1), (12, 2, 4), (12, 16, 1)])
def test_there_is_a_thread_for_each_cpu_of_the_process_at_most_8_divided_among_processes(
        cpus, processes, threads, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0: set(range(cpus))}[pid], raising=False)
    assert [data.workers_of(SimpleNamespace(workers=n)) for n in (0, 3, -1)] == [0, 3, threads]
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(os, 'cpu_count', lambda: cpus)
    assert data.workers_of(SimpleNamespace(workers=-1)) == threads


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5), st.integers(0, 100))
def test_every_picture_comes_exactly_once_an_epoch_and_in_order_without_one(n, batch, seed, epoch):
    settings = tiny(img_size=4, batch=batch, seed=seed)
    batches = [*data.batches(numbered(n), settings, CPU, epoch)]
    assert [len(labels) for _, labels in batches] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    images, labels = (torch.cat(x) for x in zip(*batches))
    assert sorted(labels.tolist()) == list(range(n))
    assert torch.equal(grey_levels(images, settings)[:, 0, 0, 0].round().long(), labels)  # with its own label
    assert epoch_of(numbered(n), settings)[1].tolist() == list(range(n))  # test pictures: in order


pairs = st.tuples(st.integers(0, 4293), st.integers(0, 999_999))  # seed and epoch


@given(pairs, pairs)
@example((3, 5), (3, 5))  # torch's own random numbers have no part in it
@example((0, 1), (1, 0))
@example((0, 999_999), (1, 0))
@example((0, 0), (4293, 999_999))
def test_no_two_pairs_of_seed_and_epoch_share_an_order_of_images(one, other):
    """Torch takes 32 bits of a seed: further up two of them may be one."""
    orders = [epoch_of(numbered(40, 1), tiny(img_size=1, seed=seed, batch=40), epoch)[1].tolist()
              for seed, epoch in (one, other)]
    assert (orders[0] == orders[1]) == (one == other)
    assert max(1_000_003 * seed + epoch for seed, epoch in (one, other)) < 2 ** 32


def windows(n, augment, epoch=0):
    """(top, left, flipped) of each of n windows of 6 x 6, cut from one picture of 9 x 11 whose colours are
    its coordinates. That it is a window at all is asserted here."""
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(11), indexing='ij')
    picture = torch.stack([rows, columns, 0 * rows]).to(torch.uint8)
    settings = tiny(img_size=6, augment=augment, batch=64)
    found = []
    for window in grey_levels(epoch_of([(picture, 0)] * n, settings, epoch)[0], settings).round().to(torch.uint8):
        top, left = window[0].min().item(), window[1].min().item()
        flipped = bool(window[1, 0, 0] > window[1, 0, 5])
        expected = picture[:, top:top + 6, left:left + 6]
        assert torch.equal(window, expected.flip(-1) if flipped else expected)
        found.append((top, left, flipped))
    return found


def test_training_crops_are_all_windows_of_the_picture_equally_often_and_half_are_flipped():
    """Section 4.1, "random cropping and horizontal flip"."""
    found = windows(2000, 'crop_flip')
    assert set(found) == set(itertools.product(range(4), range(6), (False, True)))
    assert max(found.count(window) for window in set(found)) < 80  # of 2000 in 48 kinds: none is preferred
    assert 0.45 < np.mean([flipped for *_, flipped in found]) < 0.55
    for axis in (0, 1):  # a flip says nothing of where the window is
        for place in {window[axis] for window in found}:
            assert 0.4 < np.mean([flipped for *at, flipped in found if at[axis] == place]) < 0.6
    assert windows(20, 'crop_flip', 0) == windows(20, 'crop_flip', 0) != windows(20, 'crop_flip', 1)


@pytest.mark.parametrize('augment, epoch', [('crop_flip', None), ('none', None), ('none', 0)])
def test_a_test_picture_and_one_without_augmentation_is_not_flipped_and_cropped_in_the_middle(augment, epoch):
    assert set(windows(50, augment, epoch)) == {(2, 2, False)}
