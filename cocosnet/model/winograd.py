"""3x3 convolutions in float32 on a CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3), compiled.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): a tile of 4x4 results reads 6x6 pixels d,

    Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A

with the products element by element, so that each of the 36 places is a matrix product over the channels. B, G and A
come from five points and infinity: +-sqrt(1/2) and +-sqrt(2) beside 0, which round far less than the usual +-1 and +-2,
and hardly more than a direct convolution does (docs/measure_convolution.py).

Tiles are worked on `TILES` at a time, so that what lies between the three steps stays in a processor's cache.
Maps are channels-last, channels a multiple of `lanes.LANES`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from cocosnet.model.jit import torch_threads
from cocosnet.model.lanes import LANES, add, add_product, advanced, load, multiply, pointer, splat, store, subtract

OUT, IN = 4, 6  # sides of a tile's results and of what they read
PLACES = IN * IN
GROUP = 6  # tiles whose products are made at once
TILES = 4 * GROUP  # that a thread works on at once: what lies between the steps stays in its cache
NEAR, FAR = math.sqrt(0.5), math.sqrt(2.0)  # the points besides 0 and infinity, with both signs
HALF, TWO, SUM = np.float32(0.5), np.float32(2.0), np.float32(2.5)  # their squares, and the sum of both
ROOT, ROOT_2 = np.float32(NEAR), np.float32(FAR)


@torch.no_grad()
@torch_threads()
def convolve(x_BCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None, padding: int) -> Tensor:
    """`F.conv2d` of stride 1 up to rounding, float32 on the CPU: B,K,H+2p-2,W+2p-2, channels-last.

    C and K are multiples of LANES, the result has a pixel at least; the border is padded with zeros.
    """
    height, width = (side + 2 * padding - 2 for side in x_BCHW.shape[2:])
    result = torch.empty(x_BCHW.shape[0], height, width, weight_KC33.shape[0])
    bias = torch.zeros(weight_KC33.shape[0]) if bias_K is None else bias_K.detach()
    kernels = _kernels(weight_KC33)
    for image, target in zip(x_BCHW.permute(0, 2, 3, 1).contiguous(), result):
        _convolve(image, kernels, bias, padding, target)
    return result.permute(0, 3, 1, 2)


def _convolve(image_HWC: Tensor, kernels: Tensor, bias_K: Tensor, padding: int, result_HWK: Tensor) -> None:
    """One picture's, each thread with tiles of its own from the first step to the last."""
    workers = torch.get_num_threads()
    before = np.empty((workers, PLACES, TILES, image_HWC.shape[2]), np.float32)
    after = np.empty((workers, PLACES, TILES, result_HWK.shape[2]), np.float32)
    _work(image_HWC.numpy(), kernels.numpy(), bias_K.numpy(), padding, before, after, result_HWK.numpy())


def _kernels(weight_KC33: Tensor) -> Tensor:
    """G g G^T of every pair of channels, as `_multiply` reads them: PLACES,K/LANES,C,LANES."""
    outputs, inputs = weight_KC33.shape[:2]
    blocks = weight_KC33.reshape(outputs // LANES, LANES, inputs, 9).transpose(1, 2).reshape(-1, 9)
    return (_BOTH @ blocks.T).view(PLACES, outputs // LANES, inputs, LANES)


def _both() -> Tensor:
    """What makes the PLACES numbers of G g G^T of the nine of g."""
    points = (0.0, NEAR, -NEAR, FAR, -FAR)
    rows = [[p**k / math.prod(p - other for other in points if other != p) for k in range(3)] for p in points]
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.einsum("ia,jb->ijab", g, g).reshape(PLACES, 9).float()


_BOTH = _both()


@njit(parallel=True, cache=True, boundscheck=False)
def _work(image, kernels, bias, padding, before, after, result):
    """All of a picture's tiles.

    image H,W,C; kernels of `_kernels`; bias K; before N,PLACES,TILES,C and after N,PLACES,TILES,K: room for N workers;
    result H',W',K.
    """
    workers, channels, outputs = before.shape[0], image.shape[2], result.shape[2]
    tiles = -(-result.shape[0] // OUT) * -(-result.shape[1] // OUT)
    for worker in prange(workers):
        mine = advanced(pointer(before), worker * PLACES * TILES * channels)
        made = advanced(pointer(after), worker * PLACES * TILES * outputs)
        desk = np.empty(PLACES * LANES, np.float32)
        for first in range(worker * TILES, tiles, workers * TILES):
            count = min(TILES, tiles - first)
            for n in range(count):
                _read(pointer(image), image.shape, result.shape, padding, first + n, pointer(desk), n, mine)
            _multiply(mine, pointer(kernels), made, count, channels, outputs)
            for n in range(count):
                _write(made, pointer(bias), result.shape, first + n, pointer(desk), n, pointer(result))
        desk[0] = 0  # a buffer is freed after its last use, which pointers do not count as


@njit(boundscheck=False)
def _read(image, limits, size, padding, tile, desk, n, before):
    """B^T d B of one tile, into its place n of the worker's room. limits: H,W,C; size: H',W',K."""
    across, channels = -(-size[1] // OUT), limits[2]
    top, left = OUT * (tile // across) - padding, OUT * (tile % across) - padding
    for channel in range(0, channels, LANES):
        source, target = advanced(image, channel), advanced(before, n * channels + channel)
        for j in range(IN):
            _put(desk, j * LANES, IN * LANES, _read_lines(_column(source, top, left + j, limits)))
        for i in range(IN):
            row = _read_lines(_get(desk, i * IN * LANES, LANES))
            _put(target, i * IN * TILES * channels, TILES * channels, row)


@njit(boundscheck=False)
def _multiply(before, kernels, after, count, channels, outputs):
    """The products over the channels of each place: `GROUP` tiles and LANES outputs at once, which fill the registers.

    Tiles beyond `count` are multiplied as they lie there, and not written.
    """
    for place in range(PLACES):
        for output in range(0, outputs, LANES):
            kernel = advanced(kernels, (place * outputs + output) * channels)
            for tile in range(place * TILES, place * TILES + count, GROUP):
                sums = _products(advanced(before, tile * channels), kernel, channels)
                _put(after, tile * outputs + output, outputs, sums)


@njit(inline="always")
def _products(rows, kernel, channels):
    """Of six rows of C numbers with C vectors: six vectors."""
    zero = splat(np.float32(0))
    a, b, c, d, e, f = zero, zero, zero, zero, zero, zero
    for n in range(channels):
        vector = load(kernel, n * LANES)
        a = add_product(a, splat(rows[n]), vector)
        b = add_product(b, splat(rows[n + channels]), vector)
        c = add_product(c, splat(rows[n + 2 * channels]), vector)
        d = add_product(d, splat(rows[n + 3 * channels]), vector)
        e = add_product(e, splat(rows[n + 4 * channels]), vector)
        f = add_product(f, splat(rows[n + 5 * channels]), vector)
    return a, b, c, d, e, f


@njit(boundscheck=False)
def _write(after, bias, size, tile, desk, n, result):
    """A^T m A and the bias of one tile, whose place in the worker's room is n. size: H',W',K."""
    height, width, channels = size
    across = -(-width // OUT)
    top, left, step = OUT * (tile // across), OUT * (tile % across), TILES * channels
    for channel in range(0, channels, LANES):
        source, offset = advanced(after, n * channels + channel), load(bias, channel)
        for j in range(IN):
            _put_some(desk, j * LANES, IN * LANES, _write_lines(_get(source, j * step, IN * step)), OUT)
        for i in range(min(OUT, height - top)):
            row = _raised(_write_lines(_get(desk, i * IN * LANES, LANES)), offset)
            _put_some(result, ((top + i) * width + left) * channels + channel, channels, row, width - left)


@njit(inline="always")
def _read_lines(d):
    """B^T d of one line, six vectors. The points' signs share what is even in them and what is odd."""
    even, odd = subtract(d[4], multiply(splat(TWO), d[2])), subtract(d[3], multiply(splat(TWO), d[1]))
    even_2, odd_2 = subtract(d[4], multiply(splat(HALF), d[2])), subtract(d[3], multiply(splat(HALF), d[1]))
    odd, odd_2 = multiply(splat(ROOT), odd), multiply(splat(ROOT_2), odd_2)
    zero = add(subtract(d[0], multiply(splat(SUM), d[2])), d[4])
    infinity = add(subtract(d[1], multiply(splat(SUM), d[3])), d[5])
    return zero, add(even, odd), subtract(even, odd), add(even_2, odd_2), subtract(even_2, odd_2), infinity


@njit(inline="always")
def _write_lines(m):
    """A^T m of one line: six vectors to four."""
    even, odd = add(m[1], m[2]), multiply(splat(ROOT), subtract(m[1], m[2]))
    even_2, odd_2 = add(m[3], m[4]), multiply(splat(ROOT_2), subtract(m[3], m[4]))
    squares = add(multiply(splat(HALF), even), multiply(splat(TWO), even_2))
    cubes = add(multiply(splat(HALF), odd), multiply(splat(TWO), odd_2))
    return add(add(m[0], even), even_2), add(odd, odd_2), squares, add(cubes, m[5])


@njit(inline="always")
def _raised(four, offset):
    return add(four[0], offset), add(four[1], offset), add(four[2], offset), add(four[3], offset)


@njit(inline="always")
def _column(source, top, column, limits):
    """LANES channels of six pixels one below the other, zeros where there are none. limits: H,W,C."""
    if 0 <= column < limits[1] and top >= 0 and top + IN <= limits[0]:
        return _get(source, (top * limits[1] + column) * limits[2], limits[1] * limits[2])
    return (
        _pixel(source, top, column, limits),
        _pixel(source, top + 1, column, limits),
        _pixel(source, top + 2, column, limits),
        _pixel(source, top + 3, column, limits),
        _pixel(source, top + 4, column, limits),
        _pixel(source, top + 5, column, limits),
    )


@njit(inline="always")
def _pixel(source, row, column, limits):
    inside = 0 <= row < limits[0] and 0 <= column < limits[1]
    return load(source, (row * limits[1] + column) * limits[2]) if inside else splat(np.float32(0))


@njit(inline="always")
def _get(source, at, step):
    """Six vectors, `step` numbers apart."""
    return (
        load(source, at),
        load(source, at + step),
        load(source, at + 2 * step),
        load(source, at + 3 * step),
        load(source, at + 4 * step),
        load(source, at + 5 * step),
    )


@njit(inline="always")
def _put(target, at, step, six):
    store(target, at, six[0])
    store(target, at + step, six[1])
    store(target, at + 2 * step, six[2])
    store(target, at + 3 * step, six[3])
    store(target, at + 4 * step, six[4])
    store(target, at + 5 * step, six[5])


@njit(inline="always")
def _put_some(target, at, step, four, count):
    """The first `count` of four vectors."""
    store(target, at, four[0])
    if count > 1:
        store(target, at + step, four[1])
    if count > 2:
        store(target, at + 2 * step, four[2])
    if count > 3:
        store(target, at + 3 * step, four[3])
