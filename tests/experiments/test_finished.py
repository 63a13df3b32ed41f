"""A finished run is opened as it was trained, or refused; and the curves that are drawn of runs."""

import json
import py_compile
import shutil
import sys
from itertools import product

import numpy as np
import pytest
import torch
from common import one_line, opened
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pictures import NANO, no_network, run, save_picture, tiny, vtab  # noqa: F401

import curves
import data
import finished
import look
import noise
import train
import vit

SMALL = dict(img_size=24, epochs=1, k=2)


def refused(settings, said, **options):
    with pytest.raises(vit.InputError) as error:
        finished.open_run(settings, **options)
    assert str(error.value).startswith(str(train.folder_of(settings))) and said in str(error.value)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with a finished run of three methods."""
    folder = tmp_path_factory.mktemp('runs')
    assert run(folder, '--method', 'vpt,ivpt,full', **SMALL) == 0
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """The settings of a finished run of a test's own, and a function that changes the settings in its result."""
    settings = tiny(runs=tmp_path, **SMALL)
    shutil.copytree(train.folder_of(tiny(runs=runs, **SMALL)), folder := train.folder_of(settings))

    def change(edit):
        result = json.loads((folder / 'result.json').read_text())
        edit(result['settings'])
        del result['digest']
        (folder / 'result.json').write_text(json.dumps(train.signed(result)))
    return settings, change


@pytest.mark.parametrize('method', ['vpt', 'ivpt', 'full'])
def test_a_finished_run_answers_as_when_it_was_scored(method, runs):
    assert opened(tiny(method=method, runs=runs, **SMALL))[1]


def test_an_opened_run_has_the_settings_that_it_was_made_with(runs, monkeypatch):
    monkeypatch.setattr(train, 'number_format', None)
    settings = tiny(runs=runs, **SMALL)
    other = tiny(runs=runs, **SMALL | {'lr': 7.0, 'mean': (0.1, 0.2, 0.3), 'N': 3, 'weights': 'nothing'})
    monkeypatch.setattr(train, 'folder_of', lambda _, folder=train.folder_of(settings): folder)
    found, same = opened(other)
    assert same and train.as_dict(found.settings) == found.result['settings'] == train.as_dict(settings)
    assert found.settings.backbone == settings.backbone  # a tuple is one again


def test_a_run_that_is_not_there_or_not_whole_is_refused(copied, runs, tmp_path):
    settings, _ = copied
    folder, other = train.folder_of(settings), train.folder_of(tiny(method='vpt', runs=runs, **SMALL))
    shutil.copy(other / 'params.pth', folder)
    refused(settings, 'no finished run')
    (folder / 'result.json').write_bytes((folder / 'result.json').read_bytes()[:30])
    refused(settings, 'no finished run')
    refused(tiny(method='vpt', runs=tmp_path, **SMALL), 'no finished run')


@pytest.mark.parametrize('damage', [
    lambda s: s.pop('loop'), lambda s: s['loop'].update(rate=1), lambda s: s.update(options=3),
    lambda s: s.update(prompts=[]), lambda s: s.update(label=None)])
def test_a_result_with_damaged_settings_is_refused(damage, copied):
    settings, change = copied
    change(damage)
    refused(settings, 'result.json is damaged')


def test_only_files_that_the_command_line_or_configs_yaml_names_are_run(copied, tmp_path, monkeypatch):
    """A result that names one is data."""
    monkeypatch.chdir(tmp_path)  # shapes.py is beside data.py, and not here
    settings, change = copied
    assert opened(settings)[1]
    (tmp_path / 'evil.py').write_text('open("was_run", "w")')
    py_compile.compile('evil.py', 'evil.pyc')
    places = ('pictures', 'source'), ('pictures', 'instead'), ('backbone', 'build'), ('loop', 'tune')
    for (group, key), where in product(places, ('evil.py:f', 'evil.pyc:f')):
        change(lambda stored: stored.update(train.as_dict(settings)) or stored[group].update({key: where}))
        refused(settings, f'{where}, which is code')
    assert not (tmp_path / 'was_run').exists()


KEEPS = '''
import torch
from helper import SIGN
from own import Shift


class Kept(Shift):
    mean = 0

    def prepare(self, batches):
        self.mean = WHAT

    def forward(self, images):
        return SIGN * super().forward(images) - self.mean
'''


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Make a run of a method in a file, which has `mean` from the training pictures. Returns its settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'helper', raising=False)
    (tmp_path / 'helper.py').write_text('SIGN = 1\n')

    def made(what, **changes):
        (tmp_path / 'kept.py').write_text(KEEPS.replace('WHAT', what))
        settings = tiny(method='kept.py:Kept', runs=tmp_path / 'runs', **SMALL | changes)
        train.run(settings)
        return settings
    return made


def test_a_run_that_does_not_answer_as_it_did_is_refused(kept, tmp_path, monkeypatch):
    """What is no parameter and no saved buffer is not in params.pth; code that a file imports has no digest."""
    refused(kept('torch.randn(9)'), 'it answers otherwise than it did: ')
    settings = kept('torch.zeros(9)', seed=1)
    assert opened(settings)[1]
    (tmp_path / 'helper.py').write_text('SIGN = -1\n')
    monkeypatch.delitem(sys.modules, 'helper')
    refused(settings, 'code that its file imports')


@pytest.mark.parametrize('now, elsewhere, opens', [  # now: how many are right, with which probability
    ((6, 0.5005), False, True), ((6, 0.4995), False, True), ((6, 0.502), False, False), ((8, 0.5), False, False),
    ((6, 0.4), True, True), ((8, 0.5), True, True), ((9, 0.5), True, False)])
def test_probabilities_may_differ_by_rounding_and_on_another_machine_two_answers_may_with_a_note(
        now, elsewhere, opens, runs, monkeypatch, capsys):
    """Of 20 pictures 6 were right, with probabilities of 0.5."""
    def rows(right, p):
        return [{'class': '1', 'taken_for': str(int(i < right)), 'probability': str(p)} for i in range(20)]
    settings, here = tiny(runs=runs, **SMALL), train.environment(torch.device('cpu'))
    monkeypatch.setattr(finished, 'read_answers', lambda folder: rows(6, 0.5))
    monkeypatch.setattr(train, 'answers', lambda *how: rows(*now))
    monkeypatch.setattr(train, 'environment', lambda device: here | {'torch': '9.9'} if elsewhere else here)
    if opens:
        finished.open_run(settings)
        assert ("opened with torch '" in capsys.readouterr().out) == elsewhere
    else:
        refused(settings, 'it answers otherwise than it did')


def test_the_first_pictures_are_answered_again_in_whole_batches_and_no_others(runs, monkeypatch):
    asked, whole = [], train.answers
    monkeypatch.setattr(train, 'answers', lambda *how: asked.append(len(how[2])) or whole(*how))
    for first in 1, 17:
        monkeypatch.setattr(finished, 'FIRST', first)
        finished.open_run(tiny(runs=runs, **SMALL))
    assert asked == [16, 20]


# ---- What it was made of --------------------------------------------------------------------------------

def pets(folder, name='data'):
    return tiny('pets', runs=folder / 'runs', data=folder / name, **SMALL, n_train=8, n_val=3, n_test=5)


def test_a_run_is_opened_with_its_own_pictures_wherever_they_are(tmp_path):
    root = vtab(tmp_path / 'data')
    train.run(pets(tmp_path))
    (tmp_path / 'data').rename(tmp_path / 'moved')
    with pytest.raises(vit.InputError, match='could not be downloaded'):
        finished.open_run(pets(tmp_path, 'moved'))  # that its data have moved is not said
    assert opened(pets(tmp_path, 'moved'), given=['data'])[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(data, 'from_file')  # by which torchvision's data set would be downloaded
        assert finished.open_run(pets(tmp_path), photos=True).task.test == []  # no picture is needed
    lines = tmp_path / 'moved' / root.relative_to(tmp_path / 'data') / 'train800.txt'
    lines.write_text('images/train800/000000.jpg 5\n' + lines.read_text().split('\n', 1)[1])
    refused(pets(tmp_path, 'moved'), "train labels '", given=['data'])


def test_a_run_is_not_opened_on_a_task_with_other_classes(tmp_path):
    folders = {n: tiny('folder', runs=tmp_path, data=tmp_path / str(n), **SMALL) for n in (3, 11)}
    for n in folders:
        for i, (part, c, name) in enumerate(product(('train', 'test'), range(n), 'ab')):
            save_picture(tmp_path / str(n) / part / f'class{c:02d}' / f'{name}.png', i)
    train.run(folders[3])
    refused(folders[11], "class names '3 ", given=['data'])


def backbone(path, seed):
    torch.manual_seed(seed)
    torch.save(vit.build(NANO).state_dict(), path)


def test_a_run_is_not_opened_on_another_backbone_and_the_same_by_another_path_is_the_same(tmp_path):
    file, copy = tmp_path / 'a.pth', tmp_path / 'copy.pth'
    settings = {path: tiny(method='linear', runs=tmp_path, weights=path, **SMALL) for path in (file, copy)}
    backbone(file, 0)
    train.run(settings[file])
    file.rename(copy)
    backbone(file, 1)
    refused(settings[file], "backbone '")
    assert opened(settings[copy], given=['weights'])[1]


def test_a_run_that_trained_everything_needs_no_other_file(tmp_path):
    backbone(tmp_path / 'a.pth', 0)
    full, bias = (tiny(method=name, runs=tmp_path, weights=tmp_path / 'a.pth', **SMALL) for name in ('full', 'bias'))
    for settings in full, bias:
        train.run(settings)
    (tmp_path / 'a.pth').unlink()
    found, same = opened(full)
    assert same and not train.is_random(train.as_dict(found.settings))
    with pytest.raises(vit.InputError, match='a.pth: there is no such file'):
        finished.open_run(bias)


@pytest.mark.parametrize('program', [look, noise])
@pytest.mark.parametrize('argv, change, said', [
    (['--seed', '7'], {}, 'seed7: no finished run'), (['--search'], {}, '/vpt,search,batch'),
    (['--search'], {'grid': '{lr: [1]}'}, '/vpt,search,lr=1,batch'), (['--method', 'vtp'], {}, "did you mean 'vpt'"),
    ([], {'device': 'xpu:7'}, 'device xpu:7 cannot be used'), ([], {'lr': 'a'}, 'lr is a number')])
def test_wrong_input_is_refused_with_one_line(argv, change, said, program, runs, capfd):
    method = () if '--method' in argv else ('--method', 'vpt')
    assert run(runs, *method, *argv, program=program, **SMALL | change) == 2
    assert said in one_line(capfd)


# ---- Curves ---------------------------------------------------------------------------------------------

def coloured(path, colour, area):
    """How many pixels of an area have just this colour."""
    rgb = np.frombuffer(bytes.fromhex(colour[1:]), dtype=np.uint8)
    return (np.asarray(Image.open(path).crop(area)) == rgb).all(-1).sum()


def test_every_curve_has_its_colour_and_its_mark_in_the_picture_and_in_the_legend(tmp_path):
    found = {('x', 'm', f'method{i}'): [(0, 10 * i, 1.0), (1, 10 * i + 5, 1.0)] for i in range(7)}
    curves.lines(path := tmp_path / 'a.png', ('N', 'accuracy'), {0: '1', 1: '5'}, found)
    assert Image.open(path).size == (800, 500 + 25 * 7)
    for i, colour in enumerate(curves.COLOURS):
        assert coloured(path, colour, (100, 80, 760, 420)) > 300
        assert coloured(path, colour, (80, 490 + 25 * i, 170, 510 + 25 * i)) > 100
    for x in 100, 750:  # the middle of what is written below a tick
        ink = torch.from_numpy(np.asarray(Image.open(path).convert('L'))[436:460, x - 40:x + 40] < 128).nonzero()
        assert abs(ink[:, 1].float().mean() - 40) < 3


@pytest.mark.parametrize('other, title, legend', [
    (('y', 'm', 'a'), 'm', ['x, a', 'y, a']), (('y', 'n', 'a'), '', ['x, m, a', 'y, n, a'])])
def test_what_all_curves_share_is_the_title_and_the_legend_says_the_rest(other, title, legend, tmp_path, monkeypatch):
    said, point = [], [(0, 1.0, 0.0)]
    monkeypatch.setattr(curves.ImageDraw.ImageDraw, 'text', lambda draw, at, words, **how: said.append(words))
    curves.lines(tmp_path / 'a.png', ('N', 'accuracy'), {0: '1'}, {('x', 'm', 'a'): point, other: point})
    assert said[0] == title and said[-2:] == legend


@given(low=st.floats(-1000, 1000), width=st.floats(0.001, 10_000))
def test_an_axis_has_round_numbers_that_enclose_the_data(low, width):
    ticks = curves.round_numbers(low, low + width)
    numbers = [*ticks]
    step = float(f'{numbers[1] - numbers[0]:.6e}')
    assert 2 <= len(numbers) <= 7 and numbers[0] <= low + 1e-9 and low + width - 1e-9 <= numbers[-1]
    assert f'{step:.6e}'[:8] in ('1.000000', '2.000000', '5.000000')
    assert all(abs(x / step - round(x / step)) < 1e-6 for x in numbers)
    assert [float(word) for word in ticks.values()] == pytest.approx(numbers, abs=1e-9)
    assert len(curves.round_numbers(0.5, 6.3)) <= 7  # 0, 2, 4, 6, 8
    assert curves.round_numbers(50, 50) == {50: '50'} and curves.round_numbers(0, 0) == {0: '0'}


def test_the_name_of_a_picture_says_what_and_which_runs_it_shows_and_its_folder_holds_these_runs():
    vpt, ivpt, other = tiny(method='vpt', seed=1), tiny(method='ivpt'), tiny('shape_red')
    one = train.folder_of(vpt)
    assert curves.picture_of('loss', [vpt]) == one / 'loss.png'
    changes = train.name_of(vpt).removeprefix('vpt')
    assert curves.picture_of('loss', [vpt, vpt, ivpt]) == one.parent.parent / f'loss,vpt+ivpt{changes},seed1+seed0.png'
    shown = curves.picture_of('loss', [ivpt, other])
    assert shown.parent.name == 'runs' and shown.name.startswith('loss,where_blue+shape_red,vit_nano_patch8_48,ivpt,')
    many = [tiny(method=f'{"a" * 30}{i}.py:f') for i in range(9)]
    paths = [curves.picture_of('loss', [*many, more]) for more in (tiny(method='linear'), tiny(method='full'))]
    assert len(set(paths)) == 2 and max(len(path.name) for path in paths) <= 203  # of a file system's 255 bytes
