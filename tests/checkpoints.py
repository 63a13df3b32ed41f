"""Checkpoints of a tiny ViT, in every dialect and every kind of file."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from test_3_1_timm import wave

import vit

HERE = Path(__file__).parent
DIALECTS = json.loads((HERE / 'dialects.json').read_text())
SUFFIXES = ('.pth', '.npz', '.safetensors')


def tiny(classes=3, pixels=12, D=8, N_h=2, seed=0):
    """A ViT of two layers on patches of 4 pixels, in no parameter like another."""
    torch.manual_seed(seed)
    model = vit.ViT(pixels, 4, D, 2, N_h, num_classes=classes).eval()
    for p in model.parameters():
        p.data.add_(torch.rand_like(p) / 8)
    return model


def values(shapes):
    """Float32 values for names and shapes; BatchNorm's counter is the one integer."""
    return {name: torch.tensor(i) if name.endswith('num_batches_tracked') else wave(shape, i, 0.5).float()
            for i, (name, shape) in enumerate(shapes.items())}


def state_of(dialect):
    return values(DIALECTS[dialect]['shapes'])


def save(path, state):
    """Write a state dict into the kind of file that the path's suffix says."""
    if path.suffix == '.npz':
        np.savez(path, **{name: x.numpy() for name, x in state.items()})
    elif path.suffix == '.safetensors':
        path.write_bytes(safetensors(state))
    else:
        torch.save(state, path)
    return path


def safetensors(state, change=lambda header: header):
    """The format from its description: u64 length, JSON, tensors. `change` may make the header lie."""
    dtypes = {torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.int64: 'I64'}
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, x in state.items():
        more = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {'dtype': dtypes[x.dtype], 'shape': list(x.shape), 'data_offsets': [len(data), len(data) + len(more)]}
        data += more
    header = json.dumps(change(header)).encode()
    return struct.pack('<Q', len(header)) + header + data
