"""Tables of what has been run, in Markdown and the layout of Table 10, with the paper's numbers beside them.

    python tests/experiments/report.py                              all that is in runs/
    python tests/experiments/report.py --task natural --method vpt,ivpt --against vpt
    python tests/experiments/report.py --task pets --set lr=0.5     the runs with this rate
    python tests/experiments/report.py --task pets --method ivpt --classes

A row is a run's folder, METHOD[,NAME=VALUE,...], without what all rows have, with mean ± standard deviation over its
seeds, and their number where it is not the row's. A group is the mean of its tasks, and empty as long as one is
missing. The paper's number stands below where the runs are the paper's experiment: its pictures, weights, epochs, image
size, prompts. Where they are not, a line below the table says why. Accuracies are read from predictions.csv.
"""

import re
import sys
from argparse import Namespace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import train
from answers import say_against, say_classes
from curves import markdown, spread
from finished import read, read_answers
from published import beside, read_published, say_reasons
from train import say
from vit import InputError


@train.program
def main(argv):
    """Print the tables that a command line asks for. Returns the exit status."""
    options = train.parser(__doc__)
    options.set_defaults(seed='')
    options.add_argument('--against', metavar='METHOD', help='the differences to a method, picture by picture')
    options.add_argument('--classes', action='store_true', help='accuracy by class and confusions, of one task')
    args, configs = options.parse_args(argv), train.read_configs()
    runs = train.runs_of(Namespace(**vars(args) | {'seed': args.seed or '0'}), configs)
    tasks = args.task and train.tasks_of(configs, train.named(args.task))
    seeds = args.seed and {settings.loop.seed for settings in runs}
    methods = train.named(args.method)
    wanted = {'task': tasks, 'model': train.named(args.model), 'seed': seeds,
              'method': methods and [*methods, args.against]}
    changes = {name: text for name, text in train.changed(args).items() if name not in train.UNNAMED - {'weights'}}
    results, shared = shortened(collect(Path(runs[0].machine.runs), wanted, changes))
    if shared:
        say(f'all of them: {",".join(shared)}')
    report(configs, results, train.named(args.task), methods)
    if args.against:
        say_against(results, args.against)
    if args.classes:
        say_classes(results)
    return 0


# ---- Results --------------------------------------------------------------------------------------------

def collect(folder, wanted, changes):
    """The test results below a folder by (model, task, name of the run, seed), each with its `rows`, those of
    predictions.csv. A result counts as what it says of itself, wherever it lies; a run that was set aside does not.

    wanted: of task, model, method and seed which ones; of none, all. changes: only runs with these settings. Raises
    InputError for a result that is not as its run wrote it, and if there is none."""
    results = {}
    for path in sorted(folder.rglob('result.json')):
        if any(part.endswith('.before') for part in path.parts):
            continue
        result = read(path)
        if all(not names or result.get(name) in names for name, names in wanted.items()):
            result = whole(path)
            key = result['model'], result['task'], name_of(result), result['seed']
            if result['score_on'] != 'test' or not has(result, changes):
                continue
            if key in results:
                raise InputError(f'{path}: there are two results of {", ".join(map(str, key))}; move one away')
            results[key] = result
    if not results:
        raise InputError(f'{folder}: no finished run of what is named; train it first, or name the folder with '
                         '--set runs=DIR')
    return results


def shortened(results):
    """Results by names without the settings that all of them have, and these."""
    words = [re.split(',(?! )', name) for _, _, name, _ in results]  # in a list there are spaces after commas
    shared = [word for word in words[0][1:] if all(word in x for x in words)]
    names = [','.join(word for word in x if word not in shared) for x in words]
    return {(model, task, name, seed): result | {'name': name}
            for name, ((model, task, _, seed), result) in zip(names, results.items())}, shared


def whole(path):
    """The result in a file, with its rows and their accuracy. Raises InputError if it is not as it was written."""
    result = train.read_result(path.parent)
    if not result:
        raise InputError(f'{path}: it, predictions.csv or params.pth beside it is not as the run wrote it; give the '
                         'command of its run again')
    result['rows'] = read_answers(path.parent)
    if result['measure'] == 'accuracy':
        result |= data.accuracy(result['rows'])
    return result


def has(result, changes):
    """Whether a run has settings, given as texts by name."""
    values = train.fixed(result) | result['settings']['machine']
    return all(name in values and train.checked(name, text, {name: type(values[name])}, '--set') == values[name]
               for name, text in changes.items())


def name_of(result):
    """METHOD[,NAME=VALUE,...] of a result."""
    return train.name_of(SimpleNamespace(**result['settings']))


# ---- Tables ---------------------------------------------------------------------------------------------

def report(configs, results, names=(), methods=()):
    """Print a table for each backbone. names: of tasks and groups; methods: rows; without any, all that there are."""
    paper, backbones = read_published(), {}
    for (model, *key), result in results.items():
        backbones.setdefault(model + train.is_random(result['settings']), {})[tuple(key)] = result
    for backbone, mine in backbones.items():
        say(f'{backbone}:')
        tasks = {task for task, *_ in mine}
        known = [name for name in configs['tasks'] if name in tasks]
        shown = columns(configs, names or known + sorted(tasks - {*known}))
        table(configs, paper, mine, shown, rows(configs, mine, methods))
        say_reasons(configs, paper, mine.values())
        for task in shown:
            say_differences(task, [result for (name, *_), result in mine.items() if name == task])


def columns(configs, names):
    """Tasks, and after the tasks of a group the group, as the columns of a report: names may be of both."""
    return [column for name in names for column in (*columns(configs, configs['groups'].get(name, ())), name)]


def rows(configs, results, methods):
    """The rows of a table, in the order of methods, of configs.yaml without any: names of runs; a method that has not
    been run has a row too, if it is named."""
    found = {}
    for (_, name, _), result in results.items():
        found.setdefault(result['method'], set()).add(name)
    known = [method for method in configs['methods'] if method in found]
    methods = methods or known + sorted(found.keys() - {*known})
    return [name for method in methods for name in sorted(found.get(method, {method}))]


def table(configs, paper, results, shown, names):
    """Print the results of one model, by (task, name, seed), with the tasks and groups `shown` as columns, and after a
    task that was scored at several scales, too, that score (Table 7)."""
    shown = [(name, key) for name in shown for key in ('accuracy', 'multi_scale')
             if key == 'accuracy' or any(key in result for (task, *_), result in results.items() if task == name)]
    say(markdown('method', 'trained', [title(results, *column) for column in shown]))
    say('| --- ' * (2 + len(shown)) + '|')
    for name in names:
        mine = {key: result for key, result in results.items() if key[1] == name}
        seeds = sorted({seed for *_, seed in mine})
        ours = [[x for seed in seeds if (x := value(configs, mine, (column, name, seed), key)) is not None]
                for column, key in shown]
        size = f'{fmean(result["trained_parameters"] for result in mine.values()) / 1e6:.3f}M' if mine else ''
        cells = [spread(x) + (f', {len(x)} of {len(seeds)} seeds' if 0 < len(x) < len(seeds) else '') for x in ours]
        say(markdown(f'`{name}`', size, cells))
        count, theirs = beside(configs, paper, mine, shown)
        if count or any(theirs):
            say(markdown('the paper', f'{count:.2f}M' if count else '', [x or '' for x in theirs]))
            more = [f'{100 * fmean(x) - y:+.1f}' if x and y else '' for x, y in zip(ours, theirs)]
            say(markdown('difference', '', more))


def title(results, column, key):
    """The head of a column: what is measured, if it is no accuracy; `_ms` at several scales."""
    measures = {result['measure'] for (task, *_), result in results.items() if task == column} - {'accuracy'}
    return column + '_ms' * (key != 'accuracy') + ''.join(f' ({measure})' for measure in sorted(measures))


def value(configs, results, run, key):
    """The score of a run, (task or group, name, seed); of a group the mean of its members'. None if one is missing."""
    column, *rest = run
    if column in configs['groups']:
        members = [value(configs, results, (member, *rest), key) for member in configs['groups'][column]]
        return None if None in members or not members else fmean(members)
    return results.get(run, {}).get(key)


def say_differences(task, results):
    """Say what the runs in a column of a report differ in, beside the seed, the method, and what it alone has."""
    about = [train.fixed(result) for result in results]
    own = {'seed', 'tune', 'structure', 'aggregation', 'reinforcement'}
    for name in sorted({name for values in about for name in values} - own):
        found = {}
        for result, values in zip(results, about):
            if name in values and name not in result['settings']['changes']:  # its row says these
                found.setdefault(str(values[name]), []).append(result['name'])
        if len(found) > 1:
            words = [f'{x} for {"/".join(dict.fromkeys(runs))}' for x, runs in found.items()]
            say(f'{task}: {name} is ' + ', '.join(words))


if __name__ == '__main__':
    train.start(main)
