"""iVPT: visual prompt tuning with cross-layer dynamic connection (CDC), dynamic aggregation (DA) and
attentive reinforcement (AR). Zhou, Chen and Huang, "iVPT: Improving Task-relevant Information Sharing in
Visual Prompt Tuning by Cross-layer Dynamic Connection".

This file follows the paper's order and uses its symbols: first the equations, each a function from
tensors to tensors, then the model that owns the parameters and calls them. The letters of the shapes are
explained on top of vit.py. "Eq. 5" always means the paper's.
"""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import resize

from vit import IGNORED, InputError, ViT, attend, init_linear

# ---- 3.3 Cross-layer dynamic connection -----------------------------------------------------------------


def cdc(P):
    """Eq. 4. P̂^0 = P^0 and P̂^l = P^l + P^{l-1}: prompts P [L, N, D] -> P̂ [L, N, D]."""
    return torch.cat([P[:1], P[1:] + P[:-1]])


def cdc_da(P, gamma):
    """Eq. 5. P̂^0 = P^0 and P̂^l = P^l + ψ^{l-1}(P^{l-1}): P [L, N, D], gamma [L-1, N, N] -> P̂ [L, N, D]."""
    return torch.cat([P[:1], P[1:] + psi(gamma, P[:-1])])


def psi(gamma, P):
    """Eq. 6. Prompt i becomes Σ_j γ_ij p_j: gamma [..., N, N], P [..., N, D] -> [..., N, D].

    The paper writes ψ as "dynamic"; γ is learned and the same for every image."""
    return gamma @ P


def vanilla_cdc(P):
    """4.3, (D) of Figure 3. P̂^l = P^l + P̂^{l-1} = Σ_{i<=l} P^i: prompts P [L, N, D] -> P̂ [L, N, D]."""
    return P.cumsum(dim=0)


# ---- 3.4 Understanding cross-layer dynamic connection ---------------------------------------------------
#
# For one layer, or several at once in front ("..."), and for one head or all: q [N_h, d] is the class
# token's query and W_K [N_h, d, D] the key projection. LayerNorm is left out, as in the paper, and so is
# the key's bias, which adds the same q·b to every key and cancels in the softmax.


def attention_weight(q, W_K, p):
    """Eq. 7. exp(qᵀ W_K p_i / sqrt(d)), d = D / N_h, the weight w_i before it is normalised.

    q [..., N_h, d], W_K [..., N_h, d, D], prompts p [..., N, D] -> [..., N_h, N]."""
    k = p.unsqueeze(-3) @ W_K.mT  # [..., N_h, N, d]
    return torch.exp((k @ q.unsqueeze(-1)).squeeze(-1) / q.shape[-1] ** 0.5)


def reweight_cdc(q, W_K, p, p_previous):
    """Eq. 8-10. The two factors of CDC's w̃_i ∝ w_i · α̃_i, each [..., N_h, N].

    w is VPT's weight of this layer's prompts p [..., N, D]. The re-weighting term α̃_i is what the
    previous layer's prompt p_i^{l-1} in p_previous [..., N, D] would weigh here by itself."""
    return attention_weight(q, W_K, p), attention_weight(q, W_K, p_previous)


def reweight_cdc_da(q, W_K, p, p_previous, gamma):
    """Eq. 11-13. The factors of w̃_i ∝ w_i · Π_j α̃_ij with DA: w [..., N_h, N], α̃ [..., N_h, N, N].

    α̃_ij = exp(qᵀ W_K γ_ij p_j^{l-1} / sqrt(d)). Eq. 13 writes α̃_j, but through γ [..., N, N] the term
    depends on i too. That is the freedom that DA adds to Eq. 10."""
    gamma_p = gamma.unsqueeze(-1) * p_previous.unsqueeze(-3)  # [..., N, N, D], γ_ij p_j
    alpha = attention_weight(q, W_K, gamma_p.flatten(-3, -2))  # [..., N_h, N N]
    return attention_weight(q, W_K, p), alpha.unflatten(-1, gamma.shape[-2:])


# ---- 3.5 Attentive reinforcement ------------------------------------------------------------------------


def top_k(w, k):
    """Eq. 14. Ω: the positions of the k largest weights of each image, largest first: [..., M] -> [..., k]."""
    return w.topk(k, dim=-1).indices


def reinforce_(Z, Omega, P_re):
    """Eq. 15. Z̃[Ω] = Z[Ω] + P_re, row by row in Ω's order, and Z̃ = Z elsewhere. In place: Z becomes Z̃.

    Z [B, T, D], Omega [B, k] with no position twice, P_re [k, D] -> Z̃ [B, T, D]."""
    B, k, D = *Omega.shape, Z.shape[-1]
    return Z.scatter_add_(1, Omega.unsqueeze(-1).expand(B, k, D), P_re.expand(B, k, D))


def all_tokens(w):
    """Ω of Table 4's "All": every position, in order and whatever the weights: [..., M] -> [..., M]."""
    return torch.arange(w.shape[-1], device=w.device).expand(w.shape)


# ---- 4.3 Prompts that are inherited, (B) and (C) of Figure 3 --------------------------------------------


def add_last(x, P):
    """Add prompts P [N, D] to the last N of the tokens x [B, T, D], where P̂ stands, in x's format. The others stay."""
    return x + F.pad(P.to(x.dtype), (0, 0, x.shape[1] - len(P), 0))


class Express(nn.Module):
    """The residuals of EXPRESS (Das et al., 2023) in one layer, for N prompts that are D wide.

    Each is added where the prompts stand to what a part of the layer puts out: norm1 [N, D], qkv [N, 3 D],
    and proj [N, D], the projection after MSA. They start at 0, so that EXPRESS starts as VPT-shallow. Nobody
    reads the last layer's proj: it is there because the paper's 0.98M count it."""

    def __init__(self, N, D):
        super().__init__()
        self.norm1 = nn.Parameter(torch.zeros(N, D))
        self.qkv = nn.Parameter(torch.zeros(N, 3 * D))
        self.proj = nn.Parameter(torch.zeros(N, D))

    def forward(self, layer, tokens, need_weights=True):
        """A layer (vit.Layer), written out, for [z_cls, Z, P̂], [B, T, D]; returns what the layer does."""
        x = add_last(layer.norm1(tokens), self.norm1)
        q, k, v = layer.attn.split(add_last(layer.attn.qkv(x), self.qkv))  # [B, N_h, T, d]
        attended = attend(q, k, v).transpose(1, 2).flatten(2)  # [B, T, D]
        tokens = tokens + add_last(layer.attn.proj(attended), self.proj)
        w = layer.attn.first_row(q, k) if need_weights else None
        return tokens + layer.mlp(layer.norm2(tokens)), w


# ---- The model ------------------------------------------------------------------------------------------

STRUCTURES = {  # in the order of Figure 3. P -> P̂ [L, N, D]; if inherited: tokens, P, l -> those that enter layer l
    'vpt_shallow': lambda tokens, P, l: tokens, 'vpt': lambda P: P,
    'provp': lambda tokens, P, l: add_last(tokens, P[l]), 'express': lambda tokens, P, l: tokens,
    'vanilla_cdc': vanilla_cdc, 'cdc': cdc}
INHERITED = ('vpt_shallow', 'provp', 'express')  # those whose prompts are tokens, updated by every layer
REINFORCEMENTS = ('topk', 'all', 'none')  # Table 4


class IVPT(nn.Module):
    """A frozen ViT that is tuned by prompts: images [B, 3, H, W] -> logits [B, C].

    N: prompts a layer. k: image tokens that AR reinforces; 0 is no AR (Figure 5).
    structure: what enters layer l as P̂^l, with its letter in Figure 3. 𝒯(P̂) is what a layer puts out at the
    prompts' places; there images have a part in P̂. The shape of P, and how many parameters there are:

        vpt_shallow      P̂^0 = P^0, P̂^l = 𝒯^{l-1}(P̂^{l-1})    [1, N, D]   N D
        vpt          (A) P̂^l = P^l, Eq. 2                       [L, N, D]   N D L
        provp        (B) P̂^l = P^l + 𝒯^{l-1}(P̂^{l-1})          [L, N, D]   N D L
        express      (C) as vpt_shallow, with residuals         [1, N, D]   N D (5 L + 1)
        vanilla_cdc  (D) P̂^l = P^l + P̂^{l-1}                   [L, N, D]   N D L
        cdc          (E) P̂^l = P^l + P^{l-1}, Eq. 4             [L, N, D]   N D L, and N² (L - 1) for DA

    aggregation: CDC with DA (Eq. 5) or without (Eq. 4).
    reinforcement: 'topk' (AR, Eq. 14 and 15), 'all' (Table 4: every image token, k = M) or 'none'.

    All that is trained, and all that requires a gradient:

        P        [L, N, D]      prompts P^l, or [1, N, D]
        express  L of Express   [N, D], [N, 3 D] and [N, D]; only with structure 'express'
        gamma    [L-1, N, N]    γ^l, how layer l+1 mixes in P^l; only with aggregation
        P_re     [L-1, k, D]    reinforcing prompts; only with reinforcement, and k = M if it is 'all'
        head     D -> C         linear, with bias

    What happens inside, layer by layer, is told by `look` in tests/paper.py.

    Where the paper is silent, this is what was chosen:
    - P starts uniform with bound sqrt(6 / (3 p² + D)), p the patch size, as in VPT's code.
    - γ starts as the identity, so that iVPT starts as CDC: before Eq. 8 the paper says "(i.e. ψ is an
      identity mapping)".
    - P_re starts at 0: AR begins as a no-op and still receives a gradient.
    - w̃ in Eq. 14 is one number an image token, attention has N_h heads: their mean. The softmax is the
      layer's own, prompts included, as they are in the sequence.
    - AR acts between layers, so L-1 times: "subsequently input into the next transformer layer", and only
      so are Table 8's 0.18M for AR met (tests/test_4_accounting.py).
    - EXPRESS's residuals are on the outputs of the three parts, as the text of 4.3 and Das et al. have it;
      Figure 3's caption says before. What is classified is the ViT's `readout`, as everywhere here.

    Raises ValueError if the numbers do not fit the ViT or each other.
    """

    def __init__(self, vit, num_classes, N=10, k=10, structure='cdc', aggregation=True,
                 reinforcement='topk'):
        super().__init__()
        if N < 1 or num_classes < 1:
            raise InputError(f'iVPT needs at least 1 prompt and 1 class, not N={N} and {num_classes} classes')
        if structure not in STRUCTURES:
            raise InputError(f'unknown structure {structure!r}: one of {", ".join(STRUCTURES)}')
        if aggregation and structure != 'cdc':
            raise InputError(f"aggregation is a part of structure 'cdc' and not of {structure!r}: turn it off")
        if reinforcement not in REINFORCEMENTS:
            raise InputError(f'unknown reinforcement {reinforcement!r}: one of {", ".join(REINFORCEMENTS)}')
        if reinforcement == 'topk' and k == 0:
            reinforcement = 'none'
        if reinforcement != 'none' and structure in INHERITED:
            raise InputError(f'reinforcement is not made for the inherited prompts of {structure!r}: turn it off')
        if reinforcement == 'topk' and not 0 <= k <= vit.M:
            raise InputError(f'AR can reinforce 0 to M={vit.M} of the image tokens, not k={k}')
        self.vit = vit.requires_grad_(False)
        self.M, self.k, self.structure, self.reinforcement = vit.M, k, structure, reinforcement
        self.make_prompts(N, vit.M if reinforcement == 'all' else k, aggregation)
        self.head = nn.Linear(vit.D, num_classes)
        init_linear(self.head)
        self.train()

    def make_prompts(self, N, k, aggregation):
        """P, and what else the structure and AR, at k tokens, need."""
        L, D = self.vit.L, self.vit.D
        bound = (6 / (3 * self.vit.patch_size ** 2 + D)) ** 0.5
        first = self.structure in ('vpt_shallow', 'express')  # the first layer's prompts are the only ones
        self.P = nn.Parameter(torch.empty(1 if first else L, N, D).uniform_(-bound, bound))
        self.express = nn.ModuleList(Express(N, D) for _ in range(L)) if self.structure == 'express' else None
        self.gamma = nn.Parameter(torch.eye(N).repeat(L - 1, 1, 1)) if aggregation else None
        self.P_re = nn.Parameter(torch.zeros(L - 1, k, D)) if self.reinforcement != 'none' else None

    def train(self, mode=True):
        """As in torch, but the backbone stays in eval mode: it is not being trained."""
        super().train(mode)
        self.vit.eval()
        return self

    def prompts(self):
        """P̂ [L, N, D], the prompts that enter the layers, unless they are inherited. No image has a part in
        them."""
        return self.connect(self.P, self.gamma)

    def connect(self, P, gamma=None):
        """The structure's P̂ [L, N, D] of prompts P [L, N, D] and, with DA, gamma [L-1, N, N]."""
        return STRUCTURES[self.structure](P) if gamma is None else cdc_da(P, gamma)

    def choose(self, w):
        """Ω of Eq. 14, or all places for Table 4's All: w [..., M] -> [..., k]."""
        return top_k(w, min(self.k, w.shape[-1])) if self.reinforcement == 'topk' else all_tokens(w)

    def forward(self, images):
        """Logits [B, C] of images [B, 3, H, W].

        Prompts act through keys and values alone, since Eq. 3 throws away what a layer puts out at their
        places. The last layer computes what its `readout` needs (vit.ViT). The tests hold both against the
        literal concatenation.
        """
        if self.structure in INHERITED:
            return self.head(self.vit.read(self.inherit(images)))
        P_hat = self.prompts().unbind()  # L of [N, D]
        tokens = self.vit.embed(images)  # [z_cls, Z], [B, 1 + M, D]
        for l, layer in enumerate(self.vit.blocks[:-1]):
            tokens, w = layer(tokens, P_hat[l], need_weights=self.P_re is not None)  # Eq. 3, w [B, 1 + M + N]
            if self.P_re is not None:
                Omega = self.choose(w[:, 1:1 + self.M])  # among the image tokens
                tokens = reinforce_(tokens, 1 + Omega, self.P_re[l])  # Eq. 15, z_cls stands at 0
        z_cls_alone = self.vit.readout == 'cls'
        tokens, _ = self.vit.blocks[-1](tokens, P_hat[-1], need_weights=False, one_query=z_cls_alone)  # Eq. 3
        return self.head(self.vit.read(tokens))

    def inherit(self, images):
        """The last layer's tokens, for `ViT.read`, where prompts are inherited: P̂ are the last N tokens,
        [z_cls, Z, P̂], and take the way of all tokens through the layers."""
        tokens = self.vit.embed(images)
        tokens = torch.cat([tokens, self.P[0].expand(len(tokens), -1, -1)], dim=1)  # [B, 1 + M + N, D]
        for l, layer in enumerate(self.vit.blocks):
            if l > 0:
                tokens = STRUCTURES[self.structure](tokens, self.P, l)
            if self.express is not None:
                tokens, _ = self.express[l](layer, tokens, need_weights=False)
            else:
                z_cls_alone = self.vit.readout == 'cls' and l + 1 == self.vit.L
                tokens, _ = layer(tokens, need_weights=False, one_query=z_cls_alone)
        return tokens


class IVPTSwin(IVPT):
    """iVPT on a frozen Swin: images [B, 3, H, W] -> logits [B, C]. The paper has it in Table 5, and no word on how.

    As `IVPT`, but P, gamma and P_re are lists, one tensor for each stage with its L layers, D wide, of M image tokens:

        P      [L, N, D]     prompts P^l, connected within the stage
        gamma  [L-1, N, N]   γ^l; only with aggregation
        P_re   [L, k, D]     reinforcing prompts, [L-1, k, D] in the last stage; k = M where a stage has fewer than k

    Where the paper is silent, this is what was chosen:
    - Prompts are keys and values in every window, without bias and mask, as in VPT's code for Swin. There the last
      layer's prompts ask too, and what comes out is averaged with the image tokens; here Eq. 3's "..." drops it.
    - P starts with one bound in all stages, that of the first one's D, as in VPT's code.
    - CDC starts anew in each stage, with Eq. 4's l = 0: prompts of different widths cannot be added.
    - w̃ in Eq. 14 is the attention that a token receives in its window (vit.WindowAttention). AR acts before merging.

    Raises InputError as `IVPT` does, and for inherited prompts: every window would make others of them.
    """

    def make_prompts(self, N, k, aggregation):
        """P, gamma and P_re, for AR at k tokens."""
        if self.structure in INHERITED:
            raise InputError(f'{self.structure!r} inherits prompts, which a Swin would have to take from each of its '
                             f'windows: take {", ".join(name for name in STRUCTURES if name not in INHERITED)}')
        sizes = self.vit.sizes  # L, M and D of each stage
        bound = (6 / (3 * self.vit.patch_size ** 2 + sizes[0][2])) ** 0.5
        self.P = nn.ParameterList(torch.empty(L, N, D).uniform_(-bound, bound) for L, _, D in sizes)
        self.gamma = nn.ParameterList(torch.eye(N).repeat(L - 1, 1, 1) for L, *_ in sizes) if aggregation else None
        self.P_re = nn.ParameterList(torch.zeros(L - (i + 1 == len(sizes)), min(k, M), D)
                                     for i, (L, M, D) in enumerate(sizes)) if self.reinforcement != 'none' else None

    def prompts(self):
        """P̂ [L, N, D] of each stage."""
        return [self.connect(P, gamma) for P, gamma in zip(self.P, self.gamma or [None] * len(self.P))]

    def forward(self, images):
        """Logits [B, C] of images [B, 3, H, W]."""
        tokens = self.vit.patch_embed(images)  # [B, M, D]
        for i, (stage, P_hat) in enumerate(zip(self.vit.layers, self.prompts())):
            tokens = stage.downsample(tokens)
            P_re = [] if self.P_re is None else self.P_re[i]
            for l, layer in enumerate(stage.blocks):
                tokens, w = layer(tokens, P_hat[l], need_weights=l < len(P_re))  # Eq. 3, w [B, M]
                if l < len(P_re):
                    tokens = reinforce_(tokens, self.choose(w), P_re[l].to(tokens.dtype))  # Eq. 14 and 15
        return self.head(self.vit.norm(tokens).mean(dim=1))


# ---- 4.4 Semantic segmentation --------------------------------------------------------------------------

AUXILIARY = 0.4  # weight of the loss of each auxiliary head


class Decoder(nn.Module):
    """A head of SETR-PUP (Zheng et al., 2021): image tokens Z [B, M, D] -> logits [B, C, H', W'] on a coarse grid.

    n convolutions of 3 x 3 to D / 4 channels, with the grid doubled between them, and one of 1 x 1 to the classes. The
    batch norms see the whole batch of the processes that share a run."""

    def __init__(self, D, C, n):
        super().__init__()
        self.norm, width = nn.LayerNorm(D, eps=1e-6), max(1, D // 4)
        self.layers = nn.Sequential()
        for i in range(n):
            if i:
                self.layers.append(nn.Upsample(scale_factor=2, mode='bilinear'))
            self.layers.extend([nn.Conv2d(width if i else D, width, 3, padding=1), nn.SyncBatchNorm(width), nn.ReLU()])
        self.layers.append(nn.Conv2d(width, C, 1))

    def forward(self, Z):
        side = round(Z.shape[1] ** 0.5)
        return self.layers(self.norm(Z).mT.unflatten(2, (side, side)))


class SETR(nn.Module):
    """Classifies pixels: images [B, 3, H, W] -> logits [B, C, H, W], and in training a list of those of all five heads.

    tuned: a ViT or an IVPT, whose own head and last norm are taken off. The main head reads its last layer, auxiliary
    heads what comes after 10, 15, 20 and 24 of 24 layers, or these parts of L.

    Where the paper is silent, this is what was chosen:
    - The numbers of convolutions, three and one: of this family, only they give Table 7's 13.18M. SETR has others.
    - The loss is a mean over all pixels, with 0 for those without a label: so the parts of a batch weigh alike.

    Raises InputError for what gives no tokens of a ViT layer by layer, for AR, which the paper discards here, and for
    inherited prompts."""

    def __init__(self, tuned, num_classes):
        super().__init__()
        vit = getattr(tuned, 'vit', tuned)
        if type(vit) is not ViT or type(tuned) not in (ViT, IVPT):
            raise InputError('segmentation is made for a ViT with one of our own methods, not for a Swin or a file')
        if getattr(tuned, 'P_re', None) is not None or getattr(tuned, 'structure', '') in INHERITED:
            raise InputError('segmentation has no AR (4.4), no inherited prompts: take vpt, vanilla_cdc, cdc or cdc_da')
        tuned.head = vit.head = vit.norm = nn.Identity()
        self.tuned, self.num_classes = tuned, num_classes
        self.head = Decoder(vit.D, num_classes, n=3)
        self.read = [math.ceil(vit.L * part / 24) - 1 for part in (10, 15, 20, 24)]  # layers, from 0
        self.auxiliary = nn.ModuleList(Decoder(vit.D, num_classes, n=1) for _ in self.read)

    def forward(self, images):
        vit, Z = getattr(self.tuned, 'vit', self.tuned), []
        P_hat = self.tuned.prompts() if isinstance(self.tuned, IVPT) else []
        tokens = vit.embed(images)
        for l, layer in enumerate(vit.blocks):
            tokens, _ = layer(tokens, *P_hat[l:l + 1], need_weights=False)  # Eq. 3, or Eq. 1 without prompts
            Z.append(tokens[:, 1:])  # [B, M, D]
        others = [head(Z[l]) for head, l in zip(self.auxiliary, self.read)] if self.training else []
        logits = [F.interpolate(x, images.shape[2:], mode='bilinear') for x in (self.head(Z[-1]), *others)]
        return logits if self.training else logits[0]

    def loss(self, logits, masks):
        """Cross-entropy of each head's logits [B, C, H, W] and masks [B, H, W], weighted and summed: a scalar."""
        losses = [F.cross_entropy(x, masks.long(), ignore_index=IGNORED, reduction='none').mean() for x in logits]
        return losses[0] + AUXILIARY * sum(losses[1:])


@torch.no_grad()
def segment(model, image, size, scales=(1.0,)):
    """The class of each pixel of a normalised image [3, H, W] -> [H, W]. Its shorter side becomes each of the scales
    times the model's size; of several, and of the mirror image at each, the mean of probabilities counts."""
    p, flips = 0, [False, True] if len(scales) > 1 else [False]
    for scale, flip in product(scales, flips):
        short = round(scale * size)
        x = resize(image, [short], max_size=4 * short).unsqueeze(0)
        logits = slide(model, x.flip(-1) if flip else x, size)
        logits = F.interpolate(logits.flip(-1) if flip else logits, image.shape[1:], mode='bilinear')
        p = p + logits.softmax(dim=1)
    return p[0].argmax(dim=0)


def slide(model, images, size):
    """Logits [B, C, H, W] of images [B, 3, H, W], by windows that overlap by a third; their mean where several lie."""
    (H, W), total, n = images.shape[2:], 0, 0
    images = F.pad(images, (0, max(0, size - W), 0, max(0, size - H)))  # as in training
    high, wide = images.shape[2:]
    for y, x in product(starts(high, size), starts(wide, size)):
        around = (x, wide - size - x, y, high - size - y)
        total = total + F.pad(model(images[..., y:y + size, x:x + size]).float(), around)
        n = n + F.pad(images.new_ones(size, size), around)
    return (total / n)[..., :H, :W]


def starts(n, size):
    """Where windows start on a side of n >= size pixels; the last one ends where the side does."""
    stride = size * 2 // 3
    return [min(start, n - size) for start in range(0, n - size + stride, stride)]


def mean_iou(K):
    """Intersection over union, mean over the classes that are in masks or answers: K of `confusion` -> 0 to 1."""
    if not K.any():
        raise InputError('no pixel of the pictures to score is labelled: look at their masks')
    return (K.diagonal() / (K.sum(0) + K.sum(1) - K.diagonal())).nanmean().item()
