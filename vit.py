"""A vision transformer (Dosovitskiy et al., 2021) from scratch, in timm's parameter names.

Letters mean the same in every file of this project:

    B    images in a batch             M    image tokens (patches) of an image
    L    transformer layers            N    prompts of a layer (CDC)
    D    width of a token              k    image tokens that are reinforced (AR)
    N_h  attention heads               C    classes
    d    width of a head, D / N_h      T    tokens of any kind

Shapes stand at the end of a line: [B, 1 + M, D] is the class token followed by M image tokens.
"""

import logging
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
import torch.nn.functional as F
from torch import nn

# D, L, N_h. Base, large and huge: Dosovitskiy et al. (2021), Table 1. Tiny and small: Touvron et al.
# (2021), Table 1. Nano is ours, for 48-pixel pictures of shapes (data.py).
SIZES = {
    'nano': (96, 6, 3),
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
        # a worker process wraps what it raises in its traceback: the message proper is the last part
        super().__init__(' '.join(message.split()).rpartition('InputError: ')[2])


class Attention(nn.Module):
    """Multi-head self-attention of D-wide tokens with N_h heads.

    Raises InputError if D is not a multiple of N_h."""

    def __init__(self, D, N_h):
        super().__init__()
        if D % N_h:
            raise InputError(f'the width D={D} does not split into N_h={N_h} heads')
        self.N_h = N_h
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def split(self, x):
        """Cut j projections that lie side by side into heads: [..., T, j D] -> j of [..., N_h, T, d]."""
        D = self.proj.in_features
        x = x.unflatten(-1, (-1, self.N_h, D // self.N_h))  # [..., T, j, N_h, d]
        return x.movedim(-3, 0).transpose(-2, -3).unbind(0)

    def forward(self, tokens, *context):
        """Let tokens [B, T, D] attend to themselves and to every context, [B, n, D] or [n, D].

        Returns the attended tokens [B, T, D] and w [B, T + n + ...]: the weights of the first token's
        query over all keys, mean over the heads, without gradient.

        What is only attended to needs no query, and a context without a batch dimension (prompts: they
        do not depend on the image) needs its keys and values once, not once an image.
        """
        B, _, D = tokens.shape
        q, k, v = self.split(self.qkv(tokens))  # [B, N_h, T, d]
        if context:
            W_KV, b_KV = self.qkv.weight[D:], self.qkv.bias[D:]
            pairs = [self.split(F.linear(c, W_KV, b_KV)) for c in context]
            k, v = (torch.cat([x, *(y.expand(B, -1, -1, -1) for y in more)], dim=2)
                    for x, more in zip((k, v), zip(*pairs)))  # [B, N_h, T + n + ..., d]
        with torch.no_grad():  # one row beside the fused kernel, which never shows its matrix
            w = (q[:, :, :1] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            w = w.mean(dim=1).squeeze(1)  # [B, T + n + ...]
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, N_h, T, d]
        return self.proj(attended.transpose(1, 2).flatten(2)), w


class Mlp(nn.Module):
    """The two linear maps of a layer with a GELU in between: [..., D] -> [..., D]."""

    def __init__(self, D):
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """One transformer layer, 𝒯^l of Eq. 1."""

    def __init__(self, D, N_h):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, N_h)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = Mlp(D)

    def forward(self, tokens, *context):
        """Eq. 1. Update tokens [B, T, D]; context tokens, if any, are attended to and not updated.

        Returns the updated tokens and the first token's attention weights over tokens and context, as
        `Attention.forward`. With prompts as context this is Eq. 2 and 3, whose "..." drops the outputs
        at the prompts' places, and the weights are the w̃ of Eq. 14.
        """
        attended, w = self.attn(self.norm1(tokens), *(self.norm1(c) for c in context))
        tokens = tokens + attended
        return tokens + self.mlp(self.norm2(tokens)), w


class PatchEmbed(nn.Module):
    """Cut images [B, 3, H, W] into patches and project each to an image token: [B, M, D]."""

    def __init__(self, patch_size, D):
        super().__init__()
        self.proj = nn.Conv2d(3, D, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A plain vision transformer that classifies by its class token.

    img_size, patch_size: pixels. num_classes=0 leaves the head out: features [B, D] come instead of
    logits. Parameter names and shapes are timm's, so state dicts go both ways.
    Raises InputError where the sizes do not fit each other.
    """

    def __init__(self, img_size, patch_size, D, L, N_h, num_classes=0):
        super().__init__()
        if not 1 <= patch_size <= img_size:
            raise InputError(f'an image of {img_size} pixels holds no patch of {patch_size}')
        if L < 1 or num_classes < 0:
            raise InputError(f'a ViT needs L >= 1 layers and num_classes >= 0, not {L} and {num_classes}')
        M = (img_size // patch_size) ** 2
        self.img_size, self.patch_size, self.D, self.L, self.M = img_size, patch_size, D, L, M
        self.patch_embed = PatchEmbed(patch_size, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + M, D))
        self.blocks = nn.ModuleList(Layer(D, N_h) for _ in range(L))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images):
        """[z_cls^0, Z^0] of section 3.1: images [B, 3, H, W] -> tokens [B, 1 + M, D].

        Raises InputError if the images are not of the size that the model was built for."""
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise InputError(f'images of shape {tuple(images.shape)} came to a ViT for '
                             f'[B, 3, {self.img_size}, {self.img_size}]: give vit.build that img_size')
        Z = self.patch_embed(images)  # [B, M, D]
        return torch.cat([self.cls_token.expand(len(Z), -1, -1), Z], dim=1) + self.pos_embed

    def forward(self, images):
        """Eq. 1, every token through every layer: images [B, 3, H, W] -> logits [B, C]."""
        tokens = self.embed(images)
        for layer in self.blocks:
            tokens, _ = layer(tokens)
        return self.head(self.norm(tokens)[:, 0])


def init_linear(module):
    """Initial values of a linear layer, as timm's: normal with standard deviation 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def parse_name(name):
    """(size, patch size, image size in pixels) of timm's name: vit_base_patch16_224 -> ('base', 16, 224)."""
    match = re.fullmatch(r'vit_(\w+?)_patch(\d{1,4})_(\d{1,5})(\..*)?', name)
    if not match or match[1] not in SIZES:
        raise InputError(f'unknown model {name!r}: write vit_SIZE_patchP_PIXELS, as vit_base_patch16_224, '
                         f'SIZE one of {", ".join(SIZES)}')
    return match[1], int(match[2]), int(match[3])


def build(name, weights=None, num_classes=0, img_size=None):
    """A ViT by timm's name, such as vit_base_patch16_224; what follows a dot in the name is ignored.

    weights: path or URL of a timm-format state dict; random values without. img_size: pixels, if other
    than the name says. Raises InputError for a name outside the grammar and for weights that do not fit.
    """
    size, patch_size, pixels = parse_name(name)
    model = ViT(img_size or pixels, patch_size, *SIZES[size], num_classes=num_classes)
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model, weights):
    """Copy the timm-format state dict at a path or URL into a model, exactly or not at all.

    `pos_embed` of another grid is resampled. A head of another size is left out and said so. Whatever
    else is missing, left over or of another shape raises InputError with the parameters' names.
    """
    state = read_state_dict(weights)
    own = model.state_dict()
    if 'pos_embed' in state and state['pos_embed'].ndim == 3:
        state['pos_embed'] = resample_pos_embed(state['pos_embed'], model.M)
    head = {name for name in ('head.weight', 'head.bias') if name in state}
    if any(name not in own or own[name].shape != state[name].shape for name in head):
        log.warning(f'{weights}: its head for {(*state[min(head)].shape, 1)[0]} classes is left out')
        for name in head:
            del state[name]
    state |= {name: own[name] for name in ('head.weight', 'head.bias') if name in own and name not in state}

    wrong = {
        'missing': own.keys() - state.keys(),
        'not of a plain ViT': state.keys() - own.keys(),
        'of another shape': {f'{name} {list(state[name].shape)} for {list(own[name].shape)}'
                             for name in own.keys() & state.keys() if state[name].shape != own[name].shape},
    }
    if any(wrong.values()):
        found = '; '.join(f'{what}: {shorten(sorted(names))}' for what, names in wrong.items() if names)
        raise InputError(f'{weights} does not fit this ViT ({model.L} layers, D={model.D}, patch '
                         f'{model.patch_size}). {found}. Name its model with --model')
    model.load_state_dict(state)


def shorten(names, most=4):
    """Join names, the first few of them."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def resample_pos_embed(pos_embed, M):
    """Position embeddings [1, 1 + M', D] on a square grid -> [1, 1 + M, D], as timm resamples them."""
    z_cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old, new = round(grid.shape[1] ** 0.5), round(M ** 0.5)
    if old in (0, new) or old ** 2 != grid.shape[1]:  # not a square: its shape is refused by name later
        return pos_embed
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode='bicubic', antialias=True)
    return torch.cat([z_cls, grid.flatten(2).transpose(1, 2)], dim=1)


def read_state_dict(weights):
    """The float32 state dict in the file at a path or URL. No code in a file is ever run.

    Raises InputError if the file is missing, damaged, or holds anything but named tensors."""
    path = fetch(str(weights))
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise InputError(f'{path}: there is no such file; give --weights a PyTorch state dict') from None
    except Exception as error:  # torch.load has a dozen ways to dislike a file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f'{path} is not a PyTorch state dict, or is cut short ({reason[:100]}); '
                         'download it again') from None
    if not isinstance(state, dict) or not state or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()):
        raise InputError(f'{path} holds no state dict: expected names and tensors, as timm saves them')
    return {name: x.float() for name, x in state.items()}


def fetch(weights):
    """A local path for a path or URL; a URL is downloaded once, into torch hub's folder.

    Raises InputError, which says by hand what to put where, if the download fails."""
    url = urlparse(weights)
    if url.scheme not in ('http', 'https', 'file'):
        return Path(weights)
    # pytorch_model.bin is the name of many files, so the cached file's name has the URL's whole path
    path = Path(torch.hub.get_dir()) / 'checkpoints' / unquote(url.path).strip('/').replace('/', '_')
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights, str(path))
        except Exception as error:  # no network, moved, refused, disk full
            raise InputError(f'could not download {weights} ({error}). Put that file at {path} by hand, or '
                             'give the path of a copy with --weights') from None
    return path
