"""iVPT: visual prompt tuning with cross-layer dynamic connection (CDC), dynamic aggregation (DA) and
attentive reinforcement (AR). Zhou, Chen and Huang, "iVPT: Improving Task-relevant Information Sharing in
Visual Prompt Tuning by Cross-layer Dynamic Connection".

This file follows the paper's order and uses its symbols: first the equations, each a function from
tensors to tensors, then the model that owns the parameters and calls them. The letters of the shapes are
explained on top of vit.py. "Eq. 5" always means the paper's.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from vit import InputError, init_linear

# ---- 3.3 Cross-layer dynamic connection -----------------------------------------------------------------

def cdc(P):
    """Eq. 4. P̂^0 = P^0 and P̂^l = P^l + P^{l-1}: prompts P [L, N, D] -> P̂ [L, N, D]."""
    return torch.cat([P[:1], P[1:] + P[:-1]])


def cdc_da(P, gamma):
    """Eq. 5. P̂^0 = P^0 and P̂^l = P^l + ψ^{l-1}(P^{l-1}): P [L, N, D], gamma [L-1, N, N] -> P̂ [L, N, D]."""
    return torch.cat([P[:1], P[1:] + psi(gamma, P[:-1])])


def psi(gamma, P):
    """Eq. 6. Prompt i becomes Σ_j γ_ij p_j: gamma [..., N, N], P [..., N, D] -> [..., N, D].

    The paper writes ψ as "dynamic"; γ is learned and the same for every image. Both are learned in float32, and under
    any autocast this is computed in it: a γ near the identity, in bfloat16, would round P."""
    with torch.autocast(P.device.type, enabled=False):
        return gamma @ P


def vanilla_cdc(P):
    """4.3, (D) of Figure 3. P̂^l = P^l + P̂^{l-1} = Σ_{i<=l} P^i: prompts P [L, N, D] -> P̂ [L, N, D]."""
    return P.cumsum(dim=0)


# ---- 3.4 Understanding cross-layer dynamic connection ---------------------------------------------------
#
# An explanation: the model never calls these functions. They are for one layer, or several at once in front
# ("..."), and for one head or all: q [N_h, d] is the class token's query and W_K [N_h, d, D] the key
# projection. LayerNorm is left out, as in the paper, and so is the key's bias, which adds the same q·b to
# every key and cancels in the softmax.


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


# ---- The model ------------------------------------------------------------------------------------------

STRUCTURES = {'vpt': lambda P: P, 'vanilla_cdc': vanilla_cdc, 'cdc': cdc}  # (A), (D) and (E) of Figure 3: P -> P̂
REINFORCEMENTS = ('topk', 'all', 'none')  # Table 4


@dataclass(frozen=True)
class Prompts:
    """The settings of iVPT: type, then the smallest and largest number or all words; see train.py."""

    N: Annotated[int, 1, 1000] = 10  # prompts of a layer; "setting N and k to 10 is a good choice" (4.3)
    k: Annotated[int, 0, 10**6] = 10  # image tokens that AR reinforces; 0 is no AR (Figure 5)
    structure: Annotated[str, 'vpt', 'vanilla_cdc', 'cdc'] = 'cdc'  # what enters layer l as P̂^l
    aggregation: bool = False  # CDC with DA (Eq. 5) or without (Eq. 4)
    reinforcement: Annotated[str, 'topk', 'all', 'none'] = 'none'  # AR (Eq. 14, 15), Table 4's All: k = M, or none


class IVPT(nn.Module):
    """A frozen ViT that is tuned by prompts: images [B, 3, H, W] -> logits [B, C].

    What enters layer l, by `structure`, with its letter in Figure 3, and how many parameters there are:

        vpt          (A) P̂^l = P^l, Eq. 2               N D L
        vanilla_cdc  (D) P̂^l = P^l + P̂^{l-1}           N D L
        cdc          (E) P̂^l = P^l + P^{l-1}, Eq. 4     N D L, and N² (L - 1) for DA

    All that is trained, and all that requires a gradient:

        P        [L, N, D]      prompts P^l
        gamma    [L-1, N, N]    γ^l, how layer l+1 mixes in P^l; only with aggregation
        P_re     [L-1, k, D]    reinforcing prompts; only with reinforcement, and k = M if it is 'all'
        head     D -> C         linear, with bias

    Where the paper is silent, this is what was chosen:
    - P starts uniform with bound sqrt(6 / (3 p² + D)), p the patch size, as in VPT's code.
    - γ starts as the identity, so that iVPT starts as CDC: before Eq. 8 the paper says "(i.e. ψ is an
      identity mapping)".
    - P_re starts at 0: AR begins as a no-op and still receives a gradient.
    - w̃ in Eq. 14 is one number an image token, attention has N_h heads: their mean. The softmax is the
      layer's own, prompts included, as they are in the sequence.
    - AR acts between layers, so L-1 times: "subsequently input into the next transformer layer", and only
      so are Table 8's 0.18M for AR met.

    Raises InputError, a ValueError, if the numbers do not fit the ViT or each other.
    """

    def __init__(self, vit, num_classes, prompts=Prompts()):
        super().__init__()
        structure, reinforcement = prompts.structure, prompts.reinforcement
        if prompts.N < 1 or num_classes < 1:
            raise InputError(f'iVPT needs at least 1 prompt and 1 class, not N={prompts.N} and {num_classes} classes')
        if structure not in STRUCTURES:
            raise InputError(f'unknown structure {structure!r}: one of {", ".join(STRUCTURES)}')
        if prompts.aggregation and structure != 'cdc':
            raise InputError(f"aggregation is a part of structure 'cdc' and not of {structure!r}: turn it off")
        if reinforcement not in REINFORCEMENTS:
            raise InputError(f'unknown reinforcement {reinforcement!r}: one of {", ".join(REINFORCEMENTS)}')
        if reinforcement == 'topk' and not 0 <= prompts.k <= vit.M:
            raise InputError(f'AR can reinforce 0 to M={vit.M} of the image tokens, not k={prompts.k}')
        self.vit = vit.requires_grad_(False)
        self.structure = structure
        self.k = {'topk': prompts.k, 'all': vit.M, 'none': 0}[reinforcement]
        self.reinforcement = reinforcement if self.k else 'none'
        self.make_prompts(prompts.N, prompts.aggregation)
        self.head = nn.Linear(vit.D, num_classes)
        init_linear(self.head)
        self.train()

    def make_prompts(self, N, aggregation):
        """P, gamma and P_re, with their initial values."""
        L, D = self.vit.L, self.vit.D
        bound = (6 / (3 * self.vit.patch_size ** 2 + D)) ** 0.5
        self.P = nn.Parameter(torch.empty(L, N, D).uniform_(-bound, bound))
        self.gamma = nn.Parameter(torch.eye(N).repeat(L - 1, 1, 1)) if aggregation else None
        self.P_re = nn.Parameter(torch.zeros(L - 1, self.k, D)) if self.k else None

    def train(self, mode=True):
        """As in torch, but the backbone stays in eval mode: it is not being trained."""
        super().train(mode)
        self.vit.eval()
        return self

    def prompts(self):
        """P̂ [L, N, D], the prompts that enter the layers. No image has a part in them."""
        return self.connect(self.P, self.gamma)

    def connect(self, P, gamma):
        """The structure's P̂ [L, N, D] of prompts P [L, N, D] and, with DA, gamma [L-1, N, N]."""
        return STRUCTURES[self.structure](P) if gamma is None else cdc_da(P, gamma)

    def choose(self, w, k):
        """Ω of Eq. 14, or all places for Table 4's All: w [..., M] -> [..., k]."""
        return all_tokens(w) if self.reinforcement == 'all' else top_k(w, k)

    def forward(self, images):
        """Logits [B, C] of images [B, 3, H, W].

        Prompts act through keys and values alone, since Eq. 3 throws away what a layer puts out at their places. So do
        the image tokens of the last layer, if the class token alone is read. The tests compare both with the literal
        concatenation.
        """
        P_hat = self.prompts().unbind()  # L of [N, D]
        tokens = self.vit.embed(images)  # [z_cls, Z], [B, 1 + M, D]
        for l, layer in enumerate(self.vit.blocks[:-1]):
            tokens, w = layer(tokens, P_hat[l], need_weights=self.P_re is not None)  # Eq. 3, w [B, 1 + M + N]
            if self.P_re is not None:
                Omega = self.choose(w[:, 1:1 + self.vit.M], self.k)  # Eq. 14, among the image tokens
                tokens = reinforce_(tokens, 1 + Omega, self.P_re[l])  # Eq. 15, z_cls stands at 0
        tokens = self.vit.last(tokens, P_hat[-1])  # Eq. 3
        return self.head(self.vit.read(tokens))


# ---- What happens inside, layer by layer (Figure 7) -----------------------------------------------------

@torch.no_grad()
def look(model, images):
    """What an IVPT, or another model whose layers stand in `vit.blocks` or `blocks`, does with images [B, 3, H, W].

    A dict: `logits` [B, C]; `w` [B, L, M], the class token's attention to the image tokens in each layer (Eq. 14), and
    `to_prompts` [B, L], all of it to the prompts; `Omega` [B, L-1, k], the image tokens that top-k chose, or None;
    `P_hat` [L, N, D], the prompts that enter the layers, or None. A backbone may have a `look(model, images)`."""
    vit = getattr(model, 'vit', model)
    if hasattr(vit, 'look'):
        return vit.look(model, images)
    logits, rows = weights_of(model, vit.blocks, images)
    w = torch.stack([row[:, 1:1 + vit.M] for row in rows], dim=1)
    reinforced = getattr(model, 'reinforcement', '') == 'topk'
    to_prompts = torch.stack([row[:, 1 + vit.M:].sum(dim=1) for row in rows], dim=1)
    return {'logits': logits, 'w': w, 'to_prompts': to_prompts,
            'Omega': model.choose(w[:, :-1], model.k) if reinforced else None,
            'P_hat': model.prompts() if hasattr(model, 'prompts') else None}


def weights_of(model, layers, images):
    """The logits of images, and a list of what each of the layers returns as w (see `vit.Layer`). Hooks keep it:
    `forward` is as it is."""
    rows = []

    def ask(layer, inputs, options):
        return inputs, options | {'need_weights': True}

    def keep(layer, inputs, outputs):
        rows.append(outputs[1])

    hooks = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(keep) for layer in layers]
    try:
        return model(images), rows
    finally:
        for hook in hooks:
            hook.remove()
