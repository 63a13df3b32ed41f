"""Tasks: which pictures are trained on, which are tested on, and how they become batches.

A picture is a pair: a uint8 tensor [3, H, W] and its label, the number of its class (or what else a task's loss takes).
A set of pictures is a list of those, or `Files`, which decodes them when asked for, by samples: (path, label).
"""

import importlib.util
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from vit import InputError, digest


@dataclass(frozen=True)
class Pictures:
    """The settings of a task's pictures: type, then the smallest and largest number or all words; see train.py."""

    source: Annotated[str, 'vtab', 'fgvc', 'folder', 'FILE.py:NAME'] = 'folder'  # the function that reads the task
    dir: str = ''  # vtab, fgvc: DATA/vtab-1k/DIR/ or DATA/fgvc/DIR/
    images: str = ''  # fgvc: the folder in it that the names of the lists start from
    instead: Annotated[str, '', 'FILE.py:NAME'] = ''  # vtab: the function that reads the task where DIR is missing
    classes: Annotated[int, 0, 10**6] = 0  # 0, for images in folders: as many as there are
    n_train: Annotated[int, 1, 10**8] = 800  # VTAB-1k's protocol: 800 to train on and 200 for validation; the final
    n_val: Annotated[int, 0, 10**8] = 200  # run trains on both
    n_test: Annotated[int, 1, 10**8] = 2000
    augment: str = 'crop_flip'  # for training (4.1), a word of `Task.augments`


# ---- A task ---------------------------------------------------------------------------------------------

def centre(image, label, backbone, draws, seed):
    """No augmentation: the middle of an image [3, H, W], [3, S, S]; its label as it is."""
    return center_crop(image, backbone.img_size), label


def crop_flip(image, label, backbone, draws, seed):
    """4.1's augmentation: a window of an image [3, H, W], flipped or not, uint8 [3, S, S]; its label as it is.
    draws: three random numbers from 0 to 1. seed: for more of them."""
    S, (top, left, flip) = backbone.img_size, draws.tolist()
    i, j = int(top * (image.shape[1] - S + 1)), int(left * (image.shape[2] - S + 1))
    window = image[:, i:i + S, j:j + S]
    return window.flip(-1) if flip < 0.5 else window, label


def answers(model, pictures, settings, device):
    """A row for each picture, in order: its class, the class of its largest logit, and that one's probability.
    Raises FloatingPointError for a logit that is not finite: argmax takes NaN for an answer."""
    rows = []
    for images, labels in batches(pictures, settings, device):
        logits = model(images).float()
        if not logits.isfinite().all():
            raise FloatingPointError('a logit of a picture that is scored is not finite')
        found = logits.argmax(dim=1, keepdim=True)
        p = logits.softmax(dim=1).gather(1, found)
        rows += zip(labels.tolist(), found[:, 0].tolist(), p[:, 0].tolist())
    return [dict(zip(('class', 'taken_for', 'probability'), row)) for row in rows]


def accuracy(rows):
    """The score of classes: {'accuracy': the part of the pictures that are taken for what they are}."""
    return {'accuracy': sum(row['class'] == row['taken_for'] for row in rows) / len(rows)}


@dataclass(frozen=True)
class Task:
    """What is trained, validated and tested on, and how."""

    train: Dataset | list
    val: Dataset | list
    test: Dataset | list
    classes: list[str]
    notes: list[str] = field(default_factory=list)  # lines for the header of the run
    augments: dict[str, Callable] = field(default_factory=lambda: {'crop_flip': crop_flip, 'none': centre})  # by word
    loss: Callable = F.cross_entropy  # f(logits, labels) -> a scalar
    answers: Callable = answers  # f(model, pictures, settings, device) -> a dict for each, a row of predictions.csv
    score: Callable = accuracy  # f(rows of that file) -> numbers from 0 to 1 by name; `accuracy` is the main one
    measure: str = 'accuracy'  # what the main one is called
    guess: float | None = None  # the loss of a guess, if it is not ln C
    head: Callable | None = None  # f(tuned model without a head, number of classes) -> the module that is trained
    source: str = ''  # the function that read it, if it is another than the settings name


def load(settings):
    """The task that the settings name. Raises InputError, with what to put where, if pictures are missing or wrong."""
    source, augment = settings.pictures.source, settings.pictures.augment
    known = {'vtab': vtab, 'fgvc': fgvc, 'folder': folders}
    task = known[source](settings) if source in known else from_file(source, check_task, settings)
    if augment not in task.augments:
        raise InputError(f'augment={augment}: for {settings.task} it is {" or ".join(task.augments)}')
    return task


def check_task(task, settings):
    """Raise InputError if a task of a user's own is not what the rest of this file takes."""
    if not (isinstance(task, Task) and all(isinstance(x, (list, Files)) for x in (task.train, task.val, task.test))):
        raise InputError(f'it returned a {type(task).__name__}, and not a data.Task of lists or data.Files')
    if not (isinstance(task.classes, list) and task.classes and all(isinstance(name, str) for name in task.classes)):
        raise InputError(f'its classes are {repr(task.classes)[:100]}, and not a list of names')
    S, n = settings.backbone.img_size, len(task.classes)
    for pictures in task.train, task.val, task.test:
        for image, label in getattr(pictures, 'samples', pictures):
            right = isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and len(image) == image.ndim == 3
            if isinstance(pictures, list) and not (right and min(image.shape[1:]) >= S):
                what = f'{image.dtype} {[*image.shape]}' if hasattr(image, 'dtype') else repr(image)[:80]
                raise InputError(f'an image is {what}, not a tensor, uint8 [3, H, W] from {S} pixels on')
            if task.loss is F.cross_entropy and not (type(label) is int and 0 <= label < n):
                raise InputError(f'a label is {repr(label)[:80]}, and not a class, an int from 0 to {n - 1}')


def fingerprint(task, folder):
    """What tells a task's pictures from others: count and SHA-256 of the classes, and of names within the data folder,
    sizes in bytes and labels of each set, in order."""
    found = {'class names': task.classes}
    for name in 'train', 'val', 'test':
        pictures = getattr(task, name)
        rows = [(*identity(picture, folder), identity(label, folder))
                for picture, label in getattr(pictures, 'samples', pictures)]
        found |= {f'{name} {what}': [row[i] for row in rows] for i, what in enumerate(('names', 'sizes', 'labels'))}
    return {name: f'{len(x)} {digest(repr(x).encode())[:12]}' for name, x in found.items()}


def identity(x, folder):
    """Name and size in bytes of a picture or a label; what is in memory is named by its SHA-256, a number by itself."""
    if isinstance(x, (torch.Tensor, np.ndarray)):
        return digest(np.asarray(x).tobytes()), x.nbytes
    if isinstance(x, (str, Path)):
        return os.path.relpath(x, folder), os.path.getsize(x)
    return (str(x), 0) if callable(x) else x


# ---- Doors: a task, a method or a backbone in a file that this project does not know --------------------

LOADED = {}  # the files of code that came in, as they were named, by their whole paths


def from_file(where, check, *arguments):
    """What the function that FILE.py:NAME names makes of the arguments. The file is code, and is run; what it raises is
    raised. Raises InputError if it has no such function, or check(made, *arguments) does."""
    function, made = getattr(code_in(find(where)), where.rpartition(':')[2], None), None
    if function is None:
        raise InputError(f'{where}: the file has no function by this name')
    try:
        made = function(*arguments)
        check(made, *arguments)
    except Exception as error:
        if made is None and not isinstance(error, InputError):
            raise  # of the function: with its place
        raise InputError(f'{where}: {error}') from None
    return made


def check_module(model, *arguments):
    """Raise InputError for what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f'it returned a {type(model).__name__}, and not a module')


def find(where):
    """The path of the file in FILE.py:NAME: as it is given, or else beside this file. Raises InputError."""
    path = Path(where.rpartition(':')[0])
    path = path if path.is_file() else Path(__file__).resolve().parent / path
    if not path.is_file():
        raise InputError(f'{where}: there is no such file')
    return path


def code_in(path):
    """The module that a file is: the file is run."""
    LOADED[os.path.abspath(path)] = path
    spec = importlib.util.spec_from_file_location(str(path), os.path.abspath(path))
    sys.modules[str(path)] = module = importlib.util.module_from_spec(spec)  # a dataclass looks there
    spec.loader.exec_module(module)
    return module


# ---- Pictures in files ----------------------------------------------------------------------------------

class Files(Dataset):
    """Pictures that are decoded when asked for, by samples of paths (or of what `read_image` takes in their place).
    size: as of `read_image`. Raises InputError with the file's name if one is missing or does not decode."""

    def __init__(self, samples, size):
        self.samples, self.size = samples, size
        missing = [path for path, _ in samples if not callable(path) and not os.path.isfile(path)]
        if missing:
            raise InputError(f'{missing[0]}: no such image (and {len(missing) - 1} more of {len(samples)}); '
                             'unpack the data again or correct the list that names it')

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return read_image(path, self.size), label


def read_image(path, size):
    """An image, upright and in RGB: uint8 [3, H, W]. path: of its file; or a function without arguments that returns
    Pillow's image. size: of the shorter side, (H, W) or None. Raises InputError."""
    try:
        with path() if callable(path) else Image.open(path) as image:
            image.load()  # in a PNG file EXIF data may follow the pixels; a TIFF file is turned here
            turn = turn_of(image)
            image = eight_bits(image).convert('RGB')
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f'{image.width} x {image.height} pixels are a line and no picture')
        image = image if turn is None else image.transpose(turn)
        return pil_to_tensor(resize(image, size) if size else image)
    except Exception as error:  # Pillow raises what its many decoders raise
        raise InputError(f'{path}: not an image that can be decoded ({error}); replace the file') from None


def turn_of(image):
    """What turns an image upright by its EXIF data; None if nothing does, or they cannot be read: the pixels can."""
    T = Image.Transpose
    turns = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270,
             7: T.TRANSVERSE, 8: T.ROTATE_90}
    with suppress(Exception):  # Pillow raises what its many decoders raise
        return turns.get(image.getexif().get(0x0112))  # the tag Orientation


def eight_bits(image):
    """Grey levels of 16 bits in 8; convert('RGB') would clip them. The largest level is white: 4095 in a TIFF file of
    12 bits, else 65535: 12 bits in a file that says 16 stay dark. Raises ValueError for 32 bits."""
    if image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PNG'):
        bits, *_ = getattr(image, 'tag_v2', {}).get(258, [16])  # BitsPerSample
        return Image.fromarray((np.asarray(image) / ((2 ** bits - 1) / 255)).round().astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError('grey levels of 32 bits, whose range is not known: save it with 8 or 16')
    return image


def resized(settings):
    """The size of images before a crop: VPT's 256 for 224, in proportion; the model's own where nothing is cropped."""
    S = settings.backbone.img_size
    return (S, S) if settings.pictures.augment == 'none' else round(S * 256 / 224)


def in_memory(pictures, machine, device):
    """Decode all pictures once: a broken one raises InputError before training. If they fit into `cache_gb` they are
    kept, on a GPU if they fit into half of what is free there; others stay in their files."""
    if isinstance(pictures, list):
        return pictures
    kept, size = [], 0
    for picture in decoded(pictures.__getitem__, range(len(pictures)), workers_of(machine)):
        size += sum(getattr(x, 'nbytes', 0) for x in picture)
        if size <= machine.cache_gb * 1e9:
            kept.append(picture)
    if len(kept) < len(pictures):
        return pictures
    if device.type == 'cuda' and size > torch.cuda.mem_get_info(device)[0] / 2:
        return kept
    return [(image.to(device), label) for image, label in kept]


def workers_of(machine):
    """How many threads decode: `workers`, or for -1 one for each CPU of this process, at most 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    auto = max(1, min(8, cpus) // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    return auto if machine.workers < 0 else machine.workers


def decoded(work, requests, workers):
    """Yield work(request) for each request, in order, done ahead by threads: Pillow decodes without Python's lock.
    workers=0: without threads."""
    pool, rest = ThreadPoolExecutor(workers or 1), iter(requests)
    try:
        waiting = deque(pool.submit(work, request) for request in islice(rest, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, request) for request in islice(rest, 1))
        yield from map(work, rest)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Lists: VTAB-1k, 19 tasks, and FGVC, 5 tasks --------------------------------------------------------

def vtab(settings):
    """VTAB-1k (Zhai et al., 2019) by its lists in DATA/vtab-1k/DIR/, or in DATA/DIR/ if DATA is vtab-1k/ itself. Where
    the first is missing, the function `instead` reads the task."""
    how, data = settings.pictures, Path(settings.machine.data)
    itself = any(data.glob('*/train800.txt'))
    root = data / how.dir if itself else data / 'vtab-1k' / how.dir
    if root.is_dir():
        ids, unknown = range(how.classes), f'of {how.classes}; ids count from 0'
        parts = [read_list(root / name, root, ids, unknown) for name in ('train800.txt', 'val200.txt', 'test.txt')]
        return compared(parts, [str(c) for c in ids], f'official lists in {root}', settings)
    if how.instead and not itself:  # nothing is downloaded in between the lists
        return replace(from_file(how.instead, check_task, settings), source=how.instead)
    raise InputError(f'{root}: no such folder; put images/, train800.txt, val200.txt and test.txt of {settings.task} '
                     'there (lines: FILE CLASS), or name the data folder with --data')


def fgvc(settings):
    """Fine-grained classification with VPT's lists in fgvc/DIR/. Classes are those of train.json, in order."""
    how, root = settings.pictures, Path(settings.machine.data, 'fgvc', settings.pictures.dir)
    images = root / how.images
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; put {settings.task} there, and VPT's train.json, val.json and "
                         f'test.json, with images in {images}; or name the data folder with --data')
    ids = sorted({label for _, label in read_list(root / 'train.json', images)})
    if len(ids) > how.classes:
        raise InputError(f'{root / "train.json"}: {len(ids)} classes, and not {how.classes}')
    parts = [read_list(root / f'{name}.json', images, ids, 'is not in train.json') for name in ('train', 'val', 'test')]
    return compared(parts, [str(label) for label in ids], f"VPT's lists in {root}", settings)


def read_list(path, folder, ids=range(10 ** 9), unknown=''):
    """Samples of a list: lines as `images/train800/000000.jpg 7`, or {"FILE": CLASS, ...} in JSON, files in the folder,
    classes by their places in `ids`. Raises InputError, with the place in the list, for anything else."""
    try:
        text = path.read_text(encoding='utf-8-sig').rstrip()
        if path.suffix == '.json':
            kind, pairs = 'entry', json.loads(text, object_pairs_hook=tuple)  # a dict would drop some
        else:
            kind, pairs = 'line', tuple(re.split(r'[ \t]+(?=[^ \t]*$)', line.rstrip()) for line in text.split('\n'))
        if type(pairs) is not tuple or not pairs:
            raise ValueError('expected a JSON object {"FILE": CLASS, ...} with an image at least')
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path}: not a readable list of images ({error})') from None
    samples = {}
    for number, pair in enumerate(pairs, start=1):
        where = f'{path}, {kind} {number}'
        if len(pair) != 2 or not re.fullmatch('[0-9]{1,9}', str(pair[1])):
            raise InputError(f'{where}: expected "FILE CLASS", where CLASS is a number from 0, not {str(pair)[:80]}')
        name, label = pair[0], int(pair[1])
        if label not in ids:
            raise InputError(f'{where}: class {label} {unknown}')
        if Path(name).is_absolute() or '..' in Path(name).parts:
            raise InputError(f'{where}: {name!r} lies outside of {folder}')
        if folder / name in samples:
            raise InputError(f'{where}: {name!r} stands there twice')
        samples[folder / name] = ids.index(label)
    return list(samples.items())


def compared(parts, classes, note, settings):
    """The task of three lists of samples. Where they are not what the settings say, a note does."""
    notes, how = [note], settings.pictures
    for name, samples, n in zip(('train', 'validate', 'test'), parts, (how.n_train, how.n_val, how.n_test)):
        if len(samples) != n:
            notes.append(f'{len(samples)} images to {name} on, and not {n}')
    if missing := how.classes - len({label for _, label in parts[0]}):
        notes.append(f'{missing} of {how.classes} classes have no training image')
    return Task(*(Files(samples, resized(settings)) for samples in parts), classes, notes)


def draw(samples, n_train, n_val):
    """n_train and n_val of the samples, always the same ones; of fewer samples all, in the same proportions."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [samples[i] for i in order[:n_train + n_val]]
    n_val = round(len(chosen) * n_val / (n_train + n_val))
    return chosen[n_val:], chosen[:n_val]


# ---- A folder of your own -------------------------------------------------------------------------------

SUFFIXES = IMG_EXTENSIONS + tuple({'.jfif', '.avif'} & Image.registered_extensions().keys())
# In a path, what systems leave there: .ipynb_checkpoints, ._a.jpg, __MACOSX, and what a NAS and Windows add.
LEFTOVER = re.compile(r'(^|[/\\])(\.|__|@eaDir|thumbs\.db$|desktop\.ini$)', re.IGNORECASE)


def folders(settings):
    """Images of your own: train/CLASS/*, test/CLASS/*, val/CLASS/* or valid/CLASS/*, or else a fifth of train."""
    root = Path(settings.machine.data)
    notes = [f'images in {root}']
    train, classes = read_folder(root / 'train', notes)
    test, _ = read_folder(root / 'test', notes, classes)
    if settings.pictures.classes not in (0, len(classes)):
        raise InputError(f'{root / "train"}: {len(classes)} classes, and not {settings.pictures.classes}')
    if given := [path for path in (root / 'val', root / 'valid') if path.is_dir()]:
        val = [sample for path in given for sample in read_folder(path, notes, classes)[0]]
    else:
        train, val = draw(train, len(train) - len(train) // 5, len(train) // 5)
        notes[0] += f'; there is no val/: {len(val)} of the training images, drawn by us, are for validation'
    if missing := sorted(set(range(len(classes))) - {label for _, label in test}):
        notes.append(f'{len(missing)} of {len(classes)} classes have no test image, as {classes[missing[0]]}')
    return Task(*(Files(samples, resized(settings)) for samples in (train, val, test)), classes, notes)


def read_folder(path, notes, classes=None):
    """Samples of a folder with a folder of images for each class, and the classes. Raises InputError for a class that
    `classes` has not, or, without these, that has no image. What is no image is noted."""
    try:
        names = {entry.name: normalize('NFC', entry.name)  # macOS and others write é in two ways
                 for entry in os.scandir(path) if entry.is_dir() and not LEFTOVER.match(entry.name)}
        found = make_dataset(path, names, allow_empty=True,
                             is_valid_file=lambda file: not LEFTOVER.search(os.path.relpath(file, path)))
    except (OSError, ValueError) as error:
        raise InputError(f'{path}: no folder of images by class ({error}); it should hold CLASS/*.jpg') from None
    samples = [(file, name) for file, name in found if file.lower().endswith(SUFFIXES)]
    if len({os.path.realpath(file) for file, _ in samples}) < len(samples):
        raise InputError(f'{path}: a file is there twice by way of a link; is there a link that leads back?')
    if others := [file for file, _ in found if not file.lower().endswith(SUFFIXES)]:
        notes.append(f'{len(others)} files in {path} are left out, no images by their names: {others[0]}')
    if classes is None:
        classes = sorted(set(names.values()))
        if empty := sorted(set(classes) - {name for _, name in samples}):
            raise InputError(f'{path / empty[0]}: no image; it should hold *.jpg or the like')
    if unknown := sorted(set(names.values()) - set(classes)):
        raise InputError(f'{path / unknown[0]}: no such class in {path.parent / "train"}')
    return [(file, classes.index(name)) for file, name in samples], classes


# ---- Batches --------------------------------------------------------------------------------------------

def batches(pictures, settings, device, epoch=None, augment=centre):
    """Yield (images float [B, 3, H, W], normalised, labels [B, ...]) on the device. With an epoch: shuffled, and
    augmented by random numbers of seed and epoch alone. Without: in order, the middle of each picture."""
    loop, backbone = settings.loop, settings.backbone
    generator = torch.Generator().manual_seed(1_000_003 * loop.seed + (epoch or 0))
    order = range(len(pictures)) if epoch is None else torch.randperm(len(pictures), generator=generator).tolist()
    draws = torch.rand(len(order), 3, generator=generator)
    mean, std = (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (backbone.mean, backbone.std))

    def batch(start):
        places = range(len(order))[start:start + loop.batch]
        chosen = [augment(*pictures[order[i]], backbone, draws[i], (loop.seed, epoch, i)) for i in places]
        images, labels = zip(*chosen)
        return torch.stack(images), torch.stack([torch.as_tensor(label) for label in labels])

    workers = 0 if isinstance(pictures, list) else workers_of(settings.machine)
    for images, labels in decoded(batch, range(0, len(order), loop.batch), workers):
        yield (send(images, device) - mean) / std, send(labels, device)


def send(x, device):
    """A tensor on the device: to a GPU from pinned memory, so that the CPU need not wait."""
    pinned = device.type == 'cuda' and x.device.type == 'cpu'
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
