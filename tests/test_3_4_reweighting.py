"""3.4 Understanding CDC: attention in CDC is attention in VPT, re-weighted (Eq. 7-13).

On the project's own attention, with random weights and biases. LayerNorm is left out, as in the paper, except
in the last section, where it comes back and breaks the factorisation. Everything is for each head by itself.
"""

from dataclasses import replace
from itertools import permutations
from math import exp, sqrt

import torch
from hypothesis import find, given
from hypothesis import strategies as st

import oracle
import vit
from ivpt import attention_weight, reweight_cdc, reweight_cdc_da
from oracle import close
from strategies import cases, random_layer, randomised


def drawn(case):
    """The attention of one layer, the tokens [1, 1 + M, D] that enter it, and p^l and p^{l-1} [N, D]."""
    attn = randomised(vit.Attention(case.D, case.N_h), case)
    p, p_previous = case.normal('p', case.N, case.D), case.normal('p_previous', case.N, case.D)
    return attn, case.normal('tokens', 1, 1 + case.M, case.D), p, p_previous


def query_and_keys(attn, tokens):
    """The class token's query q [N_h, d] and W_K [N_h, d, D], cut out of the one projection of all."""
    W_Q, W_K, _ = attn.qkv.weight.chunk(3)
    q = W_Q @ tokens[0, 0] + attn.qkv.bias.chunk(3)[0]
    return q.unflatten(0, (attn.N_h, -1)), W_K.unflatten(0, (attn.N_h, -1))


def heads(attn, tokens, prompts):
    """The class token's weights on z_cls, Z and the prompts, a row for each head: [N_h, 1 + M + N].

    The attention itself tells the mean of the rows alone; here it is checked that these are its rows."""
    _, A = oracle.attention(attn, torch.cat([tokens, prompts[None]], dim=1))
    close(attn(tokens, prompts)[1][0], A[0, :, 0].mean(dim=0).detach())
    return A[0, :, 0]


def normalised(w):
    return w / w.sum(dim=-1, keepdim=True)


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-10)


def unseen(p, q, W_K):
    """The part of the prompts p [N, D] that no head's query sees: head h sees along W_Kᵀ q, [D]."""
    directions = torch.einsum('hdD,hd->hD', W_K, q)
    return p - p @ torch.linalg.pinv(directions) @ directions


def gammas(case):
    return case.normal('gamma', case.N, case.N)


# ---- VPT, Eq. 7 -----------------------------------------------------------------------------------------


@given(cases())
def test_the_weight_of_a_prompt_is_the_exponential_of_its_scaled_score(case):
    """Eq. 7. w_i ∝ exp(qᵀ W_K p_i / sqrt(D / N_h)), written with two loops."""
    attn, tokens, p, _ = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    w = attention_weight(q, W_K, p)
    for h in range(case.N_h):
        for i in range(case.N):
            close(w[h, i], torch.exp(q[h] @ W_K[h] @ p[i] / sqrt(case.D / case.N_h)))


@given(cases())
def test_the_models_weights_on_prompts_are_those_of_eq_7(case):
    """Eq. 7, normalised over the prompts: the model's keys have a bias, the equation's have none."""
    attn, tokens, p, _ = drawn(case)
    w = attention_weight(*query_and_keys(attn, tokens), p)
    close(normalised(heads(attn, tokens, p)[:, 1 + case.M:]), normalised(w))


@given(cases())
def test_the_bias_of_the_keys_cancels(case):
    """softmax(qᵀ(k_i + b)) = softmax(qᵀk_i): every key has the same qᵀb."""
    attn, tokens, p, _ = drawn(case)
    _, w = attn(tokens, p)
    attn.qkv.bias.data[case.D:2 * case.D] = case.normal('another bias', case.D)
    close(attn(tokens, p)[1], w)


@given(cases())
def test_all_layers_at_once_are_one_after_the_other(case):
    """Eq. 7-13 are for a layer; with more dimensions in front they are a loop over these."""
    L, N, D, N_h, d = case.L, case.N, case.D, case.N_h, case.d
    shapes = {'q': (N_h, d), 'W_K': (N_h, d, D), 'p': (N, D), 'p_previous': (N, D), 'gamma': (N, N)}
    *most, gamma = (0.5 * case.normal(name, L, *shape) for name, shape in shapes.items())
    for l in range(L):
        one = [x[l] for x in most]
        close(reweight_cdc(*most)[0][l], reweight_cdc(*one)[0])
        close(reweight_cdc(*most)[1][l], reweight_cdc(*one)[1])
        close(reweight_cdc_da(*most, gamma)[1][l], reweight_cdc_da(*one, gamma[l])[1])


# ---- CDC, Eq. 8-10 --------------------------------------------------------------------------------------


@given(cases())
def test_alpha_is_what_the_previous_prompt_would_weigh_here_by_itself(case):
    """Eq. 9. α̃_i = exp(qᵀ W_K p_i^{l-1} / sqrt(D / N_h)), and w_i is VPT's."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    w, alpha = reweight_cdc(q, W_K, p, p_previous)
    close(w, attention_weight(q, W_K, p))
    close(alpha, attention_weight(q, W_K, p_previous))


@given(cases())
def test_the_weight_of_the_sum_is_the_product_of_the_weights(case):
    """Eq. 8 = Eq. 9, before anything is normalised."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    w, alpha = reweight_cdc(q, W_K, p, p_previous)
    close(attention_weight(q, W_K, p + p_previous), w * alpha)


@given(cases())
def test_attention_in_cdc_is_attention_in_vpt_reweighted_among_the_prompts(case):
    """Eq. 10. w̃_i ∝ w_i α̃_i, normalised over the prompts."""
    attn, tokens, p, p_previous = drawn(case)
    w, alpha = reweight_cdc(*query_and_keys(attn, tokens), p, p_previous)
    close(normalised(heads(attn, tokens, p + p_previous)[:, 1 + case.M:]), normalised(w * alpha))


@given(cases())
def test_over_the_whole_sequence_the_normaliser_of_cdc_has_the_class_and_image_tokens_in_it(case):
    """Eq. 10. w̃_i = w_i α̃_i / (Σ_j w_j α̃_j + Σ_t exp(qᵀ W_K z_t / sqrt(d))), t over z_cls and Z."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    w, alpha = reweight_cdc(q, W_K, p, p_previous)
    others = attention_weight(q, W_K, tokens[0])  # [N_h, 1 + M]
    normaliser = (w * alpha).sum(-1, keepdim=True) + others.sum(-1, keepdim=True)
    close(heads(attn, tokens, p + p_previous), torch.cat([others, w * alpha], dim=1) / normaliser)


@given(cases())
def test_cdcs_row_of_attention_is_vpts_row_times_alpha_at_the_prompts_and_1_elsewhere(case):
    """Eq. 10 with nothing but softmaxed weights: VPT's row, re-weighted, sums to 1 again."""
    attn, tokens, p, p_previous = drawn(case)
    _, alpha = reweight_cdc(*query_and_keys(attn, tokens), p, p_previous)
    factor = torch.cat([torch.ones(case.N_h, 1 + case.M).double(), alpha], dim=1)
    close(heads(attn, tokens, p + p_previous), normalised(heads(attn, tokens, p) * factor))


@given(cases())
def test_alpha_is_1_and_attention_vpts_exactly_when_cdc_adds_nothing_that_the_query_can_see(case):
    """Eq. 10. α̃_i = 1 for all i just when qᵀ W_K p_i^{l-1} = 0 for all i, in every head."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    for previous in p_previous, unseen(p_previous, q, W_K):
        score = torch.einsum('hd,hdD,iD->hi', q, W_K, previous)
        _, alpha = reweight_cdc(q, W_K, p, previous)
        vpt, cdc = heads(attn, tokens, p), heads(attn, tokens, p + previous)
        nothing_to_see = same(score, torch.zeros_like(score))
        assert nothing_to_see == same(alpha, torch.ones_like(alpha)) == same(cdc, vpt)
        assert nothing_to_see == (previous is not p_previous)  # so that both were tried


@given(cases())
def test_what_the_query_cannot_see_still_reaches_the_values(case):
    """3.4 is about weights. The values are W_V (p_i^l + p_i^{l-1}), so the output changes all the same."""
    attn, tokens, p, p_previous = drawn(case)
    previous = unseen(p_previous, *query_and_keys(attn, tokens))
    (z_vpt, w_vpt), (z_cdc, w_cdc) = attn(tokens[:, :1], p), attn(tokens[:, :1], p + previous)
    assert same(w_cdc, w_vpt) and not same(z_cdc, z_vpt)


@given(cases())
def test_a_previous_prompt_shared_by_all_moves_weight_to_or_from_the_prompts_but_not_among_them(case):
    """Eq. 10, "∝": a common α̃ cancels among the prompts and does not in the whole sequence."""
    attn, tokens, p, p_previous = drawn(case)
    _, alpha = reweight_cdc(*query_and_keys(attn, tokens), p, p_previous[:1])
    vpt, cdc = (heads(attn, tokens, x)[:, 1 + case.M:] for x in (p, p + p_previous[:1]))
    close(normalised(cdc), normalised(vpt))
    assert torch.equal(cdc.sum(dim=1) > vpt.sum(dim=1), alpha[:, 0] > 1)


# ---- DA, Eq. 11-13 --------------------------------------------------------------------------------------


@given(cases())
def test_alpha_of_da_is_a_weight_for_each_pair_of_prompts(case):
    """Eq. 12. α̃_ij = exp(qᵀ W_K γ_ij p_j^{l-1} / sqrt(D / N_h)), written with three loops."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    gamma = gammas(case)
    w, alpha = reweight_cdc_da(q, W_K, p, p_previous, gamma)
    close(w, attention_weight(q, W_K, p))
    for h in range(case.N_h):
        for i in range(case.N):
            for j in range(case.N):
                score = q[h] @ W_K[h] @ (gamma[i, j] * p_previous[j])
                close(alpha[h, i, j], torch.exp(score / sqrt(case.D / case.N_h)))


@given(cases())
def test_the_weight_of_the_aggregated_sum_is_the_product_of_the_weights(case):
    """Eq. 11 = Eq. 12, before anything is normalised."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    w, alpha = reweight_cdc_da(q, W_K, p, p_previous, gammas(case))
    close(attention_weight(q, W_K, p + oracle.psi(gammas(case), p_previous)), w * alpha.prod(dim=-1))


@given(cases())
def test_attention_in_da_is_attention_in_vpt_reweighted_among_the_prompts(case):
    """Eq. 13. w̃_i ∝ w_i Π_j α̃_ij, normalised over the prompts."""
    attn, tokens, p, p_previous = drawn(case)
    P_hat = p + oracle.psi(gammas(case), p_previous)
    w, alpha = reweight_cdc_da(*query_and_keys(attn, tokens), p, p_previous, gammas(case))
    close(normalised(heads(attn, tokens, P_hat)[:, 1 + case.M:]), normalised(w * alpha.prod(dim=-1)))


@given(cases())
def test_over_the_whole_sequence_the_normaliser_of_da_has_the_class_and_image_tokens_in_it(case):
    """Eq. 13. w̃_i = w_i Π_j α̃_ij / (Σ_i w_i Π_j α̃_ij + Σ_t exp(qᵀ W_K z_t / sqrt(d)))."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    w, alpha = reweight_cdc_da(q, W_K, p, p_previous, gammas(case))
    others, w_alpha = attention_weight(q, W_K, tokens[0]), w * alpha.prod(dim=-1)
    normaliser = w_alpha.sum(-1, keepdim=True) + others.sum(-1, keepdim=True)
    P_hat = p + oracle.psi(gammas(case), p_previous)
    close(heads(attn, tokens, P_hat), torch.cat([others, w_alpha], dim=1) / normaliser)


@given(cases())
def test_das_row_of_attention_is_vpts_row_times_the_alphas_at_the_prompts_and_1_elsewhere(case):
    """Eq. 13 with nothing but softmaxed weights."""
    attn, tokens, p, p_previous = drawn(case)
    _, alpha = reweight_cdc_da(*query_and_keys(attn, tokens), p, p_previous, gammas(case))
    factor = torch.cat([torch.ones(case.N_h, 1 + case.M).double(), alpha.prod(dim=-1)], dim=1)
    P_hat = p + oracle.psi(gammas(case), p_previous)
    close(heads(attn, tokens, P_hat), normalised(heads(attn, tokens, p) * factor))


@given(cases())
def test_with_gamma_diagonal_da_reweights_as_cdc_with_scaled_prompts(case):
    """Eq. 13 is Eq. 10 for p_i^{l-1} scaled by γ_ii; with γ = I it is Eq. 10 itself."""
    attn, tokens, p, p_previous = drawn(case)
    q, W_K = query_and_keys(attn, tokens)
    scale = case.normal('scale', case.N)
    for diagonal in scale, torch.ones_like(scale):
        _, alpha = reweight_cdc_da(q, W_K, p, p_previous, torch.diag(diagonal))
        close(alpha.prod(dim=-1), reweight_cdc(q, W_K, p, diagonal[:, None] * p_previous)[1])


def test_gamma_off_its_diagonal_reweights_as_no_cdc_with_the_same_prompts_can_in_any_order_or_scale():
    """Eq. 13 against Eq. 10, "more flexible". One head, q = W_K = 1, two prompts one number wide.

    CDC gives prompt i the term exp(s_i p_i^{l-1}): with any scales s_i any term, but 1 alone where the
    previous prompt is 0. So if DA's term is not 1 there, in either order, CDC cannot follow. The simplest
    case: of p^{l-1} = (1, 0) both prompts take the first, which CDC can give to one of them only."""
    q, W_K, p = torch.ones(1, 1).double(), torch.ones(1, 1, 1).double(), torch.zeros(2, 1).double()
    pairs = st.lists(st.integers(-2, 2), min_size=2, max_size=2)

    def out_of_reach(example):
        p_previous, gamma = (torch.tensor(x).double() for x in example)
        _, alpha = reweight_cdc_da(q, W_K, p, p_previous[:, None], gamma)
        followed = alpha.prod(dim=-1)[0].isclose(torch.ones(2).double())  # [2], with a term of 1
        return not any((followed | (p_previous[list(order)] != 0)).all() for order in permutations(range(2)))

    p_previous, gamma = find(st.tuples(pairs, st.lists(pairs, min_size=2, max_size=2)), out_of_reach)
    diagonal = [[gamma[0][0], 0], [0, gamma[1][1]]]
    assert not out_of_reach((p_previous, diagonal))  # it is what stands off the diagonal that does it
    assert out_of_reach(([1, 0], [[1, 0], [1, 0]]))


# ---- What the section leaves out ------------------------------------------------------------------------


@given(cases())
def test_the_mean_over_heads_is_the_mean_of_the_reweighted_heads(case):
    """Eq. 10 is true of a head, and AR reads the mean over heads (Eq. 14): re-weight first, then average."""
    attn, tokens, p, p_previous = drawn(case)
    _, alpha = reweight_cdc(*query_and_keys(attn, tokens), p, p_previous)
    factor = torch.cat([torch.ones(case.N_h, 1 + case.M).double(), alpha], dim=1)
    reweighted = normalised(heads(attn, tokens, p) * factor)
    close(attn(tokens, p + p_previous)[1][0], reweighted.mean(dim=0).detach())


def test_the_mean_over_heads_is_not_itself_reweighted():
    """Eq. 10 for the mean over heads would be w̃_i ∝ mean(w_i) mean(α̃_i). One head may be, two are not."""
    def factorises(case):
        attn, tokens, p, p_previous = drawn(case)
        _, alpha = reweight_cdc(*query_and_keys(attn, tokens), p, p_previous)
        vpt, cdc = (attn(tokens, x)[1][0, 1 + case.M:] for x in (p, p + p_previous))
        return torch.allclose(normalised(cdc), normalised(vpt * alpha.mean(dim=0)), rtol=1e-6)

    case = find(cases(N_h=2, N=2), lambda case: not factorises(case))  # NoSuchExample if there is none
    assert factorises(replace(case, N_h=1, d=case.D))


@given(cases())
def test_in_a_layer_eq_7_is_true_of_what_enters_W_K(case):
    """With LayerNorm, w_i ∝ exp(qᵀ W_K LN(p̂_i) / sqrt(D / N_h)) and q is LN(z_cls)'s."""
    layer, (_, tokens, p, _) = random_layer(case), drawn(case)
    normed, p = layer.norm1(tokens), layer.norm1(p)
    weights = attention_weight(*query_and_keys(layer.attn, normed), torch.cat([normed[0], p]))
    close(layer(tokens, drawn(case)[2])[1][0], normalised(weights).mean(dim=0).detach())


def test_with_layer_norm_the_factorisation_fails():
    """3.4: "we temporarily disregard the notation for layer normalization". The price, in one example:

    take p^{l-1} = p^l. Without LayerNorm CDC squares the ratio of two weights, as Eq. 10 says. With it,
    LN(p + p) = LN(p): the previous layer's prompt is there, its α̃ is not 1, and CDC changes nothing."""
    layer = vit.Layer(2, 1).double()
    layer.attn.qkv.weight.data = torch.eye(2).repeat(3, 1).double()  # W_Q = W_K = W_V = I
    layer.attn.qkv.bias.data.zero_()
    z_cls, p = torch.tensor([[[1.0, -1.0]]]).double(), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()

    def ratio(attend, prompts):
        w = attend(z_cls, prompts)[1][0]  # of z_cls and both prompts
        return (w[1] / w[2]).item()

    vpt = exp(4 / sqrt(2))
    close(ratio(layer.attn, p), vpt)
    close(ratio(layer.attn, p + p), vpt ** 2)
    assert abs(ratio(layer, p) / vpt - 1) < 1e-4  # LN leaves ±1 alone, up to its eps
    assert abs(ratio(layer, p + p) / vpt - 1) < 1e-4
