"""Tasks: which pictures are trained on, which are tested on, and how they become batches.

A picture is a pair (uint8 tensor [3, H, W], class id). A set of pictures is anything with a length and
an index: a list where they are in memory, `Files` where they are decoded when asked for. The protocol is
VTAB-1k's (Zhai et al., 2019): 1,000 training pictures, of which 200 serve for validation, all test ones.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from vit import InputError

# torch's advice to use fewer workers on a small machine: how many is a setting, and the advice costs 6 lines
warnings.filterwarnings('ignore', message='This DataLoader will create')


@dataclass
class Task:
    """What is trained, validated and tested on. `notes` are lines for the header of the run."""

    train: Dataset | list
    val: Dataset | list
    test: Dataset | list
    classes: list[str]
    notes: list[str] = field(default_factory=list)


def load(config):
    """The task that the settings name. Raises InputError if its pictures are not there or not as they
    should be, with what to put where."""
    return SOURCES[config.source](config)


# ---- Pictures in files ----------------------------------------------------------------------------------


class Files(Dataset):
    """Pictures that are decoded when asked for.

    samples: pairs (path, class id). size: pixels of the shorter side after resizing, or (height, width).
    Raises InputError with the file's name if one is missing or does not decode."""

    def __init__(self, samples, size):
        self.samples, self.size = samples, size
        missing = [path for path, _ in samples if not Path(path).is_file()]
        if missing:
            raise InputError(f'{missing[0]}: no such image (and {len(missing) - 1} more of {len(samples)}); '
                             'unpack the data again or correct the list that names it')

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return read_image(path, self.size), label


def read_image(path, size):
    """The image file at path, upright and in RGB, resized: uint8 [3, H, W]."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert('RGB')
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f'{image.width} x {image.height} pixels are a line and no picture')
    except Exception as error:  # Pillow raises what its many decoders raise
        raise InputError(f'{path}: not an image that can be decoded ({error}); replace the file') from None
    return pil_to_tensor(resize(image, size))


def resized(config):
    """To what training and test images are resized, in pixels: VPT's 256 for a crop of 224, in
    proportion; exactly the model's size where nothing is cropped."""
    if config.augment == 'none':
        return (config.img_size, config.img_size)
    return round(config.img_size * 256 / 224)


def in_memory(pictures, config):
    """Decode all pictures once, if they fit into `cache_gb` as uint8; else leave them in their files."""
    pixels = config.img_size ** 2 if config.augment == 'none' else 4 / 3 * resized(config) ** 2  # most are 4:3
    if isinstance(pictures, list) or len(pictures) * 3 * pixels > config.cache_gb * 1e9:
        return pictures
    loader = DataLoader(pictures, batch_size=None, num_workers=config.workers)
    return [(image.clone(), label) for image, label in loader]  # clone: out of the workers' shared memory


def pets(config):
    """Oxford-IIIT Pet, 37 breeds (Parkhi et al., 2012): VTAB-1k's own lists where they lie in the data
    folder, else 1,000 of torchvision's trainval images, downloaded when missing."""
    root = Path(config.data) / 'vtab-1k' / 'oxford_iiit_pet'
    if root.is_dir():
        return vtab_lists(root, config)
    splits = [oxford_pets(config, name) for name in ('trainval', 'test')]
    trainval, test = (list(zip(split._images, split._labels)) for split in splits)
    classes = [str(label) for label in range(config.classes)]
    for split in splits:
        for label, name in zip(sorted(set(split._labels)), split.classes):
            if not 0 <= label < config.classes:
                raise InputError(f'{split._anns_folder}: breed {label + 1} of {config.classes}; unpack the '
                                 'annotations again')
            classes[label] = name
    train, val, note = draw(trainval, config)
    return Task(*(Files(samples, resized(config)) for samples in (train, val, test)), classes, [note])


def oxford_pets(config, split):
    """One split of torchvision's OxfordIIITPet."""
    try:
        pictures = torchvision.datasets.OxfordIIITPet(config.data, split, download=True)
    except Exception as error:  # no network, a moved file, a full disk, a cut annotation file
        urls = ' and '.join(url for url, _ in torchvision.datasets.OxfordIIITPet._RESOURCES)
        raise InputError(
            f'Oxford-IIIT Pet is not, or not whole, in {Path(config.data) / "oxford-iiit-pet"} (images/, annotations/), '
            f'and the download failed ({error}). Unpack {urls} there, or name their folder with --data; '
            'python train.py alone needs no download') from None
    if not len(pictures):
        raise InputError(f'{pictures._anns_folder / split}.txt names no image; unpack the annotations again')
    return pictures


def draw(samples, config):
    """The VTAB-1k protocol where its lists are missing: draw n_train and n_val of the samples, always the
    same ones. With fewer samples than that, all of them, in the same proportions."""
    wanted = config.n_train + config.n_val
    n = min(wanted, len(samples))
    n_val = round(n * config.n_val / wanted)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [samples[i] for i in order[:n]]
    note = f'{n} of {len(samples)} training images, drawn by us: not the official VTAB-1k split'
    if n < wanted:
        note += f', and fewer than the {wanted} of the protocol'
    return chosen[n_val:], chosen[:n_val], note


def vtab_lists(root, config):
    """VTAB-1k in the layout that circulates: images/, train800.txt, val200.txt, test.txt."""
    train, val, test = (Files(read_list(root / name, config.classes), resized(config))
                        for name in ('train800.txt', 'val200.txt', 'test.txt'))
    return Task(train, val, test, [str(c) for c in range(config.classes)], [f'official lists in {root}'])


def read_list(path, classes):
    """Samples of a list file with lines as `images/train800/000000.jpg 7`, relative to its folder.

    Raises InputError with the file and the line if a line has no class id below `classes`, or names a
    file outside of the folder."""
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{path}: not a readable list of images ({error})') from None
    samples = []
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().rpartition(' ')
        if not name or not label.isascii() or not label.isdigit():
            raise InputError(f'{path}, line {number}: expected "FILE CLASS", not {line[:80]!r}')
        if int(label) >= classes:
            raise InputError(f'{path}, line {number}: class {label} of {classes}; ids count from 0')
        if not (path.parent / name).resolve().is_relative_to(path.parent.resolve()):
            raise InputError(f'{path}, line {number}: {name} lies outside of {path.parent}')
        samples.append((path.parent / name, int(label)))
    if not samples:
        raise InputError(f'{path}: the list is empty')
    return samples


# ---- Pictures of shapes: a world that needs no download -------------------------------------------------
#
# Shapes of different colours lie in different cells of a 3 x 3 grid. The question is always where one
# colour is. For pre-training the picture itself asks, by a frame in the colour that is meant; the
# downstream pictures have no frame, and the question has to be learned.

COLOURS = {'red': (220, 50, 50), 'green': (50, 180, 70), 'blue': (60, 90, 230), 'yellow': (230, 200, 50),
           'purple': (160, 70, 200), 'cyan': (60, 200, 210)}  # pre-training knows the first four
CELLS = [f'{row} {column}' for row in ('top', 'middle', 'bottom') for column in ('left', 'centre', 'right')]


def shapes(config):
    """Where is the shape of the colour `ask`, or of the frame's colour? Nine classes, the cells."""
    known = ['frame', *COLOURS][:1 + config.n_shapes]
    if config.ask not in known:
        raise InputError(f'ask={config.ask}: with n_shapes={config.n_shapes} one of {", ".join(known)}')
    sets = []
    for seed, n in enumerate((config.n_train, config.n_val, config.n_test)):
        images, labels = draw_shapes(n, config.ask, config.n_shapes, config.noise, config.img_size,
                                     (seed, config.ask == 'frame'))
        sets.append(list(zip(torch.from_numpy(images), labels.tolist())))
    return Task(*sets, CELLS, [f'pictures of shapes, generated; the question: where is {config.ask}?'])


def draw_shapes(n, ask, n_shapes=4, noise=8, size=48, seed=0):
    """n pictures, uint8 [n, 3, size, size], and the cell of the shape that is asked for, int [n].

    Each picture has n_shapes shapes, in the first n_shapes colours.
    noise: standard deviation, in grey levels of 256."""
    rng = np.random.default_rng(seed)
    cell = rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)[:, :n_shapes]  # [n, n_shapes], all different
    kind = rng.integers(3, size=cell.shape)  # disc, square or diamond
    radius = rng.uniform(4, 6.5, cell.shape) * size / 48
    inner, border = size * 14 / 48, size * 3 // 48  # side of a cell, width of the frame
    centre = border + inner * (np.stack([cell // 3, cell % 3]) + 0.5 + rng.uniform(-0.07, 0.07, (2, *cell.shape)))
    background = rng.uniform(60, 200, n)
    asked = rng.integers(n_shapes, size=n) if ask == 'frame' else np.full(n, list(COLOURS).index(ask))

    images = np.empty((n, 3, size, size), dtype=np.uint8)
    frame = np.ones((size, size), dtype=bool)
    frame[border:-border, border:-border] = False
    rgb = np.array(list(COLOURS.values())[:n_shapes], dtype=np.float32)
    for part in np.array_split(np.arange(n), max(1, n * size ** 2 // 2 ** 20)):
        canvas = np.broadcast_to(background[part, None, None, None], (len(part), 3, size, size)).astype(np.float32)
        for i, colour in enumerate(rgb):
            canvas += cover(kind[part, i], radius[part, i], *centre[:, part, i], size) * (colour[:, None, None] - canvas)
        if ask == 'frame':
            canvas[:, :, frame] = rgb[asked[part], :, None]
        canvas += noise * rng.standard_normal(canvas.shape, dtype=np.float32)
        images[part] = canvas.clip(0, 255)
    return images, cell[np.arange(n), asked]


def cover(kind, radius, row, column, size):
    """How far one shape covers each pixel of each picture, 0 to 1: arguments [n] -> [n, 1, size, size]."""
    pixel = np.arange(size, dtype=np.float32) + 0.5
    dy = np.abs(pixel[:, None] - row[:, None, None].astype(np.float32))  # [n, size, 1]
    dx = np.abs(pixel - column[:, None, None].astype(np.float32))  # [n, 1, size]
    square, diamond = (kind == 1)[:, None, None], (kind == 2)[:, None, None]
    distance = np.where(square, np.maximum(dx, dy) * 1.15, np.where(diamond, (dx + dy) * 0.8, np.hypot(dx, dy)))
    return (radius[:, None, None].astype(np.float32) - distance + 0.5).clip(0, 1)[:, None]


SOURCES = {'pets': pets, 'shapes': shapes}

# ---- Batches --------------------------------------------------------------------------------------------


def batches(pictures, config, device, epoch=None):
    """Yield (images float [B, 3, H, W], normalised, labels [B]) on the device.

    With an epoch: shuffled and augmented for training, by random numbers that depend on the seed and the
    epoch alone. Without: in order, the middle of each picture, as for a test."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + (epoch or 0))
    order = range(len(pictures)) if epoch is None else torch.randperm(len(pictures), generator=generator).tolist()
    loader = DataLoader(pictures, config.batch, sampler=order, collate_fn=list, generator=generator,
                        num_workers=0 if isinstance(pictures, list) else config.workers)
    mean, std = (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (config.mean, config.std))
    for items in loader:
        if epoch is None or config.augment == 'none':
            images = torch.stack([center_crop(image, config.img_size) for image, _ in items]).to(device)
        else:
            images = augment([image for image, _ in items], config, generator).to(device)
        yield (images - mean) / std, torch.tensor([label for _, label in items], device=device)


def augment(images, config, generator):
    """A random window of each image, half of them flipped: [3, H, W] each -> uint8 [B, 3, size, size]."""
    size, windows = config.img_size, []
    draws = torch.rand(len(images), 3, generator=generator)
    for image, (top, left, _) in zip(images, draws.tolist()):
        i, j = int(top * (image.shape[1] - size + 1)), int(left * (image.shape[2] - size + 1))
        windows.append(image[:, i:i + size, j:j + size])
    windows = torch.stack(windows)
    flipped = draws[:, 2].lt(0.5).to(windows.device)
    return torch.where(flipped[:, None, None, None], windows.flip(-1), windows)
