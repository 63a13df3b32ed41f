"""What a run computes on, and in which number format."""

import pytest
import torch
import torch.nn.functional as F
from pictures import load_with, tiny

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


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_a_run_has_and_prints_the_format_that_is_asked_for_and_goes_on_in_no_other(
        precision, tmp_path, capsys, monkeypatch):
    seen, scored = set(), set()

    def answers(model, pictures, *how):
        scored.add(model(next(data.batches(pictures, *how))[0]).dtype)
        return data.answers(model, pictures, *how)
    load_with(monkeypatch, answers=answers,
              loss=lambda logits, labels: seen.add(logits.dtype) or F.cross_entropy(logits, labels))
    result = train.run(tiny(runs=tmp_path, precision=precision, **SMALL))
    assert seen == scored == {getattr(torch, precision)} and result['identity']['precision'] == precision
    assert f'numbers   {precision}: as asked for' in capsys.readouterr().out
    folder, = tmp_path.rglob('seed0')
    auto = tiny(runs=tmp_path, precision='auto', **SMALL)  # float32 for a nano ViT on any CPU
    folder.parent.rename(train.folder_of(auto).parent)
    if precision != 'float32':
        with pytest.raises(train.InputError, match=f"precision '{precision}' -> 'float32'"):
            train.run(auto)


def test_an_interrupted_float16_run_ends_as_an_uninterrupted_one_and_its_scaler_too(tmp_path, monkeypatch):
    """Its scale is halved where a gradient is infinite, here in the second step, and is part of the checkpoint."""
    steps = iter([*range(8), *range(4), None, *range(4, 8)])  # of a whole run, and of one that is stopped on the way

    def loss(logits, labels):
        if (step := next(steps)) is None:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, labels) * (1e30 if step == 1 else 1)  # scaled, its gradient is infinite
    load_with(monkeypatch, loss=loss)
    whole, parts = (tiny(runs=tmp_path / name, method='linear', precision='float16', **SMALL) for name in 'ab')
    expected = train.run(whole)
    with pytest.raises(KeyboardInterrupt):
        train.run(parts)
    assert train.run(parts)['params_digest'] == expected['params_digest']
    scalers = [torch.load(train.folder_of(settings) / 'checkpoint.pth', weights_only=True)['scaler']
               for settings in (whole, parts)]
    assert scalers[0] == scalers[1] and scalers[0]['scale'] == 2.0 ** 15  # it starts with 2^16


def test_auto_is_the_accelerator_of_this_process_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.find_device() == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert train.find_device().type == 'meta' and train.find_device('cpu') == CPU
