"""What the property tests draw: small sizes and a seed, and from these the tensors and the models.

A failing test prints its case, `Case(B=1, L=2, ...)`: small numbers that Hypothesis has shrunk, from which
every tensor follows. Everything is float64, so that "equal" can mean equal to rounding.
"""

import zlib
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import vit
from ivpt import IVPT, Prompts

METHODS = {  # the rows of Table 2
    'vpt': dict(structure='vpt', aggregation=False, reinforcement='none'),
    'cdc': dict(structure='cdc', aggregation=False, reinforcement='none'),
    'cdc_da': dict(structure='cdc', aggregation=True, reinforcement='none'),
    'vpt_ar': dict(structure='vpt', aggregation=False, reinforcement='topk'),
    'cdc_ar': dict(structure='cdc', aggregation=False, reinforcement='topk'),
    'ivpt': dict(structure='cdc', aggregation=True, reinforcement='topk'),
}

OTHERS = {  # the rows of Tables 3 and 4 that are not in Table 2; inherited prompts are in tests/experiments
    'vanilla_cdc': dict(structure='vanilla_cdc', aggregation=False, reinforcement='none'),
    'ivpt_all': dict(structure='cdc', aggregation=True, reinforcement='all'),
}


@dataclass(frozen=True)
class Case:
    """The letters of vit.py, and a seed. The same name and shape always give the same tensor."""

    B: int
    L: int
    N: int
    M: int
    N_h: int
    d: int
    k: int
    C: int
    seed: int

    @property
    def D(self):
        return self.N_h * self.d

    def generator(self, name):
        return torch.Generator().manual_seed(zlib.crc32(f'{self.seed} {name}'.encode()))

    def normal(self, name, *shape):
        return torch.randn(shape, generator=self.generator(name), dtype=torch.float64)

    def integers(self, name, high, *shape):
        return torch.randint(high, shape, generator=self.generator(name)).double()

    def order(self, name, n):
        return torch.randperm(n, generator=self.generator(name))

    def prompts_and_gamma(self):
        """P [L, N, D] and gamma [L-1, N, N]."""
        return self.normal('P', self.L, self.N, self.D), self.normal('gamma', self.L - 1, self.N, self.N)

    def images(self):
        pixels = 2 * round(self.M ** 0.5)
        return self.normal('images', self.B, 3, pixels, pixels)


@st.composite
def cases(draw, **fixed):
    """Small sizes that fit each other; cases(L=1) fixes one, cases(L=(2, 4)) bounds it."""
    M = draw(st.sampled_from([1, 4, 9]))  # squares, as the patches of an image; 2 pixels a side each
    ranges = dict(B=(1, 3), L=(1, 4), N=(1, 4), N_h=(1, 3), d=(3, 4), k=(1, M), C=(1, 3), seed=(0, 999))
    sizes = {}
    for name, bounds in (ranges | fixed).items():
        sizes[name] = draw(st.integers(*bounds)) if isinstance(bounds, tuple) else bounds
    return Case(M=M, **sizes)


def randomised(module, case):
    """The module in float64 with every parameter drawn at random, none at its initial value.

    The scales are those at which attention is far from uniform and no layer forgets its input."""
    module = module.double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                fan_in = p.shape[-1] if 'weight' in name or name == 'gamma' else 1
                p.copy_(case.normal(name, *p.shape) / fan_in ** 0.5)
            else:  # biases, and the gains of LayerNorm around 1
                p.copy_(('norm' in name and 'weight' in name) + 0.5 * case.normal(name, *p.shape))
    return module


def random_layer(case):
    return randomised(vit.Layer(case.D, vit.Attention(case.D, case.N_h)), case)


def plain_vit(case, num_classes=0):
    """A ViT for `case.images()`, at its initial values."""
    return vit.ViT(2 * round(case.M ** 0.5), 2, (case.D, case.L, case.N_h), num_classes).double()


def random_vit(case, num_classes=0):
    return randomised(plain_vit(case, num_classes), case)


def random_model(case, structure, aggregation, reinforcement, make=IVPT):
    """An IVPT, or what `make` makes of a ViT, a number of classes and Prompts, with nothing at its initial value.
    Models of one case agree in what they have in common."""
    prompts = Prompts(case.N, case.k, structure, aggregation, reinforcement)
    return randomised(make(plain_vit(case), case.C, prompts), case)


def wave(shape, seed, scale=0.05):
    """Values that every version of every library computes alike: [shape], float64."""
    n = torch.Size(shape).numel()
    return scale * torch.sin(torch.arange(n, dtype=torch.float64) * 12.9898 + 78.233 * seed).reshape(shape)
