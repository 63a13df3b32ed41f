"""The mutants: what is changed and what is not, and that one which a test notices is told from one which none does."""

import ast
import random
from concurrent.futures import ThreadPoolExecutor

import mutants
import pytest
from mistakes import EQUIVALENT
from mutants import PROJECT, by_hand, by_rule, main, sources

PARTS = '''
import functools

SIZE = 1


@functools.cache(1)
class Ä:
    size: int = 1


@functools.lru_cache(1)
def f(x: list[1] = 'P̂', *rest) -> tuple[1, 2]:
    """1 < 2 and not 3."""
    BODY
'''
CHANGES = [  # a line of a function, the kind, and all that it becomes
    ('return a == b', 'negate', ['return a != b']),
    ('return a is not b', 'negate', ['return a is b']),
    ('return 0 <= a < b', 'boundary', ['return 0 < a < b', 'return 0 <= a <= b']),
    ('return 0 <= a < b', 'negate', ['return 0 > a < b', 'return 0 <= a >= b']),
    ('return 1 if a else [x for x in b if x]', 'negate', ['return 1 if not (a) else [x for x in b if x]',
                                                          'return 1 if a else [x for x in b if not (x)]']),
    ('assert not a', 'not', ['assert (a)']),
    ('assert not a', 'negate', []),
    ('P̂ = (a) + b * c', 'arithmetic', ['P̂ = (a) - b * c', 'P̂ = (a) + b / c']),
    ('a -= b // c', 'arithmetic', ['a += b // c']),
    ('return a and b or c', 'logic', ['return a or b or c', 'return a and b and c']),
    ('a = 0, 1, -2, 0.5, True, 5000, None, "1"', 'constant', [
        'a = 1, 1, -2, 0.5, True, 5000, None, "1"', 'a = 0, 0, -2, 0.5, True, 5000, None, "1"',
        'a = 0, 1, -3, 0.5, True, 5000, None, "1"', 'a = 0, 1, -2, 1.5, True, 5000, None, "1"',
        'a = 0, 1, -2, 0.5, False, 5000, None, "1"']),
    ('x: tuple[1, 2] = f"{a + 1}"', 'constant', []),
    ('x: tuple[1, 2] = f"{a + 1}"', 'arithmetic', []),
    ('f(a, (b), *c)', 'argument', ['f(b, (b), *c)', 'f(a, (a), *c)']),
    ('f(a, x=(1), *b, **c)', 'keyword', ['f(a, *b, **c)', 'f(a, x=(1), *b, )']),
    ('f(x=1,)', 'keyword', ['f()']),
    ('f(a).g(b)', 'statement', ['pass']),
    ('a = f(a)', 'statement', []),
    ('yield a', 'return', ['return None']),
    ('return', 'return', []),
]


def mutated(text, mutant):
    """The text of a file with a mutant in it."""
    return text[:mutant.start] + mutant.new + text[mutant.end:]


@pytest.mark.parametrize('line, kind, changed', CHANGES)
def test_each_kind_changes_one_place_of_a_body_and_nothing_else(line, kind, changed):
    text = PARTS.replace('BODY', line)
    found = by_rule('f.py', text)
    assert [mutated(text, x) for x in found if x.id.endswith(f':{kind}')] == [PARTS.replace('BODY', x) for x in changed]
    assert all(x.id.startswith('f.py:15:') for x in found)


def test_a_change_of_several_lines_leaves_the_lines_below_where_they_are():
    text = 'def f():\n    @g(1,\n       2)\n    def h():\n        return f(\n           a, b=1,\n           c=2)\n\n\n'
    text += 'f()\n'
    for mutant in by_rule('f.py', text):
        assert mutated(text, mutant).splitlines()[9] == 'f()'
        assert ast.dump(ast.parse(mutated(text, mutant))) != ast.dump(ast.parse(text))


def test_a_mutant_says_where_it_is_and_keeps_its_name_when_lines_move():
    text = 'class A:\n    def f(self):\n        return "P̂", self < 1\n'
    (old, *_), (new, *_) = ([x for x in by_rule('f.py', s) if 'boundary' in x.id] for s in (text, '\n\n' + text))
    assert (old.id, new.id) == ('f.py:3:27:boundary', 'f.py:5:27:boundary')
    assert old.name == new.name == 'f.py A.f boundary: return "P̂", self < 1 -> return "P̂", self <= 1'


def test_the_mutants_of_this_project_compile_and_have_ids_of_their_own():
    """Each mistake of TEXT is of a place that is there once."""
    texts = {file: (PROJECT / file).read_bytes().decode() for file in sources(PROJECT)}
    found = [x for file, text in texts.items() for make in (by_rule, by_hand) for x in make(file, text)]
    assert {'vit.py', 'ivpt.py', 'data.py', 'train.py'} <= {x.file for x in found}
    assert not any('test_' in file for file in texts)
    assert len({x.id for x in found}) == len(found)
    assert all(x.new != texts[x.file][x.start:x.end] for x in found)
    for mutant in random.Random(0).sample(found, 20):
        ast.parse(mutated(texts[mutant.file], mutant))
    assert EQUIVALENT.keys() <= {x.name for x in found}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a file of two functions, one of which is tested."""
    monkeypatch.setenv('PYTEST_DISABLE_PLUGIN_AUTOLOAD', '1')  # Hypothesis takes most of the time that pytest takes
    (tmp_path / 'tests/equations').mkdir(parents=True)
    (tmp_path / 'tests/equations/test_it.py').write_text('import ivpt\n\n\ndef test_it():\n    assert ivpt.f(2) == 3\n')
    (tmp_path / 'ivpt.py').write_text('def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x > 2 * 1.0\n')
    return tmp_path


@pytest.mark.parametrize('few', [20, 0])
@pytest.mark.parametrize('argv, found', [  # found: the status, how the output begins, and its last line
    ('--only arithmetic', (0, '', 'all 1 killed 0 killed by time 0 survived 1 listed')),
    ('--only boundary', (1, 'survived  ivpt.py:6:14:boundary  ivpt.py g boundary: return x > 2 * 1.0 -> '
                         'return x >= 2 * 1.0\n', 'all 0 killed 0 killed by time 1 survived 0 listed')),
    ('--only boundary --limit 0.01', (0, 'killed by time  ivpt.py:6:14:boundary',
                                      'all 0 killed 1 killed by time 0 survived 0 listed'))])
def test_mutants_are_counted_by_how_they_ended_and_printed_if_no_test_ended_them(
        argv, found, few, project, monkeypatch, capsys):
    """What is listed is not run, and the project itself stays as it is. Of more than a few, it is recorded before which
    tests call their functions."""
    monkeypatch.setattr(mutants, 'FEW', few)
    name = 'ivpt.py g arithmetic: return x > 2 * 1.0 -> return x > 2 / 1.0'
    monkeypatch.setattr(mutants, 'EQUIVALENT', {name: 'division by 1'})
    before, (status, first, last) = (project / 'ivpt.py').read_text(), found
    assert main(argv.split(), project) == status
    said = capsys.readouterr().out
    assert said.startswith(first) and said.splitlines()[-1].split() == last.split()
    assert (project / 'ivpt.py').read_text() == before


@pytest.mark.parametrize('few', [20, 0])
def test_a_test_that_is_red_anyway_kills_nothing(few, project, monkeypatch):
    monkeypatch.setattr(mutants, 'FEW', few)
    (project / 'tests/equations/test_it.py').write_text('def test_it():\n    assert False\n')
    with pytest.raises(SystemExit, match='tests/equations/test_it.py is red without a mutant'):
        main(['--only', 'boundary'], project)


def test_tests_that_call_the_function_of_a_mutant_run_first(project):
    slow = 'import time\n\nimport ivpt\n\n\ndef test_slow():\n    time.sleep(0.2)\n    ivpt.f(2)\n'
    (project / 'tests/equations/test_slow.py').write_text(slow + '\n\ndef test_other():\n    pass\n')
    with ThreadPoolExecutor(2) as pool:
        calls = mutants.callers(project, [f'tests/equations/test_{x}.py' for x in ('slow', 'it')], pool)
    mutant = by_rule('ivpt.py', (project / 'ivpt.py').read_text())[0]
    assert mutants.function_of(project, mutant) == 'ivpt.py:1'
    assert sorted(calls['ivpt.py:1'], key=calls['ivpt.py:1'].get) == [
        'tests/equations/test_it.py::test_it', 'tests/equations/test_slow.py::test_slow']


def test_a_sample_is_the_same_for_the_same_seed(project, capsys):
    said = []
    for seed in '0', '0', '1':
        main(['--list', '--sample', '3', '--seed', seed, '--only', 'ivpt.py'], project)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert len(said[0].splitlines()) == 3
