"""Many runs: their product, a search of settings on validation images, a sweep over one (Figure 5), torchrun."""

import json
import os
import re
import signal

import pytest
from common import one_line
from pictures import CONFIGS, run, table, tiny
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import curves
import sweep
import train

SMALL = dict(img_size=24, epochs=1)
FAILED = None  # what `scored` takes for a run whose loss is not finite


@pytest.fixture
def scored(monkeypatch):
    """`train.run` with accuracies that a test chooses: a function of the settings. Returns what was asked for."""
    def use(score):
        asked = []

        def run(settings, again=False):
            asked.append(settings)
            if (accuracy := score(settings)) is FAILED:
                raise train.InputError('the loss is nan')
            stored = train.as_dict(settings)
            return stored | {'seed': settings.loop.seed, 'accuracy': accuracy, 'measure': 'accuracy', 'seconds': 1.0,
                             'trained_parameters': 1, 'settings': stored}
        monkeypatch.setattr(train, 'run', run)
        return asked
    return use


def sweeps(folder, *argv, **changes):
    """`python tests/experiments/sweep.py ARGV`, tiny. Returns the exit status."""
    return run(folder, *argv, program=sweep, **changes)


def test_tasks_models_methods_and_seeds_are_multiplied_and_each_run_has_a_folder_and_a_line(tmp_path, scored, capsys):
    asked = scored(lambda settings: 0.5)
    assert sweeps(tmp_path, '--task', 'asked,where_blue', '--method', 'linear,vpt', '--seed', '0,2') == 0
    assert {(s.task, s.method, s.loop.seed) for s in asked} == {
        (task, method, seed) for task in ('where_blue', 'shape_red') for method in ('linear', 'vpt') for seed in (0, 2)}
    assert len(asked) == len({train.folder_of(s) for s in asked}) == 8  # each once, though a task is named twice
    assert capsys.readouterr().out.count(' 50.00% ') == 8


# ---- Search ---------------------------------------------------------------------------------------------

def test_a_point_is_the_run_with_its_values_and_a_search_ends_in_one_by_a_name_of_its_own(tmp_path, scored):
    asked = scored(lambda settings: settings.loop.lr)
    assert sweeps(tmp_path, '--method', 'vpt', '--search', grid='{lr: [0.1, 0.07, 1e-1]}') == 0  # 1e-1 is 0.1
    assert train.as_dict(asked[0]) == train.as_dict(tiny(method='vpt', runs=tmp_path, lr=0.1, score_on='val'))
    first, second, final = map(train.name_of, asked)
    assert ',lr=0.1,' in first and first.endswith(',score_on=val')
    assert 'lr=' not in second and second.endswith(',score_on=val')  # 0.07 is the task's own
    assert final.startswith('vpt,search,lr=0.1+0.07+1e-1,') and asked[2].loop.lr == 0.1
    assert sweeps(tmp_path, '--method', 'vpt', '--search') == 0
    assert train.name_of(asked[-1]).startswith('vpt,search,batch=16,')  # the task's own grid


@pytest.mark.parametrize('score, grid, best', [
    (lambda loop: 0.9 if loop.lr in (0.3, 0.1) else 0.8, {'lr': [0.4, 0.3, 0.1, 0.05]}, {'lr': 0.1}),
    (lambda loop: 1 - loop.lr - loop.weight_decay, {'lr': [0.4, 0.3], 'weight_decay': [0.0, 0.1]},
     {'lr': 0.3, 'weight_decay': 0.0}),
    (lambda loop: FAILED if loop.lr > 0.2 else 0.0, {'lr': [0.4, 0.1, 0.3]}, {'lr': 0.1}),
    (lambda loop: FAILED if loop.lr < 0.2 else 0.0, {'lr': [0.4, 0.1, 0.3]}, {'lr': 0.3})])
def test_the_best_point_wins_of_equals_that_with_the_smaller_rate_and_a_failure_loses(
        score, grid, best, tmp_path, scored):
    asked = scored(lambda settings: score(settings.loop))
    assert sweeps(tmp_path, '--method', 'ivpt', '--search', grid=grid) == 0
    file, = tmp_path.rglob('search.json')
    winner, *others = json.loads(file.read_text())
    assert winner == best | {'accuracy': score(asked[-1].loop)}
    assert {name: getattr(asked[-1].loop, name) for name in best} == best
    scores = [-1 if row['accuracy'] is None else row['accuracy'] for row in (winner, *others)]
    assert scores == sorted(scores, reverse=True) and len(scores) == len(asked) - 1


def test_where_all_points_fail_lower_rates_are_proposed_once(tmp_path, scored, capfd):
    scored(lambda settings: FAILED)
    assert sweeps(tmp_path, '--method', 'ivpt', '--seed', '0,1', '--search', grid='{lr: [0.4, 0.1]}') == 2
    out, err = capfd.readouterr()
    assert re.fullmatch('error: the loss is nan\nerror: .*no point of the grid has come to an end.*--set grid.*\n', err)
    assert ': none' in out


def test_every_point_is_scored_on_validation_images_and_every_seed_is_trained_with_the_best_and_tested_once(
        tmp_path, scored, capsys):
    asked = scored(lambda settings: settings.prompts.N / 10 - settings.loop.lr)
    argv = '--method', 'vpt,ivpt', '--seed', '3,4', '--search'
    assert sweeps(tmp_path, *argv, grid='{lr: [0.2, 0.1], N: [3, 5]}') == 0
    done = [(s.method, s.loop.seed, s.loop.lr, s.prompts.N, s.loop.score_on) for s in asked]
    points = [(method, 3, lr, N, 'val') for method in ('vpt', 'ivpt') for lr in (0.2, 0.1) for N in (3, 5)]
    assert done == points + [(method, seed, 0.1, 5, 'test') for seed in (3, 4) for method in ('vpt', 'ivpt')]
    assert len({train.folder_of(s) for s in asked}) == 12
    assert capsys.readouterr().out.count('search  ') == 2  # what was found is said once


def test_a_real_search_trains_on_train_alone_and_a_finer_one_uses_its_points_again(tmp_path, capsys):
    def said(grid, *more):
        assert sweeps(tmp_path, '--method', 'vpt', '--search', *more, grid=grid, **SMALL) == 0
        out = capsys.readouterr().out
        return [out.count(words) for words in ('% of 10 images', 'epoch   1/1', 'finished before')]
    assert said('{lr: [0.1, 0.01]}') == [2, 3, 0]  # on the validation images; the third is the test
    assert said('{lr: [0.1, 0.01]}') == [0, 0, 3]
    assert said('{lr: [0.1, 0.03, 0.01]}') == [1, 2, 2]  # the new point, and the test
    assert said('{lr: [0.1, 0.01]}', '--again') == [2, 3, 0]


@pytest.mark.parametrize('grid, best, said', [
    ({'lr': [0.4, 0.2, 0.1]}, 0.4, 'the best lr, 0.4, is the last of the grid on its side'),
    ({'lr': [0.4, 0.2, 0.1]}, 0.2, ''), ({'lr': [0.1, 0.4]}, 0.1, 'the best lr, 0.1, is'), ({'lr': [0.1]}, 0.1, ''),
    ({'weight_decay': [0.0, 0.1]}, 0.0, ''), ({'schedule': ['cosine', 'poly']}, 'poly', ''),
    ({'weight_decay': [0.0, 0.1]}, 0.1, 'the best weight_decay, 0.1, is')])
def test_a_search_says_when_its_best_point_lies_at_the_edge_of_the_grid(grid, best, said, tmp_path, scored, capsys):
    scored(lambda settings: getattr(settings.loop, *grid) == best)
    assert sweeps(tmp_path, '--method', 'ivpt', '--search', grid=grid) == 0
    out = capsys.readouterr().out
    assert said in out and ('look beyond' in out) == bool(said)


def test_vpts_grid_is_the_default_and_a_method_has_its_own_before_its_task():
    """lr {50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05} * batch / 256, weight decay {0.01, 0.001, 0.0001, 0}."""
    settings = train.settings_of(CONFIGS, 'pets', None, 'ivpt')
    grid = sweep.grid_of(settings, CONFIGS)
    assert [lr * 256 / settings.loop.batch for lr in grid['lr']] == [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
    assert grid['weight_decay'] == [0.01, 0.001, 0.0001, 0]
    assert sweep.grid_of(tiny(), CONFIGS) == {'lr': [0.15, 0.05]}
    assert sweep.grid_of(tiny(method='lora'), CONFIGS) == CONFIGS['methods']['lora']['grid']


def test_full_fine_tuning_and_bias_have_the_optimiser_and_the_rates_of_vpts_code():
    """AdamW, {5e-3, 1e-3, 5e-4, 1e-4} * batch / 256, 5 of 100 epochs of warm-up; any decay but 0 is 0.01 there."""
    for method in 'full', 'bias':
        settings = train.settings_of(CONFIGS, 'pets', None, method)
        loop, grid = settings.loop, sweep.grid_of(settings, CONFIGS)
        assert sorted(lr * 256 / loop.batch for lr in grid['lr']) == pytest.approx([1e-4, 5e-4, 1e-3, 5e-3])
        assert grid['weight_decay'] == [0.01, 0.0] and loop.lr in grid['lr']
        assert (loop.optimizer, loop.warmup * loop.epochs) == ('AdamW', 5)


def test_every_grid_in_configs_yaml_can_be_searched():
    for method in CONFIGS['methods']:
        for task in 'pets', 'where_blue':
            settings = train.settings_of(CONFIGS, task, None, method, {'weights': 'random'})
            assert sweep.searches_of([settings], None, CONFIGS)


def test_pre_training_keeps_settings_of_its_own():
    settings = train.settings_of(CONFIGS, 'shapes_framed')
    loop = settings.loop
    assert (loop.optimizer, loop.lr, loop.weight_decay, loop.warmup, settings.machine.weights, loop.tune) == (
        'AdamW', 0.001, 0.05, 0.1, 'random', 'all')


# ---- The runs at each value of a setting, Figure 5 ------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """What `curves.lines` is given instead of drawing it: (path, names, ticks, curves)."""
    calls = []
    monkeypatch.setattr(curves, 'lines', lambda *arguments: calls.append(arguments))
    return calls


def test_a_sweep_makes_ordinary_runs_draws_them_and_the_second_time_trains_nothing(tmp_path, capsys):
    argv = '--method', 'ivpt', '--over', 'k=0,2'
    assert sweeps(tmp_path, *argv, **SMALL) == 0
    first = table(capsys.readouterr().out)
    assert first[0] == ['task', 'model', 'method', '0', '2']
    picture, = tmp_path.rglob('over-k=0+2.png')
    assert picture.stat().st_size > 1000 and picture.parent == train.folder_of(tiny(runs=tmp_path, **SMALL))
    assert sweeps(tmp_path, *argv, **SMALL) == 0
    for k in 0, 2:
        assert run(tmp_path, '--method', 'ivpt', k=k, **SMALL) == 0
    second = capsys.readouterr().out
    assert table(second) == first and second.count('finished before') == 4 and 'epoch  ' not in second


def test_each_accuracy_of_a_sweep_stands_below_its_value_and_beside_its_method(tmp_path, scored, drawn, capsys):
    scored(lambda settings: settings.prompts.N / 100 + settings.loop.seed / 10 + (settings.method == 'vpt') / 5)
    assert sweeps(tmp_path, '--over', 'N=5,1,20', '--method', 'ivpt,vpt', '--seed', '0,2') == 0
    rows = {row[2].partition(',')[0]: row[3:] for row in table(capsys.readouterr().out)[2:]}
    assert rows == {'`ivpt': [f'{x}.0 ± 14.1' for x in (15, 11, 30)], '`vpt': [f'{x}.0 ± 14.1' for x in (35, 31, 50)]}
    (path, names, ticks, found), = drawn
    assert (path.parent.relative_to(tmp_path).as_posix(), names[0]) == ('where_blue/vit_nano_patch8_48', 'N')
    assert path.name.startswith('over-N=5+1+20,ivpt+vpt,') and ticks == {0: '5', 1: '1', 2: '20'}
    for (*_, method), curve in found.items():
        more = 20 * method.startswith('vpt')
        assert curve == [pytest.approx((x, n + 10 + more, 200 ** 0.5)) for x, n in enumerate((5, 1, 20))]


def test_a_value_at_which_training_diverges_is_left_out_and_the_status_is_2(tmp_path, scored, drawn, capfd):
    scored(lambda settings: FAILED if settings.loop.lr > 1 else 0.5)
    assert sweeps(tmp_path, '--method', 'ivpt', '--over', 'lr=0.1,2.0,0.2') == 2
    out, err = capfd.readouterr()
    assert table(out)[-1][3:] == ['50.0', '', '50.0'] and 'the loss is nan' in err and err.count('\n') == 1
    assert [[x for x, *_ in curve] for curve in drawn[0][3].values()] == [[0, 2]]
    assert sweeps(tmp_path, '--method', 'ivpt', '--over', 'lr=2.0,3.0') == 2 and len(drawn) == 1


def test_values_of_a_sweep_that_are_the_same_count_once(tmp_path, scored, drawn):
    asked = scored(lambda settings: 0.5)
    assert sweeps(tmp_path, '--method', 'ivpt', '--over', 'lr=0.1,1e-1,0.10') == 0
    assert len(asked) == 1 and drawn[0][2] == {0: '0.1'}


NO_SETTING = 'is no setting of the training, the prompts or a function in a file'


@pytest.mark.parametrize('argv, said', [
    ('grid={lr: 0.1}', 'list of values'), ('grid={}', 'list of values'), ('grid={lr: []}', 'list of values'),
    ('grid=[1]', 'list of values'), ('grid={lr: [', 'not YAML'), ('grid={lr: [big]}', 'lr is a number'),
    ('grid={lr: [-1.0]}', 'lr is a number from'), ('grid={lrs: [1]}', f"'lrs' {NO_SETTING}: did you mean 'lr'"),
    ('grid={seed: [1, 2]}', NO_SETTING), ('grid={score_on: [val]}', NO_SETTING), ('grid={runs: [a, b]}', NO_SETTING),
    ('grid={tune: [head]}', NO_SETTING), ('grid={batch: [8]}', 'batch is given by --set too'),
    ('--over N', 'takes NAME=A,B,C'), ('--over N=1,,2', 'takes NAME=A,B,C'), ('--over N=', 'takes NAME=A,B,C'),
    ('--over seed=1,2', NO_SETTING), ('--over workers=0,1', NO_SETTING), ('--over task=a,b', NO_SETTING),
    ('--over img_size=24,48', NO_SETTING), ('--over Nn=1', f"'Nn' {NO_SETTING}: did you mean 'N'"),
    ('--over batch=8', 'batch is given by --set too'), ('--over N=1,0', 'N is a whole number from 1'),
    ('--over lr=a,b', 'lr is a number'), ('--over N=1 --search', 'not allowed with'),
    ('--set grid={lr:[1]}', 'grid=... is for --search'), ('--seed *', 'seed is a whole number'),
    ('--search --set grid={lr:[1]} grid={lr:[2]}', '--set grid: it is given twice')])
def test_a_search_or_a_sweep_that_cannot_be_made_is_refused_in_one_line(argv, said, tmp_path, capfd):
    argv = ['--search', '--set', argv] if argv.startswith('grid') else argv.split()
    assert sweeps(tmp_path, *argv) == 2
    assert said in one_line(capfd) and not list(tmp_path.iterdir())


# ---- torchrun -------------------------------------------------------------------------------------------

def torchrun(folder, *argv, killed_at=0, **changes):
    """`torchrun --standalone --nproc-per-node 2 --max-restarts 3 sweep.py ARGV`, by torchrun's own agent, but in
    forked processes, which need no seconds to start. killed_at: at this file that it writes the second process gets a
    SIGKILL, once. Returns both statuses and what each said."""
    logs = DefaultLogsSpecs(str(folder / 'logs'), redirects=Std.ALL)
    how = LaunchConfig(1, 1, 2, run_id='test', rdzv_backend='c10d', rdzv_endpoint='localhost:0', max_restarts=3,
                       monitor_interval=0.1, start_method='fork', logs_specs=logs)
    written, fsync = [], os.fsync

    def counted(file):
        fsync(file)
        written.append(file)
        if (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT'], len(written)) == ('1', '0', killed_at):
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        os.fsync = counted
        return sweeps(folder, *argv, **SMALL, **changes)

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    statuses = elastic_launch(how, work)()
    for number, handler in handlers.items():
        if handler is not signal.getsignal(number):  # the agent has changed some
            signal.signal(number, handler)
    logs = [sorted((folder / 'logs').rglob(f'{rank}/std*.log')) for rank in range(2)]
    return [statuses[0], statuses[1]], [''.join(file.read_text() for file in files) for files in logs]


def test_a_process_waits_for_the_runs_of_the_others_as_long_as_they_take(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr(sweep.dist, 'rendezvous', lambda url: iter([(sweep.dist.HashStore(), 0, 1)]))
    assert sweep.open_store().timeout.days > 365


def left(folder):
    """What finished runs leave that does not depend on the clock: by folder, the parameters' bytes and the accuracy."""
    return {str(file.parent.relative_to(folder)): (
        (file.parent / 'params.pth').read_bytes(), json.loads(file.read_text())['accuracy'])
        for file in folder.rglob('result.json')}


def test_a_sweep_in_two_processes_of_which_one_is_killed_leaves_what_one_process_leaves(tmp_path, capfd):
    one, two = tmp_path / 'one', tmp_path / 'two'
    argv, grid = ('--method', 'linear', '--seed', '0,1', '--search'), '{lr: [0.1, 0.05, 0.02]}'
    statuses, said = torchrun(two, *argv, killed_at=9, grid=grid)  # in the second of its runs
    assert statuses == [0, 0] and 'finished before' in ''.join(said), said
    assert sum(line.startswith('where_blue  ') for x in said for line in x.splitlines()) == 2  # the table, once
    assert sweeps(one, *argv, grid=grid, **SMALL) == 0
    assert left(two) == left(one) and len(left(one)) == 5
    capfd.readouterr()
    assert sweeps(two, *argv, grid=grid, **SMALL) == 0  # what two processes have done, one does not do again
    assert capfd.readouterr().out.count('finished before') == 5


def test_a_divided_sweep_makes_no_run_twice_draws_once_and_says_what_is_wrong_with_one_run_in_one_line(tmp_path):
    statuses, said = torchrun(tmp_path, '--task', 'kitti,where_blue,shape_red', '--method', 'vpt', '--over', 'N=1')
    assert statuses == [2, 0] and len(left(tmp_path)) == 2, said
    assert [x.count('drawn: ') for x in said] == [1, 0] and len(table(said[0])) == 2 + 2
    words = 'epoch   1/1', 'error: data/vtab-1k/kitti: no such folder'
    assert [''.join(said).count(x) for x in words] == [2, 1]
