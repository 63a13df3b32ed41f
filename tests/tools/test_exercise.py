"""The exercises: each has tests that fail while it is not solved, with wrong answers too, and pass when it is."""

import ast
import re
import shlex

import exercise
import pytest
import sweep
import torch
import train
from exercise import EXERCISES, PARTS, PROJECT, main
from mutants import by_hand, by_rule, spanned


def wrong(number):
    """One or two wrong answers to an exercise: its file's text with a mistake of mistakes.py, or one made by rule."""
    file, functions = EXERCISES[number].file, EXERCISES[number].functions
    text = (PROJECT / file).read_text(encoding='utf-8')
    asked = [exercise.find(spanned(text), name, file) for name in functions]

    def inside(mutants):
        return [x for x in mutants if any(node.start <= x.start and x.end <= node.end for node in asked)]
    found = inside(by_hand(file, text)) or inside(by_rule(file, text))
    return [text[:x.start] + x.new + text[x.end:] for x in found[:2]]


def answer(folder, number, body):
    """Write a body into the one function of an exercise."""
    file, (name,), *_ = EXERCISES[number][1:]
    text = (folder / file).read_text(encoding='utf-8')
    (folder / file).write_text(exercise.with_body(text, name, body, file), encoding='utf-8')


def checked(folder, capsys):
    """The status of `check`, and what it printed."""
    capsys.readouterr()
    return main(['check', str(folder)]), capsys.readouterr().out


# ---- The tests of an exercise ---------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('number', EXERCISES)
def test_each_exercise_fails_when_blank_and_with_wrong_answers_and_passes_when_solved(number, tmp_path, capsys):
    folder, file = tmp_path / 'copy', EXERCISES[number].file
    assert main([str(number), str(folder)]) == 0
    status, said = checked(folder, capsys)
    assert status == 1 and 'is not written yet' in said
    for text in wrong(number):
        (folder / file).write_text(text, encoding='utf-8')
        status, said = checked(folder, capsys)
        assert status == 1 and 'FALSE: ' in said, said
    (folder / file).write_bytes((PROJECT / file).read_bytes())
    status, said = checked(folder, capsys)
    assert status == 0 and re.search(r': right\. All [1-9]\d* sentences are true\.', said), said


def test_a_wrong_answer_is_shown_by_the_false_sentence_the_smallest_case_and_a_command(tmp_path, capsys, monkeypatch):
    """Vanilla CDC for CDC: they differ from the third layer on, and the case has three. The command can be given
    anywhere, and for a folder with a space in its name: in the project the same test passes."""
    one, test = EXERCISES[3], 'test_cdc_adds_the_previous_layers_prompts_and_the_first_layers_are_its_own'
    monkeypatch.setitem(EXERCISES, 3, one._replace(tests=(*one.tests, '-k', test)))
    monkeypatch.chdir(tmp_path)
    assert main(['3', 'a copy']) == 0
    answer(tmp_path / 'a copy', 3, 'return P.cumsum(dim=0)')
    status, said = checked('a copy', capsys)
    assert status == 1 and ': not yet. True sentences: 0. False sentences: 1.\n' in said
    assert 'FALSE: cdc adds the previous layers prompts and the first layers are its own\n' in said
    assert 'P̂^l = P^l + P^{l-1}' in said
    assert 'smallest case  B=1, L=3, N=1, M=1, N_h=1, d=3, k=1, C=1, seed=0\n' in said
    assert f"cd '{tmp_path}/a copy' && python -m pytest {one.tests[0]} -k {test}\n" in said


@pytest.mark.parametrize('passed, trouble, words', [
    (0, 'E', 'the tests could not be run. E'), (3, 'E', 'could not be run. E'), (0, '', 'could not be run.')])
def test_an_exercise_whose_tests_did_not_run_is_not_right(passed, trouble, words, tmp_path, capsys, monkeypatch):
    assert main(['11', str(tmp_path / 'copy')]) == 0
    monkeypatch.setattr(exercise, 'run_tests', lambda *args: (passed, [], trouble))
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and words in said


@pytest.mark.slow
@pytest.mark.parametrize('body, behind, words', [
    ('while True:\n    pass', '', 'the tests could not be run. After 20 seconds they still ran'),
    ('import os\nos._exit(3)', '', 'the tests could not be run.'),
    ('return schedule(step, steps, warmup)', '', 'what was seen  RecursionError'),
    ('return 1', 'CONSTANT = undefined', "could not be run. NameError: name 'undefined' is not defined"),
])
def test_an_answer_that_never_ends_or_ends_everything_or_cannot_be_imported_is_reported(
        body, behind, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exercise, 'LIMIT', 20 if 'while' in body else exercise.LIMIT)
    assert main(['11', str(tmp_path / 'copy')]) == 0
    answer(tmp_path / 'copy', 11, body)
    with open(tmp_path / 'copy/train.py', 'a') as file:
        file.write(f'\n{behind}\n')
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and words in said, said


# ---- The copy -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('one', EXERCISES.values(), ids=lambda one: one.title)
def test_only_the_body_of_a_function_is_removed_and_nothing_else_of_its_file(one):
    """In all exercises, and so all their functions are there."""
    source, copy = (PROJECT / one.file).read_text(encoding='utf-8'), exercise.blank(one)
    for name in one.functions:
        whole, blank = (exercise.find(ast.parse(text), name, one.file) for text in (source, copy))
        assert [ast.unparse(statement) for statement in blank.body[1:]] == ['raise NotImplementedError']
        body = source.split('\n')[whole.body[0].end_lineno:whole.end_lineno]
        copy = exercise.with_body(copy, name, '\n'.join(body), one.file)
    assert copy == source


def test_a_copy_has_what_is_needed_and_says_what_to_do(tmp_path, capsys):
    assert main(['4', str(tmp_path / 'new' / 'copy')]) == 0
    assert 'Write cdc_da and psi in ivpt.py.' in capsys.readouterr().out
    copy = {path.relative_to(tmp_path / 'new/copy').as_posix() for path in (tmp_path / 'new/copy').rglob('*')}
    assert {'ivpt.py', 'configs.yaml', 'tests/experiments/nano.pth', 'tests/conftest.py', 'EXERCISE.txt'} <= copy
    assert not any(re.search(r'^runs|^data/|__pycache__|(^|/)\.', name) for name in copy)


# ---- The list -------------------------------------------------------------------------------------------


QUESTIONS = [question for *_, questions in PARTS for question in questions]


def test_the_list_follows_the_paper_and_has_questions_after_each_part_with_their_time_and_what_to_look_for(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    places = [said.index(f'{number:2d}  {exercise.title}') for number, exercise in EXERCISES.items()]
    assert places == sorted(places)
    sections = [heading.split()[0] for heading, _, _ in PARTS]
    equations = [int(found[1]) for one in EXERCISES.values() if (found := re.match(r'Eq\. (\d+)', one.title))]
    assert sections == sorted(sections) and equations == sorted(equations) == [2, 4, 5, 7, 8, 11, 14, 15]
    said = ' '.join(said.split())
    for question in QUESTIONS:
        assert re.fullmatch(r'\d+ minutes|half an hour', question.time)
        assert f'{question.asks} ({question.time})' in said and f'Look for: {question.look_for}' in said


@pytest.mark.parametrize('one', [one for one in QUESTIONS if any(' -c ' in command for command in one.commands)],
                         ids=lambda one: one.asks)
def test_what_a_question_prints_of_a_run_is_of_its_own_run_and_short(one, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs, code = (shlex.split(command)[2:] for command in one.commands)
    args = train.parser('').parse_args(runs)
    folder = train.folder_of(*train.runs_of(args, train.read_configs()))
    folder.mkdir(parents=True)
    torch.save({'gamma': 2 * torch.eye(10).repeat(5, 1, 1)}, folder / 'params.pth')
    exec(code[0], {})
    assert re.fullmatch('2.0\n|' + ''.join(f'into layer {l}: 3.16\n' for l in range(1, 6)), capsys.readouterr().out)


COMMANDS = [command for question in QUESTIONS for command in question.commands]
PROGRAMS = {'train.py': train, 'tests/experiments/sweep.py': sweep}


@pytest.mark.parametrize('command', [command for command in COMMANDS if command.split()[1] in PROGRAMS])
def test_every_question_can_be_asked_and_chooses_settings_on_validation_pictures(command, monkeypatch, tmp_path):
    """Its commands are what train.py and sweep.py understand. No best value is looked for on the test pictures."""
    done = []

    def run(settings, *args):
        done.append(settings)
        raise train.InputError('enough')
    monkeypatch.setattr(train, 'run', run)
    _, program, *argv = command.split()
    monkeypatch.chdir(tmp_path)
    assert PROGRAMS[program].main(argv) == 2 and done
    assert done[0].loop.score_on == 'val' or '--over' not in argv


# ---- Bad input ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv, words', [
    (['0', 'DIR/new'], "no exercise '0': they count from 1 to 11"),
    (['12', 'DIR/new'], "no exercise '12'"),
    (['one', 'DIR/new'], "no exercise 'one'"),
    (['1', 'DIR/full'], 'full is there and not an empty folder'),
    (['1', 'DIR/full/file'], 'file is there and not an empty folder'),
    (['1', 'DIR/full/file/new'], 'file'),
    (['1', str(PROJECT / 'tests/new')], 'is inside the project'),
    (['check', 'DIR/full'], 'full is not a copy for an exercise'),
    (['check', 'DIR/nowhere'], 'nowhere is not a copy for an exercise'),
    (['check', 'DIR/odd'], 'odd is not a copy for an exercise'),
    (['1'], 'NUMBER DIR'),
    (['check', 'DIR/full', 'more'], 'NUMBER DIR'),
])
def test_bad_input_is_refused_with_one_line_and_status_2_and_changes_nothing(argv, words, tmp_path, capsys):
    for name, content in (('full/file', 'mine'), ('odd/EXERCISE.txt', '99')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob('*'))
    assert main([x.replace('DIR', str(tmp_path)) for x in argv]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count('\n') == 1 and not out
    assert sorted(tmp_path.rglob('*')) == before and (tmp_path / 'full/file').read_text() == 'mine'


def test_a_function_that_is_no_longer_there_is_refused_with_one_line(tmp_path, capsys, monkeypatch):
    """In the project, and in a copy whose function was renamed."""
    assert main(['3', str(tmp_path / 'old')]) == 0
    (tmp_path / 'old/ivpt.py').write_text('def other():\n    pass\n')
    assert main(['check', str(tmp_path / 'old')]) == 2
    monkeypatch.setitem(EXERCISES, 3, EXERCISES[3]._replace(functions=('Class.gone',)))
    assert main(['3', str(tmp_path / 'new')]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and 'ivpt.py has no cdc:' in lines[0] and 'ivpt.py has no Class.gone:' in lines[1]
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('content, words', [
    (b'x = 1\ndef cdc(P)\n', 'line 2'), (b'\xff = 1\n', 'decode'), (b'x = 1\0\n', 'null bytes')])
def test_what_is_not_python_is_reported_in_one_line(content, words, tmp_path, capsys):
    assert main(['3', str(tmp_path / 'copy')]) == 0
    (tmp_path / 'copy/ivpt.py').write_bytes(content)
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and re.fullmatch(f'This is not Python yet: .*{words}.*\n', said), said


def test_a_copy_of_a_copy_is_refused(tmp_path, capsys, monkeypatch):
    """It would lack two bodies, and tell of one."""
    assert main(['1', str(tmp_path / 'copy')]) == 0
    monkeypatch.setattr(exercise, 'PROJECT', tmp_path / 'copy')
    assert main(['2', str(tmp_path / 'again')]) == 2
    assert 'copy is the copy of an exercise' in capsys.readouterr().err
