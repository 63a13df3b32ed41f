"""What a run computes on, and in which number format."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pictures import tiny

import data
import train

CPU = torch.device('cpu')
SMALL = dict(img_size=24, epochs=2, k=2)


@pytest.mark.parametrize('bfloat16, capability, expected', [
    (True, (8, 0), 'bfloat16'), (True, (9, 0), 'bfloat16'),  # A100, H100
    (False, (7, 5), 'float16'), (False, (7, 0), 'float16'),  # T4 and 2080 Ti, V100
    (False, (6, 1), 'float32'), (False, (7, 2), 'float32')])  # no tensor cores; and a chip that nobody here knows
def test_on_a_gpu_auto_is_the_fastest_format_that_it_has_in_hardware(bfloat16, capability, expected, monkeypatch):
    def supported(including_emulation):
        assert not including_emulation
        return bfloat16
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert train.number_format('auto', torch.device('cuda'), 768)[0] == expected


@pytest.mark.parametrize('has', [{}, {'avx512_bf16': True}, {'amx_bf16': True}, {'avx512_bf16': False}])
@pytest.mark.parametrize('D, wide', [(64, False), (191, False), (192, True), (768, True)])
def test_on_a_cpu_auto_is_bfloat16_where_it_has_instructions_for_it_and_the_model_is_wide(has, D, wide, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    assert train.number_format('auto', CPU, D)[0] == ('bfloat16' if wide and any(has.values()) else 'float32')


@pytest.fixture
def with_loss(monkeypatch):
    """Runs have another loss: a function of logits and labels."""
    def use(loss, **more):
        monkeypatch.setattr(data, 'load', lambda settings, load=data.load: replace(load(settings), loss=loss, **more))
    return use


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_a_run_is_in_the_format_that_is_asked_for_and_says_so_and_goes_on_in_no_other(
        precision, tmp_path, capsys, with_loss):
    seen, scored = set(), set()

    def answers(model, pictures, *how):
        scored.add(model(next(data.batches(pictures, *how))[0]).dtype)
        return data.answers(model, pictures, *how)
    with_loss(lambda logits, labels: seen.add(logits.dtype) or F.cross_entropy(logits, labels), answers=answers)
    result = train.run(tiny(runs=tmp_path, precision=precision, **SMALL))
    assert seen == scored == {getattr(torch, precision)} and result['identity']['precision'] == precision
    assert f'numbers   {precision}: as asked for' in capsys.readouterr().out
    folder, = tmp_path.rglob('seed0')
    auto = tiny(runs=tmp_path, precision='auto', **SMALL)  # float32 for a nano ViT on any CPU
    folder.parent.rename(train.folder_of(auto).parent)
    if precision != 'float32':
        with pytest.raises(train.InputError, match=f"precision '{precision}' -> 'float32'"):
            train.run(auto)


def test_an_interrupted_float16_run_ends_as_an_uninterrupted_one_and_its_scaler_too(tmp_path, monkeypatch, with_loss):
    """Its scale is halved where a gradient is infinite, here in the second step, and is part of the checkpoint."""
    steps = []

    def loss(logits, labels):
        steps.append(1)
        return F.cross_entropy(logits, labels) * (1e30 if len(steps) == 2 else 1)  # scaled, its gradient is infinite
    with_loss(loss)
    how = dict(method='linear', precision='float16', **SMALL)
    whole, parts = (tiny(runs=tmp_path / name, **how) for name in ('whole', 'parts'))
    expected = train.run(whole)
    steps.clear()

    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'train', stopped)
        train.run(parts)
    kept = torch.load(train.folder_of(parts) / 'checkpoint.pth', weights_only=True)
    assert kept['scaler']['scale'] == 2.0 ** 15  # it starts with 2^16
    result = train.run(parts)
    assert result['params_digest'] == expected['params_digest'] and result['final_loss'] == expected['final_loss']


def test_auto_is_the_accelerator_of_this_process_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.find_device() == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert train.find_device().type == 'meta' and train.find_device('cpu') == CPU
