"""The pictures of shapes, which need no download: what they ask is what they show."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import CONFIGS, tiny

import data
import shapes
import train
from vit import InputError

FOUR = list(shapes.COLOURS)[:4]
PLACES = [(slice(3 + 14 * (c // 3), 17 + 14 * (c // 3)), slice(3 + 14 * (c % 3), 17 + 14 * (c % 3))) for c in range(9)]


def draw(ask, n=200, seed=0, size=48, **changes):
    """Pictures, answers and the scene, without grain if it is not asked for."""
    options = {'ask': ask, 'colours': FOUR, 'look': 'plain', 'grain': 0.0} | changes
    return shapes.draw_shapes(n, SimpleNamespace(**options), size, seed)


def of_colour(images, colour):
    """Which pixels have just this colour: [n, 48, 48]."""
    return (np.abs(images.astype(int) - np.array(shapes.COLOURS[colour])[:, None, None]) <= 1).all(1)


def seen_in(images, colour):
    """In which of the nine cells a colour is seen: [n, 9]."""
    pixels = of_colour(images, colour)
    return np.stack([pixels[:, rows, columns].any((1, 2)) for rows, columns in PLACES], axis=1)


@pytest.mark.parametrize('colours', [['cyan'], FOUR, list(shapes.COLOURS)])
def test_each_colour_has_a_cell_of_its_own(colours):
    images = draw(f'where_{colours[0]}', 60, colours=colours)[0]
    cells = np.stack([seen_in(images, colour) for colour in colours])
    assert (cells.sum(2) == 1).all() and (cells.sum(0) <= 1).all()
    assert not any(seen_in(images, colour).any() for colour in set(shapes.COLOURS) - set(colours))


@pytest.mark.parametrize('look', shapes.LOOKS)
def test_the_answer_to_where_is_the_cell_of_the_colour_that_is_asked_for_and_no_other(look):
    for colour in FOUR:
        images, answer, _ = draw(f'where_{colour}', 60, look=look)
        assert (seen_in(images, colour) == np.eye(9, dtype=bool)[answer]).all()


def test_shapes_are_shifted_in_row_and_column_by_themselves():
    scene = shapes.arrange(500, 4, np.random.default_rng(0))
    down, across = scene.row - (10 + 14 * (scene.cell // 3)), scene.column - (10 + 14 * (scene.cell % 3))
    for shift in down, across:
        assert shift.min() < -0.9 and shift.max() > 0.9 and np.abs(shift).max() < 1
    assert abs(np.corrcoef(down.ravel(), across.ravel())[0, 1]) < 0.1


def covered(ask, n=30):
    """A scene, the answers, and which pixels the red shape covers when a picture is 480 pixels high: [n, 480, 480]."""
    _, answer, scene = draw(ask, n)
    return scene, answer, shapes.cover(scene, 0, 480)[:, 0] > 0.5


def test_a_large_shape_is_wider_than_11_pixels_of_48_and_a_small_one_narrower_than_10():
    scene, answer, pixels = covered('size_red')
    for axis in (1, 2):
        width = pixels.any(axis).sum(1) / 10
        assert (np.abs(width - 2 * scene.radius[:, 0]) < 0.3).all()
        assert (np.where(answer == 1, 11 < width, width < 10)).all() and 7 < answer.sum() < 23


def test_a_ring_is_empty_in_its_middle_and_a_cross_in_its_corners():
    scene, answer, pixels = covered('shape_red')
    row, column, radius = (x[:, 0] for x in (scene.row, scene.column, scene.radius))
    middle, corner = (pixels[np.arange(30), (10 * (row + part * radius)).astype(int),
                             (10 * (column + part * radius)).astype(int)] for part in (0, 0.6))
    expected = {'disc': (True, True), 'ring': (False, True), 'cross': (True, False)}
    assert [*zip(middle, corner)] == [expected[shapes.SHAPES[shape]] for shape in answer]
    assert set(answer) == {0, 1, 2}


def test_the_answer_to_colour_is_what_is_seen_in_the_centre_or_nothing():
    images, answer, _ = draw('colour')
    seen = np.stack([seen_in(images, colour)[:, 4] for colour in FOUR], axis=1)
    assert (seen == np.eye(5, dtype=bool)[answer][:, :4]).all()
    assert shapes.names_of('colour', FOUR) == [*FOUR, 'nothing']


def test_the_answer_to_side_is_on_which_side_of_the_red_shape_another_shape_is():
    for colour in FOUR[1:]:
        images, answer, _ = draw(f'side_{colour}', 100)
        column, red = (seen_in(images, name).argmax(1) % 3 for name in (colour, 'red'))
        assert [shapes.names_of('side', FOUR)[a] for a in answer] == [
            'left' if a < b else 'right' if a > b else 'above or below' for a, b in zip(column, red)]


def test_the_answer_to_count_is_the_number_of_shapes_and_all_numbers_occur():
    images, answer, _ = draw('count')
    count = sum(seen_in(images, colour).any(1).astype(int) for colour in FOUR)
    assert [shapes.names_of('count', FOUR)[a] for a in answer] == [str(n) for n in count]
    assert np.bincount(count, minlength=5)[1:].min() > 25


def test_waves_change_the_background_alone():
    images = draw('where_red', look='waves')[0]
    coloured = sum(of_colour(images, colour) for colour in FOUR)
    grey = np.ptp(images.astype(int), axis=1) == 0
    deviation = np.where(grey, images[:, 0], np.nan)
    assert (np.nanstd(deviation, axis=(1, 2)) > 10).all() and (coloured.sum((1, 2)) > 60).all()


def sides_of(picture):
    """The pixels in the middle of the frame, of which there are 3: top, bottom, left, right, [4, 48, 3]."""
    return np.stack([picture[:, 1], picture[:, -2], picture[:, :, 1], picture[:, :, -2]]).transpose(0, 2, 1)


def test_the_frame_asks_what_the_picture_answers():
    """All around: where. Top and left: size. Bottom and right: shape. White with black marks: the colour there."""
    images, answer, scene = draw('frame')
    offset = np.cumsum([0] + [len(shapes.names_of(name, FOUR)) for name in shapes.ASKED])
    colours, questions, empty = list(shapes.COLOURS.values()), set(), []
    for i, picture in enumerate(images.astype(int)):
        sides = sides_of(picture)[:, 5:-5]  # without the corners
        coloured = [any((np.abs(side - rgb) <= 1).all() for rgb in colours) for side in sides]
        question = {(1, 1, 1, 1): 'where', (1, 0, 1, 0): 'size', (0, 1, 0, 1): 'shape', (0, 0, 0, 0): 'colour'}[
            tuple(coloured)]
        questions.add(question)
        k = shapes.ASKED.index(question)
        if question == 'colour':
            row, column = ((side == 0).all(1).nonzero()[0].mean() for side in sides_of(picture)[[2, 0]])
            asked = 3 * int((row - 3) // 14) + int((column - 3) // 14)
            empty.append(asked not in scene.cell[i])
        else:
            edge = sides[1 if question == 'shape' else 0][0]
            asked = next(c for c, rgb in enumerate(colours) if (np.abs(edge - rgb) <= 1).all())
        one = shapes.Scene(*(x[i:i + 1] for x in scene))
        assert answer[i] == offset[k] + shapes.QUESTIONS[question](one, np.arange(1), np.array([asked]))[0]
    assert questions == set(shapes.ASKED)
    assert abs(np.mean(empty) - 0.4 * 5 / 9) < 0.1  # 0.4 of the cells are any of the nine, of which five are empty


def test_pictures_downstream_have_no_frame():
    corners = draw('where_blue')[0][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[:, :1, :1]).all()  # grey, as the background
    assert len(set(corners[:, 0, 0].tolist())) > 30


def test_every_cell_is_the_answer_about_as_often():
    counts = np.bincount(draw('where_blue', 1800, size=16)[1], minlength=9)
    assert len(counts) == 9 and (abs(counts - 200) < 60).all()


@pytest.mark.parametrize('size, look', [(24, 'plain'), (96, 'plain'), (96, 'waves')])
def test_pictures_of_other_sizes_show_the_same_shapes(size, look):
    (images, answer, _), (small, same, _) = (draw('where_blue', 50, size=s, look=look) for s in (size, 48))
    assert (answer == same).all()
    scaled = F.interpolate(torch.from_numpy(images).float(), (48, 48), mode='area').numpy()
    assert np.abs(scaled - small).mean() < 6


@pytest.mark.parametrize('q', range(4))
def test_a_frame_around_a_larger_picture_is_the_same_frame_with_larger_pixels(q):
    colour, cell = np.array([[255.0, 0, 0]]), np.array([5])
    small, large = (shapes.framed(np.zeros((1, 3, size, size)), np.array([q]), colour, cell) for size in (48, 96))
    assert np.array_equal(small.repeat(2, axis=2).repeat(2, axis=3), large) and large.max() == 255


def test_grain_has_the_standard_deviation_that_was_asked_for():
    noisy, plain = (draw('where_blue', 50, grain=grain)[0].astype(float) for grain in (8, 0))
    inside = (plain > 40) & (plain < 215)  # where nothing is clipped
    assert abs((noisy - plain)[inside].std() - 8) < 0.2


def test_one_seed_draws_the_same_pictures_and_another_seed_others():
    images, labels, _ = draw('where_blue', 20, seed=1, grain=8)
    np.random.seed(99)  # numpy's own random numbers have no part in it
    same_images, same_labels, _ = draw('where_blue', 20, seed=1, grain=8)
    assert (images == same_images).all() and (labels == same_labels).all()
    assert (images != draw('where_blue', 20, seed=2, grain=8)[0]).any()


# ---- The tasks ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ask', ['frame', 'where_blue'])
def test_no_picture_of_shapes_is_in_two_sets(ask):
    task = data.load(tiny(ask=ask, n_train=50, n_val=50, n_test=50))
    assert len({x.numpy().tobytes() for part in (task.train, task.val, task.test) for x, _ in part}) == 150


def test_the_questions_are_asked_about_the_same_pictures_but_not_about_those_of_pre_training():
    blue, red, framed = (data.load(tiny(ask=ask, grain=0.0)).test for ask in ('where_blue', 'shape_red', 'frame'))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(blue, red))
    assert [label for _, label in blue] != [label for _, label in red]
    arrays = (np.stack([image.numpy() for image, _ in part]) for part in (blue, framed))
    cells, others = ([seen_in(images, colour)[:, 4] for colour in FOUR] for images in arrays)
    assert np.not_equal(cells, others).any(axis=0).sum() > 5  # of 20 scenes


@pytest.mark.parametrize('ask', ['where_purple', 'pink', 'where', 'count_red', 'when_red', 'side_red'])
def test_a_question_that_is_none_is_refused(ask):
    with pytest.raises(InputError, match=f'{ask}:.*red, green, blue, yellow.*frame, colour, count, where_red'):
        data.load(tiny(ask=ask))


@pytest.mark.parametrize('name', train.tasks_of(CONFIGS, [*CONFIGS['groups']['shapes'], 'shapes_framed']))
def test_every_offline_task_has_its_classes_and_all_of_them_occur(name):
    found = data.load(tiny(name, n_train=200, n_val=1, n_test=1))
    assert {label for _, label in found.train} == set(range(len(found.classes)))


@pytest.mark.parametrize('setting', [{'look': 'waves'}, {'grain': 8.0}, {'colours': ['red', 'cyan', 'blue', 'green']}])
def test_the_settings_of_a_task_reach_its_pictures_and_the_answers_stay(setting):
    plain, other = (data.load(tiny(ask='where_blue', **changes)).test for changes in ({}, setting))
    assert [label for _, label in plain] == [label for _, label in other]
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(plain, other))

