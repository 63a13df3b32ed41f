"""Settings of the test suite: where the modules are, and how many cases Hypothesis draws."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path

import pytest
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


# ---- Two files at a time --------------------------------------------------------------------------------

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Run the test files in two processes, each file whole in one of them, and say what they found in pytest's order.
    Pytest runs them itself with -x, --maxfail or --pdb, for a single file, and where a fork is not safe (macOS)."""
    config, options = session.config, session.config.option
    files = [list(items) for _, items in groupby(session.items, lambda item: item.path)]
    alone = options.maxfail or options.usepdb or options.collectonly or session.testsfailed
    if alone or len(files) < 2 or sys.platform != 'linux':
        return None
    with ProcessPoolExecutor(2, multiprocessing.get_context('fork'), Process, [config, files]) as pool:
        for reports, warnings in pool.map(Process.run_file, range(len(files))):
            for report in reports:
                report = config.hook.pytest_report_from_serializable(config=config, data=report)
                config.hook.pytest_runtest_logreport(report=report)
            for warning in warnings:
                config.hook.pytest_warning_recorded.call_historic(kwargs=warning)
    return True


class Process:
    """One of the two processes: pytest reports to it, and prints nothing."""

    def __init__(self, config, files):
        Process.this = self
        self.config, self.files, self.reports, self.warnings = config, files, [], []
        config.pluginmanager.unregister(name='terminalreporter')
        config.pluginmanager.register(self)
        capture = config.pluginmanager.getplugin('capturemanager')
        capture.stop_global_capturing()
        capture.start_global_capturing()  # into files of its own

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        self.warnings.append(dict(warning_message=warning_message, when=when, nodeid=nodeid, location=location))

    @staticmethod
    def run_file(i):
        """Run the tests of the i-th file: their reports, as dicts, and their warnings."""
        this = Process.this
        this.reports, this.warnings = [], []
        try:
            for item, following in pairwise([*this.files[i], None]):
                this.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except KeyboardInterrupt:
            os._exit(130)  # not the next file
        return this.reports, this.warnings
