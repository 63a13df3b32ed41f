"""VTAB-1k without its lists: `instead: tests/experiments/torchvision_sets.py:drawn` in configs.yaml.

torchvision's data set is downloaded when missing, and pictures of it are drawn by VTAB-1k's protocol, always the same
ones. They are not those of the official lists.
"""

from pathlib import Path
from typing import NamedTuple

import torchvision
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import data
from vit import InputError

# By the folder that the lists would have: torchvision's class, its folder in the data folder, where the files are
# from, what selects training and test split.
TRAIN, TEST = {'split': 'train'}, {'split': 'test'}
SETS = {
    'cifar': ('CIFAR100', '', 'https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz', {'train': True},
              {'train': False}),
    'caltech101': ('Caltech101', 'caltech101', '101_ObjectCategories.tar.gz, which lies in caltech-101.zip of '
                   'https://data.caltech.edu/records/mzrjq-6wc02,', {}),
    'dtd': ('DTD', 'dtd', 'https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz', TRAIN, TEST),
    'oxford_flowers102': ('Flowers102', 'flowers-102', 'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/', TRAIN,
                          TEST),
    'oxford_iiit_pet': ('OxfordIIITPet', 'oxford-iiit-pet', 'images.tar.gz and annotations.tar.gz of '
                        'https://www.robots.ox.ac.uk/~vgg/data/pets/', {'split': 'trainval'}, TEST),
    'svhn': ('SVHN', '', 'http://ufldl.stanford.edu/housenumbers/', TRAIN, TEST),
    'sun397': ('SUN397', '', 'http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz', {}),
    'patch_camelyon': ('PCAM', 'pcam', 'https://github.com/basveeling/pcam', TRAIN, TEST),
    'eurosat': ('EuroSAT', 'eurosat', 'https://huggingface.co/datasets/torchgeo/eurosat', {}),
    'clevr_count': ('CLEVRClassification', 'clevr', 'https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip', TRAIN,
                    {'split': 'val'})}  # VTAB-1k's test: the classes of CLEVR's own are not public


class Place(NamedTuple):
    """A picture that is no file of its own, in a data set of torchvision."""

    pictures: Dataset
    index: int

    def __call__(self):
        return self.pictures[self.index][0]

    def __str__(self):
        return f'{type(self.pictures).__name__}, image {self.index}'


def drawn(settings):
    """VTAB-1k's protocol on torchvision's data set: n_train and n_val images of its training split, its whole test
    split. Where it has no splits, n_test images are held out first."""
    how, root = settings.pictures, Path(settings.machine.data)
    name, folder, url, *splits = SETS[how.dir]
    try:
        found = [split(settings, arguments) for arguments in splits]
    except Exception as error:  # no network, a moved file, a full disk, a cut annotation file
        raise InputError(
            f'{name} is not, or not whole, in {root / folder}, and could not be downloaded or read '
            f"({type(error).__name__}: {error}). Unpack {url} there, or VTAB-1k's lists and images into "
            f'{root / "vtab-1k" / how.dir}, or name the data folder with --data, or install the package that is '
            'missing; python train.py alone needs no download') from None
    (samples, classes), (test, _) = found[0], found[-1]
    if len(splits) == 1:
        samples = sorted(samples)  # a folder has no order of its own
        samples, test = data.draw(samples, len(samples) - how.n_test, how.n_test)
    train, val = data.draw(samples, how.n_train, how.n_val)
    note = (f"torchvision's {name}: {len(train + val)} of {len(samples)} training images, drawn by us: "
            'not the official VTAB-1k split')
    return data.compared((train, val, test), classes, note, settings)


def split(settings, arguments):
    """Samples of one split of torchvision's data set, and its classes: names, or numbers where it does not know all."""
    name, C = SETS[settings.pictures.dir][0], settings.pictures.classes
    pictures = getattr(torchvision.datasets, name)(settings.machine.data, download=True, **arguments)
    if name == 'Caltech101':  # torchvision leaves out the background, which VTAB-1k counts as a class
        pictures = ImageFolder(Path(pictures.root) / '101_ObjectCategories')
    found = vars(pictures)
    paths = found.get('_images', found.get('_image_files', [Place(pictures, i) for i in range(len(pictures))]))
    labels = found.get('_labels', found.get('labels', found.get('targets')))
    if isinstance(pictures, ImageFolder):  # EuroSAT too
        paths = [path for path, _ in pictures.samples]
    if name == 'PCAM':
        with pictures.h5py.File(pictures._base_folder / pictures._FILES[pictures._split]['targets'][0]) as file:
            labels = file['y'][:].ravel()
    first = 3 if name == 'CLEVRClassification' else 0  # CLEVR counts 3 to 10 objects
    samples = [(path, int(label) - first) for path, label in zip(paths, labels)]
    wrong = [f'{path} of class {label}' for path, label in samples if not 0 <= label < C]
    if wrong or not samples:
        what = f'{wrong[0] if wrong else "no image"} in {name} {list(arguments.values())}'
        raise ValueError(f'{what}, whose classes go from 0 to {C - 1}')
    names = found.get('classes', [])
    return samples, names if len(names) == C else [str(i) for i in range(C)]
