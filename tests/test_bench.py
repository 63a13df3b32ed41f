"""The command that measures still runs: what it prints is of no interest here, its timings least of all."""

import sys

import pytest

import bench


@pytest.mark.parametrize('argv, said', [
    (['--model', 'vit_nano_patch8_16', '--batch', '2', '--k', '2', '--prompts', '3', '--rounds', '1'], '| iVPT 3 |'),
    (['--loop', 'where_blue', '--rounds', '1', '--set', 'n_train=30', 'n_val=10', 'n_test=10', 'batch=8'], 'images/s in the loop'),
])
def test_the_bench_runs(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *argv])
    monkeypatch.setattr(bench, 'peak_memory', lambda variant, args: 1)  # each in a process of its own
    bench.main()
    assert said in capsys.readouterr().out
