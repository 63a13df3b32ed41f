"""Tables of results beside the paper's."""

import json
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from pictures import CONFIGS, run, table, tiny

import report
import sweep
import train

PAPER = report.read_published()
BASE = 'vit_base_patch16_224.orig_in21k'


@pytest.fixture
def results(tmp_path):
    """Write a result as a run would: of a task, method and seed, with changes of the command line."""
    def put(task, method, seed, accuracy, changes={}, place=None, model=None, label=(), best={}, **more):
        settings = train.settings_of(CONFIGS, task, model, method, changes | {'seed': seed, 'runs': str(tmp_path)})
        settings = sweep.with_values(replace(settings, label=label), best)
        result = {'task': task, 'model': settings.model, 'method': method, 'seed': seed, 'accuracy': accuracy,
                  'score_on': settings.loop.score_on, 'measure': 'accuracy', 'trained_parameters': 1_500_000,
                  'settings': train.as_dict(settings), 'identity': {'backbone': '00aa'}} | more
        folder = tmp_path / place if place else train.folder_of(settings)
        train.write(folder / 'result.json', json.dumps(result).encode())
    return put


@pytest.fixture
def reported(tmp_path, capsys, monkeypatch):
    """`python tests/experiments/report.py ARGV`: the rows of its table, and all it says."""
    monkeypatch.setattr(train, 'read_configs', lambda: CONFIGS)  # the files are read once
    monkeypatch.setattr(report, 'read_published', lambda: PAPER)

    def reported(*argv):
        assert report.main([*argv, '--set', f'runs={tmp_path}']) == 0
        out = capsys.readouterr().out
        return table(out), out
    return reported


def test_a_group_stands_for_its_tasks_and_a_group_of_groups_for_all_of_theirs():
    configs = {'groups': {'a': ['x', 'y'], 'b': ['z'], 'all': ['a', 'b']}}
    assert train.tasks_of(configs, ['all', 'w', 'a'])[:4] == ['x', 'y', 'z', 'w']
    assert report.columns(configs, ['all']) == ['x', 'y', 'a', 'z', 'b', 'all']


# ---- Tables ---------------------------------------------------------------------------------------------


def test_a_report_has_means_over_seeds_the_papers_numbers_and_the_difference(results, reported):
    values = [81, 83, 88]
    for seed, accuracy in enumerate(values):
        results('cifar100', 'vpt', seed, accuracy / 100)
    assert reported()[0] == [['method', 'trained', 'cifar100'], ['---'] * 3,
                             ['`vpt`', '1.500M', f'{fmean(values):.1f} ± {stdev(values):.1f}'],
                             ['the paper', '0.60M', '78.8'], ['difference', '', '+5.2']]


def test_the_mean_of_a_group_of_groups_is_the_mean_of_the_groups_means(results, reported):
    """As the paper takes it, and not the mean over the tasks: here (0.3 + 0.8) / 2 and not (7 * 0.3 + 0.8 ...) / 19."""
    for group, accuracy in ('natural', 0.3), ('specialized', 0.8), ('structured', 0.1):
        for task in CONFIGS['groups'][group]:
            results(task, 'vanilla_cdc', 0, accuracy)
    header, _, row, *_ = reported('--task', 'vtab', '--method', 'vanilla_cdc')[0]
    means = dict(zip(header, row))
    assert header[-1] == 'vtab' and len(header) == 2 + 19 + 4 and header.index('natural') == 2 + 7
    assert [means[name] for name in CONFIGS['groups']['vtab']] == ['30.0', '80.0', '10.0'] and means['vtab'] == '40.0'


def test_a_cell_that_has_not_been_run_is_empty_and_so_is_the_mean_of_its_group(results, reported):
    results('where_blue', 'vpt', 0, 0.5)
    results('shape_red', 'vpt', 0, 0.4)
    results('where_blue', 'ivpt', 0, 0.7)
    results('side_blue', 'ivpt', 0, 0.9, {'score_on': 'val'})  # a validation accuracy is no result
    rows, _ = reported('--task', 'asked,not_asked', '--method', 'vpt,cdc,ivpt')
    vpt, cdc, ivpt = (row[2:] for row in rows[2:])
    assert vpt == ['50.0', '40.0', '45.0', '', '', ''] and cdc == [''] * 6 and ivpt == ['70.0', *[''] * 5]


def test_a_group_is_a_mean_over_the_seeds_that_have_all_its_tasks(results, reported):
    for task, accuracies in (('where_blue', (0.2, 0.9)), ('shape_red', (0.4,))):
        for seed, accuracy in enumerate(accuracies):
            results(task, 'cdc', seed, accuracy)
    assert reported('--task', 'asked', '--method', 'cdc')[0][2][4] == '30.0'


def test_what_the_runs_of_a_column_differ_in_is_said_below_the_table(results, reported):
    results('where_blue', 'vpt', 0, 0.5)
    results('where_blue', 'vpt', 1, 0.5, {'workers': 3})
    results('where_blue', 'cdc', 0, 0.5)
    results('shape_red', 'ivpt', 0, 0.5)
    assert ' is ' not in reported()[1]
    results('where_blue', 'vpt', 2, 0.5, {'lr': 0.3}, label=('search',))
    results('where_blue', 'ivpt', 2, 0.5, {'N': 5})
    out = reported()[1]
    assert ' is ' not in out  # the rows say it
    results('where_blue', 'cdc', 1, 0.5, identity={'backbone': '00bb', 'code of x.py': '00cc'})
    said = 'where_blue: backbone is 00aa for cdc/ivpt,N=5/vpt/vpt,search,lr=0.3, 00bb for cdc\n'
    assert reported()[1].endswith(f'|\n{said}')


def test_rates_that_a_search_found_are_said(results, reported):
    for seed, lr in enumerate((0.3, 0.3, 0.1)):
        results('where_blue', 'vpt', seed, 0.5, label=('search',), best={'lr': lr})
    results('where_blue', 'cdc', 0, 0.5)
    assert 'where_blue: lr is 0.07 for cdc, 0.3 for vpt,search, 0.1 for vpt,search\n' in reported()[1]


def test_each_run_by_another_name_has_a_row_and_set_chooses_among_them(results, reported):
    results('where_blue', 'vpt', 0, 0.5)
    results('where_blue', 'vpt', 0, 0.6, {'lr': 0.5})
    results('where_blue', 'vpt', 0, 0.7, {'lr': 0.5, 'N': 5})
    results('where_blue', 'vpt', 0, 0.8, label=('search',))
    results('where_blue', 'ivpt', 0, 0.9)
    assert {row[0]: row[2] for row in reported()[0][2:]} == {
        '`vpt`': '50.0', '`vpt,N=5,lr=0.5`': '70.0', '`vpt,lr=0.5`': '60.0', '`vpt,search`': '80.0', '`ivpt`': '90.0'}
    assert [row[2] for row in reported('--method', 'vpt', '--set', 'lr=0.50')[0][2:]] == ['70.0', '60.0']
    assert [row[2] for row in reported('--set', 'lr=0.5', 'N=5')[0][2:]] == ['70.0']


@pytest.mark.parametrize('change, beside', [
    ({}, True), ({'weights': 'elsewhere/ViT-B_16.npz'}, True), ({'lr': 0.5}, True), ({'img_size': 98}, False),
    ({'weights': 'mae.pth'}, False), ({'weights': 'random'}, False), ({'N': 50}, False), ({'k': 1}, False)])
def test_the_papers_numbers_stand_beside_runs_of_just_their_backbone_image_size_and_prompts(
        change, beside, results, reported):
    results('cifar100', 'vpt', 0, 0.5, change)
    assert ('the paper' in reported()[1]) == beside
    settings = train.as_dict(train.settings_of(CONFIGS, 'cifar100', None, 'vpt', change))
    for column, number in ('cifar100', 78.8), ('natural', 78.48), ('params', 0.60), ('cub', 88.5), ('pet', None):
        assert report.published(CONFIGS, PAPER, settings, column) == (number if beside else None)


def test_the_papers_numbers_for_segmentation_are_at_one_scale_and_at_several_and_called_miou(results, reported):
    results('ade20k', 'cdc_da_100', 0, 0.4, multi_scale=0.5, measure='mIoU')
    rows, _ = reported()
    assert rows[0][2:] == ['ade20k (mIoU)', 'ade20k_ms (mIoU)'] and rows[2][2:] == ['40.0', '50.0']
    assert rows[3] == ['the paper', '15.87M', '44.77', '45.84'] and rows[4][2:] == ['-4.8', '+4.2']


def test_each_backbone_has_a_table(results, reported):
    results('cifar100', 'vpt', 0, 0.5)
    results('cifar100', 'vpt', 1, 0.5, model='vit_large_patch16_224')
    results('cifar100', 'vpt', 2, 0.5, {'weights': 'random'})
    _, out = reported()
    assert out.count('| method |') == 3 and f'{BASE}, random weights:\n' in out and out.count('the paper') == 1
    results('cifar100', 'vpt', 3, 0.5, {'weights': 'mae.pth'})  # in the row of seed 0
    assert 'the paper' not in reported()[1]


def test_a_result_counts_as_what_it_says_of_itself_and_twice_the_same_is_refused(results, reported, tmp_path, capsys):
    results('where_blue', 'vpt', 0, 0.5)
    (tmp_path / 'where_blue').rename(tmp_path / 'other')
    assert reported()[0][0] == ['method', 'trained', 'where_blue']
    results('where_blue', 'vpt', 0, 0.6, place='other/seed0.before')  # a run that was made again
    assert reported()[0][2][2] == '50.0'
    results('where_blue', 'vpt', 0, 0.6, place='copy')
    assert report.main(['--set', f'runs={tmp_path}']) == 2
    assert 'there are two results of vit_nano_patch8_48, where_blue, vpt, 0' in capsys.readouterr().err


@pytest.mark.parametrize('damage', [lambda text: text[:-9], lambda text: '', lambda text: '{}', lambda text: '[1]'])
def test_a_report_of_a_damaged_result_is_refused_with_its_name(damage, results, tmp_path, capfd):
    for seed in range(2):
        results('where_blue', 'vpt', seed, 0.5)
    file = tmp_path / 'where_blue/vit_nano_patch8_48/vpt/seed0/result.json'
    file.write_text(damage(file.read_text()))
    assert report.main(['--set', f'runs={tmp_path}']) == 2
    assert capfd.readouterr().err == f'error: {file} is damaged; give the command of its run again\n'


def test_a_report_takes_all_seeds_or_those_of_the_command_line(results, reported):
    for seed, accuracy in enumerate((0.1, 0.2, 0.3)):
        results('where_blue', 'cdc', seed, accuracy)
    cells = [reported(*argv)[0][2][2] for argv in ([], ['--seed', '1'], ['--seed', '2,0,2'])]
    assert cells == ['20.0 ± 10.0', '20.0', '20.0 ± 14.1']


def test_a_task_that_configs_yaml_does_not_name_any_more_has_its_column(results, reported, monkeypatch):
    results('where_blue', 'vpt', 0, 0.5)
    fewer = CONFIGS | {'tasks': {name: x for name, x in CONFIGS['tasks'].items() if name != 'where_blue'}}
    monkeypatch.setattr(train, 'read_configs', lambda: fewer)
    monkeypatch.setattr(train, 'runs_of', lambda args, configs: [tiny(runs=args.set[-1].removeprefix('runs='))])
    assert reported()[0][0] == ['method', 'trained', 'where_blue']


@pytest.mark.parametrize('argv, said', [
    (['--task', 'pet'], "unknown task 'pet': did you mean 'pets'"), (['--method', 'ivtp'], "did you mean 'ivpt'"),
    (['--seed', '*'], 'seed is a whole number'), ([], 'FOLDER: no finished run'),
    (['--task', 'pets'], 'FOLDER: no finished run')])
def test_a_report_of_what_there_is_not_is_one_line(argv, said, tmp_path, capfd):
    assert report.main([*argv, '--set', f'runs={tmp_path}']) == 2
    err = capfd.readouterr().err
    assert said.replace('FOLDER', str(tmp_path)) in err and err.count('\n') == 1


def test_a_report_shows_what_the_runs_printed(tmp_path, reported):
    assert run(tmp_path, '--method', 'linear,ivpt', '--seed', '0,1', img_size=24, epochs=1) == 0
    header, _, *rows = reported()[0]
    assert header == ['method', 'trained', 'where_blue'] and len(rows) == 2
    for row, method in zip(rows, ('linear', 'ivpt')):
        settings = [tiny(method=method, seed=seed, runs=tmp_path, img_size=24, epochs=1) for seed in (0, 1)]
        found = [100 * train.read_result(train.folder_of(s))['accuracy'] for s in settings]
        assert row[0] == f'`{train.name_of(settings[0])}`' and row[2] == f'{fmean(found):.1f} ± {stdev(found):.1f}'
