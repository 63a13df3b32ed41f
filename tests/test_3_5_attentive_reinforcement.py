"""3.5 Attentive reinforcement: the choice of image tokens (Eq. 14) and what they are given (Eq. 15)."""

from pathlib import Path

import pytest
import torch
from hypothesis import find, given, settings

import oracle
import vit
from ivpt import IVPT, reinforce_, top_k
from paper import look
from oracle import close
from strategies import METHODS, OTHERS, Case, cases, plain_vit, random_model, randomised

with_reinforcement = pytest.mark.parametrize('method', ['vpt_ar', 'cdc_ar', 'ivpt'])


def weights(case):
    """Positive weights [B, M], no two alike."""
    return case.normal('w', case.B, case.M).softmax(dim=1)


def tokens_chosen_and_prompts(case):
    """Z [B, M, D], Ω [B, k] and P_re [k, D]."""
    return (case.normal('Z', case.B, case.M, case.D), top_k(weights(case), case.k),
            case.normal('P_re', case.k, case.D))


# ---- The choice, Eq. 14 ---------------------------------------------------------------------------------


@given(cases())
def test_Omega_lists_the_positions_of_the_k_largest_in_descending_order(case):
    """Eq. 14. Ω = Topk(w̃, k): "the descending order indices of the largest k elements"."""
    assert top_k(weights(case), case.k).tolist() == oracle.top_k(weights(case), case.k)


@given(cases())
def test_Omega_is_chosen_on_each_image_by_itself(case):
    """Eq. 14. An image alone has the Ω that it has in a batch, and permuting the batch permutes Ω."""
    for b in range(case.B):
        assert torch.equal(top_k(weights(case)[b:b + 1], case.k)[0], top_k(weights(case), case.k)[b])
    order = case.order('order', case.B)
    assert torch.equal(top_k(weights(case)[order], case.k), top_k(weights(case), case.k)[order])


@given(cases())
def test_ties_do_not_break_the_choice(case):
    """Eq. 14. Which of two equal weights is chosen is open; k places are, and they have the k largest."""
    w = case.integers('w', 3, case.B, case.M)
    for row, Omega in zip(w, top_k(w, case.k).tolist()):
        assert len(set(Omega)) == case.k
        assert row[Omega].tolist() == sorted(row.tolist(), reverse=True)[:case.k]


@given(cases())
def test_k_equal_to_M_takes_every_image_token(case):
    """Eq. 14. Nothing is left to choose, but the order."""
    for Omega in top_k(weights(case), case.M).tolist():
        assert sorted(Omega) == list(range(case.M))


@given(cases())
def test_only_the_order_of_the_weights_counts(case):
    """Eq. 14. Any increasing function of w̃ has the same Ω: renormalising it over the image tokens, too."""
    w = weights(case)
    for increasing in (w.log(), 0.3 * w, w ** 3):
        assert torch.equal(top_k(increasing, case.k), top_k(w, case.k))


# ---- Reinforcement, Eq. 15 ------------------------------------------------------------------------------


@given(cases())
def test_tokens_in_Omega_change_by_P_re_in_order_of_saliency_and_no_other_by_a_bit(case):
    """Eq. 15. Z̃[Ω] = Z[Ω] + P_re: the r-th most salient token gets the r-th row."""
    Z, Omega, P_re = tokens_chosen_and_prompts(case)
    Z_tilde = reinforce_(Z.clone(), Omega, P_re)
    for b in range(case.B):
        for i in range(case.M):
            row = Omega[b].tolist().index(i) if i in Omega[b] else None
            assert torch.equal(Z_tilde[b, i], Z[b, i] if row is None else Z[b, i] + P_re[row])


@given(cases())
def test_reinforcing_copies_no_token(case):
    """Eq. 15 in place: Z̃ lies where Z lay."""
    Z, Omega, P_re = tokens_chosen_and_prompts(case)
    assert reinforce_(Z, Omega, P_re).data_ptr() == Z.data_ptr()


@given(cases())
def test_the_gradient_of_P_re_is_the_sum_over_the_batch_at_the_chosen_places(case):
    """Eq. 15, backwards: row r gets what arrives at each image's r-th token; Z gets what arrives at Z̃."""
    Z, Omega, P_re = tokens_chosen_and_prompts(case)
    G = case.normal('G', *Z.shape)
    Z_tilde = reinforce_(Z.requires_grad_().clone(), Omega, P_re.requires_grad_())
    of_Z, of_P_re = oracle.gradients(Z_tilde, [Z, P_re], G)
    assert torch.equal(of_Z, G)
    for r in range(case.k):
        close(of_P_re[r], sum(G[b, Omega[b, r]] for b in range(case.B)))


# ---- In the model ---------------------------------------------------------------------------------------


@with_reinforcement
@given(cases())
def test_the_model_is_the_literal_form_of_all_equations_in_logits_and_gradients(method, case):
    """Eq. 2 or 3 to 6, 14 and 15. The literal form chooses with Python's sort: no gradient can pass."""
    model = random_model(case, **METHODS[method])
    oracle.compare(model, case.images(), case.normal('cotangent', case.B, case.C))


@settings(max_examples=settings().max_examples // 5)
@given(cases(B=(1, 2), L=(1, 3), N=(1, 2), C=1, k=1))
def test_the_gradients_are_slopes_so_the_choice_has_no_part_in_them(case):
    """Eq. 14 is a step function: a small change of P or γ changes no Ω, and finite differences agree."""
    model = random_model(case, **METHODS['ivpt'])
    names, values = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(names, values)), case.images())

    assert torch.autograd.gradcheck(logits, values)


@given(cases())
def test_saliency_is_the_class_tokens_row_of_the_full_attention_restricted_to_image_tokens(case):
    """w̃^l in R^M of Eq. 14: layer l's own weights, prompts in its softmax, mean over the heads."""
    model = random_model(case, **METHODS['ivpt'])
    _, left = oracle.watch(model, case.images())
    for (_, w), literal in zip(left, oracle.ivpt(model, case.images()).w):
        close(w[:, 1:1 + case.M], literal.detach())


@given(cases())
def test_between_two_layers_the_chosen_image_tokens_change_by_P_re_and_nothing_else_does(case):
    """Eq. 15, l = 0, ..., L-2: "subsequently input into the next transformer layer". z_cls is untouched."""
    model = random_model(case, **METHODS['ivpt'])
    entered, left = oracle.watch(model, case.images())
    Omega = oracle.ivpt(model, case.images()).Omega
    assert len(Omega) == len(model.P_re) == case.L - 1
    for l in range(case.L - 1):
        z_cls, Z = left[l][0][:, :1], left[l][0][:, 1:]
        Z_tilde = oracle.reinforce(Z, Omega[l], model.P_re[l])
        assert torch.equal(entered[l + 1][0], torch.cat([z_cls, Z_tilde], dim=1))


@given(cases())
def test_after_the_last_layer_nothing_is_reinforced(case):
    """Eq. 15. What the last layer puts out is normalised and classified as it is."""
    model = random_model(case, **METHODS['ivpt'])
    _, left = oracle.watch(model, case.images())
    close(model(case.images()), model.head(model.vit.norm(left[-1][0][:, 0])))


@given(cases())
def test_prompts_are_not_reinforced(case):
    """Eq. 15 is for image tokens: P̂^{l+1} enters as Eq. 5 left it."""
    model = random_model(case, **METHODS['ivpt'])
    entered, _ = oracle.watch(model, case.images())
    assert torch.equal(torch.stack([P for _, P in entered]), model.prompts())


@given(cases())
def test_with_P_re_zero_the_model_is_the_one_without_reinforcement(case):
    """Eq. 15 with P_re = 0 is Z̃ = Z."""
    model = random_model(case, **METHODS['ivpt'])
    without = random_model(case, **(METHODS['ivpt'] | dict(reinforcement='none')))
    torch.nn.init.zeros_(model.P_re)
    assert torch.equal(model(case.images()), without(case.images()))


@given(cases(L=(2, 4)))
def test_P_re_starts_at_zero_and_still_receives_a_gradient(case):
    """So iVPT starts as CDC, γ being the identity, and every row of P_re can leave 0."""
    model = IVPT(plain_vit(case), case.C, case.N, case.k)
    assert model.P_re.count_nonzero() == 0
    model = random_model(case, **METHODS['ivpt'])
    torch.nn.init.zeros_(model.P_re)
    grad, = oracle.gradients(model(case.images()), [model.P_re], case.normal('cotangent', case.B, case.C))
    assert grad.ne(0).any(dim=2).all()


@given(cases())
def test_ivpt_starts_as_cdc(case):
    """γ = I and P_re = 0 as built: the same logits as CDC with the same P and head."""
    model = random_model(case, **METHODS['ivpt'])
    built = IVPT(plain_vit(case), case.C, case.N, case.k).double()
    model.gamma.data, model.P_re.data = built.gamma.data, built.P_re.data
    assert torch.equal(model(case.images()), random_model(case, **METHODS['cdc'])(case.images()))


@pytest.mark.parametrize('method', METHODS | OTHERS)
def test_nobody_computes_attention_weights_that_nobody_reads(method, monkeypatch):
    """The fused kernel never shows its matrix, so w̃ costs a product of its own: L - 1 of them, for AR alone. A
    plain ViT computes none, and is a fair measure of what prompts cost."""
    rows, first_row = [], vit.Attention.first_row
    case = Case(B=1, L=3, N=2, M=4, N_h=1, d=3, k=2, C=2, seed=0)
    monkeypatch.setattr(vit.Attention, 'first_row', lambda *args: rows.append(args) or first_row(*args))
    model = random_model(case, **(METHODS | OTHERS)[method])
    model(case.images())
    assert len(rows) == (0 if model.P_re is None else case.L - 1)
    del rows[:]
    model.vit(case.images())
    assert not rows


@pytest.mark.parametrize('aggregation', [False, True])
def test_k_0_is_the_model_without_reinforcement(aggregation):
    """Figure 5 begins with k = 0."""
    models, images = [], torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for k, reinforcement in (0, 'topk'), (10, 'none'):
        torch.manual_seed(0)
        models.append(IVPT(vit.ViT(4, 2, 6, 3, 2), 3, 2, k, 'cdc', aggregation, reinforcement))
    zero, without = models
    assert zero.P_re is None and zero.state_dict().keys() == without.state_dict().keys()
    assert torch.equal(zero(images), without(images)) and look(zero, images)['Omega'] is None


# ---- Number formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize('structure', ['cdc', 'express'])
def test_the_weights_of_eq_14_are_in_float32_under_autocast(structure, monkeypatch):
    """Ω follows the order of w̃, and of many tokens that matter little the weights are one number in bfloat16."""
    rows, first_row = [], vit.Attention.first_row

    def recorded(attn, q, k):
        rows.append((q, k, first_row(attn, q, k)))
        return rows[-1][-1]
    monkeypatch.setattr(vit.Attention, 'first_row', recorded)
    torch.manual_seed(0)
    backbone = vit.build('vit_nano_patch8_48', Path(__file__).parent / 'nano.pth')
    model = IVPT(backbone, 9, 10, 10, structure, False, 'topk' if structure == 'cdc' else 'none')
    with torch.autocast('cpu', torch.bfloat16):
        look(model, torch.randn(4, 3, 48, 48))
    assert len(rows) == (5 if structure == 'cdc' else 6)  # where the class token asks alone, there is no row
    for q, k, w in rows:
        assert q.dtype == k.dtype == torch.bfloat16 and w.dtype == torch.float32
        exact = first_row(backbone.blocks[0].attn, q.double(), k.double())
        torch.testing.assert_close(w.double(), exact, rtol=1e-5, atol=1e-7)


def test_the_one_query_of_the_last_layer_weighs_in_float32_under_autocast():
    """Its weights, which Figure 7 shows, are float64's to float32's rounding; what it puts out is in bfloat16."""
    attn = vit.build('vit_nano_patch8_48', Path(__file__).parent / 'nano.pth').blocks[-1].attn
    torch.manual_seed(0)
    tokens = torch.randn(4, 37, 64), torch.randn(10, 64)
    with torch.autocast('cpu', torch.bfloat16):
        out, w = attn.one_query(*tokens)
        out_, w_ = attn.one_query(*(x.bfloat16() for x in tokens))  # what is half already is welcome too
    exact, w_exact = attn.double().one_query(*(x.double() for x in tokens))
    torch.testing.assert_close(w.double(), w_exact, rtol=1e-4, atol=1e-7)
    assert w_.dtype == w.dtype == torch.float32 and out.dtype == out_.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()


# ---- Whether prompts are in the softmax -----------------------------------------------------------------


def order_of_image_tokens(attn, tokens, *prompts):
    return attn(tokens, *prompts)[1][:, 1:tokens.shape[1]].argsort(dim=1)


@given(cases(N_h=1))
def test_with_one_head_prompts_in_the_softmax_do_not_change_the_order_of_image_tokens(case):
    """w̃ of Eq. 14: the prompts' share scales all image tokens' weights by one number."""
    attn = randomised(vit.Attention(case.D, 1), case)
    tokens, P = case.normal('tokens', case.B, 1 + case.M, case.D), case.normal('P', case.N, case.D)
    assert torch.equal(order_of_image_tokens(attn, tokens, P), order_of_image_tokens(attn, tokens))


def test_with_two_heads_they_can():
    """w̃ of Eq. 14: each head spends its own share on the prompts, and so they decide how much each head
    has to say in the mean. This is how P̂^l reaches Ω^l in its own layer."""
    def differs(case):
        attn = randomised(vit.Attention(case.D, case.N_h), case)
        tokens, P = case.normal('tokens', case.B, 1 + case.M, case.D), case.normal('P', case.N, case.D)
        return not torch.equal(order_of_image_tokens(attn, tokens, P), order_of_image_tokens(attn, tokens))

    find(cases(B=1, N_h=2), differs)  # raises NoSuchExample if there is none
