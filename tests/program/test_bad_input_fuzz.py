"""Anything at all in the place of the user's files and words: one line and status 2, or it is right. No run is made."""

import contextlib
import copy
import importlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import CONFIGS

import data
import train
import vit

HERE, READ_CONFIGS = train.HERE, train.read_configs

words = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']))
words |= st.text('\udc80\udcff\n\'"é\x1b{}[]:,&*', max_size=9)
numbers = st.integers(-3, 99) | st.integers() | st.floats() | st.integers(300, 4000).map(lambda n: 10 ** n)
plain = st.none() | st.booleans() | numbers | st.text(max_size=20)
plain |= st.sampled_from(['../x', 'a/b', '\n', '\0', 'ivpt,', 'lr'])
anything = st.recursive(plain, lambda x: st.lists(x, max_size=4) | st.dictionaries(
    st.text(max_size=5) | st.integers(), x, max_size=4)) | st.just(json.loads('[' * 90 + ']' * 90))


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """The working folder."""
    return tmp_path_factory.mktemp('project')


@pytest.fixture(autouse=True)
def nothing_is_trained(here, monkeypatch):
    """Nor downloaded; and nothing is written but into runs/ and data/."""
    def run(settings, again=False):
        folder, runs = train.folder_of(settings), Path(settings.machine.runs)
        assert folder.resolve().is_relative_to(runs.resolve()) and len(folder.parts) >= len(runs.parts) + 4
        loop = settings.loop
        return {'task': settings.task, 'model': settings.model, 'method': settings.method, 'seed': loop.seed,
                'accuracy': 0.5, 'trained_parameters': 1, 'seconds': 1.0, 'settings': train.as_dict(settings)}

    def no_network(weights):
        if '://' in str(weights):
            raise vit.InputError('no network in tests')
        return Path(weights), [], None
    monkeypatch.setattr(train, 'run', run)
    monkeypatch.setattr(train, 'read_configs', lambda: copy.deepcopy(CONFIGS))  # to parse it takes longer than the rest
    monkeypatch.setattr(vit, 'fetch', no_network)
    monkeypatch.chdir(here)
    before = files(here), files(HERE)
    yield
    assert (files(here), files(HERE)) == before


def files(folder):
    """What lies in a folder, and when it was written; without runs, data and caches."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file() and not {
        'runs', 'data', '.git', '__pycache__', '.hypothesis', '.pytest_cache'} & set(path.relative_to(folder).parts)}


def status(*argv):
    """The exit status of a command line; if it is 2, there was one line on stderr, and no other is."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            number = train.main(list(argv))
        except SystemExit as stop:  # --help
            assert stop.code == 0 and '-h' in ' '.join(argv)
            return 0
    err = err.getvalue()
    assert number in (0, 2) and 'Traceback' not in err
    if number == 2:
        assert err.startswith('error: ') and err.count('\n') == 1 and err[:-1].isprintable(), err
        assert len(err) < 2000 + sum(map(len, argv)) * 12, err
    return number


flags = st.sampled_from(['--task', '--method', '--model', '--seed', '--weights', '--data', '--set', '--again', '--run',
                         '--', '-', '-h', '--se', '--help=', '--task='])
plausible = st.sampled_from([
    'pets', 'where_blue', 'ivpt', 'vpt,linear', 'vit_nano_patch8_48', '0', '0,0', '0,1', '', ',', 'vtab', 'lr=0.1',
    'lr=', '=', 'lr=[', 'lr={a: &a 1, b: *a}', 'runs=', 'runs="\\0"', 'runs="a\\nb"', 'grid={lr: [1]}', 'colours=[/]',
    'mean=[1, 2, 1e999]', 'mean=!!bool x', 'mean=2001-99-99', 'mean=!!int ""', 'lr=!!bool x', 'mean=' + '[' * 2000,
    'N=0x' + 'f' * 5000, 'x.py:y', '../x.py:y', '.py:', 'seed=' + '9' * 5000, '9' * 5000, 'configs.yaml', 'tests',
    '/dev/null', '.', 'x' * 5000, 'a\nb\x1b[31m'])
joined = st.tuples(flags, words | plausible).map('='.join)


@given(argv=st.lists(flags | plausible | words | joined, max_size=7))
def test_any_command_line_runs_or_is_refused_in_one_line(argv):
    """Also with a file in it whose name has a line break or an escape sequence."""
    status(*argv)


@given(name=st.sampled_from([*train.TYPES, 'ask', 'colours', 'grain']), value=words | anything.map(repr) | plausible)
def test_any_value_of_a_setting_is_taken_or_refused_in_one_line(name, value):
    status('--set', f'{name}={value}')


@pytest.mark.parametrize('program', ['train', 'sweep', 'report', 'noise', 'look', 'dam_vp'])
def test_help_is_no_mistake_fits_a_screen_and_says_what_each_option_is_for(program, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '120')
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(['--help'])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 40
    options = [i for i, line in enumerate(lines) if line.startswith('  -')]
    assert len(options) >= 8 and not [lines[i] for i in options if len(lines[i].strip().split('  ')) == 1
                                      and not lines[i + 1].startswith(' ' * 20)]


@pytest.fixture
def configured(here, monkeypatch):
    """The statuses of two commands with that content of configs.yaml."""
    monkeypatch.setattr(train, 'HERE', here)
    monkeypatch.setattr(train, 'read_configs', READ_CONFIGS)

    def statuses(content):
        content = content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass')
        (here / 'configs.yaml').write_bytes(content)
        return status(), status('--task', 'vtab')
    yield statuses
    (here / 'configs.yaml').unlink()


text = st.text('{}[]:,&*!|>-\n \t#%@`"\'ab1?', max_size=30)


def test_a_configs_yaml_of_anything_is_refused_in_one_line(configured):
    @given(content=words | st.binary(max_size=99) | text)
    def refused(content):
        assert configured(content) == (2, 2)
    refused()


@pytest.mark.parametrize('content', [
    '', 'null', '[]', 'tasks:', 'tasks: {}', 'tasks: []', 'x: ' + '[' * 1000, '{' * 1000, '\ufeff{}',
    'a: !!python/object/apply:os.getcwd []', b'\xff\xfe', f'x: {"9" * 9999}', '? [a]\n: b', '? {a: b}\n: c',
    '!!set {a, b}',
    'tasks: {where_blue: 3}\nmodels: {}\nmethods: {}\ngroups: {}', 'tasks: {}\nmodels: {}\nmethods: {}\ngroups: {}'])
def test_a_configs_yaml_that_is_odd_is_refused_in_one_line(content, configured):
    assert configured(content) == (2, 2)


ENTRIES = [(section, name, key) for section in ('models', 'tasks', 'methods')
           for name, entry in CONFIGS[section].items() for key in entry
           if section != 'tasks' or name in ('where_blue', 'pets')]


@given(where=st.sampled_from(ENTRIES), value=anything, name=st.none() | words | st.integers())
def test_a_value_in_configs_yaml_that_is_anything_is_right_or_refused_in_one_line(where, value, name):
    """Also with another name there."""
    section, entry, key = where
    configs = copy.deepcopy(CONFIGS)
    configs[section][entry].pop(key)
    configs[section][entry][key if name is None else name] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'read_configs', lambda: configs)
        status(f'--{section[:-1]}', entry)


@given(content=st.binary(max_size=50) | anything.map(json.dumps).map(str.encode), params=st.binary(max_size=9))
def test_a_result_of_anything_is_no_result(content, params, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'result'
    folder.mkdir(exist_ok=True)
    (folder / 'result.json').write_bytes(content)
    (folder / 'params.pth').write_bytes(params)
    assert train.read_result(folder) is None


lines = st.lists(st.sampled_from(['a.jpg 1', 'a.jpg', ' 1', '../a.jpg 1', '/a 1', 'a.jpg 99', 'a.jpg -1', '\0 1',
                                  'x' * 300 + ' 1', 'a.jpg ' + '9' * 5000, 'a.jpg ²', '']) | words, max_size=3)
lines = lines.map(lambda x: '\n'.join(x).encode('utf-8', 'surrogateescape'))


@given(name=st.sampled_from(['list.txt', 'list.json']),
       content=st.binary(max_size=60) | lines | anything.map(json.dumps).map(str.encode))
def test_a_list_of_anything_gives_samples_in_its_folder_or_is_refused_in_one_line(name, content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / 'list' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        samples = data.read_list(path, path.parent, range(37))
        assert samples and all(label in range(37) and '..' not in file.parts for file, label in samples)
        data.Files(samples, 8)
    except vit.InputError as error:
        assert len(str(error).splitlines()) == 1 and str(path.parent) in str(error)
