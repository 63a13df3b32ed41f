"""3.5 Attentive reinforcement: the choice of image tokens (Eq. 14) and what they are given (Eq. 15)."""

from pathlib import Path

import pytest
import torch
from hypothesis import find, given, settings

import oracle
import vit
from ivpt import IVPT, Prompts, look, reinforce_, top_k
from strategies import METHODS, OTHERS, Case, cases, plain_vit, random_model, randomised

NANO = Path(__file__).resolve().parents[1] / 'experiments' / 'nano.pth'


def weights(case):
    """Positive weights [B, M], no two alike."""
    return case.normal('w', case.B, case.M).softmax(dim=1)


# ---- The choice, Eq. 14 ---------------------------------------------------------------------------------

@given(cases())
def test_Omega_lists_the_positions_of_the_k_largest_in_descending_order(case):
    """Eq. 14. Ω = Topk(w̃, k): "the descending order indices of the largest k elements". k = M leaves out none."""
    for k in case.k, case.M:
        assert top_k(weights(case), k).tolist() == oracle.top_k(weights(case), k)


@given(cases())
def test_with_equal_weights_k_positions_with_the_largest_weights_are_chosen(case):
    """Eq. 14. Which of two equal weights is chosen is open; k places are, and they have the k largest."""
    w = case.integers('w', 3, case.B, case.M)
    for row, Omega in zip(w, top_k(w, case.k).tolist()):
        assert len(set(Omega)) == case.k
        assert row[Omega].tolist() == sorted(row.tolist(), reverse=True)[:case.k]


# ---- Reinforcement, Eq. 15 ------------------------------------------------------------------------------

@given(cases())
def test_tokens_in_Omega_change_by_P_re_in_order_of_saliency_and_no_other_by_a_bit_and_none_is_copied(case):
    """Eq. 15. Z̃[Ω] = Z[Ω] + P_re: the r-th most salient token gets the r-th row. Z̃ lies where Z lay. Backwards, row r
    gets the sum of what arrives at each image's r-th token; Z gets what arrives at Z̃."""
    Omega, Z = top_k(weights(case), case.k), case.normal('Z', case.B, case.M, case.D).requires_grad_()
    P_re, place = case.normal('P_re', case.k, case.D).requires_grad_(), Z.clone()
    Z_tilde, literal = reinforce_(place, Omega, P_re), oracle.reinforce(Z, Omega.tolist(), P_re)
    assert Z_tilde.data_ptr() == place.data_ptr()
    assert torch.equal(Z_tilde, literal)
    oracle.compare_gradients(Z_tilde, literal, [Z, P_re], case.normal('G', *Z.shape))


# ---- In the model ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('method', ['cdc_ar', 'ivpt'])
def test_at_real_sizes_in_float32_the_model_is_the_literal_form_too(method):
    """N, k, L and M of the paper, D of a ViT-Tiny. What stops or rounds at such sizes alone shows here."""
    case = Case(B=1, L=12, N=50, M=196, N_h=3, d=64, k=20, C=5, seed=1)
    model, images = random_model(case, **METHODS[method]).float(), case.images().float()
    seen = look(model, images)
    with torch.no_grad():
        expected = oracle.ivpt(model, images)
    assert seen['Omega'].tolist() == expected.Omega
    for name in 'P_hat', 'w', 'logits':
        literal = getattr(expected, name)
        assert seen[name].dtype == torch.float32
        torch.testing.assert_close(seen[name], literal, rtol=1e-4, atol=1e-5 * literal.abs().max().item())


@settings(max_examples=settings().max_examples // 2)
@given(cases())
def test_with_P_re_zero_the_model_is_the_one_without_reinforcement_and_so_ivpt_starts_as_cdc(case):
    """Eq. 15 with P_re = 0 is Z̃ = Z. As built, γ = I and P_re = 0, of which every row still receives a gradient."""
    model, da, cdc = (random_model(case, **METHODS[method]) for method in ('ivpt', 'cdc_da', 'cdc'))
    built = IVPT(plain_vit(case), case.C, Prompts(case.N, case.k, aggregation=True, reinforcement='topk')).double()
    assert built.P_re.count_nonzero() == 0
    model.P_re.data = built.P_re.data
    logits = model(case.images())
    assert torch.equal(logits, da(case.images()))
    grad, = oracle.gradients(logits, [model.P_re], case.normal('cotangent', case.B, case.C))
    assert grad.ne(0).any(dim=2).all()
    model.gamma.data = built.gamma.data
    assert torch.equal(model(case.images()), cdc(case.images()))


@pytest.mark.parametrize('method', METHODS | OTHERS)
def test_attention_weights_that_are_not_read_are_not_computed(method, monkeypatch):
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
def test_the_model_with_k_0_is_the_model_without_reinforcement(aggregation):
    """Figure 5 begins with k = 0."""
    models, images = [], torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for k, reinforcement in (0, 'topk'), (10, 'none'):
        torch.manual_seed(0)
        models.append(IVPT(vit.ViT(4, 2, (6, 3, 2)), 3, Prompts(2, k, 'cdc', aggregation, reinforcement)))
    zero, without = models
    assert zero.P_re is None and zero.state_dict().keys() == without.state_dict().keys()
    assert torch.equal(zero(images), without(images)) and look(zero, images)['Omega'] is None


# ---- Number formats -------------------------------------------------------------------------------------

def test_the_weights_of_eq_14_are_in_float32_under_autocast(monkeypatch):
    """Ω follows the order of w̃, and of many tokens that matter little the weights are one number in bfloat16. So it is
    in the last layer, which Figure 7 shows and where the image tokens are context."""
    rows, first_row = [], vit.Attention.first_row

    def recorded(attn, q, k):
        rows.append((q, k, first_row(attn, q, k)))
        return rows[-1][-1]
    monkeypatch.setattr(vit.Attention, 'first_row', recorded)
    torch.manual_seed(0)
    backbone = vit.build('vit_nano_patch8_48', NANO)
    with torch.autocast('cpu', torch.bfloat16):
        look(IVPT(backbone, 9, Prompts(10, 10, reinforcement='topk')), torch.randn(4, 3, 48, 48))
    assert len(rows) == 6
    for q, k, w in rows:
        assert q.dtype == k.dtype == torch.bfloat16 and w.dtype == torch.float32
        exact = first_row(backbone.blocks[0].attn, q.double(), k.double())
        torch.testing.assert_close(w.double(), exact, rtol=1e-5, atol=1e-7)


# ---- Whether prompts are in the softmax -----------------------------------------------------------------

def prompts_change_the_order_of_image_tokens(case):
    """By w̃ of an attention, with prompts in its softmax and without."""
    attn = randomised(vit.Attention(case.D, case.N_h), case)
    tokens, P = case.normal('tokens', case.B, 1 + case.M, case.D), case.normal('P', case.N, case.D)
    with_P, without = (w[:, 1:1 + case.M].argsort(dim=1) for _, w in (attn(tokens, P), attn(tokens)))
    return not torch.equal(with_P, without)


@given(cases(N_h=1))
def test_with_one_head_prompts_in_the_softmax_do_not_change_the_order_of_image_tokens(case):
    """w̃ of Eq. 14: the prompts' share scales all image tokens' weights by one number."""
    assert not prompts_change_the_order_of_image_tokens(case)


def test_with_two_heads_prompts_in_the_softmax_can_change_the_order_of_image_tokens():
    """w̃ of Eq. 14: each head spends its own share on the prompts, and so they decide how much each head
    has to say in the mean. This is how P̂^l reaches Ω^l in its own layer."""
    find(cases(B=1, N_h=2), prompts_change_the_order_of_image_tokens)  # raises NoSuchExample if there is none
