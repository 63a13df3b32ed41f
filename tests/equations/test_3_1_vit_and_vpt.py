"""3.1 Preliminary: the vision transformer (Eq. 1), VPT (Eq. 2), what is trained, and what is seen (Figure 7).

The model never puts prompts into the sequence. It lets tokens attend to them, because Eq. 2 throws away what a layer
puts out at their places. The tests here show that this is the same. The literal form is in oracle.py.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

import oracle
import vit
from ivpt import IVPT, Prompts, look
from oracle import close, gradients
from strategies import METHODS, OTHERS, Case, cases, plain_vit, random_layer, random_model, random_vit

SMALL = Case(B=2, L=4, N=2, M=4, N_h=2, d=3, k=3, C=5, seed=0)
METHODS = METHODS | OTHERS
every_method = pytest.mark.parametrize('method', METHODS)
every_readout = pytest.mark.parametrize('readout', ['cls', 'mean'])


def tokens_and_prompts(case):
    """Tokens [B, 1 + M, D] and prompts [N, D] that ask for a gradient."""
    return (case.normal('tokens', case.B, 1 + case.M, case.D).requires_grad_(),
            case.normal('prompts', case.N, case.D).requires_grad_())


# ---- Vision transformer, Eq. 1 --------------------------------------------------------------------------

@every_readout
@given(cases())
def test_a_vit_is_its_layers_one_after_the_other_and_classifies_what_it_reads(readout, case):
    """Eq. 1. [z_cls^0, Z^0] in R^{(1+M) x D}: M patches of the image, each projected by itself behind the class token,
    positions added. Then l = 0, ..., L-1, and LayerNorm of the class token, or of the image tokens' mean without it."""
    model, images = random_vit(case, num_classes=case.C), case.images()
    model.readout = readout
    logits, w = oracle.vit(model, images)
    close(model.embed(images), oracle.embed(model, images))
    close(model(images), logits)
    seen = look(model, images)
    close((seen['logits'], seen['w']), (logits.detach(), w.detach()))
    assert seen['Omega'] is seen['P_hat'] is None


# ---- Prompts are context, Eq. 2 -------------------------------------------------------------------------

@given(cases())
def test_prompts_as_context_are_prompts_in_the_sequence_with_their_outputs_dropped_forwards_and_backwards(case):
    """Eq. 2. [z_cls^{l+1}, ..., Z^{l+1}] = 𝒯^l([z_cls^l, P^l, Z^l]); gradients of tokens, prompts and parameters.
    Several contexts are one; a context [n, D] is that context [B, n, D], its keys and values computed once."""
    layer, (tokens, P) = random_layer(case), tokens_and_prompts(case)
    inputs, cotangent = [tokens, P, *layer.parameters()], case.normal('cotangent', *tokens.shape)
    for context in [P], [P.expand(case.B, -1, -1)], [P[:1], P[1:]]:
        literal = torch.cat(oracle.eq_3(layer, tokens[:, :1], P, tokens[:, 1:])[:2], dim=1)
        oracle.compare_gradients(layer(tokens, *context)[0], literal, inputs, cotangent)


@every_readout
@given(cases(L=(1, 2)))
def test_what_is_read_of_the_last_layer_is_what_the_literal_concatenation_gives_forwards_and_backwards(readout, case):
    """Eq. 2, l = L-1. Where z_cls alone is read, the image tokens are context; the other outputs are not needed."""
    model, (tokens, P) = random_vit(case), tokens_and_prompts(case)
    model.readout = readout
    literal = oracle.read(model, *oracle.eq_3(model.blocks[-1], tokens[:, :1], P, tokens[:, 1:])[:2])
    inputs, cotangent = [tokens, P, *model.blocks[-1].parameters()], case.normal('cotangent', case.B, case.D)
    last = model.last(tokens, P)
    oracle.compare_gradients(model.read(last), literal, inputs, cotangent)
    close(model.read(torch.cat([last, tokens], dim=1)), literal)  # whatever stands behind the image tokens


@given(cases())
def test_the_class_tokens_weights_are_its_row_of_the_attention_matrix_averaged_over_heads_without_gradient(case):
    """w̃ of Eq. 14, over all keys: tokens first, then prompts. Positions, which Eq. 14 makes of w̃, have no slope."""
    layer, (tokens, P) = random_layer(case), tokens_and_prompts(case)
    *_, row = oracle.eq_3(layer, tokens[:, :1], P, tokens[:, 1:])
    z_cls, prompts, Z = row.mean(dim=1).detach().split([1, case.N, case.M], dim=1)
    out, w = layer(tokens, P)
    close(w, torch.cat([z_cls, Z, prompts], dim=1))
    assert out.requires_grad and not w.requires_grad


# ---- The model ------------------------------------------------------------------------------------------

@every_readout
@every_method
@settings(max_examples=settings().max_examples // 2)
@given(case=cases())
def test_every_method_is_its_literal_form_in_logits_and_gradients_and_in_what_is_seen_of_each_layer(
        readout, method, case):
    """Eq. 2 or 3, 4 to 6, 14 and 15, l = 0, ..., L-1. The literal form chooses by Python's sort: no gradient passes it.

    Figure 7. w̃^l in R^M: the layer's own weights, prompts in its softmax, mean over the heads; with top-k, the tokens
    that were chosen; the prompts that entered. The head reads z_cls, or the mean: no loss has trained MAE's z_cls."""
    model, images = random_model(case, **METHODS[method]), case.images()
    model.vit.readout = readout
    oracle.compare(model, images, case.normal('cotangent', case.B, case.C))
    seen, expected = look(model, images), oracle.ivpt(model, images)
    for name in 'logits', 'w', 'to_prompts', 'P_hat':
        close(seen[name], getattr(expected, name).detach())
    reinforced = METHODS[method]['reinforcement'] == 'topk'
    assert seen['Omega'].tolist() == expected.Omega if reinforced else seen['Omega'] is None


@every_method
@pytest.mark.parametrize('readout, queries', [('cls', 1), ('mean', 1 + SMALL.M)])
def test_the_last_layer_has_queries_only_for_the_tokens_that_the_head_reads(readout, queries, method):
    model, asked = random_model(SMALL, **METHODS[method]), []
    model.vit.readout = readout
    model.vit.blocks[-1].mlp.register_forward_pre_hook(lambda mlp, args: asked.append(args[0].shape[1]))
    model(SMALL.images())
    assert asked == [queries]


def test_look_removes_its_hooks_even_if_the_model_fails():
    model = random_model(SMALL, **METHODS['ivpt'])
    look(model, SMALL.images())
    with pytest.raises(ValueError):
        look(model, SMALL.images()[:, :, 1:])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.vit.blocks)


# ---- Number formats -------------------------------------------------------------------------------------

@settings(max_examples=settings().max_examples // 5)
@given(cases())
def test_attention_in_bfloat16_on_a_cpu_is_attention_to_its_rounding_forwards_and_backwards(case):
    """It is written out there. bfloat16 has 8 bits: 0.4%, here of the largest number."""
    qkv = [case.normal(name, case.B, case.N_h, T, case.d) for name, T in (('q', case.M), ('k', 9), ('v', 9))]
    cotangent, results = case.normal('cotangent', case.B, case.N_h, case.M, case.d), []
    for dtype in torch.bfloat16, torch.float64:
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in qkv]
        attended = vit.attend(*inputs)
        results.append((attended, *gradients(attended, inputs, cotangent.bfloat16().to(dtype))))
    for rounded, exact in zip(*results):
        assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 0.04 * exact.abs().max() + 0.01


def test_the_fused_kernel_is_used_wherever_it_is_the_faster_one(monkeypatch):
    """In bfloat16 on a CPU it takes twice as long as what it fuses."""
    fused, called = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(vit.F, 'scaled_dot_product_attention', lambda *qkv: called.append(qkv[0].dtype) or fused(*qkv))
    for dtype in torch.float64, torch.float32, torch.bfloat16:
        vit.attend(*torch.ones(3, 1, 1, 2, 4, dtype=dtype))
    assert called == [torch.float64, torch.float32]


# ---- What is trained ------------------------------------------------------------------------------------

@every_method
def test_the_papers_parameters_are_trained_in_its_shapes_each_gets_a_gradient_and_the_backbone_none(method):
    """P^l in R^{N x D}, γ^l in R^{N x N} and P_re^l in R^{k x D} between layers, and the head. VPT optimises the
    prompts "whilst keeping the pre-trained model frozen"."""
    model, (L, N, D, C) = random_model(SMALL, **METHODS[method]), (SMALL.L, SMALL.N, SMALL.D, SMALL.C)
    expected = {'P': (L, N, D), 'head.weight': (C, D), 'head.bias': (C,)}
    if METHODS[method]['aggregation']:
        expected['gamma'] = (L - 1, N, N)
    if k := {'topk': SMALL.k, 'all': SMALL.M, 'none': 0}[METHODS[method]['reinforcement']]:
        expected['P_re'] = (L - 1, k, D)
    assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == expected
    assert {n for n in model.state_dict() if not n.startswith('vit.')} == set(expected)
    model(SMALL.images()).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.ne(0).all() if name in expected else p.grad is None, name


def test_train_keeps_the_backbone_in_eval_mode_and_the_logits_are_the_same_each_time():
    """Frozen means frozen: what is not trained does not behave as in training either. No equation has a dropout."""
    model, images = random_model(SMALL, **METHODS['ivpt']), SMALL.images()
    logits = model(images)
    for _ in 'as built', 'after a test':
        assert model.training and model.head.training
        assert not any(module.training for module in model.vit.modules())
        assert not any(module.training for module in model.eval().modules())
        assert torch.equal(model(images), logits)
        assert model.train() is model and torch.equal(model(images), logits)


def test_P_starts_uniform_with_the_bound_of_vpt():
    """|P| <= sqrt(6 / (3 p² + D)), and a uniform distribution's deviation is its bound over sqrt(3)."""
    torch.manual_seed(0)
    P = IVPT(vit.ViT(8, 4, (12, 2, 2)), 3, Prompts(N=2000)).P
    bound = (6 / (3 * 4 ** 2 + 12)) ** 0.5
    assert P.min() < -0.99 * bound and 0.99 * bound < P.max() and P.abs().max() <= bound
    assert abs(P.mean()) < 0.01 * bound and abs(P.std() - bound / 3 ** 0.5) < 0.01 * bound


@pytest.mark.parametrize('wrong, message', [
    (dict(N=0), 'N=0'), (dict(N=-2), 'N=-2'), (dict(num_classes=0), '0 classes'),
    (dict(k=-1), 'M=4 .*k=-1'), (dict(k=5), 'M=4 .*k=5'),
    (dict(structure='deep'), "'deep'.*vpt, vanilla_cdc, cdc"),
    (dict(reinforcement='bottom'), "'bottom'.*topk, all, none"),
    (dict(structure='vpt', aggregation=True), "'cdc'.*'vpt'"),
    (dict(patch_size=5), '4 pixels .*5'), (dict(patch_size=0), '4 pixels .*0'), (dict(patch_size=8), '4 pixels .*8'),
    (dict(img_size=0), '0 pixels .*2'), (dict(img_size=5), '5 pixels .*2'), (dict(readout='max'), 'mean, not max'),
])
def test_what_does_not_fit_raises_a_ValueError_with_the_numbers_in_it(wrong, message):
    how = SimpleNamespace(**dict(img_size=4, patch_size=2, readout='cls', num_classes=3, N=2, k=2, structure='cdc',
                                 aggregation=False, reinforcement='topk') | wrong)
    with pytest.raises(ValueError, match=message):
        backbone = vit.ViT(how.img_size, how.patch_size, (6, 3, 2), readout=how.readout)
        prompts = Prompts(how.N, how.k, how.structure, how.aggregation, how.reinforcement)
        IVPT(backbone, how.num_classes, prompts)


@pytest.mark.parametrize('shape', [(2, 3, 4, 6), (2, 3, 6, 6), (2, 1, 4, 4), (3, 4, 4)])
def test_images_of_another_size_raise_a_ValueError_with_both_sizes_in_it(shape):
    with pytest.raises(ValueError, match=r'{}.*\[B, 3, 4, 4\]'.format(str(shape).strip('()'))):
        plain_vit(SMALL)(torch.zeros(shape).double())
