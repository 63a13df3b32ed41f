"""A finished run, chosen by the command line and opened again, for the programs that look at what was trained."""

import json
from contextlib import suppress
from dataclasses import fields, make_dataclass, replace
from typing import NamedTuple, get_args

import data
import train
import vit
from sweep import labelled, take_grid
from vit import InputError


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

    given: the names of the machine's settings that count as they are here, if data or weights have moved. photos: no
    picture of the task is needed. Raises InputError if there is no such run, if what it was made of is not there any
    more, and for a function in a file that the settings do not name."""
    folder = train.folder_of(settings)
    result = train.read_result(folder)
    if not result:
        raise InputError(f'{folder}: no finished run; it has result.json and the params.pth that this was measured '
                         'with. Train it first')
    own = stored(folder, result)
    check_code(folder, own, settings)
    here = {name: getattr(settings.machine, name) for name in {*given, 'device'} & {*vars(settings.machine)}}
    own = replace(own, machine=replace(own.machine, **here))
    device = train.find_device(own.machine.device)
    if photos and '.py:' not in own.pictures.source:
        task, pictures = data.Task([], [], [], result['classes']), {}
    else:
        task = data.load(own)
        pictures = data.digest(task, own.machine.data)
    model, identity = model_of(own, task)
    if changed := train.differences({name: result['identity'].get(name) for name in identity | pictures},
                                    identity | pictures):
        raise InputError(f'{folder} was made with another backbone, other pictures or other code: {changed}. Name the '
                         'file of its weights with --weights, the folder of its pictures with --data')
    model.load_state_dict(vit.read_state_dict(folder / 'params.pth'), strict=False)
    precision = result['identity']['precision']
    return Run(own, task, model.to(device).eval(), train.Compute(device, precision, 'as it was trained'), result)


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
