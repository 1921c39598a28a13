"""3x3 convolutions in float32 on a CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3), compiled.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): a tile of 4x4 results reads 6x6 pixels d,

    Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A

with the products element by element, so that each of the 36 places is a matrix product over the channels. B, G and A
come from five points and infinity: +-sqrt(1/2) and +-sqrt(2) beside 0, which round far less than the usual +-1 and +-2,
and hardly more than a direct convolution does (docs/measure_convolution.py). For the kernel's gradient the same sum
is turned round, D the gradient of Y: each place is a matrix product over the tiles.

    G^T [ sum over tiles of (A D A^T) * (B^T d B) ] G

Tiles are worked on `TILES` at a time, so that what lies between the three steps stays in a processor's cache.
Maps are channels-last, channels a multiple of `lanes.LANES`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange
from numba.extending import register_jitable
from torch import Tensor

from cocosnet.model.jit import parallel_njit, torch_threads
from cocosnet.model.lanes import LANES, add, add_product, advanced, load, multiply, pointer, splat, store, subtract

KERNEL, OUT, IN = 3, 4, 6  # sides of a kernel, of a tile's results and of what they read
TAPS, PLACES = KERNEL * KERNEL, IN * IN
GROUP = 6  # tiles whose products are made at once
TILES = 4 * GROUP  # that a thread works on at once: what lies between the steps stays in its cache
MOST = 2**24  # numbers that a kernel's gradient lays out at once
NEAR, FAR = math.sqrt(0.5), math.sqrt(2.0)  # the points besides 0 and infinity, with both signs
HALF, TWO, SUM = np.float32(0.5), np.float32(2.0), np.float32(2.5)  # their squares, and the sum of both
ROOT, ROOT_2 = np.float32(NEAR), np.float32(FAR)
BY_NEAR, BY_FAR = np.float32(-1 / 1.5), np.float32(1 / 6)  # G's divisors: a point's differences to the others


@torch.no_grad()
@torch_threads()
def convolve(x_BCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None, padding: int) -> Tensor:
    """`F.conv2d` of stride 1 up to rounding, float32 on the CPU: B,K,H+2p-2,W+2p-2, channels-last.

    C and K are multiples of LANES, the result has a pixel at least; the border is padded with zeros.
    """
    (outputs, inputs), images = weight_KC33.shape[:2], _channels_last(x_BCHW)
    height, width = (side + 2 * padding - 2 for side in images.shape[1:3])
    result = np.empty((images.shape[0], height, width, outputs), np.float32)
    bias = np.zeros(outputs, np.float32) if bias_K is None else bias_K.detach().numpy()
    kernels = np.empty((PLACES, outputs // LANES, inputs, LANES), np.float32)
    _spread_kernels(weight_KC33.detach().contiguous().flatten(2).numpy(), kernels)
    workers = torch.get_num_threads()
    before = np.empty((workers, PLACES, TILES, inputs), np.float32)
    after = np.empty((workers, PLACES, TILES, outputs), np.float32)
    _work(images, kernels, bias, padding, before, after, result)
    return torch.from_numpy(result).permute(0, 3, 1, 2)


@torch.no_grad()
@torch_threads()
def weight_gradient(x_BCHW: Tensor, gradient_BKHW: Tensor, padding: int) -> Tensor:
    """Gradient of `convolve`'s kernel, K,C,3,3, from its input and the gradient of its result."""
    images, gradients = _channels_last(x_BCHW), _channels_last(gradient_BKHW)
    (count, *_, outputs), inputs = gradients.shape, images.shape[3]
    tiles = _tiles(gradients.shape) // count
    sums = torch.zeros(PLACES, outputs, inputs)
    several = max(1, MOST // (PLACES * tiles * (inputs + outputs)))  # pictures
    for first in range(0, count, several):
        part, towards = images[first : first + several], gradients[first : first + several]
        read = np.empty((PLACES, len(part) * tiles, inputs), np.float32)
        made = np.empty((PLACES, len(part) * tiles, outputs), np.float32)
        _spread(part, towards, padding, read, made)
        sums.baddbmm_(torch.from_numpy(made).transpose(1, 2), torch.from_numpy(read))
    taps = np.empty((TAPS, outputs, inputs), np.float32)
    _gather_kernels(sums.numpy(), taps)
    return torch.from_numpy(taps).permute(1, 2, 0).reshape(outputs, inputs, KERNEL, KERNEL)


def _channels_last(x_BCHW: Tensor) -> np.ndarray:
    """B,H,W,C, contiguous."""
    return x_BCHW.detach().permute(0, 2, 3, 1).contiguous().numpy()


@parallel_njit(boundscheck=False)
def _work(images, kernels, bias, padding, before, after, result):
    """All tiles of all pictures, each thread with tiles of its own from the first step to the last.

    images B,H,W,C; kernels of `_spread_kernels`; bias K; before N,PLACES,TILES,C and after N,PLACES,TILES,K: room for
    N workers; result B,H',W',K.
    """
    workers, channels, outputs = before.shape[0], images.shape[3], result.shape[3]
    tiles = _tiles(result.shape)
    for worker in prange(workers):
        mine = advanced(pointer(before), worker * PLACES * TILES * channels)
        made = advanced(pointer(after), worker * PLACES * TILES * outputs)
        desk = np.empty(PLACES * LANES, np.float32)
        for first in range(worker * TILES, tiles, workers * TILES):
            count = min(TILES, tiles - first)
            for n in range(count):
                place = _place(first + n, result.shape)
                _read(pointer(images), images.shape, place, padding, pointer(desk), advanced(mine, n * channels), TILES)
            _multiply(mine, pointer(kernels), made, count, channels, outputs)
            for n in range(count):
                place = _place(first + n, result.shape)
                _write(advanced(made, n * outputs), pointer(bias), result.shape, place, pointer(desk), pointer(result))
        desk[0] = 0  # a buffer is freed after its last use, which pointers do not count as


@parallel_njit(boundscheck=False)
def _spread_kernels(weight, kernels):
    """G g G^T of every pair of channels: weight K,C,TAPS; kernels PLACES,K/LANES,C,LANES, as `_multiply` reads them."""
    outputs, channels, _ = weight.shape
    for block in prange(outputs // LANES):
        desk = np.empty((TAPS + KERNEL * IN) * LANES, np.float32)
        lines = advanced(pointer(desk), TAPS * LANES)
        for channel in range(channels):
            for n in range(TAPS * LANES):
                desk[n] = weight[block * LANES + n % LANES, channel, n // LANES]
            target = advanced(pointer(kernels), (block * channels + channel) * LANES)
            for j in range(KERNEL):
                _put(lines, j * IN * LANES, LANES, _kernel_lines(_get_three(pointer(desk), j * LANES, KERNEL * LANES)))
            for i in range(IN):
                row = _kernel_lines(_get_three(lines, i * LANES, IN * LANES))
                _put(target, i * IN * outputs * channels, outputs * channels, row)
        desk[0] = 0


@parallel_njit(boundscheck=False)
def _gather_kernels(sums, taps):
    """G^T s G of every pair of channels: sums PLACES,K,C; taps TAPS,K,C."""
    _, outputs, channels = sums.shape
    step = outputs * channels
    for output in prange(outputs):
        desk = np.empty(KERNEL * IN * LANES, np.float32)
        for channel in range(output * channels, (output + 1) * channels, LANES):
            for j in range(IN):
                three = _kernel_sums(_get(advanced(pointer(sums), channel), j * step, IN * step))
                _put_three(pointer(desk), j * LANES, IN * LANES, three)
            for i in range(KERNEL):
                three = _kernel_sums(_get(pointer(desk), i * IN * LANES, LANES))
                _put_three(advanced(pointer(taps), channel), i * KERNEL * step, step, three)
        desk[0] = 0


@parallel_njit(boundscheck=False)
def _spread(images, gradients, padding, read, made):
    """B^T d B and A D A^T of all tiles.

    images B,H,W,C; gradients B,H',W',K; read PLACES,tiles,C; made PLACES,tiles,K.
    """
    limits, size, tiles = images.shape, gradients.shape, read.shape[1]
    across = -(-size[2] // OUT)
    for line in prange(tiles // across):
        desk = np.empty(PLACES * LANES, np.float32)
        for tile in range(line * across, (line + 1) * across):
            place, target = _place(tile, size), advanced(pointer(read), tile * limits[3])
            _read(pointer(images), limits, place, padding, pointer(desk), target, tiles)
            _read_back(pointer(gradients), size, place, pointer(desk), advanced(pointer(made), tile * size[3]), tiles)
        desk[0] = 0


@register_jitable(inline="always")
def _tiles(size):
    """How many there are in all pictures. size: B,H',W',K."""
    return size[0] * -(-size[1] // OUT) * -(-size[2] // OUT)


@njit(inline="always")
def _place(tile, size):
    """Picture, first row and first column of a tile's results. size: B,H',W',K."""
    down, across = -(-size[1] // OUT), -(-size[2] // OUT)
    return tile // (down * across), OUT * (tile // across % down), OUT * (tile % across)


@njit(boundscheck=False)
def _read(images, limits, place, padding, desk, target, step):
    """B^T d B of one tile, C numbers of each of the PLACES `step` times C apart. limits: B,H,W,C."""
    channels, top, left = limits[3], place[1] - padding, place[2] - padding
    image = advanced(images, place[0] * limits[1] * limits[2] * channels)
    for channel in range(0, channels, LANES):
        for j in range(IN):
            column = _column(advanced(image, channel), top, left + j, limits)
            _put(desk, j * LANES, IN * LANES, _read_lines(column))
        for i in range(IN):
            row = _read_lines(_get(desk, i * IN * LANES, LANES))
            _put(target, i * IN * step * channels + channel, step * channels, row)


@njit(boundscheck=False)
def _read_back(gradients, limits, place, desk, target, step):
    """A D A^T of one tile, as `_read` lays it out. limits: B,H',W',K."""
    channels, top, left = limits[3], place[1], place[2]
    gradient = advanced(gradients, place[0] * limits[1] * limits[2] * channels)
    for channel in range(0, channels, LANES):
        for j in range(OUT):
            column = _four_pixels(advanced(gradient, channel), top, left + j, limits)
            _put(desk, j * LANES, IN * LANES, _back_lines(column))
        for i in range(IN):
            row = _back_lines(_get_four(desk, i * IN * LANES, LANES))
            _put(target, i * IN * step * channels + channel, step * channels, row)


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
def _write(source, bias, size, place, desk, result):
    """A^T m A and the bias of one tile, whose first place is at `source`. size: B,H',W',K."""
    picture, top, left = place
    _, height, width, channels = size
    target, step = advanced(result, ((picture * height + top) * width + left) * channels), TILES * channels
    for channel in range(0, channels, LANES):
        offset = load(bias, channel)
        for j in range(IN):
            column = _write_lines(_get(source, j * step + channel, IN * step))
            _put_some(desk, j * LANES, IN * LANES, column, OUT)
        for i in range(min(OUT, height - top)):
            row = _raised(_write_lines(_get(desk, i * IN * LANES, LANES)), offset)
            _put_some(target, i * width * channels + channel, channels, row, width - left)


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
def _kernel_lines(g):
    """G g of one line: three vectors to six."""
    even, odd = add(g[0], multiply(splat(HALF), g[2])), multiply(splat(ROOT), g[1])
    even_2, odd_2 = add(g[0], multiply(splat(TWO), g[2])), multiply(splat(ROOT_2), g[1])
    near, far = splat(BY_NEAR), splat(BY_FAR)
    return (
        g[0],
        multiply(near, add(even, odd)),
        multiply(near, subtract(even, odd)),
        multiply(far, add(even_2, odd_2)),
        multiply(far, subtract(even_2, odd_2)),
        g[2],
    )


@njit(inline="always")
def _kernel_sums(s):
    """G^T s of one line: six vectors to three."""
    even, odd = multiply(splat(BY_NEAR), add(s[1], s[2])), multiply(splat(BY_NEAR * ROOT), subtract(s[1], s[2]))
    even_2, odd_2 = multiply(splat(BY_FAR), add(s[3], s[4])), multiply(splat(BY_FAR * ROOT_2), subtract(s[3], s[4]))
    squares = add(multiply(splat(HALF), even), multiply(splat(TWO), even_2))
    return add(add(s[0], even), even_2), add(odd, odd_2), add(squares, s[5])


@njit(inline="always")
def _back_lines(d):
    """A D of one line: four vectors to six."""
    even, odd = add(d[0], multiply(splat(HALF), d[2])), add(d[1], multiply(splat(HALF), d[3]))
    even_2, odd_2 = add(d[0], multiply(splat(TWO), d[2])), add(d[1], multiply(splat(TWO), d[3]))
    odd, odd_2 = multiply(splat(ROOT), odd), multiply(splat(ROOT_2), odd_2)
    return d[0], add(even, odd), subtract(even, odd), add(even_2, odd_2), subtract(even_2, odd_2), d[3]


@njit(inline="always")
def _raised(four, offset):
    return add(four[0], offset), add(four[1], offset), add(four[2], offset), add(four[3], offset)


@njit(inline="always")
def _column(source, top, column, limits):
    """LANES channels of six pixels one below the other, zeros where there are none. limits: B,H,W,C."""
    if 0 <= column < limits[2] and top >= 0 and top + IN <= limits[1]:
        return _get(source, (top * limits[2] + column) * limits[3], limits[2] * limits[3])
    return (
        _pixel(source, top, column, limits),
        _pixel(source, top + 1, column, limits),
        _pixel(source, top + 2, column, limits),
        _pixel(source, top + 3, column, limits),
        _pixel(source, top + 4, column, limits),
        _pixel(source, top + 5, column, limits),
    )


@njit(inline="always")
def _four_pixels(source, top, column, limits):
    return (
        _pixel(source, top, column, limits),
        _pixel(source, top + 1, column, limits),
        _pixel(source, top + 2, column, limits),
        _pixel(source, top + 3, column, limits),
    )


@njit(inline="always")
def _pixel(source, row, column, limits):
    inside = 0 <= row < limits[1] and 0 <= column < limits[2]
    return load(source, (row * limits[2] + column) * limits[3]) if inside else splat(np.float32(0))


@njit(inline="always")
def _get_three(source, at, step):
    return load(source, at), load(source, at + step), load(source, at + 2 * step)


@njit(inline="always")
def _put_three(target, at, step, three):
    store(target, at, three[0])
    store(target, at + step, three[1])
    store(target, at + 2 * step, three[2])


@njit(inline="always")
def _get_four(source, at, step):
    return load(source, at), load(source, at + step), load(source, at + 2 * step), load(source, at + 3 * step)


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
