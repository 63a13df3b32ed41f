"""The paper's numbers, and whether a run is the paper's experiment, so that they may stand beside it."""

from pathlib import Path

import train
from train import say
from vit import InputError

# What a run of the paper's may choose: the paper leaves it open, or searches. Beside these, what the method's grid has.
FREE = {'seed', 'lr', 'weight_decay', 'batch', 'precision'}
COUNTS = {'vtab': 'params', 'ade20k': 'params', 'fgvc': 'params_fgvc'}  # the paper counts over all tasks of a group


def read_published():
    """published.yaml."""
    path = Path(__file__).with_suffix('.yaml')
    return train.read_yaml(path.read_text(encoding='utf-8'), path.name)


def unlike(configs, result):
    """In words, by name, what of a result is not the experiment that its entries in configs.yaml describe, which is the
    paper's; {} if nothing. Raises InputError if an entry is not there any more."""
    about = result['settings']
    entry = train.settings_of(configs, about['task'], about['model'], about['method'])
    grid = train.entry(configs, 'methods', about['method']).get('grid', {})
    theirs, ours = train.fixed({'settings': train.as_dict(entry), 'identity': {}}), train.fixed(result)
    found = {name: f'{ours[name]!r} and not {x!r}' for name, x in theirs.items()
             if name not in FREE | {*grid} and ours.get(name) != x}
    if about['machine']['weights'] != entry.machine.weights:
        found['weights'] = f'{about["machine"]["weights"]} and not {entry.machine.weights}'
    how, identity = entry.pictures, result['identity']
    if identity.get('pictures by') != how.source:
        found['lists'] = f'those of {identity.get("pictures by")} and not the official ones'
    for name, n in ('train', how.n_train), ('val', how.n_val), ('test', how.n_test):
        here = identity.get(f'{name} names', 'no number of').split()[0]
        if here != str(n):
            found[f'{name} pictures'] = f'{here} and not {n}'
    return found


def number(paper, result, column):
    """The paper's accuracy, in %, of a task or group, or its count of parameters, in M, for a result's model and
    method; None if it has none."""
    return paper['accuracies'].get(result['model'], {}).get(column, {}).get(result['method'])


def beside(configs, paper, results, shown):
    """The paper's numbers for a row's results, by (task, name, seed): the count of parameters, and one for each column,
    (task or group, key), None where a result below the column is not the paper's experiment."""
    numbers, count = [], None
    for column, key in shown:
        tasks = {*train.tasks_of(configs, [column])}
        mine = [result for (task, *_), result in results.items() if task in tasks]
        found = None
        if mine and tasks == {result['task'] for result in mine} and not any(reasons(configs, mine)):
            found = number(paper, mine[0], column + '_ms' * (key != 'accuracy'))
            count = number(paper, mine[0], COUNTS.get(column)) or count
        numbers.append(found)
    return count, numbers


def reasons(configs, results):
    """For each result what `unlike` says of it, as one word that is true if it has no entry any more."""
    for result in results:
        try:
            yield unlike(configs, result)
        except InputError as error:
            yield {'entry': str(error)}


def say_reasons(configs, paper, results):
    """Say why no number of the paper stands beside results for which it has one, and what its numbers hide."""
    results = [result for result in results if number(paper, result, result['task'])]
    found, explained = {}, {}
    for result, words in zip(results, reasons(configs, results)):
        if 'N' not in words and result['method'] in paper['notes']:
            explained[result['method']] = paper['notes'][result['method']]
        for name, x in words.items():
            found.setdefault(f'{name} is {x}', {})[f'{result["task"]}/{result["method"]}'] = True
    for words, runs in found.items():
        some = ', '.join([*runs][:4]) + (f' and {len(runs) - 4} more' if len(runs) > 4 else '')
        say(f"not the paper's experiment, so without its number: {words} ({some})")
    for method, note in explained.items():
        say(f'{method}: {note}')
