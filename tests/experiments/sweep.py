"""Many runs. torchrun divides them: each process takes the next one, whole, as soon as it is free.

    python tests/experiments/sweep.py --task vtab --method vpt,ivpt --seed 0,1,2 --search
    python tests/experiments/sweep.py --task pets --method ivpt --over N=1,5,10,50     Figure 5
    torchrun --standalone --nproc-per-node 8 --max-restarts 3 tests/experiments/sweep.py --task vtab --search

--search is VPT's protocol: train on the training images and score on the validation images at each point of a grid,
then train on both with the best values and test once. The first seed searches for all. A point is a run like any
other, METHOD,NAME=VALUE,score_on=val; the runs that a search ends in are METHOD,search, with a search.json beside them.
"""

import json
import os
import sys
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import NamedTuple

from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from curves import curve_of, draw_scores, picture_of
from train import folder_of, say
from vit import InputError

# VPT's grid, rates for batches of 64: {50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05} * 64 / 256. An entry of
# configs.yaml may have another one, and so may the command line.
GRID = {'lr': [12.5, 6.25, 2.5, 1.25, 0.625, 0.25, 0.125, 0.0625, 0.025, 0.0125],
        'weight_decay': [0.01, 0.001, 0.0001, 0.0]}


@train.program
def main(argv):
    """Make the runs that a command line asks for. Returns the exit status."""
    options = train.parser(__doc__)
    how = options.add_mutually_exclusive_group()
    how.add_argument('--search', action='store_true', help='search first; --set grid="{lr: [1, 0.1]}" is another grid')
    how.add_argument('--over', metavar='NAME=A,B,C', help='each run at each value of a setting, printed and drawn')
    options.add_argument('--again', action='store_true', help='make a finished run again; the old one is kept')
    args = options.parse_args(argv)
    configs, grid = train.read_configs(), take_grid(args)
    runs = train.runs_of(args, configs)
    if args.over is not None:
        return over(runs, args.over, args.again, configs)
    searches = {}
    if args.search:
        searches = searches_of(runs, grid, configs)
        runs = labelled(runs, grid)
    results = run_all(runs, args.again, searches)
    if len(results) > 1:
        train.say_results(filter(None, results))
    return 0 if all(results) else 2


# ---- By turns -------------------------------------------------------------------------------------------

def run_all(runs, again=False, searches=None):
    """The results of runs, {} for one that failed. What is wrong with one is said once, and the next has its turn.

    searches: of the folders of runs, without the seed, a Search whose best values they take; its points come first.
    Under torchrun the first process alone returns results, when all runs are done."""
    best, said, store, searches = {}, set(), open_store(), searches or {}

    def work(settings):
        seeds = folder_of(settings).parent
        if seeds in searches:
            best[seeds] = best.get(seeds) or best_point(searches[seeds], seeds, store)
            settings = with_values(settings, best[seeds])
        return train.run(settings, again)

    jobs = [point for search in searches.values() for point in search.points] + runs
    while (turn := store.add('turn', 1) - 1) < len(jobs):
        result = train.attempt(said, work, jobs[turn])
        store.set(str(folder_of(jobs[turn])), json.dumps(result or {}))
    return [] if int(os.environ.get('RANK', 0)) else [told(store, settings) for settings in runs]


def open_store():
    """A store, shared by the processes of torchrun, of what became of each run and how many have been taken."""
    if 'RANK' not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)  # a restart counts anew
    store.set_timeout(timedelta(days=999))
    return store


def told(store, settings):
    """What became of a run, as soon as it has: its result, or {} if it failed."""
    return json.loads(store.get(str(folder_of(settings))))


# ---- The values that are tried --------------------------------------------------------------------------

def tunable(settings):
    """What a search or a sweep may change, by name: how is trained, the prompts, what a function in a file takes."""
    values = vars(settings.loop) | vars(settings.prompts) | vars(settings.options)
    return {name: x for name, x in values.items() if name not in ('seed', 'tune', 'score_on')}


def check(name, settings, where):
    """Raise InputError if a run has no such setting to be changed, or the command line has changed it."""
    known = tunable(settings)
    if name not in known:
        raise InputError(f'{where}: {name!r} is no setting of the training, the prompts or a function in a file'
                         + train.nearest(str(name), known))
    if name in settings.changes:
        raise InputError(f'{where}: {name} is given by --set too; leave one of the two out')


def variant(settings, configs, changes):
    """The settings of a run with more changes, as the command line would make them."""
    changes = vars(settings.machine) | settings.changes | {'seed': settings.loop.seed} | changes
    return train.settings_of(configs, settings.task, settings.model, settings.method, changes)


def with_values(settings, values):
    """Settings with other values of what is tunable; the name of the run's folder stays."""
    groups = {}
    for name in 'loop', 'prompts', 'options':
        group = getattr(settings, name)
        groups[name] = replace(group, **{key: x for key, x in values.items() if key in vars(group)})
    return replace(settings, **groups)


# ---- Search ---------------------------------------------------------------------------------------------

class Search(NamedTuple):
    """The runs at the points of a grid, and the names of the settings in which they differ."""

    names: list
    points: list


def take_grid(args):
    """The grid that a command line has among its settings, which it is none of; None without."""
    texts = [text for text in args.set if text.startswith('grid=')]
    if not texts:
        return None
    if len(texts) > 1:
        raise InputError('--set grid: it is given twice; give it once')
    if not getattr(args, 'search', True):
        raise InputError('--set grid=... is for --search')
    args.set = [text for text in args.set if text not in texts]
    grid = train.read_yaml(texts[0].removeprefix('grid='), '--set grid')
    if not (type(grid) is dict and grid and all(type(values) is list and values for values in grid.values())):
        raise InputError('--set grid: it is a list of values for each setting, as {lr: [0.1, 0.05]}, '
                         f'not {repr(grid)[:100]}')
    return grid


def grid_of(settings, configs):
    """The grid of a run's entries in configs.yaml, the method's before the task's; VPT's without."""
    for section, name in ('methods', settings.method), ('tasks', settings.task), ('models', settings.model):
        if grid := train.entry(configs, section, name, settings.task).get('grid'):
            return grid
    return GRID


def searches_of(runs, grid, configs):
    """The searches of runs, by their folder without the seed: the first seed's is for all. grid: the command line's."""
    searches = {}
    for settings, final in zip(runs, labelled(runs, grid)):
        if folder_of(final).parent not in searches:
            own = grid or grid_of(settings, configs)
            for name in own:
                check(name, settings, 'grid')
            points = [variant(settings, configs, dict(zip(own, values)) | {'score_on': 'val'})
                      for values in product(*own.values())]
            points = [*{repr(point): point for point in points}.values()]  # 0.1 and 1e-1 are one
            searches[folder_of(final).parent] = Search([*own], points)
    return searches


def labelled(runs, grid=None):
    """Runs that take what a search finds: their folders are METHOD,search, with the command line's grid."""
    words = [f'{name}={"+".join(map(str, values))}' for name, values in (grid or {}).items()]
    return [replace(settings, label=('search', *words)) for settings in runs]


def best_point(search, folder, store):
    """The best point of a search, as values by name; of equals the smaller rate. All of them are said, and written to
    search.json. Raises InputError if no point has a score."""
    results = [told(store, point) for point in search.points]
    values = [{name: tunable(point)[name] for name in search.names} for point in search.points]
    rows = [row | {'accuracy': result.get('accuracy')} for row, result in zip(values, results)]
    rows.sort(key=lambda row: (-1 if row['accuracy'] is None else row['accuracy'], -row.get('lr', 0)), reverse=True)
    train.write(folder / 'search.json', json.dumps(rows, indent=1).encode())
    measure = next((result['measure'] for result in results if result), 'accuracy')
    say(f'search    {folder}: {measure} on validation images')
    for row in rows:
        point = {name: row[name] for name in search.names}
        say(f'          {point}: ' + ('none' if row['accuracy'] is None else f'{100 * row["accuracy"]:.2f}%'))
    best = {name: rows[0][name] for name in search.names}
    if rows[0]['accuracy'] is None:
        raise InputError(f'{folder}: no point of the grid has come to an end; give it lower rates: '
                         '--set grid="{lr: [...]}"')
    say_edges(best, values)
    return best


def say_edges(best, values):
    """Say where the best values are the first or the last of the grid. There is nothing below 0."""
    for name, x in best.items():
        tried = {row[name] for row in values}
        if type(x) in (int, float) and len(tried) > 1 and x and x in (min(tried), max(tried)):
            say(f'          the best {name}, {x}, is the last of the grid on its side: look beyond it')


# ---- The runs at each value of a setting (Figure 5) -----------------------------------------------------

def over(runs, text, again, configs):
    """Make runs at each value in NAME=A,B,C, print their accuracies and draw them. Returns the exit status."""
    name, _, values = text.partition('=')
    if not values or '' in values.split(','):
        raise InputError(f'--over takes NAME=A,B,C, not {text!r}')
    points = {}
    for settings in runs:
        check(name, settings, f'--over {text}')
        for value in values.split(','):
            point = variant(settings, configs, {name: value})
            points[folder_of(point)] = settings, point
    results = run_all([point for _, point in points.values()], again)
    words = {str(tunable(point)[name]): None for _, point in points.values()}
    places, scores = {word: x for x, word in enumerate(words)}, {}
    for (settings, point), result in zip(points.values(), results):
        if result:
            row = scores.setdefault(curve_of(settings), {x: [] for x in places.values()})
            row[places[str(tunable(point)[name])]].append(result['accuracy'])
    if scores:
        path = picture_of(f'over-{name}={"+".join(places)}', runs)
        measure = '/'.join(sorted({result['measure'] for result in results if result}))
        draw_scores(path, (name, measure), {x: word for word, x in places.items()}, scores)
    return 0 if all(results) else 2


if __name__ == '__main__':
    train.start(main)
