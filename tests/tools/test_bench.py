"""The command that measures still runs: what it prints is of no interest here, its timings least of all."""

import sys
from argparse import Namespace

import bench
import pytest

SYSTEMS = [name for name, entry in bench.CONFIGS['methods'].items()
           if 'table_1.py' in str(entry.get('tune'))] + ['dam_vp']
SMALL = ['--model', 'vit_nano_patch8_16', '--batch', '2', '--k', '2', '--rounds', '1']


@pytest.mark.parametrize('argv, said', [
    ([*SMALL, '--prompts', '3', '--precision', 'float32,auto,bfloat16'], '| iVPT 3 | bfloat16 |'),
    ([*SMALL, '--variants', ','.join(SYSTEMS)], '| dam_vp | float32 |'),
    (['--loop', 'where_blue', '--rounds', '1', '--set', 'n_train=30', 'n_val=10', 'n_test=10', 'batch=8'],
     'images/s in the loop')])
def test_the_bench_runs(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *argv])
    monkeypatch.setattr(bench, 'peak_memory', lambda variant, precision, args: 1)  # each in a process of its own
    bench.main()
    assert said in capsys.readouterr().out


@pytest.fixture
def args():
    return Namespace(model='vit_nano_patch8_16', batch=2, k=2, device='cpu', rounds=3)


def test_a_method_of_configs_yaml_is_prepared_and_its_steps_are_those_of_training(args):
    model, (images, labels) = bench.build('sct', args), bench.batch(args)
    assert all((layer.between.I >= 0).all() for layer in model.vit.blocks)
    before = {name: x.clone() for name, x in model.named_parameters()}
    bench.infer(model, images, labels, 'float32')
    assert not model.training
    bench.step(model, images, labels, 'float32')
    assert model.training
    assert all(p.requires_grad != p.equal(before[name]) for name, p in model.named_parameters())
    assert bench.multiply_adds(model, args)[0] > bench.multiply_adds(model, args)[1]  # attention is no linear map


def test_each_variant_in_each_format_has_the_ratios_to_the_plain_vit_in_its_format_and_in_float32(args):
    rows = bench.timings(['plain', 'VPT 3'], ['float32', 'bfloat16'], args)
    assert [(row['variant'], row['precision']) for row in rows] == [
        (name, precision) for precision in ('float32', 'bfloat16') for name in ('plain', 'VPT 3')]
    for row in rows:
        assert row['variant'] != 'plain' or row['training'] == row['inference'] == 1
        for kind in 'training', 'inference':
            to_float32 = row[f'{kind}_to_float32_plain']
            assert to_float32 > 0
            assert row['precision'] != 'float32' or to_float32 == pytest.approx(row[kind])
