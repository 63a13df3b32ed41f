"""A Swin (Liu et al., 2021) in timm's parameter names, and iVPT on it: Table 5.

The paper has Swin-B in Table 5, and no word on how. `build: tests/experiments/swin.py:swin` makes the Swin that the
model's name says, as swin_base_patch4_window7_224. For one without an entry in configs.yaml:

    python train.py --model swin_tiny_patch4_window7_224 --weights FILE --set build=tests/experiments/swin.py:swin

The letters are those of vit.py; a letter of a stage or a window is explained where it first stands.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

import ivpt
import vit
from vit import InputError

# ---- The backbone ---------------------------------------------------------------------------------------

class WindowAttention(vit.Attention):
    """Attention in windows of w x w of the H x H tokens, with a learned bias for each relative position.

    The grid is rolled by s before it is cut into windows. Tokens of its opposite ends then share a window, where they
    are masked from each other."""

    def __init__(self, D, N_h, H, w, s):
        super().__init__(D, N_h)
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * w - 1) ** 2, N_h))
        at = torch.cartesian_prod(torch.arange(w), torch.arange(w))  # [w², 2], row and column
        dy, dx = (at.unsqueeze(1) - at + w - 1).unbind(-1)  # of query i and key j, 0 to 2w - 2: [w², w²]
        rolled = torch.arange(H * H).view(H, H).roll((-s, -s), (0, 1))
        order = rolled.view(H // w, w, H // w, w).transpose(1, 2).reshape(-1, w * w)  # [n_W, w²], each window's tokens
        end = 2 * (order // H < s) + (order % H < s)  # [n_W, w²], 0 or, of tokens from another end, 1 to 3
        mask = -100.0 * (end.unsqueeze(2) != end.unsqueeze(1))  # [n_W, w², w²]
        for name, x in ('index', dy * (2 * w - 1) + dx), ('order', order), ('mask', mask):
            self.register_buffer(name, x, persistent=False)

    def forward(self, tokens, *context, need_weights=True):
        """As `vit.Attention.forward`; every window attends to all of a context [n, D], with no bias and no mask.

        No token is the class token: w [B, M] is the attention that a token receives, mean over the heads and over the
        queries i of its window. A mean of tokens reads the values by it: mean_i Σ_j A_ij v_j = Σ_j w_j v_j."""
        x = tokens.index_select(1, self.order.flatten()).unflatten(1, self.order.shape)  # [B, n_W, w², D]
        B, n_W, T, D = x.shape
        q, k, v = (y.flatten(1, 2) for y in self.split(self.qkv(x)))  # [B, n_W N_h, w², d]: all images share the bias
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1) + self.mask.unsqueeze(1)
        bias = bias.flatten(0, 1).unsqueeze(0).to(q.dtype)  # [1, n_W N_h, w², w²]
        for c in context:
            pair = self.split(F.linear(c, self.qkv.weight[D:], self.qkv.bias[D:]))  # 2 of [N_h, n, d], once a batch
            k, v = (torch.cat([y, p.repeat(n_W, 1, 1).expand(B, -1, -1, -1)], dim=2) for y, p in zip((k, v), pair))
            bias = F.pad(bias, (0, len(c)))  # [1, n_W N_h, w², w² + n]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, n_W N_h, w², d]
        attended = attended.unflatten(1, (n_W, -1)).transpose(2, 3).reshape(tokens.shape)  # [B, M, D]
        back = self.order.flatten().argsort()
        w = None
        if need_weights:
            with torch.no_grad():  # beside the fused kernel, as `first_row`
                A = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)  # [B, n_W N_h, w², w² + n]
                w = A.mean(dim=2).unflatten(1, (n_W, -1)).mean(dim=2)[..., :T].flatten(1)[:, back]
        return self.proj(attended.index_select(1, back)), w


class PatchEmbed(vit.PatchEmbed):
    """As a ViT's, and a norm behind it: images [B, 3, H, W] -> [B, M, D]."""

    def __init__(self, img_size, patch_size, D):
        super().__init__(img_size, patch_size, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, images):
        return self.norm(super().forward(images))


class PatchMerging(nn.Module):
    """Each 2 x 2 tokens become one of twice their width: [B, M, D] -> [B, M / 4, 2 D]."""

    def __init__(self, D):
        super().__init__()
        self.norm = nn.LayerNorm(4 * D)
        self.reduction = nn.Linear(4 * D, 2 * D, bias=False)

    def forward(self, tokens):
        half = round(tokens.shape[1] ** 0.5) // 2
        x = tokens.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 4, 2, 5)  # the 2 x 2 column by column
        return self.reduction(self.norm(x.flatten(3).flatten(1, 2)))


class Swin(nn.Module):
    """A Swin transformer: its tokens are merged from stage to stage, and it classifies by the mean of the last ones.

    w: tokens on a side of a window. size: a value of SIZES. Its attributes: L, all layers; D, of the features; M, of
    the first stage; sizes, (L, M, D) of each stage. The rest is as in ViT.
    Raises InputError if the images cannot be cut into windows in each stage."""

    def __init__(self, img_size, patch_size, w, size, num_classes=0):
        super().__init__()
        D, L, N_h = size
        unit = patch_size * 2 ** (len(L) - 1) * w
        if unit < 1 or img_size < 1 or img_size % unit:
            raise InputError(f'patches of {patch_size} pixels in windows of {w} x {w}, merged {len(L) - 1} times, need '
                             f'images of a multiple of {unit} pixels, not {img_size}')
        self.patch_embed = PatchEmbed(img_size, patch_size, D)
        self.layers = nn.ModuleList()
        self.sizes = []
        H = img_size // patch_size
        self.img_size, self.patch_size, self.M, self.L = img_size, patch_size, H * H, sum(L)
        for i, n in enumerate(L):
            if i:
                D, N_h, H = 2 * D, 2 * N_h, H // 2
            shifts = [w // 2 if l % 2 and H > w else 0 for l in range(n)]
            blocks = [vit.Layer(D, WindowAttention(D, N_h, H, w, s), eps=1e-5) for s in shifts]
            self.layers.append(nn.ModuleDict({'downsample': PatchMerging(D // 2) if i else nn.Identity(),
                                              'blocks': nn.ModuleList(blocks)}))
            self.sizes.append((n, H * H, D))
        self.D = D
        self.norm = nn.LayerNorm(D)
        self.head = nn.Sequential()
        self.head.add_module('fc', nn.Linear(D, num_classes) if num_classes else nn.Identity())
        self.blocks = [layer for stage in self.layers for layer in stage.blocks]  # a list: it gives no names
        self.apply(vit.init_linear)

    def forward(self, images):
        """Eq. 1, stage after stage: images [B, 3, H, W] -> logits [B, C]."""
        tokens = self.patch_embed(images)
        for stage in self.layers:
            tokens = stage.downsample(tokens)
            for layer in stage.blocks:
                tokens, _ = layer(tokens, need_weights=False)
        return self.head(self.norm(tokens).mean(dim=1))

    def from_checkpoint(self, state):
        """A checkpoint's state dict in the names of this model. Raises what `vit.to_timm` raises."""
        state = vit.to_timm(state, self.blocks[0].attn.N_h)
        return from_microsoft(state) if 'layers.0.downsample.reduction.weight' in state else state

    @property
    def IVPT(self):
        """The class of what `tune: prompts` makes of it."""
        return IVPTSwin

    def look(self, model, images):
        """`ivpt.look` for a model on this Swin: `w`, `Omega` and `P_hat` are lists with a tensor for each stage."""
        logits, rows = ivpt.weights_of(model, self.blocks, images)
        w, Omega = [], None
        for L, _, _ in self.sizes:
            w.append(torch.stack(rows[:L], dim=1))  # [B, L, M]
            rows = rows[L:]
        if getattr(model, 'reinforcement', '') == 'topk':
            Omega = [model.choose(x[:, :len(P_re)], P_re.shape[1]) for x, P_re in zip(w, model.P_re)]
        return {'logits': logits, 'w': w, 'Omega': Omega,
                'P_hat': model.prompts() if hasattr(model, 'prompts') else None}


def from_microsoft(state):
    """Swin's own code (github.com/microsoft/Swin-Transformer), and timm before 0.8: merging ends a stage and does not
    begin the next one, the head is not called `fc`, and two buffers are saved that follow from the sizes."""
    timm = {}
    for name, x in state.items():
        name = re.sub(r'^layers\.(\d{1,4})\.(?=downsample\.)', lambda stage: f'layers.{int(stage[1]) + 1}.', name)
        if not name.endswith(('.relative_position_index', '.attn_mask')):
            timm[re.sub(r'^head\.(?=weight$|bias$)', 'head.fc.', name)] = x
    return timm


# ---- By name ----------------------------------------------------------------------------------------------

# D of the first stage, L of each, N_h of the first; D and N_h double from stage to stage. Section 3.3 of Liu et al.
# (2021). Nano is ours.
SIZES = {
    'nano': (32, (2, 2, 2), 1),
    'tiny': (96, (2, 2, 6, 2), 3),
    'small': (96, (2, 2, 18, 2), 3),
    'base': (128, (2, 2, 18, 2), 4),
    'large': (192, (2, 2, 18, 2), 6),
}


def swin(settings, num_classes):
    """The Swin that `settings.model` names, for images of `settings.backbone.img_size` pixels. num_classes=0 leaves the
    head out. Raises InputError for a name outside the grammar, and as `Swin` does."""
    size, patch_size, w = parse_name(settings.model)
    return Swin(settings.backbone.img_size, patch_size, w, SIZES[size], num_classes)


def parse_name(name):
    """(size, patch size, w) of timm's name: swin_base_patch4_window7_224.ms_in22k -> ('base', 4, 7)."""
    match = re.fullmatch(r'swin_(\w+?)_patch(\d{1,4})_window(\d{1,2})_\d{1,5}(\..*)?', name)
    if not match or match[1] not in SIZES:
        raise InputError(f'unknown model {name!r}: write swin_SIZE_patch4_window7_PIXELS, SIZE one of '
                         f'{", ".join(SIZES)}')
    return match[1], int(match[2]), int(match[3])


# ---- Prompts on it ----------------------------------------------------------------------------------------

class IVPTSwin(ivpt.IVPT):
    """iVPT on a frozen Swin: images [B, 3, H, W] -> logits [B, C].

    As `ivpt.IVPT`, but P, gamma and P_re are lists, one tensor for each stage with its L layers, D wide, of M image
    tokens:

        P      [L, N, D]     prompts P^l, connected within the stage
        gamma  [L-1, N, N]   γ^l; only with aggregation
        P_re   [L, k, D]     reinforcing prompts, [L-1, k, D] in the last stage; k = M where a stage has fewer than k

    Where the paper is silent, this is what was chosen:
    - Prompts are keys and values in every window, without bias and mask, as in VPT's code for Swin. There the last
      layer's prompts ask too, and the mean is over them and the image tokens; here Eq. 3's "..." drops them.
    - P starts with one bound in all stages, that of the first one's D, as in VPT's code.
    - CDC starts anew in each stage, with Eq. 4's l = 0: prompts of different widths cannot be added.
    - w̃ in Eq. 14 is the attention that a token receives in its window (`WindowAttention`). AR acts before merging.

    Raises InputError as `ivpt.IVPT` does.
    """

    def make_prompts(self, N, aggregation):
        """P, gamma and P_re, with their initial values."""
        sizes = self.vit.sizes  # L, M and D of each stage
        bound = (6 / (3 * self.vit.patch_size ** 2 + sizes[0][2])) ** 0.5
        self.P = nn.ParameterList(torch.empty(L, N, D).uniform_(-bound, bound) for L, _, D in sizes)
        self.gamma = self.P_re = None
        if aggregation:
            self.gamma = nn.ParameterList(torch.eye(N).repeat(L - 1, 1, 1) for L, _, _ in sizes)
        if self.k:
            last = len(sizes) - 1  # AR acts between layers, and nothing comes after the last one
            self.P_re = nn.ParameterList(torch.zeros(L - (i == last), min(self.k, M), D)
                                         for i, (L, M, D) in enumerate(sizes))

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
                    Omega = self.choose(w, P_re.shape[1])  # Eq. 14
                    tokens = ivpt.reinforce_(tokens, Omega, P_re[l].to(tokens.dtype))  # Eq. 15
        return self.head(self.vit.norm(tokens).mean(dim=1))
