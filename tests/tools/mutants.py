"""Mistakes that one could make, and whether a test notices each. A command, not a test:

    python tests/tools/mutants.py --sample 300 --seed 0    300 at random, out of all that can be made by rule
    python tests/tools/mutants.py --list                   all of them; nothing is run
    python tests/tools/mutants.py --only IVPT.forward      those with these words in their lines of --list
    python tests/tools/mutants.py --text                   those that are listed in mistakes.py

A mutant is a copy of the project with one change in one file. The tests of that file run in it until one is red. For
more than a few mutants all tests run once before, to find out which of them call a function: these come first. What no
test notices is printed at once: it lacks a test, or changes no behaviour and belongs into EQUIVALENT of mistakes.py.
Status 0: there is none.
"""

import argparse
import ast
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from exercise import LEFT_OUT, PROJECT
from mistakes import EQUIVALENT, TEXT

FORKS = multiprocessing.get_context('forkserver')  # a process that has imported what is slow, and forks for each run
FORKS.set_forkserver_preload(['torch', 'torchvision', 'hypothesis', 'pytest'])
SAID = 'said.txt'  # what pytest prints
GREEN = 0, 4, 5  # pytest's statuses; 4: a test is not there any more, 5: all are left out, as slow ones are
FEW = 20  # mutants, for which it is not worth while to find out what each test calls
TIME = 'killed by time'
ENDS = 'killed', TIME, 'survived', 'listed'
EXPERIMENTS = ['tests/experiments/test_*.py']
PROGRAM = ['tests/program/test_*.py', *EXPERIMENTS]
EQUATIONS = ['tests/equations/test_*.py', *PROGRAM]
TESTS = {  # the files that are changed, and the tests that should notice, fast ones first
    'vit.py': EQUATIONS, 'ivpt.py': EQUATIONS, 'train.py': EQUATIONS, 'data.py': PROGRAM,
    'tests/experiments/*.py': EXPERIMENTS}

SWAPS = {  # by kind: an operator, and what takes its place
    'negate': {'==': '!=', '!=': '==', '<': '>=', '>=': '<', '>': '<=', '<=': '>', 'is': 'is not', 'is not': 'is',
               'in': 'not in', 'not in': 'in'},
    'boundary': {'<': '<=', '<=': '<', '>': '>=', '>=': '>'},
    'arithmetic': {'+': '-', '-': '+', '*': '/', '/': '*', '+=': '-=', '-=': '+=', '*=': '/=', '/=': '*='},
    'logic': {'and': 'or', 'or': 'and'}}
OPERATOR = re.compile(r'#.*|is\s+not\b|not\s+in\b|\b(?:is|in|and|or)\b|[-+*/%@<>=!|&^]+')


class Mutant(NamedTuple):
    """A change of a file: `new` in the place of the characters from start to end."""

    file: str
    id: str  # FILE:LINE:COLUMN:KIND
    name: str  # FILE FUNCTION KIND: before -> after; it stays as it is when lines move
    start: int
    end: int
    new: str


# ---- Making them ----------------------------------------------------------------------------------------

def mutant_of(file, text, function, change):
    """The mutant with a change (kind, start, end, new text), shown with its lines. Lines below keep their numbers."""
    kind, start, end, new = change
    first, last = text.rfind('\n', 0, start) + 1, text.find('\n', end)
    parts = text[first:last], text[first:start] + new + text[end:last]
    shown = ' -> '.join(' '.join(part.split())[:120] for part in parts)
    new += '\n' * (text.count('\n', start, end) - new.count('\n'))
    line, column = text.count('\n', 0, start) + 1, start - first + 1
    return Mutant(file, f'{file}:{line}:{column}:{kind}', f'{file} {function} {kind}: {shown}', start, end, new)


def by_hand(file, text):
    """The mutants of a file that TEXT lists. Raises SystemExit if it has not exactly one such place."""
    for right, mistakes in TEXT.get(file, {}).items():
        if text.count(right) != 1:
            raise SystemExit(f'{file} has {right!r} {text.count(right)} times: bring TEXT up to date')
        start = text.index(right)
        for i, wrong in enumerate(mistakes, start=1):
            yield mutant_of(file, text, 'TEXT', (f'mistake-{i}', start, start + len(right), wrong))


def by_rule(file, text):
    """All mutants of the functions of a file, in order."""
    found = [mutant_of(file, text, function, change) for node, function in nodes(spanned(text))
             for change in (*operators(node, text), *arguments(node), *others(node, text))]
    return sorted(found, key=lambda x: (x.start, x.id))


def spanned(text):
    """The tree of a Python file. Its nodes know their text, its start and its end in characters; ast counts bytes."""
    lines, tree = text.encode().splitlines(keepends=True), ast.parse(text)
    starts = [0, *accumulate(len(line.decode()) for line in lines)]
    for node in ast.walk(tree):
        if hasattr(node, 'lineno'):
            node.start = starts[node.lineno - 1] + len(lines[node.lineno - 1][:node.col_offset].decode())
            node.end = starts[node.end_lineno - 1] + len(lines[node.end_lineno - 1][:node.end_col_offset].decode())
            node.text = text[node.start:node.end]
    return tree


def nodes(node, scope=(), inside=False):
    """Yield (node, name of its function) for what stands in functions, but for no annotation, no decorator, and nothing
    in an f-string, where Python 3.11 knows no columns."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        scope, inside = (*scope, node.name), inside or isinstance(node, ast.FunctionDef)
    if inside:
        yield node, '.'.join(scope)
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            left_out = field in ('annotation', 'returns', 'decorator_list') or isinstance(child, ast.JoinedStr)
            if isinstance(child, ast.AST) and not left_out:
                yield from nodes(child, scope, inside)


def operators(node, text):
    """Yield (kind, start, end, new text) for each operator of a comparison, and of an arithmetic or a logical node."""
    sides = {ast.Compare: lambda: [node.left, *node.comparators], ast.BinOp: lambda: [node.left, node.right],
             ast.AugAssign: lambda: [node.target, node.value], ast.BoolOp: lambda: node.values}
    for left, right in pairwise(sides.get(type(node), list)()):
        found = next(x for x in OPERATOR.finditer(text, left.end, right.start) if x[0][0] != '#')
        for kind, swaps in SWAPS.items():
            if new := swaps.get(' '.join(found[0].split())):
                yield kind, *found.span(), new


def arguments(node):
    """The same for the arguments of a call: another one in the place of one, and one less."""
    if isinstance(node, ast.Call):
        given = [x for x in node.args if not isinstance(x, ast.Starred)]
        for x, other in zip(given, given[1:] + given[:1]):
            if x.text != other.text and '\n' not in other.text:
                yield 'argument', x.start, x.end, other.text
        for x in node.keywords:
            following = [other.start for other in (*node.args, *node.keywords) if other.start > x.start]
            yield 'keyword', x.start, min(following, default=node.end - 1), ''


def others(node, text):
    """The same for tests, small numbers, True and False, calls whose result nobody takes, and bodies of functions."""
    tested = [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)) else getattr(node, 'ifs', [])
    for x in tested:
        if not isinstance(x, (ast.Compare, ast.Constant)) and not isinstance(getattr(x, 'op', None), ast.Not):
            yield 'negate', x.start, x.end, f'not ({x.text})'
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield 'not', node.start, node.end, f'({node.operand.text})'
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)) and node.value < 1000:
        x = node.value
        yield 'constant', node.start, node.end, str(not x if isinstance(x, bool) else 0 if x == 1 else x + 1)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield 'statement', node.start, node.end, 'pass'
    if isinstance(node, ast.FunctionDef) and (body := node.body[ast.get_docstring(node) is not None:]):
        decorators = getattr(body[0], 'decorator_list', [])
        start = decorators[0].start - 1 if decorators else body[0].start
        if text[start:body[-1].end] not in ('return None', 'return', 'pass'):
            yield 'return', start, body[-1].end, 'return None'


# ---- Running them ---------------------------------------------------------------------------------------

def sources(root):
    """The files that are changed, by name: the test files of each."""
    def names(pattern):
        return [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]

    return {file: [test for pattern in tests for test in names(pattern)] for changed, tests in TESTS.items()
            for file in names(changed) if not Path(file).name.startswith(('test_', 'conftest', 'common'))}


def first_red(root, tests, limit, mutant=None):
    """The first red test file in a copy of the project; '' if all are green, TIME if they take more seconds than limit.
    A crash without a word counts as the first one's."""
    status, said = run(root, tests, limit, mutant)
    if status is None:
        return TIME
    red = re.search(r'^(?:FAILED|ERROR) ([^\s:]+)', said, re.MULTILINE)
    return '' if status in GREEN else red[1] if red else tests[0]


def run(root, tests, limit=None, mutant=None, calls=False):
    """Run tests in a copy of the project: pytest's status, None after `limit` seconds, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(root, Path(folder, 'project'), ignore=LEFT_OUT)
        if mutant:
            text = (copy / mutant.file).read_bytes().decode()
            (copy / mutant.file).write_bytes((text[:mutant.start] + mutant.new + text[mutant.end:]).encode())
        process = FORKS.Process(target=run_pytest, args=(copy, tests, calls))
        process.start()
        process.join(limit)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests started
            process.kill()
            process.join()
            return None, ''
        return process.exitcode, Path(folder, SAID).read_text(errors='replace')


def run_pytest(copy, tests, calls):
    """In a process of its own: run tests in a copy of the project, and exit with pytest's status. With `calls`, the
    last line that is printed says what they called."""
    os.setsid()
    os.chdir(copy)
    os.environ['TMPDIR'] = tempfile.tempdir = str(copy.parent)
    out = os.open(copy.parent / SAID, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path[:] = [str(copy), *(x for x in sys.path if not Path(x).is_relative_to(PROJECT))]
    plugin = Calls()
    argv = ['-x', '-q', '-p', 'no:cacheprovider', '--tb=no', '--rootdir=.', *tests]
    status = pytest.main(argv, [plugin] if calls else [])
    if calls:
        print(json.dumps(plugin.found), flush=True)
    sys.exit(status)


class Calls:
    """A plugin of pytest: the tests that call a function, and the seconds that each takes."""

    def __init__(self):
        self.found = defaultdict(dict)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        codes, start = set(), time.perf_counter()
        for module in threading, sys:
            module.setprofile(lambda frame, event, argument: codes.add(frame.f_code))
        yield
        for module in threading, sys:
            module.setprofile(None)
        for code in codes:
            if code.co_filename.startswith(f'{os.getcwd()}/'):
                function = f'{os.path.relpath(code.co_filename)}:{code.co_firstlineno}'
                self.found[function][item.nodeid] = time.perf_counter() - start


def callers(root, tests, pool):
    """The tests that call a function, with their seconds, by FILE:LINE. Raises SystemExit for a test that is red."""
    found = defaultdict(dict)
    for test, (status, said) in zip(tests, pool.map(lambda test: run(root, [test], calls=True), tests)):
        if status not in GREEN:
            raise SystemExit(f'{test} is red without a mutant')
        for function, seconds in json.loads(said.splitlines()[-1]).items():
            found[function] |= seconds
    return found


def function_of(root, mutant):
    """FILE:LINE of the innermost function that a mutant changes; the line is that of its first decorator."""
    text = (root / mutant.file).read_bytes().decode()
    line = text.count('\n', 0, mutant.start) + 1
    starts = [min(x.lineno for x in (node, *node.decorator_list)) for node in ast.walk(ast.parse(text))
              if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno]
    return f'{mutant.file}:{max(starts, default=0)}'


def outcome(root, mutant, tests, calls, limit, green):
    """How a mutant ended; what no red test ended is printed at once. tests: the files that should notice it, after
    those that call its function, the fastest first, for a minute. green: f(file) -> whether it is, without a mutant."""
    if mutant.name in EQUIVALENT:
        return 'listed'
    fast = sorted(calls.get(function_of(root, mutant), {}).items(), key=lambda x: x[1])
    totals = accumulate(seconds for _, seconds in fast)
    fast = [test for (test, _), total in zip(fast, totals) if total < 60]
    red = fast and first_red(root, fast, limit, mutant) or first_red(root, tests, limit, mutant)
    if red in ('', TIME):
        print(f'{red or "survived"}  {mutant.id}  {mutant.name}', flush=True)
        return red or 'survived'
    if not green(red):
        raise SystemExit(f'{red} is red without a mutant')
    return 'killed'


def main(argv=None, root=PROJECT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--text', action='store_true', help='the mutants of TEXT, not those that are made by rule')
    parser.add_argument('--only', default='', help='those with this text in their lines of --list')
    parser.add_argument('--sample', type=int, help='so many of them, at random')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--list', action='store_true', help='print them, run nothing')
    parser.add_argument('--limit', type=float, default=900, help='seconds for all tests of a mutant')
    args = parser.parse_args(argv)
    tests, make = sources(root), by_hand if args.text else by_rule
    chosen = [x for file in tests for x in make(file, (root / file).read_bytes().decode())
              if args.only in f'{x.id}  {x.name}']
    if args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        print(*(f'{x.id}  {x.name}' for x in chosen), sep='\n')
        return 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        copy = shutil.copytree(root, Path(folder, 'project'), ignore=LEFT_OUT)  # the project may be worked on meanwhile
        files = dict.fromkeys(test for x in chosen for test in tests[x.file])
        calls = callers(copy, files, pool) if len(chosen) > FEW else {}
        green = lru_cache(None)(lambda test: bool(calls) or not first_red(copy, [test], args.limit))
        ends = pool.map(lambda x: outcome(copy, x, tests[x.file], calls, args.limit, green), chosen)
        ended = Counter()
        for i, (mutant, end) in enumerate(zip(chosen, ends), start=1):
            ended[mutant.file, end] += 1
            print(f'{i} of {len(chosen)}: {dict(Counter(end for _, end in ended.elements()))}', file=sys.stderr)
    for file in sorted({file for file, _ in ended}) + ['all']:
        counts = {how: sum(n for (x, end), n in ended.items() if end == how and file in (x, 'all')) for how in ENDS}
        print(f'{file:30}', *(f'{n:6} {how}' for how, n in counts.items()))
    return int('survived' in (how for _, how in ended))


if __name__ == '__main__':
    sys.exit(main())
