"""The CPU engine: propagation and evaluation as single loops over pixels, compiled by numba.

Same results as `patchmatch.propagate` and `patchmatch.evaluate` (the definition), without storing a sampled copy of
the features for every candidate. float32 on the CPU only.

Layouts inside: features B,H,W,C and positions B,h,w,K,2, both contiguous, so that a candidate's C numbers lie together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from cocosnet.model.matches import Matches
from cocosnet.model.warp import clamp_positions

# "reassoc" lets sums over channels run in vector lanes; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}
EMPTY = np.float32(-np.inf)


@contextlib.contextmanager
def _torch_threads() -> Iterator[None]:
    """Run numba on as many threads as PyTorch uses, and leave PyTorch's number alone.

    The two share one OpenMP, whose number numba sets; left changed, PyTorch would sum in another order from then on,
    and a resumed run would differ from an undisturbed one in its last bits.
    """
    count = torch.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


@torch.no_grad()
@_torch_threads()
def propagate(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.propagate`: the same arguments and result, up to ties and rounding of sums."""
    fx, fy = _channels_last(features_x), _channels_last(features_y)
    field = _inner(clamp_positions(positions, *features_y.shape[-2:]))
    for vertical in (False, True):
        best = np.empty_like(field)
        scores = np.empty(field.shape[:-1], dtype=np.float32)
        _pass(fx, fy, field, vertical, best, scores)
        field = best
    return Matches(_outer(torch.from_numpy(field)), torch.from_numpy(scores).permute(0, 3, 1, 2))


@_torch_threads()
def evaluate(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.evaluate`: the same arguments, result and gradients."""
    positions = clamp_positions(positions, *features_y.shape[-2:])
    scores = _Cosine.apply(positions, features_x, features_y)
    with torch.no_grad():
        duplicate = torch.from_numpy(_duplicates(_inner(positions), _plain(scores.permute(0, 2, 3, 1))))
    return Matches(positions, scores.masked_fill(duplicate.permute(0, 3, 1, 2), -torch.inf))


class _Cosine(torch.autograd.Function):
    """S(p, k) of Eq. 7 with f^y read bilinearly, and its gradients by both features and the positions."""

    @staticmethod
    def forward(ctx, positions: Tensor, features_x: Tensor, features_y: Tensor) -> Tensor:
        ctx.save_for_backward(positions, features_x, features_y)
        scores = _scores(_channels_last(features_x), _channels_last(features_y), _inner(positions))
        return torch.from_numpy(scores).permute(0, 3, 1, 2)

    @staticmethod
    @_torch_threads()
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions, features_x, features_y = ctx.saved_tensors
        fx, fy, field = _channels_last(features_x), _channels_last(features_y), _inner(positions)
        by_position, by_x, by_y = np.zeros_like(field), np.zeros_like(fx), np.zeros_like(fy)
        _scores_backward(fx, fy, field, _plain(gradient.permute(0, 2, 3, 1)), by_position, by_x, by_y)
        maps = (torch.from_numpy(g).permute(0, 3, 1, 2) for g in (by_x, by_y))
        return _outer(torch.from_numpy(by_position)), *maps


def _plain(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _channels_last(map_BCHW: Tensor) -> np.ndarray:
    return _plain(map_BCHW.permute(0, 2, 3, 1))


def _inner(positions_BK2hw: Tensor) -> np.ndarray:
    return _plain(positions_BK2hw.permute(0, 3, 4, 1, 2))


def _outer(positions_BhwK2: Tensor) -> Tensor:
    return positions_BhwK2.permute(0, 3, 4, 1, 2)


@njit(inline="always")
def _corners(value, size):
    """The two pixels around a coordinate inside [0, size-1], and the second one's weight."""
    low = min(int(value), max(size - 2, 0))
    return low, min(low + 1, size - 1), np.float32(value - low)


@njit(fastmath=_FAST)
def _dot(fx, fy, y, x):
    """fx . fy(y, x), bilinear. fx C; fy H,W,C."""
    y0, y1, v = _corners(y, fy.shape[0])
    x0, x1, u = _corners(x, fy.shape[1])
    total = np.float32(0)
    if v == 0 and u == 0:
        corner = fy[y0, x0]
        for c in range(fx.shape[0]):
            total += fx[c] * corner[c]
        return total
    one = np.float32(1)
    w00, w01, w10, w11 = (one - v) * (one - u), (one - v) * u, v * (one - u), v * u
    f00, f01, f10, f11 = fy[y0, x0], fy[y0, x1], fy[y1, x0], fy[y1, x1]
    for c in range(fx.shape[0]):
        total += fx[c] * (w00 * f00[c] + w01 * f01[c] + w10 * f10[c] + w11 * f11[c])
    return total


@njit(inline="always")
def _slot_of(best, count, pixel_y, pixel_x):
    """The slot whose match lies in this pixel of the exemplar, or -1."""
    for k in range(count):
        if np.rint(best[k, 0]) == pixel_y and np.rint(best[k, 1]) == pixel_x:
            return k
    return -1


@njit(inline="always")
def _place(best, scores, slot, y, x, score):
    """Put a match into `slot` and move it up to where its score belongs; what lay between moves down by one."""
    while slot > 0 and scores[slot - 1] < score:
        scores[slot] = scores[slot - 1]
        best[slot, 0], best[slot, 1] = best[slot - 1, 0], best[slot - 1, 1]
        slot -= 1
    scores[slot] = score
    best[slot, 0], best[slot, 1] = y, x


@njit
def _offer(fx, fy, best, scores, count, y, x):
    """Consider a candidate for the sorted list of distinct best ones. Returns the list's new length."""
    slot = _slot_of(best, count, np.rint(y), np.rint(x))
    if slot >= 0 and best[slot, 0] == y and best[slot, 1] == x:
        return count
    score = _dot(fx, fy, y, x)
    if slot >= 0:
        if score > scores[slot]:
            _place(best, scores, slot, y, x, score)
    elif count < scores.shape[0]:
        _place(best, scores, count, y, x, score)
        return count + 1
    elif score > scores[count - 1]:
        _place(best, scores, count - 1, y, x, score)
    return count


@njit(parallel=True, cache=True)
def _pass(features_x, features_y, field, vertical, best, scores):
    """One propagation pass along one axis: `neighbour_candidates` and `best_distinct` at once."""
    batch, height, width, candidates, _ = field.shape
    bottom, right = np.float32(features_y.shape[1] - 1), np.float32(features_y.shape[2] - 1)
    for line in prange(batch * height):
        b, i = line // height, line % height
        for j in range(width):
            count = 0
            for side in range(3):
                shift = (0, -1, 1)[side]
                ni, nj = (i + shift, j) if vertical else (i, j + shift)
                if ni < 0 or nj < 0 or ni >= height or nj >= width:
                    continue
                for k in range(candidates):
                    y = field[b, ni, nj, k, 0] - np.float32(shift if vertical else 0)
                    x = field[b, ni, nj, k, 1] - np.float32(0 if vertical else shift)
                    y, x = min(max(y, np.float32(0)), bottom), min(max(x, np.float32(0)), right)
                    count = _offer(features_x[b, i, j], features_y[b], best[b, i, j], scores[b, i, j], count, y, x)
            for k in range(count, candidates):
                scores[b, i, j, k] = EMPTY
                best[b, i, j, k] = best[b, i, j, 0]


@njit(parallel=True, cache=True)
def _scores(features_x, features_y, field):
    """Cosines of all candidates as they stand. Returns B,h,w,K."""
    batch, height, width, candidates, _ = field.shape
    scores = np.empty((batch, height, width, candidates), dtype=np.float32)
    for line in prange(batch * height):
        b, i = line // height, line % height
        for j in range(width):
            for k in range(candidates):
                scores[b, i, j, k] = _dot(
                    features_x[b, i, j], features_y[b], field[b, i, j, k, 0], field[b, i, j, k, 1]
                )
    return scores


@njit(parallel=True, cache=True)
def _duplicates(field, scores):
    """Which candidates lie in a pixel that a better or equal, earlier one holds. Returns B,h,w,K bool."""
    batch, height, width, candidates, _ = field.shape
    result = np.zeros((batch, height, width, candidates), dtype=np.bool_)
    for line in prange(batch * height):
        b, i = line // height, line % height
        for j in range(width):
            rows, columns = np.rint(field[b, i, j, :, 0]), np.rint(field[b, i, j, :, 1])
            for k in range(candidates):
                for m in range(candidates):
                    better = scores[b, i, j, m] > scores[b, i, j, k] or (
                        scores[b, i, j, m] == scores[b, i, j, k] and m < k
                    )
                    if better and rows[m] == rows[k] and columns[m] == columns[k]:
                        result[b, i, j, k] = True
    return result


@njit(parallel=True, cache=True)
def _scores_backward(features_x, features_y, field, gradient, by_position, by_x, by_y):
    """Gradients of `_scores`. Pictures in parallel: within one, pixels add to the same places of the exemplar's map."""
    batch, height, width, candidates, _ = field.shape
    for b in prange(batch):
        for i in range(height):
            for j in range(width):
                for k in range(candidates):
                    if gradient[b, i, j, k] != 0:
                        _dot_backward(
                            features_x[b, i, j],
                            features_y[b],
                            field[b, i, j, k],
                            gradient[b, i, j, k],
                            by_position[b, i, j, k],
                            by_x[b, i, j],
                            by_y[b],
                        )


@njit(fastmath=_FAST)
def _dot_backward(fx, fy, position, g, by_position, by_x, by_y):
    """Gradients of `_dot`, added to by_x C and by_y H,W,C, written to by_position 2."""
    y0, y1, v = _corners(position[0], fy.shape[0])
    x0, x1, u = _corners(position[1], fy.shape[1])
    one = np.float32(1)
    w00, w01, w10, w11 = g * (one - v) * (one - u), g * (one - v) * u, g * v * (one - u), g * v * u
    f00, f01, f10, f11 = fy[y0, x0], fy[y0, x1], fy[y1, x0], fy[y1, x1]
    g00, g01, g10, g11 = by_y[y0, x0], by_y[y0, x1], by_y[y1, x0], by_y[y1, x1]
    d00, d01, d10, d11 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for c in range(fx.shape[0]):
        by_x[c] += w00 * f00[c] + w01 * f01[c] + w10 * f10[c] + w11 * f11[c]
        d00 += fx[c] * f00[c]
        d01 += fx[c] * f01[c]
        d10 += fx[c] * f10[c]
        d11 += fx[c] * f11[c]
    for c in range(fx.shape[0]):
        g00[c] += w00 * fx[c]
        g01[c] += w01 * fx[c]
        g10[c] += w10 * fx[c]
        g11[c] += w11 * fx[c]
    if y1 > y0:
        by_position[0] = g * ((one - u) * (d10 - d00) + u * (d11 - d01))
    if x1 > x0:
        by_position[1] = g * ((one - v) * (d01 - d00) + v * (d11 - d10))
