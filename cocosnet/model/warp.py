"""Coordinates, sampling and the soft warp (Eq. 8). This module owns THE coordinate convention.

Convention: a position is (y, x), rows first, in pixels of the level at hand, with pixel centres at integers: (0, 0) is
the centre of the top left pixel, (h-1, w-1) that of the bottom right one. Rows and columns are separate channels and
never join into one float. Between levels of a factor 2, fine pixel 2i+r (r = 0, 1) lies in coarse pixel i.
Positions outside the map are clamped to its border.

Shapes: B batch, C channels, K candidates, h w the condition's map, H W the exemplar's map (sizes may differ).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

R2_STEPS = (3242174889, 2447445413)  # 2^32 over the plastic number and over its square, odd


def is_open(size: int) -> bool:
    """Whether a size is a variable of a graph that is being exported. Nothing may be cut in pieces by it then."""
    return isinstance(size, torch.SymInt)


def pixel_grid(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Each pixel's own position. Returns 2,height,width float32, channel 0 = y."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def of_axes(like: Tensor, y: float, x: float) -> Tensor:
    """(y, x) as 1,1,2,1,1, which goes with positions; of `like`'s dtype and device. Sizes may be open."""
    return torch.stack([like.new_full((), value) for value in (y, x)]).view(1, 1, 2, 1, 1)


def clamp_positions(positions_BK2hw: Tensor, height: int, width: int) -> Tensor:
    """Move positions that left a map of `height` x `width` onto its border, and NaN to 0. Same shape and dtype."""
    limit = of_axes(positions_BK2hw, height - 1, width - 1)
    return torch.minimum(torch.where(positions_BK2hw > 0, positions_BK2hw, 0), limit)


def sample(map_BCHW: Tensor, positions_BK2hw: Tensor) -> Tensor:
    """Read a map bilinearly at fractional positions, the border repeated outside.

    Differentiable in both arguments. Returns B,C,K,h,w in the map's dtype, which should hold positions well: float32.
    """
    batch, candidates, _, height, width = positions_BK2hw.shape
    span = of_axes(positions_BK2hw, *(max(size - 1, 1) for size in map_BCHW.shape[-2:]))
    normalised = positions_BK2hw * (2.0 / span) - 1.0
    grid = normalised.flip(2).permute(0, 1, 3, 4, 2).reshape(batch, candidates * height, width, 2)
    values = F.grid_sample(
        map_BCHW, grid.to(map_BCHW.dtype), mode="bilinear", padding_mode="border", align_corners=True
    )
    return values.view(batch, -1, candidates, height, width)


def soft_warp(exemplar_BCHW: Tensor, positions_BK2hw: Tensor, scores_BKhw: Tensor, temperature: float) -> Tensor:
    """Eq. 8: w(p) = sum_k softmax_k(S(p, k) / temperature) y(H(p, k)).

    A score of -inf marks an empty slot and weighs nothing. Returns B,C,h,w float32, differentiable in all inputs.
    """
    weights = torch.softmax(scores_BKhw / temperature, dim=1)
    return (sample(exemplar_BCHW, positions_BK2hw) * weights.unsqueeze(1)).sum(2)


def upsample_positions(positions_BK2hw: Tensor, height: int, width: int) -> Tensor:
    """Carry a field to the next finer level: a fine pixel looks where its coarse pixel looked, at its own corner of it.

    H_fine(2i + r) = 2 H_coarse(i) + r for r in {0, 1}^2, so that offsets double and distinct candidates stay distinct.
    `height`, `width` are the fine condition map's size. Returns B,K,2,height,width, not clamped.
    """
    doubled = positions_BK2hw.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., :height, :width] * 2
    return doubled + pixel_grid(height, width, positions_BK2hw.device).remainder(2)


def downsample_field(field_B2HW: Tensor, factor: int) -> Tensor:
    """A dense field as a coarser level sees it: the mean of `factor` x `factor` positions, in that level's pixels.

    The way back of `upsample_positions`. Returns B,2,H/factor,W/factor.
    """
    return (downsample(field_B2HW, factor) + 0.5) / factor - 0.5


def child_positions(positions_BK2hw: Tensor, height: int, width: int) -> Tensor:
    """Start a finer level: a match in coarse pixel q says that the fine one lies in one of the four fine pixels of q.

    The K/4 best coarse matches (rounded up) give four candidates each, the fine pixel's own corner first; K remain.
    `upsample_positions` alone would double every offset, and since propagation copies offsets, none could ever be odd.
    Returns B,K,2,height,width, not clamped, best coarse match first.
    """
    candidates = positions_BK2hw.shape[1]
    doubled = 2 * positions_BK2hw[:, : -(-candidates // 4)].permute(0, 3, 4, 1, 2)  # B,h,w,parents,2
    four = torch.arange(4, device=doubled.device)
    sub, corner = torch.meshgrid(four, four, indexing="ij")  # of the fine pixel and of the match
    steps = torch.stack([(sub // 2 + corner // 2) % 2, (sub + corner) % 2], dim=-1).to(doubled)
    children = doubled[:, :, None, :, None, :, None] + steps.view(1, 1, 2, 1, 2, 1, 4, 2)
    # B,h,2,w,2,parents,4,2: in this order the next two lines copy nothing, and a pixel's candidates lie together.
    children = children.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return children[:, :height, :width, :candidates].permute(0, 3, 4, 1, 2)


def scattered_positions(count: int, size: torch.Size, target: torch.Size, device: torch.device | None = None) -> Tensor:
    """`count` whole positions in a map of `target` (H, W) for each pixel of one of `size` (h, w), others for each.

    They look random and are not: the additive sequence of the plastic number (Roberts 2018, "R2"), in 32 bit integers,
    which fills the map evenly whichever pixels are taken together. Returns 1,count,2,h,w float32.
    """
    height, width = size
    number = torch.arange(height * width * count, device=device).view(height, width, count)
    axes = [((number * step) % 2**32 * side) >> 32 for step, side in zip(R2_STEPS, target)]
    return torch.stack(axes).permute(3, 0, 1, 2).unsqueeze(0).float()


def downsample(image_BCHW: Tensor, factor: int) -> Tensor:
    """Average `factor` x `factor` pixels, the arrow of Eq. 12; sizes must be multiples of `factor`."""
    return image_BCHW if factor == 1 else F.avg_pool2d(image_BCHW, factor)
