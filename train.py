"""Train a method on a task, in a plain loop.

    python train.py                      tune a nano ViT on pictures of shapes; needs no download
    python train.py --task pets          the paper's Pets experiment
    python train.py --task pets --method vpt --set lr=0.5 epochs=20
    python train.py --task natural --method vpt,ivpt --seed 0,1,2 --search      a sweep: search, train, test
    python train.py --report --task natural         what has been run, beside the paper's tables
    python train.py --show --method vpt,ivpt        draw where their class tokens look
    python train.py --task pets --image cat.jpg     what a trained run takes a photo for

All settings are in configs.yaml. Results go to runs/TASK/METHOD/seedS/: log.jsonl (a line an epoch), params.pth
(what was trained, without the backbone), result.json (with the settings), and the last two epochs' checkpoints.
The same command again goes on where a run was interrupted, and does not repeat what is finished.
"""

import argparse
import difflib
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import suppress
from itertools import count, product
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
import yaml
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

import data
import ivpt
import vit
from vit import InputError

HERE = Path(__file__).resolve().parent

# ---- The loop -------------------------------------------------------------------------------------------


def train(model, optimizer, pictures, config, device, done=0):
    """Train what the optimizer holds, after `done` epochs; after each yield its loss, learning rate and images/s.

    Every random number depends on the seed and the epoch alone, so that an interruption changes nothing.
    Raises FloatingPointError at the first step whose loss is not finite, before it changes anything, and
    after an epoch whose last step made a parameter so."""
    steps = math.ceil(len(pictures) / config.batch)  # of an epoch
    for epoch in range(done, config.epochs):
        torch.manual_seed(1_000_003 * config.seed + epoch)
        model.train()
        start, total = time.perf_counter(), 0.0
        for step, (images, labels) in enumerate(data.batches(pictures, config, device, epoch)):
            lr = config.lr * schedule(epoch * steps + step, config.epochs * steps, config.warmup)
            for group in optimizer.param_groups:
                group['lr'] = lr
            with autocast(device, config):
                loss = F.cross_entropy(model(images), labels)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f'the loss is {value} in epoch {epoch + 1}, step {step + 1}')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += value * len(labels)
            live(f'epoch {epoch + 1}, step {step + 1}/{steps}, loss {value:.4f}')
        if not all(p.isfinite().all() for group in optimizer.param_groups for p in group['params']):
            raise FloatingPointError(f'a parameter is not finite after epoch {epoch + 1}')
        seconds = time.perf_counter() - start
        yield {'epoch': epoch + 1, 'loss': total / len(pictures), 'lr': lr, 'seconds': seconds,
               'images_per_second': len(pictures) / seconds}


def schedule(step, steps, warmup):
    """The learning rate's factor at a step, counted from 0: linear up to 1 over the first part `warmup` of
    the steps, then half a cosine towards 0 (4.1)."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def make_optimizer(model, config):
    """SGD with momentum (4.1), or AdamW for training from random weights, of all that requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == 'SGD':
        return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def autocast(device, config):
    """bfloat16 on a GPU, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and device.type == 'cuda')


@torch.no_grad()
def accuracy(model, pictures, config, device, noise=0.0):
    """Part of the pictures whose largest logit is that of their class, 0 to 1.

    noise: proportion of Gaussian noise, mean 0 and standard deviation 1, that normalised images are mixed with, the
    same for every model (Figures 4 and 6; the paper does not say how it mixes)."""
    model.eval()
    right, generator = 0, torch.Generator().manual_seed(0)
    for images, labels in data.batches(pictures, config, device):
        if noise:
            images = (1 - noise) * images + noise * torch.randn(images.shape, generator=generator).to(device)
        with autocast(device, config):
            right += (model(images).argmax(dim=1) == labels).sum().item()
    return right / len(pictures)


# ---- One run --------------------------------------------------------------------------------------------


def make_model(config, classes):
    """The backbone with its weights and what the method tunes; the rest requires no gradient."""
    torch.manual_seed(config.seed)
    whole, weights = config.tune != 'prompts', config.weights or None
    if weights and not Path(weights).exists() and (HERE / weights).exists():
        weights = HERE / weights  # comes with this project
    model = vit.build(config.model, weights, classes if whole else 0, config.img_size, config.readout)
    if not whole:
        return ivpt.IVPT(model, classes, config.N, config.k, config.structure, config.aggregation,
                         config.reinforcement)
    if config.tune == 'head':
        model.requires_grad_(False).head.requires_grad_(True)
    if config.tune == 'bias':  # BitFit (Zaken et al., 2022)
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith('.bias') or name.startswith('head.'))
    return model


def find_device():
    """A GPU where there is one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def trained(model):
    """What the method tunes, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def run(config, again=False):
    """Train and test one method on one task with one seed, write the run's folder, return the result.

    What an earlier process finished is not run again, and where it was interrupted it goes on, unless `again`."""
    folder = folder_of(config)
    if not again and (result := read_result(folder)):
        same_settings(result['config'], config, folder)
        say(f'{folder}: finished before, {100 * result["accuracy"]:.2f}%; --again runs it again')
        return result
    device = find_device()
    task = data.load(config)
    model = make_model(config, len(task.classes)).to(device)
    optimizer = make_optimizer(model, config)
    learn, score = (task.train + task.val, task.test) if config.score_on == 'test' else (task.train, task.val)
    if not len(learn) or not len(score):
        raise InputError(f'{len(learn)} images to train on and {len(score)} of {config.score_on} to score: look at '
                         'n_train and n_val, and at the lists of the data set')
    header(config, task, model, device)
    records = [] if again else resume(folder, model, optimizer, config, device)
    live(f'decoding {len(learn)} + {len(score)} images')
    learn = data.in_memory(learn, config, device)
    for pictures in (learn, score):
        data.check(pictures, config)
    if again:
        start_over(folder)
    try:
        for record in train(model, optimizer, learn, config, device, len(records)):
            records.append(record)
            save(folder, model, optimizer, records, config, device)
            left = sum(r['seconds'] for r in records) / len(records) * (config.epochs - len(records))
            say('epoch {epoch:3d}/{epochs}  loss {loss:.4f}  lr {lr:.4g}  {images_per_second:.0f} images/s  '
                '{left} left'.format(**record, epochs=config.epochs, left=clock(left)))
        return finish(model, score, task.classes, config, records, device)
    except FloatingPointError as error:
        raise Diverged(f'{error}. {kept(folder, records)}. Lower the learning rate: '
                       f'--set lr={config.lr / 4:g}') from None
    except KeyboardInterrupt as stop:
        where = f'in epoch {len(records) + 1} of {config.epochs}' if len(records) < config.epochs else 'while testing'
        stop.where = f'{where}. {kept(folder, records)}; the same command goes on from there'
        raise


class Diverged(InputError):
    """The learning rate is too high."""


def finish(model, score, classes, config, records, device):
    """Score the model as the last epoch left it; print, write and return the result."""
    folder = folder_of(config)
    params = io.BytesIO()
    torch.save({name: p.to('cpu', getattr(torch, config.save_dtype)) for name, p in trained(model).items()}, params)
    result = {'task': config.task, 'method': config.method, 'seed': config.seed, 'score_on': config.score_on,
              'accuracy': accuracy(model, score, config, device), 'images': len(score),
              'trained_parameters': sum(p.numel() for p in trained(model).values()),
              'final_loss': records[-1]['loss'], 'seconds': sum(record['seconds'] for record in records),
              'classes': classes, 'config': vars(config), 'params_digest': digest(params.getvalue()),
              **environment(device)}
    write(folder / 'params.pth', params.getvalue())
    write_result(folder, result)
    paper = config.paper_accuracy if config.score_on == 'test' else 0
    say(f'{config.score_on} accuracy after the last epoch: {100 * result["accuracy"]:.2f}% of {len(score)} images'
        f'{f"; the paper: {paper}%" if paper else ""}. {folder}\n')
    return result


def environment(device):
    """What the bits of a result depend on beside the settings."""
    return {'device': str(device), 'threads': torch.get_num_threads(), 'torch': str(torch.__version__),
            'torchvision': torchvision.__version__}


def kept(folder, records):
    """Where the epochs that are done can be found."""
    return f'Epoch {len(records)} is kept in {folder}' if records else 'No epoch was done yet'


def header(config, task, model, device):
    """Say what is about to be trained, on what, with what."""
    parts = trained(model)
    count, frozen = sum(p.numel() for p in parts.values()), sum(p.numel() for p in model.parameters())
    sizes = ', '.join(f'{name} {list(p.shape)}' for name, p in parts.items())
    sizes = sizes if len(parts) < 6 else f'{len(parts)} tensors'
    paper = f'; the paper, mean over VTAB-1k: {config.paper_params:.2f}M' if config.paper_params else ''
    table_18 = f' (the paper: {config.paper_backbone_params:g}M)' if config.paper_backbone_params else ''
    say(f'task      {config.task}: {len(task.train)} + {len(task.val)} images for training and validation, '
        f'{len(task.test)} for testing, {len(task.classes)} classes')
    for note in task.notes:
        say(f'          {note}')
    say(f'backbone  {config.model} at {config.img_size} pixels, {frozen / 1e6:.2f}M parameters in all'
        f'{table_18}, weights {config.weights or "random"}')
    say(f'method    {config.method}, seed {config.seed}: {count / 1e6:.3f}M trained ({sizes}){paper}')
    say('device    {device}{bf16}, {threads} threads, torch {torch}, torchvision {torchvision}'.format(
        **environment(device), bf16=' in bfloat16' if config.bf16 and device.type == 'cuda' else ''))


def clock(seconds):
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def live(line):
    """On a terminal, show a line that the next one overwrites."""
    if sys.stdout.isatty():
        print(f'\r{line:<79}', end='', flush=True)


def say(line):
    """Print a line, over a live one if there is one."""
    print(f'\r{line:<79}' if sys.stdout.isatty() else line, flush=True)


# ---- The files of a run: whole at every moment, and found out if they are not -----------------------------

CHECKPOINTS = ('checkpoint-0.pth', 'checkpoint-1.pth')  # after an even and an odd number of epochs
FREE = {'data', 'runs', 'point', 'workers', 'cache_gb', 'grid', 'paper_accuracy', 'paper_params',
        'paper_backbone_params'}  # settings that change no number of a run


def folder_of(config):
    """Where a run writes."""
    return Path(config.runs) / config.task / config.method / f'seed{config.seed}' / config.point


def digest(content):
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write(path, content):
    """Put bytes into a file that is there wholly or not at all, whatever happens on the way."""
    part = path.with_name(f'{path.name}.{os.getpid()}.{time.monotonic_ns()}.part')  # of this process alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(f'{path} cannot be written ({error.strerror}); what was there before is whole. Make room, or '
                      'choose another folder with --set runs=DIR, and give the same command again') from None
    finally:
        with suppress(OSError):  # it has its name by now, or there never was one
            part.unlink()


def read(path):
    """The bytes of a file; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def save(folder, model, optimizer, records, config, device):
    """Write a checkpoint: its digest, then all that the next epoch depends on. The one before stays."""
    file = io.BytesIO()
    torch.save({'config': vars(config), 'environment': environment(device), 'records': records,
                'trained': trained(model), 'optimizer': optimizer.state_dict()}, file)
    write(folder / CHECKPOINTS[len(records) % 2], digest(file.getvalue()).encode() + file.getvalue())
    write_log(folder, records)


def write_log(folder, records):
    """Write log.jsonl: a line an epoch."""
    write(folder / 'log.jsonl', ''.join(json.dumps(record) + '\n' for record in records).encode())


def read_checkpoint(path, config):
    """What `save` wrote; None if it is not there, or is damaged or of another run and so was set aside."""
    if (content := read(path)) is None:
        return None
    if digest(content[64:]).encode() != content[:64]:
        return set_aside(path, 'damaged')
    checkpoint = torch.load(io.BytesIO(content[64:]), map_location='cpu', weights_only=True)
    if any(checkpoint['config'][name] != getattr(config, name) for name in ('task', 'method', 'seed')):
        return set_aside(path, 'of another run')
    return checkpoint


def resume(folder, model, optimizer, config, device):
    """Put model and optimizer where the newest whole checkpoint left them; return the records of its epochs."""
    found = [checkpoint for name in CHECKPOINTS if (checkpoint := read_checkpoint(folder / name, config))]
    if not found:
        return []
    newest = max(found, key=lambda checkpoint: len(checkpoint['records']))
    same_settings(newest['config'], config, folder)
    then, now = ({name: x.shape for name, x in tensors.items()} for tensors in (newest['trained'], trained(model)))
    if then != now:
        raise InputError(f'{folder} was begun with a model of other sizes; is the data set the same? --again starts '
                         'over')
    model.load_state_dict(newest['trained'], strict=False)
    optimizer.load_state_dict(newest['optimizer'])
    say(f'resumed   after epoch {len(newest["records"])} of {config.epochs}, from {folder}')
    if changed := differences(newest['environment'], environment(device)):
        say(f'          with {changed}: not the same bits as without an interruption')
    write_log(folder, newest['records'])  # it may have been stopped between the two files
    return newest['records']


def start_over(folder):
    """Remove what an earlier process left of a run."""
    names = 'result.json', 'params.pth', 'log.jsonl', *CHECKPOINTS
    for path in (*(folder / name for name in names), *folder.glob('*.part')):
        path.unlink(missing_ok=True)


def differences(old, new):
    """In words, what changed from one dict of settings to another; '' if nothing that counts did."""
    return ', '.join(f'{key} {old.get(key)!r} -> {new.get(key)!r}' for key in sorted((old.keys() | new.keys()) - FREE)
                     if old.get(key) != new.get(key))


def same_settings(old, config, folder):
    """Raise InputError if a run was begun with settings that would give other numbers."""
    if changed := differences(old, vars(config)):
        raise InputError(f'{folder} was begun with other settings: {changed}. Give those to go on, --again to start '
                         'over, or another folder with --set runs=DIR')


def set_aside(path, why):
    """Rename a file that cannot be used, and say so. Returns None."""
    aside = next(aside for n in count(1) if not (aside := path.with_name(f'{path.name}.damaged{n}')).exists())
    path.replace(aside)
    say(f'{path} is {why}: set aside as {aside.name}')


def write_result(folder, result):
    """Write result.json with a digest of its own content."""
    result['digest'] = digest(json.dumps(result | {'digest': ''}).encode())
    write(folder / 'result.json', (json.dumps(result, indent=1) + '\n').encode())


def read_result(folder):
    """What `write_result` wrote; None if there is none, or it is damaged and so was set aside."""
    if (content := read(folder / 'result.json')) is None:
        return None
    try:
        result = json.loads(content)
        if result['digest'] == digest(json.dumps(result | {'digest': ''}).encode()):
            return result
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return set_aside(folder / 'result.json', 'damaged')


# ---- Many runs ------------------------------------------------------------------------------------------


def run_all(runs, again, searching):
    """Run one after another. What is wrong with one (data that is not there, a rate too high) is said once, and the
    next has its turn; a file that cannot be written ends them all. Returns results and exit status."""
    results, best, said = [], {}, set()
    for config in runs:
        try:
            if searching:
                key = config.task, config.method  # its other seeds take what the first found
                best[key] = best.get(key) or search(config, again)
                config = SimpleNamespace(**vars(config) | best[key])
            results.append(run(config, again))
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            if str(error) not in said:
                complain(error)
            said.add(str(error))
    return results, 2 if said else 0


def search(config, again=False):
    """VPT's protocol: train on `train`, score on `val`, at each point of the grid. Returns the best point's settings.

    Ties go to the smaller learning rate. All scores are printed and written to search.json."""
    scores = []
    for values in product(*config.grid.values()):
        point = dict(zip(config.grid, values))
        where = {'score_on': 'val', 'point': f'search/{",".join(f"{name}={value}" for name, value in point.items())}'}
        try:
            score = run(SimpleNamespace(**vars(config) | point | where), again)['accuracy']
        except Diverged as error:
            say(str(error))
            score = None
        scores.append((point, score))
    scores.sort(key=lambda row: (-1 if row[1] is None else row[1], -row[0].get('lr', 0)), reverse=True)
    rows = [point | {'accuracy': score} for point, score in scores]
    write(folder_of(config) / 'search.json', json.dumps(rows, indent=1).encode())
    say(f'search    {config.task}, {config.method}, seed {config.seed}: accuracy on the validation images')
    for point, score in scores:
        say(f'          {point}: {"diverged" if score is None else f"{100 * score:.2f}%"}')
    if scores[0][1] is None:
        raise Diverged(f'{folder_of(config)}: every point of the grid diverged; give it lower rates: '
                       '--set grid="{lr: [...]}"')
    return scores[0][0]


def columns(configs, names):
    """Tasks, and after the tasks of a group the group, as the columns of a report: names may be of both."""
    return [column for name in names for column in (*columns(configs, configs['groups'].get(name, ())), name)]


def tasks_of(configs, names):
    """The tasks that names of tasks and groups stand for."""
    return [name for name in columns(configs, names) if name not in configs['groups']]


def spread(values):
    """Mean ± standard deviation, in %, of what there is; '' of nothing."""
    values = [100 * value for value in values if value is not None]
    return f'{fmean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '') if values else ''


def report(configs, folder, names=None, methods=None, seeds=None):
    """Print, in Markdown and the layout of Table 10, the test accuracies of finished runs, and under each method the
    paper's with the difference. A group is the mean of its members, and empty as long as one is missing.

    names: of tasks and groups. Names, methods and seeds are those that have been run where they are not given."""
    there = [path.parts[-4:-2] for path in folder.glob('*/*/seed*/result.json')]  # task and method
    names = names or [name for name in configs['tasks'] if name in {task for task, _ in there}]
    methods = methods or [name for name in configs['methods'] if name in {method for _, method in there}]
    results = {}
    for task, method, seed in product(tasks_of(configs, names), methods, seeds or '*'):
        for file in sorted((folder / task / method).glob(f'seed{seed}/result.json')):
            if (result := read_result(file.parent)) and result['score_on'] == 'test':
                results[task, method, result['seed']] = result
    seeds = sorted({seed for *_, seed in results})

    def value(name, method, seed):
        if name in configs['groups']:
            members = [value(member, method, seed) for member in configs['groups'][name]]
            return None if None in members or not members else fmean(members)
        return results[name, method, seed]['accuracy'] if (name, method, seed) in results else None

    shown = columns(configs, names)
    say(markdown('method', 'trained', shown) + '\n' + '| --- ' * (2 + len(shown)) + '|')
    for method in methods:
        sizes = [result['trained_parameters'] / 1e6 for (_, name, _), result in results.items() if name == method]
        ours = [[x for seed in seeds if (x := value(name, method, seed)) is not None] for name in shown]
        paper = [configs['paper'].get(name, {}).get(method) for name in shown]
        say(markdown(f'`{method}`', f'{fmean(sizes):.3f}M' if sizes else '', map(spread, ours)))
        if any(paper):
            published = configs['methods'][method].get('paper_params')
            say(markdown('the paper', f'{published:.2f}M' if published else '', (x or '' for x in paper)))
            more = (f'{100 * fmean(x) - y:+.1f}' if x and y else '' for x, y in zip(ours, paper))
            say(markdown('difference', '', more))
    for (task, method, seed), result in results.items():
        first = next(r for (t, m, _), r in results.items() if (t, m) == (task, method))['config']
        if changed := differences(first | {'seed': seed}, result['config']):
            say(f'{task}, {method}: seeds {first["seed"]} and {seed} differ in more than the seed: {changed}')


def markdown(*cells):
    """A row of a Markdown table: texts, and lists of them."""
    return '| ' + ' | '.join(str(x) for cell in cells for x in ([cell] if isinstance(cell, str) else cell)) + ' |'


def with_noise(runs, rates):
    """Test finished runs on images that are mixed with noise (Figures 4 and 6), add the accuracies to their results,
    and print them, method by method."""
    device, found = find_device(), {}
    for config in runs:
        folder = folder_of(config)
        stored, _, model = open_run(folder, device)
        test, result = data.load(SimpleNamespace(**vars(stored) | {'data': config.data})).test, read_result(folder)
        scores = {str(rate): accuracy(model, test, stored, device, rate) for rate in rates}
        write_result(folder, result | {'noise': result.get('noise', {}) | scores})
        found.setdefault((config.task, config.method), []).append(scores.values())
    say(markdown('task', 'method', rates) + '\n' + '| --- ' * (2 + len(rates)) + '|')
    for (task, method), scores in found.items():
        say(markdown(task, f'`{method}`', map(spread, zip(*scores))))


# ---- Looking at a run (Figure 7) -----------------------------------------------------------------------

TILE = 112  # pixels of a picture and of a map


def show(folders, files, path, device):
    """Draw where the class token looks in each layer, a row an image and run, and write it to path as PNG.

    folders: of finished runs. files: images of the user's, whose likely classes are printed; without any,
    four test images of the task."""
    rows = []
    for folder in folders:
        config, classes, model = open_run(Path(folder), device)
        pictures = [(data.read_image(file, data.resized(config)), -1) for file in files]
        if not files:
            test = data.load(config).test
            pictures = [test[i] for i in range(min(4, len(test)))]
        for i, (image, label) in enumerate(pictures):
            image = next(data.batches([(image, label)], config, device))[0]
            seen = ivpt.look(model, image)
            p, best = seen['logits'][0].float().softmax(dim=0).topk(min(5, len(classes)))
            truth = f', in truth {classes[label]}' if label >= 0 else ''
            row = tiles(image, seen, config)
            rows.append((i, caption([f'{config.method}: {classes[best[0]]}{truth}'], row), row))
            if files:
                say(f'{files[i]}, by {folder}: ' + ', '.join(f'{classes[c]} {100 * x:.1f}%' for x, c in zip(p, best)))
    if len({row.shape for *_, row in rows}) > 1:
        raise InputError('runs of models with different numbers of layers do not fit one picture: --show them apart')
    rows.sort(key=lambda row: row[0])  # the runs of an image stand together
    head = caption(['image'] + [f'layer {l}' for l in range(len(seen['w'][0]))], row)
    strips = [head] + [strip for _, *row in rows for strip in row]
    to_pil_image(torch.cat(strips, dim=1)).save(path)
    say(f"the class token's attention in each layer, and outlined what AR reinforces after it: {path}")


def open_run(folder, device):
    """The settings, the names of the classes and the model of a finished run."""
    result = read_result(folder)
    if not result:
        raise InputError(f'{folder}: no finished run; train it first')
    if digest(read(folder / 'params.pth') or b'') != result['params_digest']:
        raise InputError(f'{folder}/params.pth is not what result.json beside it was measured with; --again trains '
                         'anew')
    config, classes = SimpleNamespace(**result['config']), result['classes']
    model = make_model(config, len(classes)).to(device).eval()
    model.load_state_dict(vit.read_state_dict(folder / 'params.pth'), strict=False)
    return config, classes, model


def tiles(image, seen, config):
    """An image [1, 3, H, W] as the model gets it and a map for each layer, side by side: uint8 [3, TILE, W]."""
    mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (config.mean, config.std))
    picture = ((image[0] * std + mean) * 255).round().clip(0, 255).to('cpu', torch.uint8)
    row = [resize(picture, [TILE, TILE])]
    for l, w in enumerate(seen['w'][0].float().cpu()):
        reinforced = [] if seen['Omega'] is None or l == len(seen['Omega'][0]) else seen['Omega'][0, l].tolist()
        row.append(heat_map(row[0], w, reinforced))
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


# ---- Settings -------------------------------------------------------------------------------------------


def settings(configs, task, method=None, model=None, changes=None):
    """The settings of each run of a task, a list with one for each method and seed that is named.

    configs: configs.yaml as read. method, model, changes: what the command line says instead of it; the
    order is on top of that file. Raises InputError for a name that is not known, or a value that is wrong."""
    defaults, changes = configs['defaults'], changes or {}
    of_task = entry(configs, 'tasks', task)
    model = model or of_task.get('model', defaults['model'])
    of_model = configs['models'].get(model, {})
    runs = []
    for name in dict.fromkeys(str(method or of_task.get('method', defaults['method'])).split(',')):
        config = dict(defaults)
        for where, layer in ((f'models: {model}', of_model), (f'tasks: {task}', of_task),
                             (f'methods: {name}', entry(configs, 'methods', name)), ('--set', changes)):
            config |= {key: checked(key, value, defaults, where) for key, value in layer.items()}
        config |= {'task': task, 'method': name, 'model': model, 'point': '',
                   'paper_accuracy': configs['paper'].get(task, {}).get(name, 0.0)}
        config['img_size'] = config['img_size'] or vit.parse_name(model)[2]
        runs.append(SimpleNamespace(**config))
    return runs


def entry(configs, section, name):
    """An entry of configs.yaml by name."""
    if name not in configs[section]:
        raise InputError(f'unknown {section[:-1]} {name!r}{nearest(name, configs[section])}')
    return configs[section][name]


def nearest(name, known):
    """What may have been meant, and what there is."""
    close = difflib.get_close_matches(str(name), known, n=1) if len(str(name)) < 100 else []
    return f': did you mean {close[0]!r}?' if close else f': one of {", ".join(known)}'


# What a number has to be. Every other one has only a type.
RANGES = {'lr': (1e-12, 1e6), 'weight_decay': (0, 1e6), 'momentum': (0, 1), 'warmup': (0, 0.99),
          'epochs': (1, 10 ** 6), 'batch': (1, 10 ** 6), 'workers': (0, 1024), 'seed': (0, 2 ** 31),
          'classes': (0, 10 ** 6), 'n_train': (1, 10 ** 8), 'n_val': (0, 10 ** 8), 'n_test': (1, 10 ** 8),
          'img_size': (0, 10 ** 4), 'noise': (0, 1e4), 'n_shapes': (1, 6), 'cache_gb': (0, 1e6),
          'N': (-1000, 1000), 'k': (-10 ** 6, 10 ** 6), 'paper_params': (0, 1e6), 'paper_backbone_params': (0, 1e6)}
CHOICES = {'tune': ('prompts', 'bias', 'head', 'all'), 'score_on': ('test', 'val'),
           'augment': ('crop_flip', 'none'), 'optimizer': ('SGD', 'AdamW'), 'save_dtype': ('float32', 'float16'),
           'structure': ivpt.STRUCTURES, 'reinforcement': ivpt.REINFORCEMENTS, 'source': tuple(data.SOURCES),
           'torchvision': ('', *data.TORCHVISION), 'aggregation': (False, True), 'bf16': (False, True)}
TEXTS = ('task', 'method', 'model', 'data', 'runs', 'weights', 'dir', 'images', 'ask')


def shown(value):
    """A value in a message, not too long."""
    try:
        return repr(value)[:100]
    except ValueError:  # Python prints no number of more than 4,300 digits
        return 'so large a number'


def checked(key, value, defaults, where):
    """A setting's value in the type of its default. Raises InputError if it cannot be one."""
    if key not in defaults:
        raise InputError(f'{where}: unknown setting {shown(key)}{nearest(key, defaults)}')
    kind = type(defaults[key])
    if kind is str and value is None:  # --set weights=
        value = ''
    if kind is float and type(value) in (int, str):  # YAML takes 1e-3 for a word
        with suppress(ValueError, OverflowError):
            value = float(value)
    low, high = RANGES.get(key, (-math.inf, math.inf))
    if type(value) is not kind:
        wrong = f'is a {kind.__name__}, as {shown(defaults[key])}'
    elif key in RANGES and not low <= value <= high:
        wrong = f'goes from {low:g} to {high:g}'
    elif key in CHOICES and value not in CHOICES[key]:
        wrong = f'is one of {", ".join(map(str, CHOICES[key]))}'
    elif key in TEXTS and not value.isprintable():
        wrong = 'is a text without line ends and control characters'
    elif key in ('mean', 'std') and not (len(value) == 3 and all(
            type(x) in (int, float) and abs(x) < 1e6 and (x > 0 or key == 'mean') for x in value)):
        wrong = 'is three numbers, one a colour, and std is positive'
    elif key == 'grid' and not (
            value and all(isinstance(x, list) and x and name not in TEXTS for name, x in value.items())):
        wrong = f'is a list of values for each setting, as {shown(defaults[key])}'
    elif key == 'grid':
        return {name: [checked(name, x, defaults, where) for x in values] for name, values in value.items()}
    else:
        return value
    raise InputError(f'{where}: {key} {wrong}, not {shown(value)}')


def read_yaml(text, where):
    """YAML without code in it; InputError if it is not YAML."""
    try:
        return yaml.load(text, Plain)
    except Exception as error:  # PyYAML's constructors raise what int(), date() and their like raise
        raise InputError(f'{where}: not YAML: {error or type(error).__name__}') from None


class Plain(yaml.SafeLoader):
    """YAML without *aliases: ten lines of them are a value of gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError('write the value out in place of the alias *' + self.peek_event().anchor)
        return super().compose_node(parent, index)


def read_configs():
    """configs.yaml. Raises InputError if something in it is missing, of another type or out of its range."""
    try:
        configs = read_yaml((HERE / 'configs.yaml').read_text(encoding='utf-8'), 'configs.yaml')
        defaults = configs['defaults']
        for name in (*RANGES, *CHOICES, *TEXTS, 'mean', 'std', 'grid'):
            checked(name, defaults[name], defaults, 'configs.yaml: defaults')
        for task, method in product(tasks_of(configs, [*configs['tasks'], *configs['groups']]), configs['methods']):
            if not all(re.fullmatch(r'\w[\w.+-]*', name) for name in (task, method)):  # they are names of folders
                raise InputError(f'configs.yaml: {shown(task)}, {shown(method)}: names have letters, digits, . _ + -')
            settings(configs, task, method)
        for model in configs['models']:
            settings(configs, defaults['task'], defaults['method'], model)
        figures = [x for row in configs['paper'].values() for x in row.values()]
        if not all(type(x) in (int, float) and 0 <= x <= 100 for x in figures):
            raise InputError('configs.yaml: paper: an accuracy goes from 0 to 100')
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError('configs.yaml: something in it is missing or misplaced '
                         f'({type(error).__name__}: {error})') from None
    return configs


class Parser(argparse.ArgumentParser):
    """argparse that leaves the last word to main."""

    def error(self, message):
        raise InputError(f'{message}; python train.py --help lists what there is')


def arguments(argv):
    """The command line, parsed, with the settings that it changes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', help='an entry of tasks in configs.yaml, or several: A,B')
    parser.add_argument('--method', help='an entry of methods, or several: ivpt,vpt')
    parser.add_argument('--model', help="an entry of models, or a name such as vit_small_patch14_224")
    parser.add_argument('--seed', help='a number, or several: 0,1,2')
    parser.add_argument('--weights', help='path or URL of a checkpoint: .pth, .pt, .bin, .tar, .safetensors or .npz')
    parser.add_argument('--data', help='folder of the data sets')
    parser.add_argument('--set', nargs='+', default=[], metavar='NAME=VALUE', action='extend',
                        help='any setting of configs.yaml')
    parser.add_argument('--search', action='store_true', help='search the grid on the validation images first')
    parser.add_argument('--report', action='store_true', help='a table of what has been run, beside the paper')
    parser.add_argument('--noise', metavar='RATES', help='test finished runs on noisy images: 0,0.1,0.2')
    parser.add_argument('--show', action='store_true', help='draw the attention of finished runs (Figure 7)')
    parser.add_argument('--run', metavar='DIR', help='with --show or --image: the folder of the run')
    parser.add_argument('--image', nargs='+', default=[], metavar='FILE', action='extend',
                        help='classify these images by a finished run, and draw its attention')
    parser.add_argument('--again', action='store_true', help='start over what is finished or was interrupted')
    args = parser.parse_args(argv)
    changes = {}
    for change in args.set:
        name, equals, value = change.partition('=')
        if not equals:
            raise InputError(f'--set takes NAME=VALUE, not {change!r}')
        if name in ('task', 'method', 'model'):
            raise InputError(f'--set {change}: write --{name} {value}')
        changes[name] = read_yaml(value, f'--set {name}')
    return args, changes | {name: value for name in ('weights', 'data') if (value := getattr(args, name)) is not None}


def main(argv=None):
    """Do what the command line asks for. Returns the exit status; what the user got wrong is one line."""
    try:
        args, changes = arguments(argv)
        return command(args, changes, read_configs())
    except (InputError, OSError, torch.cuda.OutOfMemoryError) as error:  # an OSError names its file
        complain(error)
        return 2
    except KeyboardInterrupt as stop:
        complain(f'stopped {getattr(stop, "where", "while nothing was training; what is finished is kept")}')
        return getattr(stop, 'status', 130)


def command(args, changes, configs):
    """Report, draw, test or train, by the command line's arguments and the settings that it changes."""
    names = (configs['defaults']['task'] if args.task is None else args.task).split(',')
    seeds = [checked('seed', read_yaml(seed, '--seed'), configs['defaults'], '--seed')
             for seed in dict.fromkeys(args.seed.split(',') if args.seed is not None else ())]
    if args.report:
        folder = Path(checked('runs', changes.get('runs', configs['defaults']['runs']), configs['defaults'], '--set'))
        methods = args.method and args.method.split(',')
        for section, known in (('tasks', tasks_of(configs, names)), ('methods', methods or ())):
            for name in known:
                entry(configs, section, name)
        report(configs, folder, args.task and names, methods, seeds)
        return 0
    each = [{'seed': seed} for seed in seeds] or [{}]
    runs = [config for task, seed in product(dict.fromkeys(tasks_of(configs, names)), each)
            for config in settings(configs, task, args.method, args.model, changes | seed)]
    if args.noise is not None:
        rates = [read_yaml(rate, '--noise') for rate in args.noise.split(',')]
        if not all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates):
            raise InputError(f'--noise takes proportions from 0 to 1, as 0,0.1,0.2, not {args.noise!r}')
        with_noise(runs, rates)
    elif args.show or args.image:
        folders = [Path(args.run)] if args.run else [folder_of(config) for config in runs]
        show(folders, args.image, (folders[0] if len(folders) == 1 else folders[0].parents[1]) / 'attention.png',
             find_device())
    else:
        results, status = run_all(runs, args.again, args.search)
        for result in results if len(results) > 1 else []:
            say(f'{result["task"]:16} {result["method"]:12} seed {result["seed"]}  {100 * result["accuracy"]:6.2f}%  '
                f'{result["trained_parameters"] / 1e6:.3f}M trained  {clock(result["seconds"])}')
        return status
    return 0


def complain(what):
    """One line for the user."""
    if isinstance(what, torch.cuda.OutOfMemoryError):
        what = ('the GPU has too little memory: take smaller batches (--set batch=8), leave the pictures in their '
                'files (--set cache_gb=0), or take a smaller model; --again starts a run over')
    line = ''.join(c if c.isprintable() else '?' for c in ' '.join(str(what).split()))
    print(f'train.py: {line}', file=sys.stderr, flush=True)


def terminate(number, frame):
    """A signal's handler: SIGTERM ends a run as Ctrl-C does, with a status that tells them apart."""
    stop = KeyboardInterrupt()
    stop.status = 128 + number
    raise stop


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, terminate)
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python train.py | head` ends as other commands do
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # `>&-`
    sys.stdout.reconfigure(errors='backslashreplace')  # not every file's name, and not every terminal, is UTF-8
    sys.exit(main())
