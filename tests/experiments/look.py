"""Figure 7: where the class token of finished runs looks in each layer, and what AR reinforces after it. Of runs on
masks: the class that they give each pixel.

    python tests/experiments/look.py --method linear,vpt,ivpt               four test pictures; linear: the frozen ViT
    python tests/experiments/look.py --task pets --image cat.jpg DIR        photos, or all in a folder

The picture lies in the folder that the runs share. A tile has the picture in grey under the attention to its patches,
relative to the largest in the layer, and the part of all attention that goes to the prompts. Of photos the first 16 are
drawn; the answers for all of them are in answers.csv in each run's folder.
"""

import os
import sys
from itertools import count
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, rgb_to_grayscale, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import finished
import ivpt
import train
from curves import COLOURS, picture_of, save
from train import say
from vit import InputError

TILE = 112  # pixels of a picture and of a map
DRAWN = 16  # photos, at most


@train.program
def main(argv):
    """Draw the runs that a command line names. Returns the exit status."""
    options = finished.parser(__doc__)
    options.add_argument('--image', nargs='+', default=[], metavar='FILE', action='extend',
                         help='photos of your own, or folders of them')
    args = options.parse_args(argv)
    chosen, files, kinds, drawn = finished.chosen(args), photos(args.image), set(), []
    for settings in chosen:
        run = finished.open_run(settings, train.changed(args), photos=bool(files))
        masked = hasattr(run.model, 'answer')  # it gives each pixel a class
        kinds.add(settings.task if masked else '')
        if len(kinds) > 1:
            raise InputError(f'{settings.task}: runs with masks are drawn by themselves, and each task apart')
        drawn.append(answers(run, files) if masked else maps(run, files))
    if files and masked:
        return 0
    what = ['masks' if masked else 'attention', *(Path(name).stem for name in args.image)]
    path = picture_of(','.join(what)[:200], chosen)
    picture = side_by_side(drawn, chosen) if masked else stacked(drawn)
    save(to_pil_image(picture), unused(path))
    return 0


def unused(path):
    """The path, with a number behind its name if there is such a file: no picture overwrites an earlier one."""
    for i in count(2):
        if not path.exists():
            return path
        path = path.with_stem(f'{path.stem.removesuffix(f"-{i - 1}")}-{i}')


def photos(names):
    """The image files that names of files and folders stand for. Raises InputError for a folder without any."""
    files = []
    for name in names:
        inside = sorted(str(path) for path in Path(name).rglob('*') if is_image_file(path.name))
        if os.path.isdir(name) and not inside:
            raise InputError(f'{name}: no image for torchvision in this folder')
        files += inside if os.path.isdir(name) else [name]
    return files


# ---- Where the class token looks ------------------------------------------------------------------------

def maps(run, files):
    """The number of a picture, a strip of words and a row of tiles, uint8 [3, 18 or TILE + 4, W], for each photo, whose
    likely classes are said, or for four test pictures of a run's task."""
    model, settings, classes, strips, likely = run.model, run.settings, run.task.classes, [], []
    if not hasattr(getattr(model, 'vit', model), 'blocks'):
        raise InputError(f'{train.folder_of(settings)}: {settings.method} has no `vit` whose layers could be looked at')
    pictures = ((data.read_image(file, data.resized(settings)), -1) for file in files)
    if not files:
        pictures = [run.task.test[i] for i in range(min(4, len(run.task.test)))]
    for i, (image, label) in enumerate(pictures):
        image = next(data.batches([(image, label)], settings, run.compute.device))[0]
        seen = ivpt.look(model, image)
        p, best = seen['logits'][0].float().softmax(dim=0).topk(min(5, len(classes)))
        likely.append([(classes[c], x) for x, c in zip(p.tolist(), best)])
        if i < DRAWN:
            truth = f', in truth {classes[label]}' if label >= 0 else ''
            row = tiles(image, seen, settings.backbone)
            words = f'{settings.method}: {classes[best[0]]}{truth}{train.is_random(run.result["settings"])}'
            strips.append((i, caption([words], row), row))
    if files:
        say_likely(files, likely, train.folder_of(settings))
    return strips


def say_likely(files, likely, folder):
    """Say and write down, as answers.csv in a run's folder, the likeliest classes of photos: of each (class, p)."""
    rows = []
    for file, found in zip(files, likely):
        said = ', '.join(f'{name} {100 * p:.1f}%' for name, p in found)
        say(f'{file}, by {folder}: {said}')
        rows.append({'file': file, 'class': found[0][0], 'probability': f'{found[0][1]:.4f}', 'likeliest': said})
    train.write(folder / 'answers.csv', train.as_csv(rows))


def stacked(drawn):
    """One picture of what `maps` made of each run; the runs of an image stand together."""
    rows = sorted((strips for run in drawn for strips in run), key=lambda strips: strips[0])
    if len({row.shape for *_, row in rows}) > 1:
        raise InputError('runs of models with different numbers of layers do not fit one picture: look at them apart')
    row = rows[0][-1]
    head = caption(['image'] + [f'layer {l}' for l in range(row.shape[2] // (TILE + 2) - 1)], row)
    return torch.cat([head] + [strip for _, *strips in rows for strip in strips] + [legend(row)], dim=1)


def tiles(image, seen, backbone):
    """An image [1, 3, H, W] as the model gets it and a map for each layer, side by side: uint8 [3, TILE + 4, W]."""
    mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (backbone.mean, backbone.std))
    picture = ((image[0] * std + mean) * 255).round().clip(0, 255).to('cpu', torch.uint8)
    row, w, Omega = [resize(picture, [TILE, TILE])], seen['w'], seen['Omega']
    shares = iter(seen['to_prompts'][0].tolist() if seen.get('to_prompts') is not None else [])
    stages = w if isinstance(w, list) else [w]  # a backbone may have several
    for w, Omega in zip(stages, Omega if isinstance(Omega, list) else [Omega] * len(stages)):
        for l, w_l in enumerate(w[0].float().cpu()):
            reinforced = [] if Omega is None or l == Omega.shape[1] else Omega[0, l].tolist()
            share = next(shares, 0)
            row.append(labelled(heat_map(row[0], w_l, reinforced), f'prompts {share:.0%}' if share else ''))
    return make_grid(torch.stack(row), nrow=len(row), padding=2, pad_value=255)


def labelled(tile, words):
    """A tile, uint8 [3, TILE, TILE], with words on black in its lower left corner, if there are any."""
    if not words:
        return tile
    image, font = to_pil_image(tile), ImageFont.load_default(12)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, TILE - 15, 4 + font.getlength(words), TILE), fill='black')
    draw.text((2, TILE - 15), words, fill='white', font=font)
    return pil_to_tensor(image)


def heat_map(picture, w, reinforced=()):
    """Attention w [M], relative to its largest, as heat over a picture, uint8 [3, TILE, TILE], in grey; the patches
    whose numbers are in `reinforced` are outlined."""
    side = round(len(w) ** 0.5)
    w = resize((w / w.max()).view(1, side, side), [TILE, TILE], InterpolationMode.NEAREST)
    drawn = (0.4 * rgb_to_grayscale(picture, 3) + 0.6 * 255 * heat(w)).to(torch.uint8)
    patch, boxes = TILE / side, []
    for i in reinforced:
        row, column = divmod(i, side)
        boxes.append([column * patch, row * patch, (column + 1) * patch - 1, (row + 1) * patch - 1])
    return draw_bounding_boxes(drawn, torch.tensor(boxes), colors='cyan', width=2) if boxes else drawn


def heat(w):
    """Colours [3, H, W] of weights [1, H, W] from 0 to 1: from black over red and yellow to white."""
    return torch.cat([(3 * w - i).clip(0, 1) for i in range(3)])


def legend(row):
    """A strip below rows, as wide as a row: the colours of heat and what they and the frames mean, uint8 [3, 18, W]."""
    strip = caption(['no attention', '', 'the largest of the layer; cyan: the tokens that AR reinforces after it'], row)
    strip[:, 2:16, TILE:2 * TILE] = (255 * heat(torch.linspace(0, 1, TILE).expand(1, 14, TILE))).to(torch.uint8)
    return strip


def caption(words, row):
    """A white strip as wide as a row, with words at the left of the first tiles: uint8 [3, 18, W]."""
    strip = Image.new('RGB', (row.shape[2], 18), 'white')
    for i, text in enumerate(words):
        ImageDraw.Draw(strip).text((4 + i * (TILE + 2), 1), text, fill='black', font=ImageFont.load_default(14))
    return pil_to_tensor(strip)


# ---- What a run takes each pixel for (4.4) --------------------------------------------------------------

def answers(run, files):
    """Four test pictures of a run's task, each a list: the picture, its mask and the run's answer, painted. Of photos
    the answers are painted over each, in the run's folder, and said."""
    settings, classes = run.settings, run.task.classes
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]) if files else ''
    for file in files:
        name = os.path.relpath(os.path.splitext(os.path.abspath(file))[0], shared).replace(os.sep, '_')
        image, path = data.read_image(file, None), train.folder_of(settings) / f'{name}-mask.png'
        found = answer(run, image)
        to_pil_image(painted(image, found, len(classes))).save(path)
        say(f'{path}: ' + ', '.join(f'{classes[c]} {(found == c).float().mean():.1%}' for c in found.unique()))
    rows = []
    for i in range(0 if files else min(4, len(run.task.test))):
        image, mask = run.task.test[i]
        rows.append([image, *(painted(image, ids, len(classes)) for ids in (mask, answer(run, image)))])
    return rows


def answer(run, image):
    """The class that a run gives each pixel of an image, uint8 [3, H, W] -> [H, W]."""
    with run.compute.autocast():
        return run.model.answer(image, run.settings, run.compute.device)


def side_by_side(drawn, chosen):
    """One picture of what `answers` made of each run: a row for each test picture, a column for each run."""
    names = ['picture', 'mask', *(f'{settings.method}, seed {settings.loop.seed}' for settings in chosen)]
    rows = [[*of_runs[0][:2], *(row[2] for row in of_runs)] for of_runs in zip(*drawn)]
    grid = make_grid([resize(x, [TILE, TILE]) for row in rows for x in row], len(names), pad_value=255)
    return torch.cat([caption(names, grid), grid], dim=1)


def painted(image, mask, n):
    """An image, uint8 [3, H, W], under the colours of n classes: mask [H, W] has their ids."""
    colours = list(COLOURS[:n]) if n <= len(COLOURS) else None  # None: torchvision's
    return draw_segmentation_masks(image, mask == torch.arange(n).view(-1, 1, 1), alpha=0.6, colors=colours)


if __name__ == '__main__':
    train.start(main)
