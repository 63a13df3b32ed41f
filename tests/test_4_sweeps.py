"""Section 4: searching settings on validation images, tables of results, noise and sweeps (Figures 4 to 6)."""

import json
import re
import runpy
import signal
import sys
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pictures import CONFIGS, folder_of, images_tested, no_network, run, tiny  # noqa: F401

import data
import paper
import train

CPU = torch.device('cpu')
SMALL = dict(img_size=24, epochs=1)


def table(text):
    """The rows of the Markdown table in a text, as lists of cells."""
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]


# ---- The product ----------------------------------------------------------------------------------------


def test_a_group_stands_for_its_tasks_and_a_group_of_groups_for_all_of_theirs():
    configs = {'groups': {'a': ['x', 'y'], 'b': ['z'], 'all': ['a', 'b']}}
    assert train.tasks_of(configs, ['all', 'w', 'a']) == ['x', 'y', 'z', 'w', 'x', 'y']
    assert paper.columns(configs, ['all']) == ['x', 'y', 'a', 'z', 'b', 'all']


def test_tasks_methods_and_seeds_are_multiplied_each_in_its_own_folder(tmp_path):
    assert run(tmp_path, '--method', 'linear,vpt', '--seed', '0,2', **SMALL) == 0
    found = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('result.json')}
    assert found == {f'where_blue/vit_nano_patch8_48/{method}/seed{seed}' for method in ('linear', 'vpt') for seed in (0, 2)}


# ---- Search ---------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """`train.run` with accuracies that a test chooses: a function of the settings. Returns what was asked for."""
    def use(score):
        asked = []

        def run(config, again=False):
            asked.append(config)
            if (accuracy := score(config)) is None:
                raise train.InputError('the loss is nan')
            return {'task': config.task, 'method': config.method, 'seed': config.seed, 'accuracy': accuracy,
                    'trained_parameters': 1, 'seconds': 1.0, 'model': config.model, 'config': vars(config)}
        monkeypatch.setattr(train, 'run', run)
        return asked
    return use


def search(tmp_path, **grid):
    """What a search finds, as settings."""
    _, status = train.run_all([tiny(runs=str(tmp_path), grid=grid)], again=False, searching=True)
    assert status == 0
    best, *_ = json.loads((folder_of(tmp_path) / 'search.json').read_text())
    return {name: best[name] for name in grid}


def test_every_point_of_the_grid_is_scored_on_the_validation_images_after_training_on_the_others(tmp_path, scored):
    asked = scored(lambda config: 0.5)
    search(tmp_path, lr=[0.1, 0.2], weight_decay=[0.0, 0.1], N=[3])
    *asked, final = asked
    assert final.score_on == 'test'
    assert {(c.lr, c.weight_decay, c.N) for c in asked} == {(a, b, 3) for a in (0.1, 0.2) for b in (0.0, 0.1)}
    assert {c.score_on for c in asked} == {'val'}
    assert len({train.folder_of(c) for c in asked}) == 4


def test_the_best_point_wins_and_of_equals_that_with_the_smaller_learning_rate(tmp_path, scored):
    scored(lambda config: 0.9 if config.lr in (0.3, 0.1) else 0.8)
    assert search(tmp_path, lr=[0.4, 0.3, 0.1, 0.05]) == {'lr': 0.1}
    scored(lambda config: 1 - config.lr)
    assert search(tmp_path, lr=[0.4, 0.3], weight_decay=[0.0, 0.1])['lr'] == 0.3


def test_a_point_that_diverges_loses_and_the_others_go_on(tmp_path, scored, capsys):
    asked = scored(lambda config: None if config.lr > 0.2 else 0.0)
    assert search(tmp_path, lr=[0.4, 0.1, 0.3]) == {'lr': 0.1} and len(asked) == 4
    kept = json.loads((tmp_path / 'where_blue/vit_nano_patch8_48/ivpt/seed0/search.json').read_text())
    assert kept[0] == {'lr': 0.1, 'accuracy': 0.0} and [row['accuracy'] for row in kept[1:]] == [None, None]
    assert capsys.readouterr().out.count(': none') == 2


def test_where_all_points_diverge_lower_rates_are_asked_for(tmp_path, scored, capfd):
    scored(lambda config: None)
    assert run(tmp_path, '--method', 'ivpt', '--search', grid='{lr: [0.4, 0.1]}') == 2
    assert re.search('no point of the grid has come to an end.*--set grid', capfd.readouterr().err)


def test_after_the_search_every_seed_is_trained_with_what_the_first_one_found_and_tested_once(tmp_path, scored):
    asked = scored(lambda config: 0.9 if config.lr == 0.1 else 0.8)
    argv = '--method', 'vpt,ivpt', '--seed', '3,4', '--search'
    assert run(tmp_path, *argv, grid='{lr: [0.2, 0.1]}') == 0
    assert [(c.method, c.seed, c.lr) for c in asked if c.score_on == 'val'] == [
        (method, 3, lr) for method in ('vpt', 'ivpt') for lr in (0.2, 0.1)]
    assert {(c.method, c.seed, c.lr) for c in asked if c.score_on == 'test'} == {
        (method, seed, 0.1) for method in ('vpt', 'ivpt') for seed in (3, 4)}
    assert sum(c.score_on == 'test' for c in asked) == 4


def test_a_search_for_real_trains_on_train_alone_and_is_repeated_by_again_alone(tmp_path, capsys):
    argv = '--method', 'vpt', '--search'
    assert run(tmp_path, *argv, grid='{lr: [0.1, 0.01]}', **SMALL) == 0
    said = capsys.readouterr().out
    assert said.count('% of 10 images') == 2 and said.count('% of 20 images') == 1  # validation, test
    assert run(tmp_path, *argv, grid='{lr: [0.1, 0.01]}', **SMALL) == 0
    twice = capsys.readouterr().out
    assert twice.count('finished before') == 3 and 'epoch' not in twice
    assert run(tmp_path, *argv, '--again', grid='{lr: [0.1, 0.01]}', **SMALL) == 0
    again = capsys.readouterr().out
    assert again.count('epoch   1/1') == 3 and again.count('% of 10 images') == 2 and 'finished' not in again
    assert train.read_result(folder_of(tmp_path, 'vpt'))['score_on'] == 'test'


@pytest.mark.parametrize('grid, best, said', [
    ({'lr': [0.4, 0.2, 0.1]}, 0.4, 'the best lr, 0.4, is the last of the grid on its side'), ({'lr': [0.4, 0.2, 0.1]}, 0.2, ''),
    ({'lr': [0.1, 0.4]}, 0.1, 'the best lr, 0.1, is'), ({'lr': [0.1]}, 0.1, ''), ({'weight_decay': [0.0, 0.1]}, 0.0, ''),
    ({'weight_decay': [0.0, 0.1]}, 0.1, 'the best weight_decay, 0.1, is')])
def test_a_search_says_when_its_best_point_lies_at_the_edge_of_the_grid(grid, best, said, tmp_path, scored, capsys):
    scored(lambda config: getattr(config, *grid) == best)
    search(tmp_path, **grid)
    out = capsys.readouterr().out
    assert (said in out) and ('look beyond' in out) == bool(said)


@pytest.mark.parametrize('grid, said', [
    ('{lr: 0.1}', 'list of values'), ('{}', 'list of values'), ('{lr: []}', 'list of values'), ('{lr: [big]}', 'lr is a float'),
    ('{lrs: [1]}', "unknown setting 'lrs': did you mean 'lr'"), ('{lr: [-1.0]}', 'lr goes from'), ('[1]', 'grid is a dict'),
])
def test_a_wrong_grid_is_refused(grid, said, tmp_path, capfd):
    assert run(tmp_path, '--search', grid=grid) == 2
    err = capfd.readouterr().err
    assert said in err and err.count('\n') == 1


def test_vpts_grid_is_the_default():
    """lr {50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05} * batch / 256, weight decay {0.01, 0.001, 0.0001, 0}."""
    config, = train.settings(CONFIGS, 'pets', 'ivpt')
    assert [lr * 256 / config.batch for lr in config.grid['lr']] == [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
    assert config.grid['weight_decay'] == [0.01, 0.001, 0.0001, 0]


def test_full_fine_tuning_and_bias_have_the_optimiser_and_the_rates_of_vpts_code():
    """AdamW, {5e-3, 1e-3, 5e-4, 1e-4} * batch / 256, 5 of 100 epochs of warm-up; any decay but 0 is 0.01 there."""
    for method in 'full', 'bias':
        config, = train.settings(CONFIGS, 'pets', method)
        assert sorted(lr * 256 / config.batch for lr in config.grid['lr']) == pytest.approx([1e-4, 5e-4, 1e-3, 5e-3])
        assert config.grid['weight_decay'] == [0.01, 0.0]
        assert (config.optimizer, config.warmup * config.epochs, config.lr in config.grid['lr']) == ('AdamW', 5, True)


def test_pre_training_keeps_settings_of_its_own():
    config, = train.settings(CONFIGS, 'shapes_framed')
    assert (config.optimizer, config.lr, config.weight_decay, config.warmup, config.weights, config.tune) == (
        'AdamW', 0.001, 0.05, 0.1, 'random', 'all')


# ---- Report ---------------------------------------------------------------------------------------------

REPORTED = {'defaults': {'N': 10, 'k': 10}, 'tasks': {'x': {}, 'y': {}, 'z': {}, 'w': {}}, 'methods': {'vpt': {}, 'cdc': {}, 'ivpt': {}},
            'groups': {'a': ['x', 'y'], 'b': ['z'], 'all': ['a', 'b']}, 'models': {'vit_base_patch16_224.m': {'weights': 'a/b.npz#md5=1'}},
            'paper': {'vit_base_patch16_224.m': {'x': {'vpt': 50.0, 'ivpt': 60.0}, 'a': {'vpt': 44.4}, 'params': {'vpt': 0.6}}}}


@pytest.fixture
def results(tmp_path):
    """Write a result as a run would."""
    def put(task, method, seed, accuracy, trained=1_500_000, score_on='test', place='', **config):
        model = dict(model='vit_base_patch16_224.m', weights='elsewhere/b.npz', img_size=224, N=10, k=10)
        config = model | dict(task=task, method=method, seed=seed, lr=0.1) | config
        folder = tmp_path / task / config['model'] / method / f'seed{seed}' / place
        train.write_result(folder, {'accuracy': accuracy, 'trained_parameters': trained, 'score_on': score_on, 'config': config})
    return put


def reported(capsys, *args):
    paper.report(REPORTED, *args)
    out = capsys.readouterr().out
    return table(out), out


def test_a_report_has_means_over_seeds_the_papers_numbers_and_the_difference(results, tmp_path, capsys):
    for seed, accuracy in enumerate((0.51, 0.53, 0.58)):
        results('x', 'vpt', seed, accuracy)
    rows, _ = reported(capsys, tmp_path)
    values = [51, 53, 58]
    assert rows == [['method', 'trained', 'x'], ['---'] * 3,
                    ['`vpt`', '1.500M', f'{fmean(values):.1f} ± {stdev(values):.1f}'],
                    ['the paper', '0.60M', '50.0'], ['difference', '', '+4.0']]


def test_the_mean_of_a_group_of_groups_is_the_mean_of_the_groups_means(results, tmp_path, capsys):
    """As the paper takes it, and not the mean over the tasks: here (0.3 + 0.8) / 2 and not (0.2 + 0.4 + 0.8) / 3."""
    for task, accuracy in (('x', 0.2), ('y', 0.4), ('z', 0.8)):
        results(task, 'cdc', 0, accuracy)
    rows, _ = reported(capsys, tmp_path, ['all'], None, ['cdc'])
    assert rows[0] == ['method', 'trained', 'x', 'y', 'a', 'z', 'b', 'all']
    assert rows[2] == ['`cdc`', '1.500M', '20.0', '40.0', '30.0', '80.0', '80.0', '55.0']


def test_a_cell_that_has_not_been_run_is_empty_and_so_is_the_mean_of_its_group(results, tmp_path, capsys):
    results('x', 'vpt', 0, 0.5)
    results('y', 'vpt', 0, 0.4)
    results('x', 'ivpt', 0, 0.7)
    results('z', 'ivpt', 0, 0.9, score_on='val')  # a validation accuracy is no result
    rows, _ = reported(capsys, tmp_path, ['all'], None, ['vpt', 'cdc', 'ivpt'])
    assert [row[2:] for row in rows if row[0].startswith('`')] == [
        ['50.0', '40.0', '45.0', '', '', ''], [''] * 6, ['70.0', '', '', '', '', '']]
    assert rows[4][2:] == ['+0.0', '', '+0.6', '', '', '']


def test_a_group_is_a_mean_over_the_seeds_that_have_all_its_tasks(results, tmp_path, capsys):
    for task, accuracies in (('x', (0.2, 0.9)), ('y', (0.4,))):
        for seed, accuracy in enumerate(accuracies):
            results(task, 'cdc', seed, accuracy)
    rows, _ = reported(capsys, tmp_path, ['a'], None, ['cdc'])
    assert rows[2][4] == '30.0'


def test_what_the_runs_of_a_column_differ_in_is_said_below_the_table(results, tmp_path, capsys):
    results('x', 'vpt', 0, 0.5)
    results('x', 'vpt', 1, 0.5, data='elsewhere', weights='b.npz')
    results('x', 'cdc', 0, 0.5, structure='cdc')
    results('y', 'ivpt', 0, 0.5, lr=0.3)
    assert ' is ' not in reported(capsys, tmp_path)[1]
    results('x', 'vpt', 2, 0.5, lr=0.3)
    results('x', 'ivpt', 2, 0.5, N=5)
    out = reported(capsys, tmp_path)[1]
    assert 'x: lr is 0.1 for cdc/ivpt/vpt, 0.3 for vpt\n' in out and 'x: N is 10 for cdc/vpt, 5 for ivpt\n' in out
    results('x', 'cdc', 1, 0.5, **{'train labels': '8 00aa'})
    assert 'x: train labels is ' in reported(capsys, tmp_path)[1]


@pytest.mark.parametrize('config, beside', [({}, True), (dict(model='vit_large_patch16_224.x'), False), (dict(img_size=98), False),
                                            (dict(weights='mae.pth'), False), (dict(weights='random'), False),
                                            (dict(N=50), False), (dict(k=1), False)])
def test_the_papers_numbers_stand_beside_runs_of_just_their_backbone_image_size_and_prompts(config, beside, results, tmp_path, capsys):
    results('x', 'vpt', 0, 0.5, **config)
    assert ('the paper' in reported(capsys, tmp_path)[1]) == beside


def test_each_backbone_has_a_table(results, tmp_path, capsys):
    results('x', 'vpt', 0, 0.5)
    results('x', 'vpt', 1, 0.5, model='vit_large_patch16_224.x')
    results('x', 'vpt', 2, 0.5, weights='random')
    _, out = reported(capsys, tmp_path)
    assert out.count('| method |') == 3 and 'vit_base_patch16_224.m, random weights:\n' in out
    results('x', 'vpt', 3, 0.5, weights='mae.pth')  # in the row of seed 0, which is then no row of the paper's
    assert 'the paper' not in reported(capsys, tmp_path)[1]


def test_a_result_counts_as_what_it_says_of_itself_and_twice_the_same_is_refused(results, tmp_path, capsys):
    results('x', 'vpt', 0, 0.5)
    (tmp_path / 'x').rename(tmp_path / 'y')
    assert reported(capsys, tmp_path)[0][0] == ['method', 'trained', 'x']
    results('x', 'vpt', 0, 0.6, place='copy')
    with pytest.raises(train.InputError, match='there are two results of vit_base_patch16_224.m, x, vpt, 0'):
        paper.report(REPORTED, tmp_path)


def test_a_report_of_a_damaged_result_is_refused_with_its_name(results, tmp_path):
    for seed in range(2):
        results('x', 'vpt', seed, 0.5)
    file = tmp_path / 'x/vit_base_patch16_224.m/vpt/seed0/result.json'
    file.write_text(file.read_text()[:-9])
    with pytest.raises(train.InputError, match=f'{file} is damaged'):
        paper.report(REPORTED, tmp_path)


def test_a_report_of_some_seeds_leaves_the_others_out(results, tmp_path, capsys):
    for seed, accuracy in enumerate((0.1, 0.2, 0.3)):
        results('x', 'cdc', seed, accuracy)
    assert reported(capsys, tmp_path, ['x'], None, ['cdc'], [1])[0][2][2] == '20.0'
    assert reported(capsys, tmp_path, ['x'], None, ['cdc'], [2, 0])[0][2][2].startswith('20.0 ± 14.1')


def test_a_report_takes_the_seeds_of_the_command_line(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(paper, 'report', lambda *args: asked.append(args[-1]))
    monkeypatch.setattr(train, 'code_in', lambda path: paper)
    for argv in ((), ('--seed', '0,2,0')):
        assert train.main(['--report', *argv, '--set', f'runs={tmp_path}']) == 0
    assert asked == [None, {0, 2}]
    assert train.main(['--report', '--seed', '*']) == 2


def test_a_report_of_nothing_is_refused_with_the_name_of_the_folder(tmp_path, capfd):
    for argv in (), ('--task', 'pets'):
        assert train.main(['--report', *argv, '--set', f'runs={tmp_path}']) == 2
        err = capfd.readouterr().err
        assert f'{tmp_path}: no finished run' in err and err.count('\n') == 1


@pytest.mark.parametrize('argv, said', [(('--task', 'pet'), "unknown task 'pet': did you mean 'pets'"),
                                        (('--method', 'ivtp'), "unknown method 'ivtp': did you mean 'ivpt'")])
def test_a_report_of_what_there_is_not_is_refused(argv, said, tmp_path, capfd):
    assert train.main(['--report', *argv, '--set', f'runs={tmp_path}']) == 2
    err = capfd.readouterr().err
    assert said in err and err.count('\n') == 1


def test_a_report_shows_what_the_runs_printed(tmp_path, capsys):
    argv = '--method', 'linear,ivpt', '--seed', '0,1'
    assert run(tmp_path, *argv, **SMALL) == 0
    capsys.readouterr()
    assert train.main(['--report', '--set', f'runs={tmp_path}']) == 0
    rows = table(capsys.readouterr().out)
    for row in rows:
        if row[0] in ('`linear`', '`ivpt`'):
            found = [100 * train.read_result(tmp_path / 'where_blue' / 'vit_nano_patch8_48' / row[0].strip('`') / f'seed{s}')['accuracy'] for s in (0, 1)]
            assert row[2] == f'{fmean(found):.1f} ± {stdev(found):.1f}'
    assert len(rows) >= 4


def test_the_script_finds_its_tables_from_any_folder_and_is_not_loaded_a_second_time(results, tmp_path, capsys, monkeypatch):
    results('pets', 'vpt', 0, 0.5)
    monkeypatch.delitem(sys.modules, 'train')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--report', '--set', 'runs=.'])
    pipe = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(train.__file__, run_name='__main__')
    signal.signal(signal.SIGPIPE, pipe)
    assert end.value.code == 0 and table(capsys.readouterr().out)[2][2] == '50.0'
    assert sys.modules['train'].__name__ == '__main__'


# ---- Noise ----------------------------------------------------------------------------------------------


class Remembers(torch.nn.Module):
    """A model that keeps the images it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return torch.zeros(len(images), 9)


@pytest.mark.parametrize('rate', [0.0, 0.25, 1.0])
def test_noise_is_mixed_in_by_its_proportion_and_is_the_same_for_every_model(rate):
    config = tiny(img_size=24, n_test=64)
    test = data.load(config).test
    clean = torch.cat([images for images, _ in data.batches(test, config, CPU)])
    noisy = []
    for _ in range(2):
        model = Remembers()
        train.accuracy(model, test, config, CPU, rate)
        noisy.append(torch.cat(model.seen))
    assert torch.equal(*noisy)
    noise = noisy[0] - (1 - rate) * clean
    assert noise.mean().abs() < 0.02 and abs(noise.std() - rate) < 0.02 * (rate > 0) + 1e-6
    if rate:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), clean.flatten()]))[0, 1]) < 0.02


def test_noise_goes_into_the_results_of_finished_runs_and_is_printed_method_by_method(tmp_path, capsys):
    argv = '--method', 'linear,ivpt', '--seed', '0,1'
    assert run(tmp_path, *argv, **SMALL) == 0
    capsys.readouterr()
    assert run(tmp_path, *argv, '--noise', '0,0.5', **SMALL) == 0
    rows = table(capsys.readouterr().out)
    backbone = 'vit_nano_patch8_48, random weights'
    assert [row[:3] for row in rows[2:]] == [['where_blue', backbone, '`linear`'], ['where_blue', backbone, '`ivpt`']]
    for row in rows[2:]:
        stored = [train.read_result(tmp_path / 'where_blue' / 'vit_nano_patch8_48' / row[2].strip('`') / f'seed{seed}') for seed in (0, 1)]
        assert all(result['noise']['0'] == result['accuracy'] for result in stored)
        for rate, cell in zip(('0', '0.5'), row[3:]):
            assert cell == paper.spread([result['noise'][rate] for result in stored])
    assert (tmp_path / 'where_blue/vit_nano_patch8_48/noise.png').stat().st_size > 1000
    assert run(tmp_path, *argv, '--noise', '0.9', **SMALL) == 0
    assert set(train.read_result(tmp_path / 'where_blue/vit_nano_patch8_48/ivpt/seed0')['noise']) == {'0', '0.5', '0.9'}


def test_a_seed_that_was_not_run_does_not_keep_the_noise_of_the_others_back(tmp_path, capfd):
    assert run(tmp_path, '--method', 'linear', '--seed', '1', **SMALL) == 0
    assert run(tmp_path, '--method', 'linear', '--seed', '0,1', '--noise', '0', **SMALL) == 2
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and 'seed0: no finished run' in err
    result = train.read_result(folder_of(tmp_path, 'linear', seed=1))
    assert result['noise'] == {'0': result['accuracy']} and table(out)[-1][3] == paper.spread([result['accuracy']])


def test_runs_of_other_seeds_see_the_same_noise_on_the_images_that_they_were_tested_on(tmp_path):
    """Their own settings prepare the images, and not those of the command line, which here are the defaults."""
    own = dict(img_size=24, mean='[0.3, 0.5, 0.6]', std='[0.2, 0.3, 0.4]', batch=7, epochs=1)
    with images_tested() as tested:
        assert run(tmp_path, '--method', 'linear', '--seed', '0', **own) == 0
    assert run(tmp_path, '--method', 'linear', '--seed', '1', **own) == 0
    with images_tested() as seen:
        assert train.main(['--method', 'linear', '--seed', '0,1', '--noise', '0,0.5', '--set', f'runs={tmp_path}']) == 0
    clean, noisy, clean_1, noisy_1 = torch.cat(seen).split(20)
    assert torch.equal(clean, torch.cat(tested)) and torch.equal(clean_1, clean) and torch.equal(noisy_1, noisy)
    noise = noisy - clean / 2
    assert len({float(image.sum()) for image in noise}) == 20 and abs(noise.std() - 0.5) < 0.02  # to each its own


@pytest.mark.parametrize('rates, said', [('a', 'from 0 to 1'), ('-1', 'from 0 to 1'), ('0,,1', 'from 0 to 1'),
                                         ('.nan', 'from 0 to 1'), ('', 'from 0 to 1'), ('0.1', 'no finished run')])
def test_wrong_rates_and_runs_that_are_not_there_are_one_line(rates, said, tmp_path, capfd):
    assert run(tmp_path, '--method', 'ivpt', f'--noise={rates}') == 2
    err = capfd.readouterr().err
    assert said in err and err.count('\n') == 1


# ---- Sweeps, and pictures of them (Figures 4 to 6) --------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """What `paper.lines` is given instead of drawing it: (path, name of x, ticks, curves)."""
    calls = []
    monkeypatch.setattr(train, 'code_in', lambda path: paper)
    monkeypatch.setattr(paper, 'lines', lambda path, x_name, y_name, ticks, curves: calls.append((path, x_name, ticks, curves)))
    return calls


def test_a_sweep_trains_below_the_runs_folder_draws_and_the_second_time_trains_nothing(tmp_path, capsys):
    argv = '--method', 'ivpt', '--sweep', 'k=0,2'
    assert run(tmp_path, *argv, **SMALL) == 0
    first = table(capsys.readouterr().out)
    assert first[0] == ['task', 'model', 'method', '0', '2']
    below = {path.parent.relative_to(folder_of(tmp_path)).as_posix() for path in tmp_path.rglob('result.json')}
    assert below == {'sweep/k=0', 'sweep/k=2'}
    assert (folder_of(tmp_path) / 'sweep-k.png').stat().st_size > 1000
    assert run(tmp_path, *argv, **SMALL) == 0
    second = capsys.readouterr().out
    assert table(second) == first and second.count('finished before') == 2 and 'epoch' not in second


def test_k_is_0_means_no_attentive_reinforcement(tmp_path):
    assert run(tmp_path, '--method', 'ivpt', '--sweep', 'k=0', **SMALL) == 0
    assert run(tmp_path, '--method', 'ivpt', reinforcement='none', **SMALL) == 0
    swept, main = (train.read_result(folder) for folder in (folder_of(tmp_path) / 'sweep/k=0', folder_of(tmp_path)))
    assert swept['trained_parameters'] == main['trained_parameters']
    assert paper.losses(folder_of(tmp_path) / 'sweep/k=0') == paper.losses(folder_of(tmp_path))


def test_each_accuracy_of_a_sweep_stands_below_its_value_and_beside_its_method(tmp_path, scored, drawn, capsys):
    scored(lambda config: config.N / 100 + config.seed / 10 + (config.method == 'vpt') / 5)
    assert run(tmp_path, '--sweep', 'N=5,1,20', '--method', 'ivpt,vpt', '--seed', '0,2') == 0
    rows = table(capsys.readouterr().out)
    assert [row[2:] for row in rows if 'where' in row[0]] == [
        ['`ivpt`', '15.0 ± 14.1', '11.0 ± 14.1', '30.0 ± 14.1'], ['`vpt`', '35.0 ± 14.1', '31.0 ± 14.1', '50.0 ± 14.1']]
    (path, name, ticks, curves), = drawn
    assert (path.relative_to(tmp_path).as_posix(), name) == ('where_blue/vit_nano_patch8_48/sweep-N.png', 'N')
    assert ticks == {0: '5', 1: '1', 2: '20'}
    for (*_, method), curve in curves.items():
        more = 20 * (method == 'vpt')
        assert curve == [pytest.approx((x, n + 10 + more, 200 ** 0.5)) for x, n in enumerate((5, 1, 20))]


def test_a_value_at_which_training_diverges_is_left_out_and_the_status_says_so(tmp_path, scored, drawn, capfd):
    scored(lambda config: None if config.lr > 1 else 0.5)
    assert run(tmp_path, '--method', 'ivpt', '--sweep', 'lr=0.1,2.0,0.2') == 2
    out, err = capfd.readouterr()
    assert table(out)[-1][3:] == ['50.0', '', '50.0'] and 'the loss is nan' in err and err.count('\n') == 1
    assert [[x for x, *_ in curve] for curve in drawn[0][3].values()] == [[0, 2]]
    assert run(tmp_path, '--method', 'ivpt', '--sweep', 'lr=2.0,3.0') == 2 and len(drawn) == 1


def test_values_of_a_sweep_that_are_the_same_count_once(tmp_path, scored, drawn):
    asked = scored(lambda config: 0.5)
    assert run(tmp_path, '--method', 'ivpt', '--sweep', 'lr=0.1,1e-1,0.10') == 0
    assert len(asked) == 1 and drawn[0][2] == {0: '0.1'}
    assert run(tmp_path, '--method', 'ivpt', '--sweep', 'img_size=0,48') == 0
    assert len(asked) == 2 and drawn[1][2] == {0: '48'}


def test_a_report_shows_main_runs_and_no_point_of_a_sweep(results, tmp_path, capsys):
    results('x', 'vpt', 0, 0.5)
    results('x', 'vpt', 0, 0.9, place='sweep/N=1', point='sweep/N=1')
    assert reported(capsys, tmp_path)[0][2][2] == '50.0'


def test_the_loss_of_runs_is_drawn_by_whole_epochs_and_named_by_method_and_seed(tmp_path, drawn):
    for method, seed in (('ivpt', 0), ('vpt', 3)):
        folder = folder_of(tmp_path, method, seed=seed)
        train.write_log(folder, [{'epoch': 1, 'loss': 2.0 + seed}, {'epoch': 2, 'loss': 1.5}])
        assert run(tmp_path, '--loss', '--method', method, '--seed', str(seed)) == 0
        path, name, ticks, curves = drawn[-1]
        assert (path, name, ticks) == (folder / 'loss.png', 'epoch', {1: '1', 2: '2'})
        assert {key[2:]: curve for key, curve in curves.items()} == {
            (method, f'seed {seed}'): [(1, 2.0 + seed, 0.0), (2, 1.5, 0.0)]}


@pytest.mark.parametrize('log, said', [('', 'no epoch of such a run'), ('{"epoch": 1}', 'is damaged'), ('{"epo', 'is damaged'),
                                       ('{"epoch": 1, "loss": NaN}', 'is damaged'), ('{"epoch": 1, "loss": "a"}', 'is damaged')])
def test_a_log_without_losses_is_refused(log, said, tmp_path):
    (tmp_path / 'log.jsonl').write_text(log)
    with pytest.raises(train.InputError, match=said):
        paper.losses(tmp_path)


def coloured(path, colour, area):
    """How many pixels of an area have just this colour."""
    rgb = np.frombuffer(bytes.fromhex(colour[1:]), dtype=np.uint8)
    return (np.asarray(Image.open(path).crop(area)) == rgb).all(-1).sum()


def test_every_curve_has_its_colour_and_its_mark_in_the_picture_and_in_the_legend(tmp_path):
    curves = {('x', 'm', f'method{i}'): [(0, 10 * i, 1.0), (1, 10 * i + 5, 1.0)] for i in range(7)}
    paper.lines(tmp_path / 'a.png', 'N', 'accuracy', {0: '1', 1: '5'}, curves)
    assert Image.open(tmp_path / 'a.png').size == (800, 500 + 25 * 7)
    for i, colour in enumerate(paper.COLOURS):
        assert coloured(tmp_path / 'a.png', colour, (100, 80, 760, 420)) > 300
        assert coloured(tmp_path / 'a.png', colour, (80, 490 + 25 * i, 170, 510 + 25 * i)) > 100


def test_of_two_curves_that_are_equal_no_error_bar_hides_the_other(tmp_path):
    same = [(0, 50.0, 20.0), (1, 50.0, 20.0)]
    paper.lines(tmp_path / 'a.png', 'N', 'accuracy', {0: '1', 1: '5'}, {('x', 'm', 'a'): same, ('x', 'm', 'b'): same})
    for colour in paper.COLOURS[:2]:
        assert coloured(tmp_path / 'a.png', colour, (80, 80, 140, 235)) > 50  # above the line


@given(low=st.floats(-1000, 1000), width=st.floats(0.001, 10_000))
def test_an_axis_has_round_numbers_that_enclose_the_data(low, width):
    ticks = paper.round_numbers(low, low + width)
    numbers = [*ticks]
    step = float(f'{numbers[1] - numbers[0]:.6e}')
    assert 2 <= len(numbers) <= 7 and numbers[0] <= low + 1e-9 and low + width - 1e-9 <= numbers[-1]
    assert f'{step:.6e}'[:8] in ('1.000000', '2.000000', '5.000000')
    assert all(abs(x / step - round(x / step)) < 1e-6 for x in numbers)
    assert [float(name) for name in ticks.values()] == pytest.approx(numbers, abs=1e-9) and len({*ticks.values()}) == len(ticks)


def test_an_axis_of_one_number_has_that_number():
    assert paper.round_numbers(50, 50) == {50: '50'} and paper.round_numbers(0, 0) == {0: '0'}


@pytest.mark.parametrize('argv, said', [
    ('--sweep N', 'takes NAME=V1,V2'), ('--sweep N=1,,2', 'takes NAME=V1,V2'), ('--sweep tune=a/b', 'takes NAME=V1,V2'),
    ('--sweep seed=1,2', 'or names it'), ('--sweep workers=0,1', 'changes no number'), ('--sweep batch=8', 'given by --set too'),
    ('--sweep Nn=1', "unknown setting 'Nn'"), ('--sweep N=1,0', 'N goes from 1'), ('--sweep N=1 --search', 'not allowed with'),
    ('--sweep N=1 --image a.png', 'not allowed with'), ('--loss --image a.png', 'not allowed with'),
    ('--sweep N=1 --run x', '--run x is for'), ('--loss --run x', '--run x is for'), ('--loss --again', 'this trains none'),
    ('--loss', 'no epoch of such a run')])
def test_a_sweep_or_a_loss_that_cannot_be_drawn_is_refused_in_one_line(argv, said, tmp_path, capfd):
    assert run(tmp_path, *argv.split()) == 2
    err = capfd.readouterr().err
    assert said in err and err.count('\n') == 1
