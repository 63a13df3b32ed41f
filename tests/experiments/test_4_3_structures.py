"""4.3 The other structures of prompts (Table 3, Figure 3), AR at every image token (Table 4), and tuning of
biases (Table 1): what iVPT is compared with.

VPT-shallow, ProVP and EXPRESS inherit prompts: what a layer puts out at their places enters the next one.
There the paper sees "task-irrelevant noise from the input images" come in.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import NANO, run, task_of, tiny

import ivpt
import oracle
import structures
import train
import vit
from ivpt import IVPT, Prompts, all_tokens, cdc, look, reinforce_, top_k, vanilla_cdc
from oracle import close
from strategies import METHODS, OTHERS, Case, cases, plain_vit, random_model, random_vit

SMALL = Case(B=2, L=3, N=2, M=4, N_h=2, d=3, k=2, C=3, seed=0)
INHERITED = ('vpt_shallow', 'provp', 'express')
inherited = pytest.mark.parametrize('method', INHERITED)
fewer = settings(max_examples=settings().max_examples // 5)


def inheriting(method, backbone, num_classes, prompts):
    """What the function of a file makes of a frozen backbone."""
    return getattr(structures, method)(backbone.requires_grad_(False), num_classes, SimpleNamespace(prompts=prompts))


def model_of(case, method):
    if method in INHERITED:
        return random_model(case, 'cdc', False, 'none', make=partial(inheriting, method))
    return random_model(case, **(METHODS | OTHERS)[method])


def entered(model, images):
    """P̂ that entered each layer: [L, N, D], or [B, L, N, D] if images have a part in it."""
    P_hat, N = [], model.P.shape[-2]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: P_hat.append(inputs[-1][..., -N:, :]))
             for layer in model.vit.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(P_hat, dim=-3)


def literal(model, images, method):
    """Figure 3, image by image, all tokens in the sequence [z_cls, P̂, Z]. As `oracle.ivpt`; P̂ is [B, L, N, D].

    EXPRESS's residuals are added at the prompts' places after norm1, the QKV projection and the one after MSA."""
    N, seen = model.P.shape[1], []
    for image in images:
        x = oracle.embed(model.vit, image.unsqueeze(0))
        z_cls, P, Z = x[:, :1], model.P[:1], x[:, 1:]
        w, P_hat = [], []
        for l, layer in enumerate(model.vit.blocks):
            P = P + model.P[l] if method == 'provp' and l else P
            P_hat.append(P[0])
            residuals = model.express[l].named_parameters() if method == 'express' else ()
            residuals = {name: F.pad(r, (0, 0, 1, Z.shape[1])) for name, r in residuals}
            x, A = oracle.layer(layer, torch.cat([z_cls, P, Z], dim=1), **residuals)
            z_cls, P, Z = x[:, :1], x[:, 1:1 + N], x[:, 1 + N:]
            w.append(A[0, :, 0, 1 + N:].mean(dim=0))
        logits = oracle.read(model.vit, z_cls, Z)[0] @ model.head.weight.T + model.head.bias
        seen.append((logits, torch.stack(w), torch.stack(P_hat)))
    return [torch.stack(x) for x in zip(*seen)]


@pytest.mark.parametrize('method', OTHERS)
@fewer
@given(cases())
def test_each_structure_is_its_literal_concatenation_in_logits_and_gradients(method, case):
    """4.3, layer by layer, image by image, with all outputs computed."""
    oracle.compare(model_of(case, method), case.images(), case.normal('cotangent', case.B, case.C))


@inherited
@fewer
@given(cases(), st.sampled_from(['cls', 'mean']))
def test_each_structure_that_inherits_prompts_is_figure_3_literally_and_what_look_returns_too(method, case, readout):
    """The image tokens' mean is one without prompts. `look` sees the class token's weights in each layer."""
    model, cotangent = model_of(case, method), case.normal('cotangent', case.B, case.C)
    model.vit.readout = readout
    logits, w, P_hat = literal(model, case.images(), method)
    trained = [p for p in model.parameters() if p.requires_grad]
    oracle.compare_gradients(model(case.images()), logits, trained, cotangent)
    seen = look(model, case.images())
    close([seen['logits'], seen['w'], entered(model, case.images())], [logits, w, P_hat])
    assert seen['Omega'] is seen['P_hat'] is None


def test_a_structure_is_the_function_of_its_name(monkeypatch):
    monkeypatch.setitem(ivpt.STRUCTURES, 'twice', lambda P: 2 * P)
    model = random_model(SMALL, 'twice', aggregation=False, reinforcement='none')
    assert torch.equal(model.prompts(), 2 * model.P)


@inherited
@fewer
@given(cases(B=1, L=(2, 4)), st.sampled_from([1, 1e-4]))
def test_inherited_prompts_depend_on_the_image_and_on_a_little_noise_in_all_layers_but_the_first(method, case, much):
    """4.3, (2): they "tend to blend input image information". Two images never have one P̂^l, l > 0."""
    model, noise = model_of(case, method), case.normal('noise', *case.images().shape)
    P_hat = entered(model, torch.cat([case.images(), case.images() + much * noise]))  # [B, L, N, D]
    assert P_hat.shape == (2, case.L, case.N, case.D)
    assert torch.equal(P_hat[:, 0], model.P[:1].expand(2, -1, -1))
    assert ((P_hat[0, 1:] - P_hat[1, 1:]).abs().amax(dim=2) > 1e-12).all()


@pytest.mark.parametrize('method', ['vpt', 'vanilla_cdc', 'cdc', 'cdc_da'])
@fewer
@given(cases(), st.floats(-100, 100), st.booleans())
def test_no_image_changes_the_prompts_of_vpt_and_of_all_kinds_of_cdc(method, case, scale, noise):
    """4.3, noise robustness: CDC "not transmits image information through cross-layer connection". The derivative of
    P̂^l along a direction of noise is 0 to the bit."""
    model = model_of(case, method)
    images = scale * (case.images() if noise else torch.ones_like(case.images()))
    assert torch.equal(entered(model, images), model.prompts())
    assert model.prompts().shape == (case.L, case.N, case.D)


# ---- VPT-shallow, (B) ProVP and (C) EXPRESS -------------------------------------------------------------

def test_the_residuals_of_express_start_at_zero():
    """So EXPRESS starts as VPT-shallow; its prompts start as VPT's, within its bound, and the head as everywhere."""
    model = inheriting('express', plain_vit(SMALL), 3, Prompts(N=2))
    assert [list(p.shape) for p in model.express[0].parameters()] == [[2, 6], [2, 18], [2, 6]]
    assert len(model.express) == 3 and not any(p.any() for p in model.express.parameters())
    assert not model.head.bias.any() and model.head.weight.abs().max() < 0.1
    for method, L in ('vpt_shallow', 1), ('provp', 3), ('express', 1):
        P, bound = inheriting(method, plain_vit(SMALL), 3, Prompts(N=200)).P, (6 / (3 * 2 ** 2 + 6)) ** 0.5
        assert P.shape == (L, 200, 6) and 0.98 * bound < P.abs().max() <= bound
        assert abs(P.std() / (bound / 3 ** 0.5) - 1) < 0.1


@pytest.mark.parametrize('readout, queries', [('cls', {'express': 7}), ('mean', dict.fromkeys(INHERITED, 7))])
@inherited
def test_the_last_layer_has_queries_for_what_is_read_alone_unless_prompts_are_tokens_too(method, readout, queries):
    """[z_cls, Z, P̂] are 7 tokens. EXPRESS's residuals are added to tokens, and not to a context."""
    model, asked = model_of(SMALL, method), []
    model.vit.readout = readout
    model.vit.blocks[-1].mlp.register_forward_pre_hook(lambda mlp, args: asked.append(args[0].shape[1]))
    model(SMALL.images())
    assert asked == [queries.get(method, 1)]


@inherited
def test_under_autocast_residuals_are_added_in_the_format_of_what_they_are_added_to(method, monkeypatch):
    """Queries and keys stay in bfloat16, and the class token's weights in float32, as everywhere."""
    rows, first_row = [], vit.Attention.first_row
    monkeypatch.setattr(vit.Attention, 'first_row', lambda attn, q, k: rows.append((q, k)) or first_row(attn, q, k))
    with torch.autocast('cpu', torch.bfloat16):
        seen = look(model_of(SMALL, method).float(), SMALL.images().float())
    assert seen['w'].dtype == torch.float32 and {x.dtype for pair in rows for x in pair} == {torch.bfloat16}


@given(cases())
def test_vanilla_cdc_is_the_sum_of_all_prompts_so_far_and_obeys_its_recursion(case):
    """4.3. P̂^l = P^l + P̂^{l-1} "or equally" P̂^l = P^l + Σ_{i<l} P^i; P̂^0 = P^0: it "transfers the input prompt
    token from all preceding layers", where CDC transfers one's: it is CDC up to two layers, not from the third on."""
    P = case.normal('P', case.L, case.N, case.D)
    P_hat = vanilla_cdc(P)
    assert torch.equal(P_hat[0], P[0])
    for l in range(1, case.L):
        close(P_hat[l], P[l] + P_hat[l - 1])
        close(P_hat[l], sum(P[:l + 1].unbind()))
        assert torch.allclose(P_hat[l], cdc(P)[l]) == (l < 2)


@given(cases())
def test_ar_at_all_tokens_takes_every_position_in_order_whatever_the_weights(case):
    """Table 4, "All": row i of P_re belongs to position i; equal rows are a constant for every image token. Top-k with
    k = M, Eq. 15, gives row r to position Ω_r: it is All with the rows of P_re in the order of Ω⁻¹, which is each
    image's own. What M tokens are given is the same, who gets what is not."""
    w, Z = case.normal('w', case.B, case.M), case.normal('Z', case.B, case.M, case.D)
    P_re, Omega = case.normal('P_re', case.M, case.D), top_k(w, case.M)
    assert all_tokens(w).tolist() == [list(range(case.M))] * case.B
    assert torch.equal(reinforce_(Z.clone(), all_tokens(w), P_re), Z + P_re)
    assert torch.equal(reinforce_(Z.clone(), Omega, P_re), Z + P_re[Omega.argsort()])


@given(cases())
def test_k_has_no_effect_on_ar_at_all_tokens(case):
    """Table 4. P_re has a row for each of the M image tokens."""
    model = IVPT(plain_vit(case), case.C, Prompts(case.N, k=10 ** 6, aggregation=True, reinforcement='all'))
    assert model.P_re.shape == (case.L - 1, case.M, case.D) and not model.P_re.any()


# ---- What is trained ------------------------------------------------------------------------------------


RESIDUALS = {f'express.{l}.{part}' for l in range(6) for part in ('norm1', 'qkv', 'proj')}
BIASES = {name for name in vit.build(NANO).state_dict() if name.endswith('.bias')}


@pytest.mark.parametrize('method, trained, never', [
    ('vpt_shallow', {'P'}, set()), ('provp', {'P'}, set()), ('vanilla_cdc', {'P'}, set()),
    ('ivpt_all', {'P', 'gamma', 'P_re'}, set()), ('bias', BIASES, set()),
    ('express', {'P'} | RESIDUALS, {'express.5.proj'})])
def test_steps_move_all_that_is_trained_and_no_bit_of_the_backbone(method, trained, never):
    """Bias in Table 1 (BitFit, Zaken et al., 2022): all bias vectors of the whole ViT. EXPRESS: what the last layer
    puts out at the prompts' places is discarded, so no gradient can reach the residual on its projection."""
    config = tiny(method=method, img_size=16, k=2, N=3, batch=4, epochs=1, weight_decay=0.0, lr=0.1)
    noise = torch.randint(256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = task_of(pictures=[(image, i % 3) for i, image in enumerate(noise)])
    model, _ = train.make_model(config, task)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = train.State(model, train.make_optimizer(model, config.loop), torch.amp.GradScaler(enabled=False), [])
    list(train.train(state, task, task.train, config, train.Compute(torch.device('cpu'), 'float32', '')))
    moved = {name for name, p in model.state_dict().items() if not torch.equal(before[name], p)}
    assert set(train.trained(model)) == trained | {'head.weight', 'head.bias'} == moved | never
    assert not moved & never and len(BIASES) == 6 * 6 + 2  # norm1, qkv, proj, norm2, fc1, fc2; patches, norm


@fewer
@given(cases(B=1))
def test_the_gradient_of_the_biases_of_keys_is_0_and_that_of_the_biases_of_values_is_not(case):
    """3.4. A key's bias adds the same q·b to every key and cancels in the softmax: a third of the qkv biases
    that bias tuning counts cannot learn. LayerNorm, head and all else does."""
    model = random_vit(case, num_classes=case.C)
    biases = [block.attn.qkv.bias for block in model.blocks]
    for grad in oracle.gradients(model(case.images()), biases, case.normal('cotangent', 1, case.C)):
        q, k, v = grad.chunk(3)
        close(k, torch.zeros_like(k))
        assert v.ne(0).all()


@pytest.mark.parametrize('method', [
    'full', 'linear', 'bias', *INHERITED, 'vpt', 'vanilla_cdc', 'cdc', 'cdc_da', 'ivpt_all', 'ivpt'])
def test_every_method_runs_on_the_default_task_from_configs_yaml_to_result_json(method, tmp_path):
    settings = tiny('where_blue', method, runs=tmp_path, img_size=24, epochs=1)
    result = train.run(settings)
    assert result['trained_parameters'] == train.count(train.make_model(settings, task_of(n=9))[0])
    assert result['final_loss'] > 0 and result['images'] == 20


@inherited
@pytest.mark.parametrize('wrong', [dict(reinforcement='topk'), dict(reinforcement='all'), dict(aggregation=True)])
def test_inherited_prompts_with_parts_of_ivpt_are_refused_in_one_line_and_not_ignored(method, wrong, tmp_path, capfd):
    """No row of a table has them."""
    assert run(tmp_path, '--method', method, **wrong) == 2
    said = f'structures.py:{method}: {[*wrong][0]} is'
    assert said in one_line(capfd) and not list(tmp_path.iterdir())
