"""Train a method on a task, in a plain loop.

    python train.py                      tune a nano ViT on pictures of shapes; needs no download
    python train.py --task pets          the paper's Pets experiment
    python train.py --task pets --method vpt --set lr=0.5 epochs=20

All settings are in configs.yaml. Results go to runs/TASK/METHOD/seedS/: config.yaml, log.jsonl (a line an
epoch), params.pth (what was trained, without the backbone) and result.json.
"""

import argparse
import difflib
import json
import math
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
import yaml

import data
import ivpt
import vit
from vit import InputError

HERE = Path(__file__).resolve().parent

# ---- The loop -------------------------------------------------------------------------------------------


def train(model, pictures, config, device):
    """Train what requires a gradient; after each epoch yield its loss, learning rate and images/s.

    Raises FloatingPointError at the first step whose loss is not finite, before it changes anything, and
    after an epoch whose last step made a parameter so."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config)
    steps = math.ceil(len(pictures) / config.batch)  # of an epoch
    for epoch in range(config.epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        for step, (images, labels) in enumerate(data.batches(pictures, config, device, epoch)):
            lr = config.lr * schedule(epoch * steps + step, config.epochs * steps, config.warmup)
            for group in optimizer.param_groups:
                group['lr'] = lr
            with autocast(device, config):
                loss = F.cross_entropy(model(images), labels)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f'the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            live(f'epoch {epoch + 1}, step {step + 1}/{steps}, loss {loss.item():.4f}')
        if not all(p.isfinite().all() for p in parameters):
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


def make_optimizer(parameters, config):
    """SGD with momentum (4.1), or AdamW for training from random weights."""
    if config.optimizer == 'SGD':
        return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def autocast(device, config):
    """bfloat16 on a GPU, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and device.type == 'cuda')


@torch.no_grad()
def accuracy(model, pictures, config, device):
    """Part of the pictures whose largest logit is that of their class, 0 to 1."""
    model.eval()
    right = 0
    for images, labels in data.batches(pictures, config, device):
        with autocast(device, config):
            right += (model(images).argmax(dim=1) == labels).sum().item()
    return right / len(pictures)


# ---- One run --------------------------------------------------------------------------------------------


def make_model(config, classes):
    """The backbone with its weights and what the method tunes; the rest requires no gradient."""
    torch.manual_seed(config.seed)
    whole = config.tune != 'prompts'
    model = vit.build(config.model, config.weights or None, classes if whole else 0, config.img_size)
    if not whole:
        return ivpt.IVPT(model, classes, config.N, config.k, config.structure, config.aggregation,
                         config.reinforcement)
    if config.tune == 'head':
        model.requires_grad_(False).head.requires_grad_(True)
    return model


def trained(model):
    """What the method tunes, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def run(config):
    """Train and test one method on one task with one seed; write the run's folder; return the result."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    task = data.load(config)
    model = make_model(config, len(task.classes)).to(device)
    learn, score = (task.train + task.val, task.test) if config.score_on == 'test' else (task.train, task.val)
    if not len(learn) or not len(score):
        raise InputError(f'{len(learn)} images to train on and {len(score)} of {config.score_on} to score: look at '
                         'n_train and n_val, and at the lists of the data set')
    header(config, task, model, device)
    folder = Path(config.runs) / config.task / config.method / f'seed{config.seed}'
    folder.mkdir(parents=True, exist_ok=True)
    for name in ('params.pth', 'result.json'):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    (folder / 'config.yaml').write_text(yaml.safe_dump(vars(config), sort_keys=False))
    learn = data.in_memory(learn, config)
    start, done = time.perf_counter(), 0
    try:
        with open(folder / 'log.jsonl', 'w') as log:
            for record in train(model, learn, config, device):
                log.write(json.dumps(record) + '\n')
                log.flush()
                save_trained(model, folder / 'params.pth', config)
                done = record['epoch']
                left = (time.perf_counter() - start) / done * (config.epochs - done)
                say('epoch {epoch:3d}/{epochs}  loss {loss:.4f}  lr {lr:.4g}  {images_per_second:.0f} images/s  '
                    '{left} left'.format(**record, epochs=config.epochs, left=clock(left)))
        return finish(model, score, config, device, folder, record['loss'], time.perf_counter() - start)
    except FloatingPointError as error:
        raise InputError(f'{error}. {kept(folder, done)}. Lower the learning rate: --set lr={config.lr / 4:g}') from None
    except KeyboardInterrupt:
        where = f'in epoch {done + 1} of {config.epochs}' if done < config.epochs else 'while testing'
        raise KeyboardInterrupt(f'stopped {where}. {kept(folder, done)}') from None


def finish(model, score, config, device, folder, loss, seconds):
    """Score the model as the last epoch left it; print, write and return the result."""
    result = {'task': config.task, 'method': config.method, 'seed': config.seed, 'score_on': config.score_on,
              'accuracy': accuracy(model, score, config, device), 'images': len(score),
              'trained_parameters': sum(p.numel() for p in trained(model).values()), 'final_loss': loss,
              'seconds': seconds, 'device': str(device), 'torch': torch.__version__,
              'torchvision': torchvision.__version__}
    (folder / 'result.json').write_text(json.dumps(result, indent=1) + '\n')
    paper = config.paper_accuracy.get(config.method)
    say(f'{config.score_on} accuracy after the last epoch: {100 * result["accuracy"]:.2f}% of {len(score)} images'
        f'{f"; the paper: {paper}%" if paper else ""}. {folder}\n')
    return result


def save_trained(model, path, config):
    """Write what was trained, and not the backbone, as a state dict on the CPU."""
    dtype = getattr(torch, config.save_dtype)
    torch.save({name: p.to('cpu', dtype) for name, p in trained(model).items()}, path)


def kept(folder, done):
    """Where the epochs that are done can be found."""
    return f'What was trained up to epoch {done} is kept in {folder}' if done else 'No epoch was done yet'


def header(config, task, model, device):
    """Say what is about to be trained, on what, with what."""
    parts = trained(model)
    count, frozen = sum(p.numel() for p in parts.values()), sum(p.numel() for p in model.parameters())
    sizes = ', '.join(f'{name} {list(p.shape)}' for name, p in parts.items()) if len(parts) < 6 else 'all'
    paper = f'; the paper, mean over VTAB-1k: {config.paper_params:.2f}M' if config.paper_params else ''
    table_18 = f' (the paper: {config.paper_backbone_params:g}M)' if config.paper_backbone_params else ''
    say(f'task      {config.task}: {len(task.train)} + {len(task.val)} images for training and validation, '
        f'{len(task.test)} for testing, {len(task.classes)} classes')
    for note in task.notes:
        say(f'          {note}')
    say(f'backbone  {config.model} at {config.img_size} pixels, {frozen / 1e6:.2f}M parameters in all'
        f'{table_18}, weights {config.weights or "random"}')
    say(f'method    {config.method}, seed {config.seed}: {count / 1e6:.3f}M trained ({sizes}){paper}')
    say(f'device    {device}{" in bfloat16" if config.bf16 and device.type == "cuda" else ""}, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}, torchvision {torchvision.__version__}')


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
    for name in str(method or of_task.get('method', defaults['method'])).split(','):
        config = dict(defaults)
        for where, layer in ((f'models: {model}', of_model), (f'tasks: {task}', of_task),
                             (f'methods: {name}', entry(configs, 'methods', name)), ('--set', changes)):
            config |= {key: checked(key, value, defaults, where) for key, value in layer.items()}
        config |= {'task': task, 'method': name, 'model': model}
        config['img_size'] = config['img_size'] or vit.parse_name(model)[2]
        if config['weights'] and config['weights'] == of_model.get('weights') and '://' not in config['weights']:
            config['weights'] = str(HERE / config['weights'])  # comes with this project
        runs.append(SimpleNamespace(**config))
    return runs


def entry(configs, section, name):
    """An entry of configs.yaml by name."""
    if name not in configs[section]:
        raise InputError(f'unknown {section[:-1]} {name!r}{nearest(name, configs[section])}')
    return configs[section][name]


def nearest(name, known):
    """What may have been meant, and what there is."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f': did you mean {close[0]!r}?' if close else f': one of {", ".join(known)}'


# What a number has to be. Every other one has only a type.
RANGES = {'lr': (1e-12, 1e6), 'weight_decay': (0, 1e6), 'momentum': (0, 1), 'warmup': (0, 0.99),
          'epochs': (1, 10 ** 6), 'batch': (1, 10 ** 6), 'workers': (0, 1024), 'seed': (0, 2 ** 31),
          'classes': (1, 10 ** 6), 'n_train': (1, 10 ** 8), 'n_val': (0, 10 ** 8), 'n_test': (1, 10 ** 8),
          'img_size': (0, 10 ** 4), 'noise': (0, 1e4), 'n_shapes': (1, 6), 'cache_gb': (0, 1e6)}
CHOICES = {'tune': ('prompts', 'head', 'all'), 'reinforcement': ('topk', 'none'), 'score_on': ('test', 'val'),
           'augment': ('crop_flip', 'none'), 'optimizer': ('SGD', 'AdamW'), 'save_dtype': ('float32', 'float16'),
           'structure': ivpt.STRUCTURES, 'source': tuple(data.SOURCES)}


def checked(key, value, defaults, where):
    """A setting's value in the type of its default. Raises InputError if it cannot be one."""
    if key not in defaults:
        raise InputError(f'{where}: unknown setting {key!r}{nearest(key, defaults)}')
    kind = type(defaults[key])
    if kind is str and value is None:  # --set weights=
        value = ''
    if kind is float and type(value) in (int, str):  # YAML takes 1e-3 for a word
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind:
        raise InputError(f'{where}: {key} is a {kind.__name__}, as {defaults[key]!r}, not {value!r}')
    low, high = RANGES.get(key, (-math.inf, math.inf))
    if kind in (int, float) and not low <= value <= high:
        raise InputError(f'{where}: {key} goes from {low:g} to {high:g}, not {value!r}')
    if value not in CHOICES.get(key, (value,)):
        raise InputError(f'{where}: {key} is one of {", ".join(CHOICES[key])}, not {value!r}')
    if kind is list and not (len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)):
        raise InputError(f'{where}: {key} is three numbers, one a colour, not {value!r}')
    if key == 'std' and min(value) <= 0:
        raise InputError(f'{where}: std has to be positive, not {value!r}')
    return value


def read_yaml(text, where):
    """YAML without code in it; InputError if it is not YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f'{where}: not YAML: {error}') from None


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
    """Run what the command line asks for. Returns the exit status; what the user got wrong is one line."""
    try:
        args, changes = arguments(argv)
        configs = read_yaml((HERE / 'configs.yaml').read_text(), 'configs.yaml')
        tasks = (configs['defaults']['task'] if args.task is None else args.task).split(',')
        seeds = [{}] if args.seed is None else [{'seed': read_yaml(s, '--seed')} for s in args.seed.split(',')]
        runs = [config for task, seed in product(tasks, seeds)
                for config in settings(configs, task, args.method, args.model, changes | seed)]
        results = [run(config) for config in runs]
        for result in results if len(results) > 1 else []:
            say(f'{result["task"]:16} {result["method"]:12} seed {result["seed"]}  {100 * result["accuracy"]:6.2f}%  '
                f'{result["trained_parameters"] / 1e6:.3f}M trained  {clock(result["seconds"])}')
    except (InputError, OSError) as error:  # an OSError names its file
        print(f'train.py: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f'train.py: {stop or "stopped"}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
