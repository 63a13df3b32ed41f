"""Section 4.1, the loop: SGD with momentum, a warm-up over a tenth of the epochs, then a cosine; the accuracy
of the last epoch. And what a run writes down."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import CONFIGS, folder_of, run, tiny

import data
import ivpt
import train
import vit

CPU = torch.device('cpu')
METHODS = ('vpt', 'cdc', 'cdc_da', 'ivpt', 'linear', 'full')
MOVES = {'vpt': {'P'}, 'cdc': {'P'}, 'cdc_da': {'P', 'gamma'}, 'ivpt': {'P', 'gamma', 'P_re'},
         'linear': set()}
HEAD = {'head.weight', 'head.bias'}


def small(method='ivpt', n=12, classes=3, pixels=16, seed=0, **changes):
    """A model of two or three layers that trains in milliseconds, n pictures of noise, and settings."""
    torch.manual_seed(seed)
    config = tiny(method=method, **dict(img_size=pixels, batch=5, k=2, N=3) | changes)
    whole = config.tune != 'prompts'
    model = vit.ViT(pixels, 8, 12, 3, 2, num_classes=classes if whole else 0)
    if not whole:
        model = ivpt.IVPT(model, classes, config.N, config.k, config.structure, config.aggregation,
                          config.reinforcement)
    elif config.tune == 'head':
        model.requires_grad_(False).head.requires_grad_(True)
    pictures = [(torch.randint(256, (3, pixels, pixels), dtype=torch.uint8), i % classes) for i in range(n)]
    return model, pictures, config


def snapshot(model):
    """Every parameter and buffer, copied."""
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def moved(before, model):
    """Names of what is not bit for bit what it was."""
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


# ---- The schedule ---------------------------------------------------------------------------------------

steps_and_warmup = st.tuples(st.integers(2, 400), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99]))


@given(steps_and_warmup)
def test_the_learning_rate_rises_linearly_then_falls_as_half_a_cosine(drawn):
    """Section 4.1, in closed form."""
    steps, warmup = drawn
    rising = round(warmup * steps)
    for step in range(steps):
        part = (step - rising) / max(1, steps - rising)
        expected = (step + 1) / rising if step < rising else (1 + math.cos(math.pi * part)) / 2
        assert train.schedule(step, steps, warmup) == pytest.approx(expected, abs=1e-12)


@given(steps_and_warmup)
def test_the_learning_rate_rises_to_its_full_value_and_never_beyond_it_and_falls_from_there(drawn):
    steps, warmup = drawn
    rates = [train.schedule(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    peak = max(0, rising - 1)  # the last step of the warm-up
    assert rates[peak] == max(rates) == 1 and min(rates) > 0
    assert rates[:peak + 1] == sorted(set(rates[:peak + 1]))  # up, in steps of one size
    assert rates[peak + 1:] == sorted(set(rates[peak + 1:]), reverse=True)  # down, never level


def test_of_100_epochs_10_are_warm_up_and_the_last_ends_at_nothing():
    """Section 4.1: 100 epochs of 16 steps of 64 pictures."""
    config = tiny('pets')
    rates = [train.schedule(step, 1600, config.warmup) for step in range(1600)]
    assert rates[0] == 1 / 160 and rates[159] == 1 and rates[158] < 1
    assert rates[880] == pytest.approx(0.5) and rates[-1] < 2e-6


def test_training_follows_the_schedule_step_by_step(monkeypatch):
    model, pictures, config = small(n=12, epochs=3, lr=0.3, warmup=0.5)
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self, *args: (
        seen.append(self.param_groups[0]['lr']), step(self, *args)))
    records = list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))
    assert seen == [0.3 * train.schedule(i, 9, 0.5) for i in range(9)]
    assert [record['lr'] for record in records] == seen[2::3]  # the last of each epoch is reported


# ---- One step -------------------------------------------------------------------------------------------


def gradients(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('method', METHODS)
def test_the_loop_is_sgd_with_momentum_written_by_hand(method):
    """Section 4.1: v <- μ v + g + λ θ and θ <- θ - lr v, for four steps; λ = 0 for γ and the head's bias."""
    how = dict(epochs=2, n=10, lr=0.2, momentum=0.8, weight_decay=0.1, warmup=0.5, optimizer='SGD')
    model, pictures, config = small(method, **how)
    list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))

    naive, _, _ = small(method, **how)
    velocity = {}
    for epoch in range(2):
        for i, (images, labels) in enumerate(data.batches(pictures, config, CPU, epoch)):
            g = gradients(naive, images, labels)
            lr = 0.2 * [1 / 2, 1, 1, 1 / 2][2 * epoch + i]
            for name, p in naive.named_parameters():
                if name in g:
                    velocity[name] = 0.8 * velocity.get(name, 0) + g[name] + 0.1 * (name not in ('gamma', 'head.bias')) * p.data
                    p.data -= lr * velocity[name]
    assert len(velocity) > 1
    for name, x in naive.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], x, rtol=1e-4, atol=1e-6, msg=name)


def test_pre_training_is_adamw_written_by_hand():
    """One step from rest: θ <- θ - lr λ θ - lr g / (|g| + ε), and no bias decays, as in VPT's code."""
    how = dict(epochs=1, n=5, optimizer='AdamW', lr=0.01, weight_decay=0.5, warmup=0.0)
    model, pictures, config = small('full', **how)
    list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))
    naive, _, _ = small('full', **how)
    (images, labels), = data.batches(pictures, config, CPU, 0)
    g = gradients(naive, images, labels)
    for name, p in naive.named_parameters():
        expected = p.data - 0.01 * 0.5 * (not name.endswith('bias')) * p.data - 0.01 * g[name] / (g[name].abs() + 1e-8)
        sure = g[name].abs() > 1e-5  # elsewhere the sign of g is a matter of rounding
        torch.testing.assert_close(model.state_dict()[name][sure], expected[sure], rtol=1e-4, atol=1e-5)


def test_the_loss_of_an_epoch_is_the_mean_over_its_pictures():
    """The last batch is smaller: 12 pictures in batches of 5. The learning rate is next to nothing."""
    model, pictures, config = small('full', n=12, epochs=1, lr=1e-12, weight_decay=0.0)
    record, = train.train(model, train.make_optimizer(model, config), pictures, config, CPU)
    (images, labels), = data.batches(pictures, tiny(img_size=16, batch=12), CPU)
    assert record['loss'] == pytest.approx(F.cross_entropy(model(images), labels).item(), abs=1e-5)
    assert record['images_per_second'] == pytest.approx(12 / record['seconds'])


def test_the_loss_falls():
    model, pictures, config = small(n=30, epochs=15, lr=0.1)
    losses = [record['loss'] for record in train.train(model, train.make_optimizer(model, config), pictures, config, CPU)]
    assert losses[-1] < losses[0] - 0.05


def test_the_first_loss_that_is_not_finite_is_named_and_its_epoch_is_not_yielded(monkeypatch):
    model, pictures, config = small(epochs=3)
    losses, loss, epochs = [], F.cross_entropy, []
    monkeypatch.setattr(F, 'cross_entropy', lambda *args: losses.append(1) or loss(*args) * (
        math.inf if len(losses) == 5 else 1))  # 3 steps an epoch
    with pytest.raises(FloatingPointError, match='the loss is inf in epoch 2, step 2'):
        for record in train.train(model, train.make_optimizer(model, config), pictures, config, CPU):
            epochs.append(record['epoch'])
    assert epochs == [1]


# ---- What moves, and what does not ----------------------------------------------------------------------


@settings(max_examples=30)
@given(st.sampled_from(METHODS[:5]), st.integers(1, 4), st.integers(1, 12), st.integers(0, 3))
def test_the_backbone_is_bit_for_bit_what_it_was_and_all_that_is_tuned_has_moved(method, epochs, n, seed):
    """After any number of steps, in parameters and buffers."""
    model, pictures, config = small(method, n=n, epochs=epochs, seed=seed, weight_decay=0.1)
    before = snapshot(model)
    list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))
    assert moved(before, model) == MOVES[method] | HEAD
    assert set(train.trained(model)) == MOVES[method] | HEAD
    assert all(p.grad is None for name, p in model.named_parameters() if name not in MOVES[method] | HEAD)


def test_fine_tuning_moves_everything():
    model, pictures, config = small('full', lr=0.1)
    before = snapshot(model)
    list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))
    assert moved(before, model) == set(before) == set(train.trained(model))


@pytest.mark.parametrize('method', METHODS)
def test_the_model_that_train_py_makes_tunes_what_its_method_says(method):
    model = train.make_model(tiny(method=method, img_size=16, k=2), 9)
    expected = set(model.state_dict()) if method == 'full' else MOVES[method] | HEAD
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_the_backbone_stays_in_eval_mode_while_the_rest_is_trained():
    model, pictures, config = small('ivpt')
    seen = set()
    backbone = list(model.vit.modules())
    model.register_forward_hook(lambda *_: seen.add((model.training, any(x.training for x in backbone))))
    model.eval()
    list(train.train(model, train.make_optimizer(model, config), pictures, config, CPU))
    assert seen == {(True, False)}


def test_where_training_starts_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (train.make_model(tiny(seed=seed), 9) for seed in (0, 0, 1))
    assert not moved(snapshot(first), again)
    assert {'P', 'head.weight'} <= moved(snapshot(first), other)


@pytest.mark.parametrize('method', ['ivpt', 'full'])
def test_one_seed_gives_the_same_bits_twice_and_another_seed_others(method, tmp_path):
    def params(name, seed):
        train.run(tiny(method=method, runs=str(tmp_path / name), seed=seed, img_size=24))
        return torch.load(tmp_path / name / 'where_blue' / 'vit_nano_patch8_48' / method / f'seed{seed}' / 'params.pth', weights_only=True)
    first, again, other = params('first', 0), params('again', 0), params('other', 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in ('head.weight', *first.keys() & {'P'}))


# ---- The accuracy ---------------------------------------------------------------------------------------


class Says(torch.nn.Module):
    """A classifier that always gives one answer, of three."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return F.one_hot(torch.tensor(self.answer), 3).expand(len(images), 3).float()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 8))
def test_accuracy_is_the_part_of_the_pictures_that_are_right(labels, batch):
    pictures = [(torch.zeros(3, 8, 8, dtype=torch.uint8), label) for label in labels]
    config = tiny(img_size=8, batch=batch)
    assert train.accuracy(Says(1), pictures, config, CPU) == labels.count(1) / len(labels)


def test_accuracy_is_measured_in_eval_mode_and_changes_nothing():
    model, pictures, config = small('full')
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.9), model.head)
    before = snapshot(model)
    assert len({train.accuracy(model, pictures, config, CPU) for _ in range(5)}) == 1
    assert not moved(before, model) and all(p.grad is None for p in model.parameters())


def test_the_accuracy_reported_is_that_of_the_last_epoch_not_of_the_best(tmp_path, monkeypatch):
    """The head answers right after epoch 1, and after epoch 2 gives an answer that is never right."""
    config = tiny(runs=str(tmp_path), img_size=24)
    for part in (task := data.load(config)).test, task.train, task.val:
        part[:] = [(picture, 4) for picture, _ in part]
    monkeypatch.setattr(data, 'load', lambda config: task)

    def two_epochs(model, *rest):
        for epoch, answer in ((1, 4), (2, 5)):
            model.head.weight.data.zero_()
            model.head.bias.data = 9 * F.one_hot(torch.tensor(answer), 9).float()
            yield {'epoch': epoch, 'loss': 0.0, 'lr': 0.1, 'seconds': 1.0, 'images_per_second': 1.0}
    monkeypatch.setattr(train, 'train', two_epochs)
    assert train.run(config)['accuracy'] == 0.0
    written, = tmp_path.rglob('result.json')
    assert json.loads(written.read_text())['accuracy'] == 0.0


def test_test_pictures_are_looked_at_once_after_the_last_epoch(tmp_path, monkeypatch):
    seen, batches = [], data.batches
    monkeypatch.setattr(data, 'batches', lambda pictures, config, device, epoch=None, *part: (
        seen.append((len(pictures), epoch)), batches(pictures, config, device, epoch, *part))[1])
    train.run(tiny(runs=str(tmp_path), epochs=3, img_size=24))
    assert seen == [(50, 0), (50, 1), (50, 2), (20, None)]


# ---- What a run writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
def test_the_saved_parameters_are_those_that_were_trained_alone_and_give_the_same_logits(method, tmp_path):
    kept = {}

    def accuracy(model, pictures, config, device):
        kept.update(model=model.eval())
        return 0.5
    config = tiny(method=method, runs=str(tmp_path), img_size=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'accuracy', accuracy)
        train.run(config)
    saved = torch.load(folder_of(tmp_path, method) / 'params.pth', weights_only=True)
    fresh = train.make_model(config, 9).eval()
    assert set(saved) == set(train.trained(fresh))
    images = torch.rand(3, 3, 24, 24)
    assert not torch.equal(fresh(images), kept['model'](images))
    fresh.load_state_dict(saved, strict=False)
    assert torch.equal(fresh(images), kept['model'](images))


def test_what_fine_tuning_saves_is_a_backbone_for_the_next_task(tmp_path):
    """`full` from random weights is pre-training: its file goes back in as weights, at half the size."""
    train.run(tiny(method='full', runs=str(tmp_path), save_dtype='float16'))
    file = folder_of(tmp_path, 'full') / 'params.pth'
    assert {x.dtype for x in torch.load(file, weights_only=True).values()} == {torch.float16}
    backbone = vit.build('vit_nano_patch8_48', file)
    model = train.make_model(tiny(weights=str(file)), 9)
    assert all(torch.equal(x, backbone.state_dict()[name]) for name, x in model.vit.state_dict().items())


def test_a_run_leaves_its_settings_a_line_an_epoch_the_parameters_and_the_result(tmp_path):
    config = tiny(runs=str(tmp_path), epochs=3, seed=5, img_size=24)
    result = train.run(config)
    folder = folder_of(tmp_path, seed=5)
    names = {path.name for path in folder.iterdir()}
    assert names == {'checkpoint-0.pth', 'checkpoint-1.pth', 'log.jsonl', 'params.pth', 'result.json'}
    assert result['config'] == vars(config)
    log = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert [line['epoch'] for line in log] == [1, 2, 3]
    assert all({'loss', 'lr', 'images_per_second'} <= set(line) for line in log)
    assert json.loads((folder / 'result.json').read_text()) == result
    assert result['final_loss'] == log[-1]['loss'] and result['score_on'] == 'test' and result['seed'] == 5
    assert result['trained_parameters'] == sum(x.numel() for x in torch.load(folder / 'params.pth', weights_only=True).values())


def test_an_old_run_stays_whole_until_the_one_that_is_made_again_has_ended(tmp_path, monkeypatch, capsys):
    """And the same command goes on from where it was stopped; what was stopped with other settings is dropped."""
    def contents():
        return {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir() if path.is_file()}

    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    first, changed = tiny(runs=str(tmp_path), img_size=24), tiny(runs=str(tmp_path), img_size=24, lr=0.5)
    train.run(first)
    old = contents()
    for config in (changed, tiny(runs=str(tmp_path), img_size=24, lr=0.4), changed):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, 'train', stopped)
            train.run(config, again=True)
        assert contents() == old and train.run(first)['config']['lr'] == first.lr
    capsys.readouterr()
    result = train.run(changed, again=True)
    assert 'resumed   after epoch 1 of ' in capsys.readouterr().out
    assert json.loads(contents()['result.json']) == result and result['config']['lr'] == 0.5
    assert set(contents()) == set(old) and not (folder_of(tmp_path) / 'again').exists()
    once = train.run(tiny(runs=str(tmp_path / 'once'), img_size=24, lr=0.5))
    assert contents()['params.pth'] == (folder_of(tmp_path / 'once') / 'params.pth').read_bytes()
    assert once['accuracy'] == result['accuracy']


def test_a_run_from_the_command_line_ends_with_status_0_and_says_what_it_did(tmp_path, capsys):
    assert run(tmp_path, '--method', 'linear,ivpt', '--seed', '0,1', img_size=24) == 0
    for method in ('linear', 'ivpt'):
        for seed in (0, 1):
            assert (folder_of(tmp_path, method, seed=seed) / 'result.json').is_file()
    out, err = capsys.readouterr()
    assert not err
    for said in ('where_blue: 40 + 10 images', '20 for testing', 'vit_nano_patch8_48', 'weights random',
                 'P [6, 10, 64]', 'gamma [5, 10, 10]', 'P_re [5, 4, 64]', 'head.weight [9, 64]', 'mean [0.5, 0.5, 0.5]'):
        assert said in out
    assert out.count('epoch   2/2') == 4 and out.count('% of 20 images') == 4
    assert len([line for line in out.splitlines() if line.startswith('where_blue  ')]) == 4  # the summary


@pytest.mark.parametrize('score_on', ['test', 'val'])
def test_the_papers_accuracy_is_printed_beside_a_test_accuracy_and_no_other(score_on, tmp_path, capsys):
    config = tiny(method='linear', runs=str(tmp_path), img_size=24, epochs=1, score_on=score_on)
    config.paper_accuracy = 91.8
    train.run(config)
    assert ('91.8' in capsys.readouterr().out) == (score_on == 'test')


def test_a_run_whose_last_loss_is_above_a_guess_is_said_to_have_learned_nothing(tmp_path, capsys):
    for lr, learned in (0.05, True), (1e6, False):
        result = train.run(tiny(runs=str(tmp_path / str(lr)), img_size=24, lr=lr, momentum=0.0, method='linear', epochs=3))
        out = capsys.readouterr().out
        assert (result['final_loss'] < math.log(9)) == learned and ('has learned nothing' in out) == (not learned)


# ---- The settings ---------------------------------------------------------------------------------------


def test_the_later_one_of_defaults_model_task_method_and_command_line_wins():
    layers = ('models', 'tasks', 'methods', 'changes')
    defaults = CONFIGS['defaults'] | {'model': 'vit_tiny_patch8_32'}
    for i in range(len(layers) + 1):
        say = {layer: {'epochs': 11 + j} for j, layer in enumerate(layers[:i])}
        configs = {'defaults': defaults | {'epochs': 10},
                   'models': {'vit_tiny_patch8_32': say.get('models', {})},
                   'tasks': {'t': say.get('tasks', {})}, 'methods': {'m': say.get('methods', {})}, 'paper': {}}
        config, = train.settings(configs, 't', 'm', changes=say.get('changes'))
        assert config.epochs == 10 + i


@pytest.mark.parametrize('said, name, value', [
    ('lr=1e-3', 'lr', 0.001), ('lr=1', 'lr', 1.0), ('epochs=20', 'epochs', 20), ('aggregation=true', 'aggregation', True), ('precision=float32', 'precision', 'float32'),
    ('mean=[0.1, 0.2, 0.3]', 'mean', [0.1, 0.2, 0.3]), ('ask=where_red', 'ask', 'where_red'), ('runs=a=b', 'runs', 'a=b'),
    ('grain=2.5', 'grain', 2.5), ('N=010', 'N', 10), ('runs=/x/h #1', 'runs', '/x/h #1'), ('runs=null', 'runs', 'null'),
    ('runs=~/x', 'runs', os.path.expanduser('~/x')), ('cache_gb=0.5', 'cache_gb', 0.5), ('weights=', 'weights', '')])
def test_any_setting_can_be_given_on_the_command_line(said, name, value):
    _, changes = train.arguments(['--set', said])
    config, = train.settings(CONFIGS, 'where_blue', 'ivpt', changes=changes)
    assert getattr(config, name) == value and isinstance(getattr(config, name), type(value))


@pytest.mark.parametrize('name, value', [('method', 'vpt'), ('task', 'pets'), ('model', 'vit_tiny_patch8_8')])
def test_task_method_and_model_can_be_set_as_the_others_or_are_refused(name, value, monkeypatch, capsys):
    """What would be worst: to take the setting and go on without it."""
    seen = []
    result = dict(task='', model='', method='', config={'weights': 'random'}, seed=0, accuracy=0.0, trained_parameters=0, seconds=0.0)
    monkeypatch.setattr(train, 'run', lambda config, again: seen.append(getattr(config, name)) or result)
    assert train.main(['--set', f'{name}={value}']) == 2 or set(seen) == {value}
    capsys.readouterr()


def test_options_of_their_own_win_over_set(monkeypatch):
    seen = []
    monkeypatch.setattr(train, 'run', lambda config, again: seen.append(config.weights) or None)
    train.main(['--method', 'ivpt', '--weights', 'a.pth', '--set', 'weights=b.pth'])
    assert seen == ['a.pth']


def test_every_task_model_and_method_of_configs_yaml_is_made_of_settings_that_are_known():
    assert set(CONFIGS) == {'defaults', 'models', 'tasks', 'groups', 'methods', 'paper'}
    for task in CONFIGS['tasks']:
        for method in CONFIGS['methods']:
            for model in CONFIGS['models']:
                config, = train.settings(CONFIGS, task, method, model)
                assert (config.task, config.method, config.model) == (task, method, model)
    for name, value in CONFIGS['defaults'].items():
        if name not in ('model', 'method', 'task'):
            train.checked(name, value, CONFIGS['defaults'], 'defaults')


def test_the_loop_of_pets_is_the_papers():
    """Section 4.1: SGD, 100 epochs, 10 of them warm-up; momentum 0.9 is VPT's, batch 64 ours."""
    config, = train.settings(CONFIGS, 'pets', 'ivpt')
    loop = dict(optimizer='SGD', epochs=100, warmup=0.1, momentum=0.9, batch=64)
    protocol = dict(n_train=800, n_val=200, augment='crop_flip', score_on='test')
    assert vars(config) == vars(config) | loop | protocol
