"""A vision transformer (Dosovitskiy et al., 2021) in timm's parameter names, and the checkpoints that fit it.

The letters of sizes and shapes mean the same in every file of this project:

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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger('ivpt')


class InputError(ValueError):
    """Something that the user gave is wrong. The message says what, where, and what to do."""


@dataclass(frozen=True)
class Backbone:
    """The settings of the frozen backbone: type, then the smallest and largest number or all words; see train.py."""

    build: Annotated[str, '', 'FILE.py:NAME'] = ''  # the function that makes it; '': a ViT, by its name
    img_size: Annotated[int, 0, 10_000] = 0  # pixels; 0: what its name says
    readout: Annotated[str, 'cls', 'mean'] = 'cls'  # what is classified (see `ViT`)
    mean: Annotated[tuple, -1e6, 1e6] = (0.485, 0.456, 0.406)  # of the pixels that the weights were trained with;
    std: Annotated[tuple, 1e-6, 1e6] = (0.229, 0.224, 0.225)  # these are ImageNet's


# ---- 3.1 The vision transformer -------------------------------------------------------------------------

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
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q[:, :, :1], k))
            w = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            return w.mean(dim=1).squeeze(1)


class Mlp(nn.Module):
    """The two linear maps of a layer with a GELU in between: [..., D] -> [..., D]."""

    def __init__(self, D):
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """One transformer layer, 𝒯^l of Eq. 1. attn: what attends, such as an `Attention`."""

    def __init__(self, D, attn, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.mlp = Mlp(D)

    def forward(self, tokens, *context, need_weights=True):
        """Eq. 1. Update tokens [B, T, D]; context tokens, if any, are attended to and not updated.

        Returns the updated tokens and the first token's attention weights over tokens and context, as
        `Attention.forward`. With prompts as context this is Eq. 2 and 3, whose "..." drops the outputs
        at the prompts' places, and the weights are the w̃ of Eq. 14."""
        x, *context = (self.norm1(y) for y in (tokens, *context))
        attended, w = self.attn(x, *context, need_weights=need_weights)
        tokens = tokens + attended
        return tokens + self.mlp(self.norm2(tokens)), w


class PatchEmbed(nn.Module):
    """Cut images [B, 3, H, W] into patches and project each to an image token: [B, M, D]."""

    def __init__(self, img_size, patch_size, D):
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(3, D, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """Raises InputError if the images are not of the size that the model was built for."""
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise InputError(f'images of shape {tuple(images.shape)} came to a model for '
                             f'[B, 3, {self.img_size}, {self.img_size}]: give vit.build that img_size')
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A plain vision transformer in timm's parameter names. img_size, patch_size: pixels. sizes: (D, L, N_h).
    num_classes=0 leaves the head out: features [B, D], not logits. Raises InputError if sizes do not fit each other.

    readout: what is classified. 'cls': norm(z_cls). 'mean': norm(mean of Z), without prompts, for MAE, whose class
    token had no loss of its own; timm's global_pool='avg'."""

    def __init__(self, img_size, patch_size, sizes, num_classes=0, readout='cls'):
        super().__init__()
        if min(patch_size, img_size) < 1 or img_size % patch_size:
            raise InputError(f'an image of {img_size} pixels is no whole number of patches of {patch_size}')
        if readout not in ('cls', 'mean'):
            raise InputError(f'readout is cls or mean, not {readout}')
        (D, L, N_h), M = sizes, (img_size // patch_size) ** 2
        self.img_size, self.patch_size, self.D, self.L, self.M, self.readout = img_size, patch_size, D, L, M, readout
        self.patch_embed = PatchEmbed(img_size, patch_size, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + M, D))
        self.blocks = nn.ModuleList(Layer(D, Attention(D, N_h)) for _ in range(L))
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

    def last(self, tokens, *context):
        """The last layer of [z_cls, Z, ...], for `read`. Where that reads z_cls alone, only z_cls is updated: the other
        tokens are context, as prompts are."""
        if self.readout == 'cls':
            tokens, context = tokens[:, :1], (tokens[:, 1:], *context)
        return self.blocks[-1](tokens, *context, need_weights=False)[0]

    def read(self, tokens):
        """What the last layer's tokens, [z_cls, Z, ...], tell the head: [B, 1 + M + ..., D] -> [B, D]."""
        return self.norm(tokens[:, 0] if self.readout == 'cls' else tokens[:, 1:1 + self.M].mean(dim=1))

    def from_checkpoint(self, state):
        """A checkpoint's state dict in the names and shapes of this model. Raises what `to_timm` raises."""
        state = to_timm(state, self.blocks[0].attn.N_h)
        if self.readout == 'mean' and 'norm.weight' not in state:  # in timm's and MAE's models, the norm of a mean
            state = {name.replace('fc_norm.', 'norm.'): x for name, x in state.items()}
        if 'pos_embed' in state and state['pos_embed'].ndim == 3 and state['pos_embed'].shape[2] == self.D:
            state['pos_embed'] = resample_pos_embed(state['pos_embed'], self.M)
        return state


def init_linear(module):
    """Initial values of a linear layer, as timm's: normal with standard deviation 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- By name ----------------------------------------------------------------------------------------------

# D, L, N_h: Dosovitskiy et al. (2021), Table 1; tiny and small: Touvron et al. (2021), Table 1; nano is ours
SIZES = {
    'nano': (64, 6, 2),
    'tiny': (192, 12, 3),
    'small': (384, 12, 6),
    'base': (768, 12, 12),
    'large': (1024, 24, 16),
    'huge': (1280, 32, 16),
}


def parse_name(name):
    """(size, patch size, image size in pixels) of timm's name: vit_base_patch16_224 -> ('base', 16, 224)."""
    match = re.fullmatch(r'vit_(\w+?)_patch(\d{1,4})_(\d{1,5})(\..*)?', name)
    if not match or match[1] not in SIZES:
        raise InputError(f'unknown model {name!r}: write vit_SIZE_patchP_PIXELS, as vit_base_patch16_224, '
                         f'SIZE one of {", ".join(SIZES)}')
    return match[1], int(match[2]), int(match[3])


def build(name, weights=None, num_classes=0, img_size=None, readout='cls'):
    """A ViT by timm's name, as vit_base_patch16_224; what follows a dot in the name is ignored. weights: as for
    `load_weights`; random values without. img_size: pixels, if other than the name says. Raises InputError."""
    size, patch_size, pixels = parse_name(name)
    model = ViT(img_size or pixels, patch_size, SIZES[size], num_classes, readout)
    if weights is not None:
        load_weights(model, weights)
    return model


# ---- Weights --------------------------------------------------------------------------------------------

def load_weights(model, weights, head=True):
    """Copy a checkpoint into a model, exactly or not at all. model: a ViT, or another with `from_checkpoint` and sizes.
    weights: as for `fetch`. head: take its head, too, if it fits. `pos_embed` of another grid is resampled. Whatever
    else is missing, left over, of another shape, or not finite raises InputError with its name."""
    if re.search(r'vit_\w+_rope_', str(weights)):
        raise InputError(f'{weights}: a ViT of this name has rotary positions, and a plain one has not')
    path, sums, prefix = fetch(str(weights))
    state, own, kind = find_vit(read_state_dict(path, sums), prefix, path), model.state_dict(), type(model).__name__
    try:
        state = with_head(model.from_checkpoint(state), own, head, path)
    except (AttributeError, IndexError, RuntimeError, ValueError) as error:  # another interface, a vector for a matrix
        raise InputError(f'{path} does not fit this {kind}: {reason(error)}') from None
    wrong = {
        'missing': own.keys() - state.keys(),
        f'not of a plain {kind}': state.keys() - own.keys(),
        'of another shape': {f'{name} {list(state[name].shape)} for {list(own[name].shape)}'
                             for name in own.keys() & state.keys() if state[name].shape != own[name].shape},
    }
    if any(wrong.values()):
        said = '; '.join(f'{what}: {shorten(sorted(names))}' for what, names in wrong.items() if names)
        way = '--set readout=mean' if 'fc_norm.weight' in state else '--model'
        raise InputError(f'{path} does not fit this {kind} ({model.L} layers, D={model.D}, patch {model.patch_size}). '
                         f'{said}. Say what it is with {way}')
    if broken := [name for name, x in state.items() if not x.isfinite().all()]:
        raise InputError(f'{path} is damaged: NaN or infinite values in {shorten(broken)}')
    model.load_state_dict(state)


def with_head(state, own, wanted, path):
    """A state dict with its own head if that is wanted and fits the model's, and else with the model's."""
    theirs, ours = ({name: x.shape for name, x in s.items() if name.startswith('head.')} for s in (state, own))
    if wanted and theirs and ours:
        shapes = shorten([f'{name} {list(shape)}' for name, shape in theirs.items()])
        log.warning(f'{path}: its head is {"taken" if theirs == ours else "left out"}: {shapes}')
    heads = state if wanted and theirs == ours else own
    return {name: x for name, x in state.items() if name not in theirs} | {name: heads[name] for name in ours}


def shorten(names, most=4):
    """Join names, the first few of them, in at most 400 characters that a terminal can print."""
    words = ''.join(c if c.isprintable() else '?' for c in ', '.join(names[:most])[:400])
    return words + (f' and {len(names) - most} more' if len(names) > most else '')


def find_vit(holds, asked, path):
    """The ViT in what a file holds: the tensors under the prefix of its patch embedding, and a head beside it. One line
    says what is taken and what is left. Raises InputError for no ViT, and for several of which `asked`, a prefix or a
    part of it, does not choose one."""
    found = {name: x for name, x in holds.items() if isinstance(x, torch.Tensor)}
    pattern = re.compile(rf'(|.*[./])({"|".join(map(re.escape, DIALECTS))})', re.DOTALL)
    prefixes = {match[1].rstrip('./'): match[1] for match in map(pattern.fullmatch, found) if match}
    if not prefixes:
        raise InputError(f'{path} holds no ViT, since no name in it ends in {" or ".join(DIALECTS)}; it holds '
                         f'{shorten(sorted({name.partition(".")[0] for name in holds})) or "no tensors"}')
    chosen = [asked] if asked in prefixes else [x for x in prefixes if asked is None or f'.{asked}.' in f'.{x}.']
    if len(chosen) != 1:
        raise InputError(f'{path}: which ViT? Write one behind its name: {shorten([f"#{x}" for x in prefixes])}')
    prefix = prefixes[chosen[0]]
    others = tuple(x for x in prefixes.values() if len(x) > len(prefix))
    taken = {name[len(prefix):]: name for name in found if name.startswith(prefix) and not name.startswith(others)}
    around = re.escape(prefix[:prefix[:-1].rfind('.') + 1])
    beside = re.compile(rf'{around}(?:head|classifier)\.(weight|bias)')
    taken = {f'head.{match[1]}': match[0] for match in map(beside.fullmatch, found) if match} | taken
    if prefix or len(taken) < len(holds):
        word = f'(?:{re.escape(prefix)}|{around})?[^.]*'
        left = sorted({re.match(word, name)[0] for name in holds.keys() - taken.values()})
        log.warning(f'{path}: taken is {shorten(chosen) or "the ViT"}; left is {shorten(left) or "nothing"}')
    state = {ours: x for ours, name in taken.items() if (x := found[name]).is_floating_point()  # indices are no weights
             and (x.layout, x.device.type) == (torch.strided, 'cpu')}
    if sum(x.nbytes for x in state.values()) > MOST_UNPACKED * path.stat().st_size:
        raise InputError(f'{path} is damaged: its tensors are larger than the file')
    return {name: x.detach().float() for name, x in state.items()}


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

DIALECTS = {  # the name of the patch embedding tells a dialect: what is replaced in its names, in this order
    'patch_embed.proj.weight': {'gamma_1': 'ls1.gamma', 'gamma_2': 'ls2.gamma', 'pre_logits.': 'head.0.'},  # most
    'embedding/kernel': {  # JAX, the first release: github.com/google-research/vision_transformer
        'Transformer/': '', 'posembed_input/pos_embedding': 'pos_embed', 'cls': 'cls_token', 'encoder_norm': 'norm',
        'encoderblock_': 'blocks.', 'LayerNorm_0': 'norm1', 'LayerNorm_2': 'norm2', 'MlpBlock_3/Dense_0': 'mlp.fc1',
        'MlpBlock_3/Dense_1': 'mlp.fc2', 'MultiHeadDotProductAttention_1/': 'attn.', 'attn.out': 'attn.proj',
        'kernel': 'weight', 'scale': 'weight', 'embedding': 'patch_embed.proj', 'pre_logits': 'head.0', '/': '.'},
    'embeddings.patch_embeddings.projection.weight': {  # Hugging Face: ViT, ViTMAE, DINOv2
        'embeddings.patch_embeddings.projection': 'patch_embed.proj', 'embeddings.position_embeddings': 'pos_embed',
        'embeddings.': '', 'encoder.layer.': 'blocks.', 'layernorm_before': 'norm1', 'layernorm_after': 'norm2',
        'layernorm': 'norm', 'attention.attention.': 'attn.', 'attention.output.dense': 'attn.proj',
        'layer_scale': 'ls', 'lambda1': 'gamma', 'intermediate.dense': 'mlp.fc1', 'output.dense': 'mlp.fc2'},
    'conv_proj.weight': {  # torchvision; its own files say linear_1 and linear_2
        'encoder.': '', 'class_token': 'cls_token', 'conv_proj': 'patch_embed.proj', 'pos_embedding': 'pos_embed',
        'layers.encoder_layer_': 'blocks.', 'ln.': 'norm.', 'ln_': 'norm', 'self_attention.in_proj_': 'attn.qkv.',
        'self_attention.out_proj': 'attn.proj', 'linear_1': 'fc1', 'linear_2': 'fc2', 'mlp.0': 'mlp.fc1',
        'mlp.3': 'mlp.fc2', 'heads.head': 'head', 'heads': 'head'},
}
UNREAD = ('decoder_', 'mask_token', 'pooler.')  # MAE's; MAE's and DINOv2's; Hugging Face's, behind the features


def to_timm(state, N_h):
    """A ViT's parameters in timm's names and shapes, for a model with N_h heads; a name of no dialect stays as it is.
    Raises ValueError, or what torch raises, if shapes contradict names."""
    state = {name: from_jax(name, x, N_h) if '/' in name else x for name, x in state.items()}
    for patch_embed, names in DIALECTS.items():
        for theirs, ours in names.items() if patch_embed in state else ():
            state = {name.replace(theirs, ours): x for name, x in state.items()}
    for q in [name for name in state if '.attn.query.' in name]:
        qkv = [state.pop(q.replace('query', part), torch.empty(0)) for part in ('query', 'key', 'value')]
        state[q.replace('query', 'qkv')] = torch.cat(qkv)  # [3 D, D] or [3 D]
    if not any(name.endswith('.attn.qkv.bias') for name in state):  # made without one, which is 0
        matrices = [name for name in state if name.endswith('.attn.qkv.weight')]
        state |= {name.replace('weight', 'bias'): torch.zeros(len(state[name])) for name in matrices}
    for name in [name for name in state if re.fullmatch(r'blocks\.\d+\.ls[12]\.gamma', name)]:
        gamma, before = state.pop(name), name.replace('ls1.gamma', 'attn.proj').replace('ls2.gamma', 'mlp.fc2')
        for W in {f'{before}.weight', f'{before}.bias'} & state.keys():  # LayerScale: diag(γ)(Wx + b)
            if gamma.shape != state[W].shape[:1]:
                raise ValueError(f'{name} {list(gamma.shape)} does not scale {W} {list(state[W].shape)}')
            state[W] = torch.einsum('i,i...->i...', gamma, state[W])  # [D, D] or [D, 4 D] or [D]
    P = state.get('pos_embed', torch.ones(1))
    if P.ndim == 3 and P.shape[1] > 1 and round(P.shape[1] ** 0.5) ** 2 == P.shape[1]:
        state['pos_embed'] = F.pad(P, (0, 0, 1, 0))  # of DeiT III, FlexiViT: none for the class token, which is 0
    if P.shape[-1:] == (384,) and N_h != 12 and not P[:, :3, :96].any():  # sin 0, of the first row; MAE's: column
        raise ValueError("MoCo-v3's ViT-S has 12 heads and a plain one 6, in parameters of the same shapes")
    return {name: x for name, x in state.items() if not name.startswith(UNREAD)}


def from_jax(name, x, N_h):
    """A parameter of the first release in torch's shape: kernels are transposed there, and heads are apart. Its GELU is
    approximate; timm and VPT use these weights with the exact one, and so do we."""
    merged, out = re.search('(query|key|value)/', name), name.endswith('_1/out/kernel')
    heads = x.shape[-2:-1] if merged else x.shape[-3:-2] if out else (N_h,)  # of [..., N_h, d] and [N_h, d, D]
    if heads != (N_h,):
        raise ValueError(f'{name} {list(x.shape)} is not for N_h={N_h} heads')
    if name == 'embedding/kernel':
        return x.permute(3, 2, 0, 1)  # [p, p, 3, D] -> [D, 3, p, p]
    x = x.flatten(-2) if merged else x.flatten(0, 1) if out else x
    return x.mT if x.ndim > 1 and name.endswith('kernel') else x  # [in, out] -> [out, in]


# ---- Files ----------------------------------------------------------------------------------------------

MOST_UNPACKED = 8  # times a file's size; weights hardly compress
OTHERS = {  # how files begin that are something else
    rb'version https://git-lfs': 'it is a pointer of Git LFS: git lfs pull gets the file itself',
    rb'\s*<': 'it is a web page: download the file itself, by hand if a page stands before it',
    rb'\s*\{': 'it is a text in JSON: if it lists the parts of a checkpoint, load these and save them as one',
    rb'.{257}ustar': 'it is a tar archive: unpack it, and name the file in it',
}


def fetch(weights):
    """(path, checksums, PREFIX) of FILE#sha256=DIGITS#PREFIX; both marks may be missing, it may be md5, FILE a URL.
    What is at a URL is downloaded once, to a place of its own in torch hub's folder, and kept if it can be read. A URL
    in torch's style has a checksum in its name. Raises InputError, with what to put where by hand."""
    place, *marks = [weights] if os.path.exists(weights) else weights.split('#')
    sums = [mark for mark in marks if re.fullmatch('(md5|sha256)=[0-9a-f]+', mark)]
    prefix = next((mark for mark in marks if mark not in sums), None)
    path = Path(place)
    if urlparse(place).scheme in ('http', 'https', 'file'):
        name = unquote(urlparse(place).path).rpartition('/')[2][-100:]
        sums += [f'sha256={digits}' for digits in re.findall(r'-([0-9a-f]{8,64})\.', name)]
        path = Path(torch.hub.get_dir(), 'checkpoints', digest(place.encode())[:16] + '_' + name)
        try:
            if not path.exists():
                log.warning(f'downloading {place} to {path}')
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(place, str(path))
                read_state_dict(path, sums)
        except Exception as error:  # no network, moved, refused, disk full, cut short, altered, a web page
            path.unlink(missing_ok=True)
            raise InputError(f'could not download {place} ({reason(error)}). Put that file at {path} by hand, or give '
                             'the path of a copy with --weights') from None
    return path, sums, prefix


def read_state_dict(path, sums=()):
    """What a file of torch, numpy or safetensors holds, by name; of a dict in a dict, OUTER.INNER. The first bytes tell
    what it is, and not its name. sums: its checksums, as md5=DIGITS. No code in it is run, and no number in it is
    trusted with memory that the file could not fill. Raises InputError if it is missing, damaged or another one."""
    if not os.path.isfile(path):
        raise InputError(f'{path}: there is no such file, or it is a folder; give --weights the file of a checkpoint')
    try:
        for algorithm, digits in (x.split('=') for x in sums):
            if not (found := hashlib.new(algorithm, path.read_bytes()).hexdigest()).startswith(digits):
                raise ValueError(f'its {algorithm} is {found} and not {digits}')
        with open(path, 'rb') as file:
            start = file.peek(512)
            if start[8:9] == b'{':
                return read_safetensors(file.read())
            if what := next((OTHERS[x] for x in OTHERS if re.match(x, start, re.DOTALL)), None):
                raise ValueError(what)
            if start.startswith(b'PK') and any(name.endswith('.npy') for name in check_zip(path)):
                return {name: torch.from_numpy(x) for name, x in np.load(file, allow_pickle=False).items()}
            return dict(leaves(torch.load(file, map_location='cpu', weights_only=True), '', set()))
    except Exception as error:  # each reader has a dozen ways to dislike a file
        raise InputError(f'{path} is not a checkpoint, or is another one, or is cut short: {reason(error)}') from None


def digest(content):
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def reason(error):
    """What an error says, in one line: of torch.load's many, the one that names what it met."""
    said = (str(error).partition('WeightsUnpickler error:')[2] or str(error)).strip().partition('\n')[0]
    if code := re.search(r'GLOBAL (\S+)|weights_only(?:.*(TorchScript))?', said):
        what = shorten([code[1] or code[2] or 'program'])
        return f'it holds a {what}, which is code, and code is not run: save model.state_dict() alone'
    return shorten([said or type(error).__name__])


def leaves(tree, prefix, entered):
    """Yield the names and values in a dict and its dicts, each entered once; long names could fill the memory."""
    for name, x in tree.items() if isinstance(tree, dict) else ():
        name = f'{prefix}{name}'[:300]
        if isinstance(x, dict) and x and id(x) not in entered:
            entered.add(id(x))
            yield from leaves(x, f'{name}.', entered)
        else:
            yield name, x


def check_zip(path):
    """The names in a zip file. Raises ValueError if it would unpack to far more than it is, or a checksum is wrong."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MOST_UNPACKED * path.stat().st_size:
            raise ValueError('it unpacks to far more than its size')
        if damaged := archive.testzip():
            raise ValueError(f'{damaged} in it is damaged')
        return archive.namelist()


def read_safetensors(content):
    """github.com/huggingface/safetensors: 8 bytes with the length of a header, the header in JSON, the tensors."""
    dtypes = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}  # no integers
    length = int.from_bytes(content[:8], 'little')
    header, content = json.loads(content[8:8 + length]), memoryview(content)[8 + length:]
    header.pop('__metadata__', None)
    spans = sorted(x['data_offsets'] for x in header.values())
    if [0, *(stop for _, stop in spans)] != [*(start for start, _ in spans), len(content)]:
        raise ValueError('its tensors do not lie side by side from the header to the end')
    return {name: torch.frombuffer(bytearray(content[slice(*x['data_offsets'])]), dtype=dtypes[x['dtype']]
                                   ).reshape(x['shape']) for name, x in header.items() if x['dtype'] in dtypes}
