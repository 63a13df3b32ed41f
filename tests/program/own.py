"""A method of a file of one's own, and functions that are none, as the tests of the door `tune` bring them."""

import torch
from torch import nn


class Shift(nn.Module):
    """Adds one vector to all tokens."""

    def __init__(self, vit, classes, settings):
        super().__init__()
        self.vit, self.head = vit, nn.Linear(vit.D, classes)
        self.b = nn.Parameter(torch.zeros(vit.D))
        self.size = getattr(settings.options, 'size', None)

    def forward(self, images):
        tokens = self.vit.embed(images) + self.b
        for layer in self.vit.blocks:
            tokens, _ = layer(tokens, need_weights=False)
        return self.head(self.vit.read(tokens))


class Prepared(Shift):
    """Keeps how many pictures it was prepared with."""

    def __init__(self, vit, classes, settings):
        super().__init__(vit, classes, settings)
        self.register_buffer('seen', torch.zeros(()))

    def prepare(self, batches):
        self.seen.fill_(sum(len(labels) for images, labels in batches))


def shift(vit, classes, settings):
    assert not any(p.requires_grad for p in vit.parameters())
    return Prepared(vit, classes, settings)


def nothing(vit, classes, settings):
    return 7


def broken(vit, classes, settings):
    return vit.no_such_part
