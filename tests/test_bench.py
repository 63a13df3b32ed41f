"""The command that measures still runs: what it prints is of no interest here, its timings least of all."""

import json
import sys

import pytest

import bench


@pytest.mark.parametrize('argv, said', [
    (['--model', 'vit_nano_patch8_16', '--batch', '2', '--k', '2', '--prompts', '3', '--rounds', '1',
      '--precision', 'float32,auto,bfloat16'], '| iVPT 3 | bfloat16 |'),
    (['--loop', 'where_blue', '--rounds', '1', '--set', 'n_train=30', 'n_val=10', 'n_test=10', 'batch=8'], 'images/s in the loop'),
])
def test_the_bench_runs(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *argv])
    monkeypatch.setattr(bench, 'peak_memory', lambda variant, precision, args: 1)  # each in a process of its own
    bench.main()
    assert said in capsys.readouterr().out


def test_the_json_has_both_ratios_of_each_variant_in_each_format(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--model', 'vit_nano_patch8_16', '--batch', '2', '--k', '2', '--variants', 'VPT 3',
                                      '--rounds', '3', '--precision', 'float32,bfloat16', '--json', str(tmp_path / 'out')])
    monkeypatch.setattr(bench, 'peak_memory', lambda variant, precision, args: 1)
    bench.main()
    rows = json.loads((tmp_path / 'out').read_text())['rows']
    assert [(row['variant'], row['precision']) for row in rows] == [
        (name, precision) for precision in ('float32', 'bfloat16') for name in ('plain', 'VPT 3')]
    for row in rows:
        assert row['variant'] != 'plain' or row['training'] == row['inference'] == 1
        for kind in 'training', 'inference':
            assert row[f'{kind}_to_float32_plain'] > 0 and (row['precision'] != 'float32' or (
                row[f'{kind}_to_float32_plain'] == pytest.approx(row[kind])))
