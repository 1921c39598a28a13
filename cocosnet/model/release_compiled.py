"""The scores of the release's matching on a CPU, compiled: the one part of it that PyTorch would do slowly."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from cocosnet.model.jit import parallel_njit, torch_threads
from cocosnet.model.lanes import LINE, advanced, fetch_ahead, pointer

BLOCK = 16  # numbers that PyTorch adds one after the other before it joins partial sums, when it sums over channels


@torch_threads()
def score(
    offsets: Tensor, axis: int | None, x: Tensor, y: Tensor, grid: Tensor, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """`release_matching.score`, float32 on the CPU: the same arguments, and the same numbers to the last bit."""
    batch, both, height, width = offsets.shape
    count = both // 2 if axis is None else 3 * both // 2
    indices = torch.empty(batch, height * width, count, dtype=torch.int32)
    scores = torch.empty(batch, height * width, count)
    step, top = {None: (0, 0), -2: (1, 0), -1: (0, 1)}[axis], _top(grid)
    for b in range(batch):
        rows = [f[b].permute(1, 2, 0).contiguous().numpy() for f in (x, y)]
        _score(offsets[b].contiguous().numpy(), *rows, step, top, rounded, indices[b].numpy(), scores[b].numpy())
    return indices, scores


@torch_threads()
def to_offsets(indices: Tensor, order: Tensor, grid: Tensor, columns: int) -> Tensor:
    """`release_matching.to_offsets` on the CPU: the same arguments and numbers."""
    offsets = torch.empty(indices.shape[0], 2 * order.shape[-1], *grid.shape[-2:])
    for b in range(indices.shape[0]):
        chosen = indices[b].contiguous().numpy(), order[b].contiguous().numpy()
        _to_offsets(*chosen, columns, _top(grid), offsets[b].numpy())
    return offsets


def _top(grid: Tensor) -> int:
    """The number of the first of the rows that are given."""
    return int(grid[0, 0, 0])


@parallel_njit(boundscheck=False)
def _score(field, x, y, step, top, rounded, indices, scores):
    """field 2K,h,w; x h,w,C; y H,W,C; step (rows, columns) to the next neighbour; top: the number of the first row;
    indices and scores hw,N."""
    for i in numba.prange(field.shape[1]):
        _score_row(i, field, x, y, step, top, rounded, indices, scores)


@numba.njit(boundscheck=False)
def _score_row(i, field, x, y, step, top, rounded, indices, scores):
    width, count, channels = field.shape[2], indices.shape[1], x.shape[2]
    candidates, size = field.shape[0] // 2, (y.shape[0], y.shape[1])
    lines, reach = _lines(field, i, step[0]), 1 if count > candidates else 0
    distinct, slots, found = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.float32)
    scratch = pointer(distinct), pointer(slots), pointer(found)
    for j in range(width + 1):
        p = i * width + j
        if j < width:  # while the pixel before this one is compared, the places that this one points to are fetched
            numbers = advanced(pointer(indices), p * count)
            _point((i, j), pointer(lines), field.shape, step, reach, top, size, rounded, numbers)
            _fetch(pointer(y), numbers, count, channels)
        if j > 0:
            query, numbers = advanced(pointer(x), (p - 1) * channels), advanced(pointer(indices), (p - 1) * count)
            out = advanced(pointer(scores), (p - 1) * count)
            _distinct_dots(query, pointer(y), channels, numbers, out, count, candidates, scratch)
    # A buffer is freed after its last use, which pointers do not count as.
    found[0], slots[0], distinct[0], lines[0, 0, 0] = 0, 0, 0, 0


@numba.njit(boundscheck=False)
def _lines(field, i, step):
    """Offsets of row i and of those `step` rows before and after it, where there are such: 3,w,2K.

    A pixel's numbers side by side. In the field they lie a map apart, which a processor's cache keeps few of.
    """
    both, height, width = field.shape
    lines = np.zeros((3, width, both), np.float32)
    for line in range(3):
        row = i + (line - 1) * step
        if (line == 1 or step > 0) and 0 <= row < height:
            for k in range(both):
                for j in range(width):
                    lines[line, j, k] = field[k, row, j]
    return lines


@numba.njit(boundscheck=False)
def _point(place, lines, shape, step, reach, top, size, rounded, numbers):
    """The numbers of the pixels that the candidates of a pixel point to, its own between its neighbours'."""
    (i, j), (both, height, width) = place, shape
    candidates, at = both // 2, 0
    for sign in range(-reach, reach + 1):
        ni, nj = i + sign * step[0], j + sign * step[1]
        inside = ni >= 0 and nj >= 0 and ni < height and nj < width
        start = ((1 + sign * step[0]) * width + nj) * both
        for k in range(candidates):
            down = lines[start + k] if inside else np.float32(0)
            along = lines[start + candidates + k] if inside else np.float32(0)
            numbers[at] = _number(np.float32(top + i) + down, np.float32(j) + along, size, rounded)
            at += 1


@numba.njit(boundscheck=False)
def _fetch(pixels, numbers, count, channels):
    """Have the pixels of these numbers brought near."""
    for k in range(count):
        for line in range(0, channels, LINE):
            fetch_ahead(pixels, np.int64(numbers[k]) * channels + line)


@numba.njit(boundscheck=False)
def _distinct_dots(query, pixels, channels, numbers, out, count, candidates, scratch):
    """`_dots`, each pixel once: where matches are smooth, neighbours' k-th candidates point to the same one."""
    distinct, slots, found = scratch
    number = 0
    for k in range(count):
        slot = -1
        for earlier in (k - 1, k - candidates, k - 2 * candidates):
            if earlier >= 0 and numbers[earlier] == numbers[k]:
                slot = slots[earlier]
        if slot < 0:
            distinct[number], slot = np.int64(numbers[k]) * channels, number
            number += 1
        slots[k] = slot
    _dots(query, pixels, channels, distinct, found, number)
    for k in range(count):
        out[k] = found[slots[k]]


@parallel_njit(boundscheck=False)
def _to_offsets(indices, order, columns, top, offsets):
    """indices hw,N; order hw,K; top: the number of the first row; offsets 2K,h,w."""
    both, height, width = offsets.shape
    candidates = both // 2
    for i in numba.prange(height):
        for j in range(width):
            for k in range(candidates):
                number = indices[i * width + j, order[i * width + j, k]]
                row = number // columns
                offsets[k, i, j] = np.float32(row - top - i)
                offsets[candidates + k, i, j] = np.float32(number - row * columns - j)


@numba.njit(inline="always")
def _number(row, column, size, rounded):
    """`row * W + column`, in floats and then cut, of a place moved into the map; what is not a number becomes 0."""
    row = min(row if row > 0 else np.float32(0), np.float32(size[0] - 1))
    column = min(column if column > 0 else np.float32(0), np.float32(size[1] - 1))
    if rounded:
        row, column = np.rint(row), np.rint(column)
    return np.int32(np.float32(np.float32(row * np.float32(size[1])) + column))


@numba.njit(boundscheck=False)
def _dots(query, pixels, channels, starts, out, count):
    """Of query's C numbers with the C from each of `starts` on in pixels, all pointers.

    In PyTorch's order of adding and without fused multiply-adds: the matching turns on last bits (docs/release.md).
    Four side by side, since one alone waits for each sum.
    """
    for k in range(0, count - count % 4, 4):
        a, b, c, d = starts[k], starts[k + 1], starts[k + 2], starts[k + 3]
        s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for start in range(0, channels, BLOCK):
            t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(start, min(start + BLOCK, channels)):
                q = query[i]
                t0, t1 = t0 + q * pixels[a + i], t1 + q * pixels[b + i]
                t2, t3 = t2 + q * pixels[c + i], t3 + q * pixels[d + i]
            s0, s1, s2, s3 = s0 + t0, s1 + t1, s2 + t2, s3 + t3
        out[k], out[k + 1], out[k + 2], out[k + 3] = s0, s1, s2, s3
    for k in range(count - count % 4, count):
        total = np.float32(0)
        for start in range(0, channels, BLOCK):
            block = np.float32(0)
            for i in range(start, min(start + BLOCK, channels)):
                block += query[i] * pixels[starts[k] + i]
            total += block
        out[k] = total
