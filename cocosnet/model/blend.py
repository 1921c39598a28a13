"""Reading between pixels on a CPU: the soft warp (Eq. 8), and the gradients of scores (Eq. 7).

Arrays are flat, see `compiled`. Everything here sums in an order of its own, see `_cosine_backward`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cocosnet.model import lanes
from cocosnet.model.desk import SHORTEST
from cocosnet.model.jit import parallel_njit
from cocosnet.model.lanes import LANES

NEGLIGIBLE = np.float32(1e-9)  # times the largest weight: sixteen of them do not change a float32 in [-1, 1]


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
    """A line of pixels of `warp`."""
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
def warp(exemplar, field, scores, shape, limits, channels, temperature, result):
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
def scores_backward(given, shape, limits, blocks, results):
    """Gradients of `loops.evaluate`'s scores by positions, written, and by both features, added: flat arrays `results`.

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
    """Gradients of `desk._similarity` of candidate n, whose pixel has fx[at : at + P].

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
