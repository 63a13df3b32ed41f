"""What has been run, beside the paper: its tables (--report) and Figures 4 to 7 (--noise, --sweep, --loss, --show,
--image). train.py opens this file for these options alone: no training needs it."""

import itertools
import json
import math
import os
import re
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import data
import vit
from train import (AGAIN, FREE, InputError, accuracy, answer, complain, differences, find_device, folder_of, has_params,
                   is_random, make_model, named, published, read, read_configs, read_result, run_all, runs_of, say,
                   tasks_of, write_result)
from vit import Swin


def main(args, changes, configs):
    """Do what the options of a command line ask for. Returns the exit status."""
    points = [{}] if args.sweep is None else swept(args.sweep, changes)
    runs = runs_of(args, changes, configs, points)
    folders = [Path(args.run)] if args.run else list(dict.fromkeys(map(folder_of, runs)))
    if args.sweep is not None:
        return sweep(runs, *points[0], args.again)
    if args.report:
        seeds = args.seed and {config.seed for config in runs}
        report(configs, Path(runs[0].runs), named(args.task), named(args.model), named(args.method), seeds)
        return 0
    if args.loss:
        draw_loss(runs, Path(os.path.commonpath(folders)) / 'loss.png')
        return 0
    device = find_device(runs[0].device)
    code = {*named(args.method), *changes.values()}
    if args.noise is not None:
        return with_noise(folders, proportions(args.noise), device, changes, code)
    sources = {result['config'].get('source') for folder in folders if (result := read_result(folder))}
    draw, name = (show_masks, 'masks.png') if sources & {*data.MASKED} else (show, 'attention.png')
    draw(folders, args.image, Path(os.path.commonpath(folders)) / name, device, changes, code)
    return 0


# ---- Tables (--report) ----------------------------------------------------------------------------------


def report(configs, folder, names=None, models=None, methods=None, seeds=None):
    """Print, in Markdown and the layout of Table 10, the test accuracies of finished runs, and under each method the
    paper's with the difference, where it has one for just this backbone: a table for each. A group is the mean of its
    members, and empty as long as one is missing. Below a table, what its runs differ in beside method and seed.

    names: of tasks and groups. What is not given is all that has been run."""
    results = collect(folder, names and tasks_of(configs, names), models, methods, seeds)
    backbones = {}
    for (model, *key), result in results.items():
        backbones.setdefault(model + is_random(result['config']), {})[tuple(key)] = result
    for backbone, mine in backbones.items():
        say(f'{backbone}:')
        tasks = {task for task, *_ in mine}
        shown = columns(configs, names or [name for name in configs['tasks'] if name in tasks])
        shown = [column for name in shown for column in (name, f'{name}_ms') if column in {name, *tasks}]
        found = {method for _, method, _ in mine}
        known = [name for name in configs['methods'] if name in found]
        table(configs, mine, shown, methods or known + sorted(found - {*known}))
        for task in shown:
            say_differences(task, [result for (name, *_), result in mine.items() if name == task])


def collect(folder, tasks, models, methods, seeds):
    """The test results below a folder by (model, task, method, seed). A result counts as what it says of itself,
    wherever it lies. No tasks, models, methods or seeds: all."""
    results = {}
    for path in sorted(folder.rglob('result.json')):
        result = read_result(path.parent)
        if not result:
            raise InputError(f'{path} is damaged; give the command of its run again')
        model, task, *run = key = tuple(result['config'][name] for name in ('model', 'task', 'method', 'seed'))
        wanted = all(not names or name in names for name, names in zip(key, (models, tasks, methods, seeds)))
        main = path.parent.name != AGAIN and not result['config'].get('point')  # and not a point of a sweep
        if wanted and main and result['score_on'] == 'test':
            if key in results:
                raise InputError(f'{path}: there are two results of {", ".join(map(str, key))}; move one away')
            results[key] = result
            if 'multi_scale' in result:  # Table 7's second column
                results[(model, f'{task}_ms', *run)] = result | {'accuracy': result['multi_scale']}
    if not results:
        raise InputError(f'{folder}: no finished run of what is named; train it first, or name the folder with '
                         '--set runs=DIR')
    return results


def columns(configs, names):
    """Tasks, and after the tasks of a group the group, as the columns of a report: names may be of both."""
    return [column for name in names for column in (*columns(configs, configs['groups'].get(name, ())), name)]


def table(configs, results, shown, methods):
    """Print the results of one model, by (task, method, seed), with the tasks and groups `shown` as columns."""
    def value(name, method, seed):
        if name in configs['groups']:
            members = [value(member, method, seed) for member in configs['groups'][name]]
            return None if None in members or not members else fmean(members)
        return results[name, method, seed]['accuracy'] if (name, method, seed) in results else None

    say(markdown('method', 'trained', shown) + '\n' + '| --- ' * (2 + len(shown)) + '|')
    for method in methods:
        mine = [result for (_, name, _), result in results.items() if name == method]
        seeds = sorted({result['config']['seed'] for result in mine})
        ours = [[x for seed in seeds if (x := value(name, method, seed)) is not None] for name in shown]
        size = fmean(result['trained_parameters'] for result in mine) / 1e6 if mine else None
        say(markdown(f'`{method}`', f'{size:.3f}M' if mine else '', map(spread, ours)))
        count, *paper = (beside(configs, mine, name) for name in ['params', *shown])
        if any(paper):
            say(markdown('the paper', f'{count:.2f}M' if count else '', (x or '' for x in paper)))
            more = (f'{100 * fmean(x) - y:+.1f}' if x and y else '' for x, y in zip(ours, paper))
            say(markdown('difference', '', more))


def beside(configs, results, column):
    """The paper's number for a column of a table, if it is for just what each of the results was made with."""
    found = {published(configs, result['config'], column) for result in results}
    return found.pop() if len(found) == 1 else None


def say_differences(task, results):
    """Say what the runs in a column of a report differ in, beside the method, what it is, and the seed."""
    own = FREE | {'method', 'seed', 'tune', 'structure', 'aggregation', 'reinforcement'}
    for name in sorted({name for result in results for name in result['config']} - own):
        values = {}
        for result in results:
            values.setdefault(str(result['config'].get(name)), []).append(result['config']['method'])
        if len(values) > 1:
            say(f'{task}: {name} is ' + ', '.join(f'{value} for {"/".join(dict.fromkeys(methods))}'
                                                  for value, methods in values.items()))


def markdown(*cells):
    """A row of a Markdown table: texts, and lists of them."""
    return '| ' + ' | '.join(str(x) for cell in cells for x in ([cell] if isinstance(cell, str) else cell)) + ' |'


def spread(values):
    """Mean ± standard deviation, in %, of what there is; '' of nothing."""
    values = [100 * value for value in values if value is not None]
    return f'{fmean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '') if values else ''


# ---- A finished run, opened -----------------------------------------------------------------------------


def open_run(folder, device, changes=None, code=()):
    """The settings, the names of the classes and the model of a finished run. changes: where its data and weights are
    by now, if elsewhere. code: the methods and data sets in files that may be run, beside those that configs.yaml
    names. Raises InputError if it was trained with other data or weights."""
    result = read_result(folder)
    if not result:
        raise InputError(f'{folder}: no finished run; train it first')
    if not has_params(folder, result):
        raise InputError(f'{folder}: params.pth is not what result.json was measured with; train it again')
    stored = result['config']
    config = SimpleNamespace(**stored | {name: (changes or {}).get(name, stored[name]) for name in ('data', 'weights')})
    for where in (config.tune, config.source):
        if ':' in where and where not in {*code, *code_of(read_configs())}:
            raise InputError(f'{folder}: it was made by {where}, which is code: name it with --method or --set source=')
    if config.tune == 'all':  # params.pth is the whole model
        config.weights = 'random'
    model = make_model(config, len(result['classes'])).to(device).eval()
    if config.tune != 'all' and config.backbone != stored['backbone']:
        raise InputError(f'{folder} was tuned on another backbone than {config.weights} holds: backbone '
                         f'{stored["backbone"]} -> {config.backbone}; name its file with --weights')
    if getattr(config, 'code', None) != stored.get('code'):
        raise InputError(f'{folder}: {config.tune} is not the code any more that made it; --again trains anew')
    config.weights, config.backbone = stored['weights'], stored['backbone']
    model.load_state_dict(vit.read_state_dict(folder / 'params.pth'), strict=False)
    return config, result['classes'], model


def code_of(configs):
    """The functions in files that configs.yaml names, methods and data sets."""
    entries = [configs['defaults'], *configs['methods'].values(), *configs['tasks'].values()]
    return {entry[key] for entry in entries for key in ('tune', 'source') if key in entry}


def task_of(config, folder):
    """The task of a finished run. Raises InputError if its pictures are others by now."""
    task = data.load(config)
    now = data.digest(task, config)
    if changed := differences({name: getattr(config, name, None) for name in now}, now):
        raise InputError(f'{folder} was trained and tested on other pictures than {config.data} has: {changed}; name '
                         'their folder with --data')
    return task


# ---- Images with noise (--noise, Figures 4 and 6) -------------------------------------------------------


def with_noise(runs, rates, device, changes, code):
    """Test finished runs on images that are mixed with noise (Figures 4 and 6), add the accuracies to their results,
    and print them, method by method. What is wrong with one run is said, and the next has its turn. Returns the exit
    status."""
    found, status = {}, 0
    for folder in runs:
        try:
            config, classes, model = open_run(folder, device, changes, code)
            if config.source in data.MASKED:
                raise InputError(f'{folder}: Figure 4 is about classes of pictures, and this is segmentation')
            task, result = task_of(config, folder), read_result(folder)
            scores = {f'{rate:g}': accuracy(model, task.test, config, device, rate) for rate in rates}
            write_result(folder, result | {'noise': result.get('noise', {}) | scores})
            for rate, score in zip(rates, scores.values()):
                found.setdefault(curve_of(config), {rate: [] for rate in rates})[rate].append(score)
        except InputError as error:
            complain(error)
            status = 2
    if found:
        path = Path(os.path.commonpath(runs)) / 'noise.png'
        draw_accuracies(path, 'proportion of noise', {rate: f'{rate:g}' for rate in rates}, found)
    return status


def proportions(text):
    """The numbers from 0 to 1 of --noise."""
    with suppress(ValueError):
        rates = [float(rate) for rate in text.split(',')]
        if all(0 <= rate <= 1 for rate in rates):
            return rates
    raise InputError(f'--noise takes proportions from 0 to 1, as 0,0.1,0.2, not {text!r}')


# ---- A run at each value of a setting (--sweep, Figure 5) -----------------------------------------------


def swept(text, changes):
    """The settings of each point of --sweep NAME=V1,V2,..."""
    name, _, values = text.partition('=')
    if name in FREE | {'task', 'method', 'model', 'seed'}:
        raise InputError(f'--sweep {text}: {name} changes no number of a run, or names it; take another, as N or lr')
    if name in changes:
        raise InputError(f'--sweep {text}: {name} is given by --set too; leave one of the two out')
    if not all(re.fullmatch(r'[\w.+-]+', value) for value in values.split(',')):  # they are names of folders
        raise InputError(f'--sweep takes NAME=V1,V2,... with numbers or words, not {text!r}')
    return [{name: value} for value in dict.fromkeys(values.split(','))]


def sweep(runs, name, again):
    """Train and test runs that differ in a setting, each in a folder below the run's, and draw their accuracies
    (Figure 5). Returns the exit status."""
    path = Path(os.path.commonpath(map(folder_of, runs))) / f'sweep-{name}.png'
    for config in runs:
        config.point = f'sweep/{name}={getattr(config, name)}'
    runs = list({folder_of(config): config for config in runs}.values())  # a task may be in two groups
    (results, status), found = run_all(runs, again, searching=False), {}
    places = {point: x for x, point in enumerate(dict.fromkeys(config.point for config in runs))}
    for result in results:
        scores = found.setdefault(curve_of(SimpleNamespace(**result['config'])), {x: [] for x in places.values()})
        scores[places[result['config']['point']]].append(result['accuracy'])
    if found:
        draw_accuracies(path, name, {x: point.partition('=')[2] for point, x in places.items()}, found)
    return status


# ---- Where the class token looks (--show, --image, Figure 7) --------------------------------------------


TILE = 112  # pixels of a picture and of a map


def show(folders, files, path, device, changes, code):
    """Draw where the class token looks in each layer, a row an image and run, and write it to path as PNG.

    folders: of finished runs. files: images of the user's, whose likely classes are printed; without any,
    four test images of the task. changes: where data and weights are by now, if elsewhere."""
    rows = []
    for folder in folders:
        config, classes, model = open_run(folder, device, changes, code)
        if not hasattr(getattr(model, 'vit', model), 'blocks'):
            raise InputError(f'{folder}: {config.method} has no `vit` whose layers could be looked at')
        pictures = [(data.read_image(file, data.resized(config)), -1) for file in files]
        if not files:
            test = task_of(config, folder).test
            pictures = [test[i] for i in range(min(4, len(test)))]
        for i, (image, label) in enumerate(pictures):
            image = next(data.batches([(image, label)], config, device))[0]
            seen = look(model, image)
            p, best = seen['logits'][0].float().softmax(dim=0).topk(min(5, len(classes)))
            truth = f', in truth {classes[label]}' if label >= 0 else ''
            row = tiles(image, seen, config.mean, config.std)
            words = f'{config.method}: {classes[best[0]]}{truth}{is_random(vars(config))}'
            rows.append((i, caption([words], row), row))
            if files:
                say(f'{files[i]}, by {folder}: ' + ', '.join(f'{classes[c]} {100 * x:.1f}%' for x, c in zip(p, best)))
    if len({row.shape for *_, row in rows}) > 1:
        raise InputError('runs of models with different numbers of layers do not fit one picture: --show them apart')
    rows.sort(key=lambda row: row[0])  # the runs of an image stand together
    head = caption(['image'] + [f'layer {l}' for l in range(row.shape[2] // (TILE + 2) - 1)], row)
    strips = [head] + [strip for _, *row in rows for strip in row]
    to_pil_image(torch.cat(strips, dim=1)).save(path)
    say(f"the class token's attention in each layer, and outlined what AR reinforces after it: {path}")


@torch.no_grad()
def look(model, images):
    """What an IVPT, or a plain ViT, does with images [B, 3, H, W]. Made by hooks: `forward` is as it is.

    A dict: `logits` [B, C]; `w` [B, L, M], the class token's attention over the image tokens in each layer
    (w̃ of Eq. 14); `Omega` [B, L-1, k], the image tokens that top-k chose, or None; `P_hat`, the prompts that
    enter the layers, [L, N, D], or [B, L, N, D] if they are inherited, or None without prompts.
    Of a Swin, with or without prompts, `w`, `Omega` and `P_hat` are lists with such a tensor for each stage."""
    vit, P, rows, P_hat = getattr(model, 'vit', model), getattr(model, 'P', None), [], []
    swin = isinstance(vit, Swin)

    def ask(layer, inputs, options):
        return inputs, options | {'need_weights': True}

    def hook(layer, inputs, outputs):
        rows.append(outputs[1] if swin else outputs[1][:, 1:1 + vit.M])
        P_hat.append(None if P is None else inputs[-1][..., -P[0].shape[-2]:, :])  # [N, D] or [B, N, D]

    layers = getattr(model, 'express', None) or vit.blocks
    hooks = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(hook) for layer in layers]
    try:
        logits = model(images)
    finally:
        for handle in hooks:
            handle.remove()
    rows, P_hat = iter(rows), iter(P_hat)
    L = [n for n, _, _ in vit.sizes] if swin else [vit.L]
    w = [torch.stack([*islice(rows, n)], dim=1) for n in L]
    topk = getattr(model, 'reinforcement', '') == 'topk'
    Omega = [model.choose(x) for x in (*w[:-1], w[-1][:, :-1])] if topk else None
    P_hat = [torch.stack([*islice(P_hat, n)], dim=-3) for n in L] if P is not None else None
    return {'logits': logits} | {name: x if swin or x is None else x[0]
                                 for name, x in (('w', w), ('Omega', Omega), ('P_hat', P_hat))}


def tiles(image, seen, mean, std):
    """An image [1, 3, H, W] as the model gets it and a map for each layer, side by side: uint8 [3, TILE, W]."""
    mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (mean, std))
    picture = ((image[0] * std + mean) * 255).round().clip(0, 255).to('cpu', torch.uint8)
    row, w, Omega = [resize(picture, [TILE, TILE])], seen['w'], seen['Omega']
    stages = w if isinstance(w, list) else [w]  # of a Swin there are several
    for w, Omega in zip(stages, Omega if isinstance(Omega, list) else [Omega] * len(stages)):
        for l, w_l in enumerate(w[0].float().cpu()):
            reinforced = [] if Omega is None or l == Omega.shape[1] else Omega[0, l].tolist()
            row.append(heat_map(row[0], w_l, reinforced))
    return make_grid(torch.stack(row), nrow=len(row), padding=2, pad_value=255)


def heat_map(picture, w, reinforced=()):
    """Attention w [M], relative to its largest, as heat over a picture, uint8 [3, TILE, TILE], from black over
    red and yellow to white; the patches whose numbers are in `reinforced` are outlined."""
    side = round(len(w) ** 0.5)
    w = resize((w / w.max()).view(1, side, side), [TILE, TILE], InterpolationMode.NEAREST)
    heat = torch.cat([(3 * w - i).clip(0, 1) for i in range(3)])  # [3, TILE, TILE]
    drawn = (0.4 * picture + 0.6 * 255 * heat).to(torch.uint8)
    patch = TILE / side
    boxes = torch.tensor([[i % side * patch, i // side * patch, (i % side + 1) * patch - 1, (i // side + 1) * patch - 1]
                          for i in reinforced])
    return draw_bounding_boxes(drawn, boxes, colors='cyan', width=2) if len(boxes) else drawn


def caption(words, row):
    """A white strip as wide as a row, with words at the left of the first tiles: uint8 [3, 18, W]."""
    strip = Image.new('RGB', (row.shape[2], 18), 'white')
    for i, text in enumerate(words):
        ImageDraw.Draw(strip).text((4 + i * (TILE + 2), 1), text, fill='black', font=ImageFont.load_default(14))
    return pil_to_tensor(strip)


# ---- What a run takes each pixel for (--show, --image, 4.4) ------------------------------------------


def show_masks(folders, files, path, device, changes, code):
    """Draw four test pictures of a task, their masks, and beside them the answer of each finished run, and write it to
    path; or, for files of the user's, a run's answer over each of them, in the run's folder."""
    rows, names, tasks = {}, ['picture', 'mask'], set()
    for folder in folders:
        config, classes, model = open_run(folder, device, changes, code)
        tasks.add(config.task)
        if config.source not in data.MASKED or len(tasks) > 1:
            raise InputError(f'{folder}: runs with masks are drawn by themselves, and each task apart')
        for file in files:
            image, place = data.read_image(file, None), folder / f'{Path(file).stem}-mask.png'
            found = answer(model, image, config, device)
            to_pil_image(painted(image, found, len(classes))).save(place)
            say(f'{place}: ' + ', '.join(f'{classes[c]} {(found == c).float().mean():.1%}' for c in found.unique()))
        names.append(f'{config.method}, seed {config.seed}')
        test = [] if files else task_of(config, folder).test
        for i in range(min(4, len(test))):
            image, mask = test[i]
            row = rows.setdefault(i, [image, painted(image, mask, len(classes))])
            row.append(painted(image, answer(model, image, config, device), len(classes)))
    if rows:
        drawn = make_grid([resize(x, [TILE, TILE]) for row in rows.values() for x in row], len(names), pad_value=255)
        to_pil_image(torch.cat([caption(names, drawn), drawn], dim=1)).save(path)
        say(f'pictures, their masks, and the answers of {", ".join(map(str, folders))}: {path}')


def painted(image, mask, n):
    """An image, uint8 [3, H, W], under the colours of n classes: mask [H, W] has their ids."""
    colours = list(COLOURS[:n]) if n <= len(COLOURS) else None  # None: torchvision's
    return draw_segmentation_masks(image, mask == torch.arange(n).view(-1, 1, 1), alpha=0.6, colors=colours)


# ---- Curves ---------------------------------------------------------------------------------------------


COLOURS = '#000000', '#d55e00', '#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9'


def draw_loss(runs, path):
    """Draw the mean loss of each epoch of runs, finished or not."""
    curves = {(*curve_of(config), f'seed {config.seed}'): losses(folder_of(config)) for config in runs}
    epochs = round_numbers(1, max(epoch for curve in curves.values() for epoch, *_ in curve))
    lines(path, 'epoch', 'loss', {x: name for x, name in epochs.items() if '.' not in name}, curves)
    say(f'drawn: {path}')


def losses(folder):
    """The (epoch, mean loss, 0) in a run's log.jsonl. Raises InputError if there is none, or not that in it."""
    if not (content := read(folder / 'log.jsonl')):
        raise InputError(f'{folder}: no epoch of such a run; train it first')
    with suppress(ValueError, KeyError, TypeError):
        records = map(json.loads, content.splitlines())
        found = [(record['epoch'], record['loss'], 0.0) for record in records]
        if all(math.isfinite(epoch + loss) for epoch, loss, _ in found):
            return found
    raise InputError(f'{folder}/log.jsonl is damaged; --again runs it again')


def curve_of(config):
    """What tells a curve from the others in a picture of accuracies: all seeds of a run are one."""
    return config.task, config.model + is_random(vars(config)), config.method


def draw_accuracies(path, name, ticks, found):
    """Print accuracies as a table and draw them. ticks: {x: its text}; found: {curve: {x: accuracies of all seeds}}."""
    say(markdown('task', 'model', 'method', ticks.values()) + '\n' + '| --- ' * (3 + len(ticks)) + '|')
    curves = {}
    for (task, model, method), scores in found.items():
        say(markdown(task, model, f'`{method}`', map(spread, scores.values())))
        percent = [(x, [100 * score for score in row]) for x, row in scores.items() if row]
        curves[task, model, method] = [(x, fmean(row), stdev(row) if len(row) > 1 else 0.0) for x, row in percent]
    lines(path, name, 'accuracy in %, mean and standard deviation over seeds', ticks, curves)
    say(f'drawn: {path}')


def lines(path, x_name, y_name, x_ticks, curves):
    """Draw curves, {(task, model, method, ...): [(x, mean, standard deviation), ...]}, and write them to path as PNG.
    x_ticks: {x: what is written below it}. What all have in common, task or model, is the title."""
    image = Image.new('RGB', (1600, 1000 + 50 * len(curves)), 'white')  # twice as large as the file: smooth lines
    draw = ImageDraw.Draw(image)
    text = partial(draw.text, fill='black', font=ImageFont.load_default(30))
    rows = [row for curve in curves.values() for row in curve]
    y_ticks = round_numbers(min(mean - s for _, mean, s in rows), max(mean + s for _, mean, s in rows))
    x_at, y_at = scale(x_ticks, 200, 1500), scale(y_ticks, 850, 150)
    common = [i < 2 and len(set(names)) == 1 for i, names in enumerate(zip(*curves))]
    text((850, 40), ', '.join(itertools.compress([*curves][0], common)), anchor='mm')
    text((140, 110), y_name, anchor='lm')
    text((850, 950), x_name, anchor='mm')
    for x, name in x_ticks.items():
        draw.line([(x_at(x), 850), (x_at(x), 865)], 'black', 3)
        text((x_at(x), 895), name, anchor='mm')
    for y, name in y_ticks.items():
        draw.line([(140, y_at(y)), (1560, y_at(y))], '#dddddd', 2)
        text((125, y_at(y)), name, anchor='rm')
    draw.line([(140, 150), (140, 850), (1560, 850)], 'black', 3)
    for i, (key, curve) in enumerate(curves.items()):
        colour, below = COLOURS[i % len(COLOURS)], 1000 + 50 * i
        aside = 14 * (i - (len(curves) - 1) / 2) if any(s for *_, s in rows) else 0  # so that no bar hides another
        points = [(x_at(x) + aside, y_at(mean)) for x, mean, _ in curve]
        for (x, _), (_, mean, s) in zip(points, curve):
            draw.line([(x, y_at(mean - s)), (x, y_at(mean + s))], colour, 3)
        for line in points, [(180, below), (250, below), (320, below)]:
            draw.line(line, colour, 5)
            for x, y in line[::1 + len(line) // 20]:
                draw.regular_polygon((x, y, 13), (30, 4, 3)[i % 3], 0, (colour, 'white')[i // 3 % 2], colour, 4)
        text((350, below), ', '.join(itertools.compress(key, [not x for x in common])), anchor='lm')
    image.reduce(2).save(path)


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
