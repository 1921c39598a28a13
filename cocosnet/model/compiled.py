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
NOWHERE = np.int32(-1)  # the pixel of an empty slot
ROUND = np.float32(1.5 * 2**23)


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
def propagate(positions: Tensor, features_x: Tensor, features_y: Tensor, scores: Tensor | None = None) -> Matches:
    """`patchmatch.propagate`: the same arguments and result, up to ties and rounding of sums."""
    fx, fy = _channels_last(features_x), _channels_last(features_y)
    field = _inner(clamp_positions(positions, *features_y.shape[-2:]))
    slots = _slots(field.shape[3])
    if scores is None:
        known = _scores(fx, fy, field)
        known[_duplicates(field, known, fy.shape[2], slots)] = EMPTY
    else:
        known = _plain(scores.permute(0, 2, 3, 1))
    for vertical in (False, True):
        found = np.empty_like(field), np.empty_like(known)
        _pass(fx, fy, field, known, vertical, *found, slots)
        field, known = found
    return Matches(_outer(torch.from_numpy(field)), torch.from_numpy(known).permute(0, 3, 1, 2))


@_torch_threads()
def evaluate(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.evaluate`: the same arguments, result and gradients."""
    positions = clamp_positions(positions, *features_y.shape[-2:])
    scores = _Cosine.apply(positions, features_x, features_y)
    with torch.no_grad():
        field, slots = _inner(positions), _slots(positions.shape[1])
        found = _duplicates(field, _plain(scores.permute(0, 2, 3, 1)), features_y.shape[-1], slots)
        duplicate = torch.from_numpy(found)
    return Matches(positions, scores.masked_fill(duplicate.permute(0, 3, 1, 2), -torch.inf))


class _Cosine(torch.autograd.Function):
    """S(p, k) of Eq. 7 with f^y read bilinearly, and its gradients by both features and the positions."""

    @staticmethod
    def forward(ctx, positions: Tensor, features_x: Tensor, features_y: Tensor) -> Tensor:
        ctx.save_for_backward(positions, features_x, features_y)
        fx, fy = _channels_last(features_x), _channels_last(features_y)
        scores = _scores(fx, fy, _inner(positions))
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


def _slots(candidates: int) -> tuple[int, ...]:
    """A tuple of at least K numbers whose length the compiler knows (it is part of the type).

    Loops over it unroll into vector lanes. Few lengths exist, since each is compiled on its own.
    """
    return (0,) * max(4, 1 << (candidates - 1).bit_length())


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
def _dot(fx, fy, pixel, y, x):
    """fx(b, i, j) . fy(b, y, x), bilinear. fx B,h,w,C; fy B,H,W,C; pixel (b, i, j).

    Whole arrays with unsigned indices: a view would be counted up and down, a signed index be tested for wrapping.
    """
    b, i, j = np.uintp(pixel[0]), np.uintp(pixel[1]), np.uintp(pixel[2])
    low_y, high_y, v = _corners(y, fy.shape[1])
    low_x, high_x, u = _corners(x, fy.shape[2])
    y0, y1, x0, x1 = np.uintp(low_y), np.uintp(high_y), np.uintp(low_x), np.uintp(high_x)
    total, one = np.float32(0), np.float32(1)
    if v == 0 and u == 0:
        for k in range(fx.shape[3]):
            c = np.uintp(k)
            total += fx[b, i, j, c] * fy[b, y0, x0, c]
        return total
    w00, w01, w10, w11 = (one - v) * (one - u), (one - v) * u, v * (one - u), v * u
    for k in range(fx.shape[3]):
        c = np.uintp(k)
        top = w00 * fy[b, y0, x0, c] + w01 * fy[b, y0, x1, c]
        total += fx[b, i, j, c] * (top + w10 * fy[b, y1, x0, c] + w11 * fy[b, y1, x1, c])
    return total


@njit
def _pixel(y, x, columns):
    """The number of the pixel that a position lies in. Adding 1.5 * 2^23 rounds half to even, in vector lanes."""
    row, column = np.int32((y + ROUND) - ROUND), np.int32((x + ROUND) - ROUND)
    return row * np.int32(columns) + column


@njit
def _weakest(scores, slots):
    """The slot of the lowest score."""
    low, slot = scores[0], 0
    for k in range(1, len(slots)):
        low = min(low, scores[k])
    for k in range(len(slots)):
        if scores[k] == low:
            slot = k
    return slot


@njit
def _neighbours(field, pixel, vertical, limits, tried):
    """The candidates that both neighbours along an axis propose, into `tried` (ys, xs, pixels); their number."""
    ys, xs, pixels = tried
    b, i, j = pixel
    _, height, width, candidates, _ = field.shape
    bottom, right = np.float32(limits[0] - 1), np.float32(limits[1] - 1)
    count = 0
    for shift in (-1, 1):
        ni, nj = (i + shift, j) if vertical else (i, j + shift)
        if ni < 0 or nj < 0 or ni >= height or nj >= width:
            continue
        down, along = np.float32(shift if vertical else 0), np.float32(0 if vertical else shift)
        for k in range(candidates):
            y = min(max(field[b, ni, nj, k, 0] - down, np.float32(0)), bottom)
            x = min(max(field[b, ni, nj, k, 1] - along, np.float32(0)), right)
            ys[count + k], xs[count + k], pixels[count + k] = y, x, _pixel(y, x, limits[1])
        count += candidates
    return count


@njit
def _offer(fx, fy, pixel, best, candidates, count, slots):
    """Let candidates (ys, xs, pixels) compete for the slots of `best` (ys, xs, pixels, scores), one a pixel."""
    ys, xs, pixels, scores = best
    weakest = _weakest(scores, slots)
    for m in range(count):
        y, x, slot = candidates[0][m], candidates[1][m], -1
        for k in range(len(slots)):
            if pixels[k] == candidates[2][m]:
                slot = k
        if slot >= 0 and ys[slot] == y and xs[slot] == x:
            continue
        slot = weakest if slot < 0 else slot
        score = _dot(fx, fy, pixel, y, x)
        if score > scores[slot]:
            ys[slot], xs[slot], pixels[slot], scores[slot] = y, x, candidates[2][m], score
            weakest = _weakest(scores, slots)


@njit
def _load(field, known, pixel, columns, best, slots):
    """A pixel's own matches into the slots of `best`. Slots beyond K hold an infinite score, which nothing beats."""
    b, i, j = pixel
    ys, xs, pixels, scores = best
    for k in range(field.shape[3]):
        y, x, score = field[b, i, j, k, 0], field[b, i, j, k, 1], known[b, i, j, k]
        ys[k], xs[k], scores[k] = y, x, score
        pixels[k] = NOWHERE if score == EMPTY else _pixel(y, x, columns)
    for k in range(field.shape[3], len(slots)):
        pixels[k], scores[k] = NOWHERE, -EMPTY


@njit
def _store_sorted(best, pixel, positions, scores, slots):
    """The K slots, best first; empty ones repeat the best one's position."""
    b, i, j = pixel
    ys, xs, _, strengths = best
    candidates = scores.shape[3]
    for k in range(candidates):
        mine, rank = strengths[k], candidates - len(slots)
        for m in range(len(slots)):
            rank += (strengths[m] > mine) | ((strengths[m] == mine) & (m < k))
        scores[b, i, j, rank], positions[b, i, j, rank, 0], positions[b, i, j, rank, 1] = mine, ys[k], xs[k]
    for k in range(1, candidates):
        if scores[b, i, j, k] == EMPTY:
            positions[b, i, j, k, 0], positions[b, i, j, k, 1] = positions[b, i, j, 0, 0], positions[b, i, j, 0, 1]


@njit(parallel=True, cache=True)
def _pass(features_x, features_y, field, known, vertical, positions, scores, slots):
    """One propagation pass along one axis: `neighbour_candidates` and `best_distinct` at once, own scores known."""
    batch, height, width, candidates, _ = field.shape
    limits, size = (features_y.shape[1], features_y.shape[2]), len(slots)
    for line in prange(batch * height):
        b, i = line // height, line % height
        best = (
            np.empty(size, np.float32),
            np.empty(size, np.float32),
            np.empty(size, np.int32),
            np.empty(size, np.float32),
        )
        tried = np.empty(2 * size, np.float32), np.empty(2 * size, np.float32), np.empty(2 * size, np.int32)
        for j in range(width):
            _load(field, known, (b, i, j), limits[1], best, slots)
            count = _neighbours(field, (b, i, j), vertical, limits, tried)
            _offer(features_x, features_y, (b, i, j), best, tried, count, slots)
            _store_sorted(best, (b, i, j), positions, scores, slots)


@njit(parallel=True, cache=True)
def _scores(features_x, features_y, field):
    """Cosines of all candidates as they stand. Returns B,h,w,K."""
    batch, height, width, candidates, _ = field.shape
    scores = np.empty((batch, height, width, candidates), dtype=np.float32)
    for line in prange(batch * height):
        b, i = line // height, line % height
        for j in range(width):
            for k in range(candidates):
                y, x = field[b, i, j, k, 0], field[b, i, j, k, 1]
                scores[b, i, j, k] = _dot(features_x, features_y, (b, i, j), y, x)
    return scores


@njit(parallel=True, cache=True)
def _duplicates(field, scores, columns, slots):
    """Which candidates lie in a pixel that a better or equal, earlier one holds. Returns B,h,w,K bool."""
    batch, height, width, candidates, _ = field.shape
    result = np.zeros((batch, height, width, candidates), dtype=np.bool_)
    for line in prange(batch * height):
        b, i = line // height, line % height
        size = len(slots)
        best = (
            np.empty(size, np.float32),
            np.empty(size, np.float32),
            np.empty(size, np.int32),
            np.empty(size, np.float32),
        )
        for j in range(width):
            _load(field, scores, (b, i, j), columns, best, slots)
            for k in range(candidates):
                mine, pixel, hits = best[3][k], best[2][k], 0
                for m in range(len(slots)):
                    hits += (best[2][m] == pixel) & ((best[3][m] > mine) | ((best[3][m] == mine) & (m < k)))
                result[b, i, j, k] = hits > 0
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
