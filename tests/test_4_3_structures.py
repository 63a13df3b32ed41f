"""4.3 The other structures of prompts (Table 3, Figure 3), AR at every image token (Table 4), and tuning of
biases (Table 1): what iVPT is compared with.

VPT-shallow, ProVP and EXPRESS inherit prompts: what a layer puts out at their places enters the next one.
There the paper sees "task-irrelevant noise from the input images" come in.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import no_network, tiny  # noqa: F401

import ivpt
import oracle
import train
import vit
from ivpt import IVPT, Express, add_last, all_tokens, cdc, reinforce_, top_k, vanilla_cdc
from paper import look
from oracle import close
from strategies import METHODS, OTHERS, Case, cases, plain_vit, random_layer, random_model, random_vit

CPU = torch.device('cpu')
SMALL = Case(B=2, L=3, N=2, M=4, N_h=2, d=3, k=2, C=3, seed=0)
INHERITED = ('vpt_shallow', 'provp', 'express')
OWN = ('vpt', 'vanilla_cdc', 'cdc', 'cdc_da')
every_other = pytest.mark.parametrize('method', OTHERS)
fewer = settings(max_examples=settings().max_examples // 3)
inherited = pytest.mark.parametrize('method', INHERITED)


def model_of(case, method):
    return random_model(case, **(METHODS | OTHERS)[method])


def zero_(model, *parameters):
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    return model


@every_other
@fewer
@given(cases())
def test_each_structure_is_its_literal_concatenation_in_logits_and_gradients(method, case):
    """4.3, layer by layer, image by image, with all outputs computed."""
    oracle.compare(model_of(case, method), case.images(), case.normal('cotangent', case.B, case.C))


def test_a_structure_is_the_function_of_its_name(monkeypatch):
    monkeypatch.setitem(ivpt.STRUCTURES, 'twice', lambda P: 2 * P)
    model = random_model(SMALL, 'twice', aggregation=False, reinforcement='none')
    assert torch.equal(model.prompts(), 2 * model.P)


@pytest.mark.parametrize('inherits', [False, True])
def test_a_structure_without_a_function_raises_and_is_no_other_in_silence(inherits, monkeypatch):
    """Neither CDC nor VPT-shallow, nor in the literal form."""
    monkeypatch.setitem(ivpt.STRUCTURES, 'mine', None)
    monkeypatch.setattr(ivpt, 'INHERITED', ivpt.INHERITED + inherits * ('mine',))
    model = random_model(SMALL, 'mine', aggregation=False, reinforcement='none')
    with pytest.raises(TypeError, match='not callable'):
        model(SMALL.images())
    with pytest.raises(KeyError, match='mine'):
        oracle.ivpt(model, SMALL.images())


# ---- Whether images have a part in prompts --------------------------------------------------------------


@inherited
@fewer
@given(cases(B=2, L=(2, 4)))
def test_inherited_prompts_depend_on_the_image_in_all_layers_but_the_first(method, case):
    """4.3, (2): they "tend to blend input image information". Two images never have one P̂^l, l > 0."""
    model = model_of(case, method)
    P_hat = look(model, case.images())['P_hat']  # [B, L, N, D]
    assert P_hat.shape == (2, case.L, case.N, case.D)
    assert torch.equal(P_hat[:, 0], model.P[:1].expand(2, -1, -1))
    assert (P_hat[0, 1:] != P_hat[1, 1:]).any(dim=2).all()


@pytest.mark.parametrize('method', OWN)
@fewer
@given(cases(), st.floats(-100, 100), st.booleans())
def test_the_prompts_of_vpt_and_of_all_kinds_of_cdc_do_not_whatever_the_images_show(method, case, scale, noise):
    """4.3, noise robustness: CDC "not transmits image information through cross-layer connection"."""
    model = model_of(case, method)
    images = scale * (case.images() if noise else torch.ones_like(case.images()))
    assert torch.equal(look(model, images)['P_hat'], model.prompts())
    assert model.prompts().shape == (case.L, case.N, case.D)


@inherited
@fewer
@given(cases(B=1, L=(2, 4)))
def test_a_little_noise_in_the_image_is_noise_in_inherited_prompts_and_not_in_those_of_cdc(method, case):
    """4.3. The derivative of P̂^l along a direction of noise, by differences, is 0 for CDC to the bit."""
    noise, moves = 1e-4 * case.normal('noise', *case.images().shape), {}
    for name in method, 'cdc':
        clean, noisy = (look(model_of(case, name), x)['P_hat'] for x in (case.images(), case.images() + noise))
        moves[name] = (noisy - clean).abs().flatten(-2).amax(dim=-1)  # of each layer
    assert (moves[method][0, 1:] > 1e-12).all() and (moves['cdc'] == 0).all()


# ---- VPT-shallow, (B) ProVP and (C) EXPRESS -------------------------------------------------------------


@given(cases())
def test_prompts_are_added_at_the_last_places_and_nowhere_else(case):
    """P̂ stands behind [z_cls, Z]."""
    x, P = case.normal('x', case.B, 1 + case.M + case.N, case.D), case.normal('P', case.N, case.D)
    assert torch.equal(add_last(x, P)[:, :-case.N], x[:, :-case.N])
    assert torch.equal(add_last(x, P)[:, -case.N:], x[:, -case.N:] + P)


@fewer
@given(cases())
def test_provp_whose_later_prompts_are_zero_is_vpt_shallow(case):
    """P̂^l = P^l + 𝒯^{l-1}(P̂^{l-1}) with P^l = 0 for l > 0."""
    provp, shallow = model_of(case, 'provp'), model_of(case, 'vpt_shallow')
    zero_(provp, provp.P[1:])
    shallow.P.data = provp.P.data[:1]
    assert torch.equal(provp(case.images()), shallow(case.images()))


@fewer
@given(cases())
def test_express_without_residuals_is_vpt_shallow(case):
    """(C) of Figure 3: the residuals are all that it adds."""
    express, shallow = model_of(case, 'express'), model_of(case, 'vpt_shallow')
    zero_(express, *express.express.parameters())
    close(express(case.images()), shallow(case.images()))


def test_the_residuals_of_express_start_at_zero():
    """So EXPRESS starts as VPT-shallow; its prompts start as VPT's."""
    torch.manual_seed(0)
    model = IVPT(plain_vit(SMALL), 3, N=2, structure='express', aggregation=False, reinforcement='none')
    assert [list(p.shape) for p in model.express[0].parameters()] == [[2, 6], [2, 18], [2, 6]]
    assert len(model.express) == 3 and not any(p.any() for p in model.express.parameters())
    assert model.P.count_nonzero() == model.P.numel() and model.P.shape == (1, 2, 6)


@given(cases(), st.sampled_from(['norm1', 'qkv', 'proj']))
def test_a_residual_of_express_is_one_on_what_its_part_puts_out_at_the_prompts_places(case, part):
    """After norm1, the QKV projection or the projection after MSA, by a hook on the part itself."""
    layer, tokens = random_layer(case), case.normal('tokens', case.B, 1 + case.M + case.N, case.D)
    residuals = Express(case.N, case.D).double()
    r = getattr(residuals, part)
    r.data = case.normal('r', *r.shape)
    module = layer.norm1 if part == 'norm1' else getattr(layer.attn, part)
    z_and_Z = torch.zeros(1 + case.M, r.shape[1])
    hook = module.register_forward_hook(lambda module, inputs, out: out + torch.cat([z_and_Z, r]))
    expected, w = layer(tokens)
    hook.remove()
    out, w_express = residuals(layer, tokens)
    close(out, expected)
    close(w_express, w)


@fewer
@given(cases(L=1))
def test_with_one_layer_all_structures_are_vpt(case):
    """There is nothing to inherit and nothing to connect; EXPRESS has its residuals."""
    expected = model_of(case, 'vpt')(case.images())
    for method in 'vpt_shallow', 'provp', 'vanilla_cdc':
        close(model_of(case, method)(case.images()), expected)


@fewer
@given(cases(L=(3, 4)))
def test_with_three_layers_no_two_structures_are_the_same(case):
    """Figure 3 has five drawings. P^0 is the same in all."""
    P, logits = case.normal('one P', case.L, case.N, case.D), []
    for method in 'vpt_shallow', 'vpt', 'provp', 'express', 'vanilla_cdc', 'cdc':
        model = model_of(case, method)
        model.P.data = P[:len(model.P)]
        logits.append(model(case.images()))
    for i, a in enumerate(logits):
        assert not any(torch.allclose(a, b, rtol=0, atol=1e-9) for b in logits[:i])


# ---- (D) Vanilla CDC ------------------------------------------------------------------------------------


@given(cases())
def test_vanilla_cdc_is_the_sum_of_all_prompts_so_far_and_obeys_its_recursion(case):
    """4.3. P̂^l = P^l + P̂^{l-1} "or equally" P̂^l = P^l + Σ_{i<l} P^i; P̂^0 = P^0."""
    P = case.normal('P', case.L, case.N, case.D)
    P_hat = vanilla_cdc(P)
    assert torch.equal(P_hat[0], P[0])
    for l in range(1, case.L):
        close(P_hat[l], P[l] + P_hat[l - 1])
        close(P_hat[l], P[l] + sum(P[i] for i in range(l)))


@given(cases())
def test_a_prompt_of_vanilla_cdc_reaches_every_layer_from_its_own_on(case):
    """"transfers the input prompt token from all preceding layers": CDC's reaches two."""
    P = case.normal('P', case.L, case.N, case.D)
    for m in range(case.L):
        changed = P.clone()
        changed[m] += 1
        depends = (vanilla_cdc(changed) != vanilla_cdc(P)).any(dim=2).any(dim=1)
        assert depends.tolist() == [l >= m for l in range(case.L)]


@given(cases())
def test_vanilla_cdc_is_cdc_up_to_two_layers_and_not_from_the_third_on(case):
    """4.3. P^{l-1} and all before it are the same while there is one before."""
    P = case.normal('P', case.L, case.N, case.D)
    assert torch.equal(vanilla_cdc(P)[:2], cdc(P)[:2])
    assert all(not torch.allclose(vanilla_cdc(P)[l], cdc(P)[l]) for l in range(2, case.L))


# ---- AR at every image token, Table 4 -------------------------------------------------------------------


@given(cases())
def test_all_takes_every_position_in_order_whatever_the_weights(case):
    """Table 4, "All": row i of P_re belongs to position i."""
    w, Z = case.normal('w', case.B, case.M), case.normal('Z', case.B, case.M, case.D)
    P_re = case.normal('P_re', case.M, case.D)
    assert all_tokens(w).tolist() == [list(range(case.M))] * case.B
    assert torch.equal(reinforce_(Z.clone(), all_tokens(w), P_re), Z + P_re)


@given(cases())
def test_all_is_topk_with_k_equal_to_M_up_to_the_order_of_each_image(case):
    """Eq. 15. Top-k gives row r to position Ω_r: it is All with the rows of P_re in the order of Ω⁻¹, which
    is each image's own. What M tokens are given is the same, who gets what is not."""
    w, Z = case.normal('w', case.B, case.M), case.normal('Z', case.B, case.M, case.D)
    P_re, Omega = case.normal('P_re', case.M, case.D), top_k(w, case.M)
    each = [reinforce_(Z[b:b + 1].clone(), all_tokens(w[b:b + 1]), P_re[Omega[b].argsort()]) for b in range(case.B)]
    assert torch.equal(reinforce_(Z.clone(), Omega, P_re), torch.cat(each))


@given(cases(B=1))
def test_for_one_image_the_two_are_one_model(case):
    """Eq. 14 and 15: P_re of All is P_re of top-k, k = M, in the order of Ω⁻¹ in each layer."""
    case = replace(case, k=case.M)
    topk, every = model_of(case, 'ivpt'), model_of(case, 'ivpt_all')
    for l in range(case.L - 1):
        Omega = look(topk, case.images())['Omega'][0, l]
        every.P_re.data[l] = topk.P_re.data[l][Omega.argsort()]
    close(every(case.images()), topk(case.images()))


@given(cases(L=(2, 4)))
def test_all_with_equal_rows_adds_a_constant_to_every_image_token_and_none_to_the_class_token(case):
    """Table 4, "All". The literal form adds it between the layers."""
    model, c = model_of(case, 'ivpt_all'), case.normal('c', case.L - 1, 1, case.D)
    model.P_re.data = c.expand(-1, case.M, -1).clone()
    P_hat, x = oracle.prompts('cdc', model.P, model.gamma), oracle.embed(model.vit, case.images())
    z_cls, Z = x[:, :1], x[:, 1:]
    for l, block in enumerate(model.vit.blocks):
        z_cls, Z, _ = oracle.eq_3(block, z_cls, P_hat[l], Z if l == 0 else Z + c[l - 1])
    close(model(case.images()), model.head(oracle.layer_norm(model.vit.norm, z_cls[:, 0])))


@given(cases())
def test_k_has_no_part_in_all(case):
    """Table 4. P_re has a row for each of the M image tokens."""
    model = IVPT(plain_vit(case), case.C, case.N, k=10 ** 6, reinforcement='all')
    assert model.P_re.shape == (case.L - 1, case.M, case.D) and not model.P_re.any()


# ---- What is trained ------------------------------------------------------------------------------------


def after_steps(method, **changes):
    """A model that train.py made, after three steps of SGD on noise, and the names of what has moved."""
    how = dict(img_size=16, k=2, N=3, n_train=12, batch=4, epochs=1, weight_decay=0.0, lr=0.1)
    config = tiny(method=method, **how | changes)
    model = train.make_model(config, 3)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    noise = torch.Generator().manual_seed(0)
    pictures = [(torch.randint(256, (3, 16, 16), generator=noise, dtype=torch.uint8), i % 3) for i in range(12)]
    list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))
    return model, {name for name, p in model.state_dict().items() if not torch.equal(before[name], p)}


HEAD = {'head.weight', 'head.bias'}


@pytest.mark.parametrize('method, trained', [
    ('vpt_shallow', {'P'}), ('provp', {'P'}), ('vanilla_cdc', {'P'}), ('ivpt_all', {'P', 'gamma', 'P_re'})])
def test_steps_move_all_that_is_trained_and_no_bit_of_the_backbone(method, trained):
    model, moved = after_steps(method)
    assert moved == set(train.trained(model)) == trained | HEAD


def test_steps_move_the_residuals_of_express_but_for_those_that_nobody_reads():
    """What the last layer puts out at the prompts' places is thrown away, and so are its queries there: no
    gradient can reach the residual on its projection, nor the queries' third of the one on its qkv."""
    model, moved = after_steps('express', N=3)
    last, trained = len(model.express) - 1, set(train.trained(model))
    assert trained == {'P', *HEAD} | {f'express.{l}.{part}' for l in range(last + 1)
                                      for part in ('norm1', 'qkv', 'proj')}
    assert moved == trained - {f'express.{last}.proj'}
    thirds = [layer.qkv.chunk(3, dim=1) for layer in model.express]  # of queries, keys and values
    assert [[part.ne(0).any(dim=1).all().item() for part in three] for three in thirds] == (
        [[True] * 3] * last + [[False, True, True]])
    assert not thirds[-1][0].any()


def test_steps_of_bias_tuning_move_every_bias_and_the_head_and_no_bit_of_anything_else():
    """Bias in Table 1 (BitFit, Zaken et al., 2022): all bias vectors of the whole ViT."""
    model, moved = after_steps('bias')
    biases = {name for name in model.state_dict() if name.endswith('.bias')}
    assert len(biases) == 6 * len(model.blocks) + 3  # norm1, qkv, proj, norm2, fc1, fc2; patches, norm, head
    assert moved == set(train.trained(model)) == biases | HEAD


@given(cases(B=1))
def test_of_the_biases_those_of_keys_are_tuned_in_vain(case):
    """3.4. A key's bias adds the same q·b to every key and cancels in the softmax: a third of the qkv biases
    that bias tuning counts cannot learn. LayerNorm, head and all else does."""
    model = random_vit(case, num_classes=case.C)
    biases = [block.attn.qkv.bias for block in model.blocks]
    for grad in oracle.gradients(model(case.images()), biases, case.normal('cotangent', 1, case.C)):
        q, k, v = grad.chunk(3)
        close(k, torch.zeros_like(k))
        assert v.ne(0).all()


# A nano ViT at 24 pixels and where_blue: 9 image tokens, 9 classes.
D, L, M, N, k, LINEAR = 64, 6, 9, 5, 4, (64 + 1) * 9
COUNTS = {
    'full': (3 * 8 * 8 + 1) * D + D + (1 + M) * D + L * (12 * D * D + 13 * D) + 2 * D + LINEAR,
    'linear': LINEAR,
    'bias': D + L * (D + 3 * D + D + D + 4 * D + D) + D + LINEAR,
    'vpt_shallow': N * D + LINEAR,
    'vpt': N * D * L + LINEAR,
    'provp': N * D * L + LINEAR,
    'express': 20 * D * (5 * L + 1) + LINEAR,
    'vanilla_cdc': N * D * L + LINEAR,
    'cdc': N * D * L + LINEAR,
    'cdc_da': N * D * L + N * N * (L - 1) + LINEAR,
    'ivpt_all': N * D * L + N * N * (L - 1) + M * D * (L - 1) + LINEAR,
    'ivpt': N * D * L + N * N * (L - 1) + k * D * (L - 1) + LINEAR,
}


@pytest.mark.parametrize('method', COUNTS)
def test_every_method_runs_on_the_default_task_and_trains_what_its_formula_says(method, tmp_path):
    """4.3, from configs.yaml to result.json. EXPRESS has N = 20 of its own (Table 1's 0.98M)."""
    changes = {} if method == 'express' else dict(N=N)
    result = train.run(tiny('where_blue', method, runs=str(tmp_path), img_size=24, k=k, epochs=1, **changes))
    assert result['trained_parameters'] == COUNTS[method]
    assert result['final_loss'] > 0 and result['images'] == 20


@pytest.mark.parametrize('method', INHERITED)
@pytest.mark.parametrize('wrong, message', [(dict(reinforcement='topk'), 'reinforcement'),
                                            (dict(reinforcement='all'), 'reinforcement'),
                                            (dict(aggregation=True), 'aggregation')])
def test_inherited_prompts_with_parts_of_ivpt_are_refused_and_not_ignored(method, wrong, message):
    """No row of a table has them."""
    with pytest.raises(vit.InputError, match=f'{message}.*{method!r}'):
        IVPT(plain_vit(SMALL), 3, 2, 2, **(OTHERS[method] | wrong))
