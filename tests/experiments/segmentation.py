"""4.4, semantic segmentation: heads on a tuned ViT that give each pixel a class, masks, windows and mIoU.

`source: tests/experiments/segmentation.py:ade20k` in configs.yaml is ADE20K, `...:shapes` pictures of shapes, which
need no download. `task` makes a task of pictures and masks of your own, in a file of yours, here `my_masks.py`, where
the masks beside the pictures have 0 for no label, 1 for road and 2 for sky:

    from pathlib import Path

    import data

    segmentation = data.code_in(data.find('tests/experiments/segmentation.py:task'))


    def roads(settings):
        classes, sets = ['road', 'sky'], []
        for name in 'train', 'val', 'test':
            images = sorted(Path(settings.machine.data, 'roads', name).glob('*.jpg'))
            samples = [(path, path.with_suffix('.png')) for path in images]
            sets.append(segmentation.MaskFiles(samples, len(classes)))
        return segmentation.task(*sets, classes)

    python train.py --task my_masks.py:roads --method vpt,cdc --set augment=scale_crop
"""

import math
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import (InterpolationMode, adjust_hue, adjust_saturation, center_crop,
                                               pil_to_tensor, resize)

import data
from vit import InputError, ViT

IGNORED = 255  # in a mask: a pixel without a label
AUXILIARY = 0.4  # weight of the loss of each auxiliary head
ADE20K_CLASSES = 150

# ---- SETR's heads on a tuned ViT ------------------------------------------------------------------------

class Decoder(nn.Module):
    """A head of SETR-PUP (Zheng et al., 2021): image tokens Z [B, M, D] -> logits [B, C, H', W'] on a coarse grid.

    n convolutions of 3 x 3 to D / 4 channels, with the grid doubled between them, and one of 1 x 1 to the classes."""

    def __init__(self, D, C, n):
        super().__init__()
        width = max(1, D // 4)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.layers = nn.Sequential()
        for i in range(n):
            if i:
                self.layers.append(nn.Upsample(scale_factor=2, mode='bilinear'))
            self.layers.extend([nn.Conv2d(width if i else D, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()])
        self.layers.append(nn.Conv2d(width, C, 1))

    def forward(self, Z):
        side = round(Z.shape[1] ** 0.5)
        return self.layers(self.norm(Z).mT.unflatten(2, (side, side)))


class SETR(nn.Module):
    """Classifies pixels: images [B, 3, H, W] -> logits [B, C, H, W], and in training a list of those of all five heads.

    tuned: a ViT; an IVPT without AR; or a method of a file that calls the layers in `vit.blocks` and passes on
    [z_cls, Z], [B, 1 + M, D], after each, as LoRA in table_1.py. Its own head, `head`, and the last norm are taken off.
    The main head reads the last layer, auxiliary heads what leaves layers 10, 15, 20 and 24 of 24, or these parts of L.

    Where the paper is silent, this is what was chosen:
    - The numbers of convolutions, three and one: of this family, only they give Table 7's 13.18M. SETR has others.

    Raises InputError for what is no plain ViT, for AR, which the paper discards here, for a method with `prepare`,
    which needs classes of pictures, and for layers that pass on other tokens, as those of inherited prompts do."""

    def __init__(self, tuned, num_classes):
        super().__init__()
        self.tuned, self.num_classes = tuned, num_classes
        if not isinstance(self.vit, ViT):
            raise InputError(f'segmentation is made for a plain ViT, not for a {type(self.vit).__name__}')
        if getattr(tuned, 'P_re', None) is not None:
            raise InputError('segmentation has no AR (4.4): take vpt, vanilla_cdc, cdc or cdc_da')
        if hasattr(tuned, 'prepare'):
            raise InputError(f'{type(tuned).__name__} looks at classes of pictures before training; here are masks')
        tuned.head = self.vit.head = self.vit.norm = nn.Identity()
        self.vit.readout = 'mean'  # the last layer, too, updates all tokens
        self.head = Decoder(self.vit.D, num_classes, n=3)
        self.levels = [math.ceil(self.vit.L * part / 24) - 1 for part in (10, 15, 20, 24)]  # layers, from 0
        self.auxiliary = nn.ModuleList(Decoder(self.vit.D, num_classes, n=1) for _ in self.levels)
        self.try_once()

    @property
    def vit(self):
        """The backbone, which is `tuned` itself or a part of it."""
        return getattr(self.tuned, 'vit', self.tuned)

    @torch.no_grad()
    def try_once(self):
        """Raise InputError if other tokens leave the layers, or a layer is not called, for a grey image."""
        grey = self.vit.pos_embed.new_zeros(1, 3, self.vit.img_size, self.vit.img_size)
        Z = self.eval().tokens(grey)
        self.train()
        if len(Z) < len(self.levels) or any(x.shape[1] != self.vit.M for x in Z):
            raise InputError(f'segmentation reads [z_cls, Z] after layers; {type(self.tuned).__name__} has inherited '
                             'prompts or other tokens: take vpt, vanilla_cdc, cdc or cdc_da')

    def forward(self, images):
        Z = self.tokens(images)
        coarse = [self.head(Z[-1])]
        if self.training:
            coarse += [head(x) for head, x in zip(self.auxiliary, Z)]
        logits = [F.interpolate(x, images.shape[2:], mode='bilinear') for x in coarse]
        return logits if self.training else logits[0]

    def tokens(self, images):
        """The image tokens [B, M, D] that leave the layers `levels`, while the tuned model sees the images."""
        Z, layers = {}, [self.vit.blocks[l] for l in self.levels]

        def keep(layer, inputs, outputs):
            Z[layer] = outputs[0][:, 1:]

        hooks = [layer.register_forward_hook(keep) for layer in {*layers}]
        try:
            self.tuned(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [Z[layer] for layer in layers if layer in Z]

    def answer(self, image, settings, device):
        """The class of each pixel of an image, uint8 [3, H, W] -> [H, W]; by this look.py knows a run with masks."""
        return answer(self, image, settings, device)


def loss(logits, masks):
    """Cross-entropy of each head's logits [B, C, H, W] and masks [B, H, W], weighted and summed: a scalar.

    The paper is silent. The mean over all pixels, with 0 for those without a label, is mmsegmentation's."""
    losses = [F.cross_entropy(x, masks.long(), ignore_index=IGNORED, reduction='none').mean() for x in logits]
    return losses[0] + AUXILIARY * sum(losses[1:])


# ---- The class of each pixel, and the score ------------------------------------------------------------

@torch.no_grad()
def segment(model, image, size, scales=(1.0,)):
    """The class of each pixel of a normalised image [3, H, W] -> [H, W]. Its shorter side becomes each of the scales
    times the model's size; of several, and of the mirror image at each, the mean of probabilities counts.
    Raises FloatingPointError for a logit that is not finite."""
    p, flips = 0, [False, True] if len(scales) > 1 else [False]
    for scale, flip in product(scales, flips):
        short = round(scale * size)
        x = resize(image, [short], max_size=4 * short).unsqueeze(0)
        logits = slide(model, x.flip(-1) if flip else x, size)
        logits = F.interpolate(logits.flip(-1) if flip else logits, image.shape[1:], mode='bilinear')
        p = p + logits.softmax(dim=1)
    if not p.isfinite().all():
        raise FloatingPointError('a logit of a picture that is scored is not finite')
    return p[0].argmax(dim=0)


def slide(model, images, size):
    """Logits [B, C, H, W] of images [B, 3, H, W], by windows that overlap by a third; their mean where several lie."""
    (H, W), total, n = images.shape[2:], 0, 0
    images = F.pad(images, (0, max(0, size - W), 0, max(0, size - H)))  # as in training
    high, wide = images.shape[2:]
    for y, x in product(starts(high, size), starts(wide, size)):
        around = (x, wide - size - x, y, high - size - y)
        total = total + F.pad(model(images[..., y:y + size, x:x + size]).float(), around)
        n = n + F.pad(images.new_ones(size, size), around)
    return (total / n)[..., :H, :W]


def starts(n, size):
    """Where windows start on a side of n >= size pixels; the last one ends where the side does."""
    stride = size * 2 // 3
    return [min(start, n - size) for start in range(0, n - size + stride, stride)]


def answer(model, image, settings, device, scales=(1.0,)):
    """The class of each pixel of an image, uint8 [3, H, W] -> [H, W]."""
    mean, std = moments(settings.backbone, device)
    return segment(model, (image.to(device) - mean) / std, settings.backbone.img_size, scales).cpu()


def moments(backbone, device):
    """Mean and standard deviation, [3, 1, 1], that pixels from 0 to 255 are normalised by."""
    return (255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (backbone.mean, backbone.std))


def answers(model, pictures, settings, device, scales=()):
    """A row for each picture: how many pixels of each class are `right`, `missed` (taken for another class) and `wrong`
    (of another class, taken for this one), as `CLASS:PIXELS CLASS:PIXELS ...`; and, in a test at several `scales`, the
    same at these: `right_ms` and so on."""
    several = scales and settings.loop.score_on == 'test'
    rows = []
    for image, mask in data.decoded(pictures.__getitem__, range(len(pictures)), data.workers_of(settings.machine)):
        row = counts(answer(model, image, settings, device), mask, model.num_classes)
        if several:
            found = counts(answer(model, image, settings, device, scales), mask, model.num_classes)
            row |= {f'{name}_ms': x for name, x in found.items()}
        rows.append(row)
    return rows


def counts(found, mask, C):
    """The pixels by class, as in `answers`, of the classes that an image was given and of its mask, both [H, W]."""
    known = mask != IGNORED
    is_, was = mask[known].long(), found[known]
    right, in_mask, in_answer = (x.bincount(minlength=C) for x in (is_[is_ == was], is_, was))
    pixels = {'right': right, 'missed': in_mask - right, 'wrong': in_answer - right}
    return {name: ' '.join(f'{c}:{x[c]}' for c in x.nonzero()[:, 0].tolist()) for name, x in pixels.items()}


def score(rows):
    """The scores of a task with masks, of rows as of `answers`: `accuracy` is the mIoU; `pixel_accuracy`; and, where
    the rows have several scales, `multi_scale`, the mIoU again."""
    right, missed, _ = total = sums(rows, '')
    labelled = sum((right + missed).values())
    found = {'accuracy': mean_iou(*total), 'pixel_accuracy': sum(right.values()) / labelled if labelled else math.nan}
    if 'right_ms' in rows[0]:
        found['multi_scale'] = mean_iou(*sums(rows, '_ms'))
    return found


def sums(rows, ending):
    """The right, the missed and the wrong pixels of all rows, each by class."""
    total = []
    for name in 'right', 'missed', 'wrong':
        pairs = [pair.split(':') for row in rows for pair in row[name + ending].split()]
        pixels = Counter()
        for c, n in pairs:
            pixels[int(c)] += int(n)
        total.append(pixels)
    return total


def mean_iou(right, missed, wrong):
    """Intersection over union, mean over the classes that are in masks or answers: pixels by class -> 0 to 1; NaN if no
    pixel has a label."""
    union = right + missed + wrong
    return sum(right[c] / n for c, n in union.items()) / len(union) if union else math.nan


# ---- Augmentation ---------------------------------------------------------------------------------------

def centre(image, mask, backbone, draws, seed):
    """No augmentation: the middle of an image [3, H, W] and of its mask [H, W]."""
    return center_crop(image, backbone.img_size), center_crop(mask, backbone.img_size)


def scale_crop(image, mask, backbone, draws, seed):
    """SETR's augmentation of an image [3, H, W] and its mask [H, W]: of what is resized to 0.5 to 2 S on the shorter
    side and half of the time flipped, a window in other colours: float [3, S, S], 0 to 255, and uint8 [S, S]."""
    rng, S = np.random.default_rng(seed), backbone.img_size
    mean, _ = moments(backbone, image.device)
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


# ---- Tasks with masks -----------------------------------------------------------------------------------

def task(train, val, test, classes, notes=(), scales=()):
    """A data.Task of pictures and masks: `augment` may be scale_crop and, for lists, none.

    train, val, test: lists of (image uint8 [3, H, W], mask uint8 [H, W]), where a mask has classes from 0 on or
    IGNORED; or MaskFiles. scales: where the mIoU at several scales is wanted too, these times the model's size.
    Raises InputError if masks or scales are not these, and for a set in which no pixel has a label."""
    if not all(type(scale) in (int, float) and 0 < scale <= 4 for scale in scales):
        raise InputError(f'scales has numbers above 0 and up to 4, not {repr(scales)[:100]}')
    for name, pictures in ('train', train), ('val', val), ('test', test):
        check_masks(name, pictures, len(classes))
    augments = {'none': centre, 'scale_crop': scale_crop}
    if not isinstance(train, list):  # in sizes of their own
        del augments['none']
    guess = math.log(len(classes)) * (1 + 4 * AUXILIARY)  # of all heads
    return data.Task(train, val, test, classes, [*notes], augments, loss, partial(answers, scales=scales), score,
                     'mIoU', guess, SETR)


def check_masks(name, pictures, C):
    """Raise InputError if a mask in memory is no mask of its image with C classes, or no pixel of all has a label."""
    for image, mask in pictures if isinstance(pictures, list) else []:
        fits = mask.dtype == torch.uint8 and mask.shape == image.shape[1:]
        if not fits or mask[mask != IGNORED].ge(C).any():
            raise InputError(f'a mask of {name} is {mask.dtype} {[*mask.shape]} with {mask.unique().tolist()[-8:]}, '
                             f'not uint8 {[*image.shape[1:]]} with classes from 0 to {C - 1}, or {IGNORED} for none')
    if len(pictures) and all((mask == IGNORED).all() for _, mask in pictures):  # the first one ends it as a rule
        raise InputError(f'no pixel of the pictures of {name} is labelled: look at their masks')


class MaskFiles(data.Files):
    """Pictures and masks in files, in their own sizes, decoded when asked for: samples of (image's path, mask's path).
    first: see `read_mask`."""

    def __init__(self, samples, C, first=1):
        super().__init__(samples, size=None)
        self.C, self.first = C, first

    def __getitem__(self, index):
        image, path = super().__getitem__(index)
        with Image.open(self.samples[index][0]) as file:
            if data.turn_of(file) is not None:
                raise InputError(f'{file.filename}: its EXIF data turn it, and nothing says whether its mask is turned '
                                 'too; save it upright')
        return image, read_mask(path, image.shape[1:], self.C, self.first)


def read_mask(path, shape, C, first=1):
    """The mask of an image of a shape (H, W) in a PNG file of C classes: uint8 [H, W], ids or IGNORED.

    first: what stands for the first class; the number before it, or 255 before 0, for no label.
    Raises InputError with the file's name."""
    try:
        with Image.open(path) as file:
            if file.mode not in ('L', 'P'):  # of a palette the index is the label
                raise ValueError(f'its mode is {file.mode}, not L or P: a byte with a label for each pixel')
            mask = pil_to_tensor(file)[0]
        if mask.shape != shape:
            raise ValueError(f'it has {[*mask.shape]} pixels, height and width, and its image {[*shape]}')
        ids = mask - first  # of bytes: 0 - 1 is 255, IGNORED
        unknown = ids.ge(C) & (ids != IGNORED)
        if unknown.any():
            raise ValueError(f'it has the label {mask[unknown].max()}, and they go from {first} to {first + C - 1}, '
                             f'and {(first - 1) % 256} for none')
    except Exception as error:  # Pillow raises what its many decoders raise
        raise InputError(f'{path}: not the mask of an image ({error}); replace the file') from None
    return ids


def shapes(settings):
    """Which pixels are the shape of the colour in `ask`, as shape_blue, and which shape is it? Class 0: all others."""
    world = data.code_in(Path(__file__).with_name('shapes.py'))
    options, how, sets = settings.options, settings.pictures, []
    world.check_look(options)
    colours = {f'shape_{name}': c for c, name in enumerate(options.colours)}
    if options.ask not in colours:
        raise InputError(f'ask={options.ask}: with masks one of {", ".join(colours)}')
    for seed, n in enumerate((how.n_train, how.n_val, how.n_test)):
        images, shape, scene = world.draw_shapes(n, options, settings.backbone.img_size, seed)
        covered = world.cover(scene, colours[options.ask], settings.backbone.img_size)[:, 0] > 0.5
        masks = (covered * (1 + shape[:, None, None])).astype(np.uint8)
        sets.append(list(zip(torch.from_numpy(images), torch.from_numpy(masks))))
    note = f'pictures of shapes, drawn, with masks; the question: {options.ask}'
    return task(*sets, ['other', *world.SHAPES], [note], options.scales)


def ade20k(settings):
    """ADE20K as it is unpacked: ADEChallengeData2016/{images,annotations}/{training,validation}/ in the data folder.
    Its validation images are the test, as in the paper; n_val of its training images are for validation."""
    how = settings.pictures
    if how.classes != ADE20K_CLASSES:
        raise InputError(f'classes={how.classes}: ADE20K has {ADE20K_CLASSES}')
    root = Path(settings.machine.data) / 'ADEChallengeData2016'
    train, val = data.draw(partners(root, 'training'), how.n_train, how.n_val)
    sets, notes = [train, val, partners(root, 'validation')], [f'ADE20K in {root}']
    for name, samples, n in zip(('train', 'validate', 'test'), sets, (how.n_train, how.n_val, how.n_test)):
        if len(samples) != n:
            notes.append(f'{len(samples)} images to {name} on, and not {n}')
    sets = [MaskFiles(samples, ADE20K_CLASSES) for samples in sets]
    return task(*sets, names_in(root / 'objectInfo150.txt'), notes, settings.options.scales)


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
