"""The GPU engine: propagation and evaluation fused by Triton, one program for a block of pixels.

Same results as `patchmatch.propagate`, `patchmatch.descend` and `patchmatch.evaluate` (the definition). The K best
distinct candidates of a pixel live in registers while all others are scored against them; no sampled feature is ever
stored. Features may be float32, bfloat16 or float16; sums, scores and positions are float32, and pixels are numbered by
integers.

Layouts inside: features B,H,W,C and positions B,h,w,K,2, both contiguous, so that a candidate's C numbers lie together.
In the kernels: P pixels of a block, S slots (K rounded up to a power of 2), C channels (likewise).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import next_power_of_2

from cocosnet.model import patchmatch
from cocosnet.model.matches import Matches
from cocosnet.model.warp import R2_STEPS, clamp_positions

BLOCK = 32  # pixels of a program, at most
BLOCK_SLOTS = 512  # slots of a program, at most: with more, ranking them spills registers
MAX_CANDIDATES = 32  # more slots than that would not fit into registers
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORTEST = tl.constexpr(patchmatch.SHORTEST)
# A size that is 1 would become a constant, and one that 16 divides a kernel of its own: sizes are plain numbers.
SIZES = ["count", "height", "width", "rows", "columns", "coarse_height", "coarse_width"]


def start() -> None:
    """Build what Triton launches kernels with; nothing without a GPU.

    Raises:
        Exception: there is no C compiler, none of Python's headers, no driver, or no folder for Triton's cache. The
            first launch would raise it otherwise, when it is too late for another engine.
    """
    if torch.cuda.is_available():
        triton.runtime.driver.active.get_current_device()


def can_handle(features: Tensor, candidates: int) -> bool:
    """Whether the kernels run: a type that they know, K that fits, on a GPU (or anywhere under the interpreter)."""
    return (
        candidates <= MAX_CANDIDATES
        and features.dtype in TYPES
        and (features.is_cuda or not isinstance(_pass_kernel, triton.JITFunction))
    )


@torch.no_grad()
def propagate(
    positions: Tensor, features_x: Tensor, features_y: Tensor, scores: Tensor | None = None, iterations: int = 1
) -> Matches:
    """`patchmatch.propagate`: the same arguments and result, up to ties and rounding of sums.

    Raises:
        ValueError: more than 32 candidates.
    """
    field = _inner(clamp_positions(positions, *features_y.shape[-2:]))
    fx, fy = _channels_last(features_x), _channels_last(features_y)
    known = _scores(field, fx, fy) if scores is None else scores.permute(0, 2, 3, 1).float().contiguous()
    for vertical in (False, True) * iterations:
        best, best_scores = torch.empty_like(field), torch.empty_like(known)
        _launch(_pass_kernel, field, fx, fy, field, known, best, best_scores, VERTICAL=vertical)
        field, known = best, best_scores
    return Matches(_outer(field), known.permute(0, 3, 1, 2))


@torch.no_grad()
def descend(coarse_positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.descend`: the same arguments and result, up to ties and rounding of sums.

    Raises:
        ValueError: more than 32 candidates.
    """
    coarse, fx, fy = _inner(coarse_positions), _channels_last(features_x), _channels_last(features_y)
    field = coarse.new_empty(*fx.shape[:3], *coarse.shape[3:])
    scores = field.new_empty(field.shape[:-1])
    sizes = dict(zip(("coarse_height", "coarse_width"), coarse.shape[1:3])) | dict(zip(("step_y", "step_x"), R2_STEPS))
    _launch(_descend_kernel, field, fx, fy, coarse, field, scores, **sizes)
    return Matches(_outer(field), scores.permute(0, 3, 1, 2))


def evaluate(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """`patchmatch.evaluate`: the same arguments, result and gradients. Raises ValueError over 32 candidates."""
    positions = clamp_positions(positions, *features_y.shape[-2:])
    return Matches(positions, _Scores.apply(positions, features_x, features_y))


class _Scores(torch.autograd.Function):
    """S(p, k) of Eq. 7, -inf for duplicates, and its gradients by the positions and both features."""

    @staticmethod
    def forward(ctx, positions: Tensor, features_x: Tensor, features_y: Tensor) -> Tensor:
        scores = _scores(_inner(positions), _channels_last(features_x), _channels_last(features_y))
        ctx.save_for_backward(positions, features_x, features_y, scores)
        return scores.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions, features_x, features_y, scores = ctx.saved_tensors
        field, fx, fy = _inner(positions), _channels_last(features_x), _channels_last(features_y)
        gradient = gradient.permute(0, 2, 3, 1).float().masked_fill(scores == -torch.inf, 0).contiguous()
        by_x, by_y = (torch.zeros_like(f, dtype=torch.float32) for f in (fx, fy))
        by_position = torch.empty_like(field)
        _launch(_backward_kernel, field, fx, fy, field, gradient, by_position, by_x, by_y)
        return (
            _outer(by_position).to(positions.dtype),
            *(g.permute(0, 3, 1, 2).to(features_x.dtype) for g in (by_x, by_y)),
        )


def _scores(field: Tensor, fx: Tensor, fy: Tensor) -> Tensor:
    """Scores B,h,w,K of a field B,h,w,K,2, duplicates emptied."""
    scores = field.new_empty(field.shape[:-1])
    _launch(_scores_kernel, field, fx, fy, field, scores)
    return scores


def _launch(kernel, field: Tensor, fx: Tensor, fy: Tensor, *tensors: Tensor, **more: int) -> None:
    """Run a kernel over all pixels of a field: its pointers, the sizes that all have, and what it alone has."""
    batch, height, width, candidates, _ = field.shape
    if candidates > MAX_CANDIDATES:
        raise ValueError(f"the Triton engine keeps at most {MAX_CANDIDATES} candidates a pixel, got {candidates}")
    _, rows, columns, channels = fy.shape
    sizes = block_sizes(candidates, channels)
    grid = (triton.cdiv(batch * height * width, sizes["P"]),)
    numbers = (batch * height * width, height, width, rows, columns, channels)
    # Triton launches on the current device, which need not be the features'.
    with torch.cuda.device(fx.device) if fx.is_cuda else contextlib.nullcontext():
        kernel[grid](fx, fy, *tensors, *numbers, K=candidates, **sizes, **more)


def block_sizes(candidates: int, channels: int) -> dict[str, int]:
    """Pixels P, slots S and channels C of a program; all are powers of 2."""
    slots = next_power_of_2(candidates)
    return {"P": min(BLOCK, BLOCK_SLOTS // slots), "S": slots, "C": next_power_of_2(channels)}


def _channels_last(map_BCHW: Tensor) -> Tensor:
    return map_BCHW.detach().permute(0, 2, 3, 1).contiguous()


def _inner(positions_BK2hw: Tensor) -> Tensor:
    return positions_BK2hw.detach().permute(0, 3, 4, 1, 2).float().contiguous()


def _outer(positions_BhwK2: Tensor) -> Tensor:
    return positions_BhwK2.permute(0, 3, 4, 1, 2)


@triton.jit
def _pixel(y, x, columns):
    """The number of the pixel that a position lies in. Adding 1.5 * 2^23 and taking it off rounds half to even."""
    row = ((y + 12582912.0) - 12582912.0).to(tl.int32)
    column = ((x + 12582912.0) - 12582912.0).to(tl.int32)
    return row * columns + column


@triton.jit
def _corners(value, size):
    """The two pixels around a coordinate inside [0, size-1], and the second one's weight; NaN lies at the first two."""
    low = tl.maximum(tl.minimum(value.to(tl.int32), size - 2), 0)
    return low, tl.minimum(low + 1, size - 1), value - low.to(tl.float32)


@triton.jit
def _read(fy, image, row, column, rows, columns, channels, channel, valid):
    """Features P,C of one pixel each, as float32."""
    place = (image * rows + row).to(tl.int64) * columns + column
    mask = valid[:, None] & (channel < channels)[None, :]
    return tl.load(fy + place[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _length(y):
    """Lengths P of P,C blended features, at least `patchmatch.SHORTEST`."""
    return tl.maximum(tl.sqrt(tl.sum(y * y, 1)), SHORTEST)


@triton.jit
def _cosine(x, fy, image, y_at, x_at, rows, columns, channels, channel, valid):
    """Cosine of x and fy(y, x), bilinear, of P pixels; one that is no number, and could not be ranked, is -inf."""
    y0, y1, v = _corners(y_at, rows)
    x0, x1, u = _corners(x_at, columns)
    # At whole positions, which is most of them without refinement, three of the corners weigh nothing: not read.
    across, down = valid & (u > 0), valid & (v > 0)
    y = ((1 - v) * (1 - u))[:, None] * _read(fy, image, y0, x0, rows, columns, channels, channel, valid)
    y += ((1 - v) * u)[:, None] * _read(fy, image, y0, x1, rows, columns, channels, channel, across)
    y += (v * (1 - u))[:, None] * _read(fy, image, y1, x0, rows, columns, channels, channel, down)
    y += (v * u)[:, None] * _read(fy, image, y1, x1, rows, columns, channels, channel, across & down)
    score = tl.sum(x * y, 1) / _length(y)
    return tl.where(score == score, score, float("-inf"))


@triton.jit
def _rank(scores, slot):
    """How many slots of a pixel come before each: those of a higher score, or of the same one and an earlier place."""
    ahead = scores[:, None, :] > scores[:, :, None]
    earlier = (scores[:, None, :] == scores[:, :, None]) & (slot[None, None, :] < slot[None, :, None])
    return tl.sum((ahead | earlier).to(tl.int32), 2)


@triton.jit
def _is_duplicate(pixels, scores, slot):
    """Which slots lie in a pixel that a better or equal, earlier one holds."""
    same = pixels[:, None, :] == pixels[:, :, None]
    ahead = scores[:, None, :] > scores[:, :, None]
    earlier = (scores[:, None, :] == scores[:, :, None]) & (slot[None, None, :] < slot[None, :, None])
    return tl.max((same & (ahead | earlier)).to(tl.int32), 2) > 0


@triton.jit
def _block(count, height, width, P: tl.constexpr):
    """The program's P pixels: numbers (int64) in the batch, which there are, rows, columns and images."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    return p.to(tl.int64), p < count, (p // width) % height, p % width, p // (width * height)


@triton.jit
def _own(fx, row, channels, channel, valid):
    """Features P,C of the pixels themselves, as float32."""
    mask = valid[:, None] & (channel < channels)[None, :]
    return tl.load(fx + row[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _offer(y, x_at, there, ys, xs, scores, pixels, slot, x, fy, image, rows, columns, channels, channel):
    """One candidate for each of P pixels, clamped and scored. It replaces the match in its own pixel, else the weakest.

    ys, xs, scores, pixels: rows, columns, scores and pixel numbers P,S of what is held so far. Returns them anew.
    """
    y = tl.minimum(tl.maximum(y, 0.0), (rows - 1).to(tl.float32))
    x_at = tl.minimum(tl.maximum(x_at, 0.0), (columns - 1).to(tl.float32))
    score = _cosine(x, fy, image, y, x_at, rows, columns, channels, channel, there)
    pixel = _pixel(y, x_at, columns)
    same = pixels == pixel[:, None]
    has = tl.max(same.to(tl.int32), 1) > 0
    weakest = slot[None, :] == tl.argmin(scores, 1)[:, None]
    target = tl.where(has[:, None], same, weakest)
    accepted = target & (score[:, None] > scores) & there[:, None]
    return (
        tl.where(accepted, y[:, None], ys),
        tl.where(accepted, x_at[:, None], xs),
        tl.where(accepted, score[:, None], scores),
        tl.where(accepted, pixel[:, None], pixels),
    )


@triton.jit
def _put_back(best, best_scores, ys, xs, scores, row, mine, slot, K: tl.constexpr, S: tl.constexpr):
    """Write what is held, best first; empty slots repeat the best one's position."""
    rank = _rank(scores, slot) - (S - K)
    first = rank == 0
    empty = scores == float("-inf")
    ys = tl.where(empty, tl.sum(tl.where(first, ys, 0.0), 1)[:, None], ys)
    xs = tl.where(empty, tl.sum(tl.where(first, xs, 0.0), 1)[:, None], xs)
    place = row[:, None] * K + rank
    tl.store(best_scores + place, scores, mask=mine)
    tl.store(best + place * 2, ys, mask=mine)
    tl.store(best + place * 2 + 1, xs, mask=mine)


@triton.jit(do_not_specialize=SIZES)
def _pass_kernel(
    fx, fy, field, known, best, best_scores, count, height, width, rows, columns, channels,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, P: tl.constexpr, VERTICAL: tl.constexpr,
):  # fmt: skip
    """One propagation pass along one axis: `neighbour_candidates` and `best_distinct` at once, own scores known."""
    slot, channel = tl.arange(0, S), tl.arange(0, C)
    row, valid, i, j, image = _block(count, height, width, P)
    x = _own(fx, row, channels, channel, valid)
    # A pixel's own matches. Slots beyond K hold an infinite score, which nothing beats.
    own = row[:, None] * K + slot[None, :]
    mine = valid[:, None] & (slot < K)[None, :]
    scores = tl.load(known + own, mask=mine, other=float("inf"))
    ys = tl.load(field + own * 2, mask=mine, other=0.0)
    xs = tl.load(field + own * 2 + 1, mask=mine, other=0.0)
    filled = mine & (scores > float("-inf"))
    pixels = tl.where(filled, _pixel(ys, xs, columns), -1)
    for m in range(0, 2 * K):
        shift = (m // K) * 2 - 1
        if VERTICAL:
            there = valid & (i + shift >= 0) & (i + shift < height)
            source = row + shift * width
        else:
            there = valid & (j + shift >= 0) & (j + shift < width)
            source = row + shift
        place = field + (source * K + m % K) * 2
        y = tl.load(place, mask=there, other=0.0)
        x_at = tl.load(place + 1, mask=there, other=0.0)
        if VERTICAL:
            y = y - shift
        else:
            x_at = x_at - shift
        ys, xs, scores, pixels = _offer(
            y, x_at, there, ys, xs, scores, pixels, slot, x, fy, image, rows, columns, channels, channel
        )
    _put_back(best, best_scores, ys, xs, scores, row, mine, slot, K, S)


@triton.jit
def _scattered(number, step, side):
    """One axis of `warp.scattered_positions`: the number's place in [0, side), in int64; 4294967295 is 2^32 - 1."""
    return ((((number * step) & 4294967295) * side) >> 32).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _descend_kernel(
    fx, fy, parents, best, best_scores, count, height, width, rows, columns, channels,
    coarse_height, coarse_width, step_y, step_x,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`patchmatch.descend`: children of the best half of the coarse pixel's matches first, then scattered places."""
    slot, channel = tl.arange(0, S), tl.arange(0, C)
    row, valid, i, j, image = _block(count, height, width, P)
    x = _own(fx, row, channels, channel, valid)
    mine = valid[:, None] & (slot < K)[None, :]
    ys, xs, pixels = tl.zeros((P, S), tl.float32), tl.zeros((P, S), tl.float32), tl.full((P, S), -1, tl.int32)
    scores = ys + tl.where(slot < K, float("-inf"), float("inf"))[None, :]
    parent = ((image * coarse_height + i // 2) * coarse_width + j // 2).to(tl.int64) * K
    for m in range(0, 4 * ((K + 1) // 2)):
        place = parents + (parent + m // 4) * 2
        y = 2 * tl.load(place, mask=valid, other=0.0) + (m // 2) % 2
        x_at = 2 * tl.load(place + 1, mask=valid, other=0.0) + m % 2
        ys, xs, scores, pixels = _offer(
            y, x_at, valid, ys, xs, scores, pixels, slot, x, fy, image, rows, columns, channels, channel
        )
    number = (i * width + j).to(tl.int64) * K
    for k in range(0, K):
        y, x_at = _scattered(number + k, step_y, rows), _scattered(number + k, step_x, columns)
        ys, xs, scores, pixels = _offer(
            y, x_at, valid, ys, xs, scores, pixels, slot, x, fy, image, rows, columns, channels, channel
        )
    _put_back(best, best_scores, ys, xs, scores, row, mine, slot, K, S)


@triton.jit(do_not_specialize=SIZES)
def _scores_kernel(
    fx, fy, field, result, count, height, width, rows, columns, channels,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scores of a field as it stands, -inf for duplicates."""
    slot, channel = tl.arange(0, S), tl.arange(0, C)
    row, valid, _, _, image = _block(count, height, width, P)
    x = _own(fx, row, channels, channel, valid)
    own = row[:, None] * K + slot[None, :]
    mine = valid[:, None] & (slot < K)[None, :]
    ys = tl.load(field + own * 2, mask=mine, other=0.0)
    xs = tl.load(field + own * 2 + 1, mask=mine, other=0.0)
    pixels = tl.where(mine, _pixel(ys, xs, columns), -1)
    scores = tl.full((P, S), float("-inf"), tl.float32)
    for k in range(0, K):
        place = field + (row * K + k) * 2
        y = tl.load(place, mask=valid, other=0.0)
        x_at = tl.load(place + 1, mask=valid, other=0.0)
        score = _cosine(x, fy, image, y, x_at, rows, columns, channels, channel, valid)
        scores = tl.where(slot[None, :] == k, score[:, None], scores)
    scores = tl.where(_is_duplicate(pixels, scores, slot), float("-inf"), scores)
    tl.store(result + own, scores, mask=mine)


@triton.jit
def _add(target, image, row, column, rows, columns, channels, channel, valid, values):
    """Add P,C values to one pixel each of a map; several programs may add to the same one."""
    place = (image * rows + row).to(tl.int64) * columns + column
    mask = valid[:, None] & (channel < channels)[None, :]
    # Nothing is read back before the kernel ends, so no order among the additions is asked for.
    tl.atomic_add(target + place[:, None] * channels + channel[None, :], values, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    fx, fy, field, gradient, by_position, by_x, by_y, count, height, width, rows, columns, channels,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores: written to by_position and by_x, added to by_y."""
    channel = tl.arange(0, C)
    row, valid, _, _, image = _block(count, height, width, P)
    own = row[:, None] * channels + channel[None, :]
    inside = valid[:, None] & (channel < channels)[None, :]
    x = _own(fx, row, channels, channel, valid)
    total = tl.zeros((P, C), tl.float32)
    for k in range(0, K):
        place = row * K + k
        g = tl.load(gradient + place, mask=valid, other=0.0)
        y0, y1, v = _corners(tl.load(field + place * 2, mask=valid, other=0.0), rows)
        x0, x1, u = _corners(tl.load(field + place * 2 + 1, mask=valid, other=0.0), columns)
        w00, w01, w10, w11 = (1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u
        f00 = _read(fy, image, y0, x0, rows, columns, channels, channel, valid)
        f01 = _read(fy, image, y0, x1, rows, columns, channels, channel, valid)
        f10 = _read(fy, image, y1, x0, rows, columns, channels, channel, valid)
        f11 = _read(fy, image, y1, x1, rows, columns, channels, channel, valid)
        y = w00[:, None] * f00 + w01[:, None] * f01 + w10[:, None] * f10 + w11[:, None] * f11
        length = _length(y)
        score = tl.where(length > SHORTEST, tl.sum(x * y, 1) / length, 0.0)
        direction = y / length[:, None]
        total += g[:, None] * direction
        # What a change of the unstretched features there does to the score.
        q = (g / length)[:, None] * (x - score[:, None] * direction)
        d00, d01, d10, d11 = tl.sum(q * f00, 1), tl.sum(q * f01, 1), tl.sum(q * f10, 1), tl.sum(q * f11, 1)
        # On a map of one row (or column) both corners are the same one, and the gradient is zero by itself.
        by_row = (1 - u) * (d10 - d00) + u * (d11 - d01)
        by_column = (1 - v) * (d01 - d00) + v * (d11 - d10)
        tl.store(by_position + place * 2, by_row, mask=valid)
        tl.store(by_position + place * 2 + 1, by_column, mask=valid)
        _add(by_y, image, y0, x0, rows, columns, channels, channel, valid, w00[:, None] * q)
        _add(by_y, image, y0, x1, rows, columns, channels, channel, valid, w01[:, None] * q)
        _add(by_y, image, y1, x0, rows, columns, channels, channel, valid, w10[:, None] * q)
        _add(by_y, image, y1, x1, rows, columns, channels, channel, valid, w11[:, None] * q)
    tl.store(by_x + own, total, mask=inside)
