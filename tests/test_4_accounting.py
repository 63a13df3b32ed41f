"""The paper, audited: what its tables say about parameters and GFLOPs, counted on models that are built.

Nothing here repeats a formula. Each model is made by train.py from configs.yaml, on the meta device, where
parameters have shapes and no values.
"""

from functools import cache
from statistics import mean

import pytest
import torch
from pictures import CONFIGS
from torch.utils.flop_counter import FlopCounterMode

import train
import vit


def tasks_of(group):
    """(N, k, classes) of each task of a group, by name."""
    if group in CONFIGS['groups']:
        return {name: sizes for part in CONFIGS['groups'][group] for name, sizes in tasks_of(part).items()}
    return {group: tuple(CONFIGS['tasks'][group][x] for x in ('N', 'k', 'classes'))}


VTAB, FGVC = tasks_of('vtab'), tasks_of('fgvc')  # Tables 1 and 9, ViT-B/16
# Table 18: parameters in M, width of a token.
BACKBONES = {'vit_base_patch16_224': (85, 768), 'vit_large_patch16_224': (307, 1024),
             'vit_huge_patch14_224': (630, 1280)}
ADE20K_HEAD = 13.18  # M, the segmentation head alone: VPT's (Jia et al., 2022), and no part of this project


@cache
def build(method, N=10, k=10, classes=37, model='vit_base_patch16_224'):
    """What train.py makes of a method."""
    config, = train.settings(CONFIGS, 'pets', method, model, {'weights': '', 'N': N, 'k': k})
    with torch.device('meta'):
        return train.make_model(config, classes)


def millions(method, N, k, classes, part=''):
    """Trained parameters of a method in M: all, or those whose names start with `part`."""
    trained = train.trained(build(method, N, k, classes))
    return sum(p.numel() for name, p in trained.items() if name.startswith(part)) / 1e6


def mean_of(tasks, method, part=''):
    """Mean over tasks of trained parameters in M."""
    return mean(millions(method, *task, part) for task in tasks.values())


# ---- Parameters -----------------------------------------------------------------------------------------


def test_cdc_has_0_36M_prompts():
    """Table 8's text, mean over VTAB-1k."""
    assert mean_of(VTAB, 'cdc', 'P') == pytest.approx(0.361, abs=5e-4)


def test_ar_has_0_18M_prompts_since_it_acts_between_the_layers():
    """Table 8's text. It acts L-1 = 11 times; with one P_re more, after the last layer, it would be 0.20M."""
    assert mean_of(VTAB, 'ivpt', 'P_re') == pytest.approx(0.184, abs=5e-4)
    assert all(len(build('ivpt', *task).P_re) == len(build('ivpt', *task).P) - 1 for task in VTAB.values())
    assert round(mean_of(VTAB, 'ivpt', 'P_re') * 12 / 11, 2) == 0.20


def test_da_has_0_039M_coefficients_and_not_the_0_02M_of_the_paper():
    """Table 8's text. Without NORB/ele, the one task with N = 200, it is 0.02M."""
    assert mean_of(VTAB, 'cdc_da', 'gamma') == pytest.approx(0.039, abs=5e-4)
    rest = {name: task for name, task in VTAB.items() if name != 'smallnorb_ele'}
    assert round(mean_of(rest, 'cdc_da', 'gamma'), 2) == 0.02


def test_ivpt_has_0_62M_parameters_or_the_0_60M_of_the_paper_with_its_0_02M_for_da():
    """Tables 1 and 8."""
    whole, da = mean_of(VTAB, 'ivpt'), mean_of(VTAB, 'ivpt', 'gamma')
    assert round(whole, 2) == 0.62
    assert round(whole - da + 0.02, 2) == 0.60


def test_linear_probing_has_0_04M_parameters():
    """Table 1."""
    assert mean_of(VTAB, 'linear') == pytest.approx(0.038, abs=5e-4)


def test_fine_tuning_has_85_84M_parameters():
    """Table 1."""
    assert round(mean_of(VTAB, 'full'), 2) == 85.84


@pytest.mark.parametrize('method, paper', [('ivpt', 0.41), ('linear', 0.18), ('full', 85.98)])
def test_counts_of_fine_grained_classification_come_out(method, paper):
    """Table 9, heads included."""
    assert round(mean_of(FGVC, method), 2) == paper


@pytest.mark.parametrize('N, paper', [(10, 13.43), (100, 15.87)])
def test_counts_of_segmentation_come_out_with_n_squared_coefficients_a_layer(N, paper):
    """Table 7, ViT-L/16: prompts, coefficients of DA and the segmentation head."""
    model = build('cdc_da', N, model='vit_large_patch16_224')
    assert round(ADE20K_HEAD + (model.P.numel() + model.gamma.numel()) / 1e6, 2) == paper


def test_the_difference_between_10_and_100_prompts_comes_out_without_knowing_the_head():
    """Table 7: 15.87M - 13.43M."""
    few, many = (build('cdc_da', N, model='vit_large_patch16_224') for N in (10, 100))
    added = sum(getattr(many, x).numel() - getattr(few, x).numel() for x in ('P', 'gamma'))
    assert round(added / 1e6, 2) == round(15.87 - 13.43, 2)


@pytest.mark.parametrize('name, counted', [('vit_base_patch16_224', 85.80), ('vit_large_patch16_224', 303.30),
                                           ('vit_huge_patch14_224', 630.76)])
def test_backbones_have_the_widths_of_the_paper_and_its_sizes_but_for_large(name, counted):
    """Table 18, in whole millions and cut off, not rounded. Its 307M for ViT-L/16 is the number of the ViT
    paper (Dosovitskiy et al., 2021), Table 1, from where 85M and 630M do not differ; built it has 303M."""
    with torch.device('meta'):
        model = vit.build(name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    paper, D = BACKBONES[name]
    assert round(millions, 2) == counted and model.D == D
    assert (int(millions) == paper) == (name != 'vit_large_patch16_224')


def test_tasks_in_configs_yaml_have_the_prompts_of_the_paper():
    """Tables 16 and 15, row by row."""
    N, k, _ = zip(*VTAB.values())
    assert N == (10, 10, 10, 10, 10, 50, 5, 30, 50, 10, 30, 100, 50, 10, 50, 10, 50, 50, 200)
    assert k == (10, 5, 10, 50, 20, 20, 1, 30, 5, 50, 30, 50, 100, 10, 10, 1, 1, 10, 1)
    assert (round(mean(N), 1), round(mean(k), 1)) == (39.2, 21.8)
    N, k, _ = zip(*FGVC.values())
    assert (N, k) == ((10, 50, 5, 10, 10), (1, 10, 10, 10, 10))


def test_tasks_in_configs_yaml_have_the_classes_and_images_of_the_paper():
    """Table 17. The columns of VTAB-1k have lost the alignment of their rows: they are in Table 16's order."""
    tasks = [CONFIGS['defaults'] | CONFIGS['tasks'][name] for name in (*VTAB, *FGVC)]
    assert [task['classes'] for task in tasks] == [
        100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9, 200, 555, 102, 120, 196]
    assert [task['n_test'] for task in tasks] == [
        10_000, 6084, 1880, 6149, 3669, 26_032, 21_750, 32_768, 5400, 6300, 42_670, 15_000, 15_000, 22_735, 711,
        73_728, 73_728, 12_150, 12_150, 5794, 24_633, 6149, 8580, 8041]
    assert [(task['n_train'], task['n_val']) for task in tasks] == [(800, 200)] * 19 + [
        (5394, 600), (21_536, 2393), (1020, 1020), (10_800, 1200), (7329, 815)]


def test_figures_that_are_printed_beside_ours_are_those_of_table_1():
    """Tables 1, 10 and 11. The paper gives no count for CDC and DA alone."""
    assert CONFIGS['paper']['pets'] == {
        'full': 86.9, 'linear': 86.3, 'vpt': 88.3, 'cdc': 90.8, 'cdc_da': 91.5, 'ivpt': 91.8}
    counts = {name: method.get('paper_params') for name, method in CONFIGS['methods'].items()}
    assert counts == {'full': 85.84, 'linear': 0.04, 'vpt': 0.60, 'ivpt': 0.60, 'cdc': None, 'cdc_da': None}


def test_what_pets_saves_is_1_to_3_megabytes():
    """Prompts, coefficients and head in float32; the backbone has 343."""
    assert 1 < 4 * millions('ivpt', *VTAB['pets']) < 3


# ---- GFLOPs ---------------------------------------------------------------------------------------------


def multiply_adds(forward, *kinds):
    """Multiply-adds of one image at 224 pixels, in G: all, or those of some kinds of operation."""
    counter = FlopCounterMode(display=False)
    with counter, torch.device('meta'):
        forward(torch.empty(1, 3, 224, 224))
    counts = {str(op): n for op, n in counter.get_flop_counts()['Global'].items()}
    return sum(n for op, n in counts.items() if not kinds or op.split('.')[-1] in kinds) / 2e9


def concatenated(model):
    """Eq. 2 as VPT's code has it: the prompts are tokens of every layer."""
    def forward(images):
        tokens = model.vit.embed(images)
        for P, layer in zip(model.P[:, None], model.vit.blocks):
            tokens = layer(torch.cat([tokens[:, :1], P, tokens[:, -model.M:]], dim=1))[0]
        return model.head(model.vit.norm(tokens[:, 0]))
    return forward


LINEAR = ('addmm', 'mm', 'convolution')


def test_17_73_gflops_are_vpt_with_10_prompts_without_its_attention():
    """Table 8's 17.732 for VPT. Linear layers and the patch embedding are 17.70G multiply-adds. The rest is
    what the tool thop adds for LayerNorm (4 a value) and softmax (3 n - 1 a row of n); the products of
    queries, keys and values, another 0.8G, are not in it."""
    model = build('vpt', 10, classes=100)
    linear = multiply_adds(concatenated(model), *LINEAR)
    assert linear == pytest.approx(17.70, abs=5e-3)
    T, heads, D = 1 + model.M + 10, 12, model.vit.D
    layer_norms, softmax = 25 * T * D * 4, 12 * heads * T * (3 * T - 1)
    assert linear + (layer_norms + softmax) / 1e9 == pytest.approx(17.732, abs=1e-3)
    assert multiply_adds(concatenated(model)) - linear == pytest.approx(0.8, abs=0.03)


def test_a_vit_without_prompts_is_17_56_gflops_with_its_attention():
    """197 tokens, to compare with Table 8."""
    assert multiply_adds(build('full')) == pytest.approx(17.56, abs=0.05)


@pytest.mark.parametrize('N, ours, naive', [(10, 0.93, 1.05), (50, 0.97, 1.27), (200, 1.12, 2.09)])
def test_ivpt_costs_what_the_vit_costs_and_concatenated_prompts_cost_more(N, ours, naive):
    """In multiply-adds: prompts are keys and values alone, and the last layer's one query meets the tokens."""
    alone = multiply_adds(build('linear'))
    assert multiply_adds(build('ivpt', N)) / alone == pytest.approx(ours, abs=0.01)
    assert multiply_adds(concatenated(build('vpt', N))) / alone == pytest.approx(naive, abs=0.01)
