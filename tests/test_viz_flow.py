"""Flow and score colours, and match lines, against torchvision and known geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import flow_to_image

from cocosnet.viz.canvas import distinct_colors
from cocosnet.viz.flow import VIRIDIS, color_wheel, flow_colors, score_colors, typical_maximum
from cocosnet.viz.matches import draw_matches, spread

torch.set_num_threads(1)


def test_colors_equal_torchvision():
    """torchvision takes (dx, dy) and scales by the longest vector of the batch."""
    offset = torch.randn(1, 2, 40, 31, generator=torch.Generator().manual_seed(0)) * 5
    difference = flow_colors(offset).int() - flow_to_image(offset.flip(1)).int()
    assert difference.abs().max() <= 1


def test_directions_have_the_stated_hues():
    def colour(dy, dx):
        return flow_colors(torch.tensor([dy, dx]).view(1, 2, 1, 1), maximum=2.0)[0, :, 0, 0].tolist()

    assert colour(0.0, 2.0) == [255, 0, 0]
    red, green, blue = colour(2.0, 0.0)
    assert red == 255 and green > 200 and blue == 0
    red, green, blue = colour(0.0, -2.0)
    assert red == 0 and min(green, blue) > 200
    red, green, blue = colour(-2.0, 0.0)
    assert blue == 255 and red > 50 and green == 0
    assert colour(0.0, 0.0) == [255, 255, 255]
    assert colour(0.0, 1.0) == [255, 127, 127]
    assert colour(0.0, 200.0) == [255, 0, 0]


def test_scale_is_each_pictures_own_unless_given():
    offset = torch.zeros(2, 2, 1, 2)
    offset[0, 1, 0], offset[1, 1, 0] = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    own, shared = flow_colors(offset), flow_colors(offset, maximum=20.0)
    assert torch.equal(own[0], own[1]) and not torch.equal(shared[0], shared[1])


def test_zero_and_bad_offsets_are_white():
    offset = torch.tensor([math.nan, 0.0]).view(1, 2, 1, 1)
    assert flow_colors(offset)[0, :, 0, 0].tolist() == [255, 255, 255]


def test_wheel_is_that_of_baker_et_al():
    wheel = color_wheel()
    assert wheel.shape == (55, 3)
    assert wheel[[0, 15, 36]].tolist() == [[255, 0, 0], [255, 255, 0], [0, 0, 255]]


def test_typical_maximum_ignores_wild_matches():
    offset = torch.ones(2, 50, 50)
    offset[:, 0, :10] = 500
    assert typical_maximum(offset) == pytest.approx(math.sqrt(2))


def test_score_colors_cover_the_stated_range():
    colours = score_colors(torch.tensor([[0.0, 1.0, -0.5, 1.5, -math.inf]]))
    assert colours.dtype == np.uint8
    assert [tuple(pixel) for pixel in colours[0].tolist()] == [
        VIRIDIS[0],
        VIRIDIS[-1],
        VIRIDIS[0],
        VIRIDIS[-1],
        (128, 128, 128),
    ]


@pytest.mark.parametrize("size", [(64, 64), (32, 128), (3, 200), (2, 2), (1, 1)])
def test_spread_is_even_inside_and_deterministic(size):
    points = spread(*size)
    assert torch.equal(points, spread(*size))
    assert (points >= 0).all() and (points < torch.tensor(size)).all()
    assert len(torch.unique(points, dim=0)) == len(points) <= size[0] * size[1]
    if min(size) > 4:
        assert 18 <= len(points) <= 30


def test_lines_lead_to_the_matched_places():
    """A shift of 8 px to the right on a 32x32 level: the dots of the right picture sit 8 level px further right."""
    left, right = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    drawn = np.asarray(draw_matches(left, right, torch.stack([rows, columns + 8]), count=1, height=64, gap=10))
    assert drawn.shape == (64, 138, 3)
    colour = np.array(distinct_colors(1)[0])
    y, x = (int(value) for value in spread(32, 32, 1)[0])
    start, end = (round((y + 0.5) * 2), round((x + 0.5) * 2)), (round((y + 0.5) * 2), 74 + round((x + 8.5) * 2))
    assert np.abs(drawn[start] - colour.astype(int)).max() < 40
    assert np.abs(drawn[end] - colour.astype(int)).max() < 40
    assert (drawn[:20] == 255).all() and (drawn[-20:] == 255).all()


def test_lines_with_a_factor_allow_levels_that_do_not_divide_the_picture():
    """60 px at factor 8 is a map of 8 px that overhangs: pixel 3 is centred at 28 px, not at 3.5 / 8 of 60."""
    white = Image.new("RGB", (60, 60), "white")
    field = torch.full((2, 8, 8), 3.0)
    drawn = np.asarray(draw_matches(white, white, field, count=1, height=60, factor=8, gap=0)).astype(int)
    dark = np.argwhere((drawn[:, 60:] != 255).any(axis=-1) & (np.arange(60) > 20)[None])
    assert abs(dark[:, 1].max() - (28 + 3)) <= 1


def test_colours_are_distinct():
    colours = distinct_colors(30)
    assert len(set(colours)) == 30 and distinct_colors(5) == colours[:5]
