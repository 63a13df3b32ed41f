"""The settings of a run: defaults, entries of configs.yaml, the command line; and the name of its folder."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from pictures import CONFIGS, NANO

import train
from vit import InputError


def runs_of(*argv):
    """The settings of all runs of a command line."""
    task = () if '--task' in argv else ('--task', 'where_blue')
    return train.runs_of(train.parser('').parse_args([*task, *argv]), CONFIGS)


def values_of(settings):
    """All settings by name, whatever group they are in."""
    return {name: x for group in asdict(settings).values() if isinstance(group, dict) for name, x in group.items()}


def test_the_later_one_of_defaults_model_task_method_and_command_line_wins():
    layers = ('models', 'tasks', 'methods', 'changes')
    for i in range(len(layers) + 1):
        say = {layer: {'epochs': 101 + j} for j, layer in enumerate(layers[:i])}
        configs = {'models': {'vit_tiny_patch8_32': say.get('models', {})}, 'tasks': {'t': say.get('tasks', {})},
                   'methods': {'m': say.get('methods', {})}}
        settings = train.settings_of(configs, 't', 'vit_tiny_patch8_32', 'm', say.get('changes'))
        assert settings.loop.epochs == 100 + i


@pytest.mark.parametrize('said, name, value', [
    ('lr=1e-3', 'lr', 0.001), ('lr=1', 'lr', 1.0), ('epochs=20', 'epochs', 20), ('N=010', 'N', 10),
    ('aggregation=false', 'aggregation', False), ('mean=[0.1, 0.2, 0.3]', 'mean', (0.1, 0.2, 0.3)),
    ('precision=float32', 'precision', 'float32'), ('ask=where_red', 'ask', 'where_red'), ('grain=2.5', 'grain', 2.5),
    ('colours=[red, blue]', 'colours', ['red', 'blue']), ('runs=/x/h #1', 'runs', '/x/h #1'),
    ('runs=a=b', 'runs', 'a=b'), ('runs=null', 'runs', 'null'),
    ('runs=~/x', 'runs', os.path.expanduser('~/x')), ('cache_gb=0.5', 'cache_gb', 0.5), ('weights=', 'weights', '')])
def test_any_setting_can_be_given_on_the_command_line_and_has_its_type(said, name, value):
    for settings in runs_of('--set', 'momentum=0.5', '--set', said):
        found = values_of(settings)
        assert found[name] == value and isinstance(found[name], type(value))
        assert found['momentum'] == 0.5  # of several --set


@pytest.mark.parametrize('argv, said', [
    (['--task', 'pets', '--task', 'dtd'], '--task is given twice: write --task A,B'),
    (['--seed', '0', '--seed', '0'], '--seed is given twice'),
    (['--set', 'lr=1', 'lr=2'], '--set lr: it is given twice'),
    (['--set', 'lr=1', '--set', 'lr=1'], '--set lr: it is given twice'),
    (['--weights', 'a.pth', '--set', 'weights=b.pth'], '--set weights: it is given twice')])
def test_what_is_given_twice_is_refused(argv, said):
    """argparse would drop the first in silence."""
    with pytest.raises(InputError, match=said):
        runs_of(*argv)


@pytest.mark.parametrize('section, entry, said', [
    ('tasks', None, 'tasks: mine is None, and not a dict'),
    ('tasks', {'method': ['vpt', 'ivpt']}, 'unknown method'),
    ('tasks', {'per_task': 3}, 'tasks: mine: per_task has settings by task, not 3'),
    ('tasks', {'per_task': {'mine': 3}}, 'tasks: mine: per_task has settings by task, not 3'),
    ('tasks', {'epoch': 3}, "tasks: mine: unknown setting 'epoch': did you mean 'epochs'?"),
    ('methods', {'lr': 'fast'}, "methods: mine: lr is a number from 1e-12 to 1e.06, not 'fast'"),
    ('groups', 'pets', "groups: mine is 'pets', and not a list"),
    ('groups', [[3]], "unknown task '.3.'"), ('groups', ['mine'], 'the group mine has itself among its members')])
def test_a_wrong_entry_of_configs_yaml_is_named_with_its_section(section, entry, said, monkeypatch):
    text = yaml.safe_dump(CONFIGS | {section: CONFIGS[section] | {'mine': entry}})
    monkeypatch.setattr(train, 'read_yaml', lambda *args: yaml.safe_load(text))
    with pytest.raises(InputError, match=said):
        argv = ['--method' if section == 'methods' else '--task', 'mine']
        train.runs_of(train.parser('').parse_args(argv), train.read_configs())


def test_every_task_and_method_of_configs_yaml_is_made_of_settings_that_are_known():
    assert set(CONFIGS) == {'models', 'tasks', 'groups', 'methods'}
    for task in CONFIGS['tasks']:
        for method in CONFIGS['methods']:
            settings = train.settings_of(CONFIGS, task, NANO, method)
            assert (settings.task, settings.method, settings.model) == (task, method, NANO)


def test_every_default_is_in_its_own_range():
    for name, default in train.DEFAULTS.items():
        assert train.checked(name, default, train.TYPES, '') == default


def test_a_task_names_its_model_and_its_methods_and_the_command_line_may_name_others():
    assert [(s.task, s.model, s.method) for s in train.runs_of(train.parser('').parse_args([]), CONFIGS)] == [
        ('where_red', NANO, 'linear'), ('where_red', NANO, 'ivpt')]
    assert [(s.task, s.model, s.method) for s in runs_of('--task', 'pets')] == [
        ('pets', 'vit_base_patch16_224.orig_in21k', 'ivpt')]
    assert [(s.model, s.method) for s in runs_of('--model', 'vit_tiny_patch8_48', '--method', 'vpt')] == [
        ('vit_tiny_patch8_48', 'vpt')]


def test_lists_and_groups_are_run_in_order_and_each_run_once():
    models = f'{NANO},vit_tiny_patch8_48'
    argv = '--task', 'asked,shape_red', '--method', 'vpt,ivpt', '--seed', '0,2,00', '--model', models
    expected = [(task, model, seed, method) for task in ('where_blue', 'shape_red')
                for model in (NANO, 'vit_tiny_patch8_48') for seed in (0, 2) for method in ('vpt', 'ivpt')]
    assert [(s.task, s.model, s.loop.seed, s.method) for s in runs_of(*argv)] == expected
    assert len({s.task for s in runs_of('--task', 'vtab,fgvc')}) == 24


@pytest.mark.parametrize('model', [
    'vit_base_patch16_224', 'vit_small_patch14_224.dinov2', 'swin_base_patch4_window7_224.ms_in22k'])
def test_the_image_size_is_that_of_the_models_name_if_no_setting_says_another(model):
    for said, expected in ([], 224), (['--set', 'img_size=96'], 96), (['--set', 'img_size=0'], 224):
        settings, = runs_of('--method', 'vpt', '--model', model, *said)
        assert settings.backbone.img_size == expected


@pytest.mark.parametrize('argv, expected', [
    ([], 'ivpt/seed0'),
    (['--seed', '3'], 'ivpt/seed3'),
    (['--set', 'lr=0.5', 'epochs=2'], 'ivpt,epochs=2,lr=0.5/seed0'),
    (['--set', 'epochs=2', 'lr=0.5'], 'ivpt,epochs=2,lr=0.5/seed0'),
    (['--set', 'lr=0.07', 'k=4'], 'ivpt/seed0'),  # what the entries of where_blue and ivpt say
    (['--set', 'grain=0', 'ask=where_red'], 'ivpt,ask=where_red,grain=0.0/seed0'),
    (['--set', 'mean=[0, 0.5, 1]'], 'ivpt,mean=_0,_0.5,_1_/seed0'),
    (['--data', '.', '--weights', 'random', '--set', 'workers=2', 'device=cpu', 'cache_gb=0'], 'ivpt/seed0'),
    (['--method', 'some/where/my_method.py:Shift'], 'some_where_my_method.py_Shift/seed0'),
])
def test_the_folder_of_a_run_names_the_settings_that_the_command_line_changed_and_that_change_a_number(argv, expected):
    settings = runs_of(*argv)[-1]
    assert train.folder_of(settings) == Path(settings.machine.runs, 'where_blue', NANO, expected)


def test_the_folder_of_a_run_may_have_further_words_in_its_name():
    settings, = runs_of('--set', 'runs=somewhere/else')
    assert train.folder_of(replace(settings, label=('search',))) == Path(
        'somewhere/else/where_blue', NANO, 'ivpt,search/seed0')


def test_of_a_name_that_is_too_long_for_a_file_system_the_end_is_its_digest():
    names = [train.folder_of(runs_of('--method', f'{"é" * 200}/{x}.py:Shift')[0]).parts[-2] for x in 'ab']
    assert names[0] != names[1] and all(name.startswith('é' * 50) and len(name.encode()) <= 255 for name in names)


def test_a_run_below_torchrun_is_refused_with_the_program_that_divides_runs(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '0')
    assert train.main([]) == 2
    assert 'sweep.py divides runs' in capsys.readouterr().err
