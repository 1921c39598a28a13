"""Coordinates, sampling and the soft warp (Eq. 8), against SciPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from cocosnet.model.warp import (
    child_positions,
    clamp_positions,
    downsample_field,
    pixel_grid,
    sample,
    scattered_positions,
    soft_warp,
    upsample_positions,
)


def random_positions(batch, candidates, height, width, target, seed=0):
    """Fractional positions inside a target map of (rows, columns)."""
    limit = torch.tensor([target[0] - 1.0, target[1] - 1.0]).view(1, 1, 2, 1, 1)
    return torch.rand(batch, candidates, 2, height, width, generator=torch.Generator().manual_seed(seed)) * limit


@pytest.mark.parametrize("target", [(7, 11), (11, 7), (1, 5), (5, 1), (1, 1)])
def test_sampling_equals_scipy_on_maps_that_are_not_square(target):
    picture = torch.randn(2, 3, *target, generator=torch.Generator().manual_seed(1))
    positions = random_positions(2, 4, 5, 6, target)
    ours = sample(picture, positions)
    for b in range(2):
        for c in range(3):
            where = positions[b].permute(1, 0, 2, 3).reshape(2, -1).numpy()
            theirs = map_coordinates(picture[b, c].numpy(), where, order=1, mode="nearest")
            np.testing.assert_allclose(ours[b, c].flatten().numpy(), theirs, atol=2e-6)


def test_a_fractional_row_never_moves_the_column():
    """The release forms row * W + column in floats, so row + 0.25 at width 512 reads 128 columns further right."""
    columns = torch.arange(512.0).expand(1, 1, 64, 512).contiguous()
    position = torch.tensor([31.25, 50.0]).view(1, 1, 2, 1, 1)
    assert sample(columns, position).item() == pytest.approx(50.0, abs=1e-3)


def test_positions_outside_read_the_border():
    picture = torch.arange(12.0).view(1, 1, 3, 4)
    outside = torch.tensor([[-5.0, -5.0], [99.0, 99.0], [-1.0, 99.0]]).T.view(1, 1, 2, 1, 3)
    assert sample(picture, outside).flatten().tolist() == [0.0, 11.0, 3.0]
    assert clamp_positions(outside, 3, 4)[0, 0, :, 0].T.tolist() == [[0, 0], [2, 3], [0, 3]]


def test_the_soft_warp_is_the_weighted_average_of_eq_8():
    picture = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    positions = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 2, 2, 1, 1)
    scores = torch.tensor([0.7, 0.71]).view(1, 2, 1, 1)
    weight = 1 / (1 + np.exp(-0.01 / 0.01))
    expected = (1 - weight) * 1.0 + weight * 2.0
    assert soft_warp(picture, positions, scores, 0.01).item() == pytest.approx(expected, rel=1e-5)


def test_an_empty_slot_weighs_nothing():
    picture = torch.tensor([[[[5.0, 100.0]]]])
    positions = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).view(1, 2, 2, 1, 1)
    scores = torch.tensor([0.1, -torch.inf]).view(1, 2, 1, 1)
    assert soft_warp(picture, positions, scores, 1.0).item() == 5.0


def test_upsampling_the_identity_gives_the_identity_and_an_offset_doubles():
    identity = pixel_grid(3, 5).view(1, 1, 2, 3, 5)
    assert torch.equal(upsample_positions(identity, 6, 10)[0, 0], pixel_grid(6, 10))
    shifted = upsample_positions(identity + torch.tensor([1.0, -2.0]).view(1, 1, 2, 1, 1), 6, 10)[0, 0]
    assert torch.equal(shifted, pixel_grid(6, 10) + torch.tensor([2.0, -4.0]).view(2, 1, 1))


def test_a_field_made_coarser_undoes_its_upsampling():
    fine = upsample_positions(torch.rand(2, 1, 2, 5, 4) * 9, 10, 8)
    assert torch.allclose(upsample_positions(downsample_field(fine[:, 0], 2)[:, None], 10, 8), fine, atol=1e-5)
    identity = pixel_grid(12, 8)[None]
    assert torch.allclose(downsample_field(identity, 4), pixel_grid(3, 2)[None])


def test_the_children_of_a_match_are_the_four_fine_pixels_of_its_pixel_own_corner_first():
    coarse = torch.tensor([[5.0, 7.0], [0.0, 2.0]]).view(1, 2, 2, 1, 1)
    found = child_positions(torch.cat([coarse] * 4, dim=1), 2, 2)[0]
    for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert found[0, :, i, j].tolist() == [10 + i, 14 + j]
        assert sorted(found[:4, :, i, j].tolist()) == [[10, 14], [10, 15], [11, 14], [11, 15]]
        assert sorted(found[4:, :, i, j].tolist()) == [[0, 4], [0, 5], [1, 4], [1, 5]]
    assert torch.equal(child_positions(coarse[:, :1], 2, 2), upsample_positions(coarse[:, :1], 2, 2))


def test_scattered_positions_fill_the_map_evenly_for_any_pixel_and_for_all():
    found = scattered_positions(16, torch.Size((8, 8)), torch.Size((32, 24)))
    assert found.shape == (1, 16, 2, 8, 8) and torch.equal(found, found.floor())
    rows, columns = found[0].unbind(1)
    cells = (rows // 8 * 4 + columns // 6).long()  # of a grid of 4x4
    assert cells.min() >= 0 and rows.max() < 32 and columns.max() < 24
    together = torch.bincount(cells.flatten(), minlength=16)
    assert together.min() > 55 and together.max() < 73  # 64 on average
    assert min(len(cells[:, i, j].unique()) for i in range(8) for j in range(8)) >= 10


def test_the_warp_passes_numerical_gradient_checks():
    generator = torch.Generator().manual_seed(3)
    picture = torch.randn(1, 2, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    positions = (torch.rand(1, 3, 2, 2, 2, dtype=torch.float64, generator=generator) * 0.8 + 1.1).requires_grad_()
    scores = torch.rand(1, 3, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, q, s: soft_warp(p, q, s, 0.5), (picture, positions, scores))
