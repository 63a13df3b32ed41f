"""3.3 Cross-layer dynamic connection: CDC (Eq. 4) and dynamic aggregation (Eq. 5 and 6).

That Eq. 3 lets P̂ into the layers is tested in test_3_1_vit_and_vpt.py, with the whole model.
"""

import torch
from hypothesis import given, settings

import oracle
from ivpt import cdc, cdc_da, psi
from oracle import close
from strategies import METHODS, cases, random_model

fewer = settings(max_examples=settings().max_examples // 2)


# ---- The equations --------------------------------------------------------------------------------------

@given(cases())
def test_cdc_adds_the_previous_layers_prompts_and_the_first_layers_are_its_own(case):
    """Eq. 4. P̂^l = P^l + P^{l-1} and P̂^0 = P^0. Not P̂^{l-1}, which would carry all layers before."""
    P, _ = (x.requires_grad_() for x in case.prompts_and_gamma())
    P_hat, literal = cdc(P), torch.stack(oracle.prompts('cdc', P))
    assert torch.equal(P_hat, literal)
    oracle.compare_gradients(P_hat, literal, [P], case.normal('cotangent', *P.shape))


@given(cases())
def test_da_adds_psi_of_the_previous_layers_prompts_forwards_and_backwards(case):
    """Eq. 5. P̂^l = P^l + ψ^{l-1}(P^{l-1}) and P̂^0 = P^0. Each γ acts on one layer: γ^l on P̂^{l+1} and no other."""
    P, gamma = (x.requires_grad_() for x in case.prompts_and_gamma())
    literal, cotangent = torch.stack(oracle.prompts('cdc', P, gamma)), case.normal('cotangent', *P.shape)
    oracle.compare_gradients(cdc_da(P, gamma), literal, [P, gamma], cotangent)


@given(cases(L=(2, 4)))
def test_psi_is_the_double_sum_of_one_layer_or_of_all_at_once(case):
    """Eq. 6. ψ(P)_i = Σ_j γ_ij p_j."""
    P, gamma = case.prompts_and_gamma()
    close(psi(gamma[0], P[0]), oracle.psi(gamma[0], P[0]))
    close(psi(gamma, P[:-1]), torch.stack([oracle.psi(g, p) for g, p in zip(gamma, P)]))


@given(cases())
def test_da_with_gamma_the_identity_is_cdc_and_with_gamma_zero_vpt(case):
    """Eq. 5 with γ = I is Eq. 4, "ψ is an identity mapping"; with γ = 0 it is Eq. 2. DA learns which."""
    P, gamma = case.prompts_and_gamma()
    assert torch.equal(cdc_da(P, torch.eye(case.N).double().expand_as(gamma)), cdc(P))
    assert torch.equal(cdc_da(P, 0 * gamma), P)


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


# ---- "eliminates the positional constraints" ------------------------------------------------------------

@fewer
@given(cases(L=(2, 4), N=(2, 4)))
def test_reordering_prompts_in_one_layer_alone_changes_cdc(case):
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
