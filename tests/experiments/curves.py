"""How the programs print and draw scores: rows of Markdown tables, and curves."""

import itertools
import math
import os
import re
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image, ImageDraw, ImageFont

import train
import vit
from train import say

COLOURS = '#000000', '#d55e00', '#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9'


def markdown(*cells):
    """A row of a Markdown table: texts, and lists of them."""
    return '| ' + ' | '.join(str(x) for cell in cells for x in ([cell] if isinstance(cell, str) else cell)) + ' |'


def spread(values):
    """Mean ± standard deviation, in %, of what there is; '' of nothing."""
    values = [100 * value for value in values if value is not None]
    return f'{fmean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '') if values else ''


def curve_of(settings):
    """What tells a curve from the others in a picture: the seeds of a run are one."""
    return settings.task, settings.model + train.is_random(train.as_dict(settings)), train.name_of(settings)


def picture_of(what, runs):
    """The file of a picture of runs: in the folder that they share, by a name that says what and which they are."""
    folders = [train.folder_of(settings) for settings in runs]
    shared = Path(os.path.commonpath(folders))
    parts = [folder.relative_to(shared).parts for folder in folders]
    words = [[word for part in row for word in part.partition(',')[::2]] for row in parts]  # METHOD, NAME=VALUE,...
    levels = ['+'.join(dict.fromkeys(filter(None, level))) for level in zip(*words)]
    name = ','.join([what, *filter(None, levels)])
    name = re.sub(r'[^\w.+=,-]', '_', name)
    if len(name) > 200:  # a file system takes 255 bytes
        name = f'{name[:190]}-{vit.digest(name.encode())[:8]}'
    return shared / f'{name}.png'


def draw_scores(path, names, ticks, found):
    """Print scores as a table and draw them. names: of what the scores depend on and of the scores. ticks: {x: its
    text}. found: {curve: {x: scores of all seeds}}."""
    say(markdown('task', 'model', 'method', ticks.values()) + '\n' + '| --- ' * (3 + len(ticks)) + '|')
    curves = {}
    for (task, model, method), scores in found.items():
        say(markdown(task, model, f'`{method}`', map(spread, scores.values())))
        percent = [(x, [100 * score for score in row]) for x, row in scores.items() if row]
        curves[task, model, method] = [(x, fmean(row), stdev(row) if len(row) > 1 else 0.0) for x, row in percent]
    lines(path, (names[0], f'{names[1]} in %, mean and standard deviation over seeds'), ticks, curves)


def lines(path, names, x_ticks, curves):
    """Draw curves, {(task, model, method): [(x, mean, standard deviation), ...]}, and write them to path as PNG.
    names: of x and y. x_ticks: {x: what is written below it}. What all have in common, task or model, is the title."""
    image = Image.new('RGB', (1600, 1000 + 50 * len(curves)), 'white')  # twice as large as the file: smooth lines
    draw = ImageDraw.Draw(image)
    text = partial(draw.text, fill='black', font=ImageFont.load_default(30))
    rows = [row for curve in curves.values() for row in curve]
    y_ticks = round_numbers(min(mean - s for _, mean, s in rows), max(mean + s for _, mean, s in rows))
    x_at, y_at = scale(x_ticks, 200, 1500), scale(y_ticks, 850, 150)
    common = [i < 2 and len(set(words)) == 1 for i, words in enumerate(zip(*curves))]
    text((850, 40), ', '.join(itertools.compress([*curves][0], common)), anchor='mm')
    text((850, 950), names[0], anchor='mm')
    text((140, 110), names[1], anchor='lm')
    for x, word in x_ticks.items():
        draw.line([(x_at(x), 850), (x_at(x), 865)], 'black', 3)
        text((x_at(x), 895), word, anchor='mm')
    for y, word in y_ticks.items():
        draw.line([(140, y_at(y)), (1560, y_at(y))], '#dddddd', 2)
        text((125, y_at(y)), word, anchor='rm')
    draw.line([(140, 150), (140, 850), (1560, 850)], 'black', 3)
    several = any(s for *_, s in rows)
    for i, (key, curve) in enumerate(curves.items()):
        aside = 14 * (i - (len(curves) - 1) / 2) if several else 0  # so that no bar hides another
        points = [(x_at(x) + aside, y_at(mean)) for x, mean, _ in curve]
        for (x, _), (_, mean, s) in zip(points, curve):
            draw.line([(x, y_at(mean - s)), (x, y_at(mean + s))], COLOURS[i % len(COLOURS)], 3)
        marked(draw, points, i)
        below = 1000 + 50 * i
        marked(draw, [(180, below), (250, below), (320, below)], i)
        text((350, below), ', '.join(itertools.compress(key, [not x for x in common])), anchor='lm')
    save(image.reduce(2), path)


def save(image, path):
    """Write a picture, and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    say(f'drawn: {path}')


def marked(draw, points, i):
    """Draw the line through points, in the i-th curve's colour and with its marks."""
    colour = COLOURS[i % len(COLOURS)]
    sides, inside = (30, 4, 3)[i % 3], (colour, 'white')[i // 3 % 2]
    draw.line(points, colour, 5)
    for x, y in points[::1 + len(points) // 20]:
        draw.regular_polygon((x, y, 13), sides, 0, inside, colour, 4)


def scale(values, start, end):
    """The function that takes the smallest of the values to the pixel `start`, and the largest to `end`."""
    low, high = min(values), max(values)
    return lambda x: start + (end - start) * ((x - low) / (high - low) if high > low else 0.5)


def round_numbers(low, high):
    """At most 7 multiples of 1, 2 or 5 times a power of 10 that enclose low to high, and how each is written."""
    width = (high - low) or abs(high) or 1
    power = 10.0 ** math.floor(math.log10(width / 5))
    step = next(m * power for m in (1, 2, 5, 10) if width / (m * power) <= 5)
    return {i * step: f'{i * step:.10g}' for i in range(math.floor(low / step), math.ceil(high / step) + 1)}
