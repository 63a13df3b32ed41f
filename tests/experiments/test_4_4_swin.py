"""Table 5's Swin-B: the backbone is timm's and its authors', and prompts, CDC, DA and AR on it are the literal form's.

`swin.json` was written by timm 1.0.31, VPT's code (github.com/KMnP/vpt, 4410440) and torch 2.14 with the program below.
`chirp`, with 0.5 as its scale, fills parameters: Swin hardly notices a mistake with the smoother `wave` of
strategies.py:

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
from common import chirp, equal, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import close
from PIL import Image
from pictures import CONFIGS, run
from strategies import METHODS, OTHERS, Case, cases, randomised

import ivpt
import look
import swin
import train
import vit
from ivpt import Prompts
from vit import InputError

GOLDEN = json.loads((Path(__file__).parent / 'swin.json').read_text())
METHODS = METHODS | OTHERS
BUFFERS = 'relative_position_index', 'attn_mask'
NANO = 'swin_nano_patch4_window3_48'
DOOR = {'build': 'tests/experiments/swin.py:swin'}
SIZES = [  # of the small models below: patches of 2 pixels, w, L, and the side of the image
    (2, (2, 2), 8), (2, (3, 1), 8), (4, (2,), 16), (3, (2,), 6), (2, (1, 2), 16), (1, (2, 1), 4)]
SMALL = Case(B=2, L=0, N=2, M=4, N_h=2, d=2, k=2, C=3, seed=0)
sizes = st.sampled_from(SIZES)
windows = st.sampled_from([(4, 2, 1), (8, 4, 2), (6, 3, 1), (4, 2, 0), (3, 3, 0)])  # H, w, s
few = settings(max_examples=settings().max_examples // 5)


def golden_state(which, prompts=False):
    """A state dict as it was saved, with its buffers; of VPT's model without its prompts, or these alone."""
    saved = enumerate(GOLDEN[which]['shapes'].items())
    return {name: chirp(shape, i, 0.5) for i, (name, shape) in saved if ('prompt' in name) == prompts}


def timms(num_classes=3):
    return swin.Swin(112, 4, 7, (16, (2, 2, 2), 1), num_classes).double().eval()


def microsofts(num_classes=0):
    return swin.Swin(224, 4, 7, (8, (2, 2, 2, 2), 1), num_classes).double().eval()


def built(model, num_classes=0, **changes):
    """What train.py builds, without memory for it."""
    changes |= {'weights': 'random'}
    with torch.device('meta'):
        return train.make_backbone(train.settings_of(CONFIGS, 'cifar100', model, changes=changes), num_classes)


def small(case, size, num_classes=0):
    w, L, pixels = size
    return swin.Swin(pixels, 2, w, (2 * case.N_h, L, case.N_h), num_classes).double()


def images(case, size):
    return case.normal('images', case.B, 3, size[2], size[2])


def tuned(case, size, method='ivpt'):
    """An IVPT on a small Swin with nothing at its initial value. k may be more than a later stage has tokens."""
    backbone = small(case, size)
    prompts = Prompts(case.N, min(case.k, backbone.M), **METHODS[method])
    return randomised(backbone.IVPT(backbone, case.C, prompts), case)


# ---- The literal form ------------------------------------------------------------------------------------

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
    y, P = layer.norm1(x), P.expand(B, -1, -1)
    out, received, prompts = torch.zeros_like(x), torch.zeros(B, M, dtype=x.dtype), []
    for top, left in itertools.product(range(0, H, w), repeat=2):
        rolled = list(itertools.product(range(top, top + w), range(left, left + w)))
        at = [(row + s) % H * H + (column + s) % H for row, column in rolled]
        z, A = attention(layer.attn, torch.cat([layer.norm1(P), y[:, at]], dim=1),
                         window_bias(layer.attn, rolled, H, w, s, N))
        out[:, at], received[:, at] = z[:, N:], A[:, :, N:, N:].detach().mean(dim=(1, 2))
        prompts.append(z[:, :N])
    x, P = x + out, P + sum(prompts) / len(prompts)
    return (*(z + oracle.mlp(layer.mlp, layer.norm2(z)) for z in (x, P)), received)


def literal_ivpt(model, images):
    """Eq. 2 to 6, 14 and 15, layer by layer: logits, and of each layer P̂, the received weights and Ω."""
    gamma = model.gamma or [None] * len(model.P)
    P_hat = [P for of_stage in zip(model.P, gamma) for P in oracle.prompts(model.structure, *of_stage)]
    P_re, w, Omega = [P for of_stage in model.P_re or () for P in of_stage], [], []
    x = model.vit.patch_embed(images)
    for stage in model.vit.layers:
        x = stage.downsample(x)
        for layer in stage.blocks:
            l = len(w)
            x, weights = layer(x, P_hat[l])
            w.append(weights)
            if l < len(P_re):
                everywhere = [list(range(x.shape[1]))] * len(x)
                Omega.append(everywhere if model.reinforcement == 'all' else oracle.top_k(weights, len(P_re[l])))
                x = oracle.reinforce(x, Omega[l], P_re[l])
    logits = model.vit.norm(x).mean(dim=1) @ model.head.weight.T + model.head.bias
    return SimpleNamespace(logits=logits, P_hat=P_hat, w=w, Omega=Omega)


# ---- The backbone ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_names_and_shapes_in_their_order_and_logits_are_those_of_timm(dtype, tolerance):
    model = timms().to(dtype)
    assert [(name, [*x.shape]) for name, x in model.state_dict().items()] == [*GOLDEN['timm']['shapes'].items()]
    model.load_state_dict(golden_state('timm'), strict=True)
    with torch.no_grad():
        logits = model(chirp((2, 3, 112, 112), 0, 1.0).to(dtype))
    equal(logits, GOLDEN['timm']['logits'], tolerance)


@pytest.fixture(scope='module')
def swin_b():
    """The Swin-B of configs.yaml, with a head for 1000 classes."""
    return built('swin_base_patch4_window7_224.ms_in22k', 1000)


@pytest.mark.parametrize('size, count', GOLDEN['parameters'].items())
def test_sizes_are_those_of_timm_and_swin_b_has_the_88M_of_table_18_with_the_head_for_1000_classes(size, count, swin_b):
    model = swin_b if size == 'base' else built(f'swin_{size}_patch4_window7_224', **DOOR)
    if size == 'base':
        assert model.sizes == [(2, 3136, 128), (2, 784, 256), (18, 196, 512), (2, 49, 1024)]
        count += 1000 * (1024 + 1)
        assert count == 87_768_224
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.M == 56 ** 2 and {layer.attn.proj.in_features // layer.attn.N_h for layer in model.blocks} == {32}


@few
@given(cases(N=(0, 3)), windows)
def test_a_layer_is_its_literal_form_with_prompts_in_the_sequence_of_every_window(case, shape):
    """Eq. 1 to 3, forwards and backwards, and the attention that tokens receive: bias and mask token by token. What
    comes out at the prompts' places is dropped. With one window, 3 x 3 of 3 x 3, and no bias it is a layer of a ViT."""
    H, w, s = shape
    layer = randomised(vit.Layer(case.D, swin.WindowAttention(case.D, case.N_h, H, w, s), eps=1e-5), case)
    x, P = case.normal('x', case.B, H * H, case.D).requires_grad_(), case.normal('P', case.N, case.D).requires_grad_()
    expected, _, received = literal_layer(layer, x, P, w, s)
    tokens, weights = layer(x, P)
    close(weights, received)
    oracle.compare_gradients(tokens, expected, [x, P, *layer.parameters()], case.normal('cotangent', *x.shape))


@pytest.mark.parametrize('pixels', [0, 111, 56, 225])
def test_images_that_do_not_divide_into_windows_and_those_of_another_size_are_refused(pixels):
    with pytest.raises(InputError, match=f'windows of 7 x 7, merged 2 times, need .* of 112 pixels, not {pixels}'):
        swin.Swin(pixels, 4, 7, (16, (2, 2, 2), 1))
    with pytest.raises(InputError, match=rf'images of shape \(1, 3, {pixels}, 9\) came to a model for .*112, 112\]'):
        timms()(torch.zeros(1, 3, pixels, 9))


@pytest.mark.parametrize('name, parts', [
    ('swin_base_patch4_window7_224', ('base', 4, 7)), ('swin_tiny_patch4_window7_224.ms_in1k', ('tiny', 4, 7)),
    ('swin_large_patch4_window12_384.ms_in22k', ('large', 4, 12)), ('swin_base_patch4_224', None),
    ('swin_huge_patch4_window7_224', None), ('swin.py:swin', None), ('vit_base_patch16_window7_224', None),
    ('swinv2_base_patch4_window7_224', None), ('swin_base_patch4_window_224', None)])
def test_names_of_swins_are_those_of_timm_and_others_are_refused(name, parts):
    if parts:
        assert swin.parse_name(name) == parts
    else:
        with pytest.raises(InputError, match='unknown model .* write swin_SIZE_patch4_window7_PIXELS, SIZE one of na'):
            swin.parse_name(name)


# ---- Checkpoints -----------------------------------------------------------------------------------------

def vit_nano():
    return vit.build('vit_nano_patch8_48')


def loaded(model, state, path):
    torch.save(state, path)
    vit.load_weights(model, path)
    return model


@pytest.mark.parametrize('num_classes, said', [(3, 'its head is taken: head.fc.weight [3, 64]'), (0, '')])
def test_timms_file_is_loaded_with_its_head_or_without(num_classes, said, tmp_path, caplog):
    state = golden_state('timm')
    model = loaded(timms(num_classes), state, tmp_path / 'a.pth').float()
    assert all(torch.equal(x, state[name].float()) for name, x in model.state_dict().items())
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_the_authors_file_is_loaded_by_its_own_names(tmp_path):
    """{'model': ...}, merging at the end of a stage, a head that is not called fc, and buffers."""
    theirs = golden_state('vpt') | {'head.weight': chirp((2, 64), 1), 'head.bias': chirp((2,), 2)}
    assert sum(name.endswith(BUFFERS) for name in theirs) == 8 + 3
    ours = loaded(microsofts(2), {'model': theirs}, tmp_path / 'a.pth').float().state_dict()
    for our_name, name in ('head.fc.weight', 'head.weight'), ('layers.2.downsample.norm.bias',
                                                              'layers.1.downsample.norm.bias'):
        assert torch.equal(ours[our_name], theirs[name].float())


@pytest.mark.parametrize('make, change, said', [
    (timms, lambda state: {name: F.pad(x, (0, 0, 0, 529 - 169)) if 'table' in name else x for name, x in state.items()},
     r'of another shape: layers\.0\.blocks\.0\.attn\.relative_position_bias_table \[529, 1\] for \[169, 1\].* 2 more'),
    (timms, lambda state: {name.replace('relative_position_bias_table', 'logit_scale'): x for name, x in state.items()},
     r'missing: layers\.0\.blocks\.0\.attn\.relative.*not of a plain Swin: layers\.0\.blocks\.0\.attn\.logit_scale'),
    (timms, lambda state: vit_nano().state_dict(), 'missing: .*not of a plain Swin: blocks.0.attn'),
    (timms, lambda state: state | {'norm.bias': torch.full((64,), torch.nan)}, 'NaN or infinite values in norm.bias'),
    (timms, lambda state: state | {'absolute_pos_embed': torch.ones(1, 784, 16)}, 'of a plain Swin: absolute_pos'),
    (vit_nano, lambda state: state, 'not of a plain ViT: layers.0.blocks'),
], ids=['window', 'v2', 'vit', 'nan', 'positions', 'a vit'])
def test_what_a_swin_cannot_represent_is_refused_by_name_and_so_is_a_swin_by_a_vit(make, change, said, tmp_path):
    model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        loaded(model, change(golden_state('timm')), tmp_path / 'a.pth')
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---- VPT, CDC, DA and AR on it ---------------------------------------------------------------------------

def test_vpt_is_that_of_its_authors_but_for_the_prompts_in_their_mean():
    """They let the last layer's prompts ask as well, and average N + 49 tokens. Keys and values are enough for the
    49, which are the same."""
    P = [*golden_state('vpt', prompts=True).values()]  # the first layer's, then stages
    backbone = microsofts()
    model = backbone.IVPT(backbone, 2, Prompts(5, **METHODS['vpt'])).double()
    model.vit.load_state_dict(backbone.from_checkpoint(golden_state('vpt')))
    model.P.load_state_dict({str(i): x for i, x in enumerate([torch.cat(P[:2]), *P[2:]])})
    last, entered = model.vit.blocks[-1], []
    last.register_forward_pre_hook(lambda layer, inputs: entered.append(inputs))
    with torch.no_grad():
        model(chirp((1, 3, 224, 224), 0, 1.0))
        tokens, prompts, _ = literal_layer(last, *entered[0], w=7, s=0)
        close(last(*entered[0])[0], tokens)
        equal(model.vit.norm(torch.cat([prompts, tokens], dim=1)).mean(dim=1), GOLDEN['vpt']['features'], 1e-10)


@few
@pytest.mark.parametrize('method', METHODS)
@given(cases(B=(1, 2), k=(1, 20)), sizes)
def test_the_model_is_the_literal_form_in_logits_and_gradients(method, case, size):
    """Eq. 2 to 6, 14 and 15; k_l = min(k, M_l). CDC starts anew in each stage. So does what is seen: maps have another
    size in each."""
    model, cotangent = tuned(case, size, method), case.normal('cotangent', case.B, case.C)
    expected = literal_ivpt(model, images(case, size))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in model.vit.parameters())
    oracle.compare_gradients(model(images(case, size)), expected.logits, trained, cotangent)
    seen = ivpt.look(model, images(case, size))
    close(seen['logits'], expected.logits.detach())
    chosen = METHODS[method]['reinforcement'] == 'topk'
    assert (seen['Omega'] is not None) == chosen
    for name, dim in [('w', 1), ('P_hat', 0), *[('Omega', 1)] * chosen]:
        ours = [layer for stage in seen[name] for layer in stage.unbind(dim)]
        close(ours, [torch.as_tensor(x).detach() for x in getattr(expected, name)])


@few
@given(cases(), sizes)
def test_a_swin_without_prompts_can_be_looked_at_too(case, size):
    """All that the queries of a window spend is received in it: 1 a query, so that the mean over tokens is 1/w²."""
    seen = ivpt.look(randomised(small(case, size), case), images(case, size))
    assert seen['Omega'] is seen['P_hat'] is None
    for w in seen['w']:
        close(w.mean(dim=2), torch.full(w.shape[:2], 1 / size[0] ** 2, dtype=torch.float64))


@given(cases(N_h=1))
def test_attention_received_is_to_the_mean_of_tokens_what_the_class_tokens_row_is_to_the_class_token(case):
    """Eq. 14 without a class token: mean_i Σ_j A_ij v_j = Σ_j w̃_j v_j, here for one head and one window."""
    attn = randomised(swin.WindowAttention(case.D, 1, 3, 3, 0), case)
    attn.proj = torch.nn.Identity()
    attn.proj.in_features = case.D
    tokens = case.normal('tokens', case.B, 9, case.D)
    attended, w = attn(tokens)
    v = attn.split(attn.qkv(tokens))[2].squeeze(1)  # [B, M, D]
    close(attended.mean(dim=1), (w.unsqueeze(1) @ v).squeeze(1))
    assert attended.requires_grad and not w.requires_grad  # Eq. 14 makes positions of it, which have no slope


@given(cases(), windows.filter(lambda shape: shape[2]))
def test_prompts_take_more_from_small_regions_of_a_shifted_window(case, shape):
    """Eq. 14. Masking alone favours no token: what a region of n tokens spends, it receives, n/w² in all. With prompts
    in the softmax, where all keys weigh the same, n tokens share their attention with N prompts, and each receives
    n / (n + N) of 1/w². AR chooses the edges of the image less often after a shifted layer."""
    H, w, s = shape
    attn = randomised(swin.WindowAttention(case.D, case.N_h, H, w, s), case)
    tokens, P = case.normal('tokens', case.B, H * H, case.D), case.normal('P', case.N, case.D)
    _, alone = attn(tokens)
    for p in attn.parameters():
        p.data.zero_()
    _, received = attn(tokens, P)
    region = torch.tensor([(i // H + w - s) // w * H + (i % H + w - s) // w for i in range(H * H)])
    for inside in (region == r for r in region.unique()):
        n = inside.sum().item()
        close(alone[:, inside].sum(dim=1), torch.full((case.B,), n / w ** 2, dtype=torch.float64))
        assert torch.allclose(received[:, inside] * w ** 2, torch.tensor(n / (n + case.N)).double(), atol=1e-6)


@pytest.mark.parametrize('method, softmaxes', [('vpt', 0), ('cdc_da', 0), ('ivpt', 3), ('ivpt_all', 3)])
def test_attention_weights_that_are_not_read_are_not_computed(method, softmaxes, monkeypatch):
    """The fused kernel never shows its matrix: it is made a second time for AR alone, and not in the last layer."""
    made, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, 'softmax', lambda *args: made.append(args) or softmax(*args))
    model = tuned(SMALL, SIZES[0], method)
    model(images(SMALL, SIZES[0]))
    model.vit(images(SMALL, SIZES[0]))
    assert len(made) == softmaxes


def on_swin_b(swin_b, N=10, k=10, **how):
    """iVPT on it."""
    with torch.device('meta'):
        return swin_b.IVPT(swin_b, 100, Prompts(N, k, **(METHODS['ivpt'] | how)))


def test_prompts_on_swin_b_have_each_stages_width_and_at_most_its_tokens_and_start_anew_in_each(swin_b):
    """N (2·128 + 2·256 + 18·512 + 2·1024) numbers, for AR one layer of 1024 less, and N² for each of the 20 layers that
    are connected to one before. Table 16's k of 50 and 100 cannot be had in the last stage, which has 49 tokens."""
    model = on_swin_b(swin_b, N=50, k=100)
    assert [(*P.shape,) for P in model.P] == [(2, 50, 128), (2, 50, 256), (18, 50, 512), (2, 50, 1024)]
    assert [(*P.shape,) for P in model.P_re] == [(2, 100, 128), (2, 100, 256), (18, 100, 512), (1, 49, 1024)]
    assert [(*x.shape,) for x in model.gamma] == [(n, 50, 50) for n in (1, 1, 17, 1)]
    assert [P.shape[1] for P in on_swin_b(swin_b, reinforcement='all').P_re] == [3136, 784, 196, 49]
    with pytest.raises(InputError, match='0 to M=3136 of the image tokens, not k=3137'):
        on_swin_b(swin_b, k=3137)


def test_a_swin_starts_as_timms_prompts_within_vpts_bound_in_every_stage_and_ivpt_as_cdc():
    """Normal with standard deviation 0.02, the tables of biases too, and biases 0. sqrt(6 / (3 p² + 128)), whatever the
    stage's width; γ is the identity and P_re is 0."""
    backbone, bound = swin.Swin(56, 2, 7, (128, (1, 2, 1), 4)), (6 / (3 * 2 ** 2 + 128)) ** 0.5
    for name, x in backbone.state_dict().items():
        drawn = name.endswith(('table', 'qkv.weight', 'proj.weight', 'fc2.weight', 'reduction.weight'))
        assert 'embed' in name or not drawn or abs(x.std() / 0.02 - 1) < 0.1
        assert 'embed' in name or not name.endswith('bias') or not x.any()
    model = backbone.IVPT(backbone, 3, Prompts(50, 10, **METHODS['ivpt']))
    for P in model.P:
        assert 0.98 * bound < P.abs().max() <= bound and abs(P.std() / (bound / 3 ** 0.5) - 1) < 0.05
    assert all(torch.equal(x, torch.eye(50)) for gamma in model.gamma for x in gamma)
    assert not any(P_re.any() for P_re in model.P_re) and model.head.in_features == 512


def test_sgd_decays_all_parameters_of_a_swin_but_the_bias_of_its_head():
    model = swin.Swin(48, 4, 3, swin.SIZES['nano'], num_classes=2)
    free = [name for name, p in model.named_parameters() if not train.decays(name, p, train.Loop())]
    assert free == ['head.fc.bias']


def test_in_bfloat16_logits_are_finite_and_every_tuned_parameter_gets_a_gradient():
    """Bias and mask follow the number format of queries and keys."""
    model = tuned(SMALL, SIZES[0]).float()
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(images(SMALL, SIZES[0]).float())
    logits.float().square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_run_on_a_swin_is_shown_with_a_map_for_each_layer_of_each_stage(tmp_path):
    for program in train, look:
        assert run(tmp_path, '--model', NANO, '--method', 'vpt,ivpt', program=program, **DOOR, epochs=1, n_test=2) == 0
    path, = tmp_path.rglob('*.png')
    assert Image.open(path).width == 2 + (1 + 6) * (look.TILE + 2)


@pytest.mark.parametrize('method, changes, said', [
    *((name, DOOR, f'structures.py:{name}: .* plain ViT: a Swin') for name in ('vpt_shallow', 'provp', 'express')),
    ('lora', DOOR, 'table_1.py:lora.*plain ViT.*Swin'), ('gapt', DOOR, 'table_1.py:gapt.*plain ViT.*Swin'),
    ('ivpt', DOOR | {'img_size': 50}, 'swin.py:swin: patches of 4 pixels .* multiple of 48 pixels, not 50'),
    ('ivpt', {}, f'unknown model .{NANO}')])
def test_what_cannot_be_on_a_swin_is_refused_in_one_line_by_the_command_line(method, changes, said, tmp_path, capfd):
    assert run(tmp_path, '--model', NANO, '--method', method, **changes) == 2
    assert re.search(said, one_line(capfd)) and not list(tmp_path.rglob('result.json'))
