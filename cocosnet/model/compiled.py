"""The CPU engine: propagation and evaluation as single loops over pixels, compiled by numba.

Same results as `patchmatch.propagate` and `patchmatch.evaluate` (the definition), without storing a sampled copy of
the features for every candidate. float32 on the CPU only.

Outside, positions lie B,h,w,K,2 and scores B,h,w,K, so that a pixel's numbers are together. Inside, all arrays are
flat: features N,P (P: C rounded up to whole vectors), and a pixel's state is S rows, S columns and S scores, S being K
rounded up likewise. Slots beyond K hold an infinite score, which nothing beats, and lie at (0, -1), outside; an empty
slot holds -inf.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from cocosnet.model import lanes, patchmatch, warp
from cocosnet.model.jit import parallel_njit, torch_threads
from cocosnet.model.lanes import LANES, LINE
from cocosnet.model.matches import Matches
from cocosnet.model.warp import clamp_positions

EMPTY = np.float32(-np.inf)
NOWHERE = np.int32(-1)  # the pixel of an empty slot
NEGLIGIBLE = np.float32(1e-9)  # times the largest weight: sixteen of them do not change a float32 in [-1, 1]
SHORTEST = np.float32(patchmatch.SHORTEST)
R2, SPAN = tuple(map(np.uint64, warp.R2_STEPS)), np.uint64(2**32)
ROUND = np.float32(1.5 * 2**23)  # added and taken off again, it rounds half to even


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
    _enter(fx, fy, field, known, shape, limits, blocks, desks, state)
    for _ in range(iterations):
        for vertical in (False, True):
            _pass(fx, fy, shape, limits, blocks, vertical, desks, state, spare)
            state, spare = spare, state
    found, strengths = np.empty_like(field), np.empty(shape[:-1], np.float32)
    _leave(shape, *state[:2], found, strengths)
    return Matches(_outer(torch.from_numpy(found)), torch.from_numpy(strengths).permute(0, 3, 1, 2))


@torch.no_grad()
@torch_threads()
def descend(coarse_positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.descend`: the same arguments and result, up to ties and rounding of sums."""
    fx, fy, blocks = _features(features_x, features_y)
    parents = _inner(coarse_positions)
    shape = (features_x.shape[0], *features_x.shape[-2:], *parents.shape[-2:])
    state, limits = _state(shape), tuple(features_y.shape[-2:])
    _descend(fx, fy, parents, parents.shape[1:3], shape, limits, blocks, _desks(shape), state)
    found, strengths = np.empty(shape, np.float32), np.empty(shape[:-1], np.float32)
    _leave(shape, *state[:2], found, strengths)
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
    _evaluate(fx, fy, field, field.shape, tuple(features_y.shape[-2:]), blocks, _desks(field.shape), clamped, scores)
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
    _sort(field, scores, field.shape, _desks(field.shape), positions, strengths)
    return Matches(_outer(torch.from_numpy(positions)), torch.from_numpy(strengths).permute(0, 3, 1, 2))


@torch_threads()
def soft_warp(exemplar: Tensor, positions: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """`warp.soft_warp` for positions inside the exemplar: the same result, up to rounding, and the same gradients."""
    if torch.is_grad_enabled():
        return warp.soft_warp(exemplar, positions, scores, temperature)
    field, (height, width) = _inner(positions), exemplar.shape[-2:]
    result = np.empty((*field.shape[:3], exemplar.shape[1]), np.float32)
    given = _channels_last(exemplar), field, _plain(scores.permute(0, 2, 3, 1))
    _warp(*given, field.shape, (height, width), exemplar.shape[1], np.float32(temperature), result)
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
        _scores_backward(given, shape, limits, blocks, (by_position, by_x, by_y))
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
    """Working memory, a desk a line of pixels, each on whole cache lines: floats (S rows, S columns, S scores, then
    those of a vector of candidates) and whole numbers (S pixels, LANES pixels of candidates, and for every vector of
    slots the set of those that changed)."""
    lines, blocks = shape[0] * shape[1], -(-shape[3] // LANES)
    size = (3 * blocks + 3) * LANES
    return torch.empty(lines * size).numpy(), torch.empty(lines * size, dtype=torch.int32).numpy(), size


@njit(inline="always")
def _desk(desks, line):
    """Pointers to a line's desk."""
    floats, numbers, size = desks
    return lanes.advanced(lanes.pointer(floats), line * size), lanes.advanced(lanes.pointer(numbers), line * size)


@njit(inline="always")
def _pointers(state, swapped):
    """Pointers to a state: positions, scores, and the two kinds of sets, those that this pass needs first."""
    positions, scores, across, down = state
    if swapped:
        across, down = down, across
    return lanes.pointer(positions), lanes.pointer(scores), lanes.pointer(across), lanes.pointer(down)


@njit(inline="always")
def _pixels(ys, xs, columns):
    """The numbers of the pixels that a vector of positions lies in."""
    half = lanes.splat(ROUND)
    rows, places = lanes.subtract(lanes.add(ys, half), half), lanes.subtract(lanes.add(xs, half), half)
    return lanes.number_pixels(rows, places, columns)


@njit(inline="always")
def _clamped(vector, size):
    """A vector of coordinates moved into [0, size - 1]; what is not a number becomes 0."""
    return lanes.smallest(lanes.largest(vector, lanes.splat(np.float32(0))), lanes.splat(np.float32(size - 1)))


@njit
def _similarity(fx, at, fy, image, limits, y, x, blocks):
    """Cosine of fx[at : at + P] and fy(image, y, x), bilinear; (y, x) inside the map. NaN, which has no rank: EMPTY."""
    score = _cosine(fx, at, fy, image, limits, y, x, blocks)
    return score if score == score else EMPTY


@njit
def _cosine(fx, at, fy, image, limits, y, x, blocks):
    """`_similarity`, NaN as it comes."""
    row, column, step = int(y), int(x), LANES * len(blocks)
    v, u = y - np.float32(row), x - np.float32(column)
    place = ((image * limits[0] + row) * limits[1] + column) * step
    if v == 0 and u == 0:
        return lanes.dot(fx, at, fy, place, blocks)
    down = step * limits[1] if row + 1 < limits[0] else 0
    along = step if column + 1 < limits[1] else 0
    one = np.float32(1)
    places = place, place + along, place + down, place + down + along
    weights = (one - v) * (one - u), (one - v) * u, v * (one - u), v * u
    product, square = lanes.blended_dots(fx, at, fy, places, weights, blocks)
    return product / max(np.sqrt(square), SHORTEST)


@njit
def _weakest(scores, slots, vector, block):
    """The lowest of S scores, of which those from `block` on are at hand as a vector."""
    low = lanes.least(vector)
    for other in range(0, slots, LANES):
        if other != block:
            low = min(low, lanes.least(lanes.load(scores, other)))
    return low


@njit
def _place(desk, slots, pixel, low):
    """The slot that holds a pixel, or the one of the lowest score; and whether it is the former."""
    floats, numbers = desk
    for block in range(0, slots, LANES):
        same = lanes.equal(lanes.load(numbers, block), lanes.splat(pixel))
        if same:
            return block + lanes.first(same), True
    for block in range(0, slots, LANES):
        same = lanes.equal(lanes.load(floats, 2 * slots + block), lanes.splat(low))
        if same:
            return block + lanes.first(same), False
    return 0, True


@njit
def _accept(desk, slots, candidate, pixel, low):
    """Put (y, x, score), which beats the lowest score, into its slot, unless a better one holds its pixel.

    Returns the new lowest score.
    """
    floats, numbers = desk
    y, x, score = candidate
    slot, holds = _place(desk, slots, pixel, low)
    if holds and not score > floats[2 * slots + slot]:
        return low
    block, lane = slot // LANES * LANES, slot % LANES
    lanes.store(floats, block, lanes.replace(lanes.load(floats, block), lane, y))
    lanes.store(floats, slots + block, lanes.replace(lanes.load(floats, slots + block), lane, x))
    scores = lanes.replace(lanes.load(floats, 2 * slots + block), lane, score)
    lanes.store(floats, 2 * slots + block, scores)
    lanes.store(numbers, block, lanes.replace(lanes.load(numbers, block), lane, pixel))
    numbers[slots + LANES + slot // LANES] |= np.int32(1) << np.int32(lane)
    return _weakest(lanes.advanced(floats, 2 * slots), slots, scores, block)


@njit
def _offer(here, limits, desk, slots, ys, xs, waiting, low, blocks):
    """Let those of a vector's candidates that are in the set `waiting` compete for the desk's slots.

    Returns the new lowest score.
    """
    floats, _ = desk
    for block in range(0, slots, LANES):
        waiting &= ~lanes.held(ys, xs, floats, block, slots + block)
    if waiting == 0:
        return low
    _try(here, limits, desk, slots, ys, xs, waiting, blocks)
    return _compete(desk, slots, waiting, low)


@njit
def _try(here, limits, desk, slots, ys, xs, waiting, blocks):
    """Lay a vector's candidates beside the desk's slots, and score those in the set `waiting`.

    All scores come before any decision: a processor guesses decisions, and a wrong guess costs as much as a score.
    """
    floats, numbers = desk
    tried = 3 * slots
    lanes.store(floats, tried, ys)
    lanes.store(floats, tried + LANES, xs)
    lanes.store(numbers, slots, _pixels(ys, xs, np.int32(limits[1])))
    while waiting:
        k = tried + lanes.first(waiting)
        waiting &= waiting - 1
        floats[k + 2 * LANES] = _similarity(*here, limits, floats[k], floats[k + LANES], blocks)


@njit
def _compete(desk, slots, waiting, low):
    """The decisions about what `_try` has scored. Returns the new lowest score."""
    floats, numbers = desk
    tried = 3 * slots
    rest = waiting & lanes.greater(lanes.load(floats, tried + 2 * LANES), lanes.splat(low))
    while rest:
        lane = lanes.first(rest)
        rest &= rest - 1
        candidate = floats[tried + lane], floats[tried + LANES + lane], floats[tried + 2 * LANES + lane]
        if candidate[2] > low:
            low = _accept(desk, slots, candidate, numbers[slots + lane], low)
    return low


@njit
def _lay_out(positions, scores, pixel, columns, desk, slots):
    """A pixel's state onto the desk. Returns the lowest score."""
    floats, numbers = desk
    for block in range(0, slots, LANES):
        ys, xs = (
            lanes.load(positions, 2 * slots * pixel + block),
            lanes.load(positions, 2 * slots * pixel + slots + block),
        )
        lanes.store(floats, block, ys)
        lanes.store(floats, slots + block, xs)
        strengths = lanes.load(scores, slots * pixel + block)
        empty = lanes.equal(strengths, lanes.splat(EMPTY))
        lanes.store(floats, 2 * slots + block, strengths)
        lanes.store(numbers, block, lanes.choose(empty, lanes.splat(NOWHERE), _pixels(ys, xs, np.int32(columns))))
        numbers[slots + LANES + block // LANES] = 0
    return _weakest(lanes.advanced(floats, 2 * slots), slots, strengths, slots - LANES)


@njit
def _put_back(desk, slots, positions, scores, pixel):
    floats, _ = desk
    for block in range(0, slots, LANES):
        lanes.store(positions, 2 * slots * pixel + block, lanes.load(floats, block))
        lanes.store(positions, 2 * slots * pixel + slots + block, lanes.load(floats, slots + block))
        lanes.store(scores, slots * pixel + block, lanes.load(floats, 2 * slots + block))


@njit
def _pass_line(fx, fy, shape, limits, blocks, vertical, line, desk, old, new):
    """A line of pixels of `_pass`; old and new are states."""
    _, height, width, candidates, _ = shape
    slots, sets = -(-candidates // LANES) * LANES, -(-candidates // LANES)
    positions, scores, fresh, other_fresh = old
    size, step = (height, width) if vertical else (width, 1)
    for j in range(width):
        pixel = line * width + j
        low = _lay_out(positions, scores, pixel, limits[1], desk, slots)
        here = fx, pixel * LANES * len(blocks), fy, line // height
        for shift in (-1, 1):
            at = (line % height if vertical else j) + shift
            if 0 <= at < size:
                for block in range(sets):
                    n = (pixel + shift * step) * sets + block
                    if fresh[n]:
                        candidates_there = _shifted(positions, n, sets, shift, vertical, limits)
                        low = _offer(here, limits, desk, slots, *candidates_there, np.int64(fresh[n]), low, blocks)
        _put_back(desk, slots, new[0], new[1], pixel)
        for block in range(sets):
            n, changed = pixel * sets + block, np.uint16(desk[1][slots + LANES + block])
            new[2][n], new[3][n] = changed, other_fresh[n] | changed


@njit(inline="always")
def _shifted(positions, n, sets, shift, vertical, limits):
    """The positions of vector number n of the state, continued by one pixel."""
    source, slots = (n // sets * 2 * sets + n % sets) * LANES, sets * LANES
    ys, xs = lanes.load(positions, source), lanes.load(positions, source + slots)
    if vertical:
        ys = _clamped(lanes.subtract(ys, lanes.splat(np.float32(shift))), limits[0])
    else:
        xs = _clamped(lanes.subtract(xs, lanes.splat(np.float32(shift))), limits[1])
    return ys, xs


@parallel_njit()
def _pass(fx, fy, shape, limits, blocks, vertical, desks, old, new):
    """One propagation pass along one axis: `neighbour_candidates` and `best_distinct` at once. old, new: states."""
    for line in prange(shape[0] * shape[1]):
        _pass_line(
            lanes.pointer(fx),
            lanes.pointer(fy),
            shape,
            limits,
            blocks,
            vertical,
            line,
            _desk(desks, line),
            _pointers(old, vertical),
            _pointers(new, vertical),
        )


@njit
def _read(field, pixel, candidates, limits, desk, slots):
    """A pixel's positions, clamped, onto the desk; scores beyond K infinite."""
    floats, numbers = desk
    for k in range(candidates):
        floats[k], floats[slots + k] = field[2 * (pixel * candidates + k)], field[2 * (pixel * candidates + k) + 1]
    for block in range(0, slots, LANES):
        ys = _clamped(lanes.load(floats, block), limits[0])
        xs = _clamped(lanes.load(floats, slots + block), limits[1])
        lanes.store(floats, block, ys)
        lanes.store(floats, slots + block, xs)
        lanes.store(numbers, block, _pixels(ys, xs, np.int32(limits[1])))
    for k in range(candidates, slots):
        floats[k], floats[slots + k], floats[2 * slots + k], numbers[k] = 0, NOWHERE, -EMPTY, NOWHERE


@njit
def _score(here, limits, desk, slots, candidates, blocks):
    """Scores of the desk's positions."""
    floats, _ = desk
    for k in range(candidates):
        floats[2 * slots + k] = _similarity(*here, limits, floats[k], floats[slots + k], blocks)


@njit
def _is_duplicate(desk, slots, k):
    """Whether a better or equal, earlier one holds the pixel of slot k."""
    floats, numbers = desk
    mine = floats[2 * slots + k]
    for block in range(0, slots, LANES):
        same = lanes.equal(lanes.load(numbers, block), lanes.splat(numbers[k]))
        while same:
            other = block + lanes.first(same)
            same &= same - 1
            strength = floats[2 * slots + other]
            if strength > mine or (strength == mine and other < k):
                return True
    return False


@njit
def _enter_pixel(desk, slots, candidates, state, pixel):
    """The desk into a state, duplicates emptied."""
    floats, _ = desk
    positions, scores, fresh, fresh_downward = state
    _put_back(desk, slots, positions, scores, pixel)
    for block in range(slots // LANES):
        filled, there = 0, min(candidates - block * LANES, LANES)
        for k in range(block * LANES, block * LANES + there):
            if floats[2 * slots + k] == EMPTY or _is_duplicate(desk, slots, k):
                scores[slots * pixel + k] = EMPTY
            else:
                filled |= 1 << (k % LANES)
        n = pixel * (slots // LANES) + block
        fresh[n], fresh_downward[n] = (1 << there) - 1, filled  # the definition offers duplicates as well


@njit
def _enter_line(fx, fy, field, known, shape, limits, blocks, line, desk, state):
    """A line of pixels of `_enter`."""
    _, height, width, candidates, _ = shape
    slots = -(-candidates // LANES) * LANES
    for j in range(width):
        pixel = line * width + j
        _read(field, pixel, candidates, limits, desk, slots)
        if known[1]:
            for k in range(candidates):
                desk[0][2 * slots + k] = known[0][pixel * candidates + k]
        else:
            _score((fx, pixel * LANES * len(blocks), fy, line // height), limits, desk, slots, candidates, blocks)
        _enter_pixel(desk, slots, candidates, state, pixel)


@parallel_njit()
def _enter(fx, fy, field, known, shape, limits, blocks, desks, state):
    """A field B,h,w,K,2 into a state. `known`: its scores B,h,w,K, or nothing."""
    for line in prange(shape[0] * shape[1]):
        scores = lanes.pointer(known), known.size > 0
        _enter_line(
            lanes.pointer(fx),
            lanes.pointer(fy),
            lanes.pointer(field),
            scores,
            shape,
            limits,
            blocks,
            line,
            _desk(desks, line),
            _pointers(state, False),
        )


@njit
def _clear(desk, slots, candidates):
    """A desk of empty slots. Returns the lowest score."""
    floats, numbers = desk
    for k in range(slots):
        floats[k], floats[slots + k], numbers[k] = 0, NOWHERE, NOWHERE
        floats[2 * slots + k] = EMPTY if k < candidates else -EMPTY
    return EMPTY


@njit
def _children(parents, source, count, limits, room):
    """The four children of `count` matches, at most a quarter of a vector, as positions inside the map.

    `room` holds two vectors. Returns rows, columns and the set of those that are there.
    """
    for k in range(4 * count):
        n = 2 * (source + k // 4)
        room[k], room[LANES + k] = 2 * parents[n] + (k // 2) % 2, 2 * parents[n + 1] + k % 2
    ys, xs = lanes.load(room, 0), lanes.load(room, LANES)
    return _clamped(ys, limits[0]), _clamped(xs, limits[1]), np.int64((1 << (4 * count)) - 1)


@njit(inline="always")
def _guess(number, axis, limits):
    """The row (axis 0) or column of the place of that number."""
    return np.int64((np.uint64(number) * R2[axis]) % SPAN * np.uint64(limits[axis]) // SPAN)


@njit
def _guesses(number, count, limits, room):
    """`warp.scattered_positions` from this number on, `count` of them, at most a vector; `room` as for `_children`."""
    for k in range(count):
        for axis in range(2):
            room[axis * LANES + k] = np.float32(_guess(number + k, axis, limits))
    return lanes.load(room, 0), lanes.load(room, LANES), np.int64((1 << count) - 1)


@njit
def _fill(here, limits, desk, slots, ys, xs, waiting, low, blocks):
    """`_offer` of a whole vector to a desk of as many empty slots: where no two share a pixel, all of them go in."""
    floats, numbers = desk
    _try(here, limits, desk, slots, ys, xs, waiting, blocks)
    pixels, strengths, alone = lanes.load(numbers, slots), lanes.load(floats, 3 * slots + 2 * LANES), 0
    for k in range(LANES):
        alone += lanes.count(lanes.equal(pixels, lanes.splat(numbers[slots + k]))) == 1
    if alone < LANES or lanes.equal(strengths, lanes.splat(EMPTY)):
        return _compete(desk, slots, waiting, low)
    lanes.store(floats, 0, ys)
    lanes.store(floats, LANES, xs)
    lanes.store(floats, 2 * LANES, strengths)
    lanes.store(numbers, 0, pixels)
    return lanes.least(strengths)


@njit
def _fetch_guesses(fy, image, number, count, limits, step):
    """Have f^y brought near where `_guesses` will look: the places are far apart, so reading them would wait."""
    for n in range(number, number + count):
        place = ((image * limits[0] + _guess(n, 0, limits)) * limits[1] + _guess(n, 1, limits)) * step
        for line in range(0, step, LINE):
            lanes.fetch_ahead(fy, place + line)


@njit
def _descend_line(fx, fy, parents, coarse, shape, limits, blocks, line, desk, state):
    """A line of pixels of `_descend`."""
    _, height, width, candidates, _ = shape
    slots, quarter, parents_tried = -(-candidates // LANES) * LANES, LANES // 4, -(-candidates // 2)
    row = line // height * coarse[0] + line % height // 2
    for j in range(width):
        pixel, low = line * width + j, _clear(desk, slots, candidates)
        here = fx, pixel * LANES * len(blocks), fy, line // height
        source, room = (row * coarse[1] + j // 2) * candidates, lanes.advanced(desk[0], 3 * slots)
        _fetch_guesses(
            fy, line // height, (line % height * width + j) * candidates, candidates, limits, LANES * len(blocks)
        )
        for first in range(0, parents_tried, quarter):
            count = min(quarter, parents_tried - first)
            children = _children(parents, source + first, count, limits, room)
            if first == 0 and candidates == LANES and count == quarter:
                low = _fill(here, limits, desk, slots, *children, low, blocks)
            else:
                low = _offer(here, limits, desk, slots, *children, low, blocks)
        number = (line % height * width + j) * candidates
        for first in range(0, candidates, LANES):
            guesses = _guesses(number + first, min(LANES, candidates - first), limits, room)
            low = _offer(here, limits, desk, slots, *guesses, low, blocks)
        _put_back(desk, slots, state[0], state[1], pixel)


@parallel_njit()
def _descend(fx, fy, parents, coarse, shape, limits, blocks, desks, state):
    """Positions and scores of a state, from a coarser level's positions B,h,w,K,2; `coarse`: its (h, w)."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(fx), lanes.pointer(fy), lanes.pointer(parents)
        _descend_line(*given, coarse, shape, limits, blocks, line, _desk(desks, line), _pointers(state, False))


@njit
def _fetch_field(fy, image, field, pixel, candidates, limits, step):
    """Have f^y brought near where a pixel's matches lie, which is about to be read: random places would wait for it."""
    for n in range(2 * pixel * candidates, 2 * (pixel + 1) * candidates, 2):
        place = ((image * limits[0] + np.int64(field[n])) * limits[1] + np.int64(field[n + 1])) * step
        for line in range(0, 2 * step, LINE):
            lanes.fetch_ahead(fy, place + line)
            lanes.fetch_ahead(fy, place + step * limits[1] + line)


@njit
def _evaluate_line(fx, fy, field, shape, limits, blocks, line, desk, clamped, scores):
    """A line of pixels of `_evaluate`."""
    _, height, width, candidates, _ = shape
    slots = -(-candidates // LANES) * LANES
    for j in range(width):
        pixel = line * width + j
        if j + 1 < width:
            _fetch_field(fy, line // height, field, pixel + 1, candidates, limits, LANES * len(blocks))
        _read(field, pixel, candidates, limits, desk, slots)
        _score((fx, pixel * LANES * len(blocks), fy, line // height), limits, desk, slots, candidates, blocks)
        for k in range(candidates):
            n = pixel * candidates + k
            clamped[2 * n], clamped[2 * n + 1] = desk[0][k], desk[0][slots + k]
            scores[n] = EMPTY if _is_duplicate(desk, slots, k) else desk[0][2 * slots + k]


@parallel_njit()
def _evaluate(fx, fy, field, shape, limits, blocks, desks, clamped, scores):
    """A field B,h,w,K,2 as it stands: clamped, scored (B,h,w,K), duplicates emptied."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(fx), lanes.pointer(fy), lanes.pointer(field)
        _evaluate_line(
            *given, shape, limits, blocks, line, _desk(desks, line), lanes.pointer(clamped), lanes.pointer(scores)
        )


@njit
def _rank(scores, slots, k):
    """How many of S scores are higher than the kth, or as high and earlier."""
    mine, ahead = lanes.splat(scores[k]), 0
    for block in range(0, slots, LANES):
        others = lanes.load(scores, block)
        before = (1 << min(max(k - block, 0), LANES)) - 1
        ahead += lanes.count(lanes.greater(others, mine)) + lanes.count(lanes.equal(others, mine) & before)
    return ahead


@njit
def _sort_pixel(positions, scores, candidates, field, strengths):
    """S rows and S columns, and S scores, into K positions and scores, best first."""
    slots = -(-candidates // LANES) * LANES
    for k in range(candidates):
        n = _rank(scores, slots, k) - (slots - candidates)
        strengths[n], field[2 * n], field[2 * n + 1] = scores[k], positions[k], positions[slots + k]


@njit
def _leave_line(positions, scores, shape, line, field, strengths):
    """A line of pixels of `_leave`."""
    candidates = shape[3]
    slots = -(-candidates // LANES) * LANES
    for pixel in range(line * shape[2], (line + 1) * shape[2]):
        mine, best = lanes.advanced(field, 2 * pixel * candidates), lanes.advanced(strengths, pixel * candidates)
        _sort_pixel(
            lanes.advanced(positions, 2 * pixel * slots), lanes.advanced(scores, pixel * slots), candidates, mine, best
        )
        for k in range(1, candidates):
            if best[k] == EMPTY:
                mine[2 * k], mine[2 * k + 1] = mine[0], mine[1]


@parallel_njit()
def _leave(shape, positions, scores, field, strengths):
    """A state into a field B,h,w,K,2 and its scores B,h,w,K, best first; empty slots repeat the best one's position."""
    for line in prange(shape[0] * shape[1]):
        _leave_line(
            lanes.pointer(positions), lanes.pointer(scores), shape, line, lanes.pointer(field), lanes.pointer(strengths)
        )


@njit
def _sort_line(field, scores, shape, line, desk, positions, strengths):
    """A line of pixels of `_sort`."""
    floats, candidates = desk[0], shape[3]
    slots = -(-candidates // LANES) * LANES
    for k in range(candidates, slots):
        floats[2 * slots + k] = -EMPTY
    for n in range(line * shape[2] * candidates, (line + 1) * shape[2] * candidates, candidates):
        for k in range(candidates):
            floats[k], floats[slots + k] = field[2 * (n + k)], field[2 * (n + k) + 1]
            floats[2 * slots + k] = scores[n + k]
        to = lanes.advanced(positions, 2 * n), lanes.advanced(strengths, n)
        _sort_pixel(floats, lanes.advanced(floats, 2 * slots), candidates, *to)


@parallel_njit()
def _sort(field, scores, shape, desks, positions, strengths):
    """A field B,h,w,K,2 and its scores B,h,w,K into the same, best first."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(field), lanes.pointer(scores)
        _sort_line(*given, shape, line, _desk(desks, line), lanes.pointer(positions), lanes.pointer(strengths))


@njit
def _add_colours(exemplar, image, limits, channels, y, x, weight, result):
    """weight times the exemplar at (y, x), bilinear, added to `result`; exemplar B,H,W,channels.

    Without fastmath, for the reason that `_cosine_backward` gives.
    """
    y0, y1, v = _corners(y, limits[0])
    x0, x1, u = _corners(x, limits[1])
    top, bottom, one = (image * limits[0] + y0) * limits[1], (image * limits[0] + y1) * limits[1], np.float32(1)
    w00, w01, w10, w11 = (one - v) * (one - u), (one - v) * u, v * (one - u), v * u
    for c in range(channels):
        above = w00 * exemplar[(top + x0) * channels + c] + w01 * exemplar[(top + x1) * channels + c]
        below = w10 * exemplar[(bottom + x0) * channels + c] + w11 * exemplar[(bottom + x1) * channels + c]
        result[c] += weight * (above + below)


@njit
def _warp_line(exemplar, field, scores, shape, limits, channels, temperature, line, result):
    """A line of pixels of `_warp`."""
    _, height, width, candidates, _ = shape
    for pixel in range(line * width, (line + 1) * width):
        first, total, mine = pixel * candidates, np.float32(0), lanes.advanced(result, pixel * channels)
        best = scores[first]
        for n in range(first + 1, first + candidates):
            best = max(best, scores[n])
        for c in range(channels):
            mine[c] = np.float32(0)
        for n in range(first, first + candidates):
            weight = np.exp((scores[n] - best) / temperature)
            if weight > NEGLIGIBLE:
                total += weight
                _add_colours(exemplar, line // height, limits, channels, field[2 * n], field[2 * n + 1], weight, mine)
        for c in range(channels):
            mine[c] /= total


@parallel_njit()
def _warp(exemplar, field, scores, shape, limits, channels, temperature, result):
    """Eq. 8: exemplar B,H,W,C; field B,h,w,K,2 inside it; scores B,h,w,K. Result B,h,w,C."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(exemplar), lanes.pointer(field), lanes.pointer(scores)
        _warp_line(*given, shape, limits, channels, temperature, line, lanes.pointer(result))


@njit(inline="always")
def _corners(value, size):
    """The two pixels around a coordinate inside [0, size-1], and the second one's weight; NaN lies at the first two."""
    low = max(min(int(value), size - 2), 0)
    return low, min(low + 1, size - 1), np.float32(value - low)


@parallel_njit()
def _scores_backward(given, shape, limits, blocks, results):
    """Gradients of `_evaluate`'s scores by the positions, written, and by both features, added: flat arrays `results`.

    given: fx, fy, the field and the gradient by the scores, flat. Pictures in parallel: within one, pixels add to the
    same places of the exemplar's map.
    """
    fx, fy, field, gradient = given
    by_position, by_x, by_y = results
    batch, height, width, candidates, _ = shape
    for image in prange(batch):
        read = lanes.pointer(fx), lanes.pointer(fy), lanes.pointer(field), lanes.pointer(gradient)
        write = lanes.pointer(by_position), lanes.pointer(by_x), lanes.pointer(by_y)
        for pixel in range(image * height * width, (image + 1) * height * width):
            for n in range(pixel * candidates, (pixel + 1) * candidates):
                if read[3][n] != 0:
                    _cosine_backward(read, pixel * LANES * len(blocks), n, image, limits, blocks, write)


@njit
def _cosine_backward(given, at, n, image, limits, blocks, results):
    """Gradients of `_similarity` of candidate n, whose pixel has fx[at : at + P].

    In vectors, in an order of their own, and without numba's fastmath: left to choose, the compiler rounded one way in
    the code that it runs at once and another way in the code that it keeps on the disk, and a run whose process had
    compiled went on with other bits when it was resumed.
    """
    fx, fy, field, gradient = given
    y0, y1, v = _corners(field[2 * n], limits[0])
    x0, x1, u = _corners(field[2 * n + 1], limits[1])
    top, bottom, step = (image * limits[0] + y0) * limits[1], (image * limits[0] + y1) * limits[1], LANES * len(blocks)
    places = (top + x0) * step, (top + x1) * step, (bottom + x0) * step, (bottom + x1) * step
    product, square = _blended_dots(fx, at, fy, places, (v, u), step)
    length = max(np.sqrt(square), SHORTEST)
    # The length of a blend that is too short to be stretched to 1 plays no part.
    back = product / (length * length) if length > SHORTEST else np.float32(0)
    by_y, by_x = _spread(fx, at, fy, places, (v, u), step, (gradient[n] / length, back), results)
    if y1 > y0:
        results[0][2 * n] = by_y
    if x1 > x0:
        results[0][2 * n + 1] = by_x


@njit(inline="always")
def _weights(shares):
    """How much the four pixels around a place count, as vectors. shares: of the lower row, of the right column."""
    (v, u), one = shares, np.float32(1)
    return (
        lanes.splat((one - v) * (one - u)),
        lanes.splat((one - v) * u),
        lanes.splat(v * (one - u)),
        lanes.splat(v * u),
    )


@njit(inline="always")
def _corner_vectors(array, places, c):
    """The vectors of channels of four pixels from channel `c` on."""
    return (
        lanes.load(array, places[0] + c),
        lanes.load(array, places[1] + c),
        lanes.load(array, places[2] + c),
        lanes.load(array, places[3] + c),
    )


@njit(inline="always")
def _mixed(weights, vectors):
    """Sum of weight times vector, over four."""
    upper = lanes.add(lanes.multiply(weights[0], vectors[0]), lanes.multiply(weights[1], vectors[1]))
    lower = lanes.add(lanes.multiply(weights[2], vectors[2]), lanes.multiply(weights[3], vectors[3]))
    return lanes.add(upper, lower)


@njit
def _blended_dots(fx, at, fy, places, shares, step):
    """`lanes.blended_dots`, in an order that no compiler may change."""
    products = squares = lanes.splat(np.float32(0))
    for c in range(0, step, LANES):
        blend = _mixed(_weights(shares), _corner_vectors(fy, places, c))
        products = lanes.add(products, lanes.multiply(lanes.load(fx, at + c), blend))
        squares = lanes.add(squares, lanes.multiply(blend, blend))
    return lanes.total(products), lanes.total(squares)


@njit
def _spread(fx, at, fy, places, shares, step, factors, results):
    """Add what a score changes by to the gradients of its features, and return its gradients by y and by x.

    factors: of the whole gradient, and of the blend that is taken off fx, as moving along it changes no cosine.
    """
    weights, (scale, back) = _weights(shares), (lanes.splat(factors[0]), lanes.splat(factors[1]))
    down = lanes.subtract(lanes.splat(np.float32(1)), lanes.splat(shares[1])), lanes.splat(shares[1])
    right = lanes.subtract(lanes.splat(np.float32(1)), lanes.splat(shares[0])), lanes.splat(shares[0])
    by_y = by_x = lanes.splat(np.float32(0))
    for c in range(0, step, LANES):
        corners = _corner_vectors(fy, places, c)
        blend = _mixed(weights, corners)
        _add(results[1], at + c, lanes.multiply(scale, blend))
        change = lanes.multiply(scale, lanes.subtract(lanes.load(fx, at + c), lanes.multiply(back, blend)))
        for corner in range(4):
            _add(results[2], places[corner] + c, lanes.multiply(weights[corner], change))
        by_y = lanes.add(by_y, lanes.multiply(change, _slope(down, corners[0], corners[2], corners[1], corners[3])))
        by_x = lanes.add(by_x, lanes.multiply(change, _slope(right, corners[0], corners[1], corners[2], corners[3])))
    return lanes.total(by_y), lanes.total(by_x)


@njit(inline="always")
def _add(array, index, vector):
    """array[index : index + LANES] += vector."""
    lanes.store(array, index, lanes.add(lanes.load(array, index), vector))


@njit(inline="always")
def _slope(weights, first, after_first, second, after_second):
    """How fast a blend changes along an axis: the weighted mean of two differences."""
    one, other = lanes.subtract(after_first, first), lanes.subtract(after_second, second)
    return lanes.add(lanes.multiply(weights[0], one), lanes.multiply(weights[1], other))
