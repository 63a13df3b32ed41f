"""Table 5's Swin-B: the backbone is timm's and its authors', and prompts, CDC, DA and AR on it are the literal form's.

`swin.json` was written by timm 1.0.31, VPT's code (github.com/KMnP/vpt, 4410440) and torch 2.14 with the program below.
`chirp` fills parameters, since Swin hardly notices a mistake with the smoother `wave` of test_3_1_timm.py:

    model = timm.models.swin_transformer.SwinTransformer(img_size=112, embed_dim=16, depths=(2, 2, 2),
                                                         num_heads=(1, 2, 4), window_size=7, num_classes=3)
    golden['timm'] = names and shapes of its parameters, chirp's, and float64 logits of chirp((2, 3, 112, 112), 0, 1.0)
    golden['parameters'] = numbers of parameters of timm.create_model(f'swin_{size}_patch4_window7_224', num_classes=0)
    model = PromptedSwinTransformer(config, img_size=224, embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8],
                                    num_classes=0)  # deep, prepended, 5 prompts, no dropout
    golden['vpt'] = names and shapes of all, its buffers too, and float64 features of chirp((1, 3, 224, 224), 0, 1.0)
"""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import close
from PIL import Image
from pictures import run
from strategies import METHODS, OTHERS, Case, cases, random_model, randomised

import paper
import shapes
import train
import vit
from ivpt import IVPTSwin, cdc_da
from vit import InputError

GOLDEN = json.loads((Path(__file__).parent / 'swin.json').read_text())
ON_SWIN = {name: how for name, how in (METHODS | OTHERS).items() if name not in ('vpt_shallow', 'provp', 'express')}
BUFFERS = 'relative_position_index', 'attn_mask'


def chirp(shape, seed, scale=0.5):
    """Values that every library computes alike, none like its neighbours: [shape], float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return scale * torch.sin(0.7548776662 * i * i + 2 * seed + 1).reshape(shape)


def golden_state(which):
    """A state dict as it was saved; of VPT's model without its prompts, but with its buffers."""
    return {name: chirp(shape, i) for i, (name, shape) in enumerate(GOLDEN[which]['shapes'].items()) if 'prompt' not in name}


def timms(num_classes=3):
    return vit.Swin(112, 4, 7, 16, (2, 2, 2), 1, num_classes).double().eval()


def microsofts():
    return vit.Swin(224, 4, 7, 8, (2, 2, 2, 2), 1).double().eval()


SIZES = [  # of the small models below: patches of 2 pixels, w, L, and the side of the image
    (2, (2, 2), 8), (2, (3, 1), 8), (4, (2,), 16), (3, (2,), 6), (2, (1, 2), 16), (1, (2, 1), 4)]
sizes = st.sampled_from(SIZES)


def small(case, size, num_classes=0):
    w, L, pixels = size
    return vit.Swin(pixels, 2, w, 2 * case.N_h, L, case.N_h, num_classes).double()


def images(case, size):
    return case.normal('images', case.B, 3, size[2], size[2])


def tuned(case, size, method='ivpt'):
    """An IVPT on a small Swin with nothing at its initial value. k may be more than a later stage has tokens."""
    swin = small(case, size)
    return randomised(IVPTSwin(swin, case.C, case.N, min(case.k, swin.M), **ON_SWIN[method]), case)


# ---- The literal form ------------------------------------------------------------------------------------


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def window_bias(attn, rolled, H, w, s, N):
    """Bias and mask of one window with N prompts in front: [N_h, N + w², N + w²], for each query i and key j.

    rolled: row and column of each token after rolling. There, rows and columns are cut at H - w and at H - s into
    3 x 3 regions, of which no two see each other."""
    rows = [[(y_i - y_j + w - 1) * (2 * w - 1) + x_i - x_j + w - 1 for y_j, x_j in rolled] for y_i, x_i in rolled]
    region = [[(x >= H - w) + (x >= H - s) if s else 0 for x in at] for at in rolled]
    mask = torch.tensor([[-100.0 * (i != j) for j in region] for i in region])
    return F.pad(attn.relative_position_bias_table[torch.tensor(rows)].permute(2, 0, 1) + mask, (N, 0, N, 0))


def attention(attn, x, bias):
    """oracle.attention with a bias: x [B, T, D], bias [N_h, T, T]."""
    q, k, v = (x @ W.T + b for W, b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)))
    heads, A = [], []
    for h, (q, k, v) in enumerate(zip(*(y.chunk(attn.N_h, dim=-1) for y in (q, k, v)))):
        e = torch.exp(q @ k.mT / q.shape[-1] ** 0.5 + bias[h])
        A.append(e / e.sum(-1, keepdim=True))
        heads.append(A[h] @ v)
    return torch.cat(heads, dim=-1) @ attn.proj.weight.T + attn.proj.bias, torch.stack(A, dim=1)


def literal_layer(layer, x, P, w, s):
    """Prompts P [N, D] in the sequence of every window. Returns tokens [B, M, D], what comes out at the prompts'
    places, mean over the windows [B, N, D], and the attention that tokens receive [B, M]."""
    (B, M, _), N, H = x.shape, len(P), round(x.shape[1] ** 0.5)
    y, P = layer_norm(layer.norm1, x), P.expand(B, -1, -1)
    out, received, prompts = torch.zeros_like(x), torch.zeros(B, M, dtype=x.dtype), []
    for top, left in itertools.product(range(0, H, w), repeat=2):
        rolled = list(itertools.product(range(top, top + w), range(left, left + w)))
        at = [(row + s) % H * H + (column + s) % H for row, column in rolled]
        z, A = attention(layer.attn, torch.cat([layer_norm(layer.norm1, P), y[:, at]], dim=1),
                         window_bias(layer.attn, rolled, H, w, s, N))
        out[:, at], received[:, at] = z[:, N:], A[:, :, N:, N:].detach().mean(dim=(1, 2))
        prompts.append(z[:, :N])
    x, P = x + out, P + sum(prompts) / len(prompts)
    return (*(z + oracle.mlp(layer.mlp, layer_norm(layer.norm2, z)) for z in (x, P)), received)


def literal_merging(merge, x):
    """Top left, bottom left, top right, bottom right of each 2 x 2 side by side."""
    x = x.unflatten(1, (round(x.shape[1] ** 0.5), -1))
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1).flatten(1, 2)
    return layer_norm(merge.norm, x) @ merge.reduction.weight.T


def literal(model, images, w, P_hat=None, reinforce=None):
    """A Swin, layer by layer, with prompts P_hat, a list [N, D] for each layer, or none. `reinforce` may change what a
    layer puts out. Returns the tokens after the last norm, the last prompts, and of each layer the received weights."""
    p = model.patch_size
    patches = images.unfold(2, p, p).unfold(3, p, p).flatten(2, 3).transpose(1, 2).flatten(2)  # [B, M, 3 p p]
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    x, received = layer_norm(model.patch_embed.norm, x), []
    for i, stage in enumerate(model.layers):
        x = literal_merging(stage.downsample, x) if i else x
        for j, layer in enumerate(stage.blocks):
            P = x.new_zeros(0, x.shape[2]) if P_hat is None else P_hat[len(received)]
            s = w // 2 if j % 2 and x.shape[1] > w * w else 0
            x, P, weights = literal_layer(layer, x, P, w, s)
            x = reinforce(x, weights, len(received)) if reinforce else x
            received.append(weights)
    return SimpleNamespace(tokens=layer_norm(model.norm, x), prompts=layer_norm(model.norm, P), w=received)


def literal_ivpt(model, images, w):
    """Eq. 2 to 6, 14 and 15 on a Swin: logits, and of each layer P̂, the received weights and Ω."""
    gamma = model.gamma or [None] * len(model.P)
    P_hat = [P for of_stage in zip(model.P, gamma) for P in oracle.prompts(model.structure, *of_stage)]
    P_re, Omega = [P for of_stage in model.P_re or () for P in of_stage], []

    def reinforce(x, weights, l):
        if l >= len(P_re):
            return x
        everywhere = [list(range(x.shape[1]))] * len(x)
        Omega.append(everywhere if model.reinforcement == 'all' else oracle.top_k(weights, model.k))
        return oracle.reinforce(x, Omega[l], P_re[l])

    seen = literal(model.vit, images, w, P_hat, reinforce)
    logits = seen.tokens.mean(dim=1) @ model.head.weight.T + model.head.bias
    return SimpleNamespace(logits=logits, P_hat=P_hat, w=seen.w, Omega=Omega)


# ---- The backbone ----------------------------------------------------------------------------------------


def test_names_shapes_and_their_order_are_those_of_timm():
    shapes = {name: list(x.shape) for name, x in timms().state_dict().items()}
    assert list(shapes.items()) == list(GOLDEN['timm']['shapes'].items())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logits_are_those_of_timm(dtype, tolerance):
    model = timms().to(dtype)
    model.load_state_dict(golden_state('timm'), strict=True)
    with torch.no_grad():
        logits = model(chirp((2, 3, 112, 112), 0, 1.0).to(dtype))
    torch.testing.assert_close(logits.double(), torch.tensor(GOLDEN['timm']['logits'], dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize('size', GOLDEN['parameters'])
def test_sizes_are_those_of_timm(size):
    with torch.device('meta'):
        model = vit.build(f'swin_{size}_patch4_window7_224')
    assert sum(p.numel() for p in model.parameters()) == GOLDEN['parameters'][size]
    assert model.M == 56 ** 2 and {layer.attn.proj.in_features // layer.attn.N_h for layer in model.blocks} == {32}


def test_swin_b_has_the_88M_of_table_18_with_the_head_for_1000_classes():
    with torch.device('meta'):
        model = vit.build('swin_base_patch4_window7_224', num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 87_768_224
    assert model.sizes == [(2, 3136, 128), (2, 784, 256), (18, 196, 512), (2, 49, 1024)]


@settings(max_examples=settings().max_examples // 2)
@given(cases(B=(1, 2)), sizes)
def test_a_swin_is_its_literal_form(case, size):
    """Eq. 1 in windows, one after the other: bias and mask token by token, merging by strides."""
    model = randomised(small(case, size, case.C), case)
    close(model(images(case, size)), model.head(literal(model, images(case, size), size[0]).tokens.mean(dim=1)))


@given(cases())
def test_with_one_window_no_shift_and_no_bias_a_layer_of_swin_is_a_layer_of_vit(case):
    """Eq. 1. What is left between them is LayerNorm's ε."""
    layer = randomised(vit.Layer(case.D, case.N_h), case)
    attn = vit.WindowAttention(case.D, case.N_h, 3, 3, 0).double()
    attn.load_state_dict(layer.attn.state_dict() | {'relative_position_bias_table': torch.zeros(25, case.N_h)})
    tokens, P = case.normal('tokens', case.B, 9, case.D), case.normal('P', case.N, case.D)
    expected = [layer(tokens)[0], layer(tokens, P)[0]]
    layer.attn = attn
    close([layer(tokens)[0], layer(tokens, P)[0]], expected)


@given(cases(), st.sampled_from([(4, 2, 1), (8, 4, 2), (6, 3, 1), (4, 4, 0), (4, 2, 0)]), st.data())
def test_a_token_changes_those_that_share_its_window_and_were_its_neighbours_before_rolling(case, shape, draw):
    """The shift: a window's tokens are within w of each other in the image, never across its edge."""
    H, w, s = shape
    attn = randomised(vit.WindowAttention(case.D, case.N_h, H, w, s), case)
    tokens, j = case.normal('tokens', 1, H * H, case.D), draw.draw(st.integers(0, H * H - 1))
    changed = tokens.clone()
    changed[0, j] += 1
    moved = (attn(tokens)[0] - attn(changed)[0]).abs().amax(dim=2)[0] > 1e-12
    together = [(i // H + w - s) // w == (j // H + w - s) // w and (i % H + w - s) // w == (j % H + w - s) // w
                for i in range(H * H)]
    assert moved.tolist() == together


@pytest.mark.parametrize('pixels', [0, 111, 56, 225])
def test_images_that_do_not_divide_into_windows_are_refused(pixels):
    with pytest.raises(InputError, match=f'windows of 7 x 7, merged 2 times, need .* multiple of 112 pixels, not {pixels}'):
        vit.Swin(pixels, 4, 7, 16, (2, 2, 2), 1)


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match=r'images of shape \(1, 3, 224, 224\) came to a model for \[B, 3, 112, 112\]'):
        timms()(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize('name, parts', [
    ('swin_base_patch4_window7_224', ('base', 4, 224, 7)), ('swin_tiny_patch4_window7_224.ms_in1k', ('tiny', 4, 224, 7)),
    ('swin_large_patch4_window12_384.ms_in22k', ('large', 4, 384, 12))])
def test_names_are_those_of_timm(name, parts):
    assert vit.parse_name(name) == parts


@pytest.mark.parametrize('name', ['swin_base_patch4_224', 'swin_huge_patch4_window7_224', 'vit_base_patch16_window7_224',
                                  'swinv2_base_patch4_window7_224', 'swin_base_patch4_window_224'])
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match='unknown model .* or swin_SIZE_patch4_window7_PIXELS, SIZE one of nano, tiny'):
        vit.parse_name(name)


# ---- Checkpoints -----------------------------------------------------------------------------------------


def loaded(model, state, path):
    torch.save(state, path)
    vit.load_weights(model, path)
    return model


def same(model, state):
    return all(torch.equal(x, state[name].float()) for name, x in model.float().state_dict().items())


def test_timms_file_is_loaded_with_its_head_or_without(tmp_path, caplog):
    state = golden_state('timm')
    assert same(loaded(timms(), state, tmp_path / 'a.pth'), state) and not caplog.text
    assert same(loaded(timms(0), state, tmp_path / 'b.pth'), state) and 'head for 3 classes is left out' in caplog.text


def test_the_authors_file_is_loaded_by_its_own_names(tmp_path):
    """{'model': ...}, merging at the end of a stage, a head that is not called fc, and buffers."""
    theirs = golden_state('vpt')
    assert 'layers.0.downsample.reduction.weight' in theirs and sum(name.endswith(BUFFERS) for name in theirs) == 8 + 3
    model = vit.Swin(224, 4, 7, 8, (2, 2, 2, 2), 1, num_classes=2)
    head = {'head.weight': chirp((2, 64), 1), 'head.bias': chirp((2,), 2)}
    model = loaded(model, {'model': theirs | head}, tmp_path / 'a.pth')
    for i in (1, 2, 3):
        W = theirs[f'layers.{i - 1}.downsample.reduction.weight'].float()
        assert torch.equal(model.layers[i].downsample.reduction.weight, W)
    assert torch.equal(model.layers[3].blocks[1].mlp.fc2.weight, theirs['layers.3.blocks.1.mlp.fc2.weight'].float())
    assert torch.equal(model.head.fc.weight, head['head.weight'].float())


@pytest.mark.parametrize('change, said', [
    (lambda state: {name: F.pad(x, (0, 0, 0, 529 - 169)) if 'table' in name else x for name, x in state.items()},
     r'of another shape: layers\.0\.blocks\.0\.attn\.relative_position_bias_table \[529, 1\] for \[169, 1\].* and 2 more'),
    (lambda state: {name: x for name, x in state.items() if 'table' not in name}
     | {'layers.0.blocks.0.attn.logit_scale': torch.ones(1, 1, 1)},
     r'missing: layers\.0\.blocks\.0\.attn\.relative.*not of a plain Swin: layers\.0\.blocks\.0\.attn\.logit_scale'),
    (lambda state: vit.build('vit_nano_patch8_48').state_dict(), 'missing: .*not of a plain Swin: blocks.0.attn'),
    (lambda state: state | {'norm.bias': torch.full((64,), torch.nan)}, 'NaN or infinite values in norm.bias'),
    (lambda state: state | {'absolute_pos_embed': torch.ones(1, 784, 16)}, 'not of a plain Swin: absolute_pos_embed'),
], ids=['window', 'v2', 'vit', 'nan', 'positions'])
def test_what_a_swin_cannot_represent_is_refused_by_name(change, said, tmp_path):
    model = timms()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        loaded(model, change(golden_state('timm')), tmp_path / 'a.pth')
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_vit_refuses_a_swin(tmp_path):
    with pytest.raises(InputError, match='not of a plain ViT: layers.0.blocks'):
        loaded(vit.build('vit_nano_patch8_48'), golden_state('timm'), tmp_path / 'a.pth')


# ---- VPT, CDC, DA and AR on it ---------------------------------------------------------------------------


def test_vpt_is_that_of_its_authors_but_for_the_prompts_in_their_mean():
    """They let the last layer's prompts ask as well, and average N + 49 tokens. Keys and values are enough for the
    49, which are the same."""
    shapes = list(GOLDEN['vpt']['shapes'].items())
    P = [chirp(shape, i) for i, (name, shape) in enumerate(shapes) if 'prompt' in name]  # the first layer's, then stages
    model = IVPTSwin(microsofts(), 2, N=5, **METHODS['vpt']).double()
    model.vit.load_state_dict({name: x for name, x in vit.to_timm(golden_state('vpt'), 1).items()})
    model.P.load_state_dict({str(i): x for i, x in enumerate([torch.cat(P[:2]), *P[2:]])})
    pixels, tokens = chirp((1, 3, 224, 224), 0, 1.0), []
    model.vit.norm.register_forward_hook(lambda norm, inputs, outputs: tokens.append(outputs))
    with torch.no_grad():
        model(pixels)
        whole = literal(model.vit, pixels, 7, list(itertools.chain(*model.P)))
    close(tokens[0], whole.tokens)
    close(torch.cat([whole.prompts, whole.tokens], dim=1).mean(dim=1), torch.tensor(GOLDEN['vpt']['features'], dtype=torch.float64))


@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize('method', ON_SWIN)
@given(cases(B=(1, 2), k=(1, 20)), sizes)
def test_the_model_is_the_literal_form_in_logits_and_gradients(method, case, size):
    """Eq. 2 to 6, 14 and 15 with prompts in the sequence of every window and their outputs dropped; k_l = min(k, M_l)."""
    model, cotangent = tuned(case, size, method), case.normal('cotangent', case.B, case.C)
    logits, expected = model(images(case, size)), literal_ivpt(model, images(case, size), size[0]).logits
    close(logits, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in model.vit.parameters())
    close(oracle.gradients(logits, trained, cotangent), oracle.gradients(expected, trained, cotangent))


@settings(max_examples=settings().max_examples // 2)
@given(cases(B=(1, 2), k=(1, 20)), sizes)
def test_what_is_seen_is_what_the_literal_form_computes_stage_by_stage(case, size):
    """Eq. 14. Maps have another size in each stage."""
    model = tuned(case, size)
    seen, expected = paper.look(model, images(case, size)), literal_ivpt(model, images(case, size), size[0])
    close(seen['logits'], expected.logits.detach())
    for name, dim in ('w', 1), ('Omega', 1), ('P_hat', 0):
        assert [x.shape[dim] for x in seen[name]] == [n - (name == 'Omega' and i + 1 == len(size[1]))
                                                      for i, n in enumerate(size[1])]
        of_layers = [layer for stage in seen[name] for layer in stage.unbind(dim)]
        for ours, theirs in zip(of_layers, getattr(expected, name), strict=True):
            close(ours, torch.as_tensor(theirs).detach())


@pytest.mark.parametrize('method', ON_SWIN)
def test_only_with_top_k_are_there_chosen_tokens_to_be_seen(method):
    """Eq. 14, on a Swin as on a ViT."""
    case = Case(B=1, L=2, N=2, M=4, N_h=1, d=2, k=2, C=2, seed=0)
    for model, pixels in ((tuned(case, SIZES[0], method), images(case, SIZES[0])),
                          (random_model(case, **ON_SWIN[method]), case.images())):
        assert (paper.look(model, pixels)['Omega'] is not None) == (ON_SWIN[method]['reinforcement'] == 'topk')


@settings(max_examples=settings().max_examples // 2)
@given(cases(), sizes)
def test_a_swin_without_prompts_can_be_looked_at_too(case, size):
    """All that the queries of a window spend is received in it: 1 a query, so that the mean over tokens is 1/w²."""
    seen = paper.look(randomised(small(case, size), case), images(case, size))
    assert seen['Omega'] is seen['P_hat'] is None
    for w in seen['w']:
        close(w.mean(dim=2), torch.full(w.shape[:2], 1 / size[0] ** 2, dtype=torch.float64))


@given(cases(N_h=1))
def test_attention_received_is_to_the_mean_of_tokens_what_the_class_tokens_row_is_to_the_class_token(case):
    """Eq. 14 without a class token: mean_i Σ_j A_ij v_j = Σ_j w̃_j v_j, here for one head and one window."""
    attn = randomised(vit.WindowAttention(case.D, 1, 3, 3, 0), case)
    attn.proj = torch.nn.Identity()
    attn.proj.in_features = case.D
    tokens = case.normal('tokens', case.B, 9, case.D)
    attended, w = attn(tokens)
    v = attn.split(attn.qkv(tokens))[2].squeeze(1)  # [B, M, D]
    close(attended.mean(dim=1), (w.unsqueeze(1) @ v).squeeze(1))
    assert attended.requires_grad and not w.requires_grad  # Eq. 14 makes positions of it, which have no slope


def regions(H, w, s):
    """Which tokens see each other in windows that are shifted by s: masks [M]."""
    at = torch.tensor([(i // H + w - s) // w * H + (i % H + w - s) // w for i in range(H * H)])
    return [at == region for region in at.unique()]


shifted = st.sampled_from([(4, 2, 1), (8, 4, 2), (6, 3, 1)])  # H, w, s


@given(cases(), shifted)
def test_regions_of_a_shifted_window_receive_in_proportion_to_their_tokens(case, shape):
    """Eq. 14. Masking alone favours no token: what a region of n tokens spends, it receives, n/w² in all."""
    attn = randomised(vit.WindowAttention(case.D, case.N_h, *shape), case)
    _, received = attn(case.normal('tokens', case.B, shape[0] ** 2, case.D))
    for inside in regions(*shape):
        close(received[:, inside].sum(dim=1), inside.sum().double().expand(case.B) / shape[1] ** 2)


@given(cases(), shifted)
def test_prompts_take_more_from_small_regions(case, shape):
    """Eq. 14, prompts in the softmax: where all keys weigh the same, n tokens share their attention with N prompts, and
    each receives n / (n + N) of 1/w². AR chooses the edges of the image less often after a shifted layer."""
    attn = randomised(vit.WindowAttention(case.D, case.N_h, *shape), case)
    for p in attn.parameters():
        p.data.zero_()
    _, received = attn(case.normal('tokens', case.B, shape[0] ** 2, case.D), case.normal('P', case.N, case.D))
    for inside in regions(*shape):
        n = inside.sum().item()
        assert torch.allclose(received[:, inside] * shape[1] ** 2, torch.tensor(n / (n + case.N)).double(), atol=1e-6)


@given(cases(), sizes)
def test_cdc_starts_anew_in_each_stage(case, size):
    """Eq. 4 and 5: a stage's first layer has P̂ = P, the others are connected as in a ViT of that stage alone."""
    model = tuned(case, size)
    for P_hat, P, gamma in zip(model.prompts(), model.P, model.gamma):
        assert torch.equal(P_hat[0], P[0])
        close(P_hat, cdc_da(P, gamma))


@settings(max_examples=settings().max_examples // 5)
@given(cases(), sizes)
def test_ivpt_starts_as_cdc(case, size):
    """γ is the identity and P_re is 0."""
    logits = []
    for method in 'cdc', 'ivpt':
        torch.manual_seed(case.seed)
        model = IVPTSwin(small(case, size), case.C, case.N, case.k, **METHODS[method]).double()
        logits.append(model(images(case, size)))
    close(*logits)


@settings(max_examples=settings().max_examples // 5)
@given(cases(B=3), sizes)
def test_an_image_alone_has_the_logits_that_it_has_in_a_batch(case, size):
    model, pixels = tuned(case, size), images(case, size)
    close(model(pixels), torch.cat([model(image.unsqueeze(0)) for image in pixels]))


@pytest.mark.parametrize('method, softmaxes', [('vpt', 0), ('cdc_da', 0), ('ivpt', 3), ('ivpt_all', 3)])
def test_nobody_computes_attention_weights_that_nobody_reads(method, softmaxes, monkeypatch):
    """The fused kernel never shows its matrix: it is made a second time for AR alone, and not in the last layer."""
    made, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, 'softmax', lambda *args: made.append(args) or softmax(*args))
    case, size = Case(B=1, L=0, N=2, M=4, N_h=1, d=2, k=2, C=2, seed=0), SIZES[0]
    model = tuned(case, size, method)
    model(images(case, size))
    assert len(made) == softmaxes
    model.vit(images(case, size))
    assert len(made) == softmaxes


def on_swin_b(N=10, k=10, **how):
    with torch.device('meta'):
        return IVPTSwin(vit.build('swin_base_patch4_window7_224'), 100, N, k, **(METHODS['ivpt'] | how))


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize('N, k', [(1, 1), (10, 10), (50, 49)])
def test_the_parameters_on_swin_b_are_counted(N, k):
    """N (2·128 + 2·256 + 18·512 + 2·1024) for prompts, the same less one layer of 1024 for AR, and N² for each of the
    20 layers that are connected to one before."""
    model = on_swin_b(N, k)
    assert (count(model.P), count(model.P_re), count(model.gamma)) == (12_032 * N, 11_008 * k, 20 * N ** 2)


def test_k_is_at_most_the_tokens_of_a_stage():
    """Table 16's k of 50 and 100 cannot be had in the last stage, which has 49 tokens."""
    assert [tuple(P.shape) for P in on_swin_b(k=100).P_re] == [(2, 100, 128), (2, 100, 256), (18, 100, 512), (1, 49, 1024)]
    assert [P.shape[1] for P in on_swin_b(reinforcement='all').P_re] == [3136, 784, 196, 49]
    with pytest.raises(InputError, match='0 to M=3136 of the image tokens, not k=3137'):
        on_swin_b(k=3137)


def test_prompts_start_within_vpts_bound_in_every_stage():
    """sqrt(6 / (3 · 4² + 128)), whatever the stage's width."""
    model, bound = IVPTSwin(vit.Swin(112, 4, 7, 128, (1, 2, 1), 4), 3, N=50), (6 / (3 * 4 ** 2 + 128)) ** 0.5
    for P in model.P:
        assert 0.98 * bound < P.abs().max() <= bound and abs(P.std() / (bound / 3 ** 0.5) - 1) < 0.05
    assert model.head.in_features == 512


@pytest.mark.parametrize('method', ['vpt_shallow', 'provp', 'express'])
def test_structures_that_inherit_prompts_are_refused_by_name(method):
    with pytest.raises(InputError, match=f"'{method}' inherits prompts.* take vpt, vanilla_cdc, cdc$"):
        IVPTSwin(timms(0), 3, **OTHERS[method])


def test_bfloat16_autocast_and_a_training_step():
    """Bias and mask follow the number format of queries and keys; every tuned parameter gets a gradient."""
    case = Case(B=2, L=0, N=2, M=4, N_h=2, d=2, k=2, C=3, seed=0)
    model = tuned(case, SIZES[0]).float()
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(images(case, SIZES[0]).float())
    logits.float().square().sum().backward()
    close(logits.float().isfinite().all(), torch.tensor(True))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- On pictures of shapes -------------------------------------------------------------------------------

SMALL = 'swin_nano_patch4_window3_48'


def losses(model, lr, ask, n, steps=40, batch=16):
    """Train what requires a gradient on n pictures, over and over; the mean loss of the first and of the last ten
    steps."""
    pixels, cells = (torch.from_numpy(x) for x in shapes.draw_shapes(n, ask))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    history = []
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % n
        loss = F.cross_entropy(model(pixels[rows].float() / 127.5 - 1), cells[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return sum(history[:10]) / 10, sum(history[-10:]) / 10


@pytest.fixture(scope='module')
def pretrained():
    """A small Swin that has been trained from scratch for a moment."""
    torch.manual_seed(0)
    model = vit.build(SMALL, num_classes=9)
    first, last = losses(model, 3e-3, 'where_blue', n=640)
    assert last < first
    return {name: x for name, x in model.state_dict().items() if not name.startswith('head.')}


@pytest.mark.parametrize('method', ['vpt', 'ivpt'])
def test_prompts_on_a_small_swin_learn_some_pictures_of_shapes_while_it_stays_as_it_is(method, pretrained):
    backbone = vit.build(SMALL)
    backbone.load_state_dict(pretrained)
    torch.manual_seed(1)
    first, last = losses(IVPTSwin(backbone, 9, N=10, k=4, **METHODS[method]), 0.03, 'where_red', n=32)
    assert last < 0.9 * first
    assert all(torch.equal(x, pretrained[name]) for name, x in backbone.state_dict().items())


# ---- By the command line ---------------------------------------------------------------------------------


def test_a_run_on_a_swin_is_shown_with_a_map_for_each_layer_of_each_stage(tmp_path):
    argv = '--model', SMALL, '--method', 'vpt,ivpt'
    assert run(tmp_path, *argv, epochs=1, n_test=2) == 0
    assert train.main([*argv, '--show', '--set', f'runs={tmp_path}']) == 0
    L = sum(n for n, *_ in vit.build(SMALL).sizes)
    with Image.open(tmp_path / 'where_blue' / SMALL / 'attention.png') as drawn:
        assert drawn.width == 2 + (1 + L) * (paper.TILE + 2)


@pytest.mark.parametrize('method, said', [
    ('vpt_shallow', "'vpt_shallow' inherits prompts"), ('provp', "'provp' inherits prompts"),
    ('express', "'express' inherits prompts"),
    ('lora', 'tests/table_1.py:lora.*plain ViT.*Swin'), ('gapt', 'tests/table_1.py:gapt.*plain ViT.*Swin')])
def test_what_cannot_be_on_a_swin_is_refused_in_one_line_by_the_command_line(method, said, tmp_path, capfd):
    assert run(tmp_path, '--model', SMALL, '--method', method) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and re.search(said, err) and not list(tmp_path.rglob('result.json'))
