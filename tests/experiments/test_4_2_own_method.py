"""A method that is a function in a file: Table 1's other systems, and a researcher's own.

That the README's example of one runs, and what is said of a wrong one, is in test_own_data.py.
"""

import shutil
from functools import cache
from pathlib import Path

import look
import noise
import own
import pytest
import report
import torch
from common import one_line, opened, stop_after_an_epoch
from pictures import CONFIGS, run, tiny

import data
import train
from vit import InputError

CPU = torch.device('cpu')
SMALL = dict(img_size=24, n_train=12, n_val=4, n_test=8)
TABLE_1 = {name: entry for name, entry in CONFIGS['methods'].items() if 'table_1.py' in entry.get('tune', '')}


@pytest.fixture
def file(tmp_path):
    """own.py in a place where it can be changed."""
    return Path(shutil.copy(own.__file__, tmp_path / 'mine.py'))


def test_what_a_method_of_a_file_trains_and_its_buffers_are_saved_and_loaded_by_its_code_alone(file, tmp_path, capfd):
    runs, argv = tmp_path / 'runs', ('--method', f'{file}:shift')
    assert run(runs, *argv, **SMALL) == 0
    found, same = opened(tiny('where_blue', argv[1], runs=runs, **SMALL))
    params = torch.load(train.folder_of(found.settings) / 'params.pth', weights_only=True)
    assert same and set(params) == {'b', 'seen', 'head.weight', 'head.bias'} and params['b'].ne(0).all()
    assert params['seen'] == 12  # the pictures that are trained on, without those of validation
    assert found.result['trained_parameters'] == 64 + 65 * 9
    for program in report, noise, look:
        assert run(runs, *argv, program=program, **SMALL) == 0
    assert f'`{file}:shift,' in capfd.readouterr().out
    file.write_text(file.read_text().replace('+ self.b', '- self.b'))
    for program in train, noise, look:
        assert run(runs, *argv, program=program, **SMALL) == 2
        assert 'code' in one_line(capfd)


def test_settings_of_a_method_of_a_file_stand_in_its_entry_and_can_be_set(file):
    configs = train.read_configs()
    configs['methods']['mine'] = {'tune': f'{file}:shift', 'size': 3}
    settings = train.settings_of(configs, 'where_blue', None, 'mine', {'weights': 'random', 'size': 5})
    assert train.make_model(settings, data.Task([], [], [], ['a', 'b']))[0].size == 5
    configs['methods']['vpt']['size'] = 5  # it is in no file
    for method, change, said in (('mine', {'size': 'big'}, 'size is a whole number'),
                                 ('mine', {'sizes': 5}, "unknown setting 'sizes': did you mean 'size'"),
                                 ('cdc', {'size': 5}, "unknown setting 'size'"),
                                 ('vpt', {}, "methods: vpt: unknown setting 'size'")):
        with pytest.raises(InputError, match=said):
            train.settings_of(configs, 'where_blue', None, method, change)


@pytest.mark.parametrize('method, decayed', [
    ('ssf', set()), ('spt', {'A', 'B', 'cls_token'}), ('adapter', {'W', 'U'}), ('snf', {'w', 'u'}),
    ('gapt', {'P', 'a', 'tau'})])  # VPT's rule with SGD
def test_adamw_decays_matrices_alone_and_sgd_all_but_the_heads_bias(method, decayed):
    settings = tiny('where_blue', method, img_size=24, weight_decay=0.1)
    model, _ = train.make_model(settings, data.Task([], [], [], [*'abcdefghi']))
    groups = train.make_optimizer(model, settings.loop).param_groups
    found = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    names = {name.split('.')[-1] for name, p in model.named_parameters() if id(p) in found}
    assert names == decayed | {'weight'}  # the head's


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A function from a method to the settings and the result of a finished run, which is made once."""
    runs = tmp_path_factory.mktemp('runs')

    @cache
    def result_of(method):
        settings = tiny('where_blue', method, runs=runs, **SMALL)
        return settings, train.run(settings)
    return result_of


@pytest.mark.parametrize('method', TABLE_1)
def test_a_system_of_table_1_trains_is_saved_and_is_loaded(method, whole):
    settings, result = whole(method)
    assert opened(settings)[1] and len(TABLE_1) == 12
    assert 0 < result['trained_parameters'] < 100_000 and result['final_loss'] > 0


@pytest.mark.parametrize('method, chosen, score_on', [
    ('sct', '.I', 'test'), ('sct', '.I', 'val'), ('spt', '.at', 'test')])
def test_sct_and_spt_choose_once_and_by_the_training_pictures_alone(method, chosen, score_on, whole, tmp_path):
    settings = tiny('where_blue', method, runs=tmp_path, score_on=score_on, **SMALL)
    stop_after_an_epoch(settings)
    kept = torch.load(train.folder_of(settings) / 'checkpoint.pth', weights_only=True)['trained']
    task = data.load(settings)
    model, _ = train.make_model(settings, task)
    model.prepare(data.batches(task.train, settings, CPU))
    of_train = {name: x for name, x in model.state_dict().items() if name.endswith(chosen)}
    assert of_train and all(x.equal(kept[name]) for name, x in of_train.items())
    if score_on == 'test':
        assert train.run(settings)['params_digest'] == whole(method)[1]['params_digest']
