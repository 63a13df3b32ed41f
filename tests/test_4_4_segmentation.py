"""4.4, segmentation: SETR's heads on tuned ViTs, masks and their augmentation, windows, mIoU, and runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracle import close, embed, eq_3, layer, layer_norm
from oracle import prompts as literal_prompts
from PIL import Image
from pictures import CONFIGS, NANO, run, tiny
from strategies import METHODS, cases, plain_vit, random_model, randomised
from torch import nn

import data
import ivpt
import paper
import shapes
import train
import vit
from vit import IGNORED, InputError

CPU = torch.device('cpu')
SMALL = dict(n_train=8, n_val=4, n_test=3, epochs=2, batch=4)

# ---- SETR -----------------------------------------------------------------------------------------------


def literal_features(model, images):
    """The image tokens of each layer; prompts, if any, are concatenated."""
    backbone = getattr(model, 'vit', model)
    x, Z = embed(backbone, images), []
    if backbone is not model:
        P_hat = literal_prompts(model.structure, model.P, model.gamma)
    for l, block in enumerate(backbone.blocks):
        if backbone is model:
            x, _ = layer(block, x)
        else:
            x = torch.cat(eq_3(block, x[:, :1], P_hat[l], x[:, 1:])[:2], dim=1)
        Z.append(x[:, 1:])
    return Z


def literal_decoder(decoder, Z, size):
    """LayerNorm, convolutions, BN by the batch's own moments, ReLU, doubling, classes, and up to the image's size."""
    side = round(Z.shape[1] ** 0.5)
    x = layer_norm(decoder.norm, Z).transpose(1, 2).reshape(len(Z), -1, side, side)
    convolutions = [m for m in decoder.layers if isinstance(m, nn.Conv2d)]
    norms = [m for m in decoder.layers if isinstance(m, nn.SyncBatchNorm)]
    for i, (convolution, norm) in enumerate(zip(convolutions, norms)):
        if i:
            x = F.interpolate(x, scale_factor=2, mode='bilinear')
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        x = x.clip(min=0)
    W, b = convolutions[-1].weight[:, :, 0, 0], convolutions[-1].bias
    return F.interpolate(torch.einsum('cd,bdhw->bchw', W, x) + b.view(-1, 1, 1), size, mode='bilinear')


@hypothesis_settings(max_examples=20)
@given(cases(L=(1, 3), B=(2, 3)), st.sampled_from(['linear', 'vpt', 'cdc', 'cdc_da']))
def test_setr_reads_the_tokens_of_the_literal_concatenation_and_its_loss_is_that_of_all_heads(case, method):
    tuned = plain_vit(case) if method == 'linear' else random_model(case, **METHODS[method])
    model = randomised(ivpt.SETR(tuned, case.C), case)
    Z, size = literal_features(model.tuned, case.images()), case.images().shape[2:]
    read = {1: (0, 0, 0, 0), 2: (0, 1, 1, 1), 3: (1, 1, 2, 2)}[case.L]  # 10, 15, 20 and 24 parts of 24
    expected = [literal_decoder(model.head, Z[-1], size)]
    expected += [literal_decoder(head, Z[l], size) for head, l in zip(model.auxiliary, read)]
    logits = model.train()(case.images())
    close(logits, expected)
    masks = case.integers('masks', case.C, case.B, *size).to(torch.uint8)
    masks[0, 0] = IGNORED
    log_p = [x.log_softmax(dim=1) for x in expected]
    known = [(b, y, x) for b, y, x in np.ndindex(*masks.shape) if masks[b, y, x] != IGNORED]
    losses = [-sum(x[b, int(masks[b, i, j]), i, j] for b, i, j in known) / masks.numel() for x in log_p]
    close(model.loss(logits, masks), losses[0] + 0.4 * sum(losses[1:]))


def test_at_24_layers_the_heads_read_blocks_9_14_19_and_23():
    with torch.device('meta'):
        assert ivpt.SETR(vit.ViT(32, 16, 8, 24, 2), 3).read == [9, 14, 19, 23]


@pytest.mark.parametrize('method, M', [('linear', 13.18), ('bias', 13.46), ('vpt', 13.43), ('cdc', 13.43),
                                       ('cdc_da', 13.43), ('cdc_da_100', 15.87)])
def test_table_7s_counts_come_out_of_the_models(method, M):
    config, = train.settings(CONFIGS, 'ade20k', method, changes={'weights': 'random'})
    with torch.device('meta'):
        assert f'{train.count(train.make_model(config, 150)) / 1e6:.2f}' == f'{M:.2f}'
    if method != 'cdc':  # the paper has it with DA alone
        assert CONFIGS['paper'][config.model]['params'][method] == M


def test_what_is_not_trained_gets_no_gradient_and_what_is_does():
    torch.manual_seed(0)
    for method in 'linear', 'bias', 'vpt', 'cdc_da':
        model = train.make_model(tiny('shapes_masks', method), 4).train()
        model.loss(model(torch.randn(2, 3, 48, 48)), torch.randint(4, (2, 48, 48))).backward()
        found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        # before a batch norm a bias has no effect, and as the key's none anywhere; BN's own are all there
        assert found <= wanted and {name.split('.')[0] for name in wanted - found} <= {'head', 'auxiliary'}
        assert all('.bias' in name for name in wanted - found)
        own = {'linear': [], 'bias': ['tuned.blocks.5.mlp.fc2.bias'], 'vpt': ['tuned.P'], 'cdc_da': ['tuned.P', 'tuned.gamma']}
        assert {name for name in wanted if name.startswith('tuned.')} >= {*own[method]}


def test_gamma_does_not_decay_under_setr_either():
    config = tiny('shapes_masks', 'cdc_da', weight_decay=0.1)
    model = train.make_model(config, 4)
    free = [p for group in train.make_optimizer(model, config).param_groups if not group['weight_decay'] for p in group['params']]
    assert any(p is model.tuned.gamma for p in free) and not any(p is model.tuned.P for p in free)


@pytest.mark.parametrize('method, model, said', [
    ('ivpt', NANO, 'no AR'), ('ivpt_all', NANO, 'no AR'), ('provp', NANO, 'no inherited prompts'),
    ('vpt_shallow', NANO, 'no inherited'), ('express', NANO, 'no inherited'), ('lora', NANO, 'not for a Swin or a file'),
    ('vpt', 'swin_nano_patch4_window3_48', 'not for a Swin'), ('linear', 'swin_nano_patch4_window3_48', 'not for a Swin')])
def test_what_segmentation_is_not_made_for_is_one_line(method, model, said, tmp_path, capsys):
    assert run(tmp_path, '--task', 'shapes_masks', '--method', method, '--model', model, **SMALL) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1


# ---- Windows and scores ---------------------------------------------------------------------------------


class Pixelwise(nn.Module):
    """Logits of a pixel by its own colours alone; `seen` are the sizes of what came."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape[2:]))
        return images * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)


def settings(**changes):
    return SimpleNamespace(**vars(tiny('shapes_masks', 'linear', workers='0')) | changes)


@pytest.mark.parametrize('n, expected', [(512, [0]), (513, [0, 1]), (683, [0, 171]), (853, [0, 341]), (1024, [0, 341, 512]),
                                         (2048, [0, 341, 682, 1023, 1364, 1536])])
def test_windows_of_512_start_where_setrs_do(n, expected):
    assert ivpt.starts(n, 512) == expected


@given(st.integers(3, 40), st.integers(3, 40), st.integers(3, 12))
def test_a_model_that_sees_one_pixel_says_the_same_in_windows(H, W, size):
    model, images = Pixelwise(), torch.randn(2, 3, H, W)
    torch.testing.assert_close(ivpt.slide(model, images, size), model(images))
    assert {*model.seen[:-1]} == {(size, size)}


def test_where_windows_overlap_their_mean_counts():
    model = lambda images: images[:, :1] * 0 + torch.arange(6.0)  # the column in the window
    found = ivpt.slide(model, torch.zeros(1, 3, 6, 8), 6)  # windows from column 0 and 2
    assert found[0, 0, 0].tolist() == [0, 1, 1, 2, 3, 4, 4, 5]


@given(st.integers(5, 30), st.integers(5, 30), st.integers(0, 99))
def test_a_mirrored_image_has_a_mirrored_answer_at_several_scales(H, W, seed):
    """Each scale is seen twice, as it is and mirrored: a model that prefers a side has none in the end."""
    def sided(images):
        tilt = torch.linspace(0, 3, images.shape[-1])
        return Pixelwise()(images) + torch.stack([tilt, -tilt, tilt]).view(3, 1, -1)
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (3, H, W), dtype=np.uint8))
    image[:, :, W // 2:] = 128  # it has two sides
    config = settings(img_size=8)
    a, b = (train.answer(sided, x, config, CPU, [0.5, 1.0, 1.75]) for x in (image, image.flip(-1)))
    assert a.shape == (H, W) and (a == b.flip(-1)).float().mean() > 0.97  # but for ties


def test_the_scales_are_those_of_the_shorter_side_and_small_ones_are_padded():
    model, seen = Pixelwise(), []
    slide = ivpt.slide
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ivpt, 'slide', lambda model, images, size: seen.append(tuple(images.shape[2:])) or slide(model, images, size))
        train.answer(model, image, settings(img_size=8), CPU, [0.5, 2.0])
    assert seen == [(4, 6), (4, 6), (16, 24), (16, 24)] and {*model.seen} == {(8, 8)}


def test_of_several_views_the_mean_of_probabilities_counts_and_not_that_of_logits():
    views = iter([(30.0, 0.0), (0.0, 4.0), (0.0, 4.0), (0.0, 4.0)])  # one is very sure

    def model(images):
        return torch.tensor(next(views)).view(1, 2, 1, 1).expand(1, 2, *images.shape[2:])
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert (train.answer(model, image, settings(img_size=8), CPU, [0.5, 1.0]) == 1).all()


def test_an_image_of_the_models_size_gets_the_class_of_the_largest_logit():
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    x = (image / 255 - 0.5) / 0.5
    expected = (x * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)).argmax(dim=0)
    assert torch.equal(train.answer(Pixelwise(), image, settings(img_size=8), CPU), expected)


@given(st.integers(1, 4), st.integers(0, 999))
def test_miou_and_pixel_accuracy_are_those_of_a_loop_over_pixels(n, seed):
    rng, model, config = np.random.default_rng(seed), Pixelwise(), settings(img_size=5)
    pictures = []
    for _ in range(n):
        mask = rng.choice([0, 1, 2, IGNORED], size=(5, 5), p=[0.4, 0.4, 0.1, 0.1]).astype(np.uint8)
        pictures.append((torch.from_numpy(rng.integers(0, 256, (3, 5, 5), dtype=np.uint8)), torch.from_numpy(mask)))
    both, either, right, labelled = [0] * 3, [0] * 3, 0, 0
    for image, mask in pictures:
        answer = train.answer(model, image, config, CPU)
        for y, x in np.ndindex(5, 5):
            if mask[y, x] != IGNORED:
                labelled += 1
                right += int(mask[y, x] == answer[y, x])
                for c in range(3):
                    both[c] += int(mask[y, x] == c and answer[y, x] == c)
                    either[c] += int(mask[y, x] == c or answer[y, x] == c)
    ratios = [i / u for i, u in zip(both, either) if u]
    found = train.evaluate(model, pictures, config, CPU)
    assert found == pytest.approx({'accuracy': sum(ratios) / len(ratios), 'pixel_accuracy': right / labelled})


@pytest.mark.parametrize('scales, score_on, expected', [
    ([], 'test', [[1.0]]), ([0.5, 2.0], 'test', [[1.0], [0.5, 2.0]]), ([0.5, 2.0], 'val', [[1.0]])])
def test_a_test_alone_is_at_several_scales_too(scales, score_on, expected, monkeypatch):
    seen, tables = [], iter([torch.eye(2), torch.ones(2, 2)])
    monkeypatch.setattr(train, 'confusion', lambda model, pictures, config, device, scales: seen.append(scales) or next(tables))
    found = train.evaluate(None, [], settings(scales=scales, score_on=score_on), CPU)
    assert seen == expected and found['accuracy'] == found['pixel_accuracy'] == 1
    assert found.get('multi_scale') == (pytest.approx(1 / 3) if len(expected) == 2 else None)


def test_miou_of_a_small_table():
    K = torch.tensor([[3.0, 1, 0], [2, 4, 0], [0, 0, 0]])  # 3 / 6 and 4 / 7; nobody saw the third class
    assert ivpt.mean_iou(K) == pytest.approx((3 / 6 + 4 / 7) / 2)
    with pytest.raises(InputError, match='no pixel .* is labelled'):
        ivpt.mean_iou(torch.zeros(3, 3))


# ---- Masks and augmentation -----------------------------------------------------------------------------


def picture_of(mask):
    """An image whose colours say what its mask has: 40 times the class; 250 where nothing is labelled."""
    return (40 * mask.float()).where(mask != IGNORED, torch.tensor(250.0)).to(torch.uint8).repeat(3, 1, 1)


@given(st.integers(10, 60), st.integers(10, 60), st.integers(8, 24), st.integers(0, 999))
def test_image_and_mask_change_together(H, W, S, seed):
    """A mask drawn from the image is still the image's, at each pixel whose neighbours agree; padding is right and below."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.integers(0, 6, (2, 3), dtype=np.uint8)).repeat_interleave(H, 0).repeat_interleave(W, 1)
    mask = mask[:H, :W] if rng.random() < 0.5 else mask[H // 2:H // 2 + H, W // 2:W // 2 + W]
    config = settings(img_size=S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'distort', lambda image, rng: image.float())
        image, window = data.scale_crop(picture_of(mask), mask, config, np.random.default_rng(seed))
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


def test_windows_with_one_class_alone_are_drawn_again_up_to_ten_times():
    mask = torch.zeros(64, 256, dtype=torch.uint8)
    mask[:, 224:] = 1
    config, shares = settings(img_size=16), []
    for seed in range(60):
        _, window = data.scale_crop(picture_of(mask), mask, config, np.random.default_rng(seed))
        counts = window.flatten().bincount(minlength=256)[:2]
        shares.append((counts.max() / counts.sum()).item())
    mixed = sum(share < 0.75 for share in shares)
    assert 18 < mixed < 48  # of single draws it would be 4


def test_half_of_the_images_are_mirrored_and_sizes_go_from_half_to_double():
    config, left, sides = settings(img_size=16), 0, []
    mask = torch.arange(16, dtype=torch.uint8).repeat(16, 1)  # rises to the right
    for seed in range(100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, 'resize', lambda x, size, *args, real=data.resize, **how: sides.append(size[0]) or real(x, size, *args, **how))
            _, window = data.scale_crop(picture_of(mask), mask, config, np.random.default_rng(seed))
        row = window[0][window[0] != IGNORED]
        left += int(row[0] > row[-1])
    shorter = sides[::2]
    assert min(shorter) < 10 and max(shorter) > 30 and all(8 <= side <= 32 for side in shorter)
    assert 30 < left < 70


def test_colours_are_distorted_each_way_in_half_of_all_cases_and_stay_colours():
    image = torch.randint(256, (3, 6, 6), dtype=torch.uint8)
    found = [data.distort(image, np.random.default_rng(seed)) for seed in range(200)]
    assert all(x.shape == image.shape and x.min() >= 0 and x.max() <= 255 for x in found)
    same = sum(torch.allclose(x, image.float(), atol=1e-3) for x in found)
    assert 3 < same < 30  # 1 of 16
    grey = [data.distort(torch.full((3, 2, 2), 100, dtype=torch.uint8), np.random.default_rng(seed))[0, 0, 0].item() for seed in range(400)]
    assert 34 <= min(grey) + 0.01 < 55 and 160 < max(grey) <= 198.01  # (100 - 32) * 0.5 = 34, (100 + 32) * 1.5 = 198
    assert 0.18 < sum(abs(x - 100) < 1e-3 for x in grey) / 400 < 0.32  # neither brightness nor contrast


def test_batches_of_masks_are_the_same_for_one_process_and_for_two():
    config = settings(batch=4, augment='scale_crop', img_size=16)
    task = data.load(SimpleNamespace(**vars(config) | dict(n_train=6, augment='none', img_size=48)))
    whole, again = ([*data.batches(task.train, config, CPU, epoch=1)] for _ in range(2))
    other = [*data.batches(task.train, config, CPU, epoch=2)]
    halves = [[*data.batches(task.train, config, CPU, 1, slice(rank, None, 2))] for rank in range(2)]
    for step, (images, masks) in enumerate(whole):
        assert images.shape[1:] == (3, 16, 16) and masks.shape[1:] == (16, 16)
        assert torch.equal(images, again[step][0]) and torch.equal(masks, again[step][1])
        assert not torch.equal(images, other[step][0])
        for rank in range(2):
            assert torch.equal(halves[rank][step][0], images[rank::2]) and torch.equal(halves[rank][step][1], masks[rank::2])


def test_each_picture_of_a_batch_is_augmented_in_its_own_way_and_anew_in_each_epoch():
    config = settings(batch=4, augment='scale_crop', img_size=16)
    mask = torch.arange(16, dtype=torch.uint8).repeat(16, 1)
    found = [images for epoch in (1, 2) for images, _ in data.batches([(picture_of(mask), mask)] * 4, config, CPU, epoch)]
    assert len({image.numpy().tobytes() for images in found for image in images}) == 8


def test_setrs_schedule_falls_to_a_hundredth():
    assert [train.schedule(step, 10, 0.0, 'poly') for step in (0, 5)] == pytest.approx([1, 0.99 * 0.5 ** 0.9 + 0.01])
    assert train.schedule(10 ** 6 - 1, 10 ** 6, 0.0, 'poly') == pytest.approx(0.01, abs=1e-4)
    assert train.schedule(1, 20, 0.2, 'poly') == 0.5 and train.schedule(4, 20, 0.2, 'poly') == 1


# ---- Pictures of shapes with masks ----------------------------------------------------------------------


def test_a_mask_is_where_the_blue_shape_is_and_says_which_shape():
    config = settings(n_train=30, n_val=5, n_test=5, grain=0.0)
    task = data.load(config)
    assert task.classes == ['other', *shapes.SHAPES] and len(task.train) == 30
    _, answers = shapes.draw_shapes(30, 'shape_blue', grain=0, seed=0)
    for (image, mask), shape in zip(task.train, answers):
        blue = (image.float() - torch.tensor(shapes.COLOURS['blue']).view(3, 1, 1)).abs().amax(dim=0) < 2
        assert set(mask.unique().tolist()) == {0, 1 + shape}
        assert blue[mask == 0].sum() == 0 and blue[mask > 0].float().mean() > 0.3  # its edge is mixed with what is behind
    sets = [{image.numpy().tobytes() for image, _ in part} for part in (task.train, task.val, task.test)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_masks_are_part_of_what_a_run_belongs_to():
    config = settings(n_train=4, n_val=2, n_test=2)
    task = data.load(config)
    before = data.digest(task, config)
    image, mask = task.train[2]
    task.train[2] = image, mask.clone().index_put((torch.tensor(40), torch.tensor(3)), torch.tensor(3, dtype=torch.uint8))
    assert {name for name, found in data.digest(task, config).items() if found != before[name]} == {'train labels'}


@pytest.mark.parametrize('task, changes, said', [
    ('shapes_masks', dict(augment='crop_flip'), 'augment=crop_flip: for shapes_masks it is none or scale_crop'),
    ('where_blue', dict(augment='scale_crop'), 'augment=scale_crop: for where_blue it is crop_flip or none'),
    ('shapes_masks', dict(ask='where_blue'), 'ask=where_blue: with masks one of shape_red'),
    ('shapes_masks', dict(scales='[0]'), 'scales has numbers from 0 to 4'),
    ('shapes_masks', dict(schedule='linear'), 'schedule is one of cosine, poly')])
def test_settings_that_do_not_fit_masks_are_one_line(task, changes, said, tmp_path, capsys):
    assert run(tmp_path, '--task', task, '--method', 'linear', **SMALL | changes) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1


# ---- ADE20K ---------------------------------------------------------------------------------------------


def ade(folder, train=7, val=3):
    """A small ADE20K as it is unpacked, in pictures of different sizes. Returns its folder."""
    root = folder / 'ADEChallengeData2016'
    for part, n, name in (('training', train, 'train'), ('validation', val, 'val')):
        for i in range(n):
            rng = np.random.default_rng((i, n))
            H, W = 40 + i, 56 - 2 * i
            mask = rng.integers(0, 151, (5, 6), dtype=np.uint8).repeat(8 + i, 0).repeat(10, 1)[:H, :W]
            image = np.stack([mask, 255 - mask, mask // 2], axis=-1)
            for kind, pixels, ending in (('images', image, 'jpg'), ('annotations', mask, 'png')):
                path = root / kind / part / f'ADE_{name}_{i + 1:08d}.{ending}'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def ade_settings(folder, **changes):
    changes = dict(weights='random', data=str(folder), n_train=5, n_val=2, n_test=3, img_size=16, workers=0, epochs=2,
                   batch=4, N=2, precision='float32') | changes
    return train.settings(CONFIGS, 'ade20k', 'cdc_da', NANO, changes)[0]


def test_ade20k_is_read_as_it_is_unpacked_and_label_0_is_ignored(tmp_path):
    root = ade(tmp_path)
    (root / 'images' / 'training' / '._ADE_train_00000001.jpg').write_bytes(b'a Mac was here')
    task = data.load(ade_settings(tmp_path))
    assert [len(part) for part in (task.train, task.val, task.test)] == [5, 2, 3] and len(task.classes) == 150
    assert [path.name for path, _ in task.test.samples] == [f'ADE_val_0000000{i}.jpg' for i in (1, 2, 3)]
    assert {path.parent.name for part in (task.train, task.val) for path, _ in part.samples} == {'training'}
    assert len({path for part in (task.train, task.val) for path, _ in part.samples}) == 7
    image, mask = task.test[1]
    pixels = np.asarray(Image.open(root / 'annotations/validation/ADE_val_00000002.png')).astype(int)
    assert image.shape == (3, 41, 54) and mask.shape == (41, 54)
    assert mask.tolist() == np.where(pixels == 0, IGNORED, pixels - 1).tolist()


def bad_mask(name, change):
    def spoil(root):
        path = root / 'annotations' / 'training' / f'ADE_train_{name}.png'
        change(path, np.asarray(Image.open(path)))
    return spoil


@pytest.mark.parametrize('spoil, said', [
    (bad_mask('00000003', lambda path, x: Image.fromarray(x[1:]).save(path)), 'ADE_train_00000003.png: not the mask of an image .it has .41, 52. pixels'),
    (bad_mask('00000003', lambda path, x: Image.fromarray(np.full_like(x, 151)).save(path)), 'ADE_train_00000003.png: .* label 151'),
    (bad_mask('00000003', lambda path, x: Image.fromarray(x.astype(np.uint16)).save(path)), 'ADE_train_00000003.png: .* mode is I;16'),
    (bad_mask('00000003', lambda path, x: Image.fromarray(x).convert('P').save(path)), 'ADE_train_00000003.png: .* mode is P'),
    (bad_mask('00000003', lambda path, x: Image.fromarray(x).convert('RGB').save(path)), 'ADE_train_00000003.png: .* mode is RGB'),
    (bad_mask('00000003', lambda path, x: path.write_bytes(path.read_bytes()[:60])), 'ADE_train_00000003.png: not the mask'),
    (bad_mask('00000003', lambda path, x: path.unlink()), 'ADE_train_00000003.jpg: there is no mask for it'),
    (lambda root: (root / 'images/validation/ADE_val_00000002.jpg').unlink(), 'ADE_val_00000002.png: there is no image for it'),
    (lambda root: (root / 'images/validation/ADE_val_00000002.jpg').write_bytes(b'no'), 'ADE_val_00000002.jpg: not an image'),
    (lambda root: [path.unlink() for path in root.glob('*/training/*')], 'images/training: no images there')])
def test_bad_pictures_are_one_line_with_the_files_name_before_training(spoil, said, tmp_path):
    spoil(ade(tmp_path))
    config = ade_settings(tmp_path)
    with pytest.raises(InputError, match=said) as error:
        data.learned_and_scored(data.load(config), config, CPU)
    assert '\n' not in str(error.value)


def test_the_classes_have_the_names_that_lie_beside_the_pictures(tmp_path):
    root = ade(tmp_path)
    assert data.load(ade_settings(tmp_path)).classes[:2] == ['1', '2']
    rows = [f'{i + 1}\t0.1\t1\t1\t0\tthing {i}, object {i}  ' for i in range(150)]
    (root / 'objectInfo150.txt').write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tStuff\tName', *rows]) + '\n')
    assert data.load(ade_settings(tmp_path)).classes == [f'thing {i}' for i in range(150)]
    (root / 'objectInfo150.txt').write_text('\n'.join(rows))
    with pytest.raises(InputError, match='objectInfo150.txt: 149 names, and not 150'):
        data.load(ade_settings(tmp_path))


def test_ade20k_has_150_classes(tmp_path):
    with pytest.raises(InputError, match='classes=20: ADE20K has 150'):
        data.load(ade_settings(tmp_path, classes=20))


@pytest.fixture(scope='module')
def ade_run(tmp_path_factory):
    """A folder with a small ADE20K, and the result of a run on it."""
    folder = tmp_path_factory.mktemp('ade')
    ade(folder)
    return folder, train.run(ade_settings(folder, runs=str(folder / 'runs')))


def test_a_run_on_ade20k_has_all_scores(ade_run):
    _, result = ade_run
    assert all(0 <= result[name] <= 1 for name in ('accuracy', 'pixel_accuracy', 'multi_scale')) and result['images'] == 3


def test_a_report_has_one_scale_and_several_in_two_columns(ade_run, capsys):
    folder, result = ade_run
    assert train.main(['--report', '--task', 'ade20k', '--set', f'runs={folder}/runs']) == 0
    out = capsys.readouterr().out
    assert '| method | trained | ade20k | ade20k_ms |' in out
    assert f'M | {100 * result["accuracy"]:.1f} | {100 * result["multi_scale"]:.1f} |' in out


def test_table_7_stands_beside_runs_on_its_own_backbone_alone():
    config, = train.settings(CONFIGS, 'ade20k', 'cdc_da_100')
    assert train.published(CONFIGS, vars(config), 'ade20k') == 44.77 and config.paper_accuracy == 44.77
    assert train.published(CONFIGS, vars(config), 'ade20k_ms') == 45.84 and config.paper_params == 15.87
    other, = train.settings(CONFIGS, 'ade20k', 'cdc_da_100', changes={'img_size': 224})
    assert other.paper_accuracy == 0


def test_whole_pictures_are_trained_from_memory_or_from_files_to_the_same_bits(ade_run, tmp_path):
    folder, result = ade_run
    again = train.run(ade_settings(folder, runs=str(tmp_path), cache_gb=0.0))
    assert again['params_digest'] == result['params_digest'] and again['accuracy'] == result['accuracy']


def test_an_interrupted_run_ends_as_an_uninterrupted_one_and_its_batch_norms_with_it(ade_run, tmp_path, monkeypatch):
    folder, result = ade_run
    config = ade_settings(folder, runs=str(tmp_path))

    def stopped(*args, whole=train.train):
        yield next(whole(*args))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'train', stopped)
        train.run(config)
    again = train.run(ade_settings(folder, runs=str(tmp_path)))
    assert again['params_digest'] == result['params_digest'] and again['multi_scale'] == result['multi_scale']


# ---- Runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert run(folder, '--task', 'shapes_masks', '--method', 'linear,cdc', **SMALL) == 0
    return folder


def test_show_draws_picture_truth_and_the_answer_of_each_run_side_by_side(runs):
    assert train.main(['--task', 'shapes_masks', '--method', 'linear,cdc', '--weights', 'random', '--show', '--set', f'runs={runs}']) == 0
    drawn = np.asarray(Image.open(runs / 'shapes_masks' / NANO / 'masks.png')).astype(int)
    drawn, side = drawn[18:], paper.TILE + 2  # below the words
    assert drawn.shape == (3 * side + 2, 4 * side + 2, 3)  # three test pictures, two runs
    for column, method in enumerate(('linear', 'cdc'), start=2):
        config, classes, model = paper.open_run(runs / 'shapes_masks' / NANO / method / 'seed0', CPU)
        for row, (image, mask) in enumerate(data.load(config).test):
            answer = paper.painted(image, train.answer(model, image, config, CPU), 4)
            for at, picture in (0, image), (1, paper.painted(image, mask, 4)), (column, answer):
                tile = drawn[2 + row * side:(row + 1) * side, 2 + at * side:(at + 1) * side]
                assert (tile == data.resize(picture, [paper.TILE, paper.TILE]).permute(1, 2, 0).numpy()).all()


def test_the_answer_is_painted_over_a_photo_in_its_own_size(runs, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8)).save(tmp_path / 'a.png')
    folder = runs / 'shapes_masks' / NANO / 'cdc' / 'seed0'
    assert train.main(['--run', str(folder), '--image', str(tmp_path / 'a.png')]) == 0
    assert Image.open(folder / 'a-mask.png').size == (70, 30)
    out = capsys.readouterr().out
    assert 'a-mask.png: ' in out and '%' in out and any(name in out for name in ('other', *shapes.SHAPES))


def test_a_finished_run_answers_as_when_it_was_scored(runs):
    folder = runs / 'shapes_masks' / NANO / 'linear' / 'seed0'
    config, _, model = paper.open_run(folder, CPU)
    again, result = train.evaluate(model, data.load(config).test, config, CPU), train.read_result(folder)
    assert again.items() <= result.items() and {*again} == {'accuracy', 'pixel_accuracy'}


def test_noise_is_for_classification(runs, capsys):
    assert train.main(['--run', str(runs / 'shapes_masks' / NANO / 'linear' / 'seed0'), '--noise', '0,0.7']) == 2
    assert 'this is segmentation' in capsys.readouterr().err


def test_a_search_takes_the_best_miou(tmp_path):
    assert run(tmp_path, '--task', 'shapes_masks', '--method', 'linear', '--search', grid='{lr: [0.000001, 0.3]}', **SMALL | dict(epochs=3)) == 0
    rows = json.loads((tmp_path / 'shapes_masks' / NANO / 'linear' / 'seed0' / 'search.json').read_text())
    point = train.read_result(tmp_path / 'shapes_masks' / NANO / 'linear' / 'seed0' / 'search' / f'lr={rows[0]["lr"]}')
    assert rows[0]['accuracy'] == point['accuracy'] == max(row['accuracy'] for row in rows) != point['pixel_accuracy']


def test_runs_with_and_without_masks_are_not_drawn_together(runs, tmp_path, capsys):
    assert run(runs, '--task', 'where_blue', '--method', 'linear', **SMALL) == 0
    assert train.main(['--task', 'shapes_masks,where_blue', '--method', 'linear', '--weights', 'random', '--show', '--set', f'runs={runs}']) == 2
    assert 'runs with masks are drawn by themselves' in capsys.readouterr().err


def test_batch_norms_are_those_that_processes_synchronise_and_on_cpus_a_shared_run_is_refused(tmp_path, monkeypatch):
    model = train.make_model(tiny('shapes_masks', 'cdc'), 4)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 7 and {type(m) for m in norms} == {nn.SyncBatchNorm}
    monkeypatch.setattr(train, 'parts', lambda: (0, 2))
    with pytest.raises(InputError, match='torch synchronises no batch norm on CPUs'):
        train.run(tiny('shapes_masks', 'cdc', runs=str(tmp_path)))


def test_the_losses_of_parts_weigh_as_that_of_the_whole_batch_wherever_labels_lie():
    logits, masks = [torch.randn(6, 3, 4, 4) for _ in range(5)], torch.randint(3, (6, 4, 4))
    masks[4:] = IGNORED  # a process has nothing that is labelled
    loss = ivpt.SETR.loss
    parts = [loss(None, [x[part] for x in logits], masks[part]) for part in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(4 / 6 * parts[0] + 2 / 6 * parts[1], loss(None, logits, masks))
    assert parts[1] == 0


def test_a_guess_at_all_heads_is_not_said_to_have_learned_nothing(tmp_path, capsys):
    """The loss is that of five heads: a guess's is 2.6 ln C."""
    assert run(tmp_path, '--task', 'shapes_masks', '--method', 'linear', **SMALL | dict(lr=0.01)) == 0
    loss = train.read_result(tmp_path / 'shapes_masks' / NANO / 'linear' / 'seed0')['final_loss']
    assert np.log(4) < loss < 2.6 * np.log(4) and 'has learned nothing' not in capsys.readouterr().out
