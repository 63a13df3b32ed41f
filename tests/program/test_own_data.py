"""A task, with classes or with anything else, and a backbone that are functions in a file; the README's examples."""

import json
import re
from dataclasses import replace

import own
import pytest
import torch
from pictures import CONFIGS, NANO, folders_of, refused, run, tiny  # noqa: F401

import data
import train
from vit import InputError

README = (train.HERE / 'README.md').read_text(encoding='utf-8')
SMALL = dict(img_size=16, epochs=1, k=2)
GREYS = '''
from __future__ import annotations
from dataclasses import dataclass, replace
import torch
import data
from vit import build


def greys(settings, size=None, labels=(0, 1), dtype=torch.uint8, channels=3):
    """Black or white?"""
    size = size or settings.backbone.img_size
    pictures = [(torch.full((channels, size, size), 255 * (i % 2), dtype=dtype), labels[i % 2]) for i in range(40)]
    return data.Task(pictures[:20], pictures[20:30], pictures[30:], ['black', 'white'], ['black or white?'])


@dataclass
class Sizes:
    """Which is one that looks for its file in sys.modules."""
    n: int = 0


def task(settings):
    return WHAT
'''
METHODS = '''
from own import Shift


class Fails(Shift):
    def forward(self, images):
        return 1 / 0 if self.training else super().forward(images)


class Flat(Shift):
    def forward(self, images):
        return super().forward(images)[:, 0]


def frozen(vit, classes, settings):
    return Shift(vit, classes, settings).requires_grad_(False)
'''
BACKBONE = '''
import torch
import vit


def two_layers(settings, num_classes):
    return vit.ViT(settings.backbone.img_size, 8, (12, 2, 2), num_classes, settings.backbone.readout)


def list_of(settings, num_classes):
    return [two_layers(settings, num_classes)]


def linear(settings, num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, num_classes))
'''


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Files of a user's own, in the working folder. Returns the one with a task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'backbone.py').write_text(BACKBONE)
    (tmp_path / 'method.py').write_text(METHODS)
    (tmp_path / 'mine.py').write_text(GREYS)
    return tmp_path / 'mine.py'


@pytest.fixture
def refusal(tmp_path, refused):
    """What is said of a command line that is refused: one line, and no folder of a run is made."""
    def said(*argv, **changes):
        usual = {'--method': 'linear', '--model': NANO}
        more = [word for option in usual.keys() - argv for word in (option, usual[option])]
        line = refused(*more, *argv, **SMALL | changes)
        assert not list(tmp_path.rglob('runs/*'))
        return line
    return said


def result_of(runs):
    folder, = folders_of(runs)
    return json.loads((folder / 'result.json').read_text())


@pytest.mark.parametrize('name, most, runs, said', [
    ('my_data.py', 9, 1, '600 + 200 images for training and validation, 200 for testing, 4 classes'),
    ('my_method.py', 20, 1, '(b [64], head.weight [9, 64], head.bias [9])')])
def test_the_examples_of_the_readme_run_as_they_stand_there(name, most, runs, said, tmp_path, capsys):
    """A task, and a method, in so many lines at most."""
    section = README[README.index(f'`{name}`'):]
    code = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
    command = re.search(rf'^python train.py (.*{name}.*)$', section, re.MULTILINE)[1].split()
    (tmp_path / name).write_text(code)
    assert len(code.splitlines()) <= most
    assert run(tmp_path / 'runs', *command, **SMALL, batch=64) == 0
    assert said in capsys.readouterr().out and len(folders_of(tmp_path / 'runs')) == runs


def test_a_run_trains_and_tests_on_the_pictures_that_a_task_function_returns(tmp_path, capsys):
    """The run's folder, the header and the result call the task by FILE.py:NAME."""
    argv = '--task', 'mine.py:greys', '--model', NANO, '--method', 'full'
    assert run(tmp_path / 'runs', *argv, lr=0.001, **SMALL) == 0
    out = capsys.readouterr().out
    assert 'task      mine.py:greys: 20 + 10 images' in out and '\n          black or white?\n' in out
    result = result_of(tmp_path / 'runs')
    assert result['classes'] == ['black', 'white'] and result['images'] == 10 and result['accuracy'] == 1
    assert (result['task'], result['settings']['pictures']['source']) == ('mine.py:greys', 'mine.py:greys')
    assert (tmp_path / 'runs' / 'mine.py_greys' / NANO).is_dir()


@pytest.mark.parametrize('what, said', [
    ('settings.no_such_setting', "no attribute 'no_such_setting'"),
    ("greys(settings).train", 'it returned a list, and not a data.Task'),
    ('replace(greys(settings), train=iter(()))', 'returned a Task, and not a data.Task of lists or data.Files'),
    ('greys(settings, dtype=torch.float32)', 'is torch.float32 [3, 16, 16], not a tensor, uint8 [3, H, W] from 16'),
    ('greys(settings, size=15)', 'an image is torch.uint8 [3, 15, 15], not a tensor'),
    ('greys(settings, channels=1)', 'an image is torch.uint8 [1, 16, 16], not a tensor'),
    ('replace(greys(settings), val=[(x.numpy(), c) for x, c in greys(settings).val])', 'an image is uint8 [3, 16, 16]'),
    ("replace(greys(settings), test=[('a.jpg', 0)])", "an image is 'a.jpg', not a tensor"),
    ("data.Task(*3 * [data.Files([(__file__, 0), (__file__, 7)], 16)], ['black'])", 'a label is 7, and not a class'),
    ("replace(greys(settings), classes='bw')", "its classes are 'bw', and not a list of names"),
    ('replace(greys(settings), classes=[0, 1])', 'its classes are [0, 1], and not a list of names'),
    ('greys(settings, labels=(0, 2))', 'a label is 2, and not a class, an int from 0 to 1'),
    ("greys(settings, labels=('black', 'white'))", "a label is 'black', and not a class"),
    ("build('resnet')", "error: mine.py:task: unknown model 'resnet'")])  # what it says of wrong input is said as it is
def test_a_task_that_raises_or_returns_something_else_is_refused_with_one_line(what, said, file, refusal):
    file.write_text(GREYS.replace('WHAT', what))
    err = refusal('--task', 'mine.py:task')
    assert said in err and err.startswith(('error: mine.py:task: ', 'error: mine.py, line '))


@pytest.mark.parametrize('setting, said', [
    ('look=fog', "look is one of plain, waves, not 'fog'"), ('colours=[]', 'colours is some of red, green, blue'),
    ('colours=[red, red]', "not ['red', 'red']"), ('colours=[red, pink]', 'colours is some of'),
    ('colours=[[1]]', 'not [[1]]'), ('ask=pink', 'pink'), ('ask=where_purple', 'where_purple')])
@pytest.mark.parametrize('task', ['where_blue', 'shapes_masks'])
def test_questions_looks_and_colours_that_shapes_do_not_have_are_refused_with_one_line(task, setting, said, refusal):
    name, _, value = setting.partition('=')
    assert said in refusal('--task', task, **{name: value})


def test_a_task_of_configs_yaml_may_name_its_file_and_give_it_settings_of_its_own(file):
    """They are in `options`, which is frozen too, and can be set on the command line in their types."""
    file.write_text(GREYS.replace('WHAT', 'greys(settings, labels=settings.options.answers)'))
    entry = {'source': 'mine.py:task', 'n_test': 10, 'answers': [1, 0]}
    configs = CONFIGS | {'tasks': CONFIGS['tasks'] | {'mine': entry}}
    for changes, labels in (({}, {1, 0}), ({'answers': '[1, 1]'}, {1})):
        config = train.settings_of(configs, 'mine', NANO, 'linear', changes)
        assert {label for _, label in data.load(config).train} == labels
        assert train.folder_of(config).parts[3] == ('linear' if not changes else 'linear,answers=_1,_1_')
    with pytest.raises(InputError, match='answers is a list'):
        train.settings_of(configs, 'mine', NANO, 'linear', {'answers': '3'})


def test_an_error_in_the_code_of_a_task_or_a_method_ends_a_run_with_one_line_and_its_place_and_the_next_run_starts(
        file, tmp_path, capfd):
    """In a forward pass while it trains, in a score, in what a picture becomes: there it is found before training."""
    file.write_text(GREYS.replace('WHAT', 'replace(greys(settings), score=lambda rows: rows[0][0])'))
    methods = 'method.py:Fails,method.py:Flat,linear'
    argv = '--task', 'mine.py:greys,mine.py:task', '--method', methods, '--model', NANO
    assert run(tmp_path / 'runs', *argv, **SMALL) == 2
    line = len(file.read_text().splitlines())
    assert capfd.readouterr().err.splitlines() == [
        'error: method.py, line 7: ZeroDivisionError: division by zero',
        'error: method.py:Flat: its logits of 1 image are [1], and not [1, 2]',
        f'error: mine.py, line {line}: KeyError: 0']
    assert [path.parent.name.partition(',')[0] for path in folders_of(tmp_path / 'runs')] == ['linear']


@pytest.mark.parametrize('method', ['linear', 'ivpt'])
def test_a_backbone_of_a_users_own_is_tuned_as_any_other(method, tmp_path):
    argv = '--task', 'mine.py:greys', '--model', 'backbone.py:two_layers', '--method', method
    assert run(tmp_path / 'runs', *argv, **SMALL) == 0
    result = result_of(tmp_path / 'runs')
    assert result['model'] == result['settings']['backbone']['build'] == 'backbone.py:two_layers'
    prompts = 2 * 10 * 12 + 10 * 10 + 2 * 12  # P, gamma and P_re of two layers
    assert result['trained_parameters'] == 2 * 13 + (prompts if method == 'ivpt' else 0)


@pytest.mark.parametrize('option', ['--task', '--method', '--model'])
def test_a_file_is_looked_for_here_and_beside_data_py_and_a_missing_or_wrong_one_is_refused_with_one_line(
        option, tmp_path, refusal):
    assert not (tmp_path / 'tests').exists() and len(data.load(tiny()).train) == 40
    (tmp_path / 'wrong.py').write_text('def f(:')
    assert 'missing.py:f: there is no such file' in refusal(option, 'missing.py:f')
    assert 'wrong.py, line 1' in refusal(option, 'wrong.py:f')
    assert 'mine.py:f: the file has no function by this name' in refusal(option, 'mine.py:f')


def test_a_method_or_backbone_that_raises_or_is_no_module_or_lacks_size_or_weights_is_refused_with_one_line(refusal):
    assert "no attribute 'no_such_part'" in refusal('--method', f'{own.__file__}:broken')
    assert ':nothing: it returned a int, and not a module' in refusal('--method', f'{own.__file__}:nothing')
    assert 'backbone.py:list_of: it returned a list, and not a module' in refusal('--model', 'backbone.py:list_of')
    assert 'backbone.py:two_layers: its name has no image size: --set img_size=PIXELS' in refusal(
        '--model', 'backbone.py:two_layers', img_size=0)
    assert 'backbone.py:two_layers has no weights of its own' in refusal(
        '--model', 'backbone.py:two_layers', weights='')


@pytest.mark.parametrize('argv, said', [
    ('--task mine.py:task', 'mine.py:task: its score has no number by the name accuracy'),
    ('--model backbone.py:linear --method vpt', "AttributeError: 'Sequential' object has no"),
    ('--method method.py:frozen', 'RuntimeError: element 0 of tensors does not require grad'),
    ('--task mine.py:mixed', 'TypeError: can only concatenate list'),
    ('--task mine.py:squares', 'RuntimeError: grad can be implicitly created only for scalar')])
def test_what_does_not_fit_together_is_refused_with_one_line(argv, said, file, tmp_path, refused):
    file.write_text(GREYS.replace('WHAT', "replace(greys(settings), score=lambda rows: {'mIoU': 1})") + '''
mixed = lambda settings: replace(greys(settings), val=data.Files([(__file__, 0)], 16))
squares = lambda settings: replace(greys(settings), loss=lambda logits, labels: logits ** 2)
''')
    usual = {'--task': 'mine.py:greys', '--model': NANO} | dict(zip(argv.split()[::2], argv.split()[1::2]))
    assert said in refused(*(word for option in usual.items() for word in option), **SMALL)


def test_a_backbone_of_a_users_own_is_loaded_from_its_checkpoint(tmp_path):
    config = tiny('mine.py:greys', **SMALL)
    config = replace(config, model='mine', backbone=replace(config.backbone, build='backbone.py:two_layers'))
    made, _ = train.make_model(config, data.load(config))
    torch.save(made.vit.state_dict(), tmp_path / 'weights.pth')
    loaded, _ = train.make_model(replace(config, machine=replace(config.machine, weights='weights.pth'), loop=replace(
        config.loop, seed=5)), data.load(config))
    assert all(torch.equal(x, loaded.vit.state_dict()[name]) for name, x in made.vit.state_dict().items())


def test_only_files_that_the_user_or_configs_yaml_names_are_run(tmp_path):
    """A result that names one is data."""
    config = tiny(runs=tmp_path / 'runs', method='linear', **SMALL | {'n_train': 8})
    result = train.run(config)
    (tmp_path / 'evil.py').write_text('open("was_run", "w")')
    for group, key in ('pictures', 'source'), ('loop', 'tune'), ('backbone', 'build'):
        result['settings'][group][key] = 'evil.py:f'
        (train.folder_of(config) / 'result.json').write_text(json.dumps(train.signed(result)))
        with pytest.raises(InputError, match=rf"{key} 'evil.py:f' -> "):
            train.run(config)
    assert not (tmp_path / 'was_run').exists()
