"""3.4 Understanding CDC: attention in CDC is attention in VPT, re-weighted (Eq. 7-13).

On the project's own attention, with random weights and biases. LayerNorm is left out, as in the paper. The last section
takes it back in, and there the factorisation breaks. Everything is for each head by itself.
"""

from dataclasses import replace
from itertools import product
from math import exp, sqrt
from types import SimpleNamespace

import pytest
import torch
from hypothesis import find, given

import oracle
import vit
from ivpt import attention_weight, reweight_cdc, reweight_cdc_da
from oracle import close
from strategies import cases, randomised

cdc_and_da = pytest.mark.parametrize('method', ['cdc', 'cdc_da'])


def drawn(case, method='cdc'):
    """The attention of one layer, the tokens [1, 1 + M, D] that enter it, p^l and p^{l-1} [N, D], γ [N, N], the class
    token's query q [N_h, d], W_K [N_h, d, D], and of a method P̂ [N, D], w and α̃ [N_h, N], Π_j α̃_ij with DA."""
    x = SimpleNamespace(attn=randomised(vit.Attention(case.D, case.N_h), case))
    x.tokens, x.gamma = case.normal('tokens', 1, 1 + case.M, case.D), case.normal('gamma', case.N, case.N)
    x.p, x.p_previous = case.normal('p', case.N, case.D), case.normal('p_previous', case.N, case.D)
    W_Q, W_K, _ = x.attn.qkv.weight.chunk(3)
    q = W_Q @ x.tokens[0, 0] + x.attn.qkv.bias.chunk(3)[0]
    x.q, x.W_K = (y.unflatten(0, (case.N_h, -1)) for y in (q, W_K))
    if method == 'cdc':
        x.P_hat = x.p + x.p_previous
        x.w, x.alpha = reweight_cdc(x.q, x.W_K, x.p, x.p_previous)
    else:
        x.P_hat = x.p + oracle.psi(x.gamma, x.p_previous)
        x.w, alpha = reweight_cdc_da(x.q, x.W_K, x.p, x.p_previous, x.gamma)
        x.alpha = alpha.prod(dim=-1)
    return x


def heads(x, prompts):
    """The class token's weights on z_cls, Z and the prompts, a row for each head: [N_h, 1 + M + N].

    The attention itself tells the mean of the rows alone; here it is checked that these are its rows."""
    _, A = oracle.attention(x.attn, torch.cat([x.tokens, prompts[None]], dim=1))
    close(x.attn(x.tokens, prompts)[1][0], A[0, :, 0].mean(dim=0).detach())
    return A[0, :, 0]


def normalised(w):
    return w / w.sum(dim=-1, keepdim=True)


# ---- VPT, Eq. 7 -----------------------------------------------------------------------------------------

@given(cases())
def test_the_weight_of_a_prompt_is_the_exponential_of_its_scaled_score(case):
    """Eq. 7. w_i ∝ exp(qᵀ W_K p_i / sqrt(D / N_h)), written with two loops."""
    x = drawn(case)
    w = attention_weight(x.q, x.W_K, x.p)
    for h in range(case.N_h):
        for i in range(case.N):
            close(w[h, i], torch.exp(x.q[h] @ x.W_K[h] @ x.p[i] / sqrt(case.D / case.N_h)))


@given(cases())
def test_the_models_weights_on_prompts_are_those_of_eq_7_for_the_bias_of_the_keys_cancels(case):
    """Eq. 7, normalised over the prompts. softmax(qᵀ(k_i + b)) = softmax(qᵀk_i): every key has the same qᵀb."""
    x = drawn(case)
    w = heads(x, x.p)
    close(normalised(w[:, 1 + case.M:]), normalised(attention_weight(x.q, x.W_K, x.p)))
    x.attn.qkv.bias.data[case.D:2 * case.D] = case.normal('another bias', case.D)
    close(heads(x, x.p), w)


@given(cases())
def test_eq_7_to_13_for_all_layers_at_once_equal_a_loop_over_layers(case):
    """Eq. 7-13 are for a layer; with more dimensions in front they are a loop over these."""
    L, N, D, N_h, d = case.L, case.N, case.D, case.N_h, case.d
    shapes = {'q': (N_h, d), 'W_K': (N_h, d, D), 'p': (N, D), 'p_previous': (N, D), 'gamma': (N, N)}
    *most, gamma = (0.5 * case.normal(name, L, *shape) for name, shape in shapes.items())
    for l in range(L):
        one = [x[l] for x in most]
        close([x[l] for x in reweight_cdc(*most)], [*reweight_cdc(*one)])
        close([x[l] for x in reweight_cdc_da(*most, gamma)], [*reweight_cdc_da(*one, gamma[l])])


# ---- CDC, Eq. 8-10, and DA, Eq. 11-13 -------------------------------------------------------------------

def test_eq_10_gives_05_89_05_on_the_blackboard():
    """q = (1, 0), W_K = I, d = 2. The previous layer's prompts point at the query by -2, 3 and 0."""
    q, W_K = torch.tensor([[1.0, 0.0]]), torch.eye(2).unsqueeze(0)
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    p_previous = torch.tensor([[-2.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    w, alpha = reweight_cdc(q, W_K, p, p_previous)
    assert [f'{x:.2f}' for x in normalised(w)[0]] == ['0.58', '0.28', '0.14']
    assert [f'{x:.2f}' for x in alpha[0]] == ['0.24', '8.34', '1.00']
    assert [f'{x:.2f}' for x in normalised(w * alpha)[0]] == ['0.05', '0.89', '0.05']


@given(cases())
def test_alpha_is_the_weight_of_a_previous_prompt_by_itself_and_in_da_there_is_one_for_each_pair(case):
    """Eq. 9. α̃_i = exp(qᵀ W_K p_i^{l-1} / sqrt(D / N_h)), and Eq. 12. α̃_ij is that of γ_ij p_j^{l-1}; w is VPT's."""
    x = drawn(case)
    close([x.w, x.alpha], [attention_weight(x.q, x.W_K, p) for p in (x.p, x.p_previous)])
    w, alpha = reweight_cdc_da(x.q, x.W_K, x.p, x.p_previous, x.gamma)
    close(w, x.w)
    for i in range(case.N):
        for j in range(case.N):
            mixed = x.gamma[i, j] * x.p_previous[j:j + 1]  # [1, D]
            close(alpha[:, i, j], attention_weight(x.q, x.W_K, mixed)[:, 0])


@cdc_and_da
@given(cases())
def test_attention_in_cdc_is_attention_in_vpt_reweighted_among_the_prompts_and_in_the_whole_sequence(method, case):
    """Eq. 8 = Eq. 9 and Eq. 11 = Eq. 12, not yet normalised: the weight of the sum is the product of the weights.
    Eq. 10. w̃_i ∝ w_i α̃_i, and Eq. 13. w̃_i ∝ w_i Π_j α̃_ij: normalised over the prompts, and in the whole sequence
    with exp(qᵀ W_K z_t / sqrt(d)) in the sum, t over z_cls and Z. With nothing but softmaxed weights: VPT's row, times
    α̃ at the prompts, normalised. AR reads the mean over heads (Eq. 14): first re-weight, then average."""
    x = drawn(case, method)
    close(attention_weight(x.q, x.W_K, x.P_hat), x.w * x.alpha)
    w = heads(x, x.P_hat)
    close(normalised(w[:, 1 + case.M:]), normalised(x.w * x.alpha))
    others = attention_weight(x.q, x.W_K, x.tokens[0])  # [N_h, 1 + M]
    close(w, normalised(torch.cat([others, x.w * x.alpha], dim=1)))
    close(w, normalised(heads(x, x.p) * torch.cat([torch.ones_like(others), x.alpha], dim=1)))


def test_da_with_gamma_off_its_diagonal_gives_weights_that_cdc_cannot_give():
    """Eq. 13 against Eq. 10, "more flexible". One head, q = W_K = 1, two prompts one number wide, p^{l-1} = (1, 0).

    CDC gives prompt i the term exp(s_i p_i^{l-1}): with any scales s_i and in either order, one of the two is 1. In DA
    both can take the first previous prompt, and neither term is 1."""
    q, W_K, p, p_previous = torch.ones(1, 1), torch.ones(1, 1, 1), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    _, alpha = reweight_cdc_da(q, W_K, p, p_previous, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert alpha.prod(dim=-1).gt(1).all()
    for order, scale in product([[0, 1], [1, 0]], [-2, 0, 1, 3]):
        _, alpha = reweight_cdc(q, W_K, p, scale * p_previous[order])
        assert alpha.eq(1).any()


# ---- What the section leaves out ------------------------------------------------------------------------

def test_the_mean_over_heads_is_not_itself_reweighted():
    """Eq. 10 for the mean over heads would be w̃_i ∝ mean(w_i) mean(α̃_i). One head may be, two are not."""
    def factorises(case):
        x = drawn(case)
        vpt, cdc = (x.attn(x.tokens, p)[1][0, 1 + case.M:] for p in (x.p, x.P_hat))
        return torch.allclose(normalised(cdc), normalised(vpt * x.alpha.mean(dim=0)), rtol=1e-6)

    case = find(cases(N_h=2, N=2), lambda case: not factorises(case))  # NoSuchExample if there is none
    assert factorises(replace(case, N_h=1, d=case.D))


def test_with_layer_norm_the_factorisation_fails():
    """3.4: "we temporarily disregard the notation for layer normalization". The price, in one example:

    take p^{l-1} = p^l. Without LayerNorm CDC squares the ratio of two weights, as Eq. 10 says. With it,
    LN(p + p) = LN(p): the previous layer's prompt is there, its α̃ is not 1, and CDC changes nothing."""
    layer = vit.Layer(2, vit.Attention(2, 1)).double()
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
