"""A vision transformer (Dosovitskiy et al., 2021) and a Swin (Liu et al., 2021), in timm's parameter names.

Letters mean the same in every file of this project:

    B    images in a batch             M    image tokens (patches) of an image
    L    transformer layers            N    prompts of a layer (CDC)
    D    width of a token              k    image tokens that are reinforced (AR)
    N_h  attention heads               C    classes
    d    width of a head, D / N_h      T    tokens of any kind

Shapes stand at the end of a line: [B, 1 + M, D] is the class token followed by M image tokens.
"""

import hashlib
import json
import logging
import os
import re
import zipfile
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# D, L, N_h. Base, large and huge: Dosovitskiy et al. (2021), Table 1. Tiny and small: Touvron et al.
# (2021), Table 1. Nano is ours, for 48-pixel pictures of shapes (data.py).
SIZES = {
    'nano': (64, 6, 2),
    'tiny': (192, 12, 3),
    'small': (384, 12, 6),
    'base': (768, 12, 12),
    'large': (1024, 24, 16),
    'huge': (1280, 32, 16),
}

log = logging.getLogger('ivpt')


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: what, where, and what to do."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))


def attend(q, k, v):
    """softmax(q kᵀ / sqrt(d)) v: q [B, N_h, T, d] and k, v [B, N_h, T', d] -> [B, N_h, T, d].

    The fused kernel never holds the matrix [B, N_h, T, T'], but in bfloat16 on a CPU it takes twice as long."""
    if q.dtype == torch.bfloat16 and q.device.type == 'cpu':
        return (q / q.shape[-1] ** 0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention of D-wide tokens with N_h heads."""

    def __init__(self, D, N_h):
        super().__init__()
        self.N_h = N_h
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def split(self, x):
        """Cut j projections that lie side by side into heads: [..., T, j D] -> j of [..., N_h, T, d]."""
        x = x.unflatten(-1, (-1, self.N_h, self.proj.in_features // self.N_h))  # [..., T, j, N_h, d]
        return [part.transpose(-2, -3) for part in x.unbind(-3)]

    def forward(self, tokens, *context, need_weights=True):
        """Let tokens [B, T, D] attend to themselves and to every context, [B, n, D] or [n, D].

        Returns the attended tokens [B, T, D] and w [B, T + n + ...]: the weights of the first token's query over all
        keys, mean over the heads, without gradient; or None, unless need_weights. A context makes no queries; one
        without a batch dimension (prompts: they do not depend on the image) makes its keys and values once a batch."""
        B, _, D = tokens.shape
        q, k, v = self.split(self.qkv(tokens))  # [B, N_h, T, d]
        if context:
            q = q.contiguous()  # lets go of the rest of qkv, which the backward pass would keep
        for c in context:
            pair = self.split(F.linear(c, self.qkv.weight[D:], self.qkv.bias[D:]))
            k, v = (torch.cat([x, y.expand(B, -1, -1, -1)], dim=2) for x, y in zip((k, v), pair))  # [B, N_h, T + n, d]
        attended = attend(q, k, v)  # [B, N_h, T, d]
        w = self.first_row(q, k) if need_weights else None
        return self.proj(attended.transpose(1, 2).flatten(2)), w

    def first_row(self, q, k):
        """w [B, T]: how the first query of q weighs the T keys of k, [B, N_h, T, d] each; mean over the heads.
        In float32 under any autocast: w decides what is reinforced, and in bfloat16 many weights are alike."""
        with torch.no_grad(), torch.autocast(q.device.type.replace('meta', 'cpu'), enabled=False):  # meta has none
            q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q[:, :, :1], k))
            w = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            return w.mean(dim=1).squeeze(1)

    def one_query(self, tokens, *context):
        """What `forward` gives for the first token alone, [B, 1, D], and w. No key and no value is made.

        qᵀ(W_K x + b_K) = (W_Kᵀ q)ᵀ x + qᵀb_K, and the last term, the same for every x, cancels in the softmax;
        Σ_i w_i (W_V x_i + b_V) = W_V Σ_i w_i x_i + b_V, since the weights sum to 1. In float32 as `first_row`."""
        with torch.autocast(tokens.device.type.replace('meta', 'cpu'), enabled=False):
            x = [y.to(self.qkv.weight.dtype) for y in (tokens, *context)]
            W_Q, W_K, W_V = self.qkv.weight.unflatten(0, (3, self.N_h, -1))  # [N_h, d, D]
            b_Q, _, b_V = self.qkv.bias.unflatten(0, (3, self.N_h, -1))  # [N_h, d]
            q = torch.einsum('hde,be->bhd', W_Q, x[0][:, 0]) + b_Q  # [B, N_h, d]
            W_Kq = torch.einsum('hde,bhd->bhe', W_K, q) / q.shape[-1] ** 0.5  # [B, N_h, D]
            w = torch.cat([W_Kq @ y.mT for y in x], dim=-1).softmax(-1)  # [B, N_h, T + n + ...]
            wx = sum(a @ y for a, y in zip(w.split([y.shape[-2] for y in x], dim=-1), x))  # [B, N_h, D]
            attended = torch.einsum('hde,bhe->bhd', W_V, wx) + b_V
        return self.proj(attended.flatten(1)).unsqueeze(1), w.detach().mean(dim=1)


class Mlp(nn.Module):
    """The two linear maps of a layer with a GELU in between: [..., D] -> [..., D]."""

    def __init__(self, D):
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """One transformer layer, 𝒯^l of Eq. 1. attn: what attends, if it is not an `Attention` with N_h heads."""

    def __init__(self, D, N_h, attn=None, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.attn = attn or Attention(D, N_h)
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.mlp = Mlp(D)

    def forward(self, tokens, *context, need_weights=True, one_query=False):
        """Eq. 1. Update tokens [B, T, D]; context tokens, if any, are attended to and not updated.

        Returns the updated tokens and the first token's attention weights over tokens and context, as
        `Attention.forward`. With prompts as context this is Eq. 2 and 3, whose "..." drops the outputs
        at the prompts' places, and the weights are the w̃ of Eq. 14.
        one_query: the first token alone is updated, [B, 1, D], and attends to all tokens."""
        x, *context = (self.norm1(y) for y in (tokens, *context))
        if one_query:
            attended, w = self.attn.one_query(x, *context)
            tokens = tokens[:, :1]
        else:
            attended, w = self.attn(x, *context, need_weights=need_weights)
        tokens = tokens + attended
        return tokens + self.mlp(self.norm2(tokens)), w


class PatchEmbed(nn.Module):
    """Cut images [B, 3, H, W] into patches and project each to an image token: [B, M, D]."""

    def __init__(self, img_size, patch_size, D, norm=nn.Identity):
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(3, D, kernel_size=patch_size, stride=patch_size)
        self.norm = norm(D)

    def forward(self, images):
        """Raises InputError if the images are not of the size that the model was built for."""
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise InputError(f'images of shape {tuple(images.shape)} came to a model for '
                             f'[B, 3, {self.img_size}, {self.img_size}]: give vit.build that img_size')
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class ViT(nn.Module):
    """A plain vision transformer in timm's parameter names. img_size, patch_size: pixels. num_classes=0 leaves the head
    out: features [B, D] come instead of logits. Raises InputError if sizes do not fit each other.

    readout: what is classified. 'cls': norm(z_cls). 'mean': norm(mean of Z), without prompts, for MAE, whose class
    token had no loss of its own; timm's global_pool='avg'."""

    def __init__(self, img_size, patch_size, D, L, N_h, num_classes=0, readout='cls'):
        super().__init__()
        if not 1 <= patch_size <= img_size:
            raise InputError(f'an image of {img_size} pixels holds no patch of {patch_size}')
        if readout not in ('cls', 'mean'):
            raise InputError(f'readout is cls or mean, not {readout}')
        M = (img_size // patch_size) ** 2
        self.img_size, self.patch_size, self.D, self.L, self.M, self.readout = img_size, patch_size, D, L, M, readout
        self.patch_embed = PatchEmbed(img_size, patch_size, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + M, D))
        self.blocks = nn.ModuleList(Layer(D, N_h) for _ in range(L))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images):
        """[z_cls^0, Z^0] of section 3.1: images [B, 3, H, W] -> tokens [B, 1 + M, D]."""
        Z = self.patch_embed(images)  # [B, M, D]
        return torch.cat([self.cls_token.expand(len(Z), -1, -1), Z], dim=1) + self.pos_embed

    def forward(self, images):
        """Eq. 1, every token through every layer: images [B, 3, H, W] -> logits [B, C]."""
        tokens = self.embed(images)
        for layer in self.blocks:
            tokens, _ = layer(tokens, need_weights=False)
        return self.head(self.read(tokens))

    def read(self, tokens):
        """What the last layer's tokens, [z_cls, Z, ...], tell the head: [B, 1 + M + ..., D] -> [B, D]."""
        return self.norm(tokens[:, 0] if self.readout == 'cls' else tokens[:, 1:1 + self.M].mean(dim=1))


def init_linear(module):
    """Initial values of a linear layer, as timm's: normal with standard deviation 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- Swin (Liu et al., 2021) ----------------------------------------------------------------------------

# D of the first stage, L of each, N_h of the first: section 3.3. Nano is ours again.
SWIN_SIZES = {'nano': (32, (2, 2, 2), 1), 'tiny': (96, (2, 2, 6, 2), 3), 'small': (96, (2, 2, 18, 2), 3),
              'base': (128, (2, 2, 18, 2), 4), 'large': (192, (2, 2, 18, 2), 6)}


class WindowAttention(Attention):
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
        """As `Attention.forward`; every window attends to all of a context [n, D], with no bias and no mask.

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
        back, w = self.order.flatten().argsort(), None
        if need_weights:
            with torch.no_grad():  # beside the fused kernel, as `first_row`
                A = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)  # [B, n_W N_h, w², w² + n]
                w = A.mean(dim=2).unflatten(1, (n_W, -1)).mean(dim=2)[..., :T].flatten(1)[:, back]
        return self.proj(attended.index_select(1, back)), w


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

    w: tokens on a side of a window. L: layers of each stage. D, N_h: the first stage's, then doubled. Its attributes:
    L, all layers; D, of the features; M, of the first stage; sizes, (L, M, D) of each stage. The rest is as in ViT."""

    def __init__(self, img_size, patch_size, w, D, L, N_h, num_classes=0):
        super().__init__()
        unit = patch_size * 2 ** (len(L) - 1) * w
        if unit < 1 or img_size < 1 or img_size % unit:
            raise InputError(f'patches of {patch_size} pixels in windows of {w} x {w}, merged {len(L) - 1} times, need '
                             f'images of a multiple of {unit} pixels, not {img_size}')
        self.patch_embed = PatchEmbed(img_size, patch_size, D, nn.LayerNorm)
        self.layers, self.sizes, H = nn.ModuleList(), [], img_size // patch_size
        self.img_size, self.patch_size, self.M, self.L = img_size, patch_size, H * H, sum(L)
        for i, n in enumerate(L):
            if i:
                D, N_h, H = 2 * D, 2 * N_h, H // 2
            shifts = [w // 2 if l % 2 and H > w else 0 for l in range(n)]
            blocks = [Layer(D, N_h, WindowAttention(D, N_h, H, w, s), eps=1e-5) for s in shifts]
            self.layers.append(nn.ModuleDict({'downsample': PatchMerging(D // 2) if i else nn.Identity(),
                                              'blocks': nn.ModuleList(blocks)}))
            self.sizes.append((n, H * H, D))
        self.D, self.norm, self.head = D, nn.LayerNorm(D), nn.Sequential()
        self.head.add_module('fc', nn.Linear(D, num_classes) if num_classes else nn.Identity())
        self.blocks = [layer for stage in self.layers for layer in stage.blocks]  # a list: it gives no names
        self.apply(init_linear)

    def forward(self, images):
        """Eq. 1, stage after stage: images [B, 3, H, W] -> logits [B, C]."""
        tokens = self.patch_embed(images)
        for stage in self.layers:
            tokens = stage.downsample(tokens)
            for layer in stage.blocks:
                tokens, _ = layer(tokens, need_weights=False)
        return self.head(self.norm(tokens).mean(dim=1))


# ---- By name ----------------------------------------------------------------------------------------------


def parse_name(name):
    """(size, patch size, image size in pixels) of timm's name: vit_base_patch16_224 -> ('base', 16, 224); a Swin's
    has its window, too: swin_base_patch4_window7_224 -> ('base', 4, 224, 7)."""
    match = re.fullmatch(r'swin_(\w+?)_patch(\d{1,4})_window(\d{1,2})_(\d{1,5})(\..*)?', name)
    if match and match[1] in SWIN_SIZES:
        return match[1], int(match[2]), int(match[4]), int(match[3])
    match = re.fullmatch(r'vit_(\w+?)_patch(\d{1,4})_(\d{1,5})(\..*)?', name)
    if not match or match[1] not in SIZES:
        raise InputError(f'unknown model {name!r}: write vit_SIZE_patchP_PIXELS, as vit_base_patch16_224, '
                         f'SIZE one of {", ".join(SIZES)}, or swin_SIZE_patch4_window7_PIXELS, SIZE one of '
                         f'{", ".join(SWIN_SIZES)}')
    return match[1], int(match[2]), int(match[3])


def build(name, weights=None, num_classes=0, img_size=None, readout='cls'):
    """A ViT or Swin by timm's name, as vit_base_patch16_224; what follows a dot in the name is ignored.

    weights: path or URL for `load_weights`; random values without. img_size: pixels, if other than the name says.
    readout: see `ViT`. Raises InputError for a name outside the grammar and weights that do not fit."""
    size, patch_size, pixels, *window = parse_name(name)
    if window:
        model = Swin(img_size or pixels, patch_size, *window, *SWIN_SIZES[size], num_classes=num_classes)
    else:
        model = ViT(img_size or pixels, patch_size, *SIZES[size], num_classes, readout)
    if weights is not None:
        load_weights(model, weights)
    return model


# ---- Weights --------------------------------------------------------------------------------------------


def load_weights(model, weights):
    """Copy the checkpoint at a path or URL into a model, exactly or not at all.

    It may be in any format of READERS and any dialect of `to_timm`. `pos_embed` of another grid is resampled.
    A head of another size is left out and said so. Whatever else is missing, left over, of another shape or
    type, or not finite raises InputError with the parameters' names."""
    state, own = read_state_dict(weights), model.state_dict()
    try:
        state = to_timm(state, model.blocks[0].attn.N_h)
        if 'pos_embed' in state and state['pos_embed'].ndim == 3 and state['pos_embed'].shape[2] == model.D:
            state['pos_embed'] = resample_pos_embed(state['pos_embed'], model.M)
    except (IndexError, RuntimeError, ValueError) as error:  # a matrix that is a vector, layers of two widths
        raise InputError(f'{weights} does not fit this ViT: {reason(error)}') from None
    head = {name for name in state if re.fullmatch(r'head\.(fc\.)?(weight|bias)', name)}  # fc: a Swin's
    if any(name not in own or own[name].shape != state[name].shape for name in head):
        log.warning(f'{weights}: its head for {(*state[min(head)].shape, 1)[0]} classes is left out')
        for name in head:
            del state[name]
    state |= {name: x for name, x in own.items() if name.startswith('head.') and name not in state}
    if wrong := misfits(state, own):
        raise InputError(f'{weights} does not fit this {type(model).__name__} ({model.L} layers, D={model.D}, patch '
                         f'{model.patch_size}). {wrong}. Name its model with --model')
    if broken := [name for name, x in state.items() if not x.isfinite().all()]:
        raise InputError(f'{weights} is damaged: NaN or infinite values in {shorten(broken)}')
    model.load_state_dict(state)


def misfits(state, own):
    """In words, how a state dict differs from a model's own in names, shapes and types; '' if it does not."""
    both, kind = own.keys() & state.keys(), 'ViT' if 'cls_token' in own else 'Swin'
    wrong = {
        'missing': own.keys() - state.keys(),
        f'not of a plain {kind}': state.keys() - own.keys(),
        'of another shape': {f'{name} {list(state[name].shape)} for {list(own[name].shape)}'
                             for name in both if state[name].shape != own[name].shape},
        'not floating-point': {name for name in both if not state[name].is_floating_point()},
    }
    return '; '.join(f'{what}: {shorten(sorted(names))}' for what, names in wrong.items() if names)


def shorten(names, most=4):
    """Join names, the first few of them."""
    return printable(', '.join(names[:most])) + (f' and {len(names) - most} more' if len(names) > most else '')


def printable(words):
    """Words out of a file, fit for a terminal: not too many, and no control characters."""
    return ''.join(c if c.isprintable() else '?' for c in words[:300])


def resample_pos_embed(pos_embed, M):
    """Position embeddings [1, 1 + M', D] on a square grid -> [1, 1 + M, D], as timm resamples them."""
    z_cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old, new = round(grid.shape[1] ** 0.5), round(M ** 0.5)
    if old in (0, new) or old ** 2 != grid.shape[1]:  # not a square: its shape is refused by name later
        return pos_embed
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode='bicubic', antialias=True)
    return torch.cat([z_cls, grid.flatten(2).transpose(1, 2)], dim=1)


# ---- Dialects: the same parameters under other names ----------------------------------------------------


def to_timm(state, N_h):
    """A checkpoint in timm's names and shapes, for a model with N_h heads. A dialect is told by its names;
    names of none stay as they are. Raises ValueError, or what torch raises, if shapes contradict names."""
    if any(name.startswith('module.') for name in state):
        state = from_moco_v3(state)
    state = without_prefix(state)
    if any(name.endswith('embedding/kernel') for name in state):
        state = from_jax(state, N_h)
    if any(name.startswith('encoder.layer.') for name in state):
        for theirs, ours in HUGGING_FACE_NAMES.items():
            state = {name.replace(theirs, ours): x for name, x in state.items()}
    for q in [name for name in state if '.attn.query.' in name]:
        qkv = [state.pop(q.replace('query', part), torch.empty(0)) for part in ('query', 'key', 'value')]
        state[q.replace('query', 'qkv')] = torch.cat(qkv)  # [3 D, D] or [3 D]
    if any(re.match(LAYER_SCALE, name) for name in state):
        state = fold_layer_scale(state)
    if 'layers.0.downsample.reduction.weight' in state:
        state = from_swin(state)
    return {name: x for name, x in state.items() if not name.startswith(UNREAD)}


# MAE's decoder (github.com/facebookresearch/mae); `mask_token`, also DINOv2's, which no whole image meets; Hugging
# Face's pooler, a layer behind the features (JAX's `pre_logits`), which their own classifier does not read either
UNREAD = ('decoder_', 'mask_token', 'pooler.')
PATCH_EMBED = r'(((model|backbone|module|encoder|vit)\.)*)(embeddings\.)?patch_embed(dings)?\.proj(ection)?\.weight'
HUGGING_FACE_NAMES = {  # of ViTModel and ViTForImageClassification in their files; replaced in this order
    'embeddings.position_embeddings': 'pos_embed', 'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'embeddings.': '', 'encoder.layer.': 'blocks.', 'layernorm_before': 'norm1', 'attention.attention.': 'attn.',
    'attention.output.dense': 'attn.proj', 'layernorm_after': 'norm2', 'intermediate.dense': 'mlp.fc1',
    'output.dense': 'mlp.fc2', 'layernorm': 'norm', 'classifier.': 'head.'}


def without_prefix(state):
    """Names without what a wrapper (DataParallel, a class with a ViT in it) puts before them, which is what stands
    before the patch embedding's. Where there are two, or two names would become one, they stay."""
    prefixes = [match[1] for name in state if (match := re.fullmatch(PATCH_EMBED, name))]
    plain = {name.removeprefix(prefixes[0]): x for name, x in state.items()} if len(prefixes) == 1 else {}
    return plain if len(plain) == len(state) else state


def from_moco_v3(state):
    """MoCo-v3 (github.com/facebookresearch/moco-v3). vit-*.pth.tar has two encoders with a projection each for
    a head; its linear classification takes the first. linear-vit-*.pth.tar has one, with a classifier."""
    for prefix in ('module.base_encoder.', 'module.momentum_encoder.', 'module.'):
        if encoder := {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}:
            break
    sines = encoder.get('pos_embed', torch.ones(1, 1, 1))  # fixed, 0 for the class token
    if sines.shape[-1] == 384 and not sines[:, 0].any():
        raise ValueError("MoCo-v3's ViT-S has 12 heads and a plain one 6, in parameters of the same shapes")
    return {name: x for name, x in encoder.items() if prefix == 'module.' or not name.startswith('head.')}


JAX_NAMES = {  # replaced in this order
    'opt/target/': '', 'Transformer/posembed_input/pos_embedding': 'pos_embed', 'cls': 'cls_token',
    'Transformer/encoder_norm': 'norm', 'Transformer/encoderblock_': 'blocks.', 'LayerNorm_0': 'norm1',
    'LayerNorm_2': 'norm2', 'MlpBlock_3/Dense_0': 'mlp.fc1', 'MlpBlock_3/Dense_1': 'mlp.fc2',
    'MultiHeadDotProductAttention_1/out': 'attn.proj', 'MultiHeadDotProductAttention_1': 'attn',
    'embedding': 'patch_embed.proj', 'kernel': 'weight', 'scale': 'weight', '/': '.'}


def from_jax(state, N_h):
    """The first release (github.com/google-research/vision_transformer): kernels transposed, heads apart. If a
    layer `pre_logits` stands before its head, both are dropped: features pass neither. Its GELU is approximate;
    timm and VPT use these weights with the exact one, and so do we."""
    timm = {}
    for name, x in state.items():
        merged = re.search('(query|key|value)/', name)  # [D, N_h, d] and [N_h, d]; on the way out [N_h, d, D]
        heads = x.shape[-2:-1] if merged else x.shape[-3:-2] if name.endswith('_1/out/kernel') else (N_h,)
        if heads != (N_h,):
            raise ValueError(f'{name} {list(x.shape)} is not for N_h={N_h} heads')
        for theirs, ours in JAX_NAMES.items():
            name = name.replace(theirs, ours)
        if name == 'patch_embed.proj.weight':
            x = x.permute(3, 2, 0, 1)  # [p, p, 3, D] -> [D, 3, p, p]
        else:
            x = x.flatten(-2) if merged else x.flatten(0, 1) if name.endswith('attn.proj.weight') else x
            x = x.mT if x.ndim > 1 and name.endswith('.weight') else x  # [in, out] -> [out, in]
        timm[name] = x
    dropped = ('pre_logits.', 'head.') if 'pre_logits.weight' in timm else ()
    return {name: x for name, x in timm.items() if not name.startswith(dropped)}


LAYER_SCALE = r'(blocks\.\d+)\.(?:ls|gamma_)([12])(?:\.gamma)?$'


def fold_layer_scale(state):
    """LayerScale of DINOv2 and timm (ls1.gamma) or DeiT III (gamma_1): diag(γ)(Wx + b), so W, b take γ in.
    DeiT III has no position embedding for the class token, which is to add 0."""
    for name in [name for name in state if re.match(LAYER_SCALE, name)]:
        layer, which = re.match(LAYER_SCALE, name).groups()
        gamma, before = state.pop(name), f'{layer}.{"attn.proj" if which == "1" else "mlp.fc2"}'
        for W in {f'{before}.weight', f'{before}.bias'} & state.keys():
            if gamma.shape != state[W].shape[:1]:
                raise ValueError(f'{name} {list(gamma.shape)} does not scale {W} {list(state[W].shape)}')
            state[W] = torch.einsum('i,i...->i...', gamma, state[W])  # [D, D] or [D, 4 D] or [D]
    M = state['pos_embed'].shape[1] if 'pos_embed' in state else 0
    if M and round(M ** 0.5) ** 2 == M:
        state['pos_embed'] = F.pad(state['pos_embed'], (0, 0, 1, 0))  # [1, 1 + M, D]
    return state


def from_swin(state):
    """Swin's own code (github.com/microsoft/Swin-Transformer), and timm before 0.8: merging ends a stage and does not
    begin the next one, the head is not called `fc`, and two buffers are saved that follow from the sizes."""
    timm = {}
    for name, x in state.items():
        name = re.sub(r'^layers\.(\d{1,4})\.(?=downsample\.)', lambda stage: f'layers.{int(stage[1]) + 1}.', name)
        if not name.endswith(('.relative_position_index', '.attn_mask')):
            timm[re.sub(r'^head\.(?=weight$|bias$)', 'head.fc.', name)] = x
    return timm


# ---- Files ----------------------------------------------------------------------------------------------

MOST_UNPACKED = 8  # times a file's size; weights hardly compress


def read_state_dict(weights):
    """The tensors in the file at a path or URL, by name; what is floating-point as float32.

    No code in a file is ever run, and no number in it is trusted with memory that the file could not fill.
    Raises InputError if the file is missing, damaged, or holds anything but named tensors."""
    path = fetch(str(weights))
    if not os.path.exists(path):
        raise InputError(f'{path}: there is no such file; give --weights the file of a checkpoint')
    kind, read = READERS.get(path.suffix.lower(), READERS['.pth'])
    try:
        if not os.path.isfile(path):
            raise ValueError('not a file')
        if zipfile.is_zipfile(path):  # numpy's, and torch's since 1.6
            check_zip(path)
        state = read(path)
    except Exception as error:  # each reader has a dozen ways to dislike a file
        advice = '' if 'state_dict()' in (why := reason(error)) else '; download it again'
        raise InputError(f'{path} is not a {kind}, or is cut short ({why}){advice}') from None
    for wrapper in ('state_dict', 'model'):  # MoCo-v3 and timm; MAE and DeiT
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) and x.layout == torch.strided
            and x.device.type == 'cpu' and not x.is_quantized for name, x in state.items()):
        raise InputError(f'{path} holds no state dict: expected names and tensors, as timm saves them')
    if sum(x.nbytes for x in state.values()) > MOST_UNPACKED * path.stat().st_size:
        raise InputError(f'{path} is damaged: its tensors are larger than the file')
    return {name: x.detach().float() if x.is_floating_point() else x for name, x in state.items()}


def reason(error):
    """What an error says, in one line: of torch.load's many, the one that names what it met."""
    said = str(error).partition('WeightsUnpickler error:')[2] or str(error)
    if code := re.search(r'GLOBAL (\S+)', said):
        return f'it holds a {printable(code[1])}, which is code, and code is not run: save model.state_dict() alone'
    return printable((said.strip().splitlines() or [type(error).__name__])[0])


def check_zip(path):
    """Raise ValueError if a zip file would unpack to far more than it is, or if a checksum in it is wrong."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MOST_UNPACKED * path.stat().st_size:
            raise ValueError('it unpacks to far more than its size')
        if damaged := archive.testzip():
            raise ValueError(f'{damaged} in it is damaged')


def read_npz(path):
    """A file of numpy.savez."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def read_safetensors(path):
    """github.com/huggingface/safetensors: 8 bytes with the length of a header, the header in JSON, the tensors."""
    dtypes = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
    state, end, size = {}, 0, path.stat().st_size
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        room = size - 8 - length  # of the tensors
        if room < 0 or length > 10 ** 8:  # the format's own limit
            raise ValueError(f'a header of {length} bytes in a file of {size}')
        header = json.loads(file.read(length))
        header.pop('__metadata__', None)
        for name, x in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            start, stop = x['data_offsets']
            if x['dtype'] not in dtypes or start != end or not start < stop <= room:
                raise ValueError(f'{name!r} is {x["dtype"]} from byte {start} to {stop} of {room}, after {end}')
            state[name] = torch.frombuffer(bytearray(file.read(stop - start)), dtype=dtypes[x['dtype']])
            state[name], end = state[name].reshape(x['shape']), stop
    if end != room:
        raise ValueError(f'its tensors end at byte {end} of {room}')
    return state


READERS = {
    '.npz': ('NumPy archive', read_npz),
    '.safetensors': ('safetensors file', read_safetensors),
    '.pth': ('PyTorch state dict', partial(torch.load, map_location='cpu', weights_only=True)),  # and any other name
}


def fetch(weights):
    """A local path for a path or URL; a URL is downloaded once, into torch hub's folder.

    Known checksums are checked: a URL may end in #md5= or #sha256= and its first digits, and names in torch's own
    style have those of the SHA-256. Raises InputError, with what to put where by hand, if not all of it comes."""
    if urlparse(weights).scheme not in ('http', 'https', 'file'):
        return Path(weights)
    url, _, checksum = weights.partition('#')
    # pytorch_model.bin is the name of many files, so the cached file's name has the URL's whole path
    name = unquote(urlparse(url).path).strip('/').replace('/', '_')
    path, in_name = Path(torch.hub.get_dir()) / 'checkpoints' / name, re.search(r'-([0-9a-f]{8,64})\.', name)
    part = path.with_name(f'{name}.{os.getpid()}')  # two runs may download at once
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with urlopen(Request(url, headers={'User-Agent': 'torch.hub'}), timeout=20) as reply:
                size = int(reply.headers['Content-Length'] or 0)
            log.warning(f'downloading {url} ({f"{size / 1e6:.0f} MB" if size else "size unknown"}) to {path}')
            torch.hub.download_url_to_file(url, str(part), in_name and in_name[1])
            check_download(part, size, checksum)
            part.replace(path)
    except Exception as error:  # no network, moved, refused, disk full, cut short, altered
        part.unlink(missing_ok=True)
        raise InputError(f'could not download {url} ({reason(error)}). Put that file at {path} by hand, or '
                         'give the path of a copy with --weights') from None
    return path


def check_download(path, size, checksum):
    """Raise ValueError if a file has not that size (0: not known) or checksum, as md5=DIGITS ('': not known)."""
    if size not in (0, path.stat().st_size):
        raise ValueError(f'cut short, {path.stat().st_size} of {size} bytes')
    algorithm, _, digits = checksum.partition('=')
    if checksum:
        found = hashlib.new(algorithm, path.read_bytes()).hexdigest()
        if not digits or not found.startswith(digits):
            raise ValueError(f'its {algorithm} is {found} and not {digits}')
