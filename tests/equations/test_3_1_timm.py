"""The ViT is timm's: the same names, shapes and answers (section 3.1, Eq. 1).

`timm.json` was written by timm 1.0.31 and torch 2.15 with the program below, and holds, for each model, the
names and shapes of timm's parameters and timm's float64 logits with the weights and images of `wave`:

    for name, kwargs in MODELS:           # of this file; depth is cut where a model is large
        model = timm.create_model(name, **kwargs).double().eval()
        state = model.state_dict()
        model.load_state_dict({n: wave(x.shape, i) for i, (n, x) in enumerate(state.items())})
        pixels = kwargs.get('img_size', 224)
        golden[name] = {'shapes': {n: list(x.shape) for n, x in state.items()},
                        'logits': model(wave((2, 3, pixels, pixels), 0, 1.0)).tolist()}
    golden["global_pool='avg'"][name] = the logits of timm.create_model(name, **kwargs, global_pool='avg'), for POOLED
    resample = timm.layers.resample_abs_pos_embed
    golden['resample_abs_pos_embed'] = {
        f'{old} to {new}': resample(wave((1, 1 + old ** 2, 8), 1).float(), [new, new]).tolist() for old, new in GRIDS}
"""

import json
from pathlib import Path

import pytest
import torch
from strategies import wave

import vit

MODELS = [
    ('vit_tiny_patch16_224', dict(depth=3, img_size=64, num_classes=5)),
    ('vit_small_patch16_224', dict(depth=2, img_size=56, patch_size=14, num_classes=5)),
    ('vit_base_patch16_224', dict(depth=2, img_size=48, num_classes=5)),
    ('vit_base_patch8_224', dict(depth=1, img_size=30, num_classes=5)),  # timm reads 24 of them, we refuse it
    ('vit_large_patch16_224', dict(depth=1, img_size=32, num_classes=3)),
    ('vit_huge_patch14_224', dict(depth=1, img_size=28, num_classes=3)),
]
POOLED = [MODELS[0], MODELS[3]]
GRIDS = [(4, 7), (7, 4), (3, 8), (37, 8)]
GOLDEN = json.loads(Path(__file__).with_name('timm.json').read_text())


@pytest.mark.parametrize('readout, name, kwargs', [
    *[('cls', *model) for model in MODELS],
    *[('mean', *model) for model in POOLED]])  # timm calls the norm behind the mean fc_norm
def test_names_shapes_their_order_and_logits_are_those_of_timm_for_both_readouts(readout, name, kwargs):
    """Of the weights and images of `wave`."""
    shapes, logits = GOLDEN[name]['shapes'], GOLDEN[name]['logits']
    if readout == 'mean':
        logits = GOLDEN["global_pool='avg'"][name]
    size, patch_size, _ = vit.parse_name(name)
    D, _, N_h = vit.SIZES[size]
    patch_size, pixels = kwargs.get('patch_size', patch_size), kwargs['img_size']
    S = pixels // patch_size * patch_size
    with torch.device('meta'):  # no time for initial values
        model = vit.ViT(S, patch_size, (D, kwargs['depth'], N_h), kwargs['num_classes'], readout).eval()
    own = {n: list(x.shape) for n, x in model.state_dict().items()}
    assert own == shapes and list(own) == sorted(own, key=list(shapes).index)
    model.load_state_dict({n: wave(shape, i) for i, (n, shape) in enumerate(shapes.items())}, assign=True)
    images = wave((2, 3, pixels, pixels), 0, 1.0)[..., :S, :S]
    for dtype, tolerance in (torch.float64, 1e-10), (torch.float32, 1e-5):
        with torch.no_grad():
            ours = model.to(dtype)(images.to(dtype))
        torch.testing.assert_close(ours.double(), torch.tensor(logits, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize('old, new', GRIDS)
def test_position_embeddings_are_resampled_as_by_timm(old, new):
    expected = torch.tensor(GOLDEN['resample_abs_pos_embed'][f'{old} to {new}'])
    resampled = vit.resample_pos_embed(wave((1, 1 + old ** 2, 8), 1).float(), new ** 2)
    torch.testing.assert_close(resampled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('size, D, L, N_h', [('tiny', 192, 12, 3), ('small', 384, 12, 6), ('base', 768, 12, 12),
                                             ('large', 1024, 24, 16), ('huge', 1280, 32, 16)])
def test_sizes_are_those_of_timm(size, D, L, N_h):
    with torch.device('meta'):
        model = vit.build(f'vit_{size}_patch14_224')
    assert (model.D, model.L, model.blocks[0].attn.N_h, model.M) == (D, L, N_h, 256)
