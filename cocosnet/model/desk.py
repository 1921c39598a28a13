"""What the loops of the CPU engine do for one pixel: score candidates, and let them compete for its slots.

A line of pixels has a desk, working memory (`compiled._desks`): floats, S rows, S columns and S scores of the pixel at
hand, then those of a vector of candidates; and whole numbers, S pixels of the exemplar, LANES pixels of candidates, and
for every vector of slots the set of those that changed. S is K rounded up to whole vectors. Slots beyond K hold an
infinite score, which nothing beats, and lie at (0, -1), outside; an empty slot holds -inf.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cocosnet.model import lanes, patchmatch
from cocosnet.model.lanes import LANES

EMPTY = np.float32(-np.inf)
NOWHERE = np.int32(-1)  # the pixel of an empty slot
SHORTEST = np.float32(patchmatch.SHORTEST)
ROUND = np.float32(1.5 * 2**23)  # added and taken off again, it rounds half to even


@njit(inline="always")
def desk_of(desks, line):
    """Pointers to a line's desk."""
    floats, numbers, size = desks
    return lanes.advanced(lanes.pointer(floats), line * size), lanes.advanced(lanes.pointer(numbers), line * size)


@njit(inline="always")
def state_of(state, swapped):
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
def inside(vector, size):
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
def offer(here, limits, desk, slots, ys, xs, waiting, low, blocks):
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
def fill(here, limits, desk, slots, ys, xs, waiting, low, blocks):
    """`offer` of a whole vector to a desk of as many empty slots: where no two share a pixel, all of them go in."""
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
def clear(desk, slots, candidates):
    """A desk of empty slots. Returns the lowest score."""
    floats, numbers = desk
    for k in range(slots):
        floats[k], floats[slots + k], numbers[k] = 0, NOWHERE, NOWHERE
        floats[2 * slots + k] = EMPTY if k < candidates else -EMPTY
    return EMPTY


@njit
def lay_out(positions, scores, pixel, columns, desk, slots):
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
def put_back(desk, slots, positions, scores, pixel):
    """The desk into a pixel's state."""
    floats, _ = desk
    for block in range(0, slots, LANES):
        lanes.store(positions, 2 * slots * pixel + block, lanes.load(floats, block))
        lanes.store(positions, 2 * slots * pixel + slots + block, lanes.load(floats, slots + block))
        lanes.store(scores, slots * pixel + block, lanes.load(floats, 2 * slots + block))


@njit
def read_field(field, pixel, candidates, limits, desk, slots):
    """A pixel's positions, clamped, onto the desk; scores beyond K infinite."""
    floats, numbers = desk
    for k in range(candidates):
        floats[k], floats[slots + k] = field[2 * (pixel * candidates + k)], field[2 * (pixel * candidates + k) + 1]
    for block in range(0, slots, LANES):
        ys = inside(lanes.load(floats, block), limits[0])
        xs = inside(lanes.load(floats, slots + block), limits[1])
        lanes.store(floats, block, ys)
        lanes.store(floats, slots + block, xs)
        lanes.store(numbers, block, _pixels(ys, xs, np.int32(limits[1])))
    for k in range(candidates, slots):
        floats[k], floats[slots + k], floats[2 * slots + k], numbers[k] = 0, NOWHERE, -EMPTY, NOWHERE


@njit
def score_field(here, limits, desk, slots, candidates, blocks):
    """Scores of the desk's positions."""
    floats, _ = desk
    for k in range(candidates):
        floats[2 * slots + k] = _similarity(*here, limits, floats[k], floats[slots + k], blocks)


@njit
def is_duplicate(desk, slots, k):
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
