"""A data set that is a function in a file: the pictures of shapes, and a user's own."""

import json
import py_compile
import re

import pytest
from pictures import CONFIGS, NANO, no_network, run, tiny  # noqa: F401

import data
import train
from vit import InputError

README = (train.HERE / 'README.md').read_text(encoding='utf-8')
SMALL = dict(img_size=24, epochs=1)
GREYS = '''
import torch
import data
from vit import InputError


def greys(config, size=None, labels=(0, 1), dtype=torch.uint8):
    """Black or white?"""
    size = size or config.img_size
    pictures = [(torch.full((3, size, size), 255 * (i % 2), dtype=dtype), labels[i % 2]) for i in range(40)]
    return data.Task(pictures[:20], pictures[20:30], pictures[30:], ['black', 'white'], ['black or white?'])


def floats(config):
    return greys(config, dtype=torch.float32)


def small(config):
    return greys(config, config.img_size - 1)


def third(config):
    return greys(config, labels=(0, 2))


def words(config):
    return greys(config, labels=('black', 'white'))


def arrays(config):
    return greys(config)._replace(val=[(picture.numpy(), label) for picture, label in greys(config).val])


def paths(config):
    return greys(config)._replace(test=[('a.jpg', 0)])


def generator(config):
    return greys(config)._replace(train=(picture for picture in greys(config).train))


def nothing(config):
    return tuple(greys(config))


def broken(config):
    return config.no_such_setting


def refused(config):
    raise InputError('unpack it first')
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / 'mine.py').write_text(GREYS)
    return tmp_path / 'mine.py'


def test_the_example_of_the_readme_runs_as_it_stands_there(tmp_path, monkeypatch, capsys):
    section = README[README.index('## Your own data set'):]
    code, = re.findall(r'```python\n(.*?)```', section[:section.index('\n## ')], re.DOTALL)
    command = re.search(r'^python train.py (.*my_data.*)$', section, re.MULTILINE)[1].split()
    (tmp_path / 'my_data.py').write_text(code)
    monkeypatch.chdir(tmp_path)
    assert len(code.strip().splitlines()) <= 9
    assert run(tmp_path / 'runs', *command, **SMALL) == 0
    assert '600 + 200 images for training and validation, 200 for testing, 4 classes' in capsys.readouterr().out


def test_what_it_returns_is_trained_on_and_tested_on(file, tmp_path, capsys):
    source = f'source={file}:greys'
    assert run(tmp_path / 'runs', '--task', 'where_blue', '--method', 'full', '--set', source, lr=0.001, **SMALL) == 0
    assert 'black or white?' in capsys.readouterr().out
    result, = (json.loads(path.read_text()) for path in (tmp_path / 'runs').rglob('result.json'))
    assert result['classes'] == ['black', 'white'] and result['images'] == 10 and result['accuracy'] == 1
    for action in ['--noise', '0'], ['--show']:
        argv = *action, '--method', 'full', '--set', source
        assert run(tmp_path / 'runs', *argv) == 0


def test_it_may_be_of_images_in_files(file, tmp_path):
    for name in 'black', 'white':
        (tmp_path / f'{name}.png').write_bytes(b'')
    file.write_text(GREYS + f'''
def files(config):
    samples = [({str(tmp_path)!r} + f'/{{name}}.png', label) for label, name in enumerate(('black', 'white'))]
    return data.Task(*3 * [data.Files(samples, data.resized(config))], ['black', 'white'], [])
''')
    task = data.load(tiny(source=f'{file}:files'))
    assert len(task.train) == 2 and task.train.samples[1] == (f'{tmp_path}/white.png', 1)
    file.write_text(file.read_text().replace("label) for", "7) for"))
    with pytest.raises(InputError, match='files: ValueError: a label is 7'):
        data.load(tiny(source=f'{file}:files'))


@pytest.mark.parametrize('name, said', [
    ('missing.py:greys', 'FileNotFoundError'), ('mine.py:grays', "no attribute 'grays'"), ('wrong.py:greys', 'SyntaxError'),
    ('mine.py:broken', "no attribute 'no_such_setting'"), ('mine.py:nothing', 'returned a tuple, and not a data.Task'),
    ('mine.py:generator', 'returned a Task, and not a data.Task of lists or data.Files'),
    ('mine.py:floats', 'an image is torch.float32 [3, 24, 24], not uint8 [3, H, W] from 24 pixels on'),
    ('mine.py:small', 'an image is torch.uint8 [3, 23, 23], not uint8'), ('mine.py:arrays', 'an image is uint8 [3, 24, 24]'),
    ('mine.py:paths', "'str' object has no attribute 'dtype'"),
    ('mine.py:third', 'a label is 2, and not a class, an int from 0 to 1'), ('mine.py:words', "a label is 'black', and not a class")])
def test_a_file_that_is_missing_or_raises_or_returns_something_else_is_one_line(name, said, file, tmp_path, capfd):
    (tmp_path / 'wrong.py').write_text('def greys(:')
    assert run(tmp_path / 'runs', '--set', f'source={tmp_path}/{name}', **SMALL) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and said in err and name in err
    assert not list(tmp_path.rglob('runs/*'))


def test_what_it_says_of_wrong_input_itself_is_said_with_its_name_alone(file, tmp_path, capfd):
    assert run(tmp_path / 'runs', '--method', 'linear', '--set', f'source={file}:refused', **SMALL) == 2
    assert capfd.readouterr().err == f'train.py: {file}:refused: unpack it first\n'


@pytest.mark.parametrize('setting, said', [
    ('look=fog', "look is one of plain, waves, not 'fog'"), ('colours=[]', 'colours is some of red, green, blue'),
    ('colours=[red, red]', "not ['red', 'red']"), ('colours=[red, pink]', 'colours is some of'), ('colours=[[1]]', 'not [[1]]')])
@pytest.mark.parametrize('task', ['where_blue', 'shapes_masks'])
def test_looks_and_colours_that_the_shapes_do_not_have_are_one_line(task, setting, said, tmp_path, capfd):
    assert run(tmp_path, '--task', task, '--method', 'linear', '--set', setting) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and said in err


@pytest.mark.parametrize('key', ['source', 'tune'])
@pytest.mark.parametrize('suffix', ['.py', '.pyc'])
def test_only_files_that_the_user_or_configs_yaml_names_are_run(key, suffix, tmp_path, monkeypatch, capfd):
    """A result that names one is data."""
    monkeypatch.chdir(tmp_path)  # where no tests/shapes.py is: it is beside data.py
    assert run(tmp_path / 'runs', '--method', 'linear', **SMALL) == 0
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "was_run")!r}, "w")')
    py_compile.compile(tmp_path / 'evil.py', tmp_path / 'evil.pyc')
    file, = tmp_path.rglob('result.json')
    assert train.main(['--show', '--run', str(file.parent)]) == 0
    result = json.loads(file.read_text())
    result['config'][key] = name = f'{tmp_path}/evil{suffix}:f'
    train.write_result(file.parent, result)
    for action in ['--show'], ['--noise', '0']:
        assert train.main([*action, '--run', str(file.parent)]) == 2
        err = capfd.readouterr().err
        assert not (tmp_path / 'was_run').exists() and err.count('\n') == 1 and f'{name}, which is code' in err
    assert train.main(['--report', '--set', f'runs={tmp_path / "runs"}']) == 0
    assert not (tmp_path / 'was_run').exists()


def test_a_task_of_configs_yaml_may_name_its_file(file):
    configs = CONFIGS | {'tasks': CONFIGS['tasks'] | {'mine': {'source': f'{file}:greys', 'n_test': 10}}}
    config, = train.settings(configs, 'mine', 'linear', NANO)
    assert data.load(config).notes == ['black or white?']
    for wrong in 'mine', 'mine.txt:greys', '':
        with pytest.raises(InputError, match='source is one of vtab, fgvc, folder, ade20k, FILE.py:NAME, not'):
            train.settings(CONFIGS, 'where_blue', 'linear', NANO, {'source': wrong})
