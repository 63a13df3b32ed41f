"""DAM-VP (dam_vp.py) is that of its authors: clusters, one prompt of pixels for each, and Reptile for their start.

`dam_vp.json` was written by PadPrompter, Adapter.get_prompted_image and Meta of github.com/shikiw/DAM-VP, commit
dec5821, with torch 2.14 in float64, on the ViT of `chirped`. In the step of Reptile the first task has
four prototypes, of which two are near an image; the second has two, and is near one.
"""

import json
import re
from pathlib import Path

import dam_vp
import pytest
import torch
from common import chirp, chirped, equal, opened
from hypothesis import given
from hypothesis import strategies as st
from pictures import CONFIGS, oxford, run, tiny

import train
import vit

GOLDEN = json.loads((Path(__file__).parent / 'dam_vp.json').read_text())
main = train.program(dam_vp.main)


def model_of(num_classes=3, c=None, **options):
    """DAM-VP on the tiny ViT, with clusters c if they are given."""
    changes = {'img_size': 16, 'threshold': 1e9, 'max_clusters': 36} | options
    settings = train.settings_of(CONFIGS, 'pets', None, 'dam_vp', changes)
    model = dam_vp.dam_vp(chirped(), num_classes, settings).double()
    if c is not None:
        model.take(c)
    return model


def framed():
    """The authors' four parts of a prompt, in one picture [3, 16, 16]."""
    up, down = chirp((3, 2, 16), 60, 1.0), chirp((3, 2, 16), 61, 1.0)
    left, right = chirp((3, 12, 2), 62, 1.0), chirp((3, 12, 2), 63, 1.0)
    middle = torch.cat([left, torch.zeros(3, 12, 12, dtype=torch.float64), right], dim=2)
    return torch.cat([up, middle, down], dim=1)


IMAGES = chirp((6, 3, 16, 16), 64, 1.0)
P = framed().flatten(1)[:, dam_vp.frame(16)]  # [3, n]


def prototypes():
    f = chirped()(IMAGES).detach()
    return torch.stack([f[2], (f[0] + f[3]) / 2, f[5] + 0.3, (f[1] + f[4]) / 2])


# ---- Held against the authors' code ---------------------------------------------------------------------

def test_the_prompt_is_the_authors_frame_added_to_the_pixels():
    model, seen = model_of(c=torch.zeros(1, 32)), []
    model.frames.data.copy_(P)
    model.vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(IMAGES[:1])
    assert seen[0].equal(IMAGES[:1])  # the first pass
    equal(seen[1][0].sum(dim=0), GOLDEN['prompted'], atol=1e-6)


def test_an_image_gets_the_prompt_that_the_authors_code_gives_it():
    found = model_of(c=prototypes()).nearest(IMAGES).tolist()
    assert found == GOLDEN['nearest'] and len({*found}) == 4


def test_a_step_of_reptile_is_that_of_the_authors_code():
    f = chirped()(IMAGES).detach()
    models = [model_of(3, prototypes()), model_of(4, torch.stack([f[1], f.mean(dim=0) + 50]))]
    for t, model in enumerate(models):
        model.head.load_state_dict({'weight': chirp(model.head.weight.shape, 70 + t),
                                    'bias': chirp(model.head.bias.shape, 72 + t)})
    parts = (IMAGES[:4], torch.tensor([0, 2, 1, 2])), (IMAGES[2:], torch.tensor([3, 0, 1, 1]))
    start = dam_vp.meta_step(P, models, parts, GOLDEN['lr'], 0.01)
    p = torch.zeros(3, 256).double().index_copy(1, dam_vp.frame(16), start).view(3, 16, 16)
    sides = p[:, :2, ::3], p[:, ::3, :2], p[:, 14:, ::3]
    equal(torch.cat([x.flatten() for x in sides]), GOLDEN['meta_step'], atol=1e-6)
    for model, theirs in zip(models, GOLDEN['meta_heads']):
        equal(model.head.bias.detach(), theirs, atol=1e-6)
    assert train.schedule(3, 10, 0.0) * 0.7 == pytest.approx(GOLDEN['lr'])  # the third of ten steps, from 0.7


# ---- Clusters -------------------------------------------------------------------------------------------

def literally(x, threshold, most):
    """Average linkage as a set of sets."""
    def distance(pair):
        return torch.cdist(x[[*pair[0]]], x[[*pair[1]]]).mean().item()
    clusters = [(i,) for i in range(len(x))]
    while len(clusters) > 1:
        nearest = min(((a, b) for a in clusters for b in clusters if a < b), key=distance)
        if distance(nearest) >= threshold and len(clusters) <= most:
            break
        clusters = [c for c in clusters if c not in nearest] + [tuple(sorted(sum(nearest, ())))]
    return {*clusters}


@given(st.integers(1, 9), st.floats(0, 3), st.integers(1, 9), st.integers(0, 99))
def test_clusters_are_those_of_average_linkage(n, threshold, most, seed):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()
    found = dam_vp.average_linkage(x, threshold, most)
    assert {tuple((found == k).nonzero()[:, 0].tolist()) for k in found.unique()} == literally(x, threshold, most)
    assert found.unique().tolist() == [*range(found.max() + 1)]


@pytest.mark.parametrize('threshold, most, K', [(1.0, 12, 12), (1.01, 12, 3), (1.0, 4, 4), (99.0, 12, 1)])
def test_clusters_at_the_distance_of_the_threshold_are_merged_only_if_there_are_too_many(threshold, most, K):
    """Three squares of side 1, far from each other."""
    x = torch.tensor([[10.0 * i + a, b] for i in range(3) for a in (0, 1) for b in (0, 1)]).double()
    threshold += 0.3 * (threshold == 1.01)  # the two halves of a square are 1.21 from each other
    assert dam_vp.average_linkage(x, threshold, most).max() + 1 == K


def test_an_image_that_is_a_prototype_gets_its_own_prompt_and_gives_no_other_one_a_gradient():
    """With a threshold of 0 each image is a cluster."""
    model = model_of(threshold=0.0)
    model.prepare([(IMAGES[:4], None), (IMAGES[4:], None)])
    assert model.nearest(IMAGES).tolist() == [*range(6)]
    model(IMAGES[2:3]).square().sum().backward()
    assert model.frames.grad.flatten(1).any(dim=1).nonzero()[:, 0].tolist() == [2]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        'frames', 'head.weight', 'head.bias'}


def test_with_one_cluster_dam_vp_is_one_visual_prompt_for_all_images():
    """VP (Bahng et al., 2022): head(f(x + P))."""
    model = model_of(max_clusters=1, threshold=0.0)
    model.prepare([(IMAGES, None)])
    equal(model.prototypes, model.vit(IMAGES).mean(dim=0, keepdim=True))
    model.frames.data.copy_(P)
    equal(model(IMAGES), model.head(model.vit(IMAGES + framed())), atol=1e-12)


def test_of_many_pictures_some_that_are_evenly_chosen_are_clustered(monkeypatch):
    monkeypatch.setattr(dam_vp, 'MOST', 3)
    model = model_of(threshold=0.0)
    model.prepare([(IMAGES[:5], None)])
    assert model.nearest(IMAGES[:5:2]).tolist() == [0, 1, 2]


@pytest.mark.parametrize('size, width', [(224, 30), (48, 6), (16, 2), (4, 1)])
def test_the_frame_is_30_of_224_pixels_wide_in_proportion(size, width):
    at = dam_vp.frame(size)
    row, column = at // size, at % size
    assert torch.stack([row, column, size - 1 - row, size - 1 - column]).amin(dim=0).max() == width - 1
    assert 3 * len(at) == {224: 69_840}.get(size, 12 * width * (size - width))


def test_a_saved_state_contains_the_clusters_and_an_optimizer_keeps_the_parameter():
    model, fresh = model_of(threshold=0.0), model_of(threshold=0.0, noise=0.5)
    model.prepare([(IMAGES, None)])
    assert model.frames.data.std(dim=0).max() == 0 and 0.8 < model.frames.std() < 1.2  # all start alike
    fresh.prepare([(IMAGES[:2], None)])
    assert 0.4 < fresh.frames.std() < 0.6
    before = fresh.frames
    fresh.load_state_dict(model.state_dict())
    assert fresh.frames is before and fresh(IMAGES).equal(model(IMAGES))


def test_a_finished_run_answers_as_when_it_was_scored_without_the_file_of_its_start(tmp_path, capsys):
    """And it did start there: its learning rate is tiny. The start does not depend on how often files are decoded."""
    oxford(tmp_path, trainval=14, test=2)
    argv = ['--on', 'side_blue,pets', '--model', 'vit_nano_patch8_24', '--weights', 'random', '--data', str(tmp_path),
            '--set', 'n_train=12', 'n_val=2', 'n_test=2', 'epochs=1', 'batch=5', 'max_clusters=2']
    starts = [tmp_path / f'{i}/start/side_blue+pets/vit_nano_patch8_24/seed0.pth' for i in range(2)]
    for i, start in enumerate(starts):
        torch.manual_seed(i)  # nothing depends on it
        assert main([*argv, f'runs={tmp_path / str(i)}', f'cache_gb={i}']) == 0
        assert capsys.readouterr().out.endswith(f'--method dam_vp --set start={start}\n')
    assert main(['--on', 'side_blue', *argv[2:], f'runs={tmp_path / "of one task"}']) == 0
    p, same = (vit.read_state_dict(start)['start'] for start in starts)
    assert p.equal(same)
    changes = dict(img_size=24, epochs=1, threshold=3.0, max_clusters=4, lr=1e-9, start=start)
    assert run(tmp_path, '--method', 'dam_vp', **changes) == 0
    start.unlink()
    found, same = opened(tiny(method='dam_vp', runs=tmp_path, **changes))
    assert same
    equal(found.model.frames, p.expand_as(found.model.frames), atol=1e-5)
    assert found.result['trained_parameters'] == p.numel() * len(found.model.prototypes) + 65 * 9


@pytest.mark.parametrize('content, said', [
    (None, 'is no file with a prompt of [3, 112] numbers'),
    ({'p': torch.zeros(3, 112)}, 'is no file with a prompt'),
    ({'start': torch.zeros(3, 9)}, 'is no file with a prompt'),
    ({'start': torch.full((3, 112), float('nan'))}, 'is no file'), ({'start': Path}, 'which is code')])
def test_a_file_that_is_no_start_is_refused(content, said, tmp_path):
    if content:
        torch.save(content, tmp_path / 'start.pth')
    with pytest.raises(vit.InputError, match=re.escape(said)):
        model_of(start=str(tmp_path / 'start.pth')).prepare([(IMAGES, None)])


def test_tasks_of_different_models_have_no_start_in_common(tmp_path, capfd):
    assert main(['--on', 'side_blue,pets', '--set', f'runs={tmp_path}']) == 2
    assert capfd.readouterr().err.startswith('error: side_blue+pets: these tasks have different models')
