"""Section 4.1: SGD with momentum, a warm-up over a tenth of the epochs, then a cosine; the accuracy of the last
epoch. And what a run writes."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from pictures import CONFIGS, folders_of, load_with, run, task_of, tiny

import data
import train
import vit

CPU = torch.device('cpu')
COMPUTE = train.Compute(CPU, 'float32', '')
METHODS = ('vpt', 'cdc', 'cdc_da', 'ivpt', 'linear', 'bias', 'full')
HEAD = {'head.weight', 'head.bias'}


def moves(method, names):
    """Which of all parameters a method trains."""
    return {'full': names, 'bias': HEAD | {name for name in names if name.endswith('.bias')}, 'linear': HEAD,
            'ivpt': {'P', 'gamma', 'P_re'} | HEAD, 'cdc_da': {'P', 'gamma'} | HEAD}.get(method, {'P'} | HEAD)


def small(method='ivpt', n=12, classes=3, seed=0, **changes):
    """A model of three layers that trains in milliseconds, n pictures of noise, and settings."""
    torch.manual_seed(seed)
    config = tiny(method=method, **dict(img_size=16, batch=5, k=2, N=3) | changes)
    backbone = vit.ViT(16, 8, (12, 3, 2), num_classes=0 if config.loop.tune == 'prompts' else classes)
    pictures = [(torch.randint(256, (3, 16, 16), dtype=torch.uint8), i % classes) for i in range(n)]
    return train.tuned(backbone, classes, config), pictures, config


def fitted(model, pictures, config, **task):
    """Train as train.py does: an iterator over the records."""
    state = train.State(model, train.make_optimizer(model, config.loop), torch.amp.GradScaler(enabled=False), [])
    return train.train(state, replace(task_of(pictures=pictures), **task), pictures, config, COMPUTE)


@given(st.integers(2, 400), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99]))
def test_the_learning_rate_rises_linearly_to_its_full_value_then_falls_as_half_a_cosine(steps, warmup):
    """Section 4.1, in closed form."""
    rates = [train.schedule(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    for step, rate in enumerate(rates):
        part = (step - rising) / max(1, steps - rising)
        expected = (step + 1) / rising if step < rising else (1 + math.cos(math.pi * part)) / 2
        assert rate == pytest.approx(expected, abs=1e-12)
    peak = max(0, rising - 1)  # the last step of the warm-up
    assert rates[peak] == max(rates) == 1 and min(rates) > 0
    assert rates[:peak + 1] == sorted(set(rates[:peak + 1]))  # up, in steps of one size
    assert rates[peak + 1:] == sorted(set(rates[peak + 1:]), reverse=True)  # down, never level


def test_of_100_epochs_10_are_warm_up_and_the_last_one_ends_near_a_learning_rate_of_0():
    """Section 4.1: SGD, 100 epochs of 16 steps of 64 pictures. Momentum 0.9 is VPT's, batch 64 ours."""
    pets = train.settings_of(CONFIGS, 'pets', method='ivpt')
    loop = pets.loop
    assert (loop.optimizer, loop.epochs, loop.momentum, loop.batch, loop.score_on) == ('SGD', 100, 0.9, 64, 'test')
    assert (pets.pictures.n_train, pets.pictures.n_val, pets.pictures.augment) == (800, 200, 'crop_flip')
    rates = [train.schedule(step, 1600, loop.warmup, loop.schedule) for step in range(1600)]
    assert rates[0] == 1 / 160 and rates[159] == 1 and rates[158] < 1
    assert rates[880] == pytest.approx(0.5) and rates[-1] < 2e-6


@pytest.mark.parametrize('kind', ['cosine', 'poly'])
def test_training_follows_the_schedule_step_by_step(kind, monkeypatch):
    model, pictures, config = small(n=12, epochs=3, lr=0.3, warmup=0.5, schedule=kind)
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self, *args: (
        seen.append([group['lr'] for group in self.param_groups]), step(self, *args)))
    records = list(fitted(model, pictures, config))
    rates = [0.3 * train.schedule(i, 9, 0.5, kind) for i in range(9)]
    assert seen == [[rate, rate] for rate in rates]
    assert [record['lr'] for record in records] == rates[2::3]  # the last of each epoch is reported


def gradients(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('method', METHODS)
def test_the_loop_is_sgd_with_momentum_written_by_hand(method):
    """Section 4.1: v <- μ v + g + λ θ and θ <- θ - lr v, for four steps; λ = 0 for γ and the head's bias."""
    how = dict(epochs=2, n=10, lr=0.2, momentum=0.8, weight_decay=0.1, warmup=0.5, optimizer='SGD')
    model, pictures, config = small(method, **how)
    list(fitted(model, pictures, config))

    naive, _, _ = small(method, **how)
    velocity = {}
    for epoch in range(2):
        for i, (images, labels) in enumerate(data.batches(pictures, config, CPU, epoch)):
            g = gradients(naive, images, labels)
            lr = 0.2 * [1 / 2, 1, 1, 1 / 2][2 * epoch + i]
            for name, p in naive.named_parameters():
                if name in g:
                    decay = 0.1 * (name not in ('gamma', 'head.bias'))
                    velocity[name] = 0.8 * velocity.get(name, 0) + g[name] + decay * p.data
                    p.data -= lr * velocity[name]
    assert len(velocity) > 1
    for name, x in naive.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], x, rtol=1e-4, atol=1e-6, msg=name)


def test_pre_training_is_adamw_written_by_hand():
    """One step from rest: θ <- θ - lr λ θ - lr g / (|g| + ε), and no bias decays, as in VPT's code."""
    how = dict(epochs=1, n=5, optimizer='AdamW', lr=0.01, weight_decay=0.5, warmup=0.0)
    model, pictures, config = small('full', **how)
    list(fitted(model, pictures, config))
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
    record, = fitted(model, pictures, config)
    (images, labels), = data.batches(pictures, tiny(img_size=16, batch=12), CPU)
    assert record['loss'] == pytest.approx(F.cross_entropy(model(images), labels).item(), abs=1e-5)
    assert record['images_per_second'] == pytest.approx(12 / record['seconds'])


def test_a_task_brings_its_own_loss_and_its_own_augmentation():
    """The loss is that of the task's labels, whatever they are; what `augment` names is done with each picture."""
    def mean(logits, labels):
        return (logits.mean(dim=1) - labels).square().mean()

    def white(image, label, backbone, draws, seed):
        seeds.add(seed)
        return torch.full_like(image, 255), 1.0
    seeds = set()
    model, pictures, config = small(n=6, epochs=2, lr=1e-12, augment='white')
    config = replace(config, loop=replace(config.loop, seed=4))
    first, _ = fitted(model, pictures, config, loss=mean, augments={'white': white})
    images = (torch.ones(6, 3, 16, 16) - 0.5) / 0.5
    assert first['loss'] == pytest.approx(mean(model(images), torch.ones(6)).item(), abs=1e-5)
    assert seeds == {(4, epoch, place) for epoch in range(2) for place in range(6)}


@given(st.sampled_from(METHODS), st.integers(1, 4), st.integers(1, 12), st.integers(0, 3))
def test_the_backbone_is_bit_for_bit_what_it_was_and_all_that_is_tuned_has_moved(method, epochs, n, seed):
    """After any number of steps, in parameters and buffers. Fine-tuning moves everything."""
    model, pictures, config = small(method, n=n, epochs=epochs, seed=seed, lr=0.1, weight_decay=0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    list(fitted(model, pictures, config))
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == set(train.trained(model)) == moves(method, set(before))
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)


@pytest.mark.parametrize('method, name', [('ivpt', 'P'), ('ivpt', 'head.weight'), ('full', 'patch_embed.proj.weight')])
def test_one_seed_starts_with_the_same_bits_twice_and_another_seed_with_others(method, name):
    """That it also ends with the same bits is in test_interruptions.py."""
    first, again, other = (train.make_model(tiny(method=method, seed=seed), task_of())[0].state_dict()[name]
                           for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 8))
def test_accuracy_is_the_part_of_the_pictures_that_are_right(labels, batch):
    def says_one(images):
        return F.one_hot(torch.tensor(1), 3).expand(len(images), 3)
    pictures = [(torch.zeros(3, 8, 8, dtype=torch.uint8), label) for label in labels]
    rows = data.answers(says_one, pictures, tiny(img_size=8, batch=batch), CPU)
    assert [(row['class'], row['taken_for']) for row in rows] == [(label, 1) for label in labels]
    assert [row['probability'] for row in rows] == pytest.approx([math.e / (math.e + 2)] * len(rows))
    assert data.accuracy(train.from_csv(train.as_csv(rows))) == {'accuracy': labels.count(1) / len(labels)}


@pytest.mark.parametrize('logit', [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_no_answer(logit, tmp_path, monkeypatch):
    """argmax takes NaN for a class."""
    def last(model, pictures, settings, device, answers=data.answers):
        if len(pictures) > 1:  # not at the rehearsal
            model.head.bias.data[3] = logit
        return answers(model, pictures, settings, device)
    config = tiny(runs=tmp_path, img_size=24)
    load_with(monkeypatch, answers=last)
    with pytest.raises(vit.InputError, match='a picture that is scored is not finite. 2 of 2 epochs are kept'):
        train.run(config)
    assert train.read_result(train.folder_of(config)) is None


@pytest.mark.parametrize('score_on, learned, scored', [('test', 50, 20), ('val', 40, 10)])
def test_what_is_scored_is_looked_at_once_after_the_last_epoch(score_on, learned, scored, tmp_path, monkeypatch):
    """Training is on the training and validation pictures; to choose settings (`val`) on the training ones alone."""
    seen, batches = [], data.batches
    monkeypatch.setattr(data, 'batches', lambda pictures, config, device, epoch=None, *part: (
        seen.append((len(pictures), epoch)), batches(pictures, config, device, epoch, *part))[1])
    result = train.run(tiny(runs=tmp_path, epochs=3, img_size=24, score_on=score_on))
    assert seen == [(1, None)] * 2 + [(learned, 0), (learned, 1), (learned, 2), (scored, None)]  # first, a rehearsal
    assert (result['score_on'], result['images']) == (score_on, scored)


@pytest.mark.parametrize('method', METHODS)
def test_the_saved_parameters_are_those_that_were_trained_alone_and_give_the_same_logits(method, tmp_path, monkeypatch):
    """The score is taken in eval mode and without gradients; what a task's own score says is in the result."""
    kept = {}

    def answers(model, pictures, config, device):
        kept['model'] = model
        assert not model.training and not torch.is_grad_enabled()
        return [{'half': 0.5}] * len(pictures)

    def score(rows):
        assert all(row['half'] == '0.5' for row in rows)  # as the file has them
        return {'accuracy': float(rows[0]['half']), 'of a third kind': 0.25}
    config = tiny(method=method, runs=tmp_path, img_size=24)
    load_with(monkeypatch, answers=answers, score=score, measure='mIoU')
    result = train.run(config)
    assert (result['accuracy'], result['of a third kind'], result['measure']) == (0.5, 0.25, 'mIoU')
    saved = torch.load(train.folder_of(config) / 'params.pth', weights_only=True)
    fresh = train.make_model(config, task_of(n=9))[0].eval()
    assert set(saved) == set(train.trained(fresh)) == moves(method, set(fresh.state_dict()))
    assert result['trained_parameters'] == sum(x.numel() for x in saved.values())
    images = torch.rand(3, 3, 24, 24)
    assert not torch.equal(fresh(images), kept['model'](images))
    fresh.load_state_dict(saved, strict=False)
    assert torch.equal(fresh(images), kept['model'](images))


def test_what_fine_tuning_saves_is_a_backbone_for_the_next_task(tmp_path):
    """`full` from random weights is pre-training: its file goes back in as weights."""
    config = tiny(method='full', runs=tmp_path, epochs=1, n_train=8)
    train.run(config)
    file = train.folder_of(config) / 'params.pth'
    saved = torch.load(file, weights_only=True)
    model, identity = train.make_model(tiny(weights=file), task_of(n=9))
    assert all(torch.equal(x, saved[name]) for name, x in model.vit.state_dict().items())
    assert identity['backbone'] != train.make_model(config, task_of(n=9))[1]['backbone']


def test_a_run_leaves_its_settings_a_line_an_epoch_the_parameters_and_the_result(tmp_path):
    config = tiny(runs=tmp_path, epochs=3, seed=5, img_size=24)
    result = train.run(config)
    folder = next(tmp_path.glob('where_blue/vit_nano_patch8_48/ivpt,*/seed5'))
    assert {path.name for path in folder.iterdir()} == {
        'checkpoint.pth', 'log.jsonl', 'params.pth', 'predictions.csv', 'result.json'}
    settings = result['settings']
    assert settings == train.as_dict(config) and settings['loop']['epochs'] == 3 and settings['prompts']['k'] == 4
    log = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert [line['epoch'] for line in log] == [1, 2, 3]
    assert all({'loss', 'lr', 'images_per_second'} <= set(line) for line in log)
    assert json.loads((folder / 'result.json').read_text()) == train.signed(result)
    assert train.read_result(folder) == result
    rows = train.from_csv((folder / 'predictions.csv').read_bytes())
    assert len({row['picture'] for row in rows}) == 20 and data.accuracy(rows)['accuracy'] == result['accuracy']
    assert result['final_loss'] == log[-1]['loss'] and result['seconds'] == sum(line['seconds'] for line in log)
    assert (result['task'], result['model'], result['method'], result['seed']) == (
        'where_blue', 'vit_nano_patch8_48', 'ivpt', 5)
    assert result['environment'] == {
        'torch': str(torch.__version__), 'torchvision': torchvision.__version__, 'threads': torch.get_num_threads(),
        'device': train.find_device().type}


def test_a_run_from_the_command_line_ends_with_status_0_and_says_what_it_did(tmp_path, capsys):
    assert run(tmp_path, '--method', 'linear,ivpt', '--seed', '0,1', img_size=24) == 0
    folders = folders_of(tmp_path)
    assert [(folder.parts[-2].split(',')[0], folder.name) for folder in folders] == [
        (method, seed) for method in ('ivpt', 'linear') for seed in ('seed0', 'seed1')]
    out, err = capsys.readouterr()
    assert not err
    backbone = train.read_result(folders[-1])['identity']['backbone']
    for said in ('where_blue: 40 + 10 images', '20 for testing, 9 classes', f'weights random ({backbone})',
                 'at 24 pixels, 0.32M parameters in all', 'P [6, 10, 64]', 'gamma [5, 10, 10]', 'P_re [5, 4, 64]',
                 'mean [0.5, 0.5, 0.5]', 'numbers   float32: as asked for', 'ivpt, seed 1: 0.006M trained'):
        assert said in out
    assert out.count('epoch   2/2') == 4 and out.count('% of 20 images, random weights. ') == 4
    lines = [line for line in out.splitlines() if line.startswith('where_blue  ')]
    assert len(lines) == 4 and all('% ' in line and line.endswith(', random weights') for line in lines)  # the summary


def test_a_live_line_is_for_a_terminal_and_the_next_line_takes_its_place(monkeypatch, capsys):
    for terminal, said in (True, f'\r{"step 1":<79}\r{"done":<79}\n'), (False, 'done\n'):
        monkeypatch.setattr(sys.stdout, 'isatty', lambda terminal=terminal: terminal)
        train.say('step 1', live=True)
        train.say('done')
        assert capsys.readouterr().out == said


@pytest.mark.parametrize('guess', [None, 9.0])
def test_a_loss_above_that_of_a_guess_is_reported_in_the_epoch_in_which_it_shows(guess, tmp_path, monkeypatch, capsys):
    """A guess among C classes has a loss of ln C; a task with a loss of its own says another number.
    It is said the first time, and in the end."""
    load_with(monkeypatch, guess=guess)
    for lr, learned in (0.05, True), (1e6, False):
        how = dict(img_size=24, lr=lr, momentum=0.0, method='linear', epochs=4)
        result = train.run(tiny(runs=tmp_path, **how))
        said = (f'the loss is above that of a guess, {guess or math.log(9):.3g}, and may stay there. '
                f'Lower the learning rate: --set lr={lr / 4:g}')
        assert (result['final_loss'] < (guess or math.log(9))) == learned
        before, last = capsys.readouterr().out.split('epoch   4/4')
        assert (said in last) == (not learned) and (learned or before.count(said) == 1)
