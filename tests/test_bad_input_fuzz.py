"""Anything at all in the place of the user's files and words: one line and status 2, or it is right. Nothing is trained."""

import contextlib
import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import CONFIGS, tiny

import data
import faults
import train
import vit

HERE = train.HERE
fewer = settings(max_examples=settings.default.max_examples // 3)  # where a test is several, or slow
CPU = torch.device('cpu')
ignore_warnings = pytest.mark.filterwarnings('ignore')
REAL_RUN = train.run

words = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs'])) | st.text('\udc80\udcff\n\'"é\x1b{}[]:,&*', max_size=9)
numbers = st.integers(-3, 99) | st.integers() | st.floats() | st.integers(300, 4000).map(lambda n: 10 ** n)
plain = st.none() | st.booleans() | numbers | st.text(max_size=20) | st.sampled_from(['../x', 'a/b', '\n', '\0', 'ivpt,', 'lr'])
anything = st.recursive(plain, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), x, max_size=4))


def deep(n):
    """A list in a list in a list."""
    x = []
    for _ in range(n):
        x = [x]
    return x


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """A project folder with nothing but configs.yaml, the nano ViT and tests/paper.py; it is the working folder too."""
    folder = tmp_path_factory.mktemp('project')
    shutil.copytree(HERE / 'tests', folder / 'tests', ignore=lambda *_: set(_[1]) - {'nano.pth', 'paper.py'})
    shutil.copy(HERE / 'configs.yaml', folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_trained(here, monkeypatch):
    """Nor downloaded; and nothing is written but into runs/ and data/."""
    def run(config, again=False):
        folder = train.folder_of(config)
        assert folder.resolve().is_relative_to(Path(config.runs).resolve()) and folder != Path(config.runs)
        json.dumps(vars(config))
        torch.save(vars(config), io.BytesIO())
        return {'task': config.task, 'method': config.method, 'seed': config.seed, 'accuracy': 0.5,
                'trained_parameters': 1, 'seconds': 1.0, 'model': config.model, 'config': vars(config)}

    def no_network(weights):
        if '://' in str(weights):
            raise vit.InputError('no network in tests')
        return Path(weights)
    monkeypatch.setattr(train, 'run', run)
    monkeypatch.setattr(vit, 'fetch', no_network)
    monkeypatch.setattr(train, 'HERE', here)
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
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            number = train.main(list(argv))
        except SystemExit as stop:  # --help
            assert stop.code == 0 and '-h' in ' '.join(argv)
            return 0
    err = err.getvalue()
    assert number in (0, 2) and 'Traceback' not in err
    if number == 2:
        assert err.startswith('train.py: ') and err.count('\n') == 1 and err[:-1].isprintable(), err
        assert len(err) < 2000 + sum(map(len, argv)) * 12, err
    return number


# ---- The command line -----------------------------------------------------------------------------------

flags = st.sampled_from(['--task', '--method', '--model', '--seed', '--weights', '--data', '--set', '--show', '--run', '--image',
                         '--again', '--search', '--report', '--noise', '--', '-', '-h', '--se', '--help=', '--task='])
plausible = st.sampled_from([
    'pets', 'where_blue', 'ivpt', 'vpt,linear', 'vit_nano_patch8_48', '0', '0,0', '0,1', '', ',', 'vtab', 'lr=0.1', 'lr=', '=',
    'lr=[', 'lr={a: &a 1, b: *a}', 'runs=', 'runs="\\0"', 'runs="a\\nb"', 'grid={}', 'grid={lr: [1]}', 'grid={runs: [/]}',
    'mean=[1, 2, 1e999]', 'seed=!!int ""', 'seed=2001-99-99', 'seed=1:2:3', 'lr=!!bool x', 'lr=' + '[' * 2000, 'N=0x' + 'f' * 5000,
    'seed=' + '9' * 5000, 'paper_accuracy={}', 'point=x', 'configs.yaml', 'tests', '/dev/null', '.', 'x' * 5000])


@given(argv=st.lists(flags | plausible | words, max_size=7))
def test_any_command_line_runs_or_is_refused_in_one_line(argv):
    status(*argv)


@given(value=words | plausible, flag=flags)
def test_any_text_behind_an_option_is_taken_or_refused_in_one_line(value, flag):
    status(flag, value) if flag not in ('-', '--') else None
    status(f'{flag}={value}')


@given(name=st.sampled_from(list(CONFIGS['defaults'])), value=words | anything.map(repr) | plausible)
def test_any_value_of_a_setting_is_taken_or_refused_in_one_line(name, value):
    status('--set', f'{name}={value}')


def test_a_seed_a_task_and_a_method_that_are_named_twice_are_run_once(monkeypatch):
    runs = []
    monkeypatch.setattr(train, 'run', lambda config, again: runs.append(config) or {'accuracy': 0.5})
    status('--seed', '0,0', '--task', 'where_blue,where_blue', '--method', 'vpt,vpt')
    assert len(runs) == 1


def test_help_is_no_mistake(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(['--help'])
    assert stop.value.code == 0 and '--set' in capsys.readouterr().out


# ---- configs.yaml ---------------------------------------------------------------------------------------


def configured(here, content):
    """The statuses of two commands with that content of configs.yaml."""
    whole = (here / 'configs.yaml').read_bytes()
    times = (here / 'configs.yaml').stat()
    try:
        (here / 'configs.yaml').write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
        return status(), status('--report', '--task', 'vtab')
    finally:
        (here / 'configs.yaml').write_bytes(whole)
        train.os.utime(here / 'configs.yaml', ns=(times.st_atime_ns, times.st_mtime_ns))


@given(content=words | st.binary(max_size=99) | st.lists(st.sampled_from(list('{}[]:,&*!|>-\n \t#%@`"\'ab1?')), max_size=30).map(''.join))
def test_a_configs_yaml_of_anything_is_refused_in_one_line(content, here):
    assert configured(here, content) == (2, 2)


@pytest.mark.parametrize('content', [
    '', 'null', '[]', 'defaults:', 'defaults: {}', 'x: ' + '[' * 5000, '{' * 5000, '\ufeff{}',
    'a: !!python/object/apply:os.getcwd []', b'\xff\xfe', f'x: {"9" * 9999}', '? [a]\n: b', '? {a: b}\n: c', '!!set {a, b}'])
def test_a_configs_yaml_that_is_odd_is_refused_in_one_line(content, here):
    assert configured(here, content) == (2, 2)


@given(last=st.sampled_from([name for name, x in CONFIGS['defaults'].items() if type(x) in (int, float)]), value=anything | st.just(deep(90)) | st.just('delete'), name=st.none() | words | st.integers())
@settings(max_examples=settings.default.max_examples * 2)
def test_a_number_in_configs_yaml_that_is_anything_is_right_or_refused_in_one_line(last, value, name):
    """Also with another name there, or without it."""
    configs = json.loads(json.dumps(CONFIGS))
    at = configs['defaults']
    if value == 'delete':
        del at[last]
    elif name is None:
        at[last] = value
    else:
        at[name] = at.pop(last)
    with pytest.MonkeyPatch.context() as patch:  # as it is read: to write and to parse it takes longer than all the rest
        patch.setattr(train, 'read_yaml', lambda text, where: copy.deepcopy(configs))
        assert {status(), status('--report', '--task', 'vtab')} <= {0, 2}


# ---- The folder of a run that someone else has written --------------------------------------------------


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of one epoch, finished."""
    config = tiny(runs=str(tmp_path_factory.mktemp('finished')), epochs=1, img_size=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'HERE', HERE)
        REAL_RUN(config)
    return config


@contextlib.contextmanager
def as_it_was(folder):
    """A folder that is put back afterwards."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        yield
    finally:
        for path in folder.iterdir():
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)


@given(content=st.binary(max_size=50))
@fewer
def test_a_result_of_any_bytes_is_no_run(content, finished):
    folder = train.folder_of(finished)
    with as_it_was(folder):
        (folder / 'result.json').write_bytes(content)
        assert status('--show', '--run', str(folder)) == 2


# ---- Lists of images ------------------------------------------------------------------------------------

lines = st.lists(st.sampled_from(['a.jpg 1', 'a.jpg', ' 1', '../a.jpg 1', '/a 1', 'a.jpg 99', 'a.jpg -1', '\0 1', 'x' * 300 + ' 1',
                                  'a.jpg ' + '9' * 5000, 'a.jpg ²', '']) | words, max_size=3).map('\n'.join)


@given(content=st.binary(max_size=60) | lines.map(lambda x: x.encode('utf-8', 'surrogateescape')))
def test_a_list_of_anything_gives_samples_in_its_folder_or_is_refused_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / 'list' / 'train800.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        samples = data.read_list(path, path.parent, range(37))
        data.Files(samples, 8)
    except vit.InputError as error:
        assert len(str(error).splitlines()) == 1 and str(path.parent) in str(error)


# ---- Streams that are closed --------------------------------------------------------------------------


def shell(command, folder):
    """The exit status and stderr of a command line of the shell, where $T is `python train.py`."""
    done = subprocess.run(['bash', '-c', command], cwd=folder, capture_output=True, text=True, errors='replace',
                          env=train.os.environ | {'T': f'{sys.executable} {HERE / "train.py"}'})
    return done.returncode, done.stderr


@pytest.mark.parametrize('command, status, lines', [
    (f"set -o pipefail; $T {' '.join(repr(word) for word in faults.ARGV)} runs=$PWD | true", 128 + 13, 0),
    (f"$T {' '.join(repr(word) for word in faults.ARGV)} epochs=1 runs=$PWD >/dev/full", 2, 1)])
def test_a_stream_that_is_closed_or_full_is_no_traceback(command, status, lines, tmp_path):
    number, err = shell(command, tmp_path)
    assert (number, err.count('\n')) == (status, lines) and 'Traceback' not in err and 'Exception' not in err, err
