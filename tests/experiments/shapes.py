"""A world of pictures of shapes, which needs no download: `source: tests/experiments/shapes.py:shapes` in configs.yaml.

Shapes of different colours, one of each, lie in different cells of a 3 x 3 grid. For pre-training a frame asks a
question of one of four kinds. Downstream pictures have no frame: the question has to be learned. Settings: `ask`,
`colours`, `look` and `grain`. `python tests/experiments/shapes.py` draws world.png: eight pictures with a frame and its
answer, and eight without.
"""

import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import Task
from vit import InputError

COLOURS = {'red': (220, 50, 50), 'green': (50, 180, 70), 'blue': (60, 90, 230), 'yellow': (230, 200, 50),
           'purple': (160, 70, 200), 'cyan': (60, 200, 210)}  # pre-training knows the first four
CELLS = [f'{row} {column}' for row in ('top', 'middle', 'bottom') for column in ('left', 'centre', 'right')]
SHAPES = ['disc', 'ring', 'cross']
LOOKS = ('plain', 'waves')  # of the background; pre-training knows the first


class Scene(NamedTuple):
    """What n pictures show, arrays [n, n_shapes]: an entry for each picture and colour. Lengths are in 48ths of it."""

    cell: np.ndarray  # the number of the shape's cell, all different
    row: np.ndarray  # its centre
    column: np.ndarray
    radius: np.ndarray  # 3.8 to 4.6 is small, 5.7 to 6.5 large
    shape: np.ndarray  # its number in SHAPES
    there: np.ndarray  # whether it is in the picture


QUESTIONS = {  # the answer's number in pictures i [n] of a scene s, for the colour (or cell) c [n]
    'where': lambda s, i, c: s.cell[i, c],
    'size': lambda s, i, c: (s.radius[i, c] > 5).astype(int),
    'shape': lambda s, i, c: s.shape[i, c],
    'colour': lambda s, i, c: np.column_stack([s.cell == c[:, None], np.ones_like(i)]).argmax(axis=1),  # or nothing
    'side': lambda s, i, c: 1 + np.sign(s.cell[i, c] % 3 - s.cell[i, 0] % 3),  # of the first colour's shape
    'count': lambda s, i, c: s.there.sum(axis=1) - 1}
ASKED = tuple(QUESTIONS)[:4]  # by a frame, in pre-training


def names_of(question, colours):
    """The answers to a question about pictures with shapes of these colours, in words."""
    if question == 'frame':
        return [name for asked in ASKED for name in names_of(asked, colours)]
    return {'where': CELLS, 'size': ['small', 'large'], 'shape': SHAPES, 'colour': [*colours, 'nothing'],
            'side': ['left', 'above or below', 'right'], 'count': [str(n + 1) for n in range(len(colours))]}[question]


def shapes(settings):
    """The task of pictures of shapes with the question `ask`: QUESTION_COLOUR, colour (in the centre), count, frame."""
    options, pictures = settings.options, settings.pictures
    check_look(options)
    pairs = [*product(['where', 'size', 'shape'], options.colours), *product(['side'], options.colours[1:])]
    known = ['frame', 'colour', 'count', *map('_'.join, pairs)]
    if options.ask not in known:
        raise InputError(f'ask={options.ask}: with the colours {", ".join(options.colours)} one of {", ".join(known)}')
    how, framed = (options, settings.backbone.img_size), options.ask == 'frame'
    sets = [draw_shapes(n, *how, seed=(seed, framed))[:2]
            for seed, n in enumerate((pictures.n_train, pictures.n_val, pictures.n_test))]
    sets = [list(zip(torch.from_numpy(images), labels.tolist())) for images, labels in sets]
    classes = names_of(options.ask.partition('_')[0], options.colours)
    return Task(*sets, classes, [f'pictures of shapes, drawn; the question: {options.ask}'])


def check_look(options):
    """Raise InputError for a look or colours that are none of this world."""
    if options.look not in LOOKS:
        raise InputError(f'look is one of {", ".join(LOOKS)}, not {options.look!r}')
    known = [name for name in COLOURS if name in options.colours]
    if not known or len(known) < len(options.colours):
        raise InputError(f'colours is some of {", ".join(COLOURS)}, not {repr(options.colours)[:100]}')


def draw_shapes(n, options, size=48, seed=0):
    """n pictures, uint8 [n, 3, size, size], the answers to the question, int [n], and what the pictures show, a Scene.

    options: `ask`, `colours`, `look`, and `grain`, the standard deviation of each pixel's noise, of 256 grey levels."""
    rng, i, ask, colours = np.random.default_rng(seed), np.arange(n), options.ask, options.colours
    scene = arrange(n, len(colours), rng, ask == 'count')
    question, _, colour = ask.partition('_')
    if question == 'frame':
        q, c = rng.integers(len(ASKED), size=n), rng.integers(len(colours), size=n)
        cell = np.where(rng.random(n) < 0.6, scene.cell[i, c], rng.integers(9, size=n))  # often one that is not empty
        answers = [QUESTIONS[name](scene, i, cell if name == 'colour' else c) for name in ASKED]
        first = np.cumsum([0, *(len(names_of(name, colours)) for name in ASKED)])  # label of each question
        labels = first[q] + np.stack(answers)[q, i]
    else:
        c = np.full(n, list(colours).index(colour) if colour else CELLS.index('middle centre'))
        labels = QUESTIONS[question](scene, i, c)
    rgb = np.array([COLOURS[name] for name in colours], dtype=np.float32)
    background = rng.uniform(60, 200, (n, 1, 1, 1)).astype(np.float32)
    images = np.empty((n, 3, size, size), dtype=np.uint8)
    for part in np.array_split(i, max(1, n * size ** 2 // 2 ** 20)):
        canvas = background[part]
        if options.look == 'waves':
            canvas = canvas + waves(len(part), size, rng)
        shown = Scene(*(x[part] for x in scene))
        for k, colour in enumerate(rgb):
            canvas = canvas + cover(shown, k, size) * (colour[:, None, None] - canvas)
        if question == 'frame':
            canvas = framed(canvas, q[part], rgb[c[part]], cell[part])
        images[part] = (canvas + options.grain * rng.standard_normal(canvas.shape, dtype=np.float32)).clip(0, 255)
    return images, labels, scene


def arrange(n, n_shapes, rng, some_missing=False):
    """The scene of n pictures at random: n_shapes in each, or at least one if some are missing."""
    cell = rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)[:, :n_shapes]
    centre = 3 + 14 * (np.stack([cell // 3, cell % 3]) + 0.5 + rng.uniform(-0.07, 0.07, (2, *cell.shape)))
    radius = rng.uniform(3.8, 4.6, cell.shape) + 1.9 * rng.integers(2, size=cell.shape)
    shape = rng.integers(len(SHAPES), size=cell.shape)
    n_there = rng.integers(1, n_shapes + 1, size=(n, 1)) if some_missing else n_shapes
    there = rng.permuted(np.tile(np.arange(n_shapes), (n, 1)), axis=1) < n_there
    return Scene(cell, *centre.astype(np.float32), radius.astype(np.float32), shape, there)


def cover(scene, c, size):
    """How far the shape of colour c covers each pixel of n pictures, 0 to 1: float [n, 1, size, size]."""
    pixel = (np.arange(size, dtype=np.float32) + 0.5) * 48 / size
    row, column, radius, shape, there = (x[:, c, None, None] for x in scene[1:])
    dy, dx = np.abs(pixel[:, None] - row), np.abs(pixel - column)  # [n, size, 1] and [n, 1, size]
    distance = np.hypot(dy, dx)
    inside = radius - distance  # how far inside of the edge of a disc
    inside = np.where(shape == 1, np.minimum(inside, distance - 0.5 * radius), inside)
    inside = np.where(shape == 2, np.minimum(inside, 0.38 * radius - np.minimum(dy, dx)), inside)
    return np.where(there, (inside * size / 48 + 0.5).clip(0, 1), 0)[:, None]


def waves(n, size, rng):
    """Grey backgrounds of waves in two directions: float [n, 1, size, size], around 0."""
    pixel = np.arange(size) * 48 / size
    down, across = np.sin(rng.uniform(0.3, 1.2, (2, n, 1)) * pixel + rng.uniform(0, 2 * np.pi, (2, n, 1)))
    return (45 * down[:, None, :, None] * across[:, None, None, :]).astype(np.float32)


def framed(canvas, q, colour, cell):
    """A canvas [n, 3, size, size] with the frames that ask, q [n] of ASKED. In a colour [n, 3]: all around, where it
    is; at the top and on the left, its size; at the bottom and on the right, its shape. White, with black beside the
    row and the column of a cell [n]: the colour in that cell."""
    size = canvas.shape[-1]
    place = (np.arange(size) * 48 // size - 3) // 14  # of a cell in its row or column
    edge = np.arange(size) < size * 3 // 48
    start = edge[:, None] | edge  # the top and the left
    end = start[::-1, ::-1]
    sides = np.stack([start | end, start, end, start | end])[q][:, None]  # [n, 1, size, size]
    row, column = (cell // 3)[:, None, None], (cell % 3)[:, None, None]
    black = (place[:, None] == row) | (place == column)
    marks = np.where(black, 0, 255)[:, None]
    painted = np.where((q == 3)[:, None, None, None], marks, colour[:, :, None, None])
    return np.where(sides, painted, canvas).astype(np.float32)


def draw_world(path):
    """A picture of this world: eight pictures whose frame asks, each over its answer, and eight that ask nothing."""
    colours, sheet = ['red', 'green', 'blue', 'yellow'], Image.new('RGB', (8 * 132 + 8, 2 * 156 + 8), 'white')
    for row, (ask, grain) in enumerate((('frame', 8.0), ('where_red', 20.0))):
        options = SimpleNamespace(ask=ask, colours=colours, look='plain', grain=grain)
        images, labels, _ = draw_shapes(8, options, seed=(6, ask == 'frame'))
        for i, (image, label) in enumerate(zip(images, labels)):
            x, y = 8 + 132 * i, 8 + 156 * row
            sheet.paste(Image.fromarray(image.transpose(1, 2, 0)).resize((124, 124), Image.Resampling.NEAREST), (x, y))
            words = names_of('frame', colours)[label] if ask == 'frame' else 'no frame: no question'
            ImageDraw.Draw(sheet).text((x, y + 126), words, 'black', ImageFont.load_default(12))
    sheet.save(path)


if __name__ == '__main__':
    draw_world(Path(__file__).with_name('world.png'))
