"""3.3 and 3.4 seen from the optimiser: CDC and DA are another way of learning VPT's prompts, not another model.

Every structure of ivpt.py makes P̂ = A P over the layers, with ones on A's diagonal and nothing above it. So A has an
inverse, and all of them are the same set of models. SGD on P is SGD on P̂ with the gradient multiplied by A Aᵀ. AR
alone adds functions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st

import data
import oracle
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
every_structure = pytest.mark.parametrize('structure', STRUCTURES)
without_gamma = pytest.mark.parametrize('structure', ['vpt', 'vanilla_cdc', 'cdc'])
fewer = settings(max_examples=settings().max_examples // 5)
layers = st.integers(1, 24)


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


@every_structure
@given(cases())
def test_P_hat_is_a_matrix_over_the_layers_times_P_the_same_for_every_channel(structure, case):
    """Eq. 2, 4, 5 and (D) of Figure 3 are linear in P, and no channel sees another."""
    P, gamma = case.prompts_and_gamma()
    A = matrix(structure, case.L, case.N, gamma)
    close(STRUCTURES[structure](P, gamma), across(A, P))
    if structure != 'cdc_da':  # nor does a prompt see another
        close(A, torch.kron(matrix(structure, case.L), torch.eye(case.N).double()))


@every_structure
@given(cases())
def test_the_matrix_has_ones_on_its_diagonal_and_nothing_above_so_what_it_gives_it_also_takes(structure, case):
    """Its determinant is 1, whatever γ is. So for each P̂ there is one P, and det(A Aᵀ), the product of all factors on
    the learning rate, is 1 too."""
    P, gamma = case.prompts_and_gamma()
    A = matrix(structure, case.L, case.N, gamma)
    assert torch.equal(A.diagonal(), torch.ones(case.L * case.N).double())
    assert not A.triu(1).any()
    close(torch.linalg.eigvalsh(A @ A.T).log().sum(), torch.zeros(()).double())
    close(STRUCTURES[structure](invert(structure, P, gamma), gamma), P)


@given(cases())
def test_the_prompts_that_make_a_given_P_hat_are_alternating_sums_in_cdc_and_differences_in_vanilla_cdc(case):
    """So weight decay, |P|², penalises prompts in VPT, alternating sums in CDC and differences in vanilla CDC."""
    P_hat, _ = case.prompts_and_gamma()
    alternating = torch.stack([sum((-1) ** (l - i) * P_hat[i] for i in range(l + 1)) for l in range(case.L)])
    close(cdc(alternating), P_hat)
    close(vanilla_cdc(torch.cat([P_hat[:1], P_hat.diff(dim=0)])), P_hat)


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


@without_gamma
@given(layers)
def test_A_A_transposed_is_what_its_closed_form_says(structure, L):
    """CDC: 2 on the diagonal, 1 for layer 0, and 1 beside it. Vanilla CDC: of layers l and m, 1 + min(l, m)."""
    A = matrix(structure, L)
    close(gradient_factor(structure, L), A @ A.T)
    band = {'vpt': 0, 'cdc': 1, 'vanilla_cdc': L}[structure]  # how far a layer's gradient reaches
    assert torch.equal((A @ A.T).ne(0), torch.ones(L, L).tril(band).triu(-band).bool())


@given(cases())
def test_with_da_a_layers_prompts_move_by_their_own_gradient_and_by_both_neighbours_through_gamma(case):
    """A Aᵀ in blocks of N: I + γγᵀ on the diagonal (I for layer 0), γ below it and γᵀ above."""
    L, N, gamma = case.L, case.N, case.prompts_and_gamma()[1]
    A = matrix('cdc_da', L, N, gamma)
    blocks, I = (A @ A.T).view(L, N, L, N).transpose(1, 2), torch.eye(N).double()  # [L, L, N, N]
    for l in range(L):
        close(blocks[l, l], I + gamma[l - 1] @ gamma[l - 1].T if l else I)
        for m in range(l):
            close(blocks[l, m], gamma[m] if m == l - 1 else 0 * I)
            close(blocks[m, l], blocks[l, m].T)


@pytest.mark.parametrize('structure, of_j', [
    ('cdc', lambda j, L: 2 + 2 * math.cos(2 * math.pi * j / (2 * L + 1))),
    ('vanilla_cdc', lambda j, L: 1 / (4 * math.sin(math.pi * (2 * j - 1) / (2 * (2 * L + 1))) ** 2)),
])
@given(layers)
def test_the_eigenvalues_are_2_plus_2_cosines_for_cdc_and_1_over_4_squared_sines_for_vanilla_cdc(structure, of_j, L):
    """2 + 2 cos(2πj / (2L + 1)) and 1 / (4 sin²(π(2j - 1) / (2(2L + 1)))), j = 1, ..., L, largest first."""
    expected = [of_j(j, L) for j in range(L, 0, -1)]
    close(torch.linalg.eigvalsh(gradient_factor(structure, L)).tolist(), expected)


@pytest.mark.parametrize('structure, L, smallest, largest', [
    ('vpt', 12, '1.000', '1.000'), ('cdc', 12, '0.016', '3.937'), ('vanilla_cdc', 12, '0.254', '63.409'),
    ('cdc', 6, '0.058', '3.771'), ('vanilla_cdc', 6, '0.265', '17.207')])
def test_the_smallest_and_the_largest_factor_on_the_learning_rate_for_12_and_6_layers(structure, L, smallest, largest):
    """The README's numbers, for ViT-B/16 and for the nano ViT."""
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


@without_gamma
def test_prompts_that_start_alike_in_P_start_with_the_variance_of_A_A_transposeds_diagonal(structure):
    """The sum of the squares of A's row l: VPT 1, CDC 2 from layer 1 on, vanilla CDC l + 1, of VPT's own variance."""
    variance = {'vpt': [1, 1, 1, 1], 'cdc': [1, 2, 2, 2], 'vanilla_cdc': [1, 2, 3, 4]}[structure]
    assert gradient_factor(structure, 4).diagonal().tolist() == variance
    torch.manual_seed(0)
    model = IVPT(vit.ViT(8, 4, (12, 4, 2)), 3, Prompts(N=4000, structure=structure))
    bound = (6 / (3 * 4 ** 2 + 12)) ** 0.5
    measured = model.prompts().detach().double().square().mean(dim=(1, 2)) / (bound ** 2 / 3)
    torch.testing.assert_close(measured, torch.tensor(variance).double(), rtol=0.03, atol=0)


# ---- Training P is training P̂ with another gradient ----------------------------------------------------


def steps_of(model, case, optimizer, steps, multiplied=None):
    """Train a model on new images at each step, with a warm-up and a cosine; after each yield all that it learns.

    multiplied: A Aᵀ [L N, L N], which the gradient of the model's P is multiplied by."""
    rate = optimizer.param_groups[0]['lr']
    for step in range(steps):
        for group in optimizer.param_groups:
            group['lr'] = rate * train.schedule(step, steps, 0.3)
        images = case.normal(f'images {step}', *case.images().shape)
        loss = F.cross_entropy(model(images), case.integers(f'labels {step}', case.C, case.B).long())
        optimizer.zero_grad()
        loss.backward()
        if multiplied is not None:
            model.P.grad = across(multiplied, model.P.grad)
        optimizer.step()
        learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        yield learned | {'P': model.prompts().detach()}


def pair(case, method, vpt='vpt'):
    """A random model, VPT with the P̂ of it, and A Aᵀ. γ, if there is one, stays as it is."""
    connected, plain = (random_model(case, **(METHODS | OTHERS)[name]) for name in (method, vpt))
    plain.P.data = connected.prompts().detach().clone()
    if connected.gamma is None:
        return connected, plain, torch.kron(gradient_factor(connected.structure, case.L), torch.eye(case.N).double())
    A = matrix('cdc_da', case.L, case.N, connected.gamma.requires_grad_(False))
    return connected, plain, A @ A.T


def sgd(model, **how):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **how)


@pytest.mark.parametrize('method, vpt', [
    ('cdc', 'vpt'), ('vanilla_cdc', 'vpt'), ('cdc_da', 'vpt'), ('cdc_ar', 'vpt_ar'), ('ivpt', 'vpt_ar')])
@fewer
@given(cases(C=3), st.fixed_dictionaries({'lr': st.sampled_from([0.01, 0.05]), 'momentum': st.sampled_from([0.0, 0.9]),
                                          'weight_decay': st.sampled_from([0.0, 0.1])}))
def test_sgd_on_P_is_sgd_on_vpts_prompts_with_the_gradient_multiplied_by_A_A_transposed(method, vpt, case, how):
    """P̂ <- P̂ - η (A Aᵀ ∂/∂P̂ + λ P̂), momentum included; with DA, while γ is held still. Head and P_re: the same."""
    connected, plain, factor = pair(case, method, vpt)
    for one, other in zip(steps_of(connected, case, sgd(connected, **how), 4),
                          steps_of(plain, case, sgd(plain, **how), 4, factor)):
        close(one, {name: other[name] for name in one})


@pytest.mark.parametrize('method', ['cdc', 'vanilla_cdc'])
def test_over_60_steps_the_two_runs_stay_one(method):
    """Momentum 0.9 and weight decay 0.01, to rounding. Without the factor they part."""
    case, how = Case(B=3, L=4, N=2, M=4, N_h=2, d=3, k=1, C=3, seed=0), dict(lr=0.02, momentum=0.9, weight_decay=0.01)
    (connected, plain, factor), (_, vpt, _) = pair(case, method), pair(case, method)
    runs = (steps_of(connected, case, sgd(connected, **how), 60), steps_of(plain, case, sgd(plain, **how), 60, factor),
            steps_of(vpt, case, sgd(vpt, **how), 60))
    for one, other, alone in zip(*runs):
        close(one['P'], other['P'])
    assert not torch.allclose(one['P'], alone['P'], rtol=0, atol=1e-2)


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


def test_a_run_of_vpt_with_the_multiplied_gradient_is_a_run_of_cdc_and_ends_in_its_prompts():
    """On pictures of shapes, from the same start to float32. From VPT's own start it is another run."""
    of_cdc = prompts_after_a_run()
    for start, alike in ('from_cdc', True), ('from_vpt', False):
        multiplied = prompts_after_a_run(tune=f'tests/experiments/multiplied.py:{start}')
        assert torch.allclose(of_cdc, multiplied, rtol=0, atol=1e-5) == alike


# ---- Where that ends: AdamW, clipped gradients, a learned γ ----------------------------------------------


def first_step(how, structure, g):
    """How P̂ [2] of two layers with one prompt of one number moves at the first step with learning rate 1.

    g [2]: the gradient of P̂. structure: 'cdc', or 'vpt' with its gradient multiplied by CDC's A Aᵀ."""
    P = torch.zeros(2, 1, 1).double().requires_grad_()
    optimizer = torch.optim.SGD([P], 1.0) if how != 'AdamW' else torch.optim.AdamW([P], 1.0, eps=1e-30)
    (STRUCTURES[structure](P, None).flatten() * torch.tensor(g).double()).sum().backward()
    if structure == 'vpt':
        P.grad = across(gradient_factor('cdc', 2), P.grad)
    if how == 'clipped':
        torch.nn.utils.clip_grad_norm_([P], 1.0)
    optimizer.step()
    return STRUCTURES[structure](P, None).detach().flatten()


@pytest.mark.parametrize('how, cdcs, vpts', [
    ('AdamW', [-1, -2], [-1, -1]),
    ('clipped', [-1 / 2 ** 0.5, -2 / 2 ** 0.5], [-1 / 5 ** 0.5, -2 / 5 ** 0.5])])
def test_with_adamw_and_with_clipped_gradients_it_is_not_so_and_the_smallest_case_has_one_gradient(how, cdcs, vpts):
    """Both look at the gradient's size before A comes in. The case: two layers, and the second alone has a gradient.

    AdamW's first step moves each number by one learning rate. In CDC both P^0 and P^1 move, so P̂^1 moves by two."""
    def differs(g):
        return not torch.allclose(first_step(how, 'cdc', g), first_step(how, 'vpt', g))

    gradient = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    assert find(gradient, differs) == [0, 1]
    for structure, expected in (('cdc', cdcs), ('vpt', vpts)):  # torch clips to a little less than 1
        assert first_step(how, structure, [0, 1]).tolist() == pytest.approx(expected, rel=1e-5)
    close(first_step('SGD', 'cdc', [0, 1]), first_step('SGD', 'vpt', [0, 1]))


@fewer
@given(cases(L=(2, 4), C=3))
def test_adamw_moves_each_number_of_cdcs_P_hat_by_2_learning_rates_or_0_where_vpts_moves_by_1(case):
    """In a model: from the first step on, with any factor on VPT's gradient, the runs are not one."""
    connected, plain, factor = pair(case, 'cdc')
    moves = []
    for model, factor in (connected, None), (plain, factor):
        before = model.prompts().detach().clone()
        optimizer = torch.optim.AdamW([model.P], 0.01, weight_decay=0.0, eps=1e-30)
        learned = next(steps_of(model, case, optimizer, 1, factor))
        moves.append(((learned['P'] - before) / 0.01).abs())
    assert torch.equal(moves[1].round(decimals=6), torch.ones_like(moves[1]))
    assert set(moves[0][1:].round(decimals=6).unique().tolist()) <= {0.0, 2.0}


# ---- Weight decay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('structure, common, alternating', [('vpt', 12, 12), ('vanilla_cdc', 1, 45), ('cdc', 6, 650)])
def test_what_12_layers_pay_for_a_common_prompt_and_for_one_that_alternates(structure, common, alternating):
    """Weight decay's |P|² where P̂^l = 1 and where P̂^l = (-1)^l: the README's numbers."""
    signs = (-1.0) ** torch.arange(12).double()
    for P_hat, price in (signs.abs(), common), (signs, alternating):
        assert torch.linalg.solve(matrix(structure, 12), P_hat).square().sum().item() == pytest.approx(price)


@without_gamma
@pytest.mark.parametrize('decay', [0.0, 0.5])
def test_without_weight_decay_all_runs_end_in_the_same_prompts_and_with_it_they_do_not(structure, decay):
    """For a loss |P̂ - T|² / 2, SGD ends in (I + λ (A Aᵀ)⁻¹)⁻¹ T: another place in each structure, T if λ = 0."""
    case = Case(B=1, L=4, N=1, M=1, N_h=1, d=3, k=1, C=1, seed=0)
    P, T = (case.normal(name, 4, 1, 3).requires_grad_(name == 'P') for name in ('P', 'T'))
    optimizer = torch.optim.SGD([P], 0.1, momentum=0.9, weight_decay=decay)
    for _ in range(600):
        optimizer.zero_grad()
        ((STRUCTURES[structure](P, None) - T).square().sum() / 2).backward()
        optimizer.step()
    I = torch.eye(4).double()
    end = torch.linalg.inv(I + decay * torch.linalg.inv(gradient_factor(structure, 4)))
    close(STRUCTURES[structure](P, None).detach(), across(end, T))


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


@given(cases(B=2, L=(2, 4)))
def test_what_ar_adds_to_the_tokens_depends_on_the_image_and_P_hat_does_not(case):
    """Eq. 15 between two layers, for two images: the same where Ω is the same, and nowhere else."""
    model = random_model(case, **METHODS['ivpt'])
    entered, left = oracle.watch(model, case.images())
    Omega = look(model, case.images())['Omega']  # [B, L-1, k]
    for l in range(case.L - 1):
        added = entered[l + 1][0] - left[l][0]
        assert torch.allclose(added[0], added[1], rtol=0, atol=1e-9) == torch.equal(Omega[0, l], Omega[1, l])
        assert torch.equal(entered[l + 1][1], model.prompts()[l + 1])


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
