"""The exercises: each has tests that fail while it is not solved, with wrong answers too, and pass when it is."""

import ast
import re

import exercise
import pytest
import sweep
import train
from exercise import EXERCISES, PARTS, PROJECT, main

# Two plausible wrong answers to each exercise: for each of its functions the body, and the sentence that is false.
RIGHT_DA = 'return torch.cat([P[:1], P[1:] + psi(gamma, P[:-1])])'
NAIVE = '''
    x = torch.cat([tokens, *(c.expand(len(tokens), -1, -1) for c in context)], dim=1)
    q, k, v = self.qkv(x).unflatten(-1, (3, self.N_h, -1)).permute(2, 0, 3, 1, 4)  # [B, N_h, T, d]
    T, d, D = tokens.shape[1], q.shape[-1], tokens.shape[2]
    A = (q[:, :, :T] @ k.mT / SCALE).softmax(-1)
    return self.proj((A @ v).transpose(1, 2).flatten(2)), ROW
'''


def naive(scale, row):
    """Attention with prompts as tokens of the sequence; its scale and the row of weights as given."""
    return NAIVE.replace('SCALE', scale).replace('ROW', row)


WRONG = {
    1: [('return P.cumsum(dim=0)',  # vanilla CDC
         'cdc adds the previous layers prompts and the first layers are its own'),
        ('return P + P.roll(1, 0)', 'cdc adds the previous layers prompts and the first layers are its own')],
    2: [(RIGHT_DA, 'return gamma.mT @ P', 'psi is the double sum'),
        ('P_hat = [P[0]]\nfor l in range(1, len(P)):\n    P_hat.append(P[l] + psi(gamma[l - 1], P_hat[-1]))\n'
         'return torch.stack(P_hat)', 'return gamma @ P', 'da adds psi of the previous layers prompts')],
    3: [('return torch.exp((p.unsqueeze(-3) @ W_K.mT @ q.unsqueeze(-1)).squeeze(-1) / p.shape[-1] ** 0.5)',
         'the weight of a prompt is the exponential of its scaled score'),
        ('return ((p.unsqueeze(-3) @ W_K.mT @ q.unsqueeze(-1)).squeeze(-1) / q.shape[-1] ** 0.5).softmax(-1)',
         'the weight of a prompt is the exponential of its scaled score')],
    4: [('return attention_weight(q, W_K, p_previous), attention_weight(q, W_K, p)',
         'alpha is what a previous prompt would weigh'),
        ('return attention_weight(q, W_K, p), attention_weight(q, W_K, p + p_previous)',
         'alpha is what a previous prompt would weigh')],
    5: [('gamma_p = gamma.mT.unsqueeze(-1) * p_previous.unsqueeze(-3)\n'
         'alpha = attention_weight(q, W_K, gamma_p.flatten(-3, -2))\n'
         'return attention_weight(q, W_K, p), alpha.unflatten(-1, gamma.shape[-2:])',
         'alpha is what a previous prompt would weigh'),
        ('return attention_weight(q, W_K, p), gamma * attention_weight(q, W_K, p_previous).unsqueeze(-2)',
         'alpha is what a previous prompt would weigh')],
    6: [('A = matrix(structure, L)\nreturn A.T @ A', 'A A transposed is what its closed form says'),
        ('l = torch.arange(L).double()\nif structure == "vanilla_cdc":\n    return 1 + torch.minimum(l[:, None], l)\n'
         'distance = (l[:, None] - l).abs()\nreturn 1.0 * (distance <= (structure == "cdc")) + torch.eye(L).double()',
         'A A transposed is what its closed form says')],
    7: [('return w.topk(k, dim=-1).indices.sort(dim=-1).values', 'Omega lists the positions'),
        ('return w.argsort(dim=-1)[..., :k]', 'Omega lists the positions')],  # the smallest
    8: [('B, k, D = *Omega.shape, Z.shape[-1]\n'
         'return Z.scatter_(1, Omega.unsqueeze(-1).expand(B, k, D), P_re.expand(B, k, D))',
         'tokens in Omega change by P re'),
        ('B, k, D = *Omega.shape, Z.shape[-1]\n'
         'return Z.scatter_add(1, Omega.unsqueeze(-1).expand(B, k, D), P_re.expand(B, k, D))',
         'tokens in Omega change by P re')],
    9: [(naive('D ** 0.5', 'A[:, :, 0].mean(dim=1).detach()'), 'prompts as context are prompts in the sequence'),
        (naive('d ** 0.5', 'A[:, :, 0].mean(dim=1)'), 'the class tokens weights are its row')],
    10: [('return self.blocks[-1](tokens[:, :1], *context, need_weights=False)[0]', 'what is read of the last layer'),
         ('return self.blocks[-1](tokens, *context, need_weights=False)[0]', 'the last layer asks with what is read')],
    11: [('rising = round(warmup * steps)\nif step < rising:\n    return step / rising\n'
          'return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))',
          'the learning rate rises linearly'),
         ('rising = round(warmup * steps)\nif step < rising:\n    return (step + 1) / rising\n'
          'return 0.5 * (1 + math.cos(math.pi * step / steps))', 'the learning rate rises linearly')],
}


def answer(folder, number, bodies):
    """Write bodies into the functions of an exercise."""
    file, functions = EXERCISES[number].file, EXERCISES[number].functions
    text = (folder / file).read_text(encoding='utf-8')
    for name, body in zip(functions, bodies, strict=True):
        text = exercise.with_body(text, name, body, file)
    (folder / file).write_text(text, encoding='utf-8')


def solve(folder, number):
    file = EXERCISES[number].file
    (folder / file).write_bytes((PROJECT / file).read_bytes())


def checked(folder, capsys):
    """The status of `check`, and what it printed."""
    capsys.readouterr()
    return main(['check', str(folder)]), capsys.readouterr().out


# ---- The tests of an exercise ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('number', EXERCISES)
def test_each_exercise_fails_when_blank_and_with_two_wrong_answers_and_passes_when_solved(number, tmp_path, capsys):
    folder = tmp_path / 'copy'
    assert main([str(number), str(folder)]) == 0
    status, said = checked(folder, capsys)
    assert status == 1 and 'is not written yet' in said
    for *bodies, sentence in WRONG[number]:
        answer(folder, number, bodies)
        status, said = checked(folder, capsys)
        assert status == 1 and f'FALSE: {sentence}' in said, said
    solve(folder, number)
    status, said = checked(folder, capsys)
    assert status == 0 and 'right. All' in said, said


def test_a_wrong_answer_is_told_by_the_false_sentence_and_the_smallest_case(tmp_path, capsys):
    """Vanilla CDC for CDC: they differ from the third layer on, and the case has three."""
    folder = tmp_path / 'copy'
    assert main(['1', str(folder)]) == 0
    answer(folder, 1, ['return P.cumsum(dim=0)'])
    status, said = checked(folder, capsys)
    assert status == 1
    assert 'FALSE: cdc adds the previous layers prompts and the first layers are its own\n' in said
    assert 'P̂^l = P^l + P^{l-1}' in said
    assert 'smallest case  B=1, L=3, N=1, M=1, N_h=1, d=3, k=1, C=1, seed=0\n' in said


@pytest.mark.slow
def test_a_right_answer_is_told_by_how_many_sentences_are_true(tmp_path, capsys):
    folder = tmp_path / 'copy'
    assert main(['11', str(folder)]) == 0
    solve(folder, 11)
    status, said = checked(folder, capsys)
    assert status == 0 and re.match(r'Warm-up and cosine: right\. All [4-9] sentences are true\.', said), said


@pytest.mark.parametrize('passed, trouble, words', [
    (0, 'E', 'the tests could not be run. E'), (3, 'E', 'could not be run. E'), (0, '', 'could not be run.')])
def test_an_exercise_whose_tests_did_not_run_is_not_right(passed, trouble, words, tmp_path, capsys, monkeypatch):
    assert main(['11', str(tmp_path / 'copy')]) == 0
    monkeypatch.setattr(exercise, 'run_tests', lambda *args: (passed, [], trouble))
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and words in said


@pytest.mark.slow
@pytest.mark.parametrize('body, words', [
    ('while True:\n    pass', 'the tests could not be run. After 20 seconds they still ran'),
    ('import os\nos._exit(3)', 'the tests could not be run.'),
    ('return schedule(step, steps, warmup)', 'what was seen  RecursionError'),
])
def test_an_answer_that_never_ends_or_ends_everything_is_told_too(body, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exercise, 'LIMIT', 20 if 'while' in body else exercise.LIMIT)
    assert main(['11', str(tmp_path / 'copy')]) == 0
    answer(tmp_path / 'copy', 11, [body])
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and words in said, said


@pytest.mark.slow
def test_a_file_that_cannot_be_imported_is_told_by_its_error(tmp_path, capsys):
    assert main(['11', str(tmp_path / 'copy')]) == 0
    with open(tmp_path / 'copy/train.py', 'a') as file:
        file.write('\nCONSTANT = undefined\n')
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and "could not be run. NameError: name 'undefined' is not defined" in said


# ---- The copy -------------------------------------------------------------------------------------------


def parts(source, name, file):
    """Of a function: its signature and decorators, its docstring, and the other statements of its body."""
    node = exercise.find(ast.parse(source), name, file)
    docstring = ast.get_docstring(node, clean=False)
    body = [ast.unparse(statement) for statement in node.body[docstring is not None:]]
    return ast.unparse(node.args), [ast.unparse(x) for x in node.decorator_list], docstring, body


@pytest.mark.parametrize('number', EXERCISES)
def test_of_a_function_only_the_body_goes_and_of_its_file_nothing_else(number):
    """In all exercises, and so all their functions are there."""
    file, functions = EXERCISES[number].file, EXERCISES[number].functions
    source, blank = (PROJECT / file).read_text(encoding='utf-8'), exercise.blank(EXERCISES[number])
    for name in functions:
        assert parts(blank, name, file)[:3] == parts(source, name, file)[:3]
        assert parts(blank, name, file)[3] == ['raise NotImplementedError'] and parts(source, name, file)[2]
        body = '\n'.join(parts(source, name, file)[3])
        blank = exercise.with_body(blank, name, body, file)
    assert ast.dump(ast.parse(blank)) == ast.dump(ast.parse(source))


@pytest.mark.parametrize('source, expected', [
    ('def f(x): return 1', 'def f(x): pass'),
    ('def f(x):\n    # why\n    return (\n        1)\n\n\nx = 2\n', 'def f(x):\n    # why\n    pass\n\n\nx = 2\n'),
    ('@decorator\ndef f(P̂):\n    """Eq. 4. P̂."""\n\n    return P̂  # P̂\n',
     '@decorator\ndef f(P̂):\n    """Eq. 4. P̂."""\n    pass  # P̂\n'),
    ('def f():\n    """Nothing."""\nx = 1\n', 'def f():\n    """Nothing."""\n    pass\nx = 1\n'),
])
def test_a_body_is_found_wherever_it_stands(source, expected):
    assert exercise.with_body(source, 'f', 'pass', 'file.py') == expected


def test_a_copy_has_what_is_needed_and_says_what_to_do(tmp_path, capsys):
    assert main(['2', str(tmp_path / 'new' / 'copy')]) == 0
    assert 'Write cdc_da and psi in ivpt.py.' in capsys.readouterr().out
    copy = {path.relative_to(tmp_path / 'new/copy').as_posix() for path in (tmp_path / 'new/copy').rglob('*')}
    assert {'ivpt.py', 'configs.yaml', 'tests/experiments/nano.pth', 'tests/conftest.py', 'EXERCISE.txt'} <= copy
    assert not any(re.search(r'^runs|^data/|__pycache__|(^|/)\.', name) for name in copy)
    body = (tmp_path / 'new/copy/ivpt.py').read_text(encoding='utf-8').partition('def psi(')[2].partition('\ndef ')[0]
    assert 'raise NotImplementedError' in body and 'return' not in body


# ---- The list -------------------------------------------------------------------------------------------


def test_the_list_has_every_exercise_in_the_papers_order_and_questions_after_each_part(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    places = [said.index(f'{number:2d}  {exercise.title}') for number, exercise in EXERCISES.items()]
    assert places == sorted(places) and 10 <= len(places) <= 12
    assert all(2 <= len(questions) <= 3 for _, _, questions in PARTS)
    assert set(WRONG) == set(EXERCISES)


COMMANDS = [line for *_, questions in PARTS for question in questions for line in question.split('\n')[1:]]
PROGRAMS = {'train.py': train, 'tests/experiments/sweep.py': sweep}


@pytest.mark.parametrize('command', [command for command in COMMANDS if command.split()[1] in PROGRAMS])
def test_every_question_can_be_asked(command, monkeypatch, tmp_path):
    """Its commands are what train.py and sweep.py understand."""
    done = []

    def run(settings, *args):
        done.append(settings)
        raise train.InputError('enough')
    monkeypatch.setattr(train, 'run', run)
    _, program, *argv = command.split()
    assert PROGRAMS[program].main([*argv, '--set', f'runs={tmp_path}']) == 2 and done


# ---- Bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('argv, words', [
    (['0', 'DIR/new'], "no exercise '0': they count from 1 to 11"),
    (['12', 'DIR/new'], "no exercise '12'"),
    (['one', 'DIR/new'], "no exercise 'one'"),
    (['-1', 'DIR/new'], "no exercise '-1'"),
    (['1', 'DIR/full'], 'full is there and not an empty folder'),
    (['1', 'DIR/full/file'], 'file is there and not an empty folder'),
    (['1', 'DIR/full/file/new'], 'file'),
    (['1', str(PROJECT / 'tests/new')], 'is inside the project'),
    (['check', 'DIR/full'], 'full is not a copy for an exercise'),
    (['check', 'DIR/nowhere'], 'nowhere is not a copy for an exercise'),
    (['check', 'DIR/odd'], 'odd is not a copy for an exercise'),
    (['check', str(PROJECT)], 'is not a copy for an exercise'),
    (['1'], 'NUMBER DIR'),
    (['check', 'DIR/full', 'more'], 'NUMBER DIR'),
])
def test_bad_input_is_one_line_and_status_2_and_changes_nothing(argv, words, tmp_path, capsys):
    for name, content in (('full/file', 'mine'), ('odd/EXERCISE.txt', '99')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob('*'))
    assert main([x.replace('DIR', str(tmp_path)) for x in argv]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count('\n') == 1 and not out
    assert sorted(tmp_path.rglob('*')) == before and (tmp_path / 'full/file').read_text() == 'mine'


def test_a_function_that_is_no_longer_there_is_one_line(tmp_path, capsys, monkeypatch):
    """In the project, and in a copy whose function was renamed."""
    assert main(['1', str(tmp_path / 'old')]) == 0
    (tmp_path / 'old/ivpt.py').write_text('def other():\n    pass\n')
    assert main(['check', str(tmp_path / 'old')]) == 2
    monkeypatch.setitem(EXERCISES, 1, EXERCISES[1]._replace(functions=('Class.gone',)))
    assert main(['1', str(tmp_path / 'new')]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and 'ivpt.py has no cdc:' in lines[0] and 'ivpt.py has no Class.gone:' in lines[1]
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('content, words', [
    (b'x = 1\ndef cdc(P)\n', 'line 2'), (b'\xff = 1\n', 'decode'), (b'x = 1\0\n', 'null bytes')])
def test_what_is_not_python_is_told_in_one_line(content, words, tmp_path, capsys):
    assert main(['1', str(tmp_path / 'copy')]) == 0
    (tmp_path / 'copy/ivpt.py').write_bytes(content)
    status, said = checked(tmp_path / 'copy', capsys)
    assert status == 1 and re.fullmatch(f'This is not Python yet: .*{words}.*\n', said), said


def test_a_copy_of_a_copy_is_refused(tmp_path, capsys, monkeypatch):
    """It would lack two bodies, and tell of one."""
    assert main(['1', str(tmp_path / 'copy')]) == 0
    monkeypatch.setattr(exercise, 'PROJECT', tmp_path / 'copy')
    assert main(['2', str(tmp_path / 'again')]) == 2
    assert 'copy is the copy of an exercise' in capsys.readouterr().err
