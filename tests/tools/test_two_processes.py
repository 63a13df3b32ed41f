"""conftest.py runs two test files at a time."""

import shutil
import subprocess
import sys
from pathlib import Path

WAITS = '''
import time
from pathlib import Path

def test_two_test_files_run_at_the_same_time():
    end = time.monotonic() + 30
    while not Path('other').exists():
        assert time.monotonic() < end
        time.sleep(0.01)
'''
FAILS = '''
import warnings
from pathlib import Path

def test_one_is_two():
    Path('other').touch()
    print('a word')
    warnings.warn('a warning')
    assert [1] == [2]
'''


def test_two_files_are_run_at_a_time_and_a_red_test_is_reported_with_its_reason(tmp_path):
    (tmp_path / 'test_1.py').write_text(WAITS)
    (tmp_path / 'test_2.py').write_text(FAILS)
    shutil.copy(Path(__file__).parents[1] / 'conftest.py', tmp_path)
    done = subprocess.run([sys.executable, '-m', 'pytest'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and '1 failed, 1 passed, 1 warning' in done.stdout
    assert 'At index 0 diff: 1 != 2' in done.stdout and 'Captured stdout call' in done.stdout
    assert 'UserWarning: a warning' in done.stdout
