"""3.3 Cross-layer dynamic connection: CDC (Eq. 3 and 4) and dynamic aggregation (Eq. 5 and 6)."""

import pytest
import torch
from hypothesis import given, settings

import oracle
from ivpt import IVPT, Prompts, cdc, cdc_da, psi
from oracle import close
from strategies import METHODS, cases, plain_vit, random_model

fewer = settings(max_examples=settings().max_examples // 2)


# ---- The equations --------------------------------------------------------------------------------------


@given(cases())
def test_cdc_adds_the_previous_layers_prompts_and_the_first_layers_are_its_own(case):
    """Eq. 4. P̂^l = P^l + P^{l-1} and P̂^0 = P^0. Not P̂^{l-1}, which would carry all layers before."""
    P, _ = case.prompts_and_gamma()
    assert torch.equal(cdc(P), torch.stack(oracle.prompts('cdc', P)))


@given(cases())
def test_da_adds_psi_of_the_previous_layers_prompts_and_the_first_layers_are_its_own(case):
    """Eq. 5. P̂^l = P^l + ψ^{l-1}(P^{l-1}) and P̂^0 = P^0. Each γ acts on one layer: γ^l on P̂^{l+1} and no other."""
    P, gamma = case.prompts_and_gamma()
    close(cdc_da(P, gamma), torch.stack(oracle.prompts('cdc', P, gamma)))


@given(cases(L=(2, 4)))
def test_psi_is_the_double_sum_which_is_linear_in_the_prompts_and_in_gamma(case):
    """Eq. 6. ψ(P)_i = Σ_j γ_ij p_j, of one layer or of all at once."""
    (P, gamma), (a, b) = case.prompts_and_gamma(), case.normal('a and b', 2)
    Q, h = case.normal('Q', case.N, case.D), case.normal('h', case.N, case.N)
    close(psi(gamma[0], P[0]), oracle.psi(gamma[0], P[0]))
    close(psi(gamma, P[:-1]), torch.stack([oracle.psi(g, p) for g, p in zip(gamma, P)]))
    close(psi(gamma, a * P[:-1] + b * Q), a * psi(gamma, P[:-1]) + b * psi(gamma, Q))
    close(psi(a * gamma + b * h, Q), a * psi(gamma, Q) + b * psi(h, Q))


@given(cases())
def test_da_with_gamma_the_identity_is_cdc_and_with_gamma_zero_vpt(case):
    """Eq. 5 with γ = I is Eq. 4, "ψ is an identity mapping"; with γ = 0 it is Eq. 2. DA learns which."""
    P, gamma = case.prompts_and_gamma()
    assert torch.equal(cdc_da(P, torch.eye(case.N).double().expand_as(gamma)), cdc(P))
    assert torch.equal(cdc_da(P, 0 * gamma), P)


@given(cases())
def test_prompts_learn_from_the_layer_above_through_gamma_and_gamma_from_there_times_the_prompts_that_it_mixes(case):
    """Eq. 5, backwards: ∂/∂P^l = ∂/∂P̂^l + γ^lᵀ ∂/∂P̂^{l+1} and ∂/∂γ^l = ∂/∂P̂^{l+1} · (P^l)ᵀ."""
    (P, gamma), G = case.prompts_and_gamma(), case.normal('G', case.L, case.N, case.D)
    of_P, of_gamma = oracle.gradients(cdc_da(P.requires_grad_(), gamma.requires_grad_()), [P, gamma], G)
    close(of_P, G + torch.cat([gamma.mT @ G[1:], 0 * G[:1]]))
    close(of_gamma, G[1:] @ P[:-1].mT)


# ---- "eliminates the positional constraints" ------------------------------------------------------------


@given(cases())
def test_gammas_columns_follow_the_order_of_the_previous_prompts_and_its_rows_that_of_the_next(case):
    """Eq. 6. Σ_j γ_ij p_j is a sum, and a sum has no order. Row i of γ belongs to prompt i of the next layer."""
    P, gamma = case.normal('P', case.N, case.D), case.normal('gamma', case.N, case.N)
    order = case.order('order', case.N)
    close(psi(gamma[:, order], P[order]), psi(gamma, P))
    close(psi(gamma[order], P), psi(gamma, P)[order])


@fewer
@given(cases(L=(2, 4), N=(2, 4)))
def test_in_cdc_the_position_of_a_prompt_counts_once_two_layers_disagree(case):
    """Eq. 4 "introduces position biases": all layers in one new order are the same model, one is not."""
    model, order = random_model(case, **METHODS['cdc']), torch.arange(case.N).roll(1)
    logits = model(case.images())
    model.P.data = model.P[:, order]
    close(model(case.images()), logits)
    model.P.data[0] = model.P[0, order]
    assert not torch.allclose(model(case.images()), logits, rtol=0, atol=1e-9)


@fewer
@given(cases())
def test_in_da_every_layers_prompts_can_have_their_own_order(case):
    """Eq. 5. γ's rows follow the order of its own layer, γ's columns that of the previous one."""
    model = random_model(case, **METHODS['cdc_da'])
    logits = model(case.images())
    order = [case.order(f'order {l}', case.N) for l in range(case.L)]
    model.P.data = torch.stack([P[i] for P, i in zip(model.P, order)])
    for l in range(case.L - 1):
        model.gamma.data[l] = model.gamma[l][order[l + 1]][:, order[l]]
    close(model(case.images()), logits)


# ---- The model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', ['cdc', 'cdc_da'])
@given(cases())
def test_cdc_and_da_are_the_literal_concatenation_of_eq_3_in_logits_and_gradients(method, case):
    """Eq. 3. [z_cls^{l+1}, ..., Z^{l+1}] = 𝒯^l([z_cls^l, P̂^l, Z^l]), P̂ by Eq. 4 or 5 and 6."""
    model = random_model(case, **METHODS[method])
    oracle.compare(model, case.images(), case.normal('cotangent', case.B, case.C))


@pytest.mark.parametrize('method', ['vpt', 'cdc', 'cdc_da'])
@fewer
@given(cases())
def test_what_enters_the_layers_is_P_hat_whatever_the_images_show(method, case):
    """Eq. 3. P̂^l "without interference from image noise". In VPT, Eq. 2, it is P^l as it is: "isolated to P^l"."""
    model = random_model(case, **METHODS[method])
    P_hat = oracle.prompts(model.structure, model.P, model.gamma)
    for images in case.images(), 1 - 2 * case.images():
        entered, _ = oracle.watch(model, images)
        close([P for _, P in entered], P_hat)


@fewer
@given(cases())
def test_with_one_layer_vpt_cdc_and_da_are_the_same_model_and_with_more_they_differ(case):
    """Eq. 4 and 5. P̂^0 = P^0: one layer has nothing to connect. With random γ, no two of the three are alike."""
    vpt, cdc, da = (random_model(case, **METHODS[method])(case.images()) for method in ('vpt', 'cdc', 'cdc_da'))
    for a, b in (vpt, cdc), (vpt, da), (cdc, da):
        assert torch.equal(a, b) if case.L == 1 else not torch.allclose(a, b, rtol=0, atol=1e-9)


@fewer
@given(cases())
def test_gamma_starts_as_the_identity_so_that_da_starts_as_cdc(case):
    model = IVPT(plain_vit(case), case.C, Prompts(case.N, aggregation=True))
    assert model.gamma.tolist() == [torch.eye(case.N).tolist()] * (case.L - 1)
    model = model.double()
    assert torch.equal(model.prompts(), cdc(model.P))


@fewer
@given(cases())
def test_under_autocast_P_hat_has_no_rounding_of_its_own_so_da_with_gamma_the_identity_is_cdc_to_the_bit(case):
    """Eq. 5 and 6 are computed in float32, in which P and γ are learned."""
    with_da, without = (random_model(case, **METHODS[name]).float() for name in ('cdc_da', 'cdc'))
    P_hat, images = with_da.prompts(), case.images().float()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(with_da.prompts(), P_hat)
        with_da.gamma.copy_(torch.eye(case.N))
        assert torch.equal(with_da(images), without(images))
