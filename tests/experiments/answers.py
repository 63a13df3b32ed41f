"""What can be read out of the answers of runs, predictions.csv: differences picture by picture, and confusions."""

import math
from collections import Counter
from statistics import fmean, variance

from curves import markdown
from train import say
from vit import InputError


def say_against(results, method):
    """Print how much better each run is than that of another method with the same further name on the same task, over
    the same pictures and seeds, with the standard error. results: by (model, task, name, seed), each with its rows."""
    say(markdown('task', 'run', f'minus `{method}`', 'standard error', 'of pictures', 'of seeds', 'seeds'))
    say('| --- ' * 7 + '|')
    found = {}
    for model, task, name in dict.fromkeys(key[:3] for key in results):
        pairs = paired(results, (model, task, name), method)
        if pairs:
            found.setdefault((model, name), {})[task] = difference(pairs)
    for (model, name), tasks in found.items():
        for task, row in tasks.items():
            say(markdown(task, f'`{name}`', cells(*row)))
        if len(tasks) > 1:  # tasks are independent of each other
            errors = [math.hypot(*(row[i] for row in tasks.values())) / len(tasks) for i in (1, 2, 3)]
            mean, seeds = fmean(row[0] for row in tasks.values()), min(row[4] for row in tasks.values())
            say(markdown(f'mean of {len(tasks)}', f'`{name}`', cells(mean, *errors, seeds)))
    if not found:
        raise InputError(f'--against {method}: no two runs, of it and of another method, share a task, a model, a seed '
                         'and the settings in their names')


def paired(results, run, method):
    """The results of a run and of the other method's with the same further name, in pairs, a pair for each seed."""
    model, task, name = run
    own = name.partition(',')[0]
    other = model, task, method + name.removeprefix(own)
    seeds = [key[3] for key in results if key[:3] == run and (*other, key[3]) in results]
    return [] if other == run else [(results[(*run, seed)], results[(*other, seed)]) for seed in seeds]


def difference(pairs):
    """(difference of the accuracies, its standard error, that of pictures, that of seeds, number of seeds).

    Each picture and each seed has d = 1, 0 or -1: right in one run alone, in both or none, in the other alone. Pictures
    and seeds are both drawn; the error of the mean is the root of Var_pictures(mean over seeds) / n plus
    Var_seeds(mean over pictures) / S, which counts what they share twice. With one seed only pictures count. Of what is
    not right or wrong as a whole, such as masks, only seeds are compared.
    Raises InputError if the pictures are not the same."""
    for ours, theirs in pairs:
        if [row['picture'] for row in ours['rows']] != [row['picture'] for row in theirs['rows']]:
            raise InputError(f'{ours["task"]}: {ours["method"]} and {theirs["method"]} were tested on other pictures')
    by_seed = [ours['accuracy'] - theirs['accuracy'] for ours, theirs in pairs]
    of_seeds, of_pictures = error(by_seed), 0.0
    if all(result['measure'] == 'accuracy' for pair in pairs for result in pair):
        rows = [[right(a) - right(b) for a, b in zip(ours['rows'], theirs['rows'])] for ours, theirs in pairs]
        of_pictures = error([fmean(picture) for picture in zip(*rows)])
    return fmean(by_seed), math.hypot(of_pictures, of_seeds), of_pictures, of_seeds, len(pairs)


def right(row):
    """Whether an answer is right."""
    return row['class'] == row['taken_for']


def error(values):
    """The standard error of the mean of values; 0 of one."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else 0.0


def cells(mean, both, of_pictures, of_seeds, seeds):
    """The cells of a row of differences, in points."""
    spread = '' if seeds == 1 else f'{100 * of_seeds:.1f}'
    return [f'{100 * mean:+.1f}', f'{100 * both:.1f}', f'{100 * of_pictures:.1f}', spread, str(seeds)]


def say_classes(results):
    """Print, for the runs of one task, the accuracy of each class and the ten most frequent confusions, over all seeds.
    Raises InputError for several tasks, and for what has no classes of pictures."""
    tasks = {(model, task) for model, task, *_ in results}
    if len(tasks) > 1 or any(result['measure'] != 'accuracy' for result in results.values()):
        raise InputError('--classes is for one task with classes of pictures, and one model: name it with --task')
    names = {name: [result for (*_, run, _), result in results.items() if run == name]
             for name in dict.fromkeys(name for *_, name, _ in results)}
    classes = next(iter(results.values()))['classes']
    rows = {name: [row for result in mine for row in result['rows']] for name, mine in names.items()}
    say(markdown('class', 'pictures', [f'`{name}`' for name in rows]))
    say('| --- ' * (2 + len(rows)) + '|')
    for c, word in enumerate(classes):
        of_class = [[row for row in answers if row['class'] == str(c)] for answers in rows.values()]
        if of_class[0]:
            n = len(of_class[0]) // len(next(iter(names.values())))
            say(markdown(word, str(n), [f'{100 * fmean(map(right, answers)):.1f}' for answers in of_class]))
    for name, answers in rows.items():
        wrong = Counter((int(row['class']), int(row['taken_for'])) for row in answers if not right(row))
        total = Counter(int(row['class']) for row in answers)
        for (c, other), n in wrong.most_common(10):
            say(f'{name}: {classes[c]} is taken for {classes[other]} {n} times of {total[c]}')
