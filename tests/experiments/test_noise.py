"""Figures 4 and 6: accuracies on images with noise."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from common import one_line
from pictures import images_tested, run, table, tiny

import curves
import data
import noise
import train

CPU = torch.device('cpu')
SMALL = dict(img_size=24, epochs=1)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with finished runs of two methods, two seeds each."""
    folder = tmp_path_factory.mktemp('runs')
    assert run(folder, '--method', 'linear,ivpt', '--seed', '0,1', **SMALL) == 0
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """The same in a folder of a test's own."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def noisy(folder, *argv, **changes):
    """`python tests/experiments/noise.py ARGV`, tiny. Returns the exit status."""
    return run(folder, *argv, program=noise, **SMALL | changes)


def of(folder, method, seed):
    """The result of a run, and what is in its noise.json."""
    folder = train.folder_of(tiny(method=method, seed=seed, runs=folder, **SMALL))
    return train.read_result(folder), json.loads((folder / 'noise.json').read_text())['accuracy']


@pytest.mark.parametrize('rate', [0.0, 0.25, 1.0])
def test_noise_is_mixed_in_by_its_proportion_and_is_the_same_for_every_model(rate):
    settings, seen = tiny(img_size=24, n_test=64), []
    task = data.load(settings)
    clean = torch.cat([images for images, _ in data.batches(task.test, settings, CPU)])

    def remembers(images):
        seen.append(images)
        assert torch.is_autocast_enabled('cpu')  # in the number format of the run
        return torch.zeros(len(images), 9)
    run = SimpleNamespace(model=remembers, task=task, settings=settings, compute=train.Compute(CPU, 'bfloat16', ''))
    for _ in range(2):
        noise.accuracy(run, rate)
    mixed, again = torch.cat(seen).split(64)
    assert torch.equal(mixed, again)
    added = mixed - (1 - rate) * clean
    assert added.mean().abs() < 0.02 and abs(added.std() - rate) < 0.02 * (rate > 0) + 1e-6
    if rate:
        assert abs(torch.corrcoef(torch.stack([added.flatten(), clean.flatten()]))[0, 1]) < 0.02


def test_noise_is_scored_printed_method_by_method_drawn_and_kept_beside_the_results(copied, capsys):
    argv = '--method', 'linear,ivpt', '--seed', '0,1'
    before = [of_run.read_bytes() for of_run in sorted(copied.rglob('result.json'))]
    assert noisy(copied, *argv, '--rates', '0,0.5') == 0
    rows = table(capsys.readouterr().out)
    assert rows[0] == ['task', 'model', 'method', '0', '0.5'] and len(rows) == 4
    for row, method in zip(rows[2:], ('linear', 'ivpt')):
        settings = tiny(method=method, **SMALL)
        assert row[:3] == ['where_blue', 'vit_nano_patch8_48, random weights', f'`{train.name_of(settings)}`']
        found = [of(copied, method, seed) for seed in (0, 1)]
        assert all(kept['0'] == result['accuracy'] for result, kept in found)
        for rate, cell in zip(('0', '0.5'), row[3:]):
            assert cell == curves.spread([kept[rate] for _, kept in found])
    picture, = copied.rglob('noise=0+0.5,linear+ivpt,*,seed0+seed1.png')
    assert picture.stat().st_size > 1000 and picture.parent == copied / 'where_blue/vit_nano_patch8_48'
    assert before == [of_run.read_bytes() for of_run in sorted(copied.rglob('result.json'))]


def test_more_rates_are_added_and_those_of_other_parameters_are_dropped(copied):
    for rates in '0.3', '0.9,0.300':
        assert noisy(copied, '--method', 'linear', '--rates', rates) == 0
    assert {*of(copied, 'linear', 0)[1]} == {'0.3', '0.9'}
    file, = train.folder_of(tiny(method='linear', runs=copied, **SMALL)).glob('noise.json')
    for content in file.read_text().replace('params_digest": "', 'params_digest": "0'), '{"accuracy', '[]':
        file.write_text(content)
        assert noisy(copied, '--method', 'linear', '--rates', '0.1') == 0
        assert {*of(copied, 'linear', 0)[1]} == {'0.1'}


def test_the_noise_of_other_seeds_is_scored_if_one_seed_was_not_run(copied, capfd):
    assert noisy(copied, '--method', 'linear', '--seed', '2,1', '--rates', '0') == 2
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and 'seed2: no finished run' in err
    result, kept = of(copied, 'linear', 1)
    assert kept == {'0': result['accuracy']} and table(out)[-1][3] == curves.spread([result['accuracy']])


def test_runs_of_other_seeds_see_the_same_noise_on_the_images_that_they_were_tested_on(tmp_path):
    own = dict(mean='[0.3, 0.5, 0.6]', std='[0.2, 0.3, 0.4]', batch=7, **SMALL)
    with images_tested() as tested:
        assert run(tmp_path, '--method', 'linear', '--seed', '0,1', **own) == 0
    with images_tested() as seen:
        assert noisy(tmp_path, '--method', 'linear', '--seed', '0,1', '--rates', '0,0.5', **own) == 0
    tested = [run[2:] for run in torch.cat(tested).split(22)]  # without the rehearsals
    first, clean, noisy_0, first_1, clean_1, noisy_1 = torch.cat(seen).split(20)  # the first ones are compared
    assert torch.equal(first, clean) and torch.equal(first_1, clean_1)
    assert torch.equal(torch.cat([clean, clean_1]), torch.cat(tested)) and torch.equal(noisy_1, noisy_0)
    added = noisy_0 - clean / 2
    assert len({float(image.sum()) for image in added}) == 20 and abs(added.std() - 0.5) < 0.02  # to each its own


@pytest.mark.parametrize('rates, said', [
    ('a', 'from 0 to 1'), ('-1', 'from 0 to 1'), ('0,,1', 'from 0 to 1'), ('.nan', 'from 0 to 1'), ('', 'from 0 to 1'),
    ('0,0', 'each once'), ('0.1,0.10000001', 'each once')])
def test_wrong_rates_are_refused_with_one_line(rates, said, tmp_path, capfd):
    assert noisy(tmp_path, '--method', 'ivpt', f'--rates={rates}') == 2
    assert said in one_line(capfd)
