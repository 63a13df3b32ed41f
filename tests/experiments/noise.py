"""Figures 4 and 6: the accuracies of finished runs on test images that are mixed with noise, printed and drawn.

    python tests/experiments/noise.py --task pets --method cdc,express,vpt,ivpt --seed 0,1,2 --rates 0,0.1,0.2,0.3

A rate is the proportion of Gaussian noise, mean 0 and standard deviation 1, that normalised images are mixed with; the
noise is the same for every run. The paper does not say how it mixes. Scores are kept in the run's folder, noise.json.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import finished
import train
from curves import curve_of, draw_scores, picture_of
from vit import InputError


@train.program
def main(argv):
    """Score the runs that a command line names. Returns the exit status."""
    options = finished.parser(__doc__)
    options.add_argument('--rates', metavar='A,B,C', default='0,0.1,0.2,0.3', help='proportions of noise, from 0 to 1')
    args = options.parse_args(argv)
    rates, said, found = proportions(args.rates), set(), {}
    runs = finished.chosen(args)
    results = [train.attempt(said, with_noise, settings, rates, train.changed(args)) for settings in runs]
    for result in filter(None, results):
        settings, scores = result
        curve = found.setdefault(curve_of(settings), {rate: [] for rate in rates})
        for rate, score in scores.items():
            curve[rate].append(score)
    if found:
        words = {rate: f'{rate:g}' for rate in rates}
        path = picture_of(f'noise={"+".join(words.values())}', runs)
        draw_scores(path, ('proportion of noise', 'accuracy'), words, found)
    return 0 if all(results) else 2


def proportions(text):
    """The numbers from 0 to 1 of --rates."""
    with suppress(ValueError):
        rates = [float(rate) for rate in text.split(',')]
        if all(0 <= rate <= 1 for rate in rates) and len({f'{rate:g}' for rate in rates}) == len(rates):
            return rates
    raise InputError(f'--rates takes proportions from 0 to 1, each once, as 0,0.1,0.2, not {text!r}')


def with_noise(settings, rates, given):
    """The settings of a finished run and its accuracies by rate, which are added to noise.json in its folder."""
    folder, run = train.folder_of(settings), finished.open_run(settings, given)
    if run.task.measure != 'accuracy':
        raise InputError(f'{folder}: Figure 4 is about classes of pictures; this is segmentation ({run.task.measure})')
    scores = {rate: accuracy(run, rate) for rate in rates}
    path, digest = folder / 'noise.json', run.result['params_digest']
    known = finished.read(path)
    before = known['accuracy'] if known.get('params_digest') == digest else {}
    after = before | {f'{rate:g}': score for rate, score in scores.items()}
    train.write(path, json.dumps({'params_digest': digest, 'accuracy': after}, indent=1).encode())
    return run.settings, scores


@torch.no_grad()
def accuracy(run, rate):
    """The accuracy of a finished run on its test images with a proportion of noise."""
    generator = torch.Generator().manual_seed(0)

    def noisy(images):
        return run.model(mixed(images, rate, generator))

    with run.compute.autocast():
        rows = run.task.answers(noisy, run.task.test, run.settings, run.compute.device)
    return run.task.score(rows)['accuracy']


def mixed(images, rate, generator):
    """Images with a proportion of noise from a generator, of the same shape [B, 3, H, W]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (1 - rate) * images + rate * noise


if __name__ == '__main__':
    train.start(main)
