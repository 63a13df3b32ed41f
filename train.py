"""Train a method on a task, in a plain loop.

    python train.py                      tune a nano ViT on pictures of shapes; needs no download
    python train.py --task pets          the paper's Pets experiment
    python train.py --task pets --method vpt --set lr=0.5 epochs=20
    python train.py --task natural --method vpt,ivpt --seed 0,1,2 --search      a sweep: search, train, test
    python train.py --report --task natural         what has been run, beside the paper's tables
    python train.py --task pets --image cat.jpg     what a trained run takes a photo for

All settings are in configs.yaml. Results go to runs/TASK/MODEL/METHOD/seedS/: log.jsonl (a line an epoch), params.pth
(what was trained, without the backbone), result.json (with the settings), and the last two epochs' checkpoints.
The same command again goes on where a run was interrupted, and does not repeat what is finished. The tables and figures
are made in tests/paper.py.
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
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

import data
import ivpt
import vit
from data import code_in
from vit import InputError

HERE = Path(__file__).resolve().parent

# ---- The loop -------------------------------------------------------------------------------------------


def train(model, optimizer, pictures, config, device, done=0, scaler=torch.amp.GradScaler('cpu', enabled=False)):
    """Train what the optimizer holds, after `done` epochs; after each yield its loss, learning rate and images/s.

    Every random number depends on the seed and the epoch alone, so that an interruption changes nothing. Processes that
    share the run each take a part of every batch. Losses are read once an epoch: to read one makes a GPU wait.
    Raises FloatingPointError after an epoch in which a loss, or at whose end a parameter, is not finite."""
    rank, world = parts()
    replica = DistributedDataParallel(model) if world > 1 else model
    loss_of = getattr(model, 'loss', F.cross_entropy)  # SETR has several heads
    sizes = [len(range(len(pictures))[i:i + config.batch]) for i in range(0, len(pictures), config.batch)]
    for epoch in range(done, config.epochs):
        torch.manual_seed(1_000_003 * config.seed + epoch)
        model.train()
        start, losses = time.perf_counter(), []
        batches = data.batches(pictures, config, device, epoch, slice(rank, None, world))
        for step, (images, labels) in enumerate(batches):
            steps = epoch * len(sizes) + step, config.epochs * len(sizes)
            lr = config.lr * schedule(*steps, config.warmup, config.schedule)
            for group in optimizer.param_groups:
                group['lr'] = lr
            share = len(range(sizes[step])[rank::world]) / sizes[step]  # this process's part of the batch; 1 alone
            with autocast(device, config):
                loss = loss_of(replica(images), labels) * (share * world)  # DDP takes the mean of gradients
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach() / world)
            say(f'epoch {epoch + 1}, step {step + 1}/{len(sizes)}', live=True)
        losses = summed(torch.stack(losses)).tolist()
        for step, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                raise FloatingPointError(f'the loss is {loss} in epoch {epoch + 1}, step {step}')
        if not all(p.isfinite().all() for group in optimizer.param_groups for p in group['params']):
            raise FloatingPointError(f'a parameter is not finite after epoch {epoch + 1}')
        seconds = time.perf_counter() - start
        yield {'epoch': epoch + 1, 'loss': sum(loss * n for loss, n in zip(losses, sizes)) / len(pictures), 'lr': lr,
               'seconds': seconds, 'images_per_second': len(pictures) / seconds}


def schedule(step, steps, warmup, kind='cosine'):
    """The learning rate's factor at a step, counted from 0: linear up to 1 over the first part `warmup` of
    the steps, then half a cosine towards 0 (4.1), or SETR's power of 0.9, towards a hundredth."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / (steps - rising)
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == 'cosine' else 0.99 * (1 - done) ** 0.9 + 0.01


def make_optimizer(model, config):
    """SGD with momentum (4.1), or AdamW (full fine-tuning), of all that requires a gradient."""
    groups = [{'params': []}, {'params': [], 'weight_decay': 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[not decays(name, p, config)]['params'].append(p)
    if config.optimizer == 'SGD':
        return torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)


def decays(name, p, config):
    """Whether weight decay pulls a parameter to 0. As in VPT's code it leaves the head's bias alone, and with AdamW
    every bias; of a method in a file AdamW leaves alone all vectors: timm's rule, that of the published SSF and SPT.
    γ is left alone too: it starts as the identity, and decay would take CDC's connection away."""
    if name in ('head.bias', 'head.fc.bias') or 'gamma' in name.split('.'):
        return False
    vector = name.endswith('bias') or ('.py:' in config.tune and p.ndim < 2)
    return config.optimizer == 'SGD' or not vector


def autocast(device, config):
    """The number format of a run, in what torch deems safe for it."""
    return torch.autocast(device.type, getattr(torch, config.precision), enabled=config.precision != 'float32')


def parts():
    """(rank, number) of the processes that share one run; (0, 1) alone."""
    shared = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)


def summed(x):
    """A tensor, summed over the processes that share a run."""
    if parts()[1] > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def accuracy(model, pictures, config, device, noise=0.0):
    """Part of the pictures whose largest logit is that of their class, 0 to 1.

    noise: proportion of Gaussian noise, mean 0 and standard deviation 1, that normalised images are mixed with, the
    same for every model (Figures 4 and 6; the paper does not say how it mixes)."""
    model.eval()
    (rank, world), generator = parts(), torch.Generator().manual_seed(0)
    right, mine = torch.zeros((), dtype=torch.int64, device=device), pictures
    if world > 1:
        mine = Subset(pictures, range(len(pictures))[rank::world])
    for images, labels in data.batches(mine, config, device):
        if noise:
            images = (1 - noise) * images + noise * torch.randn(images.shape, generator=generator).to(device)
        with autocast(device, config):
            right += (model(images).argmax(dim=1) == labels).sum()
    return summed(right).item() / len(pictures)


# ---- One run --------------------------------------------------------------------------------------------


def make_model(config, classes):
    """The backbone with its weights and what the method tunes, with SETR's heads for masks; the rest requires no
    gradient. Adds to the settings `backbone`, the first digits of the SHA-256 of its weights without a head."""
    torch.manual_seed(config.seed)
    masked, weights = config.source in data.MASKED, config.weights
    whole = config.tune in ('all', 'bias', 'head') and not masked
    if not weights:
        raise InputError(f'{config.model} has no weights of its own: name a file with --weights FILE, or ask for '
                         'random values with --weights random')
    if not Path(weights).exists() and (HERE / weights).exists():
        weights = HERE / weights  # comes with this project
    model = vit.build(config.model, None if weights == 'random' else weights, classes if whole else 0, config.img_size,
                      config.readout)
    found = hashlib.sha256()
    for name, x in model.state_dict().items():
        if not name.startswith('head.'):
            found.update(name.encode() + (b'' if x.is_meta else x.numpy().tobytes()))
    config.backbone = found.hexdigest()[:12]
    model = tuned_by(config, model, classes)
    return ivpt.SETR(model, classes) if masked else model


def tuned_by(config, model, classes):
    """What the method makes of the backbone."""
    if config.tune == 'prompts':
        tuned = ivpt.IVPTSwin if isinstance(model, vit.Swin) else ivpt.IVPT
        return tuned(model, classes, config.N, config.k, config.structure, config.aggregation, config.reinforcement)
    if ':' in config.tune:
        return from_file(config.tune, model.requires_grad_(False), classes, config)
    if config.tune == 'head':
        model.requires_grad_(False).head.requires_grad_(True)
    if config.tune == 'bias':  # BitFit (Zaken et al., 2022)
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith('.bias') or name.startswith('head.'))
    return model


def from_file(where, backbone, classes, config):
    """What the function that FILE.py:NAME names makes of the frozen backbone: a module from images [B, 3, H, W] to
    logits [B, C]. All that requires a gradient in it is trained. If it has a method `prepare`, that gets (images,
    labels) of the training pictures, batch by batch, before training starts. The file is code, and is run."""
    model = data.from_file(where, check_module, backbone, classes, config)
    config.code = digest(data.find(where).read_bytes())[:12]  # a run belongs to it as to its backbone
    return model


def check_module(model, *arguments):
    """Raise TypeError for what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f'returned a {type(model).__name__}, and not a module from images to logits')


def find_device(name='auto'):
    """A device by torch's name. `auto`: an accelerator (CUDA, XPU, MPS) where there is one, else the CPU; of several,
    under torchrun, that of this process. Raises InputError if it is not there."""
    if name == 'auto' and torch.accelerator.is_available():
        name = f'{torch.accelerator.current_accelerator()}:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        return torch.empty(0, device='cpu' if name == 'auto' else name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f'device {name} cannot be used ({why}); --set device=cpu always can') from None


def number_format(config, device):
    """What a run computes in, and why. `auto` is bfloat16 where the device has instructions for it, on a CPU for models
    wide enough to gain (README); float16 on GPUs that have it and no bfloat16 (V100, T4, 2080 Ti); else float32."""
    if config.precision != 'auto':
        return config.precision, 'as asked for'
    if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bfloat16', 'this GPU has it'
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) in ((7, 0), (7, 5)):
        return 'float16', 'this GPU has it and no bfloat16'
    has = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    if has.get('avx512_bf16') or has.get('amx_bf16'):
        D = (vit.SWIN_SIZES if config.model.startswith('swin') else vit.SIZES)[vit.parse_name(config.model)[0]][0]
        why = f'this CPU has bfloat16, which pays from D = 192 on; here D = {D}'
        return ('bfloat16' if D >= 192 else 'float32'), why
    return 'float32', 'this device has no other fast format'


def trained(model):
    """What the method tunes, and buffers of its own, by name."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


def count(model):
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(config, again=False):
    """The result of one method on one task with one seed. What is finished is not run again, but with `again`, in a
    folder within its own, and takes the old one's place when it has ended."""
    folder, device = folder_of(config), find_device(config.device)
    config.precision, why = number_format(config, device)
    task = data.load(config)
    model = make_model(config, len(task.classes)).to(device)
    vars(config).update(data.digest(task, config))
    if not again and (result := read_result(folder)):
        same_settings(result['config'], config, folder)
        if has_params(folder, result):
            say(f'{folder}: finished before, {100 * result["accuracy"]:.2f}%; --again runs it again')
            return result
        say(f'{folder}: params.pth is not what result.json was measured with, and is made again')
    if parts()[1] > 1 and device.type == 'cpu' and config.source in data.MASKED:
        raise InputError('torch synchronises no batch norm on CPUs, so no run with masks is shared: leave out torchrun')
    return fit(folder / AGAIN if again else folder, model, task, config, device, why)


def fit(folder, model, task, config, device, why):
    """Train the model from where the folder's checkpoints leave it, test it, and write and return the result."""
    say('decoding images', live=True)
    learn, score = data.learned_and_scored(task, config, device)
    if hasattr(model, 'prepare'):
        model.prepare(data.batches(task.train, config, device))
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == 'float16')
    header(config, task, model, device, why)
    records = resume(folder, model, optimizer, scaler, config, device)
    write_log(folder, records)  # what cannot be written is found out before the first epoch
    try:
        for record in train(model, optimizer, learn, config, device, len(records), scaler):
            records.append(record)
            save(folder, model, optimizer, scaler, records, config, device)
            left = timedelta(seconds=round(record['seconds'] * (config.epochs - len(records))))
            say('epoch {epoch:3d}/{epochs}  loss {loss:.4f}  lr {lr:.4g}  {images_per_second:.0f} images/s  '
                '{left} left'.format(**record, epochs=config.epochs, left=left))
        return finish(folder, model, score, task, config, records, device)
    except (FloatingPointError, KeyboardInterrupt) as stop:
        kept = f'{len(records)} of {config.epochs} epochs are kept in {folder}'
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(f'stopped. {kept}; the same command goes on from there') from None
        raise InputError(f'{stop}. {kept}. Lower the learning rate: --set lr={config.lr / 4:g}') from None


def evaluate(model, pictures, config, device):
    """The scores of a result: `accuracy`, which of masks is the mIoU, beside `pixel_accuracy` and, in a test at several
    `scales`, `multi_scale`, the mIoU again."""
    if config.source not in data.MASKED:
        return {'accuracy': accuracy(model, pictures, config, device)}
    K = confusion(model, pictures, config, device, [1.0])
    found = {'accuracy': ivpt.mean_iou(K), 'pixel_accuracy': (K.trace() / K.sum()).item()}
    if config.scales and config.score_on == 'test':
        found['multi_scale'] = ivpt.mean_iou(confusion(model, pictures, config, device, config.scales))
    return found


def confusion(model, pictures, config, device, scales):
    """K [C, C]: how many pixels of class i, the row, were taken for class j, in all pictures."""
    model.eval()
    (rank, world), C = parts(), model.num_classes
    mine, K = range(len(pictures))[rank::world], torch.zeros(C * C, dtype=torch.int64)
    for image, mask in data.decoded(pictures.__getitem__, mine, data.workers_of(config)):
        found, known = answer(model, image, config, device, scales), mask != vit.IGNORED
        K += torch.bincount(C * mask[known].long() + found[known], minlength=C * C)
    return summed(K.to(device)).view(C, C).cpu().double()


def answer(model, image, config, device, scales=(1.0,)):
    """The class of each pixel of an image, uint8 [3, H, W] -> [H, W]."""
    mean, std = data.moments(config, device)
    with autocast(device, config):
        return ivpt.segment(model, (image.to(device) - mean) / std, config.img_size, scales).cpu()


def finish(folder, model, score, task, config, records, device):
    """Score the model as the last epoch left it; print, write and return the result."""
    file, dtype, masked = io.BytesIO(), getattr(torch, config.save_dtype), config.source in data.MASKED
    guess = math.log(len(task.classes)) * (1 + 4 * ivpt.AUXILIARY if masked else 1)  # of all heads
    torch.save({n: x.to('cpu', dtype if x.is_floating_point() else x.dtype) for n, x in trained(model).items()}, file)
    result = {'task': config.task, 'model': config.model, 'method': config.method, 'seed': config.seed,
              'score_on': config.score_on, **evaluate(model, score, config, device), 'images': len(score),
              'trained_parameters': count(model), 'final_loss': records[-1]['loss'],
              'seconds': sum(record['seconds'] for record in records), 'classes': task.classes,
              'config': vars(config), 'params_digest': digest(file.getvalue()), **environment(device)}
    write(folder / 'params.pth', file.getvalue())
    write_result(folder, result)
    folder = take_place(folder)
    paper = config.paper_accuracy if config.score_on == 'test' else 0
    say(f'{config.score_on} {"mIoU" if masked else "accuracy"} after the last epoch: '
        f'{100 * result["accuracy"]:.2f}% of {len(score)} images'
        f'{f"; the paper: {paper}%" if paper else ""}{is_random(vars(config))}. {folder}\n')
    if result['final_loss'] > guess:
        say(f'{folder} has learned nothing: its last loss, {result["final_loss"]:.3g}, is above that of a guess, '
            f'{guess:.3g}. Lower the learning rate: --set lr={config.lr / 4:g}')
    return result


def is_random(config):
    """What is added to every line about a run whose backbone knows nothing. config: its settings as a dict."""
    return ', random weights' if config['weights'] == 'random' else ''


def environment(device):
    """What the bits of a result depend on beside the settings."""
    return {'device': device.type, 'threads': torch.get_num_threads(), 'torch': str(torch.__version__),
            'torchvision': torchvision.__version__}


def header(config, task, model, device, why):
    """Say what is about to be trained, on what, with what."""
    parts, size = trained(model), sum(p.numel() for p in model.parameters())
    sizes = ', '.join(f'{name} {list(p.shape)}' for name, p in parts.items())
    sizes = sizes if len(parts) < 6 else f'{len(parts)} tensors'
    where = '' if config.source in data.MASKED else ', mean over VTAB-1k'
    paper = f'; the paper{where}: {config.paper_params:.2f}M' if config.paper_params else ''
    table_18 = f' (the paper: {config.paper_backbone_params:g}M)' if config.paper_backbone_params else ''
    say(f'task      {config.task}: {len(task.train)} + {len(task.val)} images for training and validation, '
        f'{len(task.test)} for testing, {len(task.classes)} classes')
    for note in task.notes:
        say(f'          {note}')
    say(f'backbone  {config.model} at {config.img_size} pixels, {size / 1e6:.2f}M parameters in all'
        f'{table_18}, weights {config.weights} ({config.backbone})')
    say(f'pixels    mean {config.mean}, std {config.std}; if the weights were trained with others: '
        '--set mean=[...] std=[...]')
    say(f'method    {config.method}, seed {config.seed}: {count(model) / 1e6:.3f}M trained ({sizes}){paper}')
    say('device    {device}, {threads} threads, torch {torch}, torchvision {torchvision}'.format(**environment(device)))
    say(f'numbers   {config.precision}: {why}')


def say(line, live=False):
    """Print a line, over a live one if there is one. A live one is for terminals: the next one overwrites it."""
    terminal = sys.stdout.isatty()
    if parts()[0] == 0 and (terminal or not live):
        print(f'\r{line:<79}' if terminal else line, end='' if live else '\n', flush=True)


# ---- The files of a run: whole at every moment, and found out if they are not ----------------------------

CHECKPOINTS = ('checkpoint-0.pth', 'checkpoint-1.pth')  # after an even and an odd number of epochs
FREE = {'data', 'weights', 'runs', 'point', 'workers', 'device', 'cache_gb', 'grid', 'paper_accuracy', 'paper_params',
        'paper_backbone_params'}  # settings that change no number of a run; paths have digests instead
AGAIN = 'again'  # in a run's folder: the same run, made anew, until it has ended


def folder_of(config):
    """Where a run writes."""
    method = re.sub(r'[^\w.+-]', '_', config.method)  # of a function in a file: its path
    return Path(config.runs) / config.task / config.model / method / f'seed{config.seed}' / config.point


def digest(content):
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write(path, content):
    """Put bytes into a file, wholly or not at all. Of processes that share a run the first one alone writes."""
    if parts()[0] > 0:
        return
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
    return path.read_bytes() if path.exists() else None


def save(folder, model, optimizer, scaler, records, config, device):
    """Write a checkpoint: its digest, then all that the next epoch depends on. The one before stays."""
    file = io.BytesIO()
    torch.save({'config': vars(config), 'environment': environment(device), 'records': records,
                'trained': trained(model), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict()}, file)
    write(folder / CHECKPOINTS[len(records) % 2], digest(file.getvalue()).encode() + file.getvalue())
    write_log(folder, records)


def write_log(folder, records):
    """Write log.jsonl: a line an epoch."""
    write(folder / 'log.jsonl', ''.join(json.dumps(record) + '\n' for record in records).encode())


def read_checkpoint(path):
    """What `save` wrote; None if it is not there, or is damaged, which is said."""
    content = read(path)
    if content is None:
        return None
    if digest(content[64:]).encode() == content[:64]:
        with suppress(Exception):  # code, which is not run
            return torch.load(io.BytesIO(content[64:]), map_location='cpu', weights_only=True)
    say(f'{path} is damaged and is not used')
    return None


def resume(folder, model, optimizer, scaler, config, device):
    """Put model, optimizer and scaler where the newest whole checkpoint left them; return the records of its epochs."""
    found = [checkpoint for name in CHECKPOINTS if (checkpoint := read_checkpoint(folder / name))]
    if folder.name == AGAIN:  # what was made anew with other settings, and never ended, is dropped
        found = [checkpoint for checkpoint in found if not differences(checkpoint['config'], vars(config))]
    if not found:
        return []
    newest = max(found, key=lambda checkpoint: len(checkpoint['records']))
    same_settings(newest['config'], config, folder)
    model.load_state_dict(model.state_dict() | newest['trained'])
    optimizer.load_state_dict(newest['optimizer'])
    scaler.load_state_dict(newest['scaler'])
    say(f'resumed   after epoch {len(newest["records"])} of {config.epochs}, from {folder}')
    if changed := differences(newest['environment'], environment(device)):
        say(f'          with {changed}: not the same bits as without an interruption')
    return newest['records']


def take_place(folder):
    """Put a run that was made anew, and has ended, in the place of the old one. Returns where its files are."""
    if folder.name != AGAIN:
        return folder
    if parts()[0] == 0:
        for path in sorted(folder.iterdir()):  # result.json last
            path.replace(folder.parent / path.name)
        folder.rmdir()
    return folder.parent


def differences(old, new):
    """In words, what changed from one dict of settings to another; '' if nothing that counts did."""
    return ', '.join(f'{key} {old.get(key)!r} -> {new.get(key)!r}' for key in sorted((old.keys() | new.keys()) - FREE)
                     if old.get(key) != new.get(key))


def same_settings(old, config, folder):
    """Raise InputError if a run was begun with settings that would give other numbers."""
    if changed := differences(old, vars(config)):
        raise InputError(f'{folder} was begun with other settings, pictures or weights: {changed}. Give those to go '
                         'on, --again to start over, or another folder with --set runs=DIR')


def write_result(folder, result):
    """Write result.json."""
    write(folder / 'result.json', (json.dumps(result, indent=1) + '\n').encode())


def read_result(folder):
    """What `write_result` wrote; None if there is none, or it is damaged."""
    with suppress(ValueError, TypeError, RecursionError):
        result = json.loads(read(folder / 'result.json') or '')
        return result if 'config' in result else None


def has_params(folder, result):
    """Whether params.pth is what a result was measured with."""
    return digest(read(folder / 'params.pth') or b'') == result['params_digest']


# ---- Many runs ------------------------------------------------------------------------------------------


def run_all(runs, again, searching):
    """Run all: here one after another; under torchrun each in the process that is free next, and one alone in all of
    them together. With a search, its points come first. What is wrong with one run (data that is not there, a rate too
    high) is said once, and the next has its turn. Returns the results and the exit status, to the first process."""
    first, best = {}, {}  # of the seeds of a task, model and method: the first searches for all; what it found
    for config in runs:
        first.setdefault(folder_of(config).parent, config)
    jobs = [point for config in first.values() for point in points(config) if searching] + runs
    (store, turns), said = take_turns(len(jobs), runs[0].device), set()
    for i in turns:
        config, result = jobs[i], {}  # what the others see of a run that failed
        try:
            if searching and not config.point:
                seeds = folder_of(config).parent
                best[seeds] = best.get(seeds) or search(first[seeds], store)
                vars(config).update(best[seeds])
            result = run(config, again)
        except (InputError, torch.OutOfMemoryError) as error:
            if str(error) not in said:
                complain(error)
            said.add(str(error))
        store.set(str(folder_of(config)), json.dumps(result))
    if int(os.environ.get('RANK', 0)) > 0:
        return [], 0
    results = [told(store, config) for config in runs]
    return [result for result in results if result], 0 if all(results) else 2


def take_turns(n, device):
    """A store of what became of n runs, and the numbers of those that this process does. Under torchrun the store is
    its own, with a counter of the runs that are taken; one alone is shared, and the processes form a group."""
    if 'RANK' not in os.environ:
        return dist.HashStore(), range(n)
    store, rank, world = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)  # a restart counts anew
    store.set_timeout(timedelta(days=999))
    if n == 1:
        backend = dist.get_default_backend_for_device(find_device(device))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        return store, range(1)
    turns = (store.add('turn', 1) - 1 for _ in range(n))
    return store, (i for i in turns if i < n)


def told(store, config):
    """What became of a run, as soon as it has: its result, or {} if it failed."""
    return json.loads(store.get(str(folder_of(config))))


def points(config):
    """The runs of a search: VPT's protocol, train on `train` and score on `val`, at each point of the grid."""
    for values in product(*config.grid.values()):
        point = dict(zip(config.grid, values))
        name = ','.join(f'{name}={value}' for name, value in point.items())
        yield SimpleNamespace(**vars(config) | point | {'score_on': 'val', 'point': f'search/{name}'})


def search(config, store):
    """The best point of a search, as settings; of equals the smaller rate. Raises InputError if none has a score."""
    scores = [({name: getattr(point, name) for name in config.grid}, told(store, point).get('accuracy'))
              for point in points(config)]
    scores.sort(key=lambda row: (-1 if row[1] is None else row[1], -row[0].get('lr', 0)), reverse=True)
    rows = [point | {'accuracy': score} for point, score in scores]
    write(folder_of(config) / 'search.json', json.dumps(rows, indent=1).encode())
    say(f'search    {config.task}, {config.model}, {config.method}, seed {config.seed}: accuracy on validation images')
    for point, score in scores:
        say(f'          {point}: {"none" if score is None else f"{100 * score:.2f}%"}')
    best, score = scores[0]
    if score is None:
        raise InputError(f'{folder_of(config)}: no point of the grid has come to an end; give it lower rates: '
                         '--set grid="{lr: [...]}"')
    for name, values in config.grid.items():
        if len(values) > 1 and best[name] and best[name] in (min(values), max(values)):  # there is nothing below 0
            say(f'          the best {name}, {best[name]}, is the last of the grid on its side: look beyond it')
    return best


# ---- Settings -------------------------------------------------------------------------------------------


def settings(configs, task, method=None, model=None, changes=None):
    """The settings of each run of a task, a list with one for each method that is named. method, model, changes: what
    the command line says instead of configs.yaml, on top of which is the order. Raises InputError for a name that is
    not known, or a value that is wrong."""
    defaults, changes, runs = configs['defaults'], changes or {}, []
    of_task = entry(configs, 'tasks', task)
    model = model or of_task.get('model', defaults['model'])
    of_model = entry(configs, 'models', model)
    for name in dict.fromkeys(str(method or of_task.get('method', defaults['method'])).split(',')):
        config, own = dict(defaults), entry(configs, 'methods', name)
        known = own | defaults if ':' in own.get('tune', '') else defaults  # a method in a file has settings of its own
        for where, layer in ((f'models: {model}', of_model), (f'tasks: {task}', of_task),
                             (f'methods: {name}', own), ('--set', changes)):
            config |= {key: checked(key, value, known, where) for key, value in layer.items()}
        config |= {'task': task, 'method': name, 'model': model, 'point': ''}
        config['img_size'] = config['img_size'] or vit.parse_name(model)[2]
        config['paper_accuracy'] = published(configs, config, task) or 0.0
        config['paper_params'] = published(configs, config, 'params') or 0.0
        runs.append(SimpleNamespace(**config))
    return runs


def published(configs, config, column):
    """The paper's accuracy, in %, of a task or group, or its count of `params`, in M, for just the backbone, image
    size, method, N and k of a run; None if it has none. A file by another name is not known to be that backbone."""
    file = Path(configs['models'].get(config['model'], {}).get('weights', '').partition('#')[0]).name
    own = configs['defaults'] | configs['tasks'].get(config['task'], {}) | configs['methods'].get(config['method'], {})
    given = config['img_size'], config['N'], config['k'], Path(config['weights'].partition('#')[0]).name
    if given != (vit.parse_name(config['model'])[2], own['N'], own['k'], file):
        return None
    return configs['paper'].get(config['model'], {}).get(column, {}).get(config['method'])


def tasks_of(configs, names):
    """The tasks that names of tasks and groups stand for."""
    groups = configs['groups']
    return [task for name in names for task in (tasks_of(configs, groups[name]) if name in groups else [name])]


def entry(configs, section, name):
    """An entry of configs.yaml by name. A method that is a function in a file, and a model by a name in timm's grammar
    that says nothing of the pre-training, need none."""
    if name in configs[section]:
        return configs[section][name]
    if section == 'methods' and '.py:' in name:
        return {'tune': name}
    if section == 'models' and '.' not in name:
        vit.parse_name(name)
        return {}
    raise InputError(f'unknown {section[:-1]} {name!r}{nearest(name, configs[section])}')


def nearest(name, known):
    """What may have been meant, and what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f': did you mean {close[0]!r}?' if close else f': one of {", ".join(known)}'


def between(low, high):
    return lambda x: low <= x <= high, f'goes from {low:g} to {high:g}'


def one_of(*choices):
    return lambda x: x in choices, f'is one of {", ".join(map(str, choices))}'


def colours(x):
    return len(x) == 3 and all(type(c) in (int, float) and abs(c) < 1e6 for c in x)


# What a setting has to be, beside of the type of its default: a test, and what it says in words.
RULES = {
    'lr': between(1e-12, 1e6), 'weight_decay': between(0, 1e6), 'momentum': between(0, 1), 'warmup': between(0, 0.99),
    'epochs': between(1, 10 ** 6), 'batch': between(1, 10 ** 6),
    'workers': (re.compile(r'auto|\d+').fullmatch, 'is auto, or a number'),
    'seed': between(0, 4293),  # times 1,000,003, torch's 32 bits
    'classes': between(0, 10 ** 6), 'n_train': between(1, 10 ** 8), 'n_val': between(0, 10 ** 8),
    'n_test': between(1, 10 ** 8), 'img_size': between(0, 10 ** 4), 'grain': between(0, 1e4),
    'N': between(1, 1000), 'k': between(0, 10 ** 6),
    **dict.fromkeys(('cache_gb', 'paper_backbone_params'), between(0, 1e6)),
    'tune': (re.compile(r'prompts|bias|head|all|.*\.py:.*').fullmatch,
             'is one of prompts, bias, head, all, FILE.py:NAME'),
    'score_on': one_of('test', 'val'), 'augment': one_of('crop_flip', 'scale_crop', 'none'),
    'scales': (lambda x: all(type(scale) in (int, float) and 0 < scale <= 4 for scale in x), 'has numbers from 0 to 4'),
    'optimizer': one_of('SGD', 'AdamW'), 'schedule': one_of('cosine', 'poly'),
    'save_dtype': one_of('float32', 'float16'), 'structure': one_of(*ivpt.STRUCTURES),
    'reinforcement': one_of(*ivpt.REINFORCEMENTS), 'readout': one_of('cls', 'mean'),
    'torchvision': one_of('', *data.TORCHVISION), 'precision': one_of('auto', 'float32', 'bfloat16', 'float16'),
    **dict.fromkeys(('data', 'runs'), (bool, 'is the name of a folder')),
    'source': (lambda x: x in data.SOURCES or '.py:' in x, f'is one of {", ".join(data.SOURCES)}, FILE.py:NAME'),
    'mean': (colours, 'is three numbers, one a colour'),
    'std': (lambda x: colours(x) and min(x) > 0, 'is three numbers, one a colour, above 0'),
    'grid': (lambda x: x and all(type(values) is list and values for values in x.values()),
             'is a list of values for each setting')}


def checked(key, value, defaults, where):
    """A setting's value, or its text on the command line, in the type of its default. Raises InputError."""
    if key not in defaults:
        raise InputError(f'{where}: unknown setting {key!r}{nearest(str(key), defaults)}')
    kind, (fits, rule) = type(defaults[key]), RULES.get(key, (lambda x: True, ''))
    if kind in (int, float, str) and type(value) in (int, str):  # YAML takes 1e-3 for a word, and 010 for 8
        with suppress(ValueError, OverflowError):
            value = kind(value)
    if kind in (bool, list, dict) and type(value) is str:
        value = read_yaml(value, f'{where} {key}')
    if type(value) is not kind:
        raise InputError(f'{where}: {key} is a {kind.__name__}, as {defaults[key]!r}, not {repr(value)[:100]}')
    if not fits(value):
        raise InputError(f'{where}: {key} {rule}, not {repr(value)[:100]}')
    if key == 'grid':
        return {name: [checked(name, x, defaults, where) for x in values] for name, values in value.items()}
    return value


def read_yaml(text, where):
    """YAML without code in it; InputError if it is not YAML."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors raise what int(), date() and their like raise
        raise InputError(f'{where}: not YAML: {error or type(error).__name__}') from None


def read_configs():
    """configs.yaml, its defaults checked; the rest of it is checked when it is used."""
    try:
        configs = read_yaml((HERE / 'configs.yaml').read_text(encoding='utf-8'), 'configs.yaml')
        for name in RULES:
            checked(name, configs['defaults'][name], configs['defaults'], 'configs.yaml: defaults')
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f'configs.yaml: a default is missing or wrong: {type(error).__name__}: {error}') from None
    return configs


# ---- Command line ---------------------------------------------------------------------------------------


def arguments(argv):
    """The command line, parsed, with the settings that it changes; `paper` is the option of tests/paper.py in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = refuse
    parser.add_argument('--task', help='an entry of tasks in configs.yaml, or several: A,B')
    parser.add_argument('--method', help='an entry of methods, or several: ivpt,vpt')
    parser.add_argument('--model', help='an entry of models, or a name such as vit_small_patch14_224, or several')
    parser.add_argument('--seed', help='a number, or several: 0,1,2')
    parser.add_argument('--weights', help='path or URL of a .pth, .pt, .bin, .tar, .safetensors or .npz; or random')
    parser.add_argument('--data', help='folder of the data sets')
    parser.add_argument('--set', nargs='+', default=[], metavar='NAME=VALUE', action='extend', help='any setting')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--search', action='store_true', help='search the grid on the validation images first')
    what.add_argument('--report', action='store_true', help='a table of what has been run, beside the paper')
    what.add_argument('--noise', metavar='RATES', help='test finished runs on noisy images: 0,0.1,0.2')
    what.add_argument('--sweep', metavar='NAME=VALUES', help='the run at each value of a setting, drawn: N=1,5,10,50')
    what.add_argument('--loss', action='store_true', help='draw the loss of runs by epoch')
    what.add_argument('--show', action='store_true', help='draw the attention of finished runs (Figure 7), or masks')
    what.add_argument('--image', nargs='+', default=[], metavar='FILE', action='extend', help='the same, for photos')
    parser.add_argument('--run', metavar='DIR', help='with --show, --image or --noise: the folder of the run')
    parser.add_argument('--again', action='store_true', help='make anew what is finished or was interrupted')
    args = parser.parse_args(argv)
    args.paper = next((name for name in ('report', 'noise', 'sweep', 'loss', 'show', 'image')
                       if getattr(args, name) not in (None, False, [])), '')
    if args.run and args.paper not in ('show', 'image', 'noise'):
        raise InputError(f'--run {args.run} is for --show, --image and --noise; to train, name --task and --method')
    if args.again and args.paper not in ('', 'sweep'):
        raise InputError('--again is for runs to train; this trains none')
    return args, changed(args)


def changed(args):
    """The settings that a command line changes, as texts by name."""
    given = [change.partition('=') for change in args.set]
    given += [(name, '=', getattr(args, name)) for name in ('weights', 'data') if getattr(args, name) is not None]
    changes = {name: os.path.expanduser(value) for name, _, value in given}
    for name in changes.keys() & {'task', 'method', 'model', 'seed'}:
        raise InputError(f'--set {name}={changes[name]}: write --{name} {changes[name]}')
    if 'data' in changes and not os.path.isdir(changes['data']):
        raise InputError(f'{changes["data"]}: there is no such folder of data sets; make it to download them there')
    return changes


def refuse(message):
    """What argparse does with an error of its own: one line, as all others."""
    raise InputError(f'{message}; a setting is changed by --set NAME=VALUE, and --help lists the options')


def main(argv=None):
    """Do what the command line asks for. Returns the exit status; what the user got wrong is one line."""
    try:
        configs, (args, changes) = read_configs(), arguments(argv)
        if args.paper:
            return code_in(HERE / 'tests' / 'paper.py').main(args, changes, configs)
        results, status = run_all(runs_of(args, changes, configs), args.again, args.search)
        for result in results if len(results) > 1 else []:
            spent = timedelta(seconds=round(result['seconds']))
            say('{task:16} {model:32} {method:12} seed {seed}  '.format(**result)
                + f'{100 * result["accuracy"]:6.2f}%  {result["trained_parameters"] / 1e6:.3f}M trained  {spent}'
                + is_random(result['config']))
        return status
    except (InputError, OSError, torch.OutOfMemoryError) as error:  # an OSError names its file
        complain(error)
        return 2
    except KeyboardInterrupt as stop:
        complain(str(stop) or 'stopped; what is finished is kept')
        return 130


def runs_of(args, changes, configs, points=({},)):
    """The settings of all runs that a command line names, at each point of a sweep, which is a dict of settings."""
    defaults = configs['defaults']
    seeds = [checked('seed', seed, defaults, '--seed') for seed in named(args.seed) or [defaults['seed']]]
    tasks = tasks_of(configs, named(args.task) or [defaults['task']])
    return [config for task, model, seed, point in product(tasks, named(args.model) or [None], seeds, points)
            for config in settings(configs, task, args.method, model, changes | {'seed': seed} | point)]


def named(text):
    """The names in A,B,..., each once; none in None."""
    return [] if text is None else list(dict.fromkeys(text.split(',')))


def complain(what):
    """One line for the user."""
    if isinstance(what, torch.OutOfMemoryError):
        what = ('the GPU has too little memory: --set batch=8 takes smaller batches, --set cache_gb=0 leaves the '
                'pictures in their files; --again starts a run over')
    line = ''.join(c if c.isprintable() else '?' for c in ' '.join(str(what).split()))
    if parts()[0] == 0:
        print(f'train.py: {line}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    sys.modules['train'] = sys.modules['__main__']  # what tests/paper.py imports: not this file a second time
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python train.py | head` ends as other commands do
    sys.stdout.reconfigure(errors='backslashreplace')  # not every file's name, and not every terminal, is UTF-8
    sys.exit(main())
