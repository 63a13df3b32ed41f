"""Tasks: which pictures are trained on, which are tested on, and how they become batches.

A picture is a pair (uint8 tensor [3, H, W], class id), or (image, mask [H, W]) where each pixel has a class. A set of
pictures has a length and an index: a list of those in memory, or `Files`, which decodes them when asked for. A sample
is a pair (where a picture lies, class id or where its mask lies).
"""

import hashlib
import importlib.util
import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.folder import ImageFolder, is_image_file, make_dataset
from torchvision.transforms.functional import (InterpolationMode, adjust_hue, adjust_saturation, center_crop,
                                               pil_to_tensor, resize)

from vit import IGNORED, InputError


class Task(NamedTuple):
    """What is trained, validated and tested on. `notes` are lines for the header of the run."""

    train: Dataset | list
    val: Dataset | list
    test: Dataset | list
    classes: list[str]
    notes: list[str]


def load(config):
    """The task that the settings name: a name in SOURCES, or FILE.py:NAME, a function from the settings to a Task.
    Raises InputError, with what to put where, if pictures are missing or wrong."""
    augments = MASKED.get(config.source, ('crop_flip', 'none'))
    if config.augment not in augments:
        raise InputError(f'augment={config.augment}: for {config.task} it is {" or ".join(augments)}')
    return SOURCES[config.source](config) if config.source in SOURCES else from_file(config.source, check_task, config)


def from_file(where, check, *arguments):
    """What the function that FILE.py:NAME names makes of the arguments, if check(it, *arguments) raises nothing. The
    file is code, and is run. Raises InputError for all that the function or the check raises."""
    try:
        made = getattr(code_in(find(where)), where.rpartition(':')[2])(*arguments)
        check(made, *arguments)
    except Exception as error:
        kind = '' if isinstance(error, InputError) else f'{type(error).__name__}: '
        raise InputError(f'{where}: {kind}{error}') from None
    return made


def find(where):
    """The path of the file in FILE.py:NAME: as it is given, or else beside this file."""
    path = Path(where.rpartition(':')[0])
    return path if path.exists() else Path(__file__).resolve().parent / path


def code_in(path):
    """The module that a file is: the file is run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_task(task, config):
    """Raise TypeError or ValueError if a task of a user's own is not what the rest of this file takes."""
    if not (isinstance(task, Task) and all(isinstance(pictures, (list, Files)) for pictures in task[:3])):
        raise TypeError(f'returned a {type(task).__name__}, and not a data.Task of lists or data.Files')
    S, n = config.img_size, len(task.classes)
    for pictures in task[:3]:
        for image, label in getattr(pictures, 'samples', pictures):
            right = isinstance(pictures, Files) or (image.dtype, len(image)) == (torch.uint8, 3)
            if not right or isinstance(pictures, list) and min(image.shape[1:]) < S:
                raise ValueError(f'an image is {image.dtype} {[*image.shape]}, not uint8 [3, H, W] from {S} pixels on')
            if config.source not in MASKED and not (type(label) is int and 0 <= label < n):
                raise ValueError(f'a label is {label!r}, and not a class, an int from 0 to {n - 1}')


def digest(task, config):
    """What tells a task's pictures from others: count and SHA-256 of the classes, and of names (within the data folder,
    which may move), sizes in bytes and labels of each set, in order."""
    found = {'class names': task.classes}
    for part, pictures in zip(('train', 'val', 'test'), task):
        rows = [(*identity(picture, config.data), label if isinstance(label, int) else identity(label, config.data))
                for picture, label in getattr(pictures, 'samples', pictures)]
        found |= {f'{part} {what}': [row[i] for row in rows] for i, what in enumerate(('names', 'sizes', 'labels'))}
    return {name: f'{len(x)} {hashlib.sha256(repr(x).encode()).hexdigest()[:12]}' for name, x in found.items()}


def identity(picture, folder):
    """Name and size in bytes of the picture of a sample; one in memory is named by its own SHA-256."""
    if isinstance(picture, torch.Tensor):
        return hashlib.sha256(picture.numpy()).hexdigest(), picture.nbytes
    if isinstance(picture, Place):
        return str(picture), 0
    return os.path.relpath(picture, folder), os.path.getsize(picture)


# ---- Pictures in files ----------------------------------------------------------------------------------


class Place(NamedTuple):
    """A picture that is no file of its own, in a data set of torchvision."""

    pictures: Dataset
    index: int

    def __str__(self):
        return f'{type(self.pictures).__name__}, image {self.index}'


class Files(Dataset):
    """Pictures that are decoded when asked for, by samples of paths or Places; size: as of `read_image`. Raises
    InputError with the file's name if one is missing or does not decode."""

    def __init__(self, samples, size):
        self.samples, self.size = samples, size
        missing = [path for path, _ in samples if not isinstance(path, Place) and not os.path.isfile(path)]
        if missing:
            raise InputError(f'{missing[0]}: no such image (and {len(missing) - 1} more of {len(samples)}); '
                             'unpack the data again or correct the list that names it')

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = read_image(path, self.size)
        return image, read_mask(label, image) if isinstance(label, Path) else label


def read_image(path, size):
    """An image file or Place, upright and in RGB: uint8 [3, H, W]. size: of the shorter side, (H, W) or None."""
    try:
        with path.pictures[path.index][0] if isinstance(path, Place) else Image.open(path) as image:
            image = eight_bits(ImageOps.exif_transpose(image), image.format).convert('RGB')
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f'{image.width} x {image.height} pixels are a line and no picture')
        return pil_to_tensor(resize(image, size) if size else image)
    except Exception as error:  # Pillow raises what its many decoders raise
        raise InputError(f'{path}: not an image that can be decoded ({error}); replace the file') from None


def eight_bits(image, format):
    """Grey levels of 16 bits in 8; convert('RGB') would clip them to black and white. Raises ValueError for 32 bits."""
    if image.mode.startswith('I;16') or (image.mode, format) == ('I', 'PNG'):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError('grey levels of 32 bits, whose range is not known: save it with 8 or 16')
    return image


def resized(config):
    """The size of images before a crop: VPT's 256 for 224, in proportion; the model's own where nothing is cropped."""
    if config.augment == 'none':
        return (config.img_size, config.img_size)
    if config.augment == 'scale_crop':  # their own
        return None
    return round(config.img_size * 256 / 224)


def in_memory(pictures, config, device):
    """Decode all pictures once, so that a broken one ends no run after hours: it raises InputError. If they fit into
    `cache_gb` they are kept, on a GPU if they fit into half of what is free there; others stay in their files."""
    if isinstance(pictures, list):
        return pictures
    found = decoded(pictures.__getitem__, range(len(pictures)), workers_of(config))
    pixels = config.img_size ** 2 if config.augment == 'none' else 4 / 3 * (resized(config) or 2 * config.img_size) ** 2
    if len(pictures) * 3 * pixels > config.cache_gb * 1e9:
        deque(found, maxlen=0)  # decoded, and not kept
        return pictures
    kept = list(found)
    if device.type == 'cuda' and sum(x.nbytes for x, _ in kept) > torch.cuda.mem_get_info(device)[0] / 2:
        return kept
    return [(image.to(device), label) for image, label in kept]


def learned_and_scored(task, config, device):
    """The pictures to train on and those to score, decoded once: none of them is broken. Raises InputError."""
    learn, score = (task.train + task.val, task.test) if config.score_on == 'test' else (task.train, task.val)
    if not len(learn) or not len(score):
        raise InputError(f'{len(learn)} images to train on and {len(score)} of {config.score_on} to score: look at '
                         'n_train and n_val, and at the lists of the data set')
    return in_memory(learn, config, device), in_memory(score, config, torch.device('cpu'))


def workers_of(config):
    """How many threads decode: `workers`; for 'auto' one for each CPU of this process, at most 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    auto = max(1, min(8, cpus) // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    return auto if config.workers == 'auto' else int(config.workers)


def decoded(work, requests, workers):
    """Yield work(request) for each request, in order, done ahead by threads: Pillow decodes without Python's lock, and
    threads need no shared memory, of which a container has little. workers=0: without threads."""
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


def vtab(config):
    """VTAB-1k (Zhai et al., 2019) by its lists in vtab-1k/DIR/, or where that is missing by torchvision's data set."""
    root = Path(config.data) / 'vtab-1k' / config.dir
    if root.is_dir():
        ids, unknown = range(config.classes), f'of {config.classes}; ids count from 0'
        parts = [read_list(root / name, root, ids, unknown) for name in ('train800.txt', 'val200.txt', 'test.txt')]
        return compared(parts, [str(c) for c in ids], f'official lists in {root}', config)
    if config.torchvision:
        return drawn(config, root)
    raise InputError(f'{root}: no such folder, and {config.task} cannot be downloaded; put images/, train800.txt, '
                     'val200.txt and test.txt there (lines: FILE CLASS), or name the data folder with --data')


def fgvc(config):
    """Fine-grained classification with VPT's lists in fgvc/DIR/. Classes are those of train.json, in order."""
    root = Path(config.data) / 'fgvc' / config.dir
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; put {config.task} there, and VPT's train.json, val.json and "
                         f'test.json, with images in {root / config.images}; or name the data folder with --data')
    train, images = root / 'train.json', root / config.images
    ids = sorted({label for _, label in read_list(train, images)})
    if len(ids) > config.classes:
        raise InputError(f'{train}: {len(ids)} classes, and not {config.classes}')
    files = train, root / 'val.json', root / 'test.json'
    parts = [read_list(file, images, ids, 'is not in train.json') for file in files]
    return compared(parts, [str(label) for label in ids], f"VPT's lists in {root}", config)


def read_list(path, folder, ids=range(10 ** 9), unknown=''):
    """Samples of a list: lines as `images/train800/000000.jpg 7`, or {"FILE": CLASS, ...} in JSON, files in the folder,
    classes by their places in `ids`. Raises InputError, with the place in the list, for what is neither, a class that
    is `unknown`, and a file that is named twice or lies outside of the folder; a link in it may lead there."""
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


def compared(parts, classes, note, config):
    """The task of three lists of samples. Where they are not what the settings say, a note does."""
    notes = [note]
    for name, samples, n in zip(('train', 'validate', 'test'), parts, (config.n_train, config.n_val, config.n_test)):
        if len(samples) != n:
            notes.append(f'{len(samples)} images to {name} on, and not {n}')
    if config.source not in MASKED and (missing := config.classes - len({label for _, label in parts[0]})):
        notes.append(f'{missing} of {config.classes} classes have no training image')
    return Task(*(Files(samples, resized(config)) for samples in parts), classes, notes)


# torchvision's classes: folder in the data folder, where the files are from, what selects training and test split.
TRAIN, TEST = {'split': 'train'}, {'split': 'test'}
TORCHVISION = {
    'CIFAR100': ('', 'https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz', {'train': True}, {'train': False}),
    'Caltech101': ('caltech101', 'https://data.caltech.edu/records/mzrjq-6wc02', {}),
    'DTD': ('dtd', 'https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz', TRAIN, TEST),
    'Flowers102': ('flowers-102', 'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/', TRAIN, TEST),
    'OxfordIIITPet': ('oxford-iiit-pet', 'images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/'
                      'data/pets/', {'split': 'trainval'}, TEST),
    'SVHN': ('', 'http://ufldl.stanford.edu/housenumbers/', TRAIN, TEST),
    'SUN397': ('', 'http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz', {}),
    'PCAM': ('pcam', 'https://github.com/basveeling/pcam', TRAIN, TEST),
    'EuroSAT': ('eurosat', 'https://huggingface.co/datasets/torchgeo/eurosat', {}),
    'CLEVRClassification': ('clevr', 'https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip', TRAIN,
                            {'split': 'val'})}  # VTAB-1k's test: the classes of CLEVR's own are not public


def drawn(config, root):
    """VTAB-1k's protocol on torchvision's data set, downloaded when missing: n_train and n_val images of its
    training split, its whole test split. Where it has no splits, n_test images are held out first."""
    name, (folder, url, *splits) = config.torchvision, TORCHVISION[config.torchvision]
    try:
        found = [torchvision_split(config, arguments) for arguments in splits]
    except Exception as error:  # no network, a moved file, a full disk, a cut annotation file
        raise InputError(
            f'{name} is not, or not whole, in {Path(config.data) / folder}, and could not be downloaded or read '
            f"({type(error).__name__}: {error}). Unpack {url} there, or VTAB-1k's lists and images into {root}, or "
            'name the data folder with --data, or install the package that is missing; python train.py alone needs no '
            'download') from None
    (samples, classes), (test, _) = found[0], found[-1]
    if len(splits) == 1:
        samples = sorted(samples)  # a folder has no order of its own
        samples, test = draw(samples, len(samples) - config.n_test, config.n_test)
    train, val = draw(samples, config.n_train, config.n_val)
    note = (f"torchvision's {name}: {len(train + val)} of {len(samples)} training images, drawn by us: "
            'not the official VTAB-1k split')
    return compared((train, val, test), classes, note, config)


def torchvision_split(config, arguments):
    """Samples of one split of torchvision's data set, and its classes: names, or numbers where it does not know all."""
    name = config.torchvision
    pictures = getattr(torchvision.datasets, name)(config.data, download=True, **arguments)
    if name == 'Caltech101':  # torchvision leaves out the background, which VTAB-1k counts as a class
        pictures = ImageFolder(Path(pictures.root) / '101_ObjectCategories')
    found = vars(pictures)
    paths = found.get('_images', found.get('_image_files', [Place(pictures, i) for i in range(len(pictures))]))
    labels = found.get('_labels', found.get('labels', found.get('targets')))
    if isinstance(pictures, ImageFolder):  # EuroSAT too
        paths = [path for path, _ in pictures.samples]
    if name == 'PCAM':
        with pictures.h5py.File(pictures._base_folder / pictures._FILES[pictures._split]['targets'][0]) as file:
            labels = file['y'][:].ravel()
    first = 3 if name == 'CLEVRClassification' else 0  # CLEVR counts 3 to 10 objects
    samples = [(path, int(label) - first) for path, label in zip(paths, labels)]
    wrong = [f'{path} of class {label}' for path, label in samples if not 0 <= label < config.classes]
    if wrong or not samples:
        what = f'{wrong[0] if wrong else "no image"} in {name} {list(arguments.values())}'
        raise ValueError(f'{what}, whose classes go from 0 to {config.classes - 1}')
    names = found.get('classes', [])
    return samples, names if len(names) == config.classes else [str(i) for i in range(config.classes)]


def draw(samples, n_train, n_val):
    """n_train and n_val of the samples, always the same ones; of fewer samples all, in the same proportions."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [samples[i] for i in order[:n_train + n_val]]
    n_val = round(len(chosen) * n_val / (n_train + n_val))
    return chosen[n_val:], chosen[:n_val]


# ---- A folder of your own -------------------------------------------------------------------------------

HIDDEN = re.compile(r'(^|[/\\])(\.|__)')  # in a path, what starts with . or __: .ipynb_checkpoints, __MACOSX, ._a.jpg


def folders(config):
    """Images of your own: train/CLASS/*, test/CLASS/* and val/CLASS/* in the data folder. Without val/, a fifth of
    train takes its place, always the same one."""
    root, notes = Path(config.data), [f'images in {config.data}']
    train, classes = read_folder(root / 'train', notes)
    test, _ = read_folder(root / 'test', notes, classes)
    if config.classes not in (0, len(classes)):
        raise InputError(f'{root / "train"}: {len(classes)} classes, and not {config.classes}')
    if (root / 'val').is_dir():
        val, _ = read_folder(root / 'val', notes, classes)
    else:
        train, val = draw(train, len(train) - len(train) // 5, len(train) // 5)
        notes[0] += f'; there is no val/: {len(val)} of the training images, drawn by us, are for validation'
    if missing := sorted(set(range(len(classes))) - {label for _, label in test}):
        notes.append(f'{len(missing)} of {len(classes)} classes have no test image, as {classes[missing[0]]}')
    return Task(*(Files(samples, resized(config)) for samples in (train, val, test)), classes, notes)


def read_folder(path, notes, classes=None):
    """Samples of a folder with a folder of images for each class, and the classes. With `classes`, ids are
    places in these, and another one raises InputError. Files that are no images for torchvision are noted."""
    try:
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not HIDDEN.match(entry.name))
        found = make_dataset(path, {name: i for i, name in enumerate(names)},
                             is_valid_file=lambda file: not HIDDEN.search(os.path.relpath(file, path)))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f'{path}: no folder of images by class ({error}); it should hold CLASS/*.jpg') from None
    samples = [(file, label) for file, label in found if is_image_file(file)]
    if empty := sorted(set(range(len(names))) - {label for _, label in samples}):
        raise InputError(f'{path / names[empty[0]]}: no image for torchvision; it should hold *.jpg or the like')
    if len({os.path.realpath(file) for file, _ in samples}) < len(samples):
        raise InputError(f'{path}: a file is there twice by way of a link; is there a link that leads back?')
    if others := [file for file, _ in found if not is_image_file(file)]:
        notes.append(f'{len(others)} files in {path} are left out, no images for torchvision: {others[0]}')
    classes = names if classes is None else classes
    if unknown := sorted(set(names) - set(classes)):
        raise InputError(f'{path / unknown[0]}: no such class in {path.parent / "train"}')
    return [(file, classes.index(names[label])) for file, label in samples], classes


# ---- Masks (4.4) ----------------------------------------------------------------------------------------

MASKED = {'ade20k': ('scale_crop',), 'tests/shapes.py:shapes_masks': ('none', 'scale_crop')}  # and how to augment
ADE20K_CLASSES = 150


def ade20k(config):
    """ADE20K as it is unpacked: ADEChallengeData2016/{images,annotations}/{training,validation}/ in the data folder.
    Its validation images are the test, as in the paper; n_val of its training images are for validation."""
    if config.classes != ADE20K_CLASSES:
        raise InputError(f'classes={config.classes}: ADE20K has {ADE20K_CLASSES}')
    root = Path(config.data) / 'ADEChallengeData2016'
    train, val = draw(partners(root, 'training'), config.n_train, config.n_val)
    parts = train, val, partners(root, 'validation')
    return compared(parts, names_in(root / 'objectInfo150.txt'), f'ADE20K in {root}', config)


def names_in(path):
    """The names of ADE20K's classes: the first one in the last column of its table; numbers where that is missing."""
    if not path.exists():
        return [str(i + 1) for i in range(ADE20K_CLASSES)]
    rows = path.read_text(encoding='utf-8', errors='replace').splitlines()
    names = [row.split('\t')[-1].split(',')[0].strip() for row in rows[1:]]
    if len(names) != ADE20K_CLASSES:
        raise InputError(f'{path}: {len(names)} names, and not {ADE20K_CLASSES}; unpack the data again')
    return names


def partners(root, part):
    """Samples of a part of ADE20K, in the order of their names. Raises InputError for an image or a mask alone."""
    images, masks = ({path.stem: path for path in (root / kind / part).glob('[!._]*')}
                     for kind in ('images', 'annotations'))
    if not images:
        raise InputError(f'{root / "images" / part}: no images there; unpack ADEChallengeData2016.zip in the data '
                         'folder, or name that with --data')
    for name in sorted(images.keys() ^ masks.keys()):
        what = 'mask' if name in images else 'image'
        raise InputError(f'{(images | masks)[name]}: there is no {what} for it; unpack the data again')
    return [(images[name], masks[name]) for name in sorted(images)]


def read_mask(path, image):
    """The mask of an image in a PNG file, where 0 is no label and 1 the first class: uint8 [H, W], ids or IGNORED."""
    try:
        with Image.open(path) as file:
            if file.mode != 'L':
                raise ValueError(f'its mode is {file.mode}, not L: a byte with a label for each pixel')
            mask = pil_to_tensor(file)[0]
        if mask.shape != image.shape[1:]:
            raise ValueError(f'it has {[*mask.shape]} pixels, height and width, and its image {[*image.shape[1:]]}')
        if mask.max() > ADE20K_CLASSES:
            raise ValueError(f'it has the label {mask.max()}, and they go from 0 to {ADE20K_CLASSES}')
    except Exception as error:  # as in `read_image`
        raise InputError(f'{path}: not the mask of an image ({error}); replace the file') from None
    return mask - 1  # of bytes: 0 - 1 is 255, IGNORED


def scale_crop(image, mask, config, rng):
    """SETR's augmentation of an image [3, H, W] and its mask [H, W]: of what is resized to 0.5 to 2 S on the shorter
    side and half of the time flipped, a window in other colours: float [3, S, S], 0 to 255, and uint8 [S, S]."""
    S, (mean, _) = config.img_size, moments(config, image.device)
    short = round(S * rng.uniform(0.5, 2))
    image = resize(image, [short], max_size=4 * short)
    mask = resize(mask.unsqueeze(0), image.shape[1:], InterpolationMode.NEAREST)[0]
    if rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    for _ in range(11):  # drawn anew, up to 10 times, while one class has three quarters of what is labelled
        top, left = (rng.integers(max(0, side - S) + 1) for side in mask.shape)
        window = mask[top:top + S, left:left + S]
        pixels = window.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
        if pixels.max() < 0.75 * pixels.sum():
            break
    around = (0, S - window.shape[1], 0, S - window.shape[0])  # on the right and below
    image = distort(image[:, top:top + S, left:left + S], rng) - mean
    return F.pad(image, around) + mean, F.pad(window, around, value=IGNORED)


def distort(image, rng):
    """SETR's change of an image's colours, [3, H, W], 0 to 255: each of four, in half of all cases."""
    changes = [(torch.add, -32 / 255, 32 / 255), (torch.mul, 0.5, 1.5), (adjust_saturation, 0.5, 1.5),
               (adjust_hue, -0.1, 0.1)]
    if rng.random() < 0.5:  # contrast comes last
        changes.append(changes.pop(1))
    x = image / 255
    for change, low, high in changes:
        if rng.random() < 0.5:
            x = change(x, rng.uniform(low, high)).clip(0, 1)
    return 255 * x


SOURCES = {'vtab': vtab, 'fgvc': fgvc, 'folder': folders, 'ade20k': ade20k}

# ---- Batches --------------------------------------------------------------------------------------------


def batches(pictures, config, device, epoch=None, part=slice(None)):
    """Yield (images float [B, 3, H, W], normalised, labels [B]) on the device. With an epoch: shuffled and augmented by
    random numbers of seed and epoch alone (two seeds below 4,294 never share any: torch takes 32 bits). Without: in
    order, the middle of each picture. part: which of each batch, where processes share them; one that has none of a
    batch gets its first picture."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + (epoch or 0))
    order = range(len(pictures)) if epoch is None else torch.randperm(len(pictures), generator=generator).tolist()
    draws = torch.rand(len(order), 3, generator=generator)
    mean, std = moments(config, device)

    def crops(start):
        places = range(len(order))[start:start + config.batch]
        places = [*(places[part] or places[:1])]
        chosen = [pictures[order[place]] for place in places]
        if config.augment == 'scale_crop':
            chosen = [scale_crop(*picture, config, np.random.default_rng((config.seed, epoch, place)))
                      for picture, place in zip(chosen, places)]
        images, labels = zip(*chosen)
        labels = torch.stack([torch.as_tensor(label) for label in labels])
        if epoch is None or config.augment != 'crop_flip':
            return torch.stack([center_crop(image, config.img_size) for image in images]), labels
        return augment(images, config.img_size, draws[places]), labels

    workers = 0 if isinstance(pictures, list) else workers_of(config)
    for images, labels in decoded(crops, range(0, len(order), config.batch), workers):
        yield (send(images, device) - mean) / std, send(labels, device)


def moments(config, device):
    """Mean and standard deviation, [3, 1, 1], that pixels from 0 to 255 are normalised by."""
    return (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (config.mean, config.std))


def augment(images, size, draws):
    """A window of each image [3, H, W], half of them flipped, by draws from 0 to 1 [B, 3]: uint8 [B, 3, size, size]."""
    windows = []
    for image, (top, left, flip) in zip(images, draws.tolist()):
        i, j = int(top * (image.shape[1] - size + 1)), int(left * (image.shape[2] - size + 1))
        window = image[:, i:i + size, j:j + size]
        windows.append(window.flip(-1) if flip < 0.5 else window)
    return torch.stack(windows)


def send(x, device):
    """A tensor on the device: to a GPU from pinned memory, so that the CPU need not wait."""
    pinned = device.type == 'cuda' and x.device.type == 'cpu'
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
