"""A finished run, chosen by the command line and opened again, for the programs that look at what was trained."""

import json
import math
from contextlib import suppress
from dataclasses import fields, make_dataclass, replace
from typing import NamedTuple, get_args

import data
import train
import vit
from sweep import labelled, take_grid
from vit import InputError

FIRST = 64  # pictures that a run which is opened again has to answer as it did
ROUNDING = 0.001  # of a probability, on another processor


class Run(NamedTuple):
    """A finished run: what it was made with, its task, its model, and the content of result.json."""

    settings: train.Settings
    task: data.Task
    model: vit.nn.Module
    compute: train.Compute
    result: dict


def parser(doc):
    """What all programs that open finished runs take from the command line."""
    options = train.parser(doc)
    options.add_argument('--search', action='store_true', help='the runs that a search ended in')
    return options


def chosen(args):
    """The settings of the runs that a command line names; their folders are those of the finished runs."""
    configs, grid = train.read_configs(), take_grid(args)
    runs = train.runs_of(args, configs)
    return labelled(runs, grid) if args.search else runs


def open_run(settings, given=(), photos=False):
    """The finished run in the folder of some settings. What made it are its own settings, whatever these say.

    given: the names of the machine's settings that count as they are here, if data or weights have moved. photos: the
    pictures of the task need not be there. Raises InputError if there is no such run, if what it was made of is not
    there any more, if it does not answer as it did, and for a function in a file that the settings do not name."""
    folder = train.folder_of(settings)
    result = train.read_result(folder)
    if not result:
        raise InputError(f'{folder}: no finished run, with result.json, predictions.csv and params.pth as they were '
                         'written. Train it first')
    own = stored(folder, result)
    check_code(folder, own, settings)
    here = {name: getattr(settings.machine, name) for name in {*given, 'device'} & {*vars(settings.machine)}}
    own = replace(own, machine=replace(own.machine, **here))
    device = train.find_device(own.machine.device)
    train.seed(own.loop.seed)
    shown = replace(own, pictures=replace(own.pictures, instead='')) if photos else own  # photos: nothing is downloaded
    try:
        task = data.load(shown)
        pictures = data.fingerprint(task, own.machine.data)
    except InputError:
        if not photos or '.py:' in own.pictures.source:
            raise
        task, pictures = data.Task([], [], [], result['classes']), {}
    model, identity = model_of(own, task)
    if changed := train.differences({name: result['identity'].get(name) for name in identity | pictures},
                                    identity | pictures):
        raise InputError(f'{folder} was made with another backbone, other pictures or other code: {changed}. Name the '
                         'file of its weights with --weights, the folder of its pictures with --data')
    model.load_state_dict(vit.read_state_dict(folder / 'params.pth'), strict=False)
    compute = train.Compute(device, result['identity']['precision'], 'as it was trained')
    run = Run(own, task, model.to(device).eval(), compute, result)
    check_answers(run, folder)
    return run


def check_answers(run, folder):
    """Raise InputError if a run that is opened again does not answer its first pictures as it did, but for the rounding
    of another processor; with other versions or another device the score may differ by two of them, which is said."""
    settings, task = run.settings, run.task
    _, pictures = train.sets(task, settings) if task.train else ([], [])
    n = min(len(pictures), settings.loop.batch * math.ceil(FIRST / settings.loop.batch))  # whole batches: the same bits
    if not n:
        return train.say(f'{folder}: its pictures are not here, and its answers are not compared with those it gave')
    found = train.answers(run.model, task, [pictures[i] for i in range(n)], settings, run.compute)
    found = train.from_csv(train.as_csv(found))
    kept = [{name: row[name] for name in found[0]} for row in read_answers(folder)[:n]]
    if all(map(alike, found, kept)):
        return None
    scores = [task.score(rows)['accuracy'] for rows in (kept, found)]
    changed = train.differences(run.result['environment'], train.environment(run.compute.device))
    words = f'{100 * scores[1]:.2f}% of its first {n} pictures, and {100 * scores[0]:.2f}% when it was made'
    if not changed or abs(scores[0] - scores[1]) > 2.5 / n:  # of two it is 2 / n, but for rounding
        raise InputError(f'{folder}: it answers otherwise than it did: {words}. Something that it is made of is not in '
                         'params.pth or has changed: code that its file imports, an attribute that is no buffer')
    train.say(f'{folder}: opened with {changed}, it has {words}')


def alike(row, other):
    """Whether two answers are the same, but for the rounding of a probability."""
    return all(x == other[name] or name == 'probability' and abs(float(x) - float(other[name])) < ROUNDING
               for name, x in row.items())


def read_answers(folder):
    """The rows of predictions.csv of a finished run, as texts by name."""
    return train.from_csv((folder / 'predictions.csv').read_bytes())


def read(path):
    """What is in a JSON file; {} if there is none, or it is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def stored(folder, result):
    """The settings in a result, as they were before they became JSON. Raises InputError if they are no settings."""
    found = result['settings']
    try:
        groups = {name: group(**{key: tuple(x) if isinstance(x, list) else x for key, x in found[name].items()})
                  for name, group in train.GROUPS.items()}
        options = make_dataclass('Options', found['options'], frozen=True)(**found['options'])
        names = {name: found[name] for name in ('task', 'model', 'method', 'changes')}
        return train.Settings(**names, **groups, options=options, label=tuple(found['label']))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{folder}/result.json is damaged: {error!r}; train it again') from None


def check_code(folder, own, settings):
    """Raise InputError for a function in a file that a run names and the command line does not: it would be run."""
    for where in sorted(code_of(own) - code_of(settings)):
        raise InputError(f'{folder}: it was made by {where}, which is code: name it with --task, --method or --set')


def code_of(settings):
    """The functions in files, FILE.py:NAME, that settings name."""
    places = [getattr(getattr(settings, name), x.name) for name, group in train.GROUPS.items() for x in fields(group)
              if 'FILE.py:NAME' in get_args(x.type)]
    return {where for where in places if ':' in where}


def model_of(settings, task):
    """The model of a finished run, and what of it is not in params.pth, by its digest."""
    if settings.loop.tune == 'all':  # params.pth is the whole model
        settings = replace(settings, machine=replace(settings.machine, weights='random'))
    model, identity = train.make_model(settings, task)
    if settings.loop.tune == 'all':
        del identity['backbone']
    return model, identity
