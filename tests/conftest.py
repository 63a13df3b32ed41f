"""Settings of the test suite: where the modules are, and how many cases Hypothesis draws."""

import os
import signal
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / name) for name in ('equations', 'program', 'experiments', 'tools'))]

# The same cases at every run, so that a red run is red again. A failure prints @reproduce_failure, the way
# to replay it. `HYPOTHESIS_PROFILE=thorough pytest` draws 30 times more, and new ones each time.
common = dict(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile('default', max_examples=30, derandomize=True, **common)
settings.register_profile('thorough', max_examples=1000, **common)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'default'))

torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore


def pytest_configure(config):
    """Tests that take minutes are left out, unless -m asks for them: `pytest -m slow`."""
    config.addinivalue_line('markers', 'slow: takes minutes')
    config.option.markexpr = config.option.markexpr or 'not slow'
