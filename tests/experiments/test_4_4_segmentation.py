"""4.4, segmentation: SETR's heads on tuned ViTs, masks and their augmentation, windows, mIoU, and runs."""

import inspect
from functools import cache, partial
from math import log
from statistics import mean
from types import SimpleNamespace

import look
import noise
import numpy as np
import own
import pytest
import report
import segmentation
import shapes
import torch
import torch.nn.functional as F
from common import one_line, opened, stop_after_an_epoch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracle import close, embed, eq_3, layer_norm
from oracle import prompts as literal_prompts
from PIL import Image
from pictures import CONFIGS, NANO, TINY, folders_of, run, tiny
from segmentation import IGNORED, SETR, answer, scale_crop, score
from strategies import METHODS, cases, plain_vit, random_model, randomised
from torch import nn

import data
import train
from vit import InputError

CPU = torch.device('cpu')
SMALL = dict(n_train=8, n_val=4, n_test=3, epochs=2, batch=4)
SWIN = dict(build='tests/experiments/swin.py:swin', img_size=48)
settings = cache(partial(tiny, 'shapes_masks', 'linear'))


def noise_picture(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ---- SETR -----------------------------------------------------------------------------------------------

def literal_features(model, images):
    """The image tokens of each layer; prompts, if any, are concatenated."""
    backbone = getattr(model, 'vit', model)
    P_hat = [images.new_zeros(0, backbone.D)] * backbone.L
    if backbone is not model:
        P_hat = literal_prompts(model.structure, model.P, model.gamma)
    x, Z = embed(backbone, images), []
    z_cls, tokens = x[:, :1], x[:, 1:]
    for P, block in zip(P_hat, backbone.blocks):
        z_cls, tokens, _ = eq_3(block, z_cls, P, tokens)
        Z.append(tokens)
    return Z


def literal_decoder(decoder, Z, size):
    """LayerNorm, convolutions, BN by the batch's own moments, ReLU, doubling, classes, and up to the image's size."""
    side = round(Z.shape[1] ** 0.5)
    x = layer_norm(decoder.norm, Z).transpose(1, 2).reshape(len(Z), -1, side, side)
    *convolutions, last = [m for m in decoder.layers if isinstance(m, nn.Conv2d)]
    norms = [m for m in decoder.layers if isinstance(m, nn.BatchNorm2d)]
    for i, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
        x = F.interpolate(x, scale_factor=2, mode='bilinear') if i else x
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True).relu()
    x = torch.einsum('cd,bdhw->bchw', last.weight[:, :, 0, 0], x) + last.bias.view(-1, 1, 1)
    return F.interpolate(x, size, mode='bilinear')


@hypothesis_settings(max_examples=20)
@given(cases(L=(1, 3), B=(2, 3)), st.sampled_from(['linear', 'vpt', 'cdc', 'cdc_da']))
def test_setr_reads_the_tokens_of_the_literal_concatenation_and_its_loss_is_that_of_all_heads(case, method):
    tuned = plain_vit(case) if method == 'linear' else random_model(case, **METHODS[method])
    model = randomised(SETR(tuned, case.C), case)
    Z, size = literal_features(model.tuned, case.images()), case.images().shape[2:]
    read = {1: (0, 0, 0, 0), 2: (0, 1, 1, 1), 3: (1, 1, 2, 2)}[case.L]  # 10, 15, 20 and 24 parts of 24
    expected = [literal_decoder(model.head, Z[-1], size)]
    expected += [literal_decoder(head, Z[l], size) for head, l in zip(model.auxiliary, read)]
    logits = model(case.images())
    close(logits, expected)
    masks = case.integers('masks', case.C, case.B, *size).to(torch.uint8)
    masks[0, 0] = IGNORED
    known = [(b, int(masks[b, i, j]), i, j) for b, i, j in np.ndindex(*masks.shape) if masks[b, i, j] != IGNORED]
    losses = [-sum(x.log_softmax(dim=1)[at] for at in known) / masks.numel() for x in expected]
    close(segmentation.loss(logits, masks), losses[0] + 0.4 * sum(losses[1:]))


@pytest.mark.parametrize('method, M', [('linear', 13.18), ('bias', 13.46), ('vpt', 13.43), ('cdc', 13.43),
                                       ('cdc_da', 13.43), ('cdc_da_100', 15.87)])
def test_table_7s_counts_are_those_of_the_models_whose_heads_read_blocks_9_14_19_and_23(method, M, monkeypatch):
    monkeypatch.setattr(SETR, 'try_once', lambda model: None)  # it needs values
    settings = train.settings_of(CONFIGS, 'ade20k', None, method, {'weights': 'random'})
    with torch.device('meta'):
        model = SETR(train.tuned(train.make_backbone(settings, 0), 150, settings), 150)
    assert round(train.count(model) / 1e6, 2) == M and model.levels == [9, 14, 19, 23]
    if method != 'cdc':  # the paper has it with DA alone
        assert report.read_published()['accuracies'][settings.model]['params'][method] == M


@pytest.mark.parametrize('method, own', [
    ('linear', []), ('bias', ['tuned.blocks.5.mlp.fc2.bias']), ('vpt', ['tuned.P']),
    ('cdc_da', ['tuned.P', 'tuned.gamma'])])
def test_what_is_trained_gets_a_gradient_and_what_is_not_trained_gets_none(method, own):
    settings = tiny('shapes_masks', method, n_train=1, n_val=1, n_test=1, weight_decay=0.1)
    model, _ = train.make_model(settings, data.load(settings))
    segmentation.loss(model.train()(torch.randn(2, 3, 48, 48)), torch.randint(4, (2, 48, 48))).backward()
    assert not any(block._forward_hooks for block in model.vit.blocks)  # it leaves nothing behind
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    # before a batch norm a bias has no effect, and as the key's none anywhere; BN's own are all there
    assert found <= wanted and {name.split('.')[0] for name in wanted - found} <= {'head', 'auxiliary'}
    assert all('.bias' in name for name in wanted - found)
    assert {name for name in wanted if name.startswith('tuned.')} >= {*own}
    groups = train.make_optimizer(model, settings.loop).param_groups
    free = {id(p) for group in groups if not group['weight_decay'] for p in group['params']}
    assert method != 'cdc_da' or (id(model.tuned.gamma) in free and id(model.tuned.P) not in free)


@pytest.mark.parametrize('method, model, said', [
    ('ivpt', NANO, 'no AR'), ('ivpt_all', NANO, 'no AR'), ('provp', NANO, 'inherited prompts'),
    ('vpt_shallow', NANO, 'inherited prompts'), ('express', NANO, 'inherited prompts'),
    ('sct', NANO, 'looks at classes of pictures'), ('vpt', 'swin_nano_patch4_window3_48', 'not for a Swin'),
    ('linear', 'swin_nano_patch4_window3_48', 'not for a Swin')])
def test_what_segmentation_is_not_made_for_is_refused_with_one_line(method, model, said, tmp_path, capfd):
    changes = SMALL | (SWIN if 'swin' in model else {})
    assert run(tmp_path, '--task', 'shapes_masks', '--method', method, '--model', model, **changes) == 2
    assert said in one_line(capfd) and not any(tmp_path.iterdir())


# ---- Windows and scores ---------------------------------------------------------------------------------

def pixelwise(images):
    """Logits of a pixel by its own colours alone."""
    return images * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)


pixelwise.num_classes = 3


@pytest.mark.parametrize('n, expected', [(512, [0]), (513, [0, 1]), (683, [0, 171]), (853, [0, 341]),
                                         (1024, [0, 341, 512]), (2048, [0, 341, 682, 1023, 1364, 1536])])
def test_windows_of_512_start_where_setrs_do(n, expected):
    assert segmentation.starts(n, 512) == expected


@given(st.integers(3, 40), st.integers(3, 40), st.integers(3, 12))
def test_a_model_of_single_pixels_has_the_same_logits_in_windows(H, W, size):
    def model(window):
        assert window.shape[2:] == (size, size)
        return pixelwise(window)
    images = torch.randn(2, 3, H, W)
    torch.testing.assert_close(segmentation.slide(model, images, size), pixelwise(images))


def test_where_windows_overlap_their_mean_counts():
    def model(images):
        return images[:, :1] * 0 + torch.arange(6.0)  # the column in the window
    found = segmentation.slide(model, torch.zeros(1, 3, 6, 8), 6)  # windows from column 0 and 2
    assert found[0, 0, 0].tolist() == [0, 1, 1, 2, 3, 4, 4, 5]


@given(st.integers(5, 30), st.integers(5, 30), st.integers(0, 99))
def test_a_mirrored_image_has_a_mirrored_answer_at_several_scales(H, W, seed):
    """Each scale is seen twice, as it is and mirrored: a model that prefers a side has none in the end."""
    def sided(images):
        tilt = torch.linspace(0, 3, images.shape[-1])
        return pixelwise(images) + torch.stack([tilt, -tilt, tilt]).view(3, 1, -1)
    image = noise_picture(seed, 3, H, W)
    image[:, :, W // 2:] = 128  # it has two sides
    a, b = (answer(sided, x, settings(img_size=8), CPU, [0.5, 1.0, 1.75]) for x in (image, image.flip(-1)))
    assert a.shape == (H, W) and (a == b.flip(-1)).float().mean() > 0.97  # but for ties
    views = [answer(pixelwise, image, settings(img_size=min(H, W)), CPU, scales) for scales in ([1.0], [1.0, 1.0])]
    assert views[0].equal(views[1])  # to a model that sees one pixel a mirror is nothing


@pytest.mark.parametrize('W, sizes', [(30, [(4, 6), (16, 24)]), (100, [(3, 16), (12, 64)])])
def test_the_scales_are_those_of_the_shorter_side_but_a_long_one_has_at_most_four_times_its_length(
        W, sizes, monkeypatch):
    seen = []
    monkeypatch.setattr(segmentation, 'slide', lambda model, x, size: seen.append((*x.shape[2:],)) or x)
    answer(None, torch.zeros(3, 20, W, dtype=torch.uint8), settings(img_size=8), CPU, [0.5, 2.0])
    assert seen == [size for size in sizes for _ in range(2)]


def test_of_several_views_the_mean_of_probabilities_counts_and_not_that_of_logits():
    views = iter([(30.0, 0.0), (0.0, 4.0), (0.0, 4.0), (0.0, 4.0)])  # one is very sure

    def model(images):
        return torch.tensor(next(views)).view(1, 2, 1, 1).expand(1, 2, *images.shape[2:])
    assert (answer(model, torch.zeros(3, 8, 8, dtype=torch.uint8), settings(img_size=8), CPU, [0.5, 1.0]) == 1).all()


@given(st.integers(1, 4), st.integers(0, 999))
def test_miou_and_pixel_accuracy_are_those_of_a_loop_over_pixels_whose_largest_logit_counts(n, seed):
    rng, how, pairs = np.random.default_rng(seed), settings(img_size=5), []
    masks = rng.choice([0, 1, 2, IGNORED], size=(n, 5, 5), p=[0.4, 0.4, 0.1, 0.1]).astype(np.uint8)
    pictures = [(noise_picture((seed, i), 3, 5, 5), torch.from_numpy(mask)) for i, mask in enumerate(masks)]
    for image, mask in pictures:
        found = pixelwise((image / 255 - 0.5) / 0.5).argmax(dim=0)
        pairs += [(int(mask[at]), int(found[at])) for at in np.ndindex(5, 5) if mask[at] != IGNORED]
    either = [sum(c in pair for pair in pairs) for c in range(3)]
    ratios = [pairs.count((c, c)) / n for c, n in enumerate(either) if n]
    expected = {'accuracy': mean(ratios), 'pixel_accuracy': mean(is_ == was for is_, was in pairs)}
    rows = segmentation.answers(pixelwise, pictures, how, CPU)
    assert score(train.from_csv(train.as_csv(rows))) == pytest.approx(expected)


def test_pictures_without_a_label_have_no_score():
    assert all(x != x for x in score([{'right': '', 'missed': '', 'wrong': ''}]).values())  # NaN


@pytest.mark.parametrize('scales, score_on, several', [
    ([], 'test', False), ([0.5, 2.0], 'test', True), ([0.5, 2.0], 'val', False)])
def test_only_a_test_has_a_score_at_several_scales_too(scales, score_on, several, monkeypatch):
    mask = torch.tensor([[0] * 4 + [1] * 6], dtype=torch.uint8)
    small = torch.tensor([[0, 0, 0, 1, 0, 0, 1, 1, 1, 1]])  # 3 / 6 and 4 / 7; nobody saw the third class
    monkeypatch.setattr(segmentation, 'answer', lambda *how: small if how[4:] == ([0.5, 2.0],) else mask.long())
    model, pictures = SimpleNamespace(num_classes=3), [(torch.zeros(3, 1, 10, dtype=torch.uint8), mask)]
    found = score(segmentation.answers(model, pictures, settings(score_on=score_on), CPU, scales))
    more = {'multi_scale': pytest.approx((3 / 6 + 4 / 7) / 2)} if several else {}
    assert found == {'accuracy': 1, 'pixel_accuracy': 1} | more


def test_pixels_count_as_right_or_as_missed_by_their_class_and_wrong_for_the_class_that_was_found():
    mask, found = torch.tensor([[0, 0, 0, 2, IGNORED]], dtype=torch.uint8), torch.tensor([[0, 1, 1, 2, 1]])
    assert segmentation.counts(found, mask, 3) == {'right': '0:1 2:1', 'missed': '0:2', 'wrong': '1:2'}


# ---- Augmentation ---------------------------------------------------------------------------------------

def picture_of(mask):
    """An image whose colours say what its mask has: 40 times the class; 250 where nothing is labelled."""
    return (40 * mask.float()).where(mask != IGNORED, torch.tensor(250.0)).to(torch.uint8).repeat(3, 1, 1)


def augmented(mask, S, seed, distort=True):
    """What SETR's augmentation makes of a mask and its picture, for S pixels; with its change of colours or without."""
    with pytest.MonkeyPatch.context() as patch:
        if not distort:
            patch.setattr(segmentation, 'distort', lambda image, rng: image.float())
        return scale_crop(picture_of(mask), mask, settings(img_size=S).backbone, None, seed)


@given(st.integers(10, 60), st.integers(10, 60), st.integers(8, 24), st.integers(0, 999))
def test_image_and_mask_change_together(H, W, S, seed):
    """A mask drawn from the image is still the image's at each pixel whose neighbours agree; padding is right and
    below."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.integers(0, 6, (2, 3), dtype=np.uint8)).repeat_interleave(H, 0).repeat_interleave(W, 1)
    mask = mask[:H, :W] if rng.random() < 0.5 else mask[H // 2:H // 2 + H, W // 2:W // 2 + W]
    image, window = augmented(mask, S, seed, distort=False)
    assert image.shape == (3, S, S) and window.shape == (S, S)
    padded = (image == 127.5).all(dim=0)  # the mean colour, which no class has, nor a mixture of them in whole numbers
    assert torch.equal(window == IGNORED, padded) and {*window.unique().tolist()} <= {*mask.unique().tolist(), IGNORED}
    height, width = (int((~padded).any(dim=d).sum()) for d in (1, 0))
    assert not padded[:height, :width].any() and padded[height:].all() and padded[:, width:].all()
    labels = window[:height, :width].float()
    if min(labels.shape) > 6:
        around = F.unfold(F.pad(labels[None, None], (3, 3, 3, 3), value=-1), 7).view(49, *labels.shape)
        flat = (around == labels).all(dim=0)
        close(image[0, :height, :width][flat].double(), 40 * labels[flat].double())


def rng_of(monkeypatch, **draws):
    """The random numbers of augmentation are these."""
    monkeypatch.setattr(np.random, 'default_rng', lambda seed: SimpleNamespace(**draws))


@pytest.mark.parametrize('last, W, windows', [
    ([0], 64, 11), ([0, 0, 0, 1], 64, 11), ([0, 0, 1, 2], 64, 1), ([0, 1, *[IGNORED] * 6], 64, 1),
    ([0, *[IGNORED] * 3], 64, 11), ([0, 1], 128, 1)])  # at 128 the long side is cut to 4 short ones, 64
def test_a_window_is_drawn_again_up_to_ten_times_while_one_class_has_three_quarters_of_what_is_labelled(
        last, W, windows, monkeypatch):
    """The last columns of a mask, which is 2 elsewhere, are drawn each time."""
    sides = []
    rng_of(monkeypatch, uniform=lambda *_: 1.0, random=lambda: 0.9, integers=lambda n: sides.append(n) or n - 1)
    mask = torch.tensor(last, dtype=torch.uint8).repeat_interleave(W // 4 // len(last)).repeat(16, 1)
    _, window = augmented(F.pad(mask, (W - W // 4, 0), value=2), 16, 0, distort=False)
    assert sides == [1, 49] * windows and {*window[:8].unique().tolist()} == {*last}


@pytest.mark.parametrize('draw, row', [(0.49, range(15, -1, -1)), (0.5, range(16))])
def test_half_of_the_images_are_mirrored_and_sizes_go_from_half_to_double(draw, row, monkeypatch):
    limits = []
    rng_of(monkeypatch, uniform=lambda *given: limits.append(given) or 2.0, random=lambda: draw, integers=lambda n: 0)
    _, window = augmented(torch.arange(16, dtype=torch.uint8).repeat(16, 1), 16, 0, distort=False)
    assert limits == [(0.5, 2)] and window[0].tolist() == [x for x in row for _ in range(2)][:16]


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('draw, end, greys', [
    (0.49, 0, [0, 34, 109]),  # (100 - 32) * 0.5
    (0.49, 1, [63, 198, 255]),  # (100 + 32) * 1.5
    (0.5, None, [10, 100, 250])])
def test_each_half_of_the_time_brightness_contrast_saturation_and_hue_change_or_with_contrast_last(
        draw, end, greys, last):
    """All at the ends of their ranges: of grey, saturation and hue change nothing. Colours stay colours."""
    draws, drawn = iter([0.49 if last else 0.5, *[draw] * 4]), []
    rng = SimpleNamespace(random=lambda: next(draws), uniform=lambda *limits: drawn.append(limits) or limits[end])
    found = segmentation.distort(torch.tensor([10, 100, 250], dtype=torch.uint8).expand(3, 1, 3), rng)
    torch.testing.assert_close(found[:, 0], torch.tensor(greys).float().expand(3, 3), rtol=0, atol=0.1)
    brightness, contrast, saturation, hue = (-32 / 255, 32 / 255), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)
    order = [brightness, saturation, hue, contrast] if last else [brightness, contrast, saturation, hue]
    assert drawn == (order if draw < 0.5 else [])


def test_augmentation_depends_on_its_seed_alone():
    """By which data.py gives each picture its own, and another one in each epoch."""
    mask = torch.arange(16, dtype=torch.uint8).repeat(16, 1)
    found = [augmented(mask, 16, seed)[0].numpy().tobytes() for seed in (0, 0, 1, 2)]
    assert found[0] == found[1] and len({*found}) == 3


def test_without_augmentation_the_middle_of_an_image_and_of_its_mask_is_taken():
    mask = torch.arange(140, dtype=torch.uint8).view(10, 14) % 6
    image, window = segmentation.centre(picture_of(mask), mask, settings(img_size=8).backbone, None, None)
    assert torch.equal(window, mask[1:9, 3:11]) and torch.equal(image, picture_of(window))


def test_setrs_schedule_falls_to_a_hundredth():
    assert [train.schedule(step, 10, 0.0, 'poly') for step in (0, 5)] == pytest.approx([1, 0.99 * 0.5 ** 0.9 + 0.01])
    assert train.schedule(10 ** 6 - 1, 10 ** 6, 0.0, 'poly') == pytest.approx(0.01, abs=1e-4)
    assert train.schedule(1, 20, 0.2, 'poly') == 0.5 and train.schedule(4, 20, 0.2, 'poly') == 1


# ---- Pictures of shapes with masks ----------------------------------------------------------------------

def test_a_mask_is_where_the_blue_shape_is_and_says_which_shape():
    how = settings(n_train=30, n_val=5, n_test=5, grain=0.0)
    task = data.load(how)
    assert task.classes == ['other', *shapes.SHAPES] and len(task.train) == 30
    assert task.guess == pytest.approx(2.6 * log(4)) and task.measure == 'mIoU'  # five heads guess
    _, answers, _ = shapes.draw_shapes(30, how.options, seed=0)
    for (image, mask), shape in zip(task.train, answers):
        grey, blue = image[:, :1, :1].float(), torch.tensor(shapes.COLOURS['blue']).view(3, 1, 1)
        part = (image[2] - grey[2]) / (blue[2] - grey[2])  # of blue in a pixel, if it is a mixture of grey and blue
        mixture = (image - grey - part * (blue - grey)).abs().amax(dim=0) < 6
        sure = mixture & ((part - 0.5).abs() > 0.05)  # the colours are whole numbers
        assert set(mask.unique().tolist()) == {0, 1 + shape}
        assert mixture[mask > 0].all() and torch.equal(mask[sure] > 0, part[sure] > 0.5)
    images = [image.numpy().tobytes() for part in (task.train, task.val, task.test) for image, _ in part]
    assert len({*images}) == 40  # none is in two sets


FLAT, NONE = torch.zeros(48, 48, dtype=torch.uint8), torch.full((48, 48), IGNORED, dtype=torch.uint8)
UNLABELLED = 'no pixel of the pictures of {} is labelled'.format


@pytest.mark.parametrize('train, val, test, scales, said', [
    ([NONE], [], [FLAT], [], UNLABELLED('train')), ([FLAT], [NONE], [FLAT], [], UNLABELLED('val')),
    ([FLAT], [], [NONE], [], UNLABELLED('test')),
    ([FLAT], [], [FLAT, FLAT + 2], [], 'a mask of test is torch.uint8 .48, 48. with .2., not uint8'),
    ([FLAT.long()], [], [FLAT], [], 'a mask of train is torch.int64'),
    ([FLAT[1:]], [], [FLAT], [], 'a mask of train is torch.uint8 .47, 48.'),
    ([FLAT], [], [FLAT], [1, 0], 'scales has numbers above 0 and up to 4, not .1, 0.')])
def test_masks_and_scales_that_cannot_be_used_are_refused(train, val, test, scales, said):
    sets = [[(torch.zeros(3, 48, 48, dtype=torch.uint8), mask) for mask in masks] for masks in (train, val, test)]
    with pytest.raises(InputError, match=said):
        segmentation.task(*sets, ['road', 'sky'], scales=scales)


# ---- Pictures and masks in files: ADE20K, and a task of one's own ---------------------------------------

def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ade(folder, train=7, val=3):
    """A small ADE20K as it is unpacked, in pictures of different sizes. Returns its folder."""
    root = folder / 'ADEChallengeData2016'
    for part, n, name in (('training', train, 'train'), ('validation', val, 'val')):
        for i in range(n):
            H, W = 40 + i, 56 - 2 * i
            mask = np.random.default_rng((i, n)).choice(np.uint8([0, 7, 150]), (5, 6))
            mask = mask.repeat(8 + i, 0).repeat(10, 1)[:H, :W]
            save(np.stack([mask, 255 - mask, mask // 2], axis=-1), root / f'images/{part}/ADE_{name}_{i + 1:08d}.jpg')
            save(mask, root / f'annotations/{part}/ADE_{name}_{i + 1:08d}.png')
    return root


def ade_settings(folder, **changes):
    changes = TINY | dict(data=str(folder), n_train=5, n_val=2, n_test=3, img_size=16, batch=4, N=2, lr=0.3,
                          scales=[0.5, 1.5]) | changes
    return train.settings_of(CONFIGS, 'ade20k', NANO, 'cdc_da', changes)


def test_ade20k_is_read_as_it_is_unpacked_and_label_0_is_ignored(tmp_path):
    root = ade(tmp_path)
    (root / 'images' / 'training' / '._ADE_train_00000001.jpg').write_bytes(b'a Mac was here')
    task = data.load(ade_settings(tmp_path, n_test=4))
    assert [len(part) for part in (task.train, task.val, task.test)] == [5, 2, 3] and len(task.classes) == 150
    assert task.notes == [f'ADE20K in {root}', '3 images to test on, and not 4'] and [*task.augments] == ['scale_crop']
    assert [path.name for path, _ in task.test.samples] == [f'ADE_val_0000000{i}.jpg' for i in (1, 2, 3)]
    assert {path.parent.name for part in (task.train, task.val) for path, _ in part.samples} == {'training'}
    assert len({path for part in (task.train, task.val) for path, _ in part.samples}) == 7
    image, mask = task.test[1]
    pixels = np.asarray(Image.open(root / 'annotations/validation/ADE_val_00000002.png')).astype(int)
    assert image.shape == (3, 41, 54) and mask.shape == (41, 54)
    assert mask.tolist() == np.where(pixels == 0, IGNORED, pixels - 1).tolist()


def test_an_image_that_exif_turns_is_refused_beside_a_mask(tmp_path):
    """A mask does not say whether it was turned too."""
    image, mask = tmp_path / 'image.jpg', tmp_path / 'mask.png'
    save(np.zeros((3, 4), np.uint8), mask)
    (exif := Image.Exif())[0x0112] = 3
    Image.new('RGB', (4, 3)).save(image, exif=exif)
    with pytest.raises(InputError, match='image.jpg: its EXIF data turn it, .* save it upright'):
        segmentation.MaskFiles([(image, mask)], 3)[0]


THIRD = 'annotations/training/ADE_train_00000003.png'
SECOND = 'images/validation/ADE_val_00000002.jpg'


@pytest.mark.parametrize('file, change, said', [
    (THIRD, lambda x: x[1:], 'ADE_train_00000003.png: not the mask of an image .it has .41, 52. pixels'),
    (THIRD, lambda x: np.full_like(x, 151), 'ADE_train_00000003.png: .* label 151'),
    (THIRD, lambda x: x.astype(np.uint16), 'ADE_train_00000003.png: .* mode is I;16'),
    (THIRD, lambda x: np.stack([x] * 3, axis=-1), 'ADE_train_00000003.png: .* mode is RGB'),
    (THIRD, 60, 'ADE_train_00000003.png: not the mask'),
    (THIRD, None, 'ADE_train_00000003.jpg: there is no mask for it'),
    (SECOND, None, 'ADE_val_00000002.png: there is no image for it'),
    (SECOND, 2, 'ADE_val_00000002.jpg: not an image'),
    ('*/training/*', None, 'images/training: no images there'),
    ('annotations/training/*', np.zeros_like, 'no pixel of the pictures of train is labelled')])
def test_bad_pictures_are_refused_with_one_line_with_the_files_name_before_training(file, change, said, tmp_path):
    """A file is changed, cut after some bytes, or gone."""
    for path in ade(tmp_path).glob(file):
        if callable(change):
            save(change(np.asarray(Image.open(path))), path)
        elif change:
            path.write_bytes(path.read_bytes()[:change])
        else:
            path.unlink()
    settings = ade_settings(tmp_path)
    with pytest.raises(InputError, match=said) as error:
        for pictures in train.sets(data.load(settings), settings):
            data.in_memory(pictures, settings.machine, CPU)
    assert '\n' not in str(error.value)


def test_the_classes_have_the_names_that_lie_beside_the_pictures(tmp_path):
    names = ade(tmp_path) / 'objectInfo150.txt'
    assert data.load(ade_settings(tmp_path)).classes[:2] == ['1', '2']
    rows = [f'{i + 1}\t0.1\t1\t1\t0\tthing {i}, object {i}  ' for i in range(150)]
    names.write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tStuff\tName', *rows]) + '\n')
    assert data.load(ade_settings(tmp_path)).classes == [f'thing {i}' for i in range(150)]
    names.write_text('\n'.join(rows))
    for changes, said in ({}, 'objectInfo150.txt: 149 names, and not 150'), ({'classes': 20}, 'classes=20: ADE20K has'):
        with pytest.raises(InputError, match=said):
            data.load(ade_settings(tmp_path, **changes))


def test_a_run_on_ade20k_has_all_scores_and_the_same_bits_from_memory_or_files_and_after_an_interruption(tmp_path):
    ade(tmp_path)
    result = train.run(ade_settings(tmp_path, runs=str(tmp_path / 'whole')))
    scores = [result[name] for name in ('accuracy', 'pixel_accuracy', 'multi_scale')]
    assert 0 < min(scores) < max(scores) < 1 and len({*scores}) == 3 and result['images'] == 3
    settings = ade_settings(tmp_path, runs=str(tmp_path / 'parts'), cache_gb=0.0)
    stop_after_an_epoch(settings)
    again = train.run(settings)  # its batch norms, too, go on
    assert again['params_digest'] == result['params_digest'] and again['multi_scale'] == scores[2]


def test_a_file_that_the_project_does_not_know_brings_a_task_with_masks_and_a_method(tmp_path, monkeypatch, capsys):
    """The example of segmentation.py, as it stands there, in a run from another folder."""
    lines = segmentation.__doc__.split('\n\n    from')[1].split('\n    python')[0]
    (tmp_path / 'my_masks.py').write_text(('from' + lines).replace('\n    ', '\n') + inspect.getsource(own))
    for i, part in enumerate(['train'] * 6 + ['val'] * 2 + ['test'] * 3):
        mask = np.random.default_rng(i).integers(0, 3, (5, 6), dtype=np.uint8).repeat(8 + i, 0).repeat(10, 1)
        save(np.stack([80 * mask] * 3, axis=-1), tmp_path / 'data' / 'roads' / part / f'{i}.jpg')
        save(mask, tmp_path / 'data' / 'roads' / part / f'{i}.png')
    monkeypatch.chdir(tmp_path)
    command = ['--task', 'my_masks.py:roads', '--model', NANO, '--method', 'vpt,my_masks.py:Shift']
    assert run(tmp_path / 'runs', *command, augment='scale_crop', img_size=24, batch=4) == 0
    out, folders = capsys.readouterr().out, folders_of(tmp_path / 'runs')
    assert 'task      my_masks.py:roads: 6 + 2 images' in out and 'that of a guess' not in out
    assert [folder.parent.name.split(',')[0] for folder in folders] == ['my_masks.py_Shift', 'vpt']
    for result in map(train.read_result, folders):
        assert result['classes'] == ['road', 'sky'] and log(2) < result['final_loss'] < 2.6 * log(2)  # of five heads
        assert 0 < result['accuracy'] < 1 and 0 < result['pixel_accuracy'] < 1 and 'multi_scale' not in result


@pytest.mark.parametrize('first, expected', [(1, [[255, 0, 1]]), (0, [[0, 1, 2]])])
def test_masks_in_files_count_from_1_with_0_for_no_label_or_from_0_with_255_and_may_have_a_palette(
        first, expected, tmp_path):
    mask, path = Image.fromarray(np.uint8([[0, 1, 2]])), tmp_path / 'a.png'
    mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])  # as mmsegmentation's tools write it
    mask.save(path)
    assert mask.mode == 'P' and segmentation.read_mask(path, (1, 3), 3, first).tolist() == expected
    save(np.uint8([[255, 1, 3 + first]]), path)
    with pytest.raises(InputError, match=f'has the label {(3, 255)[first]}, and they go from {first} to {2 + first}'):
        segmentation.read_mask(path, (1, 3), 3, first)


# ---- Runs -----------------------------------------------------------------------------------------------


BOTH = '--task', 'shapes_masks', '--method', 'linear,cdc'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of the runs of linear probing and CDC."""
    folder = tmp_path_factory.mktemp('runs')
    assert run(folder, *BOTH, **SMALL) == 0
    return folder


def test_look_draws_picture_truth_and_each_answer_side_by_side_and_paints_an_answer_over_a_photo(runs, tmp_path):
    """And a finished run answers as when it was scored."""
    assert run(runs, *BOTH, program=look, **SMALL) == 0
    drawn, side = np.asarray(Image.open(next(runs.rglob('masks*.png')))).astype(int)[18:], look.TILE + 2
    assert drawn.shape == (3 * side + 2, 4 * side + 2, 3)  # below the words: three test pictures, two runs
    for column, method in enumerate(('linear', 'cdc'), start=2):
        (settings, task, model, *_), same = opened(tiny('shapes_masks', method, runs=runs, **SMALL))
        assert same
        for row, (image, mask) in enumerate(task.test):
            found = look.painted(image, answer(model, image, settings, CPU), 4)
            for at, picture in (0, image), (1, look.painted(image, mask, 4)), (column, found):
                tile = drawn[2 + row * side:(row + 1) * side, 2 + at * side:(at + 1) * side]
                assert (tile == data.resize(picture, [look.TILE, look.TILE]).permute(1, 2, 0).numpy()).all()
    save(np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8), tmp_path / 'a.png')
    assert run(runs, *BOTH, '--image', str(tmp_path / 'a.png'), program=look, **SMALL) == 0
    assert Image.open(train.folder_of(settings) / 'a-mask.png').size == (70, 30)


def test_noise_and_one_picture_with_runs_without_masks_are_refused_in_one_line(runs, capfd):
    assert run(runs, *BOTH, program=noise, **SMALL) == 2
    assert 'this is segmentation' in capfd.readouterr().err
    assert run(runs, '--task', 'where_blue', '--method', 'linear', **SMALL) == 0
    assert run(runs, '--task', 'shapes_masks,where_blue', '--method', 'linear', program=look, **SMALL) == 2
    assert 'runs with masks are drawn by themselves' in one_line(capfd)
