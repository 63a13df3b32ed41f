"""What prompts cost, as ratios to the plain frozen ViT. A command, not a test:

    python tests/tools/bench.py                          ViT-B/16 at 224 pixels, batch 8, float32, on the CPU
    python tests/tools/bench.py --precision float32,auto --prompts 10,50,200
    python tests/tools/bench.py --device cuda --precision bfloat16 --batch 64
    python tests/tools/bench.py --variants "iVPT 10,iVPT 200" --rounds 60       these and the plain ViT alone
    python tests/tools/bench.py --variants lora,ssf      methods of configs.yaml, with their settings there
    python tests/tools/bench.py --loop where_blue        images/s of train.py's loop beside the model's alone

All variants run in one process, in each number format, round after round, in a random order each time, first the
inferences and then the training steps; the ratios to the plain ViT in the same format, and to the plain ViT in
float32, are taken within each round, and the median over rounds is printed, with the quartiles. The plain ViT is
run as timm runs it, every token through every layer, the last one included, and no attention weights beside; its
head and position embedding are trained, so that a gradient flows through every layer. "Concatenated" is Eq. 3 taken
literally, as the public code of the field does it: prompts are tokens of the sequence, with queries and an MLP of
their own, and their outputs are dropped.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import train
import vit
from ivpt import reinforce_, top_k

CONFIGS = train.read_configs()
CLASSES = 100


class Concatenated(torch.nn.Module):
    """Eq. 3 with the prompts in the sequence: [z_cls, P̂, Z] through every layer, P̂'s outputs dropped."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        model, vit = self.model, self.model.vit
        P_hat, tokens = model.prompts(), vit.embed(images)
        N, last = P_hat.shape[1], len(vit.blocks) - 1
        for l, layer in enumerate(vit.blocks):
            prompts = P_hat[l].expand(len(tokens), -1, -1)
            x, w = layer(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1),
                         need_weights=model.P_re is not None and l < last)
            tokens = torch.cat([x[:, :1], x[:, 1 + N:]], dim=1)
            if model.P_re is not None and l < last:
                tokens = reinforce_(tokens, 1 + top_k(w[:, 1 + N:], model.k), model.P_re[l])
        return model.head(vit.norm(tokens[:, 0]))


def settings_of(args, method, **changes):
    """The settings of a method on random weights."""
    return train.settings_of(CONFIGS, 'where_blue', args.model, method, {'weights': 'random', 'k': args.k} | changes)


def build(variant, args):
    """A variant by its name: 'plain', 'METHOD N' with or without ' concatenated', or a method of configs.yaml, with its
    settings there, and prepared where it has a `prepare`."""
    method, *N = variant.split()
    task = data.Task([], [], [], [str(c) for c in range(CLASSES)])
    changes = {'N': int(N[0])} if N else {}
    settings = settings_of(args, 'linear' if method == 'plain' else method.lower(), **changes)
    model, _ = train.make_model(settings, task)
    if method == 'plain':
        model.pos_embed.requires_grad_(True)
    model = (Concatenated(model) if 'concatenated' in N else model).to(args.device)
    if hasattr(model, 'prepare'):
        model.prepare([batch(args)])
    return model


def step(model, images, labels, precision):
    """One training step: forward, backward, SGD."""
    with train.Compute(images.device, precision, '').autocast():
        loss = F.cross_entropy(model.train()(images), labels)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    model.zero_grad()


@torch.inference_mode()
def infer(model, images, labels, precision):
    """One forward pass."""
    with train.Compute(images.device, precision, '').autocast():
        model.eval()(images)


def seconds(function, *arguments, device):
    """How long one call takes, the device's work included."""
    start = time.perf_counter()
    function(*arguments)
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def batch(args):
    generator = torch.Generator().manual_seed(0)
    size = settings_of(args, 'linear').backbone.img_size
    images = torch.randn(args.batch, 3, size, size, generator=generator)
    return images.to(args.device), torch.randint(CLASSES, (args.batch,), generator=generator).to(args.device)


def timings(variants, precisions, args):
    """A row, a dict, for each variant and format: medians of seconds and of the two ratios, quartiles of the first."""
    models, (images, labels) = {name: build(name, args) for name in variants}, batch(args)
    agree(models, images[:2])
    rows = {(name, precision): {'variant': name, 'precision': precision} for precision in precisions for name in models}
    for kind, function in ('inference', infer), ('training', step):  # before training: that leaves another heap
        taken = {key: [] for key in rows}
        for round_ in range(args.rounds + 1):
            for name, precision in random.Random(round_).sample(list(rows), len(rows)):
                t = seconds(function, models[name], images, labels, precision, device=args.device)
                if round_:  # the first is a warm-up
                    taken[name, precision].append(t)
        for (name, precision), row in rows.items():
            mine = taken[name, precision]
            ratios = torch.tensor([a / b for a, b in zip(mine, taken['plain', precision])])
            to_float32 = [a / b for a, b in zip(mine, taken.get(('plain', 'float32'), mine))]
            row |= {f'{kind}_seconds': statistics.median(mine), kind: ratios.quantile(0.5).item(),
                    f'{kind}_quartiles': ratios.quantile(torch.tensor([0.25, 0.75])).tolist(),
                    f'{kind}_to_float32_plain': statistics.median(to_float32)}
    return list(rows.values())


@torch.no_grad()
def agree(models, images):
    """What is compared computes the same: ours and the concatenation, from the same seed."""
    for name, ours in models.items():
        if concatenated := models.get(f'{name} concatenated'):
            torch.testing.assert_close(ours(images), concatenated(images), rtol=1e-3, atol=1e-3)


def peak_memory(variant, precision, args):
    """Peak memory of three training steps in bytes: CUDA's own counter, or a fresh process's on the CPU."""
    if args.device == 'cuda':
        return own_peak(variant, precision, args)
    with multiprocessing.get_context('spawn').Pool(1) as process:
        return process.apply(own_peak, (variant, precision, args))


def own_peak(variant, precision, args):
    """Peak memory of this process in three training steps. It starts anew, after what `prepare` takes."""
    model, data = build(variant, args), batch(args)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')
    for _ in range(3):
        step(model, *data, precision)
    if args.device == 'cuda':
        return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status').read_text()  # Linux; getrusage would count the parent's peak as well
    return int(status.split('VmHWM:')[1].split()[0]) * 1024


def multiply_adds(model, args):
    """Multiply-adds of the forward pass, by torch's counter, an image's share of a batch (a batch shares the
    keys and values of its prompts): in all, and in linear maps alone."""
    images, _ = batch(args)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused one is not counted
        model.eval().requires_grad_(False)(images)
    counts = counter.get_flop_counts()['Global']
    linear = sum(n for op, n in counts.items() if any(word in str(op) for word in ('addmm', 'convolution', '.mm')))
    return counter.get_total_flops() / 2 / args.batch, linear / 2 / args.batch


def loop(task, changes, rounds):
    """Images/s of train.py's loop on a task, and of the same steps on one batch of random tensors, in turn."""
    settings = train.settings_of(CONFIGS, task, None, 'ivpt', changes | {'epochs': rounds + 1, 'lr': 1e-9})
    device, task_ = train.find_device(), data.load(settings)
    model, _ = train.make_model(settings, task_)
    model.to(device)
    compute = train.Compute(device, *train.number_format(settings.loop.precision, device, model.vit.D))
    learn = data.in_memory(task_.train + task_.val, settings.machine, device)
    images, labels = (x.clone() for x in next(data.batches(learn, settings, device, epoch=0)))
    images.normal_()
    optimizer, steps = train.make_optimizer(model, settings.loop), round(len(learn) / len(labels))

    def alone():
        for _ in range(steps):
            with compute.autocast():
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    state, rates = train.State(model, optimizer, torch.amp.GradScaler(device.type, enabled=False), []), []
    for record in train.train(state, task_, learn, settings, compute):
        rates.append((record['images_per_second'], steps * len(labels) / seconds(alone, device=device.type)))
    in_loop, by_itself = (statistics.median(rate) for rate in zip(*rates[1:]))
    share = statistics.median(a / b for a, b in rates[1:])
    print(f'{task}, {settings.model}, batch {settings.loop.batch}, {device}: {in_loop:.1f} images/s in the loop, '
          f'{by_itself:.1f} for the model alone on random tensors; {100 * share:.1f}%, median over {rounds} epochs')


def measure(args):
    """Print a table with a row for each variant in each format."""
    kinds = 'VPT {} concatenated', 'iVPT {} concatenated', 'VPT {}', 'CDC {}', 'iVPT {}'
    usual = [kind.format(N) for N in args.prompts.split(',') for kind in kinds]
    variants = args.variants.split(',') if args.variants else usual
    device, D = torch.device(args.device), build('plain', args).D
    formats = [train.number_format(name, device, D)[0] for name in args.precision.split(',')]
    rows = timings(['plain', *variants], list(dict.fromkeys(formats)), args)
    name = torch.cuda.get_device_name() if args.device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{args.model}, batch {args.batch}, {name}, torch {torch.__version__}, k={args.k}, medians over '
          f'{args.rounds} rounds; ratios to the plain frozen ViT in the same format | in float32')
    print('| variant, N | format | training step | ratio | | inference | ratio | | peak memory | ratio | trained '
          '| G multiply-adds | linear alone |\n' + '| --- ' * 13 + '|')
    plain = {}
    for row in rows:
        row['memory'] = peak_memory(row['variant'], row['precision'], args)
        plain.setdefault(row['precision'], row['memory'])  # it comes first
        model = build(row['variant'], args)
        row['trained'] = train.count(model)
        row['multiply_adds'], row['linear_multiply_adds'] = multiply_adds(model, args)
        say_row(row, plain[row['precision']])


def say_row(row, plain_memory):
    """Print a row of the table."""
    times = [f'{row[f"{kind}_seconds"]:.3f} s | {row[kind]:.3f} ({row[f"{kind}_quartiles"][0]:.2f}-'
             f'{row[f"{kind}_quartiles"][1]:.2f}) | {row[f"{kind}_to_float32_plain"]:.3f}'
             for kind in ('training', 'inference')]
    print(f'| {row["variant"]} | {row["precision"]} | {times[0]} | {times[1]} | {row["memory"] / 2 ** 20:.0f} MiB '
          f'| {row["memory"] / plain_memory:.3f} | {row["trained"] / 1e6:.3f}M '
          f'| {row["multiply_adds"] / 1e9:.2f} | {row["linear_multiply_adds"] / 1e9:.2f} |', flush=True)


def main():
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vit_base_patch16_224')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--precision', default='float32', help='float32, bfloat16, float16 or auto, or several')
    parser.add_argument('--prompts', default='10', help='N, or several: 10,50,200')
    parser.add_argument('--k', type=int, default=10)
    parser.add_argument('--variants', help='these alone: "iVPT 10,iVPT 50 concatenated,lora,ssf"')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--loop', metavar='TASK')
    parser.add_argument('--set', nargs='+', default=[], metavar='NAME=VALUE', help='settings of --loop')
    args = parser.parse_args()
    if args.loop:
        loop(args.loop, dict(change.split('=', 1) for change in args.set), args.rounds)
    else:
        measure(args)


if __name__ == '__main__':
    try:
        main()
    except vit.InputError as error:
        sys.exit(f'bench.py: {error}')
