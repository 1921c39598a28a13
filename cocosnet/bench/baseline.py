"""The yardstick for speed: one PatchMatch level with the arithmetic of the authors' release, in plain PyTorch.

What it does (facts, not code, of the release): the coarser level's best match is carried on, and a grid of even steps
around it gives K candidates. An iteration is a horizontal and a vertical pass; in a pass every pixel scores its own K
candidates and those of its two neighbours, each of the 3K gathered separately as a full copy of the features, turns the
scores into a softmax over 3K at temperature 0.01 and keeps the K best, copies of each other included. The release draws
the order of the two passes at random; here the horizontal one comes first. Its ConvGRU, which no gradient reaches, is
left out on both sides of the comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cocosnet.model.matches import Matches
from cocosnet.model.warp import pixel_grid


def suits(candidates: int) -> bool:
    """Whether the release's square grid can give that many candidates."""
    return math.isqrt(candidates) ** 2 == candidates


@torch.no_grad()
def release_level(
    best: Tensor, features_x: Tensor, features_y: Tensor, exemplar: Tensor, candidates: int, iterations: int, tau: float
) -> tuple[Matches, Tensor]:
    """One level.

    best B,2,h/2,w/2: the coarser level's matches; features B,C,h,w and B,C,H,W of unit length; exemplar B,3,H,W.
    Returns the matches, best first (integer positions), and the soft warp B,3,h,w.
    """
    offsets = _initial_offsets(best, candidates)
    for _ in range(iterations):
        for axis in (-1, -2):
            offsets = _pass(offsets, axis, features_x, features_y, candidates, tau)
    positions = _positions(offsets, features_y)
    scores = _scores(positions, features_x, features_y)
    weights = torch.softmax(scores / tau, dim=1)
    columns = exemplar.shape[-1]
    warp = sum(weights[:, k, None] * _gather(exemplar, positions[:, k], columns) for k in range(candidates))
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    positions = positions.gather(1, order.unsqueeze(2).expand_as(positions)).float()
    return Matches(positions, scores.gather(1, order)), warp


def _initial_offsets(best: Tensor, candidates: int) -> Tensor:
    """Twice the coarse offsets plus -2, 0, 2, 4 along each axis: B,K,2,h,w."""
    side = math.isqrt(candidates)
    offset = 2 * (best - pixel_grid(*best.shape[-2:], best.device))
    offset = offset.round().repeat_interleave(2, -2).repeat_interleave(2, -1)
    steps = 2 * (torch.arange(side, device=best.device) - 1)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1).T
    return offset[:, None] + grid.view(1, candidates, 2, 1, 1)


def _pass(offsets: Tensor, axis: int, x: Tensor, y: Tensor, candidates: int, tau: float) -> Tensor:
    """Own offsets and the two neighbours' (0 beyond the border), 3K of them; the K of highest softmax remain."""
    length, zero = offsets.shape[axis] - 1, torch.zeros_like(offsets.narrow(axis, 0, 1))
    before = torch.cat([zero, offsets.narrow(axis, 0, length)], axis)
    after = torch.cat([offsets.narrow(axis, 1, length), zero], axis)
    offsets = torch.cat([offsets, before, after], dim=1)
    scores = torch.softmax(_scores(_positions(offsets, y), x, y) / tau, dim=1)
    kept = torch.topk(scores, candidates, dim=1).indices
    return offsets.gather(1, kept.unsqueeze(2).expand(-1, -1, 2, -1, -1))


def _positions(offsets: Tensor, features_y: Tensor) -> Tensor:
    """Offsets to integer positions inside the exemplar's map, int64."""
    positions = (offsets + pixel_grid(*offsets.shape[-2:], offsets.device)).long()
    height, width = features_y.shape[-2:]
    limit = positions.new_tensor([height - 1, width - 1]).view(1, 1, 2, 1, 1)
    return torch.minimum(positions.clamp(min=0), limit)


def _scores(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Tensor:
    """Dot products, candidate by candidate, each over a gathered copy of the features. Returns B,N,h,w."""
    columns = features_y.shape[-1]
    return torch.stack(
        [(features_x * _gather(features_y, positions[:, k], columns)).sum(1) for k in range(positions.shape[1])],
        dim=1,
    )


def _gather(map_BCHW: Tensor, position_B2hw: Tensor, columns: int) -> Tensor:
    """Read a map at one integer position a pixel: B,C,h,w."""
    index = (position_B2hw[:, 0] * columns + position_B2hw[:, 1]).flatten(1)
    channels = map_BCHW.shape[1]
    found = map_BCHW.flatten(2).gather(2, index.unsqueeze(1).expand(-1, channels, -1))
    return found.unflatten(2, position_B2hw.shape[-2:])
