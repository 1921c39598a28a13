"""The CPU engine: propagation and evaluation as single loops over pixels, compiled by numba.

Same results as `patchmatch.propagate` and `patchmatch.evaluate` (the definition), without storing a sampled copy of
the features for every candidate. float32 on the CPU only.

Outside, positions lie B,h,w,K,2 and scores B,h,w,K, so that a pixel's numbers are together. Inside, all arrays are
flat: features N,P (P: C rounded up to whole vectors), and a pixel's state is S rows, S columns and S scores, S being K
rounded up likewise. The loops are in `loops` and `blend`, and what they do for one pixel is in `desk`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cocosnet.model import blend, loops, patchmatch, warp
from cocosnet.model.jit import torch_threads
from cocosnet.model.lanes import LANES
from cocosnet.model.matches import Matches
from cocosnet.model.warp import clamp_positions


@torch.no_grad()
@torch_threads()
def propagate(
    positions: Tensor,
    features_x: Tensor,
    features_y: Tensor,
    scores: Tensor | None = None,
    iterations: int = 1,
) -> Matches:
    """`patchmatch.propagate`: the same arguments and result, up to ties and rounding of sums.

    A match that a neighbour has offered before is not offered again. That changes nothing: it lost against K better
    ones, and a pixel's matches only ever become better.
    """
    fx, fy, blocks = _features(features_x, features_y)
    field = _inner(positions)
    known = np.empty((0, 0, 0, 0), np.float32) if scores is None else _plain(scores.permute(0, 2, 3, 1))
    shape, limits = field.shape, tuple(features_y.shape[-2:])
    state, spare, desks = _state(shape), _state(shape), _desks(shape)
    loops.enter(fx, fy, field, known, shape, limits, blocks, desks, state)
    for _ in range(iterations):
        for vertical in (False, True):
            loops.propagate_once(fx, fy, shape, limits, blocks, vertical, desks, state, spare)
            state, spare = spare, state
    found, strengths = np.empty_like(field), np.empty(shape[:-1], np.float32)
    loops.leave(shape, *state[:2], found, strengths)
    return Matches(_outer(torch.from_numpy(found)), torch.from_numpy(strengths).permute(0, 3, 1, 2))


@torch.no_grad()
@torch_threads()
def descend(coarse_positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.descend`: the same arguments and result, up to ties and rounding of sums."""
    fx, fy, blocks = _features(features_x, features_y)
    parents = _inner(coarse_positions)
    shape = (features_x.shape[0], *features_x.shape[-2:], *parents.shape[-2:])
    state, limits = _state(shape), tuple(features_y.shape[-2:])
    loops.descend(fx, fy, parents, parents.shape[1:3], shape, limits, blocks, _desks(shape), state)
    found, strengths = np.empty(shape, np.float32), np.empty(shape[:-1], np.float32)
    loops.leave(shape, *state[:2], found, strengths)
    return Matches(_outer(torch.from_numpy(found)), torch.from_numpy(strengths).permute(0, 3, 1, 2))


@torch_threads()
def evaluate(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.evaluate`: the same arguments, result and gradients."""
    if torch.is_grad_enabled():
        positions = clamp_positions(positions, *features_y.shape[-2:])
        return Matches(positions, _Cosine.apply(positions, features_x, features_y))
    field, scores = _evaluated(positions, features_x, features_y)
    return Matches(_outer(torch.from_numpy(field)), scores)


def _evaluated(positions: Tensor, features_x: Tensor, features_y: Tensor) -> tuple[np.ndarray, Tensor]:
    """Clamped positions B,h,w,K,2 and scores B,K,h,w."""
    fx, fy, blocks = _features(features_x, features_y)
    field = _inner(positions)
    clamped, scores = np.empty_like(field), np.empty(field.shape[:-1], np.float32)
    loops.evaluate(
        fx, fy, field, field.shape, tuple(features_y.shape[-2:]), blocks, _desks(field.shape), clamped, scores
    )
    return clamped, torch.from_numpy(scores).permute(0, 3, 1, 2)


def best_first(matches: Matches) -> Matches:
    """`patchmatch.best_first`: the same result, and the same gradients."""
    if torch.is_grad_enabled():
        return patchmatch.best_first(matches)
    field, scores = _inner(matches.positions), _plain(matches.scores.permute(0, 2, 3, 1))
    return _sorted(field, scores)


@torch_threads()
def _sorted(field: np.ndarray, scores: np.ndarray) -> Matches:
    positions, strengths = np.empty_like(field), np.empty_like(scores)
    loops.sort(field, scores, field.shape, _desks(field.shape), positions, strengths)
    return Matches(_outer(torch.from_numpy(positions)), torch.from_numpy(strengths).permute(0, 3, 1, 2))


@torch_threads()
def soft_warp(exemplar: Tensor, positions: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """`warp.soft_warp` for positions inside the exemplar: the same result, up to rounding, and the same gradients."""
    if torch.is_grad_enabled():
        return warp.soft_warp(exemplar, positions, scores, temperature)
    field, (height, width) = _inner(positions), exemplar.shape[-2:]
    result = np.empty((*field.shape[:3], exemplar.shape[1]), np.float32)
    given = _channels_last(exemplar), field, _plain(scores.permute(0, 2, 3, 1))
    blend.warp(*given, field.shape, (height, width), exemplar.shape[1], np.float32(temperature), result)
    return torch.from_numpy(result).permute(0, 3, 1, 2)


class _Cosine(torch.autograd.Function):
    """S(p, k) of Eq. 7 with f^y read bilinearly, -inf for duplicates, and its gradients by the positions and both
    features."""

    @staticmethod
    def forward(ctx, positions: Tensor, features_x: Tensor, features_y: Tensor) -> Tensor:
        scores = _evaluated(positions, features_x, features_y)[1]
        ctx.save_for_backward(positions, features_x, features_y, scores)
        return scores

    @staticmethod
    @once_differentiable
    @torch_threads()
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions, features_x, features_y, scores = ctx.saved_tensors
        (*features, blocks), field = _features(features_x, features_y), _inner(positions)
        gradient = _plain(gradient.masked_fill(scores == -torch.inf, 0).permute(0, 2, 3, 1))
        given = *features, field.reshape(-1), gradient.reshape(-1)
        by_position, by_x, by_y = (np.zeros_like(array) for array in (given[2], *features))
        shape, limits = field.shape, tuple(features_y.shape[-2:])
        blend.scores_backward(given, shape, limits, blocks, (by_position, by_x, by_y))
        maps = (_map(g, like) for g, like in ((by_x, features_x), (by_y, features_y)))
        return _outer(torch.from_numpy(by_position).view(shape)), *maps


def _features(*maps_BCHW: Tensor) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Both maps flat, channels last and filled up with zeros to whole vectors; and as many zeros as there are vectors
    in a pixel, a tuple whose length the compiler knows."""
    channels = maps_BCHW[0].shape[1]
    blocks = -(-channels // LANES)
    rest = blocks * LANES - channels
    flat = [
        _plain(F.pad(m.detach().permute(0, 2, 3, 1), (0, rest)) if rest else m.permute(0, 2, 3, 1)) for m in maps_BCHW
    ]
    return *(m.reshape(-1) for m in flat), (0,) * blocks


def _map(flat: np.ndarray, like: Tensor) -> Tensor:
    """A map of `like`'s shape B,C,H,W of what lies as `_features` lays it."""
    batch, channels, height, width = like.shape
    return torch.from_numpy(flat).view(batch, height, width, -1)[..., :channels].permute(0, 3, 1, 2)


def _state(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Room for all pixels' positions, scores, and the sets of candidates that their neighbours do not know yet: one
    set for the horizontal and one for the vertical passes."""
    pixels, blocks = shape[0] * shape[1] * shape[2], -(-shape[3] // LANES)
    numbers = (torch.empty(pixels * blocks * LANES * n).numpy() for n in (2, 1))  # PyTorch's memory begins with a line
    return *numbers, *(np.empty(pixels * blocks, np.uint16) for _ in range(2))


def _plain(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _channels_last(map_BCHW: Tensor) -> np.ndarray:
    return _plain(map_BCHW.permute(0, 2, 3, 1))


def _inner(positions_BK2hw: Tensor) -> np.ndarray:
    return _plain(positions_BK2hw.permute(0, 3, 4, 1, 2))


def _outer(positions_BhwK2: Tensor) -> Tensor:
    return positions_BhwK2.permute(0, 3, 4, 1, 2)


def _desks(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """Working memory, a desk (see there) a line of pixels, each on whole cache lines: floats, whole numbers, and how
    many of either a desk has."""
    lines, blocks = shape[0] * shape[1], -(-shape[3] // LANES)
    size = (3 * blocks + 3) * LANES
    return torch.empty(lines * size).numpy(), torch.empty(lines * size, dtype=torch.int32).numpy(), size
