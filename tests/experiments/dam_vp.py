"""DAM-VP (Huang et al., 2023), the last system of Tables 1, 8 and 9; and how its common prompt is learned.

The pictures to train on fall into clusters by f(x), the frozen backbone's feature. Each cluster has a prompt: pixels in
a frame around the image, which are added to it. The backbone looks at an image twice:

    κ(x) = argmin_k |f(x) - c_k|           the first pass; c_k is the prototype of cluster k, the mean of its features
    logits = head(f(x + p_κ(x)))           the second

With max_clusters=1 all images have one prompt, which is VP (Bahng et al., 2022). All prompts start as one: normal noise
of standard deviation `noise`, or what a file has. Reptile learned it on other tasks:

    python tests/experiments/dam_vp.py --on A,B,C            writes runs/start/A+B+C/MODEL/seed0.pth
    python train.py --task D --method dam_vp --set start=runs/start/A+B+C/MODEL/seed0.pth

The tasks, the model and the settings are those of configs.yaml, as for train.py; but there are 200 epochs, and the rate
falls from lr=1.0 by a cosine. The authors' tasks: SUN397, STL-10, Fru92, Veg200, Oxford-IIIT Pets and EuroSAT.
"""

import io
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import vit
from vit import InputError, init_linear

MOST = 1000  # pictures that are clustered: their distances are a matrix
STEPS, STEP_SIZE, HEAD_LR = 4, 0.5, 0.1  # of Reptile: steps of SGD on a batch, how far p follows, the heads' rate
REPTILE = ['epochs=200', 'lr=1.0', 'weight_decay=0.0001']  # its other settings, where the command line has none


def frame(size):
    """The places of the frame's pixels in an image of size x size pixels, row after row: [n]. Its width is 30 of 224
    pixels, in proportion."""
    width = max(1, round(30 * size / 224))
    edge = [min(y, size - 1 - y) < width for y in range(size)]
    return torch.tensor([y * size + x for y in range(size) for x in range(size) if edge[y] or edge[x]])


def average_linkage(x, threshold, most):
    """The cluster of each point of x [n, D]: [n], from 0 on. Of all clusters the two nearest are merged, by the mean
    distance of their points, while that is below the threshold, or there are more clusters than `most`."""
    n, inf = len(x), float('inf')
    size, cluster = torch.ones(n, dtype=x.dtype), torch.arange(n)
    d = torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist').fill_diagonal_(inf)
    for clusters in range(n, 1, -1):
        i, j = divmod(d.argmin().item(), n)
        if d[i, j] >= threshold and clusters <= most:
            break
        d[i] = d[:, i] = (size[i] * d[i] + size[j] * d[j]) / (size[i] + size[j])
        d[j] = d[:, j] = inf
        size[i] += size[j]
        cluster[cluster == j] = i
    return cluster.unique(return_inverse=True)[1]


class DAMVP(nn.Module):
    """A frozen backbone, K prompts in `frames` [K, 3, n], their prototypes [K, D] and a linear head: images
    [B, 3, H, W] -> logits [B, C]. There are none before `prepare` has seen the pictures."""

    def __init__(self, backbone, num_classes, settings):
        super().__init__()
        self.vit, self.s = backbone.requires_grad_(False), settings.options
        at = frame(settings.backbone.img_size)
        self.register_buffer('at', at, persistent=False)
        self.register_buffer('prototypes', torch.zeros(0, backbone.D))
        self.frames = nn.Parameter(torch.zeros(0, 3, len(at)))
        self.head = nn.Linear(backbone.D, num_classes)
        init_linear(self.head)

    @torch.no_grad()
    def prepare(self, batches):
        """Find the clusters of the pictures, or of 1,000 of them, evenly chosen, and start their prompts. Raises
        InputError if the file of the start is no such prompt."""
        start = self.start().to(self.at.device)
        x = torch.cat([self.vit(images) for images, _ in batches]).cpu().double()
        x = x[torch.linspace(0, len(x) - 1, min(len(x), MOST)).round().long()]
        cluster = average_linkage(x, self.s.threshold, self.s.max_clusters)
        self.take(torch.stack([x[cluster == k].mean(dim=0) for k in range(cluster.max() + 1)]))
        self.frames.copy_(start)

    def start(self):
        """The prompt that all clusters start with, [3, n]."""
        shape, path = self.frames.shape[1:], self.s.start
        if path == 'random':
            return self.s.noise * torch.randn(shape)
        p = vit.read_state_dict(Path(path)).get('start') if Path(path).is_file() else None
        if p is None or p.shape != shape or not p.isfinite().all():
            raise InputError(f'start={path} is no file with a prompt of {[*shape]} numbers, nor the word random: '
                             'dam_vp.py --on A,B,C makes one, for images of one size')
        return p

    def take(self, prototypes):
        """Have these clusters. An optimizer that has the parameter keeps it."""
        self.prototypes = prototypes.to(self.prototypes)
        self.frames.data = self.frames.data.new_zeros(len(prototypes), *self.frames.shape[1:])

    def _load_from_state_dict(self, state, prefix, *rest):  # their number depends on the pictures
        prototypes = state.get(f'{prefix}prototypes', self.prototypes)
        if prototypes.shape != self.prototypes.shape:
            self.take(prototypes)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, images):
        return self.classify(images, self.nearest(images))

    @torch.no_grad()
    def nearest(self, images):
        """κ(x) [B]: the cluster whose prototype is the nearest to each image's feature."""
        f = self.vit(images).to(self.prototypes.dtype)
        return torch.cdist(f, self.prototypes, compute_mode='donot_use_mm_for_euclid_dist').argmin(dim=1)

    def classify(self, images, kappa):
        """Logits [B, C] of images with the prompts of the clusters kappa [B]."""
        prompted = images.flatten(2).index_add(2, self.at, self.frames[kappa])
        return self.head(self.vit(prompted.view_as(images)))


dam_vp = DAMVP  # what configs.yaml names


# ---- Reptile: the prompt that all start with ------------------------------------------------------------

def meta_step(p, models, batches, lr, weight_decay):
    """The prompt p [3, n] after one step of Reptile. Each cluster of each task starts with p and takes a few steps of
    SGD on the task's batch, (images, labels), as its head does, which keeps them. Then p goes a part of the way to the
    mean of all; a cluster without an image in the batch has stayed."""
    moved, clusters = torch.zeros_like(p), 0
    for model, (images, labels) in zip(models, batches):
        kappa = model.nearest(images)
        model.frames.data.copy_(p)
        optimizer = torch.optim.SGD([{'params': [model.frames], 'lr': lr, 'weight_decay': weight_decay},
                                     {'params': model.head.parameters(), 'lr': HEAD_LR}])
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model.classify(images, kappa), labels).backward()
            optimizer.step()
        moved += (model.frames.detach()[kappa.unique()] - p).sum(dim=0)
        clusters += len(model.frames)
    return p + STEP_SIZE * moved / clusters


def main(argv):
    """Learn the prompt on the tasks that a command line names, and write it. Returns the exit status."""
    import train  # not above: train.py loads this file, and would be loaded twice
    options = train.parser(__doc__)
    options.add_argument('--on', metavar='A,B,C', required=True, help='the tasks that it is learned on')
    args = options.parse_args(argv)
    given = {word.partition('=')[0] for word in args.set}
    args.set += [word for word in REPTILE if word.partition('=')[0] not in given]
    args.task, args.method = args.on, 'dam_vp'
    runs = train.runs_of(args, train.read_configs())
    for seed in dict.fromkeys(settings.loop.seed for settings in runs):
        learn_start([settings for settings in runs if settings.loop.seed == seed])
    return 0


def learn_start(runs):
    """Learn the prompt with one seed, on the tasks of some settings, and write it into a file."""
    import train
    loop, machine, model, names = runs[0].loop, runs[0].machine, runs[0].model, '+'.join(x.task for x in runs)
    if {settings.model for settings in runs} != {model}:
        raise InputError(f'{names}: these tasks have different models: name one with --model')
    torch.manual_seed(loop.seed)
    device = train.find_device(machine.device)
    backbone = train.make_backbone(runs[0], 0).to(device)
    models, counts, epochs = zip(*(prepared(backbone, settings, device) for settings in runs))
    train.say(f'{names}: {", ".join(str(len(x.frames)) for x in models)} clusters')
    p, step = models[0].start().to(device), 0
    for epoch in range(loop.epochs):
        for parts in zip(*(batches(epoch=epoch) for batches in epochs)):
            step += 1
            lr = loop.lr * train.schedule(step, loop.epochs * min(counts), 0.0)
            p = meta_step(p, models, parts, lr, loop.weight_decay)
        train.say(f'epoch {epoch + 1}/{loop.epochs}  |p| {p.norm():.4g}')
    file, path = io.BytesIO(), Path(machine.runs, 'start', names.replace('/', '_'), model, f'seed{loop.seed}.pth')
    torch.save({'start': p.cpu()}, file)
    train.write(path, file.getvalue())
    train.say(f'--method dam_vp --set start={path}')


def prepared(backbone, settings, device):
    """DAM-VP with the clusters of a task, how many batches its training pictures are, and a function from an epoch to
    these."""
    task = data.load(settings)
    pictures = data.in_memory(task.train, settings.machine, device)
    model = DAMVP(backbone, len(task.classes), settings).to(device).eval()
    model.prepare(data.batches(pictures, settings, device))
    augment = task.augments[settings.pictures.augment]
    batches = partial(data.batches, pictures, settings, device, augment=augment)
    return model, math.ceil(len(pictures) / settings.loop.batch), batches


if __name__ == '__main__':
    import train
    train.start(train.program(main))
