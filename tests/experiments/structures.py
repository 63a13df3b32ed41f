"""4.3 Prompts that are inherited: VPT-shallow, and ProVP and EXPRESS, (B) and (C) of Figure 3.

Prompts are tokens here, [z_cls, Z, P̂], and every layer updates them. 𝒯(P̂) is what a layer puts out at their places;
so images have a part in P̂. What enters layer l as P̂^l, the shape of P, and how many parameters there are:

    vpt_shallow      P̂^0 = P^0, P̂^l = 𝒯^{l-1}(P̂^{l-1})    [1, N, D]   N D
    provp        (B) P̂^l = P^l + 𝒯^{l-1}(P̂^{l-1})          [L, N, D]   N D L
    express      (C) as vpt_shallow, with residuals         [1, N, D]   N D (5 L + 1)

The other structures of Figure 3 are in ivpt.py. A method in configs.yaml names a function at the end of this file.

Where the papers are silent, this is what was chosen:
- P starts as that of `ivpt.IVPT`.
- EXPRESS's residuals are on the outputs of the three parts, as the text of 4.3 and Das et al. have it; Figure 3's
  caption says before. What is classified is the ViT's `readout`, as everywhere.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vit import InputError, ViT, init_linear


def add_last(x, P):
    """Add prompts P [N, D] to the last N of the tokens x [B, T, D], where P̂ stands, in x's format. The others stay."""
    return x + F.pad(P.to(x.dtype), (0, 0, x.shape[1] - len(P), 0))


class VPTShallow(nn.Module):
    """A frozen ViT with prompts in front of the first layer, P [L, N, D] with L = 1: images [B, 3, H, W] -> logits
    [B, C]."""

    def __init__(self, vit, num_classes, N, L=1):
        super().__init__()
        bound = (6 / (3 * vit.patch_size ** 2 + vit.D)) ** 0.5
        self.vit = vit
        self.P = nn.Parameter(torch.empty(L, N, vit.D).uniform_(-bound, bound))
        self.head = nn.Linear(vit.D, num_classes)
        init_linear(self.head)

    def forward(self, images):
        """Logits [B, C] of images [B, 3, H, W]."""
        tokens = self.vit.embed(images)
        tokens = torch.cat([tokens, self.P[0].expand(len(tokens), -1, -1)], dim=1)  # [B, 1 + M + N, D]
        for l, layer in enumerate(self.vit.blocks[:-1]):
            tokens, _ = layer(tokens, need_weights=False)
            tokens = self.inherit(tokens, l + 1)
        return self.head(self.vit.read(self.last(tokens)))

    def inherit(self, tokens, l):
        """The tokens that enter layer l > 0, [B, 1 + M + N, D]."""
        return tokens

    def last(self, tokens):
        """The last layer of [z_cls, Z, P̂], for `read`."""
        return self.vit.last(tokens)


class ProVP(VPTShallow):
    """The same with prompts P [L, N, D] that are added in front of each layer (Xu et al., 2023)."""

    def __init__(self, vit, num_classes, N):
        super().__init__(vit, num_classes, N, vit.L)

    def inherit(self, tokens, l):
        return add_last(tokens, self.P[l])


class Residuals(nn.Module):
    """The residuals of EXPRESS (Das et al., 2023) in one layer, for N prompts that are D wide.

    Each is added where the prompts stand to what a part of the layer puts out: norm1 [N, D], qkv [N, 3 D],
    and proj [N, D], the projection after MSA. They start at 0, so that EXPRESS starts as VPT-shallow. Nobody
    reads the last layer's proj: it is there because the paper's 0.98M count it."""

    def __init__(self, N, D):
        super().__init__()
        self.norm1 = nn.Parameter(torch.zeros(N, D))
        self.qkv = nn.Parameter(torch.zeros(N, 3 * D))
        self.proj = nn.Parameter(torch.zeros(N, D))

    def put_into(self, layer):
        """Let the parts of a layer (vit.Layer) add them, from now on."""
        layer.norm1.register_forward_hook(self.add_norm1)
        layer.attn.qkv.register_forward_hook(self.add_qkv)
        layer.attn.proj.register_forward_hook(self.add_proj)

    def add_norm1(self, part, inputs, x):
        return add_last(x, self.norm1)

    def add_qkv(self, part, inputs, x):
        return add_last(x, self.qkv)

    def add_proj(self, part, inputs, x):
        return add_last(x, self.proj)


class Express(VPTShallow):
    """VPT-shallow with residuals in every layer. Hooks add them, so that a layer is written in vit.py alone."""

    def __init__(self, vit, num_classes, N):
        super().__init__(vit, num_classes, N)
        self.express = nn.ModuleList(Residuals(N, vit.D) for _ in range(vit.L))
        for residuals, layer in zip(self.express, vit.blocks):
            residuals.put_into(layer)

    def last(self, tokens):
        """With queries at the prompts' places, too: the residuals are added to tokens, and not to a context."""
        return self.vit.blocks[-1](tokens, need_weights=False)[0]


# ---- Methods: tune: tests/experiments/structures.py:NAME -----------------------------------------------

def vpt_shallow(backbone, num_classes, settings):
    """VPT-shallow on a ViT with N prompts. Raises InputError as `check` does; so do the next two."""
    check(backbone, settings.prompts)
    return VPTShallow(backbone, num_classes, settings.prompts.N)


def provp(backbone, num_classes, settings):
    """(B) of Figure 3."""
    check(backbone, settings.prompts)
    return ProVP(backbone, num_classes, settings.prompts.N)


def express(backbone, num_classes, settings):
    """(C) of Figure 3."""
    check(backbone, settings.prompts)
    return Express(backbone, num_classes, settings.prompts.N)


def check(backbone, prompts):
    """Raise InputError for a backbone that is no ViT, and for parts of iVPT, which no row of a table has here."""
    if not isinstance(backbone, ViT):
        raise InputError(f'inherited prompts are made for a plain ViT: a {type(backbone).__name__} would have to take '
                         'them from each of its windows; take vpt, vanilla_cdc or cdc')
    if prompts.reinforcement != 'none':
        raise InputError('reinforcement is not made for inherited prompts: turn it off')
    if prompts.aggregation:
        raise InputError("aggregation is a part of structure 'cdc', not of inherited prompts: turn it off")
