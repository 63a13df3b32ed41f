"""Appendix A, Figure 7: where the class token looks, and what AR reinforces."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import close, ivpt as literal, watch
from PIL import Image
from pictures import NANO, images_tested, save_picture
from strategies import METHODS, OTHERS, cases, random_model, random_vit
from torchvision.transforms.functional import pil_to_tensor, resize

import paper
import train
from paper import look

TINY = ['--set', 'n_train=40', 'n_val=10', 'n_test=6', 'epochs=1']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with two finished runs of the default task."""
    folder = tmp_path_factory.mktemp('runs')
    assert train.main(['--method', 'vpt,ivpt', *TINY, f'runs={folder}']) == 0
    return folder


# ---- look -----------------------------------------------------------------------------------------------


@settings(max_examples=2 * settings().max_examples)
@given(cases(L=(2, 4)), st.sampled_from(sorted(METHODS | OTHERS)))
def test_what_is_seen_is_what_the_literal_form_computes(case, method):
    """Eq. 14. w̃ of each layer; with top-k, the tokens that were chosen; the prompts that entered."""
    how = (METHODS | OTHERS)[method]
    model, images = random_model(case, **how), case.images()
    seen, expected = look(model, images), literal(model, images)
    close(seen['logits'], expected.logits.detach())
    close(seen['w'], torch.stack(expected.w, dim=1).detach())
    close(seen['P_hat'], expected.P_hat.detach())
    assert (seen['Omega'] is not None) == (how['reinforcement'] == 'topk')
    if seen['Omega'] is not None:
        assert seen['Omega'].tolist() == [list(image) for image in zip(*expected.Omega)]


@given(cases(L=(1, 3)))
def test_the_prompts_that_are_seen_are_those_that_enter_the_layers(case):
    """Eq. 5."""
    model = random_model(case, **METHODS['ivpt'])
    entered, _ = watch(model, case.images())
    close(look(model, case.images())['P_hat'], torch.stack([P for _, P in entered]).detach())


@given(cases(L=(1, 3)))
def test_a_vit_without_prompts_can_be_looked_at_too(case):
    """The weights of the class token sum to 1 with its weight on itself."""
    model = random_vit(case, num_classes=2)
    seen = look(model, case.images())
    assert seen['w'].shape == (case.B, case.L, case.M) and seen['Omega'] is seen['P_hat'] is None
    assert (seen['w'].sum(dim=2) < 1).all()


@given(cases())
def test_looking_leaves_nothing_behind(case):
    """No hook stays, even if the model fails."""
    model = random_model(case, **METHODS['ivpt'])
    before = model(case.images())
    look(model, case.images())
    with pytest.raises(ValueError):
        look(model, case.images()[:, :, 1:])
    assert not any(block._forward_hooks for block in model.vit.blocks)
    assert torch.equal(model(case.images()), before)


# ---- The picture ----------------------------------------------------------------------------------------


@given(st.sampled_from([1, 2, 6, 7, 14]), st.data())
def test_attention_lands_on_the_pixels_of_its_patch(side, draw):
    """All attention on one patch: that patch is white-hot, every other pixel is the darkened picture."""
    patch = draw.draw(st.integers(0, side * side - 1))
    w = torch.zeros(side * side)
    w[patch] = 0.3
    drawn = paper.heat_map(torch.full((3, paper.TILE, paper.TILE), 100, dtype=torch.uint8), w)
    hot = (drawn == 40 + 153).all(dim=0)
    row, column = patch // side, patch % side
    expected = torch.zeros(side, side).index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(1.0))
    pixel = (torch.arange(paper.TILE) * side).div(paper.TILE, rounding_mode='floor')
    assert torch.equal(hot, expected[pixel][:, pixel].bool())
    assert (drawn[:, ~hot] == 40).all()


def test_more_attention_is_never_darker():
    w = torch.linspace(0, 1, 16)
    drawn = paper.heat_map(torch.zeros(3, paper.TILE, paper.TILE, dtype=torch.uint8), w)
    centres = torch.arange(4) * paper.TILE // 4 + paper.TILE // 8
    brightness = drawn.sum(dim=0)[centres][:, centres].flatten()
    assert (brightness.diff() > 0).all()


@pytest.mark.parametrize('patch', [0, 5, 35])
def test_reinforced_patches_are_outlined_and_no_other(patch):
    plain = torch.zeros(3, paper.TILE, paper.TILE, dtype=torch.uint8)
    changed = (paper.heat_map(plain, torch.ones(36), [patch]) != paper.heat_map(plain, torch.ones(36))).any(dim=0)
    y, x = changed.nonzero(as_tuple=True)
    side = paper.TILE / 6
    for pixels, place in ((y, patch // 6), (x, patch % 6)):
        assert abs(pixels.min() - place * side) <= 2 and abs(pixels.max() - (place + 1) * side) <= 2
    assert not changed[y.min() + 4:y.max() - 3, x.min() + 4:x.max() - 3].any()  # an outline and no area


def test_runs_are_stacked_in_one_picture_that_opens(runs, capsys):
    """Figure 7: a row an image and method, a column the image and each of the 6 layers."""
    assert train.main(['--show', '--method', 'vpt,ivpt', '--set', f'runs={runs}']) == 0
    path = runs / 'where_blue' / 'vit_nano_patch8_48' / 'attention.png'
    assert str(path) in capsys.readouterr().out
    width, height = Image.open(path).size
    assert (width, height) == (7 * (paper.TILE + 2) + 2, 18 + 4 * 2 * (18 + paper.TILE + 4))


def test_one_run_is_shown_in_its_own_folder(runs):
    folder = runs / 'where_blue' / 'vit_nano_patch8_48' / 'vpt' / 'seed0'
    assert train.main(['--show', '--run', str(folder)]) == 0
    assert Image.open(folder / 'attention.png').size[1] == 18 + 4 * (18 + paper.TILE + 4)


def test_linear_probing_can_be_shown_and_runs_of_other_depths_not_beside_it(runs, capsys):
    nano, tiny = 'vit_nano_patch8_48', 'vit_tiny_patch16_48'
    assert train.main(['--method', 'linear', *TINY, f'runs={runs}']) == 0
    assert train.main(['--show', '--method', 'linear,vpt', '--set', f'runs={runs}']) == 0
    assert train.main(['--method', 'linear', '--model', tiny, *TINY, 'weights=random', f'runs={runs}']) == 0
    argv = '--show', '--method', 'linear', '--model', f'{nano},{tiny}', '--set', f'runs={runs}'
    assert 'different numbers of layers' in refusal(capsys, *argv)


# ---- What stands where in the picture -------------------------------------------------------------------

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """Two runs on a folder of photos that are cropped, the photos, and the images that the runs were tested on."""
    folder = tmp_path_factory.mktemp('own')
    for i, (part, c) in enumerate((part, c) for part in ('train', 'train', 'test') for c in 'abcdef'):
        save_picture(folder / 'data' / part / c / f'{i}.png', i, 90 + i, 60)
    argv = ['--task', 'folder', '--model', 'vit_nano_patch8_48', '--method', 'vpt,ivpt', '--data', str(folder / 'data'),
            '--set', f'runs={folder}']
    with images_tested() as tested:
        assert train.main([*argv, 'epochs=1', 'workers=0', 'k=4', f'mean={[*MEAN]}', f'std={[*STD]}']) == 0
    photos = sorted(str(path) for path in (folder / 'data' / 'test').rglob('*.png'))
    return SimpleNamespace(argv=argv, photos=photos, picture=folder / 'folder' / NANO / 'attention.png', tested=tested[0])


@pytest.fixture
def looked(monkeypatch):
    """What train.py looks at: (the images, what is seen of them), in order."""
    seen = []
    monkeypatch.setattr(train, 'code_in', lambda path: paper)
    monkeypatch.setattr(paper, 'look', lambda model, images: seen.append((images, look(model, images))) or seen[-1][1])
    return seen


def rows_of(path):
    """The rows of Figure 7: of each the strip above it and its tiles."""
    T = paper.TILE
    rows = pil_to_tensor(Image.open(path))[:, 18:].split(18 + T + 4, dim=1)
    return [(row[:, :18], [row[:, 20:20 + T, x:x + T] for x in range(2, row.shape[2] - 2, T + 2)]) for row in rows]


def drawn_of(image, seen, words):
    """The same, of one image [1, 3, H, W] and what one model saw of it; its tile as floats."""
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    picture = resize((image[0] * std + mean).round(), [paper.TILE] * 2)
    Omega = [()] * 6 if seen['Omega'] is None else [*seen['Omega'][0].tolist(), ()]  # nothing follows the last layer
    maps = [paper.heat_map(picture.round().to(torch.uint8), w, chosen) for w, chosen in zip(seen['w'][0], Omega)]
    return paper.caption([words], torch.empty(3, 1, 7 * (paper.TILE + 2) + 2)), [picture, *maps]


def assert_drawn(row, expected):
    """Equal to the rounding of the resized picture; an outline, a caption and another layer's map are far more."""
    assert torch.equal(row[0], expected[0]) and len(row[1]) == len(expected[1]) == 7
    for tile, right in zip(row[1], expected[1]):
        assert (tile.float() - right.float()).abs().max() <= 1


def test_a_row_is_a_test_image_and_each_layers_map_and_the_runs_of_an_image_stand_together(own, looked):
    assert train.main([*own.argv, '--show']) == 0
    rows = rows_of(own.picture)
    assert len(rows) == len(looked) == 8
    for i, row in enumerate(rows):
        image, method = i // 2, ('vpt', 'ivpt')[i % 2]
        images, seen = looked[4 * (i % 2) + image]
        best = 'abcdef'[seen['logits'].argmax()]
        assert torch.equal(images[0], own.tested[image]) and (seen['Omega'] is None) == (method == 'vpt')
        assert_drawn(row, drawn_of(images, seen, f'{method}: {best}, in truth {"abcdef"[image]}'))
    assert len({tile.numpy().tobytes() for _, tiles in rows for tile in tiles}) == 4 + 8 * 6


def test_a_photo_is_prepared_as_test_images_are_and_its_classes_stand_in_the_order_of_their_logits(own, looked, capsys):
    assert train.main([*own.argv, '--image', *own.photos[3:5]]) == 0
    lines = [line.split(': ') for line in capsys.readouterr().out.splitlines() if ', by ' in line]
    assert torch.equal(torch.cat([images for images, _ in looked]), own.tested[[3, 4, 3, 4]])
    assert [line[0].split(', by ')[0] for line in lines] == own.photos[3:5] * 2
    for (_, said), (_, seen) in zip(lines, looked, strict=True):
        shares = 100 * seen['logits'][0].softmax(dim=0)
        assert said == ', '.join(f'{"abcdef"[c]} {shares[c]:.1f}%' for c in shares.argsort(descending=True)[:5])


# ---- The user's own images ------------------------------------------------------------------------------


def picture(mode, size):
    return Image.new(mode, size, 128 if mode in ('L', 'I;16') else None)


@pytest.mark.parametrize('mode, size', [('RGB', (48, 48)), ('RGB', (200, 31)), ('L', (30, 60)), ('RGBA', (64, 64)),
                                        ('RGB', (1, 1)), ('P', (20, 20)), ('1', (9, 9)), ('LA', (50, 40))])
def test_images_of_any_size_and_mode_are_classified(mode, size, runs, tmp_path, capsys):
    picture(mode, size).save(tmp_path / 'a photo.png')
    assert train.main(['--image', str(tmp_path / 'a photo.png'), '--method', 'ivpt', '--set', f'runs={runs}']) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if 'a photo.png, by' in line)
    shares = [float(part.split()[-1].rstrip('%')) for part in line.split(': ', 1)[1].split(', ')]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.3


def test_a_photo_is_turned_upright(tmp_path):
    """EXIF orientation 6: the camera was held on its side."""
    image = Image.new('RGB', (8, 4), 'black')
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / 'turned.png', exif=exif)
    upright = train.data.read_image(tmp_path / 'turned.png', (8, 4))
    assert upright.shape == (3, 8, 4) and upright[0, 0, 3] > 200 and upright.float().mean() < 20


def refusal(capsys, *argv):
    status = train.main(list(argv))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('train.py')]
    assert status == 2 and len(err) == 1
    return err[0]


@pytest.mark.parametrize('content', [b'', b'not a picture', b'\x89PNG\r\n\x1a\n cut'])
def test_a_broken_image_is_one_line_with_its_name(content, runs, tmp_path, capsys):
    (tmp_path / 'broken.png').write_bytes(content)
    assert 'broken.png' in refusal(capsys, '--image', str(tmp_path / 'broken.png'), '--run',
                                   str(runs / 'where_blue' / 'vit_nano_patch8_48' / 'vpt' / 'seed0'))


def test_an_image_that_is_a_line_or_a_folder_or_missing_is_one_line_with_its_name(runs, tmp_path, capsys):
    picture('RGB', (3000, 2)).save(tmp_path / 'line.png')
    for name in 'line.png', '.', 'missing.png':
        assert str(tmp_path / name) in refusal(capsys, '--image', str(tmp_path / name), '--run',
                                               str(runs / 'where_blue' / 'vit_nano_patch8_48' / 'vpt' / 'seed0'))


def test_a_run_that_is_not_there_or_not_whole_is_one_line_with_its_folder(runs, tmp_path, capsys):
    assert str(tmp_path) in refusal(capsys, '--show', '--run', str(tmp_path))
    whole = runs / 'where_blue' / 'vit_nano_patch8_48' / 'ivpt' / 'seed0'
    for name in 'params.pth', 'result.json':
        shutil.copytree(whole, tmp_path / name)
        (tmp_path / name / name).write_bytes((tmp_path / name / name).read_bytes()[:30])
        assert str(tmp_path / name) in refusal(capsys, '--show', '--run', str(tmp_path / name))


def test_parameters_of_another_method_are_refused(runs, tmp_path, capsys):
    shutil.copytree(runs / 'where_blue' / 'vit_nano_patch8_48' / 'ivpt' / 'seed0', tmp_path / 'run')
    other = runs / 'where_blue' / 'vit_nano_patch8_48' / 'vpt' / 'seed0' / 'params.pth'
    (tmp_path / 'run' / 'params.pth').write_bytes(other.read_bytes())
    assert 'params.pth is not what result.json' in refusal(capsys, '--show', '--run', str(tmp_path / 'run'))
