"""Exercises: write the method yourself, part by part. A command, not a test:

    python tests/tools/exercise.py              the exercises in the paper's order, with open questions after each part
    python tests/tools/exercise.py 5 DIR        a copy of the project in DIR, without what exercise 5 asks for
    python tests/tools/exercise.py check DIR    whether it is right; if not, which sentence is false, and where

An exercise takes ten minutes to half an hour; 1 and 2 take longer, so begin with 3. The times of questions are for two
free CPU cores. "In your copy": solve an exercise, then change the code and give the commands in DIR.

Signature and docstring of a function stay. `check` runs the tests of the exercise in DIR: each test is a sentence
about the method, and a false one is printed with the smallest case that was found.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
NOTE = 'EXERCISE.txt'  # in a copy: which exercise it is
LEFT_OUT = shutil.ignore_patterns('.*', 'runs', 'data', '__pycache__')
MOST = 3  # sentences that are printed
LIMIT = 600  # seconds that the tests of an exercise may take


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line."""


class Exercise(NamedTuple):
    """What is to be written, the file and the functions that it is, and pytest's arguments for its tests."""

    title: str
    file: str
    functions: tuple
    tests: tuple


class Question:
    """An open question, how long it takes, what to look for, and commands that help to answer it, if any."""

    def __init__(self, asks, time, look_for, *commands):
        self.asks, self.time, self.look_for, self.commands = asks, time, look_for, commands


EQUATIONS = 'tests/equations/test_3_'
STRUCTURES, REWEIGHTING = (EQUATIONS + '3_cdc_and_da.py',), (EQUATIONS + '4_reweighting.py',)
AR, LAYER = (EQUATIONS + '5_attentive_reinforcement.py',), (EQUATIONS + '1_vit_and_vpt.py',)
OPTIMISER = (EQUATIONS + '4_optimiser.py',)
SCHEDULE = ('tests/program/test_4_1_training.py', '-k', 'learning_rate or warm_up or schedule')

PARTS = [  # heading, exercises, questions
    ('3.1 Preliminary: prompts beside the tokens, but fast', [
        Exercise('Eq. 2 and 3: prompts as keys and values', 'vit.py', ('Attention.forward',), LAYER),
        Exercise('The class token alone in the last layer', 'vit.py', ('ViT.last',), LAYER),
    ], [
        Question('What do prompts cost as tokens of the sequence, and what as keys and values?', '5 minutes',
                 'how the ratios grow with N, "concatenated" and not. Which outputs of a layer are discarded?',
                 'python tests/tools/bench.py --model vit_nano_patch8_48 --batch 32 --k 4 '
                 '--prompts 10,50,200 --rounds 20'),
        Question('Let the head read the mean of the image tokens. What does it cost, and is the accuracy better?',
                 '2 minutes',
                 'images/s in the lines of the epochs. With the mean the last layer has to update all image tokens.',
                 'python train.py --method ivpt',
                 'python train.py --method ivpt --set readout=mean'),
    ]),
    ('3.3 Cross-layer dynamic connection', [
        Exercise('Eq. 4: CDC', 'ivpt.py', ('cdc',), STRUCTURES),
        Exercise('Eq. 5 and 6: dynamic aggregation', 'ivpt.py', ('cdc_da', 'psi'), STRUCTURES),
    ], [
        Question('Which learning rate does each structure want? Choose it on the validation pictures.', '5 minutes',
                 'the best of the three rates for each structure. The largest eigenvalue of A Aᵀ (exercise 8) '
                 'predicts an order. The standard error on 200 pictures is 2 to 3 points.',
                 'python tests/experiments/sweep.py --method vpt,vanilla_cdc,cdc --over lr=0.025,0.1,0.4 '
                 '--set score_on=val'),
        Question('How far is γ from the identity after training, and in which layers?', '2 minutes',
                 'the layer with the largest distance. The identity itself has the norm √10 = 3.16, so a distance of '
                 '3 is large.',
                 'python train.py --method cdc_da',
                 'python -c "import torch; '
                 "P = torch.load('runs/where_red/vit_nano_patch8_48/cdc_da/seed0/params.pth'); "
                 "print(*(f'into layer {l}: {x:.2f}' for l, x in "
                 "enumerate((P['gamma'] - torch.eye(10)).norm(dim=(1, 2)).tolist(), start=1)), sep='\\n')" '"'),
        Question('With one prompt a layer, γ^l is one number. Is DA still of use?', '3 minutes',
                 'the three accuracies. One seed differs from the next by 1 or 2 points: a smaller difference says '
                 'nothing.',
                 'python train.py --method vpt,cdc,cdc_da --set N=1'),
    ]),
    ('3.4 Understanding cross-layer dynamic connection', [
        Exercise('Eq. 7: the weight of a prompt', 'ivpt.py', ('attention_weight',), REWEIGHTING),
        Exercise('Eq. 8 to 10: CDC re-weights', 'ivpt.py', ('reweight_cdc',), REWEIGHTING),
        Exercise('Eq. 11 to 13: DA re-weights by all', 'ivpt.py', ('reweight_cdc_da',), REWEIGHTING),
    ], [
        Question("How much of the class token's attention goes to the prompts, layer by layer, in VPT and in CDC?",
                 '5 minutes',
                 'the part that each tile of the picture says, "prompts 12%". In which layers does it differ, and '
                 "does it depend on the picture? `ivpt.look(model, images)['to_prompts']` has it for any pictures.",
                 'python train.py --method vpt,cdc',
                 'python tests/experiments/look.py --method vpt,cdc'),
        Question('The equations leave LayerNorm out. How far is w α̃, normalised over the prompts, from what a layer '
                 'does?', 'half an hour',
                 'half the sum of |difference| over the prompts, from 0 to 1. Take P of a trained CDC (params.pth), '
                 "and qkv and norm1 of a layer of vit.build('vit_nano_patch8_48', 'tests/experiments/nano.pth'); "
                 'draw q at random. The layer weighs norm1(P^l + P^{l-1}).'),
    ]),
    ('3.4 seen from the optimiser', [
        Exercise('A Aᵀ: what CDC does to the gradient', OPTIMISER[0], ('gradient_factor',), OPTIMISER),
    ], [
        Question('With 6 layers vanilla CDC has up to 17.2 times the learning rate of VPT. Does it train as well '
                 'with 0.1 / 17.2 = 0.0058?', '2 minutes',
                 'which of the two rates comes nearer to VPT with 0.1. The factor is 17.2 only for what all layers '
                 'have in common; the smallest is 0.27.',
                 'python train.py --method vpt --set score_on=val',
                 'python tests/experiments/sweep.py --method vanilla_cdc --over lr=0.1,0.0058 --set score_on=val'),
        Question('Where does γ end with strong weight decay, if γ had any? Let `decays` in train.py return True for '
                 'it in your copy.', '10 minutes',
                 "the mean of γ's diagonal, which starts at 1. At 0 there is no connection: that is VPT.",
                 'python train.py --method cdc_da --set weight_decay=0.01 runs=runs/decayed',
                 'python -c "import torch; '
                 "P = torch.load('runs/decayed/where_red/vit_nano_patch8_48/"
                 "cdc_da,weight_decay=0.01/seed0/params.pth'); "
                 "print(P['gamma'].diagonal(dim1=1, dim2=2).mean().item())" '"'),
        Question('AdamW moves every number by about the learning rate. Are VPT and CDC nearer to each other with it?',
                 '3 minutes',
                 'the difference of the two accuracies with SGD and with AdamW. Below 2 points it is chance.',
                 'python train.py --method vpt,cdc',
                 'python train.py --method vpt,cdc --set optimizer=AdamW lr=0.003'),
    ]),
    ('3.5 Attentive reinforcement', [
        Exercise('Eq. 14: the salient tokens', 'ivpt.py', ('top_k',), AR),
        Exercise('Eq. 15: reinforcement', 'ivpt.py', ('reinforce_',), AR),
    ], [
        Question('How many tokens should be reinforced? 0 is no AR, 36 is all of them. Choose on the validation '
                 'pictures.', '3 minutes',
                 'the best k, and whether k = 36 differs from 16. With k = 36 the vectors still go by the order of '
                 "salience, and not by place as in Table 4's All (`--method ivpt_all`).",
                 'python tests/experiments/sweep.py --task shape_red --method ivpt --over k=0,1,4,16,36 '
                 '--set score_on=val'),
        Question('Does the order of Ω matter? In your copy give the first command, sort Ω by position, then give the '
                 'second.', '10 minutes',
                 'the two accuracies. As it is, the first row of P_re goes to the most salient token; sorted, to the '
                 'token nearest to the top.',
                 'python train.py --method ivpt',
                 'python train.py --method ivpt --set runs=runs/sorted'),
        Question('Do the salient tokens lie on the shape that is asked for?', '3 minutes',
                 'the cyan frames, layer by layer. tests/experiments/README.md counts this on 2,000 pictures ("Where '
                 'the class token looks").',
                 'python train.py --method vpt,ivpt',
                 'python tests/experiments/look.py --method vpt,ivpt'),
        Question('Why is linear probing better on blue (61.9%) than on red (31.8%) and yellow (26.5%)?', '2 minutes',
                 'where the ViT looks before any training. Without prompts the brightest patch of layer 4 lies on '
                 'the blue shape in 81% of the pictures, and on the red one in 2%.',
                 'python train.py --method linear --task where_blue,where_red',
                 'python train.py --method linear --set ask=where_yellow'),
    ]),
    ('4.1 Training', [
        Exercise('Warm-up and cosine', 'train.py', ('schedule',), SCHEDULE),
    ], [
        Question('Is the warm-up needed at a high rate?', '2 minutes',
                 'the loss of the first epochs, beside ln 9 = 2.20, the loss of a guess among 9 classes.',
                 'python train.py --method ivpt --set lr=0.2',
                 'python train.py --method ivpt --set lr=0.2 warmup=0'),
        Question('In your copy give the first command, let `schedule` return 1, then give the second. What is the '
                 'accuracy then, and how much does it differ between seeds?', '5 minutes',
                 'mean and spread of the three seeds, with the cosine and without.',
                 'python train.py --method ivpt --seed 0,1,2',
                 'python train.py --method ivpt --seed 0,1,2 --set runs=runs/constant'),
    ]),
]
EXERCISES = dict(enumerate((exercise for _, exercises, _ in PARTS for exercise in exercises), start=1))


def listing():
    """All exercises and questions, as text."""
    lines, number = [__doc__.split('\n\nSignature')[0].partition('\n\n')[2]], 0
    for heading, exercises, questions in PARTS:
        lines += ['', heading, '']
        for exercise in exercises:
            number += 1
            lines.append(f'  {number:2d}  {exercise.title:<40} {names(exercise)}')
        lines += ['', '      To find out:']
        for one in questions:
            lines += textwrap.wrap(f'{one.asks} ({one.time})', 100, initial_indent=' ' * 6 + '- ',
                                   subsequent_indent=' ' * 8)
            lines += [' ' * 10 + command for command in one.commands]
            lines += textwrap.wrap(f'Look for: {one.look_for}', 100, initial_indent=' ' * 8, subsequent_indent=' ' * 8)
    return '\n'.join(lines)


def names(exercise):
    """The functions of an exercise, with the file that they are in."""
    return f'{" and ".join(exercise.functions)} in {exercise.file}'


# ---- Making a copy --------------------------------------------------------------------------------------

def find(tree, name, file):
    """The definition of 'f' or 'Class.f' in a syntax tree. Raises InputError if there is none."""
    for part in name.split('.'):
        kinds = ast.ClassDef, ast.FunctionDef
        tree = next((node for node in tree.body if isinstance(node, kinds) and node.name == part), None)
        if tree is None:
            raise InputError(f'{file} has no {name}: exercises and project do not fit each other')
    return tree


def with_body(source, name, body, file):
    """Python source in which the function `name` has another body. Its signature and docstring stay."""
    node, lines = find(ast.parse(source), name, file), source.split('\n')
    docstring = node.body[0]
    body = textwrap.indent(textwrap.dedent(body).strip('\n'), ' ' * docstring.col_offset)
    return '\n'.join([*lines[:docstring.end_lineno], body, *lines[node.end_lineno:]])


def blank(exercise):
    """The file of an exercise without the bodies that it asks for, as text."""
    source = (PROJECT / exercise.file).read_text(encoding='utf-8')
    for name in exercise.functions:
        source = with_body(source, name, 'raise NotImplementedError', exercise.file)
    return source


def make(number, folder):
    """Put a copy of the project into a folder, which is new or empty, for an exercise."""
    if not (number.isdecimal() and int(number) in EXERCISES):
        raise InputError(f'there is no exercise {number[:50]!r}: they count from 1 to {len(EXERCISES)}')
    exercise = EXERCISES[int(number)]
    if (PROJECT / NOTE).exists():
        raise InputError(f'{PROJECT} is the copy of an exercise: make another one from the project itself')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f'{folder} is there and not an empty folder: name a new one')
    if folder.resolve().is_relative_to(PROJECT):
        raise InputError(f'{folder} is inside the project: name a folder outside')
    text = blank(exercise)
    shutil.copytree(PROJECT, folder, ignore=LEFT_OUT, dirs_exist_ok=True)
    (folder / exercise.file).write_text(text, encoding='utf-8')
    task = f'{number}\n\n{exercise.title}\nWrite {names(exercise)}.\n'
    (folder / NOTE).write_text(task, encoding='utf-8')
    print(f'Exercise {task}\nThe copy is in {folder}. To see whether it is right:\n\n'
          f'    python tests/tools/exercise.py check {folder}')


# ---- Checking it ----------------------------------------------------------------------------------------

def check(folder):
    """Run the tests of the exercise that a folder is a copy for, and print what they found. Returns 0 or 1."""
    exercise = read(folder)
    try:
        tree = ast.parse((folder / exercise.file).read_bytes(), exercise.file)
    except (SyntaxError, ValueError) as error:
        print(f'This is not Python yet: {error}')
        return 1
    for name in exercise.functions:
        find(tree, name, folder / exercise.file)
    passed, false, trouble = run_tests(folder, exercise)
    if false and all(failure['error'].startswith('NotImplementedError') for failure in false):
        print(f'{exercise.title}: {names(exercise)} is not written yet. A test of it:\n    {false[0]["again"]}')
    elif false:
        print(f'{exercise.title}: not yet. True sentences: {passed}. False sentences: {len(false)}.')
        print(*(failure['text'] for failure in false), sep='\n')
        print('\nThe letters are explained on top of vit.py; all tensors follow from them '
              '(tests/equations/strategies.py).')
    elif trouble or not passed:
        print(f'{exercise.title}: the tests could not be run. {trouble}')
    else:
        print(f'{exercise.title}: right. All {passed} sentences are true. Now the questions behind it: '
              'python tests/tools/exercise.py')
    return int(bool(false or trouble or not passed))


def read(folder):
    """The exercise that a folder is a copy for. Raises InputError if it is none."""
    try:
        number = int((folder / NOTE).read_text(encoding='utf-8').split()[0])
        return EXERCISES[number]
    except (OSError, ValueError, LookupError):
        raise InputError(f'{folder} is not a copy for an exercise: '
                         'python tests/tools/exercise.py 1 DIR makes one') from None


def run_tests(folder, exercise):
    """Run them in a process of their own: how many passed, what failed (a list), and what kept them from running."""
    with tempfile.TemporaryDirectory() as temporary:
        told = Path(temporary, 'told.json')
        command = [sys.executable, '-m', 'pytest', '-q', f'--maxfail={MOST}', '--color=no', '-p', 'no:cacheprovider',
                   '-p', 'exercise', '--rootdir', '.', *exercise.tests]
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])])
        environment = os.environ | {'PYTHONPATH': path, 'EXERCISE_TOLD': str(told)}
        try:
            out = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors='replace',
                                 timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return 0, [], f'After {LIMIT} seconds they still ran: is there a loop without an end?'
        results = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    false = [result for result in results if result]
    errors = [line[1:].strip() for line in out.stdout.splitlines() if line.startswith('E ')]
    trouble = (errors or out.stderr.splitlines() or ['pytest says nothing'])[-1] if out.returncode else ''
    return len(results) - len(false), false, trouble


def pytest_runtest_makereport(item, call):
    """As a plugin of that process: write down of each test null if it passed, or what was found."""
    if call.when == 'call':
        result = call.excinfo and found(item, call.excinfo.value)
        with open(os.environ['EXERCISE_TOLD'], 'a') as file:
            file.write(json.dumps(result) + '\n')


def found(item, error):
    """Of a test that failed: the error, the command that runs it again wherever it is given (in the project itself it
    would pass), and the text that is printed."""
    while getattr(error, 'exceptions', ()):  # Hypothesis found several
        error = error.exceptions[0]
    notes = '\n'.join(getattr(error, '__notes__', ()))  # Hypothesis says there which case it was
    case = re.search(r'(?:case|example): \w+\(\n(.*?)\n\)', notes, re.DOTALL)
    case = [line.partition('#')[0].strip().rstrip(',') for line in (case[1] if case else '').splitlines()]
    case = re.sub(r'case=Case\((.*?)\)', r'\1', ', '.join(case)) or 'there is only one'
    said = re.sub(r'<built-in method (\w+)[^>]*>', r'\1', str(error)).replace('\\n', ' ')
    said = textwrap.shorten(f'{type(error).__name__}: {said}', 200, placeholder=' ...')
    doc = ' '.join((item.obj.__doc__ or '').split('\n\n')[0].split())
    root = item.config.rootpath
    again = f'cd {shlex.quote(str(root))} && python -m pytest {item.path.relative_to(root)} -k {item.originalname}'
    of = f' ({item.callspec.id})' if hasattr(item, 'callspec') else ''
    text = [f'\n  FALSE: {item.originalname.removeprefix("test_").replace("_", " ")}{of}',
            f'    what it says   {doc}',
            f'    smallest case  {case}',
            f'    what was seen  {said}',
            f'    in the copy    {again}']
    return {'error': said, 'again': again, 'text': '\n'.join(text)}


def main(argv=None):
    """Do what the command line asks for. Returns the exit status."""
    try:
        match sys.argv[1:] if argv is None else argv:
            case [] | ['-h'] | ['--help']:
                print(listing())
            case ['check', folder]:
                return check(Path(folder))
            case [number, folder]:
                make(number, Path(folder))
            case _:
                raise InputError('give nothing, NUMBER DIR, or check DIR: '
                                 'python tests/tools/exercise.py lists the exercises')
    except (InputError, OSError) as error:
        print(' '.join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
