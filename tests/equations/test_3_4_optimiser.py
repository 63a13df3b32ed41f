"""3.3 and 3.4 seen from the optimiser: CDC and DA are another way of learning VPT's prompts, not another model.

Every structure of ivpt.py makes P̂ = A P over the layers, with ones on A's diagonal and nothing above it. So A has an
inverse, and all of them are the same set of models. SGD on P is SGD on P̂ with the gradient multiplied by A Aᵀ. AR
alone adds functions.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data
import train
import vit
from ivpt import IVPT, Prompts, cdc, cdc_da, look, vanilla_cdc
from oracle import close
from pictures import tiny
from strategies import METHODS, OTHERS, Case, cases, random_model

STRUCTURES = {  # P [L, N, D], gamma [L-1, N, N] -> P̂ [L, N, D]
    'vpt': lambda P, gamma: P,
    'vanilla_cdc': lambda P, gamma: vanilla_cdc(P),
    'cdc': lambda P, gamma: cdc(P),
    'cdc_da': cdc_da,
}
fewer = settings(max_examples=settings().max_examples // 5)


def matrix(structure, L, N=1, gamma=None):
    """A [L N, L N] of P̂ = A P: what the structure makes of the unit vectors."""
    units = torch.eye(L * N).double().view(L, N, L * N)
    return STRUCTURES[structure](units, gamma).flatten(0, 1)


def across(A, P):
    """A [L N, L N] applied to prompts P [L, N, D], over layers and prompts."""
    return (A @ P.flatten(0, 1)).view_as(P)


def gradient_factor(structure, L):
    """A Aᵀ [L, L] in closed form, of 'vpt', 'vanilla_cdc' or 'cdc': what the gradient of P̂ is multiplied by."""
    l = torch.arange(L).double()
    distance = (l[:, None] - l).abs()
    if structure == 'vanilla_cdc':
        return 1 + torch.minimum(l[:, None], l)
    if structure == 'cdc':  # nothing is added to the first layer's prompts
        return 2 * (distance == 0).double() + (distance == 1).double() - (l[:, None] + l == 0).double()
    return (distance == 0).double()


def invert(structure, P_hat, gamma=None):
    """P of P̂: both [L, N, D]."""
    return across(torch.linalg.inv(matrix(structure, *P_hat.shape[:2], gamma)), P_hat)


# ---- No structure is another model ----------------------------------------------------------------------

@pytest.mark.parametrize('structure', STRUCTURES)
@given(cases())
def test_P_hat_is_a_matrix_over_the_layers_times_P_with_ones_on_its_diagonal_and_nothing_above(structure, case):
    """Eq. 2, 4, 5 and (D) of Figure 3 are linear in P, and no channel sees another. A's determinant is 1, whatever γ
    is. So for each P̂ there is one P, and det(A Aᵀ), the product of all factors on the learning rate, is 1 too."""
    P, gamma = case.prompts_and_gamma()
    A = matrix(structure, case.L, case.N, gamma)
    close(STRUCTURES[structure](P, gamma), across(A, P))
    assert torch.equal(A.diagonal(), torch.ones(case.L * case.N).double())
    assert not A.triu(1).any()
    if structure != 'cdc_da':  # nor does a prompt see another
        close(A, torch.kron(matrix(structure, case.L), torch.eye(case.N).double()))


@pytest.mark.parametrize('methods', [['vpt', 'vanilla_cdc', 'cdc', 'cdc_da'], ['vpt_ar', 'cdc_ar', 'ivpt']])
@fewer
@given(cases())
def test_vpt_and_all_kinds_of_cdc_are_the_same_models_with_ar_and_without(methods, case):
    """What one can compute, with any P and any γ, each other computes with a P of its own and its own γ."""
    models = [random_model(case, **(METHODS | OTHERS)[name]) for name in methods]
    for teacher in models:
        P_hat, logits = teacher.prompts(), teacher(case.images())
        for pupil in models:
            before = pupil.P.data
            pupil.P.data = invert('cdc_da' if pupil.gamma is not None else pupil.structure, P_hat, pupil.gamma).detach()
            close(pupil(case.images()), logits)
            pupil.P.data = before


# ---- A Aᵀ -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('structure', ['vpt', 'vanilla_cdc', 'cdc'])
@given(st.integers(1, 24))
def test_A_A_transposed_is_what_its_closed_form_says(structure, L):
    """CDC: 2 on the diagonal, 1 for layer 0, and 1 beside it. Vanilla CDC: of layers l and m, 1 + min(l, m)."""
    A = matrix(structure, L)
    close(gradient_factor(structure, L), A @ A.T)


@pytest.mark.parametrize('structure, L, smallest, largest', [
    ('cdc', 12, '0.016', '3.937'), ('vanilla_cdc', 6, '0.265', '17.207')])
def test_the_smallest_and_the_largest_factor_on_the_learning_rate_for_12_and_6_layers(structure, L, smallest, largest):
    """The README's numbers, for ViT-B/16, and an exercise's, for the nano ViT."""
    factors = torch.linalg.eigvalsh(gradient_factor(structure, L))
    assert (f'{factors[0]:.3f}', f'{factors[-1]:.3f}') == (smallest, largest)


@pytest.mark.parametrize('structure', ['vanilla_cdc', 'cdc'])
@given(st.integers(2, 24))
def test_layers_that_move_together_learn_fastest_and_layers_that_alternate_slowest(structure, L):
    """The signs of A Aᵀ's last and first eigenvector."""
    vectors = torch.linalg.eigh(gradient_factor(structure, L)).eigenvectors
    together, alternating = vectors[:, -1].sign(), vectors[:, 0].sign()
    assert torch.equal(together, together[0].expand(L))
    assert torch.equal(alternating, alternating[0] * (-1.0) ** torch.arange(L))


# ---- Training P is training P̂ with another gradient ----------------------------------------------------

def steps_of(model, case, multiplied=None):
    """Train a model by SGD on new images at each of 60 steps, with a warm-up and a cosine, momentum 0.9 and weight
    decay 0.01; after each yield all that it learns.

    multiplied: A Aᵀ [L N, L N], which the gradient of the model's P is multiplied by."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.02, momentum=0.9, weight_decay=0.01)
    for step in range(60):
        optimizer.param_groups[0]['lr'] = 0.02 * train.schedule(step, 60, 0.3)
        images = case.normal(f'images {step}', *case.images().shape)
        loss = F.cross_entropy(model(images), case.integers(f'labels {step}', case.C, case.B).long())
        optimizer.zero_grad()
        loss.backward()
        if multiplied is not None:
            model.P.grad = across(multiplied, model.P.grad)
        optimizer.step()
        yield {name: p.detach().clone() for name, p in trained.items()} | {'P': model.prompts().detach()}


@pytest.mark.parametrize('method, vpt', [
    ('cdc', 'vpt'), ('vanilla_cdc', 'vpt'), ('cdc_da', 'vpt'), ('ivpt', 'vpt_ar')])
def test_sgd_on_cdc_equals_sgd_on_vpt_with_the_gradient_times_A_A_transposed(method, vpt):
    """SGD on P is SGD on VPT's prompts with the gradient multiplied by A Aᵀ: P̂ <- P̂ - η (A Aᵀ ∂/∂P̂ + λ P̂), momentum
    included, to rounding; with DA, while γ is held still. Head and P_re: the same. Without the factor they part."""
    case = Case(B=3, L=4, N=2, M=4, N_h=2, d=3, k=1, C=3, seed=0)
    connected, plain, alone = (random_model(case, **(METHODS | OTHERS)[name]) for name in (method, vpt, vpt))
    plain.P.data, alone.P.data = (connected.prompts().detach().clone() for _ in range(2))
    if connected.gamma is None:
        factor = torch.kron(gradient_factor(connected.structure, case.L), torch.eye(case.N).double())
    else:
        A = matrix('cdc_da', case.L, case.N, connected.gamma.requires_grad_(False))
        factor = A @ A.T
    runs = steps_of(connected, case), steps_of(plain, case, factor), steps_of(alone, case)
    for one, other, without in zip(*runs):
        close(one, other)
    assert not torch.allclose(one['P'], without['P'], rtol=0, atol=1e-2)


def prompts_after_a_run(**changes):
    """P̂ in the end of a tiny run by the loop of train.py, in float64."""
    settings = tiny(method='cdc', epochs=2, lr=0.1, weight_decay=0.01, **changes)
    task = data.load(settings)
    model = train.make_model(settings, task)[0].double()
    model.register_forward_pre_hook(lambda model, images: (images[0].double(),))
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    state = train.State(model, train.make_optimizer(model, settings.loop), scaler, [])
    compute = train.Compute(torch.device('cpu'), 'float32', '')
    assert len(list(train.train(state, task, task.train, settings, compute))) == 2
    return model.prompts()


def test_a_run_of_vpt_with_the_multiplied_gradient_ends_with_the_prompts_of_a_run_of_cdc():
    """On pictures of shapes, from the same start to float32. From VPT's own start it is another run."""
    of_cdc = prompts_after_a_run()
    for start, alike in ('from_cdc', True), ('from_vpt', False):
        multiplied = prompts_after_a_run(tune=f'tests/experiments/multiplied.py:{start}')
        assert torch.allclose(of_cdc, multiplied, rtol=0, atol=1e-5) == alike


# ---- Where that ends: AdamW, clipped gradients ----------------------------------------------------------

@pytest.mark.parametrize('how, cdcs, vpts', [
    ('SGD', [-1, -2], [-1, -2]),
    ('AdamW', [-1, -2], [-1, -1]),
    ('clipped', [-1 / 2 ** 0.5, -2 / 2 ** 0.5], [-1 / 5 ** 0.5, -2 / 5 ** 0.5])])
def test_with_adamw_or_clipped_gradients_cdc_is_not_vpt_with_a_multiplied_gradient(how, cdcs, vpts):
    """Both look at the gradient's size before A comes in. The second layer alone has a gradient, 1.

    AdamW's first step moves each number by one learning rate. In CDC both P^0 and P^1 move, so P̂^1 moves by two."""
    for structure, expected in ('cdc', cdcs), ('vpt', vpts):
        P = torch.zeros(2, 1, 1).double().requires_grad_()
        optimizer = torch.optim.AdamW([P], 1.0) if how == 'AdamW' else torch.optim.SGD([P], 1.0)
        STRUCTURES[structure](P, None)[1].sum().backward()
        if structure == 'vpt':
            P.grad = across(gradient_factor('cdc', 2), P.grad)
        if how == 'clipped':
            torch.nn.utils.clip_grad_norm_([P], 1.0)
        optimizer.step()
        assert STRUCTURES[structure](P, None).flatten().tolist() == pytest.approx(expected, rel=1e-5)


# ---- Weight decay ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('decay, ends', [(1e-4, '0.82'), (1e-3, '0.13'), (1e-2, '0.00')])
def test_weight_decay_takes_gamma_from_the_identity_to_0_where_there_is_no_gradient(decay, ends):
    """The three points of VPT's grid, at learning rate 0.25 with momentum 0.9: 100 epochs of 16 steps, 10 of warm-up.

    The paper does not say whether γ has weight decay. γ = 0 is VPT: Eq. 5 without its connection."""
    gamma = IVPT(vit.ViT(2, 2, (3, 3, 1)), 1, Prompts(N=2, aggregation=True)).gamma
    optimizer = torch.optim.SGD([gamma], 0.25, momentum=0.9, weight_decay=decay)
    gamma.grad = torch.zeros_like(gamma)
    for step in range(1600):
        optimizer.param_groups[0]['lr'] = 0.25 * train.schedule(step, 1600, 0.1)
        optimizer.step()
    assert {f'{x:.2f}' for x in gamma.diagonal(dim1=1, dim2=2).flatten().tolist()} == {ends}
    assert torch.equal(gamma, gamma * torch.eye(2))


# ---- AR alone adds functions ----------------------------------------------------------------------------

def where_the_choice_changes(model, start, end):
    """Two images between start and end, as near as numbers allow, that AR chooses other tokens for."""
    def chosen(t):
        return look(model, start + t * (end - start))['Omega']

    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if torch.equal(chosen(middle), chosen(0.0)) else (low, middle)
    return start + low * (end - start), start + high * (end - start)


@settings(max_examples=settings().max_examples // 25)
@given(cases(B=2, L=(2, 4)))
def test_the_logits_of_ar_jump_where_two_tokens_are_equally_salient_and_no_P_hat_makes_them_jump(case):
    """Without AR logits are a continuous function of the image for every P̂, so AR's functions are new ones."""
    ar, images = random_model(case, **METHODS['ivpt']), case.images()
    Omega = look(ar, images)['Omega']
    assume(not torch.equal(Omega[0], Omega[1]))
    near = where_the_choice_changes(ar, images[:1], images[1:])

    def jump(model):
        return (model(near[0]) - model(near[1])).abs().max().item()

    assert jump(ar) > 1e-6
    for method in 'vpt', 'cdc', 'cdc_da', 'vanilla_cdc':
        assert jump(random_model(case, **(METHODS | OTHERS)[method])) < 1e-9
