"""Train a method on a task, in a plain loop.

    python train.py                      tune a nano ViT on pictures of shapes; needs no download
    python train.py --task pets          the paper's Pets experiment
    python train.py --task pets,dtd --method vpt,ivpt --seed 0,1,2 --set lr=0.5     one run after another

A task, a model and a method are entries of configs.yaml, or FILE.py:NAME. The settings are the fields of Backbone
(vit.py), Prompts (ivpt.py), Pictures (data.py), Loop and Machine (here). A run writes its result, its answers, what was
trained and a checkpoint into runs/TASK/MODEL/METHOD[,NAME=VALUE,...]/seedS/. The same command again goes on where it
was interrupted, and does not repeat what is finished.
"""

import argparse
import csv
import difflib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, make_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import numpy as np
import torch
import torchvision
import yaml

import data
import vit
from ivpt import IVPT, Prompts
from vit import Backbone, InputError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Loop:
    """The settings of training (4.1: SGD, 100 epochs, the first 10 of them warm-up, then cosine) and of the score."""

    tune: Annotated[str, 'prompts', 'bias', 'head', 'all', 'FILE.py:NAME'] = 'prompts'  # what is trained
    seed: Annotated[int, 0, 4293] = 0  # times 1,000,003: torch's 32 bits
    epochs: Annotated[int, 1, 10**6] = 100
    batch: Annotated[int, 1, 10**6] = 64  # ours; VPT's is 128, and it divides rates as below
    optimizer: Annotated[str, 'SGD', 'AdamW'] = 'SGD'
    lr: Annotated[float, 1e-12, 1e6] = 0.25  # 1.0 * batch / 256, the middle of VPT's grid; the paper gives none
    warmup: Annotated[float, 0, 0.99] = 0.1  # part of the epochs
    schedule: Annotated[str, 'cosine', 'poly'] = 'cosine'  # after the warm-up; poly is SETR's
    momentum: Annotated[float, 0, 1] = 0.9  # VPT's
    weight_decay: Annotated[float, 0, 1e6] = 0.0001
    precision: Annotated[str, 'auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: what is fast on the device
    score_on: Annotated[str, 'test', 'val'] = 'test'  # val: train on `train` alone, to choose settings


@dataclass(frozen=True)
class Machine:
    """Where things are and what computes. A run may go on with others, if data and weights have the same contents."""

    data: str = 'data'  # the folder of the data sets; what is missing is downloaded into it
    weights: str = ''  # path or URL of a checkpoint; random for random values; '': one has to be named
    runs: str = 'runs'  # the folder of the results
    device: str = 'auto'  # an accelerator where there is one, else the CPU; or cpu, cuda:1, mps
    workers: Annotated[int, -1, 1000] = -1  # threads that decode images; -1: one for each CPU, at most 8
    cache_gb: Annotated[float, 0, 1e6] = 8.0  # pictures up to this size are decoded once and kept


# ---- The loop -------------------------------------------------------------------------------------------

class State(NamedTuple):
    """What training changes, and a checkpoint keeps."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    records: list  # of the epochs that are done


def train(state, task, pictures, settings, compute):
    """Train the model of a state, and yield a record after each epoch that is not done yet. Every random number depends
    on the seed and the epoch alone, so that an interruption changes nothing."""
    model, optimizer, scaler, records = state
    loop, augment = settings.loop, task.augments[settings.pictures.augment]
    steps = math.ceil(len(pictures) / loop.batch)  # in an epoch
    for epoch in range(len(records), loop.epochs):
        seed(1_000_003 * loop.seed + epoch)
        model.train()
        start, losses = time.perf_counter(), []
        batches = data.batches(pictures, settings, compute.device, epoch, augment)
        for step, (images, labels) in enumerate(batches):
            set_lr(optimizer, loop, epoch * steps + step, loop.epochs * steps)
            with compute.autocast():
                loss = task.loss(model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append((loss.detach(), len(labels)))
            say(f'epoch {epoch + 1}, step {step + 1}/{steps}', live=True)
        yield record(epoch + 1, losses, optimizer, start)


def seed(number):
    """Start all random numbers anew: torch's, and those that a method in a file may draw."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def set_lr(optimizer, loop, step, steps):
    """Give the optimizer the learning rate of a step of all steps, counted from 0."""
    for group in optimizer.param_groups:
        group['lr'] = loop.lr * schedule(step, steps, loop.warmup, loop.schedule)


def schedule(step, steps, warmup, kind='cosine'):
    """The learning rate's factor at a step, counted from 0: linear up to 1 over the first part `warmup` of
    the steps, then half a cosine towards 0 (4.1), or SETR's power of 0.9, towards a hundredth."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / (steps - rising)
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == 'cosine' else 0.99 * (1 - done) ** 0.9 + 0.01


def record(epoch, losses, optimizer, start):
    """What is kept of an epoch: its mean loss, learning rate and speed. losses: (tensor, number of pictures) of each
    batch. They are read here, once an epoch: to read one makes a GPU wait.
    Raises FloatingPointError if a loss or a parameter is not finite."""
    values = torch.stack([loss for loss, _ in losses]).tolist()
    for step, value in enumerate(values, start=1):
        if not math.isfinite(value):
            raise FloatingPointError(f'the loss is {value} in epoch {epoch}, step {step}')
    if not all(p.isfinite().all() for group in optimizer.param_groups for p in group['params']):
        raise FloatingPointError(f'a parameter is not finite after epoch {epoch}')
    n, seconds = sum(n for _, n in losses), time.perf_counter() - start
    loss = sum(value * n for value, (_, n) in zip(values, losses)) / n
    return {'epoch': epoch, 'loss': loss, 'lr': optimizer.param_groups[0]['lr'], 'seconds': seconds,
            'images_per_second': n / seconds}


def make_optimizer(model, loop):
    """SGD with momentum (4.1), or AdamW (full fine-tuning), of all that requires a gradient."""
    learned = [(p, decays(name, p, loop)) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{'params': [p for p, decaying in learned if decaying]},
              {'params': [p for p, decaying in learned if not decaying], 'weight_decay': 0.0}]
    if loop.optimizer == 'SGD':
        return torch.optim.SGD(groups, loop.lr, loop.momentum, weight_decay=loop.weight_decay)
    return torch.optim.AdamW(groups, loop.lr, weight_decay=loop.weight_decay)


def decays(name, p, loop):
    """Whether weight decay pulls a parameter to 0. As in VPT's code it leaves the head's bias alone, and with AdamW
    every bias; of a method in a file AdamW leaves alone all vectors: timm's rule, that of the published SSF and SPT.
    γ is left alone too: it starts as the identity, and decay would take CDC's connection away."""
    if name in ('head.bias', 'head.fc.bias') or 'gamma' in name.split('.'):
        return False
    vector = name.endswith('bias') or ('.py:' in loop.tune and p.ndim < 2)
    return loop.optimizer == 'SGD' or not vector


class Compute(NamedTuple):
    """The device and the number format of a run, and why it is this format."""

    device: torch.device
    precision: str
    why: str

    def autocast(self):
        """The number format, in what torch deems safe for it."""
        return torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != 'float32')


def find_device(name='auto'):
    """A device by torch's name; `auto`: see `Machine`, under torchrun that of this process. May raise InputError."""
    if name == 'auto' and torch.accelerator.is_available():
        name = f'{torch.accelerator.current_accelerator()}:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        return torch.empty(0, device='cpu' if name == 'auto' else name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f'device {name} cannot be used ({why}); --set device=cpu always can') from None


def number_format(precision, device, D):
    """The format that a run computes in, and why. `auto`: the fastest one that the device has instructions for."""
    if precision != 'auto':
        return precision, 'as asked for'
    if device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return 'bfloat16', 'this GPU has it'
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) in ((7, 0), (7, 5)):  # V100, T4
        return 'float16', 'this GPU has it and no bfloat16'
    has = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    if D >= 192 and (has.get('avx512_bf16') or has.get('amx_bf16')):  # a narrower model does not gain by it
        return 'bfloat16', 'this CPU has it'
    return 'float32', f'no other format is faster on this device with D = {D}'


# ---- One run --------------------------------------------------------------------------------------------

def run(settings, again=False):
    """The result of one method on one task with one seed. What is finished is not run again, but with `again`."""
    folder, device = folder_of(settings), find_device(settings.machine.device)
    seed(settings.loop.seed)
    task = data.load(settings)
    model, identity = make_model(settings, task)
    D = getattr(getattr(model, 'vit', model), 'D', 0)  # a method in a file may hide the backbone
    compute = Compute(device, *number_format(settings.loop.precision, device, D))
    identity |= data.fingerprint(task, settings.machine.data) | {'precision': compute.precision}
    about = {'settings': as_dict(settings), 'identity': identity, 'environment': environment(device)}
    result = read_result(folder)
    if result and again:
        before = folder.with_name(f'{folder.name}.before')
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    elif result:
        same(result, about, folder)
        say(f'{folder}: finished before, {result["accuracy"]:.2%}; --again runs it again')
        return result
    return fit(folder, model.to(device), task, settings, compute, about)


def make_model(settings, task):
    """The backbone with its weights and what the method tunes, which alone requires a gradient; and what they were made
    of: the first digits of the SHA-256 of the backbone's weights without a head, and of files with code."""
    seed(settings.loop.seed)
    whole = settings.loop.tune in ('all', 'bias', 'head') and task.head is None
    backbone = make_backbone(settings, len(task.classes) if whole else 0)
    weights = [name.encode() + x.numpy().tobytes() for name, x in backbone.state_dict().items()
               if not name.startswith('head.')]
    identity = {'backbone': vit.digest(b''.join(weights))[:12], 'pictures by': task.source or settings.pictures.source}
    for where in identity['pictures by'], settings.loop.tune, settings.backbone.build:
        if '.py:' in where:
            name = f'code of {Path(where).name}'  # two files may have one name
            identity[name] = identity.get(name, '') + vit.digest(data.find(where).read_bytes())[:12]
    model = tuned(backbone, len(task.classes), settings)
    return model if task.head is None else task.head(model, len(task.classes)), identity


def make_backbone(settings, num_classes):
    """The model by its name, or by FILE.py:NAME, a function f(settings, num_classes), with its weights. 0: no head."""
    how, weights = settings.backbone, settings.machine.weights
    if not weights:
        raise InputError(f'{settings.model} has no weights of its own: name a file with --weights FILE, or random')
    if how.build:
        backbone = data.from_file(how.build, data.check_module, settings, num_classes)
    else:
        backbone = vit.build(settings.model, None, num_classes, how.img_size, how.readout)
    if weights != 'random':  # a file beside this one comes with the project
        there = Path(weights).exists() or not (HERE / weights).exists()
        vit.load_weights(backbone, weights if there else HERE / weights, head=False)
    return backbone


def tuned(backbone, num_classes, settings):
    """What the method makes of the backbone. In FILE.py:NAME it is a function of the frozen backbone, the number of
    classes and the settings, to a module from images [B, 3, H, W] to logits [B, C]."""
    tune = settings.loop.tune
    if tune == 'prompts':
        return getattr(backbone, 'IVPT', IVPT)(backbone, num_classes, settings.prompts)  # a backbone may have its own
    if '.py:' in tune:
        return data.from_file(tune, data.check_module, backbone.requires_grad_(False), num_classes, settings)
    if tune in ('head', 'bias'):  # bias: BitFit (Zaken et al., 2022)
        for name, p in backbone.named_parameters():
            p.requires_grad_(name.startswith('head.') or (tune == 'bias' and name.endswith('.bias')))
    return backbone


def trained(model):
    """What the method tunes, and buffers of its own, by name."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


def fit(folder, model, task, settings, compute, about):
    """Train the model from where the folder's checkpoint leaves it, score it, and write and return the result."""
    loop, lower = settings.loop, f'Lower the learning rate: --set lr={settings.loop.lr / 4:g}'
    guess = math.log(len(task.classes)) if task.guess is None else task.guess  # its loss
    learn, score = sets(task, settings)
    names = [data.identity(x, settings.machine.data)[0] for x, _ in getattr(score, 'samples', score)]
    learn = data.in_memory(learn, settings.machine, compute.device)
    score = data.in_memory(score, settings.machine, torch.device('cpu'))
    if hasattr(model, 'prepare'):  # a method's own: it gets the training pictures, in batches, before training
        model.prepare(data.batches(task.train, settings, compute.device))
    header(model, task, settings, compute, about)
    rehearse(model, task, learn[0], settings, compute)
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == 'float16')
    state, warned = State(model, make_optimizer(model, loop), scaler, []), False
    resume(folder, state, about)
    save(folder, state, about)  # what cannot be written is found out before the first epoch
    try:
        for done in train(state, task, learn, settings, compute):
            state.records.append(done)
            save(folder, state, about)
            left = timedelta(seconds=round(done['seconds'] * (loop.epochs - done['epoch'])))
            say('epoch {epoch:3d}/{epochs}  loss {loss:.4f}  lr {lr:.4g}  {images_per_second:.0f} images/s  '
                '{left} left'.format(**done, epochs=loop.epochs, left=left))
            above = done['epoch'] > loop.warmup * loop.epochs and done['loss'] > guess
            if above and (not warned or done['epoch'] == loop.epochs):  # the first time, and in the end
                say(f'          the loss is above that of a guess, {guess:.3g}, and may stay there. {lower}')
            warned = warned or above
        rows = answers(model, task, score, settings, compute)
        return finish(folder, state, task, [{'picture': name} | row for name, row in zip(names, rows)], about)
    except (FloatingPointError, KeyboardInterrupt) as stop:
        kept = f'{len(state.records)} of {loop.epochs} epochs are kept in {folder}'
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(f'stopped. {kept}; the same command goes on from there') from None
        raise InputError(f'{stop}. {kept}. {lower}') from None


@torch.no_grad()
def rehearse(model, task, picture, settings, compute):
    """Let a model answer before it is trained: what is wrong with it is found out now. Raises InputError."""
    images, _ = next(data.batches([picture], settings, compute.device))
    logits = model.eval()(images)
    right = 1, len(task.classes)
    if task.loss is torch.nn.functional.cross_entropy and logits.shape != right:
        raise InputError(f'{settings.method}: its logits of 1 image are {[*logits.shape]}, and not {[*right]}')
    if 'accuracy' not in scores_of(task, as_csv(answers(model, task, [picture], settings, compute))):
        raise InputError(f'{settings.task}: its score has no number by the name accuracy')


@torch.no_grad()
def answers(model, task, pictures, settings, compute):
    """What a model answers to pictures of its task: a dict for each. Raises InputError for another number of them."""
    model.eval()
    with compute.autocast():
        rows = task.answers(model, pictures, settings, compute.device)
    if len(rows) != len(pictures):
        raise InputError(f'{settings.task}: its function gives {len(rows)} answers to {len(pictures)} pictures')
    return rows


def sets(task, settings):
    """The pictures to train on and those to score. Raises InputError if there are none."""
    learn, score = (task.train + task.val, task.test) if settings.loop.score_on == 'test' else (task.train, task.val)
    if not len(learn) or not len(score):
        raise InputError(f'{len(learn)} images to train on and {len(score)} of {settings.loop.score_on} to score: look '
                         'at n_train and n_val, and at the lists of the data set')
    return learn, score


def finish(folder, state, task, rows, about):
    """Write, print and return the result of a model as the last epoch left it, by its answers."""
    settings, loop = about['settings'], about['settings']['loop']
    params = io.BytesIO()
    torch.save({name: x.to('cpu') for name, x in trained(state.model).items()}, params)
    params, predictions = params.getvalue(), as_csv(rows)
    result = {'task': settings['task'], 'model': settings['model'], 'method': settings['method'], 'seed': loop['seed'],
              'score_on': loop['score_on'], 'measure': task.measure, **scores_of(task, predictions),
              'images': len(rows), 'trained_parameters': count(state.model), 'final_loss': state.records[-1]['loss'],
              'seconds': sum(record['seconds'] for record in state.records), 'classes': task.classes, **about,
              'params_digest': vit.digest(params), 'predictions_digest': vit.digest(predictions)}
    write(folder / 'params.pth', params)
    write(folder / 'predictions.csv', predictions)
    write(folder / 'result.json', (json.dumps(signed(result), indent=1) + '\n').encode())
    say(f'{loop["score_on"]} {task.measure} after the last epoch: {result["accuracy"]:.2%} of {len(rows)} images'
        f'{is_random(settings)}. {folder}\n')
    return result


def scores_of(task, content):
    """The scores of predictions.csv, as numbers by name."""
    return {name: float(x) for name, x in task.score(from_csv(content)).items()}


def count(model):
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def is_random(settings):
    """What is added to every line about a run whose backbone knows nothing."""
    return ', random weights' if settings['machine']['weights'] == 'random' else ''


def header(model, task, settings, compute, about):
    """Say what is about to be trained, on what, with what."""
    how, size = settings.backbone, sum(p.numel() for p in model.parameters())
    shapes = [f'{name} {list(p.shape)}' for name, p in trained(model).items()]
    images = f'{len(task.train)} + {len(task.val)} images for training and validation, {len(task.test)} for testing'
    say('\n          '.join([f'task      {settings.task}: {images}, {len(task.classes)} classes', *task.notes]))
    say(f'backbone  {settings.model} at {how.img_size} pixels, {size / 1e6:.2f}M parameters in all, weights '
        f'{settings.machine.weights} ({about["identity"]["backbone"]})')
    say(f'pixels    mean {[*how.mean]}, std {[*how.std]}; if the weights had others: --set mean=[R,G,B] std=[R,G,B]')
    say(f'method    {settings.method}, seed {settings.loop.seed}: {count(model) / 1e6:.3f}M trained '
        f'({", ".join(shapes) if len(shapes) < 6 else f"{len(shapes)} tensors"})')
    say('device    ' + ', '.join(f'{name} {value}' for name, value in about['environment'].items()))
    say(f'numbers   {compute.precision}: {compute.why}')


def say(line, live=False):
    """Print a line, over a live one if there is one. A live one is for terminals: the next one overwrites it."""
    terminal = sys.stdout.isatty()
    if terminal or not live:
        print(f'\r{line:<79}' if terminal else line, end='' if live else '\n', flush=True)


# ---- The folder of a run: its files are whole at every moment -------------------------------------------

def name_of(settings):
    """METHOD[,NAME=VALUE,...], with the settings that the command line changed."""
    changes = [f'{name}={value}' for name, value in sorted(settings.changes.items())]
    return ','.join([settings.method, *settings.label, *changes])


def folder_of(settings):
    """Where a run writes. Slashes in a name become `_`. A file system takes 255 bytes: a longer name has its digest."""
    names = [re.sub(r'[^\w.+=,-]', '_', name) for name in (settings.task, settings.model, name_of(settings))]
    names = [x if len(x.encode()) < 250 else f'{x[:50]}-{vit.digest(x.encode())[:12]}' for x in names]
    return Path(settings.machine.runs, *names, f'seed{settings.loop.seed}')


def write(path, content):
    """Put bytes into a file, wholly or not at all."""
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


def save(folder, state, about):
    """Write a checkpoint, with all that the next epoch depends on, and log.jsonl, a line an epoch."""
    file = io.BytesIO()
    torch.save(about | {'records': state.records, 'trained': trained(state.model),
                        'optimizer': state.optimizer.state_dict(), 'scaler': state.scaler.state_dict()}, file)
    write(folder / 'checkpoint.pth', file.getvalue())
    write(folder / 'log.jsonl', ''.join(json.dumps(record) + '\n' for record in state.records).encode())


def resume(folder, state, about):
    """Put a state where the folder's checkpoint left it. One that is damaged is not used, which is said."""
    path = folder / 'checkpoint.pth'
    if not path.exists():
        return
    try:
        vit.check_zip(path)
        found = torch.load(path, map_location='cpu', weights_only=True)
        if not {'settings', 'identity', 'environment', 'records', 'trained', 'optimizer', 'scaler'} <= found.keys():
            raise ValueError('another file')
    except Exception:  # cut short, a wrong checksum, another file, code, which is not run
        return say(f'{path} is damaged and is not used')
    same(found, about, folder)
    state.model.load_state_dict(state.model.state_dict() | found['trained'])
    state.optimizer.load_state_dict(found['optimizer'])
    state.scaler.load_state_dict(found['scaler'])
    state.records.extend(found['records'])
    say(f'resumed   after epoch {len(state.records)}, from {folder}')
    if changed := differences(found['environment'], about['environment']):
        say(f'          with {changed}: not the same bits as without an interruption')


def as_dict(settings):
    """Settings as JSON keeps them: a dict of dicts, with lists."""
    return json.loads(json.dumps(asdict(settings)))


def environment(device):
    """What the bits of a result depend on beside the settings."""
    return {'device': device.type, 'threads': torch.get_num_threads(), 'torch': str(torch.__version__),
            'torchvision': torchvision.__version__}


def fixed(about):
    """What the numbers of a run depend on, by name: all settings but the machine's, and what it was made of."""
    groups = [about['settings'][name] for name in ('backbone', 'prompts', 'pictures', 'loop', 'options')]
    return {name: value for group in (*groups, about['identity']) for name, value in group.items()}


def differences(old, new):
    """In words, what changed from one dict to another; '' if nothing did."""
    return ', '.join(f'{name} {old.get(name)!r} -> {new.get(name)!r}' for name in sorted(old.keys() | new.keys())
                     if old.get(name) != new.get(name))


def same(old, about, folder):
    """Raise InputError if a result or a checkpoint was begun with what would give other numbers."""
    if changed := differences(fixed(old), fixed(about)):
        raise InputError(f'{folder} was begun with other settings, pictures or weights: {changed}. Give those to go '
                         'on, --again to make a finished run again, or another folder with --set runs=DIR')


def read_result(folder):
    """The result in a folder; None if there is none, or one of its files is not as the run wrote it."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        result = json.loads((folder / 'result.json').read_bytes())
        own = {name: x for name, x in result.items() if name != 'digest'}
        found = [vit.digest((folder / name).read_bytes()) for name in ('params.pth', 'predictions.csv')]
        return own if signed(own) == result and found == [own['params_digest'], own['predictions_digest']] else None


def signed(result):
    """A result with the digest of all that it says, by which a change of it is seen."""
    return result | {'digest': vit.digest(json.dumps(result).encode())}


def as_csv(rows):
    """A table of CSV, as bytes, of dicts."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode(errors='backslashreplace')  # not every file's name is UTF-8


def from_csv(content):
    """The rows of a table of CSV as dicts of texts."""
    return list(csv.DictReader(io.StringIO(content.decode())))


# ---- Settings -------------------------------------------------------------------------------------------

GROUPS = {'backbone': Backbone, 'prompts': Prompts, 'pictures': data.Pictures, 'loop': Loop, 'machine': Machine}
TYPES = {x.name: x.type for group in GROUPS.values() for x in fields(group)}  # of each setting, with its range
DEFAULTS = {x.name: x.default for group in GROUPS.values() for x in fields(group)}
DOORS = {'models': 'build', 'tasks': 'source', 'methods': 'tune'}  # the setting that FILE.py:NAME stands for
OTHERS = ('model', 'method', 'grid', 'per_task')  # what an entry may say beside settings; see configs.yaml
UNNAMED = {'seed', *(x.name for x in fields(Machine))}  # they give a run's folder no name
KINDS = {int: 'a whole number', float: 'a number', tuple: 'three numbers', bool: 'true or false', str: 'a word'}


@dataclass(frozen=True)
class Settings:
    """All settings of one run."""

    task: str
    model: str
    method: str
    backbone: Backbone
    prompts: Prompts
    pictures: data.Pictures
    loop: Loop
    machine: Machine
    options: object  # what an entry says to a function in a file: a frozen dataclass, too
    changes: dict  # what the command line changed
    label: tuple = ()  # further words in the name of the folder


def settings_of(configs, task, model=None, method=None, changes=None):
    """The settings of one run: the defaults of the groups, then the entries of its model, its task and its method, then
    `changes`, the command line's; the later one counts. Raises InputError for an unknown name or a wrong value."""
    of_task = entry(configs, 'tasks', task)
    model = model or str(of_task.get('model', 'vit_base_patch16_224.orig_in21k'))
    method = method or str(of_task.get('method', 'ivpt'))
    types, values = dict(TYPES), dict(DEFAULTS)
    for section, name in ('models', model), ('tasks', task), ('methods', method):
        layer = {key: x for key, x in entry(configs, section, name, task).items() if key not in OTHERS}
        if '.py:' in str(layer.get(DOORS[section])):  # its function in a file has settings of its own
            types |= {key: type(x) for key, x in layer.items() if key not in TYPES}
        values |= {key: checked(key, x, types, f'{section}: {name}') for key, x in layer.items()}
    changes = {key: checked(key, x, types, '--set') for key, x in (changes or {}).items()}
    changed = {key: x for key, x in changes.items() if x != values.get(key) and key not in UNNAMED}
    values |= changes
    if not values['img_size']:  # it is what the model's name ends in
        ending = re.search(r'_(\d{1,5})(\..*)?$', model)
        if values['build'] and not ending:
            raise InputError(f'{model}: its name has no image size: --set img_size=PIXELS')
        values['img_size'] = int(ending[1]) if values['build'] else vit.parse_name(model)[2]
    try:
        groups = GROUPS | {'options': make_dataclass('Options', [x for x in types if x not in TYPES], frozen=True)}
        groups = {name: group(**{x.name: values[x.name] for x in fields(group)}) for name, group in groups.items()}
    except TypeError as error:  # a name that Python does not take
        raise InputError(f'configs.yaml: a setting of {task}, {model} or {method}: {error}') from None
    return Settings(task, model, method, **groups, changes=changed)


def entry(configs, section, name, task=''):
    """An entry of configs.yaml by name, with what it says of a task. FILE.py:NAME needs none, nor does NAME of a model
    without .PRETRAINING. Raises InputError."""
    known, (plain, dot, _) = configs[section], name.partition('.')
    if name in known:
        more = known[name].get('per_task', {})
        more = more.get(task, {}) if isinstance(more, dict) else more
        if not isinstance(more, dict):
            raise InputError(f'configs.yaml: {section}: {name}: per_task has settings by task, not {repr(more)[:100]}')
        return known[name] | more
    if '.py:' in name:
        return {DOORS[section]: name}
    if section != 'models':
        raise InputError(f'unknown {section[:-1]} {name!r}{nearest(name, known)}')
    if not dot:
        return {}
    like = [x for x in known if x.startswith(f'{plain}.')]  # another model is no answer to another pre-training
    raise InputError(f'unknown model {name!r}{nearest(name, like) if like else ""}; with weights of your own it is '
                     f'--model {plain} --weights FILE')


def nearest(name, known):
    """What may have been meant, and what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f': did you mean {close[0]!r}?' if close else f': one of {", ".join(known)}'


def checked(name, value, types, where):
    """A setting's value, or its text on the command line, in its type and range. Raises InputError."""
    if name not in types:
        raise InputError(f'{where}: unknown setting {name!r}{nearest(str(name), types)}')
    kind, *rule = get_args(types[name]) or (types[name],)
    given, words = value, KINDS.get(kind, f'a {kind.__name__}')
    if type(given) is str and kind not in (str, int, float):
        value = read_yaml(given, f'{where} {name}')
    if kind in (str, int, float) and type(given) in (str, int) or (kind, type(value)) == (tuple, list):
        with suppress(ValueError, OverflowError):
            value = kind(value)  # YAML takes 1e-3 for a word
    right = type(value) is kind and (kind is not float or math.isfinite(value))
    if rule and kind is str:
        words = f'one of {", ".join(filter(None, rule))}'
        right = value in rule or (right and 'FILE.py:NAME' in rule and '.py:' in value)
    elif rule:
        words = f'{words} from {rule[0]:g} to {rule[1]:g}'
        numbers = value if type(value) is tuple else [value]
        right = right and len(numbers) == (3 if kind is tuple else 1)
        right = right and all(type(x) in (int, float) and rule[0] <= x <= rule[1] for x in numbers)
    if not right:
        raise InputError(f'{where}: {name} is {words}, not {repr(given)[:100]}')
    return value


def read_yaml(text, where):
    """YAML without code in it; InputError if it is not YAML."""
    try:
        return yaml.load(text, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))  # one is in C
    except Exception as error:  # PyYAML's constructors raise what int(), date() and their like raise
        raise InputError(f'{where}: not YAML: {error or type(error).__name__}') from None


def read_configs():
    """configs.yaml: sections of entries, by name. What an entry says is checked when it is used."""
    configs = read_yaml((HERE / 'configs.yaml').read_bytes(), 'configs.yaml')
    for section, kind in {**dict.fromkeys(DOORS, dict), 'groups': list}.items():
        entries = configs.get(section) if isinstance(configs, dict) else None
        if not isinstance(entries, dict):
            raise InputError(f'configs.yaml: {section} is missing, or has no entries by name')
        for name, x in entries.items():
            if not isinstance(x, kind):
                raise InputError(f'configs.yaml: {section}: {name} is {repr(x)[:100]}, and not a {kind.__name__}')
    return configs


# ---- Command line ---------------------------------------------------------------------------------------

def parser(doc):
    """What all programs take from the command line. A mistake is one line, as all others."""
    def refuse(message):
        raise InputError(f'{message}; a setting is changed by --set NAME=VALUE, and --help lists the options')
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = refuse
    parser.register('action', None, Once)
    parser.add_argument('--task', help='an entry of tasks or groups in configs.yaml, or FILE.py:NAME, or several: A,B')
    parser.add_argument('--method', help='an entry of methods, or FILE.py:NAME, or several')
    parser.add_argument('--model', help='an entry of models, a name such as vit_small_patch14_224, or several')
    parser.add_argument('--seed', help='a number, or several', default='0')
    parser.add_argument('--weights', help='path or URL of a checkpoint, with #PREFIX for one of its ViTs; or random')
    parser.add_argument('--data', help='folder of the data sets')
    parser.add_argument('--set', nargs='+', default=[], metavar='NAME=VALUE', action='extend', help='any setting')
    return parser


class Once(argparse.Action):
    """An option with a value that is given once: of two, argparse would drop the first in silence."""

    def __call__(self, parser, namespace, values, option=None):
        if option in vars(namespace):
            raise InputError(f'{option} is given twice: write {option} A,B')
        vars(namespace).update({self.dest: values, option: True})


def runs_of(args, configs):
    """The settings of all runs that a command line names."""
    changes, runs = changed(args), []
    for task in dict.fromkeys(tasks_of(configs, named(args.task) or ['where_red'])):
        methods = named(args.method) or named(str(entry(configs, 'tasks', task).get('method', 'ivpt')))
        runs += [settings_of(configs, task, model, method, changes | {'seed': seed})
                 for model in named(args.model) or [None] for seed in named(args.seed) for method in methods]
    return [*{repr(settings): settings for settings in runs}.values()]  # each once: 0 and 00 are one seed


def tasks_of(configs, names, inside=()):
    """The tasks that names of tasks and groups stand for. inside: the groups that have these. Raises InputError."""
    tasks, groups = [], configs['groups']
    for name in map(str, names):
        if name in inside:
            raise InputError(f'configs.yaml: the group {name} has itself among its members')
        tasks += tasks_of(configs, groups[name], (*inside, name)) if name in groups else [name]
    return tasks


def changed(args):
    """The settings that a command line changes, as texts by name."""
    changes = {}
    given = args.set + [f'{name}={x}' for name in ('weights', 'data') if (x := getattr(args, name)) is not None]
    for name, _, value in (change.partition('=') for change in given):
        if name in changes:
            raise InputError(f'--set {name}: it is given twice; give it once')
        if name in ('task', 'method', 'model', 'seed'):
            raise InputError(f'--set {name}={value}: write --{name} {value}')
        changes[name] = os.path.expanduser(value)
    if 'data' in changes and not os.path.isdir(changes['data']):
        raise InputError(f'{changes["data"]}: there is no such folder of data sets; make it to download them there')
    return changes


def named(text):
    """The names in A,B,..., each once; none in None. Raises InputError for an empty one."""
    names = [] if text is None else [*dict.fromkeys(text.split(','))]
    if '' in names:
        raise InputError(f'a name is missing in {text!r}: give it, or leave the option out')
    return names


def attempt(said, work, *arguments):
    """What a work makes of its arguments; None if something is wrong with them, which is said if it was not `said`."""
    try:
        return work(*arguments)
    except Exception as error:
        line = the_users(error)
        if isinstance(error, OSError) and str(error) == line:
            raise  # not of a file that came in: a full disk is the end of all
        if line not in said:
            complain(line)
        said.add(line)


def the_users(error):
    """The line for an error that the user can mend, with its place in code that came in. Raises one of this program."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f'{data.LOADED[x.filename]}, line {x.lineno}' for x in frames if x.filename in data.LOADED]
    if isinstance(error, torch.OutOfMemoryError):
        return 'the GPU has too little memory: --set batch=8 takes smaller batches, --set cache_gb=0 keeps no pictures'
    if places and not isinstance(error, InputError):
        return f'{places[-1]}: {type(error).__name__}: {error}'
    if isinstance(error, (InputError, FloatingPointError, OSError, SyntaxError)):  # they name file or place
        return str(error)
    mine = [x for x in frames if x.filename == train.__code__.co_filename]
    if {'make_model', 'sets', 'rehearse', 'train'} & {x.name for x in mine}:
        place = f'train.py, line {mine[-1].lineno}'
        return f'task, model and method do not fit together: {place}: {type(error).__name__}: {error}'
    raise error


def say_results(results):
    """A line for each result."""
    for result in results:
        spent = timedelta(seconds=round(result['seconds']))
        say('{task:16} {model:32} {method:12} seed {seed}  {accuracy:7.2%}  '.format(**result)
            + f'{result["trained_parameters"] / 1e6:.3f}M trained  {spent}{is_random(result["settings"])}')


def complain(what):
    """One line for the user."""
    line = ''.join(c if c.isprintable() else '?' for c in ' '.join(str(what).split()))
    print(f'error: {line}', file=sys.stderr, flush=True)


def program(work):
    """A program that does a work: its exit status; what the user got wrong is one line."""
    def main(argv=None):
        try:
            return work(argv)
        except KeyboardInterrupt as stop:
            complain(str(stop) or 'stopped; what is finished is kept')
            return 130
        except Exception as error:
            complain(the_users(error))
            return 2
    return main


@program
def main(argv):
    """Train what a command line names, one run after another. Returns the exit status."""
    if 'RANK' in os.environ:
        raise InputError('train.py is one process; under torchrun, sweep.py divides runs among processes')
    options = parser(__doc__)
    options.add_argument('--again', action='store_true', help='make a finished run again; the old one is kept')
    args, said = options.parse_args(argv), set()
    results = [attempt(said, run, settings, args.again) for settings in runs_of(args, read_configs())]
    if len(results) > 1:
        say_results(filter(None, results))
    return 0 if all(results) else 2


def start(main):
    """Run the main function of a program as a command, and exit with its status."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python train.py | head` ends as other commands do
    sys.stdout.reconfigure(errors='backslashreplace')  # not every file's name, and not every terminal, is UTF-8
    sys.exit(main())


if __name__ == '__main__':
    start(main)
