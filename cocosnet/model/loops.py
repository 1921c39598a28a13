"""The loops of the CPU engine over all pixels, a line to a thread: what `compiled` calls.

Arrays are flat, see `compiled`; what is done for one pixel is in `desk`. shape: B, h, w, K, 2 of the field; limits: the
exemplar's (H, W); blocks: as many zeros as a pixel's features have vectors.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cocosnet.model import lanes, warp
from cocosnet.model.desk import (
    EMPTY,
    clear,
    desk_of,
    fill,
    inside,
    is_duplicate,
    lay_out,
    offer,
    put_back,
    read_field,
    score_field,
    state_of,
)
from cocosnet.model.jit import parallel_njit
from cocosnet.model.lanes import LANES, LINE

R2, SPAN = tuple(map(np.uint64, warp.R2_STEPS)), np.uint64(2**32)


@njit
def _pass_line(fx, fy, shape, limits, blocks, vertical, line, desk, old, new):
    """A line of pixels of `propagate_once`; old and new are states."""
    _, height, width, candidates, _ = shape
    slots, sets = -(-candidates // LANES) * LANES, -(-candidates // LANES)
    positions, scores, fresh, other_fresh = old
    size, step = (height, width) if vertical else (width, 1)
    for j in range(width):
        pixel = line * width + j
        low = lay_out(positions, scores, pixel, limits[1], desk, slots)
        here = fx, pixel * LANES * len(blocks), fy, line // height
        for shift in (-1, 1):
            at = (line % height if vertical else j) + shift
            if 0 <= at < size:
                for block in range(sets):
                    n = (pixel + shift * step) * sets + block
                    if fresh[n]:
                        candidates_there = _shifted(positions, n, sets, shift, vertical, limits)
                        low = offer(here, limits, desk, slots, *candidates_there, np.int64(fresh[n]), low, blocks)
        put_back(desk, slots, new[0], new[1], pixel)
        for block in range(sets):
            n, changed = pixel * sets + block, np.uint16(desk[1][slots + LANES + block])
            new[2][n], new[3][n] = changed, other_fresh[n] | changed


@njit(inline="always")
def _shifted(positions, n, sets, shift, vertical, limits):
    """The positions of vector number n of the state, continued by one pixel."""
    source, slots = (n // sets * 2 * sets + n % sets) * LANES, sets * LANES
    ys, xs = lanes.load(positions, source), lanes.load(positions, source + slots)
    if vertical:
        ys = inside(lanes.subtract(ys, lanes.splat(np.float32(shift))), limits[0])
    else:
        xs = inside(lanes.subtract(xs, lanes.splat(np.float32(shift))), limits[1])
    return ys, xs


@parallel_njit()
def propagate_once(fx, fy, shape, limits, blocks, vertical, desks, old, new):
    """One pass along one axis, `patchmatch.neighbour_candidates` and `best_distinct` at once. old, new: states."""
    for line in prange(shape[0] * shape[1]):
        _pass_line(
            lanes.pointer(fx),
            lanes.pointer(fy),
            shape,
            limits,
            blocks,
            vertical,
            line,
            desk_of(desks, line),
            state_of(old, vertical),
            state_of(new, vertical),
        )


@njit
def _enter_pixel(desk, slots, candidates, state, pixel):
    """The desk into a state, duplicates emptied."""
    floats, _ = desk
    positions, scores, fresh, fresh_downward = state
    put_back(desk, slots, positions, scores, pixel)
    for block in range(slots // LANES):
        filled, there = 0, min(candidates - block * LANES, LANES)
        for k in range(block * LANES, block * LANES + there):
            if floats[2 * slots + k] == EMPTY or is_duplicate(desk, slots, k):
                scores[slots * pixel + k] = EMPTY
            else:
                filled |= 1 << (k % LANES)
        n = pixel * (slots // LANES) + block
        fresh[n], fresh_downward[n] = (1 << there) - 1, filled  # the definition offers duplicates as well


@njit
def _enter_line(fx, fy, field, known, shape, limits, blocks, line, desk, state):
    """A line of pixels of `enter`."""
    _, height, width, candidates, _ = shape
    slots = -(-candidates // LANES) * LANES
    for j in range(width):
        pixel = line * width + j
        read_field(field, pixel, candidates, limits, desk, slots)
        if known[1]:
            for k in range(candidates):
                desk[0][2 * slots + k] = known[0][pixel * candidates + k]
        else:
            score_field((fx, pixel * LANES * len(blocks), fy, line // height), limits, desk, slots, candidates, blocks)
        _enter_pixel(desk, slots, candidates, state, pixel)


@parallel_njit()
def enter(fx, fy, field, known, shape, limits, blocks, desks, state):
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
            desk_of(desks, line),
            state_of(state, False),
        )


@njit
def _children(parents, source, count, limits, room):
    """The four children of `count` matches, at most a quarter of a vector, as positions inside the map.

    `room` holds two vectors. Returns rows, columns and the set of those that are there.
    """
    for k in range(4 * count):
        n = 2 * (source + k // 4)
        room[k], room[LANES + k] = 2 * parents[n] + (k // 2) % 2, 2 * parents[n + 1] + k % 2
    ys, xs = lanes.load(room, 0), lanes.load(room, LANES)
    return inside(ys, limits[0]), inside(xs, limits[1]), np.int64((1 << (4 * count)) - 1)


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
def _fetch_guesses(fy, image, number, count, limits, step):
    """Have f^y brought near where `_guesses` will look: the places are far apart, so reading them would wait."""
    for n in range(number, number + count):
        place = ((image * limits[0] + _guess(n, 0, limits)) * limits[1] + _guess(n, 1, limits)) * step
        for line in range(0, step, LINE):
            lanes.fetch_ahead(fy, place + line)


@njit
def _descend_line(fx, fy, parents, coarse, shape, limits, blocks, line, desk, state):
    """A line of pixels of `descend`."""
    _, height, width, candidates, _ = shape
    slots, quarter, parents_tried = -(-candidates // LANES) * LANES, LANES // 4, -(-candidates // 2)
    row = line // height * coarse[0] + line % height // 2
    for j in range(width):
        pixel, low = line * width + j, clear(desk, slots, candidates)
        here = fx, pixel * LANES * len(blocks), fy, line // height
        source, room = (row * coarse[1] + j // 2) * candidates, lanes.advanced(desk[0], 3 * slots)
        _fetch_guesses(
            fy, line // height, (line % height * width + j) * candidates, candidates, limits, LANES * len(blocks)
        )
        for first in range(0, parents_tried, quarter):
            count = min(quarter, parents_tried - first)
            children = _children(parents, source + first, count, limits, room)
            if first == 0 and candidates == LANES and count == quarter:
                low = fill(here, limits, desk, slots, *children, low, blocks)
            else:
                low = offer(here, limits, desk, slots, *children, low, blocks)
        number = (line % height * width + j) * candidates
        for first in range(0, candidates, LANES):
            guesses = _guesses(number + first, min(LANES, candidates - first), limits, room)
            low = offer(here, limits, desk, slots, *guesses, low, blocks)
        put_back(desk, slots, state[0], state[1], pixel)


@parallel_njit()
def descend(fx, fy, parents, coarse, shape, limits, blocks, desks, state):
    """Positions and scores of a state, from a coarser level's positions B,h,w,K,2; `coarse`: its (h, w)."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(fx), lanes.pointer(fy), lanes.pointer(parents)
        _descend_line(*given, coarse, shape, limits, blocks, line, desk_of(desks, line), state_of(state, False))


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
    """A line of pixels of `evaluate`."""
    _, height, width, candidates, _ = shape
    slots = -(-candidates // LANES) * LANES
    for j in range(width):
        pixel = line * width + j
        if j + 1 < width:
            _fetch_field(fy, line // height, field, pixel + 1, candidates, limits, LANES * len(blocks))
        read_field(field, pixel, candidates, limits, desk, slots)
        score_field((fx, pixel * LANES * len(blocks), fy, line // height), limits, desk, slots, candidates, blocks)
        for k in range(candidates):
            n = pixel * candidates + k
            clamped[2 * n], clamped[2 * n + 1] = desk[0][k], desk[0][slots + k]
            scores[n] = EMPTY if is_duplicate(desk, slots, k) else desk[0][2 * slots + k]


@parallel_njit()
def evaluate(fx, fy, field, shape, limits, blocks, desks, clamped, scores):
    """A field B,h,w,K,2 as it stands: clamped, scored (B,h,w,K), duplicates emptied."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(fx), lanes.pointer(fy), lanes.pointer(field)
        _evaluate_line(
            *given, shape, limits, blocks, line, desk_of(desks, line), lanes.pointer(clamped), lanes.pointer(scores)
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
    """A line of pixels of `leave`."""
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
def leave(shape, positions, scores, field, strengths):
    """A state into a field B,h,w,K,2 and its scores B,h,w,K, best first; empty slots repeat the best one's position."""
    for line in prange(shape[0] * shape[1]):
        _leave_line(
            lanes.pointer(positions), lanes.pointer(scores), shape, line, lanes.pointer(field), lanes.pointer(strengths)
        )


@njit
def _sort_line(field, scores, shape, line, desk, positions, strengths):
    """A line of pixels of `sort`."""
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
def sort(field, scores, shape, desks, positions, strengths):
    """A field B,h,w,K,2 and its scores B,h,w,K into the same, best first."""
    for line in prange(shape[0] * shape[1]):
        given = lanes.pointer(field), lanes.pointer(scores)
        _sort_line(*given, shape, line, desk_of(desks, line), lanes.pointer(positions), lanes.pointer(strengths))
