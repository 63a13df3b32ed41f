"""3.1 Preliminary: the vision transformer (Eq. 1), VPT (Eq. 2), and what is trained.

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

SMALL = Case(B=2, L=3, N=2, M=4, N_h=2, d=3, k=2, C=3, seed=0)
every_method = pytest.mark.parametrize('method', METHODS)
every_readout = pytest.mark.parametrize('readout', ['cls', 'mean'])
fewer = settings(max_examples=settings().max_examples // 5)


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
    model = random_vit(case, num_classes=case.C)
    model.readout = readout
    close(model.embed(case.images()), oracle.embed(model, case.images()))
    close(model(case.images()), oracle.vit(model, case.images()))


@given(cases())
def test_a_layer_does_not_know_positions(case):
    """𝒯([z_cls, Z]) with Z in another order is the same z_cls, and the new Z in that order."""
    layer, (tokens, P) = random_layer(case), tokens_and_prompts(case)
    order = torch.cat([torch.tensor([0]), 1 + case.order('order', case.M)])
    close(layer(tokens[:, order], P)[0], layer(tokens, P)[0][:, order])


# ---- Prompts are context, Eq. 2 -------------------------------------------------------------------------


@given(cases())
def test_prompts_as_context_are_prompts_in_the_sequence_with_their_outputs_dropped_forwards_and_backwards(case):
    """Eq. 2. [z_cls^{l+1}, ..., Z^{l+1}] = 𝒯^l([z_cls^l, P^l, Z^l]); gradients of tokens, prompts and parameters."""
    layer, (tokens, P) = random_layer(case), tokens_and_prompts(case)
    literal = torch.cat(oracle.eq_3(layer, tokens[:, :1], P, tokens[:, 1:])[:2], dim=1)
    inputs, cotangent = [tokens, P, *layer.parameters()], case.normal('cotangent', *tokens.shape)
    oracle.compare_gradients(layer(tokens, P)[0], literal, inputs, cotangent)


@given(cases())
def test_the_order_of_prompts_and_where_they_stand_in_the_sequence_does_not_matter(case):
    """𝒯([z_cls, P, Z]) = 𝒯([z_cls, Z, P]), for P in any order: the same tokens, and the weights follow the prompts.
    Several contexts are one; a context [n, D] is that context [B, n, D], its keys and values computed once."""
    layer, (tokens, P), more = random_layer(case), tokens_and_prompts(case), case.normal('more', 2, case.D)
    order, T = case.order('order', case.N), 1 + case.M
    out, w = layer(tokens, P)
    close(layer(tokens, P[order]), (out, torch.cat([w[:, :T], w[:, T:][:, order]], dim=1)))
    close(layer(tokens, P.expand(case.B, -1, -1)), (out, w))
    one = layer(tokens, torch.cat([P, more]))
    close(layer(tokens, P, more), one)
    close(layer(tokens, more, P)[0], one[0])


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
    close(w.sum(dim=1), torch.ones(case.B).double())
    assert out.requires_grad and not w.requires_grad


# ---- VPT ------------------------------------------------------------------------------------------------


@given(cases())
def test_vpt_is_the_literal_concatenation_of_eq_2_in_logits_and_gradients(case):
    """Eq. 2, l = 0, ..., L-1, new prompts in every layer."""
    model = random_model(case, **METHODS['vpt'])
    oracle.compare(model, case.images(), case.normal('cotangent', case.B, case.C))


@given(cases())
def test_the_same_images_give_the_same_logits_bit_for_bit_training_or_not(case):
    """There is no chance in any equation, so no dropout either."""
    model = random_model(case, **METHODS['ivpt'])
    logits = model.train()(case.images())
    assert torch.equal(model(case.images()), logits)
    assert torch.equal(model.eval()(case.images()), logits)


@given(cases())
def test_an_image_does_not_see_the_other_images_of_its_batch(case):
    """Each image asks, and is reinforced, by itself."""
    model = random_model(case, **METHODS['ivpt'])
    close(torch.cat([model(image.unsqueeze(0)) for image in case.images()]), model(case.images()))


@pytest.mark.parametrize('method', METHODS | OTHERS)
@fewer
@given(cases())
def test_with_the_mean_read_every_method_is_its_literal_form_in_logits_gradients_and_what_is_seen(method, case):
    """MAE, whose class token no loss has trained. Each image token of the last layer asks; the mean has no prompts."""
    model, images = random_model(case, **(METHODS | OTHERS)[method]), case.images()
    model.vit.readout = 'mean'
    oracle.compare(model, images, case.normal('cotangent', case.B, case.C))
    seen, expected = look(model, images), oracle.ivpt(model, images)
    close(seen['w'], torch.stack(expected.w, dim=1).detach())
    close(seen['P_hat'], expected.P_hat.detach())


@pytest.mark.parametrize('method', METHODS | OTHERS)
@pytest.mark.parametrize('readout, queries', [('cls', 1), ('mean', 1 + SMALL.M)])
def test_the_last_layer_asks_with_what_is_read_and_with_nothing_more(readout, queries, method):
    model, asked = random_model(SMALL, **(METHODS | OTHERS)[method]), []
    model.vit.readout = readout
    model.vit.blocks[-1].mlp.register_forward_pre_hook(lambda mlp, args: asked.append(args[0].shape[1]))
    model(SMALL.images())
    assert asked == [queries]


# ---- Number formats -------------------------------------------------------------------------------------


@fewer
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
@fewer
@given(cases())
def test_the_trained_parameters_have_the_papers_names_and_shapes_and_nothing_else_is_trained(method, case):
    """P^l in R^{N x D}, γ^l in R^{N x N} and P_re^l in R^{k x D} between layers, and the head."""
    model, (L, N, D) = random_model(case, **METHODS[method]), (case.L, case.N, case.D)
    expected = {'P': (L, N, D), 'head.weight': (case.C, D), 'head.bias': (case.C,)}
    if METHODS[method]['aggregation']:
        expected['gamma'] = (L - 1, N, N)
    if METHODS[method]['reinforcement'] == 'topk':
        expected['P_re'] = (L - 1, case.k, D)
    assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == expected
    assert {n for n in model.state_dict() if not n.startswith('vit.')} == set(expected)


@every_method
def test_every_trained_parameter_gets_a_gradient_and_the_backbone_none(method):
    """VPT optimises the prompts "whilst keeping the pre-trained model frozen"."""
    model = random_model(SMALL, **METHODS[method])
    model(SMALL.images()).square().sum().backward()
    for name, p in model.named_parameters():
        if name.startswith('vit.'):
            assert p.grad is None, name
        else:
            assert p.grad.flatten(1).ne(0).any(dim=1).all() if p.ndim > 1 else p.grad.ne(0).all(), name


def test_train_keeps_the_backbone_in_eval_mode():
    """Frozen means frozen: what is not trained does not behave as in training either."""
    model = random_model(SMALL, **METHODS['ivpt'])
    for _ in 'as built', 'after a test':
        assert model.training and model.head.training
        assert not any(module.training for module in model.vit.modules())
        assert not any(module.training for module in model.eval().modules())
        assert model.train() is model


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


def test_k_can_be_all_image_tokens_and_does_not_matter_without_reinforcement():
    assert IVPT(plain_vit(SMALL), 3, Prompts(k=4, reinforcement='topk')).P_re.shape[1] == 4
    assert IVPT(plain_vit(SMALL), 3, Prompts(k=99, reinforcement='none')).P_re is None


@pytest.mark.parametrize('shape', [(2, 3, 4, 6), (2, 3, 6, 6), (2, 1, 4, 4), (3, 4, 4)])
def test_images_of_another_size_raise_a_ValueError_with_both_sizes_in_it(shape):
    with pytest.raises(ValueError, match=r'{}.*\[B, 3, 4, 4\]'.format(str(shape).strip('()'))):
        plain_vit(SMALL)(torch.zeros(shape).double())
