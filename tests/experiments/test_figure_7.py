"""Appendix A, Figure 7: where the class token looks, and what AR reinforces, drawn by look.py."""

import csv
from types import SimpleNamespace

import pytest
import torch
from common import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pictures import NANO, images_tested, run, save_picture
from torchvision.transforms.functional import pil_to_tensor, resize

import data
import ivpt
import look
import train

TILE = look.TILE


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 6, 7, 14]), st.data())
def test_attention_is_drawn_on_the_pixels_of_its_patch(side, draw):
    """All attention on one patch: that patch is white-hot, every other pixel is the picture, grey and darkened."""
    patch = draw.draw(st.integers(0, side * side - 1))
    w = torch.zeros(side * side)
    w[patch] = 0.3
    red = torch.tensor([200, 50, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, TILE, TILE)
    grey = 0.4 * int(0.2989 * 200 + 0.587 * 50 + 0.114 * 50)  # ITU-R 601-2, as Pillow has it
    picture = look.heat_map(red, w)
    hot = (picture == int(grey + 153)).all(dim=0)
    row, column = patch // side, patch % side
    expected = torch.zeros(side, side).index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(1.0))
    pixel = (torch.arange(TILE) * side).div(TILE, rounding_mode='floor')
    assert torch.equal(hot, expected[pixel][:, pixel].bool())
    assert (picture[:, ~hot] == int(grey)).all()


def test_more_attention_is_drawn_brighter():
    picture = look.heat_map(torch.zeros(3, TILE, TILE, dtype=torch.uint8), torch.linspace(0, 1, 16))
    centres = torch.arange(4) * TILE // 4 + TILE // 8
    brightness = picture.sum(dim=0)[centres][:, centres].flatten()
    assert (brightness.diff() > 0).all()


@pytest.mark.parametrize('patch', [0, 5, 35])
def test_reinforced_patches_are_outlined_and_no_other(patch):
    plain = torch.zeros(3, TILE, TILE, dtype=torch.uint8)
    changed = (look.heat_map(plain, torch.ones(36), [patch]) != look.heat_map(plain, torch.ones(36))).any(dim=0)
    y, x = changed.nonzero(as_tuple=True)
    side = TILE / 6
    for pixels, place in ((y, patch // 6), (x, patch % 6)):
        assert abs(pixels.min() - place * side) <= 2 and abs(pixels.max() - (place + 1) * side) <= 2
    assert not changed[y.min() + 4:y.max() - 3, x.min() + 4:x.max() - 3].any()  # an outline and no area


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """Two runs on a folder of photos that are cropped, the photos, and the images that the runs were tested on."""
    folder = tmp_path_factory.mktemp('own')
    for i, (part, c) in enumerate((part, c) for part in ('train', 'train', 'test') for c in 'abcdef'):
        save_picture(folder / 'data' / part / c / f'{i}.png', i, 90 + i, 60)
    argv = ['--task', 'folder', '--model', NANO, '--method', 'vpt,ivpt', '--weights', 'random', '--data',
            str(folder / 'data'), '--set', f'runs={folder}', 'epochs=1', 'k=4', f'mean={[*MEAN]}', f'std={[*STD]}']
    with images_tested() as tested:
        assert train.main(argv) == 0
    photos = sorted(str(path) for path in (folder / 'data' / 'test').rglob('*.png'))
    vpt = [word.replace('vpt,ivpt', 'vpt') for word in argv]
    return SimpleNamespace(argv=argv, vpt=vpt, photos=photos, folder=folder, tested=tested[2])


@pytest.fixture
def looked(monkeypatch):
    """What look.py looks at: (the images, what is seen of them), in order."""
    seen, whole = [], ivpt.look
    monkeypatch.setattr(ivpt, 'look', lambda model, images: seen.append((images, whole(model, images))) or seen[-1][1])
    return seen


def rows_of(path):
    """The rows of Figure 7: of each the strip above it and its tiles."""
    picture = pil_to_tensor(Image.open(path))
    starts = range(2, picture.shape[2] - 2, TILE + 2)
    rows = picture[:, 18:-18].split(18 + TILE + 4, dim=1)
    return [(row[:, :18], [row[:, 20:20 + TILE, x:x + TILE] for x in starts]) for row in rows]


def drawn_of(image, seen, words):
    """The same, of one image [1, 3, H, W] and what one model saw of it; its tile as floats."""
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    picture = resize((image[0] * std + mean).round(), [TILE] * 2)
    Omega = [()] * 6 if seen['Omega'] is None else [*seen['Omega'][0].tolist(), ()]  # nothing follows the last layer
    maps = [look.heat_map(picture.round().to(torch.uint8), w, chosen) for w, chosen in zip(seen['w'][0], Omega)]
    maps = [look.labelled(tile, f'prompts {share:.0%}') for tile, share in zip(maps, seen['to_prompts'][0].tolist())]
    return look.caption([words], torch.empty(3, 1, 7 * (TILE + 2) + 2)), [picture, *maps]


def assert_drawn(row, expected):
    """Equal to the rounding of the resized picture; an outline, a caption and another layer's map are far more."""
    assert torch.equal(row[0], expected[0]) and len(row[1]) == len(expected[1]) == 7
    for tile, right in zip(row[1], expected[1]):
        assert (tile.float() - right.float()).abs().max() <= 1


def test_a_row_is_a_test_image_and_each_layers_map_and_the_runs_of_an_image_stand_together(own, looked):
    assert look.main(own.argv) == 0
    rows = rows_of(*own.folder.rglob('attention,vpt+ivpt,*.png'))
    assert len(rows) == len(looked) == 8
    for i, row in enumerate(rows):
        image, method = i // 2, ('vpt', 'ivpt')[i % 2]
        images, seen = looked[4 * (i % 2) + image]
        best = 'abcdef'[seen['logits'].argmax()]
        assert torch.equal(images[0], own.tested[image]) and (seen['Omega'] is None) == (method == 'vpt')
        words = f'{method}: {best}, in truth {"abcdef"[image]}, random weights'
        assert_drawn(row, drawn_of(images, seen, words))
    assert len({tile.numpy().tobytes() for _, tiles in rows for tile in tiles}) == 4 + 8 * 6


def test_one_run_is_drawn_in_its_own_folder_and_a_second_picture_does_not_overwrite_the_first(own):
    assert [look.main(own.vpt) for _ in range(2)] == [0, 0]
    names = {path.name for path in own.folder.glob('folder/*/vpt,*/seed0/*.png')}
    assert names == {'attention.png', 'attention-2.png'}


def test_words_stand_white_on_black_in_the_lower_left_corner_of_a_tile():
    tile = torch.full((3, TILE, TILE), 128, dtype=torch.uint8)
    words = look.labelled(tile, 'prompts 5%')
    assert (words[:, :TILE - 16] == 128).all() and (words[:, -1, 0] == 0).all() and words.max() > 200


def test_runs_of_other_depths_are_not_drawn_together(tmp_path, capfd):
    argv = '--method', 'linear', '--model', f'{NANO},vit_tiny_patch16_48'
    assert [run(tmp_path, *argv, program=program, epochs=1) for program in (train, look)] == [0, 2]
    assert 'different numbers of layers' in one_line(capfd)


def test_a_photo_is_prepared_as_test_images_are_and_its_classes_stand_in_the_order_of_their_logits(own, looked, capsys):
    assert look.main([*own.argv, '--image', *own.photos[3:5]]) == 0
    lines = [line.split(': ') for line in capsys.readouterr().out.splitlines() if ', by ' in line]
    assert torch.equal(torch.cat([images for images, _ in looked]), own.tested[[3, 4, 3, 4]])
    assert [line[0].split(', by ')[0] for line in lines] == own.photos[3:5] * 2
    for (_, said), (_, seen) in zip(lines, looked, strict=True):
        shares = 100 * seen['logits'][0].softmax(dim=0)
        assert said == ', '.join(f'{"abcdef"[c]} {shares[c]:.1f}%' for c in shares.argsort(descending=True)[:5])
    assert len([*own.folder.rglob('attention,15,16,vpt+ivpt,*.png')]) == 1  # photos have a picture of their own


def test_photos_need_no_picture_that_a_run_was_trained_on(own, tmp_path):
    save_picture(tmp_path / 'cat.png', 0, 90, 60)
    argv = [word for word in own.vpt if word not in ('--data', str(own.folder / 'data'))]
    (own.folder / 'data').rename(own.folder / 'away')
    try:
        assert look.main([*argv, '--image', str(tmp_path / 'cat.png')]) == 0
    finally:
        (own.folder / 'away').rename(own.folder / 'data')


def test_all_photos_of_a_folder_are_answered_in_a_csv_file_and_the_first_ones_are_drawn(own, looked, monkeypatch):
    monkeypatch.setattr(look, 'DRAWN', 2)
    (own.folder / 'data' / 'test' / 'note.txt').write_text('no picture')
    assert look.main([*own.argv, '--image', str(own.folder / 'data' / 'test')]) == 0
    assert len(looked) == 2 * 6 and len(rows_of(*own.folder.rglob('attention,test,*.png'))) == 2 * 2
    for method, seen in ('vpt', looked[:6]), ('ivpt', looked[6:]):
        file, = own.folder.glob(f'folder/*/{method},*/seed0/answers.csv')
        header, *rows = csv.reader(file.open())
        assert header == ['file', 'class', 'probability', 'likeliest'] and [row[0] for row in rows] == own.photos
        for (_, name, share, likely), (_, what) in zip(rows, seen, strict=True):
            p, c = what['logits'][0].softmax(dim=0).max(dim=0)
            assert (name, share) == ('abcdef'[c], f'{p:.4f}') and likely.startswith(f'{name} {100 * p:.1f}%, ')


def test_each_photo_has_a_mask_of_its_own_and_without_photos_four_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'folder_of', lambda settings: tmp_path)
    files = [tmp_path / folder / 'cat.png' for folder in ('x', 'y')]
    for i, file in enumerate(files):
        save_picture(file, i)
    model = SimpleNamespace(answer=lambda image, settings, device: torch.zeros(image.shape[1:], dtype=torch.int64))
    tests = 5 * [(torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(9, 9, dtype=torch.uint8))]
    task, compute = data.Task([], [], tests, ['a', 'b']), train.Compute(torch.device('cpu'), 'float32', '')
    run_ = SimpleNamespace(settings=None, task=task, model=model, compute=compute)
    assert look.answers(run_, [str(file) for file in files]) == [] and len(look.answers(run_, [])) == 4
    assert {path.name for path in tmp_path.glob('*.png')} == {'x_cat-mask.png', 'y_cat-mask.png'}


def test_what_is_no_image_is_refused_with_one_line_with_its_name(own, tmp_path, capfd):
    (tmp_path / 'cut.png').write_bytes(b'\x89PNG\r\n\x1a\n cut')
    (tmp_path / 'empty').mkdir()
    for name in 'cut.png', '.', 'empty', 'missing.png':
        assert look.main([*own.vpt, '--image', str(tmp_path / name)]) == 2
        assert str(tmp_path / name) in one_line(capfd)


def test_of_many_classes_each_has_a_colour():
    image, mask = torch.zeros(3, 10, 15, dtype=torch.uint8), torch.arange(150).view(10, 15)
    assert len(look.painted(image, mask, 150).flatten(1).T.unique(dim=0)) == 150
    few = look.painted(image, mask % 4, 4).flatten(1).T.unique(dim=0)
    assert len(few) == 4 and [0, 0, 0] in few.tolist()  # ours
