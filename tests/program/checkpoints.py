"""Checkpoints of a tiny ViT, in every dialect and every kind of file, and how a test sees one refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from strategies import wave

import vit
from vit import InputError

HERE = Path(__file__).parent
DIALECTS = json.loads((HERE / 'dialects.json').read_text())
SUFFIXES = ('.pth', '.npz', '.safetensors')


def tiny(classes=3, pixels=12, D=8, N_h=2, seed=0, readout='cls'):
    """A ViT of two layers on patches of 4 pixels, in no parameter like another."""
    torch.manual_seed(seed)
    model = vit.ViT(pixels, 4, (D, 2, N_h), classes, readout).eval()
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
    dtypes = {torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16',
              torch.int64: 'I64', torch.uint8: 'U8', torch.bool: 'BOOL'}
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, x in state.items():
        more = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {'dtype': dtypes[x.dtype], 'shape': [*x.shape], 'data_offsets': [len(data), len(data + more)]}
        data += more
    header = json.dumps(change(header)).encode()
    return struct.pack('<Q', len(header)) + header + data


def copy_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(model, weights):
    """The one line with which weights are refused. The model is what it was."""
    before = copy_of(model)
    with pytest.raises(InputError) as error:
        vit.load_weights(model, weights)
    said = str(error.value)
    assert same(before, model.state_dict())
    assert len(said.splitlines()) == 1 and len(said) < 1000 and said.isprintable()
    return said


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch hub's folder for checkpoints, empty. A test module imports this by name."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    return tmp_path / 'home' / 'hub' / 'checkpoints'
