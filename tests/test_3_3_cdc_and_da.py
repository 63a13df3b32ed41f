"""3.3 Cross-layer dynamic connection: CDC (Eq. 3 and 4) and dynamic aggregation (Eq. 5 and 6)."""

import pytest
import torch
from hypothesis import given

import oracle
from ivpt import IVPT, cdc, cdc_da, psi
from oracle import close
from strategies import METHODS, cases, plain_vit, random_model

every_structure = pytest.mark.parametrize('method', ['vpt', 'cdc', 'cdc_da'])


def prompts_and_gamma(case):
    """P [L, N, D] and gamma [L-1, N, N]."""
    return case.normal('P', case.L, case.N, case.D), case.normal('gamma', case.L - 1, case.N, case.N)


# ---- The equations --------------------------------------------------------------------------------------


@given(cases())
def test_cdc_adds_the_previous_layers_prompts(case):
    """Eq. 4. P̂^l = P^l + P^{l-1}."""
    P, _ = prompts_and_gamma(case)
    for l in range(1, case.L):
        assert torch.equal(cdc(P)[l], P[l] + P[l - 1])


@given(cases())
def test_da_adds_psi_of_the_previous_layers_prompts(case):
    """Eq. 5. P̂^l = P^l + ψ^{l-1}(P^{l-1})."""
    P, gamma = prompts_and_gamma(case)
    for l in range(1, case.L):
        close(cdc_da(P, gamma)[l], P[l] + oracle.psi(gamma[l - 1], P[l - 1]))


@given(cases(L=(2, 4)))
def test_psi_is_the_double_sum(case):
    """Eq. 6. ψ(P)_i = Σ_j γ_ij p_j, of one layer or of all at once."""
    P, gamma = prompts_and_gamma(case)
    close(psi(gamma[0], P[0]), oracle.psi(gamma[0], P[0]))
    close(psi(gamma, P[:-1]), torch.stack([oracle.psi(g, p) for g, p in zip(gamma, P)]))


@given(cases())
def test_psi_is_linear_in_the_prompts_and_in_gamma(case):
    """Eq. 6. ψ(a P + b Q) = a ψ(P) + b ψ(Q), and the same for γ."""
    P, Q = case.normal('P', case.N, case.D), case.normal('Q', case.N, case.D)
    g, h = case.normal('g', case.N, case.N), case.normal('h', case.N, case.N)
    a, b = case.normal('a and b', 2)
    close(psi(g, a * P + b * Q), a * psi(g, P) + b * psi(g, Q))
    close(psi(a * g + b * h, P), a * psi(g, P) + b * psi(h, P))


@given(cases())
def test_da_with_gamma_the_identity_is_cdc(case):
    """Eq. 5 with γ = I is Eq. 4: "ψ is an identity mapping"."""
    P, _ = prompts_and_gamma(case)
    assert torch.equal(cdc_da(P, torch.eye(case.N).double().expand(case.L - 1, -1, -1)), cdc(P))


@given(cases())
def test_da_with_gamma_zero_is_vpt(case):
    """Eq. 5 with γ = 0 is Eq. 2: DA has CDC and VPT in it, and learns which."""
    P, gamma = prompts_and_gamma(case)
    assert torch.equal(cdc_da(P, 0 * gamma), P)


@given(cases())
def test_the_first_layers_prompts_are_its_own(case):
    """Eq. 4 and 5. P̂^0 = P^0."""
    P, gamma = prompts_and_gamma(case)
    assert torch.equal(cdc(P)[0], P[0])
    assert torch.equal(cdc_da(P, gamma)[0], P[0])


@given(cases())
def test_prompts_depend_on_their_own_and_the_previous_layer_and_on_no_other(case):
    """Eq. 4 and 5. P̂^l has P^l and P^{l-1} in it: not P̂^{l-1}, which would carry all layers before."""
    P, gamma = prompts_and_gamma(case)
    for m in range(case.L):
        changed = P.clone()
        changed[m] = case.normal('changed', case.N, case.D)
        for connect in cdc, lambda P: cdc_da(P, gamma):
            depends = (connect(changed) != connect(P)).any(dim=2).any(dim=1)  # [L]
            assert depends.nonzero().flatten().tolist() == [l for l in (m, m + 1) if l < case.L]


@given(cases(L=(2, 4)))
def test_each_gamma_acts_on_one_layer(case):
    """Eq. 5. γ^l enters P̂^{l+1} and no other."""
    P, gamma = prompts_and_gamma(case)
    for m in range(case.L - 1):
        changed = gamma.clone()
        changed[m] = case.normal('changed', case.N, case.N)
        depends = (cdc_da(P, changed) != cdc_da(P, gamma)).any(dim=2).any(dim=1)
        assert depends.nonzero().flatten().tolist() == [m + 1]


@given(cases())
def test_prompts_learn_from_the_layer_above_through_gamma_transposed(case):
    """Eq. 5, backwards: the gradient of P^l is P̂^l's, plus γ^lᵀ times P̂^{l+1}'s."""
    (P, gamma), G = prompts_and_gamma(case), case.normal('G', case.L, case.N, case.D)
    P.requires_grad_()
    grad, = oracle.gradients(cdc_da(P, gamma), [P], G)
    for l in range(case.L):
        close(grad[l], G[l] + gamma[l].T @ G[l + 1] if l + 1 < case.L else G[l])


# ---- "eliminates the positional constraints" ------------------------------------------------------------


@given(cases())
def test_permuting_the_previous_prompts_together_with_gammas_columns_changes_nothing(case):
    """Eq. 6. Σ_j γ_ij p_j is a sum, and a sum has no order."""
    P, gamma = case.normal('P', case.N, case.D), case.normal('gamma', case.N, case.N)
    order = case.order('order', case.N)
    close(psi(gamma[:, order], P[order]), psi(gamma, P))


@given(cases())
def test_permuting_gammas_rows_permutes_the_result(case):
    """Eq. 6. Row i of γ belongs to prompt i of the next layer."""
    P, gamma = case.normal('P', case.N, case.D), case.normal('gamma', case.N, case.N)
    order = case.order('order', case.N)
    close(psi(gamma[order], P), psi(gamma, P)[order])


@given(cases(L=(2, 4), N=(2, 4)))
def test_in_cdc_the_position_of_a_prompt_counts_once_two_layers_disagree(case):
    """Eq. 4 "introduces position biases": all layers in one new order are the same model, one is not."""
    model, order = random_model(case, **METHODS['cdc']), torch.arange(case.N).roll(1)
    logits = model(case.images())
    model.P.data = model.P[:, order]
    close(model(case.images()), logits)
    model.P.data[0] = model.P[0, order]
    assert not torch.allclose(model(case.images()), logits, rtol=0, atol=1e-9)


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


@every_structure
@given(cases())
def test_what_enters_the_layers_is_P_hat_whatever_the_images_show(method, case):
    """Eq. 3. P̂^l "without interference from image noise": no image has a part in it."""
    model = random_model(case, **METHODS[method])
    P_hat = oracle.prompts(model.structure, model.P, model.gamma)
    for images in case.images(), 1 - 2 * case.images():
        entered, _ = oracle.watch(model, images)
        for l in range(case.L):
            close(entered[l][1], P_hat[l])


@given(cases(L=1))
def test_with_one_layer_vpt_cdc_and_da_are_the_same_model(case):
    """Eq. 4 and 5. P̂^0 = P^0, and there is nothing to connect."""
    vpt, *others = (random_model(case, **METHODS[name]) for name in ('vpt', 'cdc', 'cdc_da'))
    for other in others:
        assert torch.equal(other(case.images()), vpt(case.images()))


@given(cases(L=(2, 4)))
def test_with_two_layers_they_differ(case):
    """Eq. 4 and 5. With random γ, no two of the three are the same."""
    vpt, cdc, da = (random_model(case, **METHODS[name])(case.images()) for name in ('vpt', 'cdc', 'cdc_da'))
    for a, b in (vpt, cdc), (vpt, da), (cdc, da):
        assert not torch.allclose(a, b, rtol=0, atol=1e-9)


@given(cases())
def test_gamma_starts_as_the_identity_so_that_da_starts_as_cdc(case):
    model = IVPT(plain_vit(case), case.C, case.N, reinforcement='none')
    assert model.gamma.tolist() == [torch.eye(case.N).tolist()] * (case.L - 1)
    model = model.double()
    assert torch.equal(model.prompts(), cdc(model.P))
