"""The systems of Table 1 (table_1.py) are those of their authors, and fit the paper's numbers of parameters where those
fit each other (section 4.2).

`table_1.json` was written by the authors' own classes, with torch 2.14 and timm 1.0.31, in float64. The ViT has D = 32,
L = 2 (GaPT: 3) and 3 classes, with the values of `chirped`. What a system adds has the values of FILL. The classes:

    adapter      ADPT_VisionTransformer, KMnP/vpt 4410440
    lora         VisionTransformer, ZhangYuanhan-AI/NOAH e9c55f3
    adaptformer  vit_image.VisionTransformer, ShoufaChen/AdaptFormer 6967d67
    ssf          VisionTransformer, dongzelian/SSF e94e0e7
    snf          NormalizingFlow, Wang-Yaoming/SNF a6f85b1 (its ViT cannot run)
    sct          VisionTransformer_sct and getSalientChannels, showlab/SCT 384cecb
    fact         set_FacT of fact_tk.py, JieShibo/PETL-ViT 026e4f1, with the widths of this ViT
    bi_adapter   set_adapter of binary_adapter/adaptformer.py there, likewise
    spt          VisionTransformerSPT and get_sensitivity, ziplab/SPT e385f67
    e2vpt        Attention of vit_changeVK.py, ChengHan111/E2VPT 7a66e75
    gapt         PromptedVisionTransformer of vit_mae.py, ryongithub/GatedPromptTuning dd7d1ea, read by its class token

spt_selection is of a stand-in for a ViT of D = 192 and L = 4 that has the gradients of `sensitivities`, with budgets of
5, 10 and 20 thousand, tried in steps of 500 sensitive numbers.
"""

import json
from copy import deepcopy
from pathlib import Path
from statistics import mean

import pytest
import table_1
import torch
import torch.nn.functional as F
from common import chirp, chirped, equal
from pictures import CONFIGS

import train
import vit

GOLDEN = json.loads((Path(__file__).parent / 'table_1.json').read_text())
SYSTEMS = [name for name, entry in CONFIGS['methods'].items() if 'table_1.py' in entry.get('tune', '')]
# Of the tiny ViT, where the authors' classes were made with other settings than those of ViT-B in configs.yaml.
TINY = {'adapter': dict(reduction=8), 'lora': dict(r=4), 'adaptformer': dict(r=4, scale=0.3),
        'fact': dict(r=24, scale=0.7), 'bi_adapter': dict(r=4, scale=0.7), 'spt': dict(r=4), 'gapt': dict(N=4),
        'sct': dict(scale=0.5)}  # of twice its authors' values: their code has no scale


def side(l, k, *shape):
    """The values of the k-th tensor that a system adds to layer l."""
    return chirp(shape, 100 + 10 * l + k)


def make(name, backbone, num_classes, **changes):
    """As train.py makes it: a system with the settings of ViT-B, but for changes."""
    settings = train.settings_of(CONFIGS, 'dtd', None, name, changes)  # N = 10 for all
    return getattr(table_1, settings.loop.tune.rpartition(':')[2])(backbone, num_classes, settings)


def system(name, backbone, num_classes=3, **changes):
    """The same in float64 and in eval mode."""
    torch.manual_seed(0)
    return make(name, backbone, num_classes, **changes).double().eval()


def filled(name, **changes):
    """The system on the tiny ViT with the values that the authors' class had."""
    L = 3 if name == 'gapt' else 2
    model, whole = system(name, chirped(L), **TINY.get(name, {}) | changes), chirped(L, num_classes=3)
    model.head.load_state_dict(whole.head.state_dict())
    with torch.no_grad():
        FILL[name](model)
    return model


def copy(part, **values):
    for name, x in values.items():
        getattr(part, name).copy_(x)


def in_every_layer(fill):
    def fill_all(model):
        for l, layer in enumerate(model.vit.blocks):
            fill(l, layer)
    return fill_all


def fill_bottleneck(l, part):
    copy(part, W=side(l, 0, 4, 32), c=side(l, 1, 4), U=side(l, 2, 32, 4), e=side(l, 3, 32))


def fill_fact(model):
    """The authors' C P, with the slices of fc1 and fc2 as their reshape mixes them; P = 1 makes any slices possible."""
    T = side(0, 2, 24, 24, 24) @ side(0, 3, 24, 24)
    for first in (4, 8, 16, 20):
        T[..., first:first + 4] = T[..., first:first + 4].reshape(24, 4, 24).transpose(1, 2)
    copy(model.factors, U=side(0, 0, 24, 32), V=side(0, 1, 32, 24), C=T, P=torch.eye(24))


def fill_ssf(model):
    places = [(model.vit.patch_embed, 8, 0), (model.vit.norm, 8, 2)]
    for l, layer in enumerate(model.vit.blocks):
        parts = layer.norm1, layer.attn.qkv, layer.attn.proj, layer.norm2, layer.mlp.fc1, layer.mlp.fc2
        places += [(part, 2 * l, 2 * k) for k, part in enumerate(parts)]
    for part, l, k in places:
        D = len(part.side.gamma)
        copy(part.side, gamma=1 + side(l, k, D), beta=side(l, k + 1, D))


SINGLES = [  # layer, part, rows and columns of [W, b] that SPT trains, in the order of the authors' seeds
    (0, 'attn.qkv', [32, 37, 63], [3, 1, 31]), (0, 'attn.qkv', [34, 39], [32, 32]), (1, 'mlp.fc2', [1, 20], [100, 5]),
    (0, 'mlp.fc1', [0, 127], [32, 32]), (1, 'attn.qkv', [4], [4])]
MATRICES = {(0, 'attn.qkv'): [0, 2], (0, 'mlp.fc2'): [0],  # the parts with LoRA
            (1, 'attn.qkv'): [1], (1, 'attn.proj'): [0], (1, 'mlp.fc1'): [0]}
SEEDS = {'attn.qkv': 0, 'attn.proj': 3, 'mlp.fc1': 4, 'mlp.fc2': 5}


def fill_spt(l, layer):
    for name, seed in SEEDS.items():
        f, parts = layer.get_submodule(name).side, MATRICES.get((l, name), [])
        singles = [(i, r, c) for i, (m, part, r, c) in enumerate(SINGLES) if (m, part) == (l, name)]
        at = [r * (f.i + 1) + c for _, rows, columns in singles for r, c in zip(rows, columns)]
        f.take(torch.tensor(parts, dtype=torch.int64), torch.tensor(at, dtype=torch.int64))
        f.double()
        if at:
            f.v.copy_(torch.cat([chirp([len(rows)], 200 + i, 1.0) for i, rows, _ in singles]))
        for j, part in enumerate(parts):
            f.A[j] = side(l, seed + part, *f.A[j].shape)
            f.B[j] = side(l + 5, seed + part, *f.B[j].shape)


def fill_gapt(model):
    copy(model, P=2 * side(0, 0, 4, 32), a=torch.tensor([-1.0, 0.7]))
    for layer, tau in zip(model.vit.blocks, (0.5, 20.0, 2.0)):  # 20 becomes 10
        layer.attn.qkv.side.tau.fill_(tau)


FILL = {
    'adapter': in_every_layer(lambda l, layer: fill_bottleneck(l, layer.mlp.side)),
    'adaptformer': in_every_layer(lambda l, layer: fill_bottleneck(l, layer.shortcut2)),
    'bi_adapter': in_every_layer(lambda l, layer: copy(layer.shortcut2, W=side(l, 0, 4, 32) + 0.03,
                                                       U=side(l, 2, 32, 4) - 0.02)),
    'lora': in_every_layer(lambda l, layer: copy(layer.attn.qkv.side, A=side(l, 0, 4, 32), B=side(l, 1, 96, 4))),
    'sct': in_every_layer(lambda l, layer: copy(layer.between, W=2 * side(l, 0, 4, 4), b=2 * side(l, 1, 4),
                                                I=torch.tensor(([1, 4, 9, 30], [0, 2, 17, 31])[l]))),
    'spt': in_every_layer(fill_spt), 'fact': fill_fact, 'ssf': fill_ssf, 'gapt': fill_gapt}
IMAGES, LABELS = chirp((2, 3, 16, 16), 50, 1.0), torch.tensor([0, 2])
PICTURES, CLASSES = chirp((7, 3, 16, 16), 51, 1.0), torch.tensor([0, 2, 2, 0, 3, 2, 0])  # nobody is in class 1


# ---- Held against the authors' code ---------------------------------------------------------------------

@pytest.mark.parametrize('name', FILL)
@torch.no_grad()
def test_logits_are_those_of_the_authors_code_and_in_float32_within_1e_5(name):
    equal(filled(name)(IMAGES), GOLDEN[name])
    equal(filled(name).float()(IMAGES.float()), GOLDEN[name], atol=1e-5)


def test_the_gradient_passes_the_signs_of_bi_adapter_as_in_its_authors_code():
    model = filled('bi_adapter')
    F.cross_entropy(model(IMAGES), LABELS).backward()
    for name, theirs in GOLDEN['bi_adapter_gradient'].items():
        equal(getattr(model.vit.blocks[0].shortcut2, name).grad.flatten()[:8], theirs)


def test_gradients_of_spt_are_those_of_its_authors_code():
    model, theirs = filled('spt'), GOLDEN['spt_gradient']
    norm1 = model.vit.blocks[0].norm1.side
    norm1.take(torch.zeros(0, dtype=torch.int64), torch.arange(0, 16, 2))  # the gains of 8 channels: column 0 of 2
    norm1.double()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    parts = [model.vit.blocks[l].get_submodule(name).side for l, name, *_ in SINGLES]
    k, bias = parts[0].v.grad.split([3, 2])
    ours = {'blocks.0.attn.k.weight': k, 'blocks.0.attn.k.bias': bias, 'blocks.1.mlp.fc2.weight': parts[2].v.grad,
            'blocks.0.mlp.fc1.bias': parts[3].v.grad, 'blocks.1.attn.q.weight': parts[4].v.grad,
            'cls_token': model.vit.cls_token.grad.flatten()[:8], 'blocks.0.norm1.weight': norm1.v.grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        equal(gradient, theirs[name])


def test_the_flow_of_snf_is_that_of_its_authors_code():
    flow = system('snf', chirped(D=8), n=3).vit.blocks[0].shortcut1
    with torch.no_grad():
        copy(flow, mu=side(0, 0, 8), lam=side(0, 1, 8), w=side(0, 2, 3, 8), c=side(0, 3, 3), u=side(0, 4, 3, 8))
        equal(flow(chirp((2, 3, 8), 52, 1.0)), GOLDEN['snf'])


def test_keys_and_values_of_e2vpt_are_those_of_its_authors_code():
    attn = system('e2vpt', chirped()).vit.blocks[0].attn
    with torch.no_grad():
        attn.qkv.side.E.copy_(4 * side(0, 0, 4, 5, 8).transpose(0, 1).flatten(1))  # theirs has N_h in front
        attended, _ = attn(chirp((2, 7, 32), 53, 1.0))
    assert attended.shape == (2, 7, 32)
    equal(attended[:, ::3, ::5], GOLDEN['e2vpt'])


def channels(model, *batches):
    """The channels that an SCT finds in pictures, given as batches of their numbers."""
    model.prepare([(PICTURES[numbers], CLASSES[numbers]) for numbers in batches])
    return [layer.between.I.tolist() for layer in model.vit.blocks]


@pytest.mark.parametrize('batches', [([0, 1, 2, 3], [4, 5, 6]), ([6, 2, 0], [5, 1], [4], [3]), ([*range(7)],)])
def test_sct_finds_the_channels_that_its_authors_code_finds_in_any_order_and_batches(batches):
    assert channels(system('sct', chirped(), num_classes=4), *batches) == GOLDEN['sct_channels']


def test_sct_finds_its_channels_in_the_image_tokens_of_the_vit_alone_whatever_it_has_learned():
    learned, other = (system('sct', chirped(), num_classes=4) for _ in range(2))
    with torch.no_grad():
        FILL['sct'](learned)
        other.vit.cls_token[..., 5] = 1e3
    assert channels(learned, range(7)) == GOLDEN['sct_channels']
    assert not any(5 in layer for layer in channels(other, range(7)))
    with pytest.raises((IndexError, RuntimeError)):
        system('sct', chirped())(IMAGES)  # without channels


def sensitivities(model):
    """The squared gradients of the stand-in, [o, i + 1] a part."""
    scale, more = (1, 2.5, 1.6, 1.2, 2), {16: 3, 31: 60, 27: 3}
    S = {}
    for i, (name, x) in enumerate(model.named_parameters()):
        S[name] = (chirp(x.shape, i, 1.0).abs() ** (1 + 9 * (i % 3)) * scale[i % 5] * more.get(i, 1)) ** 2
    return S


@pytest.fixture(scope='module')
def selection():
    """An SPT on a ViT of D = 192 and L = 4, and the sensitivities of its parts."""
    backbone = vit.ViT(16, 8, (192, 4, 3))
    S, names = sensitivities(backbone), {part: name for name, part in backbone.named_modules()}
    model = make('spt', backbone, 3)
    return model, [torch.cat([S[f'{names[part]}.weight'].reshape(len(part.bias), -1),
                              S[f'{names[part]}.bias'][:, None]], dim=1) for part in model.parts]


def chosen(model):
    """What an SPT trains: the matrices, the whole vectors, and of all else how many numbers and the sum of their
    positions; with q, k and v apart, in the names of the authors' code."""
    matrices, vectors, singles = [[0] * 6 for _ in model.vit.blocks], set(), {}
    names = {part: name for name, part in model.vit.named_modules()}
    for part in model.parts:
        f, name = part.side, names[part]
        taken = torch.zeros(f.o * (f.i + 1), dtype=torch.bool).index_fill(0, f.at, True).view(f.o, -1)
        for j, rows in enumerate(taken.chunk(f.n)):
            own = name.replace('qkv', 'qkv'[j]) if 'qkv' in name else name
            if j in f.parts:
                matrices[int(name.split('.')[1])][('q', 'k', 'v', 'proj', 'fc1', 'fc2').index(own.split('.')[-1])] = 1
            for kind, numbers in (('weight', rows[:, 0] if f.norm else rows[:, :-1]), ('bias', rows[:, -1])):
                if numbers.all():
                    vectors.add(f'{own}.{kind}')
                elif numbers.any():
                    at = numbers.flatten().nonzero()
                    singles[f'{own}.{kind}'] = [len(at), int(at.sum())]
    return matrices, vectors, singles


@pytest.mark.parametrize('budget', GOLDEN['spt_selection'])
def test_spt_chooses_what_its_authors_code_chooses(selection, budget):
    model, S = selection
    theirs = GOLDEN['spt_selection'][budget]
    model.choose(S, theirs['total'] - 768 + 192)  # there, a class token has 768 numbers on any ViT
    assert chosen(model) == (theirs['matrices'], set(theirs['vectors']), theirs['singles'])


@pytest.mark.parametrize('n, whole', [(38, False), (39, True)])
def test_a_vector_is_whole_if_a_fifth_of_it_is_sensitive(selection, n, whole):
    """Of 192: the bias of the keys, and the gains of a LayerNorm."""
    layer = selection[0].vit.blocks[0]
    M, gains = torch.zeros(576, 193, dtype=torch.bool), torch.zeros(192, 2, dtype=torch.bool)
    M[200:200 + n, 192] = gains[:n, 0] = True
    for f, mask in ((layer.attn.qkv.side, M), (layer.norm2.side, gains)):
        parts, rest, count = f.structure(mask)
        assert parts == [] and count == rest.sum() == (192 if whole else n)


def test_spt_adds_up_squared_gradients_of_batches(monkeypatch):
    model, found, backbone, literally = system('spt', chirped()), [], chirped(), 0
    monkeypatch.setattr(model, 'choose', lambda S, budget: found.append((S, budget)))
    batches = [(PICTURES[:4], CLASSES[:4] % 3), (PICTURES[4:], CLASSES[4:] % 3)]
    model.prepare(batches)
    (S, budget), = found
    assert budget == 0.0063 * sum(p.numel() for p in backbone.parameters())
    for images, labels in batches:
        loss = F.cross_entropy(model.head(backbone(images)), labels)
        literally = literally + torch.autograd.grad(loss, backbone.blocks[1].mlp.fc1.weight)[0] ** 2
    equal(S[[part is model.vit.blocks[1].mlp.fc1 for part in model.parts].index(True)][:, :-1], literally, atol=1e-15)
    assert not any(p.requires_grad for name, p in model.vit.named_parameters() if name != 'cls_token')


@pytest.mark.parametrize('budget', [32, 500, 2000, 10 ** 9])
def test_spt_trains_no_more_than_its_budget(budget):
    """In numbers. One more sensitive number would be one more trained, or a matrix or a vector more."""
    model = system('spt', chirped(), r=1)
    S = [chirp((part.side.o, part.side.i + 1), i, 1.0) ** 8 for i, part in enumerate(model.parts)]
    model.choose(S, budget)
    count = train.count(model) - train.count(model.head)
    all_of_it = 32 + sum(part.side.o + 32 * part.side.norm + part.side.n * (part.side.i + part.side.o // part.side.n)
                         * (not part.side.norm) for part in model.parts)
    assert min(budget, all_of_it) - 130 < count <= budget


def test_spt_reads_16_batches():
    def prepared(n, *more):
        model = system('spt', chirped(), num_classes=4, budget=0.02, r=1)
        model.prepare([(PICTURES, CLASSES)] * n + [*more])
        return chosen(model)
    other = 1e3 * PICTURES, CLASSES
    assert prepared(16, other) == prepared(16) != prepared(15, other)


# ---- Properties -----------------------------------------------------------------------------------------

def plain(model):
    """The logits of the frozen ViT under the head of a system."""
    with torch.no_grad():
        return model.head(chirped(model.vit.L)(IMAGES))


@pytest.mark.parametrize('name', ['adapter', 'adapter_vpt', 'lora', 'adaptformer', 'fact', 'spt', 'ssf', 'sct', 'snf',
                                  'bi_adapter'])
def test_a_system_starts_as_the_frozen_vit_or_near_it(name):
    model, near = system(name, chirped()), name in ('ssf', 'sct', 'snf', 'bi_adapter')
    if hasattr(model, 'prepare'):
        model.prepare([(PICTURES, CLASSES % 3)])
    moved = (model.double()(IMAGES) - plain(model)).abs().max()
    assert 1e-6 < moved / plain(model).abs().max() < 0.2 if near else moved < 1e-12


@pytest.mark.parametrize('name', ['lora', 'gapt'])
def test_a_system_reads_what_its_backbone_reads(name):
    """MAE's: the mean of the image tokens, and so without prompts."""
    model, read = system(name, chirped()), []
    model.vit.readout = 'mean'
    model.vit.norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model.vit.blocks[-1].register_forward_hook(lambda *io: read.append(io[-1][0][:, 1:5].mean(dim=1)))
    model(IMAGES)
    equal(read[1], read[0], atol=0)


@pytest.mark.parametrize('name', SYSTEMS)
def test_a_system_trains_what_it_adds_and_the_head_and_nothing_of_the_vit(name):
    """Everything that is trained gets a gradient after the first step, and the ViT stays as it is."""
    torch.manual_seed(0)
    backbone = vit.build('vit_nano_patch8_24')
    before = deepcopy(backbone.state_dict())
    model = make(name, backbone, 5, **({'budget': 0.02} if name == 'spt' else {}))
    images, labels = torch.randn(4, 3, 24, 24), torch.arange(4)
    if hasattr(model, 'prepare'):
        model.prepare([(images, labels)])
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    dead = {'W', 'c', 'U'} if name == 'adapter_vpt' else set()
    for parameter, p in model.named_parameters():
        alive = p.grad is not None and bool(p.grad.any())
        assert alive == (p.requires_grad and p.numel() > 0 and parameter.split('.')[-1] not in dead), parameter
    after = model.vit.state_dict()
    assert all(after[key].equal(x) for key, x in before.items() if key != 'cls_token' or name != 'spt')


def test_fact_has_its_factors_once():
    model = system('fact', chirped())
    assert sorted(name for name in model.state_dict() if name[:4] not in ('vit.', 'head')) == [
        'factors.C', 'factors.P', 'factors.U', 'factors.V']
    other = deepcopy(model)
    with torch.no_grad():
        other.factors.V.fill_(0.1)
    assert (other(IMAGES) - model(IMAGES)).abs().max() > 1e-3 and not model.factors.V.any()


def test_snf_changes_both_shortcuts_and_the_branches_are_computed_from_the_unchanged_tokens():
    """Where the others come in, their authors' logits say."""
    model, x = system('snf', chirped()), chirp((2, 5, 32), 58, 1.0)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(chirp(p.shape, i))
    layer = model.vit.blocks[1]
    half = layer.shortcut1(x) + layer.attn(layer.norm1(x))[0]
    equal(layer(x)[0], layer.shortcut2(half) + layer.mlp(layer.norm2(half)), atol=1e-12)


def test_prompts_of_e2vpt_are_tokens_whose_outputs_are_dropped():
    """Literally: [x, P] are tokens of the layer; of keys and values, E stands beside them; only x's outputs stay."""
    layer, x = system('e2vpt', chirped(), N=3).vit.blocks[0], chirp((2, 5, 32), 59, 1.0)
    P, prompts = layer.prompts.P, layer.prompts
    assert P.shape == (3, 32)
    layer.prompts = None
    literally, _ = layer(torch.cat([x, P.expand(2, -1, -1)], dim=1))
    layer.prompts = prompts
    equal(layer(x)[0], literally[:, :5], atol=1e-12)
    assert (layer(x)[0] - chirped().blocks[0](x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize('name, parameter, bound', [
    ('lora', 'vit.blocks.0.attn.qkv.side.A', 32 ** -0.5), ('fact', 'factors.P', (6 / (16 + 24)) ** 0.5),
    ('adapter', 'vit.blocks.0.mlp.side.W', 32 ** -0.5), ('bi_adapter', 'vit.blocks.0.shortcut2.W', 32 ** -0.5),
    ('bi_adapter', 'vit.blocks.0.shortcut2.U', 0.002), ('gapt', 'P', (6 / (3 * 8 ** 2 + 32)) ** 0.5),
    ('e2vpt', 'vit.blocks.1.attn.qkv.side.E', (6 / (5 * 8)) ** 0.5),
    ('e2vpt', 'vit.blocks.1.prompts.P', (6 / (3 * 8 ** 2 + 32)) ** 0.5)])
def test_initial_values_are_spread_within_the_bounds_as_the_authors_are_and_those_of_the_head_as_timms(
        name, parameter, bound):
    """All are uniform but U: normal, and cut off at two standard deviations."""
    model = system(name, chirped())
    x = model.get_parameter(parameter).detach() / bound
    assert 0.95 < x.abs().max() <= 1
    assert x.std().item() == pytest.approx(0.44 if parameter[-1] == 'U' else 0.577, rel=0.13)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2) and not model.head.bias.any()
    assert name != 'gapt' or model.a.eq(-5).all()  # its gates start almost shut


@pytest.mark.parametrize('name', ['ssf', 'gapt'])
def test_no_system_computes_attention_weights_that_are_not_read(name, monkeypatch):
    monkeypatch.delattr(vit.Attention, 'first_row')
    assert system(name, chirped())(IMAGES).isfinite().all()


def test_temperatures_of_gapt_are_clamped_to_their_limits_and_still_get_a_gradient():
    model = filled('gapt')
    model(IMAGES).square().sum().backward()
    taus = [layer.attn.qkv.side.tau for layer in model.vit.blocks]
    assert [tau.item() for tau in taus] == [0.5, 10, 2] and all(tau.grad for tau in taus)


@pytest.mark.parametrize('name', ['lora', 'adaptformer', 'fact', 'bi_adapter', 'e2vpt', 'gapt', 'spt'])
def test_dropout_is_for_training_alone(name):
    model = filled(name, dropout=0.5, drop_path=0.0) if name in FILL else system(name, chirped(), dropout=0.5)
    equal(model(IMAGES), model(IMAGES), atol=0)
    model.train()
    assert not model(IMAGES).equal(model(IMAGES))


def test_stochastic_depth_leaves_out_branches_of_images_as_often_as_it_says():
    layer, x = table_1.Layer(chirped().blocks[0], 0.25), torch.zeros(4000, 2, 32, dtype=torch.float64)
    layer.attn.register_forward_hook(lambda *_: (x + 3, None))
    layer.mlp.register_forward_hook(lambda *_: x + 300)
    y = layer.train()(x)[0]
    assert (y == y[:, :1, :1]).all() and y.unique().tolist() == pytest.approx([0, 4, 400, 404])
    assert all((y[:, 0, 0] == both).double().mean() == pytest.approx(p, abs=0.03)
               for both, p in ((0, 1 / 16), (4, 3 / 16), (400, 3 / 16), (404, 9 / 16)))
    assert (layer.eval()(x)[0] == 303).all()
    rates = [layer.drop_path for layer in system('ssf', chirped(3), drop_path=0.3).vit.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


# ---- The paper's numbers of parameters ------------------------------------------------------------------

def million(name, **changes):
    """What a system trains of ViT-B/16 beside its head, in M."""
    with torch.device('meta'):
        model = make(name, vit.build('vit_base_patch16_224'), 1, **changes)
    return (train.count(model) - train.count(model.head)) / 1e6


HEAD = mean(769 * CONFIGS['tasks'][task]['classes'] for task in train.tasks_of(CONFIGS, ['vtab'])) / 1e6


def test_of_vpts_adapter_only_the_last_bias_is_ever_trained():
    """9,216 of the 0.23M that its code counts, beside W, c and U (test_a_system_trains_what_it_adds): Table 1's row
    (59.97) is not that of an Adapter."""
    with torch.device('meta'):
        model = make('adapter_vpt', vit.build('vit_base_patch16_224'), 1)
    sides = [layer.mlp.side for layer in model.vit.blocks]
    assert (sum(p.e.numel() for p in sides), sum(map(train.count, sides))) == (9_216, 230_544)


@pytest.mark.parametrize('name, alone, row, fits', [
    ('adapter_vpt', 0.2305, 0.27, True), ('ssf', 0.2058, 0.24, True), ('sct', 0.1117, 0.15, True),
    ('lora', 0.2949, 0.43, False),         # q and v apart has the same count; with all biases of the ViT, 0.4359
    ('adaptformer', 0.1568, 0.22, False),  # a trained LayerNorm in the branch makes 0.2132
    ('snf', 0.2582, 0.29, False),          # without published settings; 0.2942 with a head of 890 / 19 classes
    ('bi_adapter', 0.5898, 0.64, False),   # 0.63; 0.6375 with the biases that it does not have
    ('e2vpt', 0.1382, 0.27, False)])       # before its pruning, which can only lower it
def test_with_the_head_three_of_eight_counts_are_those_of_table_1(name, alone, row, fits):
    count = million(name)
    assert count == pytest.approx(alone, abs=5e-5) and (round(count + HEAD, 2) == row) == fits


def test_the_row_of_fact_is_the_mean_count_over_the_ranks_of_the_tasks():
    """Mean over tasks: its authors' settings have r = 32 in 13 of 19 tasks and 16 in 6."""
    low, high = million('fact', r=16), million('fact', r=32)
    assert low == pytest.approx(0.0310, abs=5e-5) and high == pytest.approx(0.0865, abs=5e-5)
    assert round((6 * low + 13 * high) / 19 + HEAD, 2) == 0.11


def test_snf_without_planar_flows_has_the_36_864_numbers_of_its_abstract_and_gapt_768_N_and_23():
    assert million('snf', n=0) == pytest.approx(0.036864)
    assert million('gapt') == pytest.approx(0.076823)
