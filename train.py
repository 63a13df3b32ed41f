"""Train a method on a task, in a plain loop.

    python train.py                      tune a nano ViT on pictures of shapes; needs no download
    python train.py --task pets          the paper's Pets experiment
    python train.py --task pets --method vpt --set lr=0.5 epochs=20
    python train.py --show --method vpt,ivpt        draw where their class tokens look
    python train.py --task pets --image cat.jpg     what a trained run takes a photo for

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
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

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
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f'the loss is {value} in epoch {epoch + 1}, step {step + 1}')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += value * len(labels)
            live(f'epoch {epoch + 1}, step {step + 1}/{steps}, loss {value:.4f}')
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


def run(config):
    """Train and test one method on one task with one seed; write the run's folder; return the result."""
    device = find_device()
    task = data.load(config)
    model = make_model(config, len(task.classes)).to(device)
    learn, score = (task.train + task.val, task.test) if config.score_on == 'test' else (task.train, task.val)
    if not len(learn) or not len(score):
        raise InputError(f'{len(learn)} images to train on and {len(score)} of {config.score_on} to score: look at '
                         'n_train and n_val, and at the lists of the data set')
    header(config, task, model, device)
    folder = folder_of(config)
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
        return finish(model, score, task.classes, config, folder, record['loss'], time.perf_counter() - start)
    except FloatingPointError as error:
        raise InputError(f'{error}. {kept(folder, done)}. Lower the learning rate: --set lr={config.lr / 4:g}') from None
    except KeyboardInterrupt:
        where = f'in epoch {done + 1} of {config.epochs}' if done < config.epochs else 'while testing'
        raise KeyboardInterrupt(f'stopped {where}. {kept(folder, done)}') from None


def folder_of(config):
    """Where a run writes."""
    return Path(config.runs) / config.task / config.method / f'seed{config.seed}'


def finish(model, score, classes, config, folder, loss, seconds):
    """Score the model as the last epoch left it; print, write and return the result."""
    device = model.head.weight.device
    result = {'task': config.task, 'method': config.method, 'seed': config.seed, 'score_on': config.score_on,
              'accuracy': accuracy(model, score, config, device), 'images': len(score),
              'trained_parameters': sum(p.numel() for p in trained(model).values()), 'final_loss': loss,
              'seconds': seconds, 'device': str(device), 'torch': torch.__version__,
              'torchvision': torchvision.__version__, 'classes': classes}
    (folder / 'result.json').write_text(json.dumps(result, indent=1) + '\n')
    paper = config.paper_accuracy.get(config.method)
    say(f'{config.score_on} accuracy after the last epoch: {100 * result["accuracy"]:.2f}% of {len(score)} images'
        f'{f"; the paper: {paper}%" if paper else ""}. {folder}\n')
    return result


def save_trained(model, path, config):
    """Write what was trained, and not the backbone, as a state dict on the CPU."""
    dtype = getattr(torch, config.save_dtype)
    part = path.with_suffix('.part')  # so that path is whole at every moment
    torch.save({name: p.to('cpu', dtype) for name, p in trained(model).items()}, part)
    part.replace(path)


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
    try:
        config = SimpleNamespace(**yaml.safe_load((folder / 'config.yaml').read_text()))
        classes = json.loads((folder / 'result.json').read_text())['classes']
        parameters = vit.read_state_dict(folder / 'params.pth')
        model = make_model(config, len(classes)).to(device).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f'{folder}: no finished run of this version ({error}); train it first') from None
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in trained(model).items()}:
        raise InputError(f'{folder}/params.pth is not of the model in config.yaml beside it; train it again')
    model.load_state_dict(parameters, strict=False)
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
CHOICES = {'tune': ('prompts', 'bias', 'head', 'all'), 'score_on': ('test', 'val'),
           'augment': ('crop_flip', 'none'), 'optimizer': ('SGD', 'AdamW'), 'save_dtype': ('float32', 'float16'),
           'structure': ivpt.STRUCTURES, 'reinforcement': ivpt.REINFORCEMENTS, 'source': tuple(data.SOURCES)}


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
    parser.add_argument('--show', action='store_true', help='draw the attention of finished runs (Figure 7)')
    parser.add_argument('--run', metavar='DIR', help='with --show or --image: the folder of the run')
    parser.add_argument('--image', nargs='+', default=[], metavar='FILE', action='extend',
                        help='classify these images by a finished run, and draw its attention')
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
        if args.show or args.image:
            folders = [Path(args.run)] if args.run else [folder_of(config) for config in runs]
            show(folders, args.image, (folders[0] if len(folders) == 1 else folders[0].parents[1]) / 'attention.png',
                 find_device())
            return 0
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
