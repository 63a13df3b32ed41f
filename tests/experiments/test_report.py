"""Tables of results beside the paper's."""

import json
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from common import one_line
from pictures import CONFIGS, run, table, tiny

import answers
import curves
import published
import report
import sweep
import train
import vit

PAPER = published.read_published()
BASE = 'vit_base_patch16_224.orig_in21k'


@pytest.fixture
def results(tmp_path):
    """Write a result as a run would: of a task, method and seed, with changes of the command line."""
    def put(task, method, seed, accuracy, changes={}, model=None, **more):
        settings = train.settings_of(CONFIGS, task, model, method, changes | {'seed': seed, 'runs': str(tmp_path)})
        settings = sweep.with_values(replace(settings, label=more.pop('label', ())), more.pop('best', {}))
        folder = tmp_path / more.pop('place') if 'place' in more else train.folder_of(settings)
        how = settings.pictures
        identity = {'backbone': '00aa', 'pictures by': how.source, 'train names': f'{how.n_train} 00bb',
                    'val names': f'{how.n_val} 00bb', 'test names': f'{how.n_test} 00bb', **more.pop('identity', {})}
        rows = [{'picture': i, 'class': 1, 'taken_for': int(i < 1000 * accuracy)} for i in range(1000)]
        rows = train.as_csv(more.pop('rows', rows))
        result = {'task': task, 'model': settings.model, 'method': method, 'seed': seed, 'accuracy': accuracy,
                  'score_on': settings.loop.score_on, 'measure': 'accuracy', 'trained_parameters': 1_500_000,
                  'settings': train.as_dict(settings), 'identity': identity, 'classes': ['cat', 'dog', 'cow'],
                  'params_digest': vit.digest(b'x'), 'predictions_digest': vit.digest(rows)} | more
        files = {'params.pth': b'x', 'predictions.csv': rows, 'result.json': json.dumps(train.signed(result)).encode()}
        for name, content in files.items():
            train.write(folder / name, content)
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


@pytest.fixture
def refused(tmp_path, capsys):
    """The same, where it is refused: the one line."""
    def refused(*argv):
        assert report.main([*argv, '--set', f'runs={tmp_path}']) == 2
        return one_line(capsys)
    return refused


def test_a_group_stands_for_its_tasks_and_a_group_of_groups_for_all_of_theirs():
    configs = {'groups': {'a': ['x', 'y'], 'b': ['z'], 'all': ['a', 'b']}}
    assert train.tasks_of(configs, ['all', 'w', 'a'])[:4] == ['x', 'y', 'z', 'w']
    assert report.columns(configs, ['all']) == ['x', 'y', 'a', 'z', 'b', 'all']


def test_a_report_has_means_over_seeds_the_papers_numbers_and_the_difference(results, reported):
    values = [81, 83, 88]
    for seed, accuracy in enumerate(values):
        results('cifar100', 'vpt', seed, accuracy / 100)
    assert reported()[0] == [['method', 'trained', 'cifar100'], ['---'] * 3,
                             ['`vpt`', '1.500M', f'{fmean(values):.1f} ± {stdev(values):.1f}'],
                             ['the paper', '', '78.8'], ['difference', '', '+5.2']]


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
    cells = reported('--task', 'asked', '--method', 'cdc')[0][2]
    assert cells[2:] == ['55.0 ± 49.5', '40.0, 1 of 2 seeds', '30.0, 1 of 2 seeds']


def test_what_the_runs_of_a_column_differ_in_is_said_below_the_table_and_which_rates_a_search_found(results, reported):
    results('where_blue', 'vpt', 0, 0.5)
    results('where_blue', 'vpt', 1, 0.5, {'workers': 3})
    results('where_blue', 'cdc', 0, 0.5)
    results('shape_red', 'ivpt', 0, 0.5)
    results('where_blue', 'vpt', 2, 0.5, {'lr': 0.3}, label=('search',))
    results('where_blue', 'ivpt', 2, 0.5, {'N': 5})
    assert ' is ' not in reported()[1]  # the rows say it
    results('where_blue', 'cdc', 1, 0.5, identity={'backbone': '00bb', 'code of x.py': '00cc'})
    said = 'where_blue: backbone is 00aa for cdc/ivpt,N=5/vpt/vpt,search,lr=0.3, 00bb for cdc\n'
    assert reported()[1].endswith(f'|\n{said}')
    for seed, lr in enumerate((0.3, 0.3, 0.07)):
        results('shape_red', 'vpt', seed, 0.5, label=('search',), best={'lr': lr})
    assert 'shape_red: lr is 0.1 for ivpt, 0.3 for vpt,search, 0.07 for vpt,search\n' in reported()[1]


def test_each_run_by_another_name_has_a_row_and_set_chooses_among_them(results, reported):
    results('where_blue', 'vpt', 0, 0.5)
    results('where_blue', 'vpt', 0, 0.6, {'lr': 0.5})
    results('where_blue', 'vpt', 0, 0.7, {'lr': 0.5, 'N': 5})
    results('where_blue', 'vpt', 0, 0.8, label=('search',))
    results('where_blue', 'ivpt', 0, 0.9)
    assert {row[0]: row[2] for row in reported()[0][2:]} == {
        '`vpt`': '50.0', '`vpt,N=5,lr=0.5`': '70.0', '`vpt,lr=0.5`': '60.0', '`vpt,search`': '80.0', '`ivpt`': '90.0'}
    rows, out = reported('--method', 'vpt', '--set', 'lr=0.50')
    assert [row[::2] for row in rows[2:]] == [['`vpt`', '60.0'], ['`vpt,N=5`', '70.0']]
    assert out.startswith('all of them: lr=0.5\n')
    assert [row[2] for row in reported('--set', 'lr=0.5', 'N=5')[0][2:]] == ['70.0']
    results('where_blue', 'ivpt', 1, 0.4, {'weights': 'random'})
    assert [row[2] for row in reported('--weights', 'random')[0][2:]] == ['40.0']


@pytest.mark.parametrize('change, identity, said', [
    ({}, {}, ''), ({'lr': 0.5}, {}, ''), ({'weight_decay': 0.1, 'batch': 32, 'precision': 'float32'}, {}, ''),
    ({'img_size': 98}, {}, 'img_size is 98 and not 224'), ({'N': 50}, {}, 'N is 50 and not 10'),
    ({'k': 1}, {}, 'k is 1 and not 20'), ({'n_test': 10}, {}, 'test pictures is 10 and not 3669'),
    ({'epochs': 5}, {}, 'epochs is 5 and not 100'), ({'readout': 'mean'}, {}, "readout is 'mean' and not 'cls'"),
    ({'augment': 'none'}, {}, "augment is 'none' and not 'crop_flip'"),
    ({'weights': 'elsewhere/ViT-B_16.npz'}, {}, 'weights is elsewhere/ViT-B_16.npz and not https://'),
    ({'weights': 'random'}, {}, 'weights is random and not https://'),
    ({}, {'pictures by': 'a.py:drawn'}, 'lists is those of a.py:drawn and not the official ones (pets/vpt)'),
    ({}, {'train names': '799 x'}, 'train pictures is 799 and not 800 (pets/vpt)'),
    ({}, {'val names': '201 x'}, 'val pictures is 201 and not 200'),
    ({}, {'test names': '3668 x'}, 'test pictures is 3668 and not 3669')])
def test_the_papers_number_stands_only_beside_the_papers_experiment_and_a_line_says_why_not(
        change, identity, said, results, reported):
    results('pets', 'vpt', 0, 0.5, change, identity=identity)
    rows, out = reported()
    assert (['the paper', '', '88.3'] in rows) == (not said) and len(rows) == (3 if said else 5)
    assert said in out and out.count('so without its number') == bool(said) + ('n_test' in change)


def test_a_setting_in_the_grid_of_a_method_may_differ_from_the_paper_for_this_method_alone(results, reported):
    results('cifar100', 'bi_adapter', 0, 0.5, {'scale': 10.0})
    results('cifar100', 'lora', 0, 0.5, {'scale': 10.0})
    rows, out = reported()
    assert len(rows) == 6 and 'scale is 10.0 and not 1.0 (cifar100/lora)' in out


def test_a_number_of_the_paper_that_hides_something_is_explained_below_the_table(results, reported):
    results('cifar100', 'vpt', 0, 0.5)
    results('where_blue', 'cdc', 0, 0.5)
    results('pets', 'provp', 0, 0.5, {'N': 7})  # another N needs no explanation
    said = [line for line in reported()[1].splitlines() if not line.startswith('|')]
    assert said[2].startswith("vpt: N is Table 15's or 16's, which the paper gives for iVPT; VPT's own N")
    assert not [line for line in said if line.startswith(('cdc:', 'provp:'))]


@pytest.mark.parametrize('group, method, count', [('fgvc', 'ivpt', '0.41M'), ('fgvc', 'vpt', '0.85M'),
                                                  ('vtab', 'vpt', '0.60M'), ('natural', 'vpt', '')])
def test_the_papers_count_of_parameters_stands_beside_all_tasks_that_it_is_the_mean_of_and_no_fewer(
        group, method, count, results, reported):
    *tasks, last = train.tasks_of(CONFIGS, [group])
    for task in tasks:
        results(task, method, 0, 0.5)
    assert reported('--task', group)[0][3][:2] == ['the paper', '']
    results(last, method, 0, 0.5)
    assert reported('--task', group)[0][3][:2] == ['the paper', count]


def test_the_papers_settings_of_e2vpt_and_bias_on_a_task_are_those_of_configs_yaml():
    def of(method, task):
        settings = train.settings_of(CONFIGS, task, None, method)
        return settings.prompts.N, getattr(settings.options, 'N_kv', None), settings.loop.optimizer, settings.loop.lr
    assert [of('e2vpt', task)[:2] for task in ('pets', 'cifar100', 'caltech101', 'flowers102', 'camelyon')] == [
        (10, 5), (5, 5), (32, 5), (1, 1), (10, 10)]
    assert of('bias', 'ade20k')[2:] == ('SGD', 0.005) and of('bias', 'pets')[2:] == ('AdamW', 0.000125)


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
    assert out.count('| method |') == 3 and f'{BASE}, random weights:\n' in out and out.count('| the paper |') == 1
    results('cifar100', 'vpt', 3, 0.5, {'weights': 'mae.pth'})  # in the row of seed 0
    assert '| the paper |' not in reported()[1]


def test_a_result_counts_as_its_contents_say_and_a_second_of_one_run_is_refused(results, reported, refused, tmp_path):
    results('where_blue', 'vpt', 0, 0.5)
    (tmp_path / 'where_blue').rename(tmp_path / 'other')
    results('where_blue', 'vpt', 0, 0.6, place='other/seed0.before')  # a run that was made again
    rows, _ = reported()
    assert rows[0] == ['method', 'trained', 'where_blue'] and rows[2][2] == '50.0'
    results('where_blue', 'vpt', 0, 0.6, place='copy')
    assert 'there are two results of vit_nano_patch8_48, where_blue, vpt, 0' in refused()


@pytest.mark.parametrize('file, damage', [
    ('result.json', lambda text: text[:-9]), ('result.json', lambda text: ''), ('result.json', lambda text: '{}'),
    ('result.json', lambda text: '[1]'), ('result.json', lambda text: text.replace('0.5', '4.66')),
    ('result.json', lambda text: text.replace('1500000', '1600000')),
    ('result.json', lambda text: text.replace('"measure": "accuracy", ', '')),
    ('predictions.csv', lambda text: text.replace('5,1,1', '5,1,0')), ('params.pth', lambda text: 'y')])
def test_a_result_that_is_not_as_it_was_written_is_refused_with_its_name(file, damage, results, refused, tmp_path):
    for seed in range(2):
        results('where_blue', 'vpt', seed, 0.5)
    folder = tmp_path / 'where_blue/vit_nano_patch8_48/vpt/seed0'
    text = (folder / file).read_text()
    assert damage(text) != text
    (folder / file).write_text(damage(text))
    said = 'it, predictions.csv or params.pth beside it is not as the run wrote it'
    assert refused().startswith(f'error: {folder / "result.json"}: {said}')


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
def test_a_report_of_unknown_names_or_of_no_runs_is_refused_with_one_line(argv, said, refused, tmp_path):
    assert said.replace('FOLDER', str(tmp_path)) in refused(*argv)


def test_a_report_shows_what_the_runs_printed(tmp_path, reported):
    assert run(tmp_path, '--method', 'linear,ivpt', '--seed', '0,1', img_size=24, epochs=1) == 0
    header, _, *rows = reported()[0]
    assert header == ['method', 'trained', 'where_blue'] and len(rows) == 2
    for row, method in zip(rows, ('linear', 'ivpt')):
        settings = [tiny(method=method, seed=seed, runs=tmp_path, img_size=24, epochs=1) for seed in (0, 1)]
        found = [train.read_result(train.folder_of(s))['accuracy'] for s in settings]
        assert row[0] == f'`{settings[0].method}`' and row[2] == curves.spread(found)


# ---- Answers --------------------------------------------------------------------------------------------

def rows_of(right):
    """Rows of predictions.csv: of pictures of class 0, taken for it where `right` has a 1, else for class 1."""
    return [{'picture': f'{i}.png', 'class': 0, 'taken_for': 1 - x, 'probability': 0.5} for i, x in enumerate(right)]


def test_a_difference_is_over_the_same_pictures_and_seeds_with_the_error_of_both(results, reported):
    """Seed 0: 3 of 4 against 1; seed 1: 2 against 2, of which one picture is the same."""
    answers_ = {'ivpt': ([1, 1, 1, 0], [1, 1, 0, 0]), 'vpt': ([1, 0, 0, 0], [0, 1, 1, 0]), 'cdc': ([1, 1, 1, 1],)}
    for method, seeds in answers_.items():
        for seed, right in enumerate(seeds):
            results('where_blue', method, seed, fmean(right), rows=rows_of(right))
    rows, _ = reported('--method', 'ivpt,cdc', '--against', 'vpt')
    of_pictures = stdev([0.5, 0.5, 0.0, 0.0]) / 2  # of the mean over seeds: (0 + 1) / 2, (1 + 0) / 2, (1 - 1) / 2, 0
    of_seeds = stdev([0.5, 0.0]) / 2 ** 0.5
    both = (of_pictures ** 2 + of_seeds ** 2) ** 0.5
    found = {row[1]: row[2:] for row in rows if row[0] == 'where_blue'}
    assert found['`ivpt`'] == ['+25.0', *(f'{100 * x:.1f}' for x in (both, of_pictures, of_seeds)), '2']
    assert found['`cdc`'] == ['+75.0', '25.0', '25.0', '', '1']  # one seed has no spread
    assert not [row for row in rows if row[0].startswith('mean of')]


def test_runs_are_compared_with_those_of_the_same_further_name_and_tasks_are_averaged(results, reported):
    for task, better in ('where_blue', [1, 1]), ('shape_red', [1, 0]):
        for method, right in ('ivpt', better), ('vpt', [0, 0]):
            results(task, method, 0, fmean(right), {'lr': 0.5}, rows=rows_of(right))
    results('where_blue', 'vpt', 0, 1.0, rows=rows_of([1, 1]))
    rows, _ = reported('--against', 'vpt')
    assert [row[:4] for row in rows if row[-1] == '1'] == [  # the error of a mean of independent differences
        ['shape_red', '`ivpt,lr=0.5`', '+50.0', '50.0'], ['where_blue', '`ivpt,lr=0.5`', '+100.0', '0.0'],
        ['mean of 2', '`ivpt,lr=0.5`', '+75.0', '25.0']]


@pytest.mark.parametrize('argv, rows, said', [
    (['--against', 'cdc'], [1, 0], 'no two runs, of it and of another method, share a task'),
    (['--against', 'vpt'], [1, 0, 1], 'were tested on other pictures'),
    (['--classes'], [1, 0], '--classes is for one task')])
def test_what_cannot_be_compared_is_refused_with_one_line(argv, rows, said, results, refused):
    results('where_blue', 'vpt', 0, 0.5, rows=rows_of([1, 0]))
    results('where_blue', 'ivpt', 0, 0.5, rows=rows_of(rows))
    results('shape_red', 'ivpt', 0, 0.5)
    assert said in refused(*argv)


def test_accuracy_by_class_and_the_most_frequent_confusions_are_over_all_seeds_and_all_are_read_from_the_answers(
        results, reported):
    rows = [{'picture': i, 'class': c, 'taken_for': t} for i, (c, t) in enumerate([(0, 0), (0, 1), (0, 1), (2, 0)])]
    for seed in range(2):
        results('where_blue', 'vpt', seed, 0.99, rows=rows)
    table_, out = reported('--classes')
    assert table_[2][2] == '25.0 ± 0.0' and '| class | pictures | `vpt` |' in out
    assert table_[-2:] == [['cat', '3', '33.3'], ['cow', '1', '0.0']]
    assert out.endswith('vpt: cat is taken for dog 4 times of 6\nvpt: cow is taken for cat 2 times of 2\n')


def test_of_many_confusions_ten_are_printed(results, reported):
    rows = [{'picture': c, 'class': c, 'taken_for': 0} for c in range(1, 12)]
    results('where_blue', 'vpt', 0, 0.0, rows=rows, classes=[*'abcdefghijkl'])
    assert reported('--classes')[1].count('is taken for') == 10


def test_masks_are_compared_by_their_scores_over_seeds_alone():
    pairs = [({'measure': 'mIoU', 'accuracy': x, 'rows': []}, {'measure': 'mIoU', 'accuracy': 0.5, 'rows': []})
             for x in (0.6, 0.8)]
    assert answers.difference(pairs) == pytest.approx((0.2, 0.1, 0.0, 0.1, 2))
