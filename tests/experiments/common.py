"""What the tests of this folder share: a ViT of values that every library computes alike, and runs that are made,
stopped, opened again or refused."""

import re

import finished
import pytest
import torch

import train
import vit


def chirp(shape, seed, scale=0.25):
    """Values that hide nothing by being regular: [shape], float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return scale * torch.sin(0.7548776662 * i * i + 2 * seed + 1).reshape(shape)


def chirped(L=2, D=32, num_classes=0):
    """A ViT with N_h = 4 on 16 pixels, in patches of 8, in eval mode: the seed is a tensor's place in the state dict,
    and gains of LayerNorm are 1 more."""
    model = vit.ViT(16, 8, (D, L, 4), num_classes).double().eval()
    model.load_state_dict({name: chirp(x.shape, i) + bool(re.search(r'norm\d?\.weight', name))
                           for i, (name, x) in enumerate(model.state_dict().items())})
    return model


def equal(ours, theirs, atol=1e-7):
    """Ours are theirs, which may be lists."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def opened(settings, **options):
    """A finished run, and whether it answers on its test pictures as when it was scored."""
    found = finished.open_run(settings, **options)
    rows = train.answers(found.model, found.task, found.task.test, found.settings, found.compute)
    return found, found.task.score(rows).items() <= found.result.items()


def stop_after_an_epoch(settings):
    """A run that is interrupted after its first epoch, and leaves its checkpoint."""
    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'train', stopped)
        train.run(settings)


def one_line(captured):
    """What was said to stderr, which is one line."""
    err = captured.readouterr().err
    assert err.count('\n') == 1, err
    return err
