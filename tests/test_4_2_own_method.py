"""A method that is a function in a file: Table 1's other systems, and a researcher's own."""

import json
import re
from pathlib import Path

import pytest
import torch
from pictures import CONFIGS, NANO, no_network, run, tiny  # noqa: F401
from test_4_2_table_1 import SETTINGS

import data
import paper
import train

README = (train.HERE / 'README.md').read_text(encoding='utf-8')
SMALL = dict(img_size=24, epochs=2)
BIAS_OF_THE_TOKENS = '''
import torch
from torch import nn


class Shift(nn.Module):
    def __init__(self, vit, classes, config):
        super().__init__()
        self.vit, self.head = vit, nn.Linear(vit.D, classes)
        self.b = nn.Parameter(torch.zeros(vit.D))
        self.register_buffer('seen', torch.zeros(()))
        self.size = getattr(config, 'size', None)

    def prepare(self, batches):
        self.seen.fill_(sum(len(labels) for images, labels in batches))

    def forward(self, images):
        tokens = self.vit.embed(images) + self.b
        for layer in self.vit.blocks:
            tokens, _ = layer(tokens, need_weights=False)
        return self.head(self.vit.read(tokens))


def shift(vit, classes, config):
    assert not any(p.requires_grad for p in vit.parameters())
    return Shift(vit, classes, config)


def nothing(vit, classes, config):
    return 7


def broken(vit, classes, config):
    return vit.no_such_part
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / 'mine.py').write_text(BIAS_OF_THE_TOKENS)
    return tmp_path / 'mine.py'


def test_the_example_of_the_readme_runs_as_it_stands_there(tmp_path, monkeypatch, capsys):
    section = README[README.index('## Your own method'):]
    code, = re.findall(r'```python\n(.*?)```', section[:section.index('\n## ')], re.DOTALL)
    command = re.search(r'^python train.py (.*my_method.*)$', section, re.MULTILINE)[1].split()
    (tmp_path / 'my_method.py').write_text(code)
    monkeypatch.chdir(tmp_path)
    assert len(code.strip().splitlines()) <= 20
    assert run(tmp_path / 'runs', *command, **SMALL) == 0
    assert 'trained' in capsys.readouterr().out and len(list((tmp_path / 'runs').rglob('result.json'))) == 2


def test_what_it_trains_is_trained_saved_and_loaded_and_its_own_buffers_with_it(file, tmp_path, capsys):
    assert run(tmp_path / 'runs', '--method', f'{file}:shift', **SMALL) == 0
    folder, = (path.parent for path in (tmp_path / 'runs').rglob('result.json'))
    params = torch.load(folder / 'params.pth', weights_only=True)
    assert set(params) == {'b', 'seen', 'head.weight', 'head.bias'} and params['b'].ne(0).all()
    assert params['seen'] == 40  # the pictures that are trained on, without those of validation
    result = json.loads((folder / 'result.json').read_text())
    assert result['trained_parameters'] == 64 + 65 * 9
    config, _, model = paper.open_run(folder, torch.device('cpu'), code=[f'{file}:shift'])
    assert train.accuracy(model, data.load(config).test, config, torch.device('cpu')) == result['accuracy']
    for action in ['--report'], ['--noise', '0', '--method', f'{file}:shift'], ['--show', '--method', f'{file}:shift']:
        assert train.main([*action, '--set', f'runs={tmp_path / "runs"}']) == 0
    assert f'`{file}:shift`' in capsys.readouterr().out


def test_a_run_belongs_to_the_code_of_its_method(file, tmp_path, capfd):
    argv = '--method', f'{file}:shift'
    assert run(tmp_path / 'runs', *argv, **SMALL) == 0
    file.write_text(file.read_text().replace('+ self.b', '- self.b'))
    for action in [], ['--noise', '0'], ['--show']:
        capfd.readouterr()
        assert run(tmp_path / 'runs', *argv, *action, **SMALL) == 2
        err = capfd.readouterr().err
        assert err.count('\n') == 1 and 'code' in err


@pytest.mark.parametrize('method', ['FILE:shift', 'sct', 'spt'])
def test_it_goes_on_where_it_was_interrupted(method, file, tmp_path, monkeypatch):
    argv = '--method', method.replace('FILE', str(file))
    assert run(tmp_path / 'whole', *argv, **SMALL) == 0

    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train', stopped)
        assert run(tmp_path / 'parts', *argv, **SMALL) == 130
    assert run(tmp_path / 'parts', *argv, **SMALL) == 0
    whole, parts = (next((tmp_path / name).rglob('params.pth')).read_bytes() for name in ('whole', 'parts'))
    assert whole == parts


def test_its_own_settings_stand_in_its_entry_and_can_be_set(file, tmp_path, capfd):
    configs = train.read_configs()
    configs['methods']['mine'] = {'tune': f'{file}:shift', 'size': 3}
    config, = train.settings(configs, 'where_blue', 'mine', NANO, {'weights': 'random', 'size': 5})
    assert train.make_model(config, 9).size == 5
    for change in {'size': 'big'}, {'sizes': 5}:
        with pytest.raises(train.InputError, match='size is a int|unknown setting'):
            train.settings(configs, 'where_blue', 'mine', NANO, change)
    with pytest.raises(train.InputError, match="unknown setting 'size'"):
        train.settings(configs, 'where_blue', 'vpt', NANO, {'size': 5})
    configs['methods']['vpt']['size'] = 5  # it is in no file
    with pytest.raises(train.InputError, match="methods: vpt: unknown setting 'size'"):
        train.settings(configs, 'where_blue', 'vpt', NANO)


@pytest.mark.parametrize('name, said', [
    ('missing.py:shift', 'missing.py:shift: FileNotFoundError'), ('mine.py:shifts', "no attribute 'shifts'"),
    ('mine.py:nothing', 'returned a int, and not a module from images to logits'), ('mine.py:broken', "no attribute 'no_such_part'"),
    ('wrong.py:shift', 'SyntaxError')])
def test_a_file_that_is_missing_or_raises_or_returns_something_else_is_one_line(name, said, file, tmp_path, capfd):
    (tmp_path / 'wrong.py').write_text('def shift(:')
    assert run(tmp_path / 'runs', '--method', f'{tmp_path}/{name}', **SMALL) == 2
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and said in err and name in err


def test_only_files_that_the_user_names_are_run(tmp_path, capfd):
    """A result that names one is data."""
    assert run(tmp_path / 'runs', '--method', 'linear', **SMALL) == 0
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "was_run")!r}, "w")')
    file, = Path(tmp_path / 'runs').rglob('result.json')
    result = json.loads(file.read_text())
    result['config']['tune'] = f'{tmp_path}/evil.py:f'
    train.write_result(file.parent, result)
    assert train.main(['--show', '--run', str(file.parent)]) == 2
    assert not (tmp_path / 'was_run').exists() and 'evil.py' in capfd.readouterr().err


# ---- Table 1's other systems, from configs.yaml to result.json ------------------------------------------

TABLE_1 = {name: CONFIGS['methods'][name] for name in SETTINGS}


def test_the_systems_of_table_1_are_methods_and_their_settings_are_those_that_they_are_tested_with():
    functions = {*SETTINGS} - {'adapter_vpt'}
    assert {method['tune'] for method in TABLE_1.values()} == {f'tests/table_1.py:{name}' for name in functions}
    for name, settings in SETTINGS.items():
        own = {key: value for key, value in settings.items() if key in TABLE_1[name]}
        assert own and own == {key: TABLE_1[name][key] for key in own}, name


@pytest.mark.parametrize('method, decayed', [
    ('ssf', set()), ('spt', {'A', 'B', 'cls_token'}), ('adapter', {'W', 'U'}), ('snf', {'w', 'u'}),
    ('gapt', {'P', 'a', 'tau'})])  # VPT's rule with SGD
def test_adamw_decays_matrices_alone_and_sgd_all_but_the_heads_bias(method, decayed):
    config = tiny('where_blue', method, img_size=24, weight_decay=0.1)
    model = train.make_model(config, 9)
    groups = train.make_optimizer(model, config).param_groups
    found = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    names = {name.split('.')[-1] for name, p in model.named_parameters() if id(p) in found}
    assert names == decayed | {'weight'}  # the head's


@pytest.mark.parametrize('score_on', ['test', 'val'])
@pytest.mark.parametrize('method, chosen', [('sct', '.I'), ('spt', '.at')])
def test_sct_and_spt_choose_by_the_training_pictures_alone_and_keep_it_in_the_checkpoint(method, chosen, score_on, tmp_path):
    config = tiny('where_blue', method, runs=str(tmp_path), img_size=24, epochs=1, score_on=score_on)
    train.run(config)
    trained = train.read_checkpoint(train.folder_of(config) / 'checkpoint-1.pth')['trained']
    model = train.make_model(config, 9)
    model.prepare(data.batches(data.load(config).train, config, torch.device('cpu')))
    of_train = {name: x for name, x in model.state_dict().items() if name.endswith(chosen)}
    assert of_train and all(x.equal(trained[name]) for name, x in of_train.items())


@pytest.mark.parametrize('method', TABLE_1)
def test_a_system_of_table_1_trains_is_saved_and_is_loaded(method, tmp_path):
    result = train.run(tiny('where_blue', method, runs=str(tmp_path), img_size=24, epochs=1))
    folder, = (path.parent for path in tmp_path.rglob('result.json'))
    config, _, model = paper.open_run(folder, torch.device('cpu'), code=[TABLE_1[method]['tune']])
    assert train.accuracy(model, data.load(config).test, config, torch.device('cpu')) == result['accuracy']
    assert 0 < result['trained_parameters'] < 100_000 and result['final_loss'] > 0
