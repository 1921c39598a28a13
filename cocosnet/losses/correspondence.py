"""Correspondence loss (Eq. 12): a pseudo exemplar, warped, must be the picture that it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def correspondence_loss(
    warps: Sequence[Sequence[Tensor]], target: Tensor, pseudo: Tensor, decay: float, count: Tensor | None = None
) -> Tensor:
    """Eq. 12, summed over the levels and averaged over the samples whose exemplar is a pseudo exemplar.

    warps: for each level the warps after its T iterations, B,3,h,w in [-1, 1]; iteration t = 0..T-1 weighs
    decay^(T-1-t), over the sum of these weights. target x_B: B,3,H,W in [-1, 1]. pseudo: B, 1 for a pseudo exemplar and
    0 for another picture. count: what the sum over the samples is divided by instead of the number of pseudo exemplars,
    for a batch that is a part of a larger one. Returns a float32 scalar, 0 where no sample is pseudo.

    The release divides the weights of the samples by their sum and then takes the mean over the batch as well; here a
    batch counts the same whatever its size.
    """
    samples = sum(_level(level, target, decay) for level in warps)
    count = pseudo.sum() if count is None else count
    return (pseudo * samples).sum() / torch.where(count > 0, count, 1)


def _level(warps: Sequence[Tensor], target: Tensor, decay: float) -> Tensor:
    """One level's value for each sample: B."""
    small = shrink(target, warps[-1].shape[-2:])
    weights = [decay ** (len(warps) - 1 - t) for t in range(len(warps))]
    errors = [(warp.float() - small).abs().mean((1, 2, 3)) for warp in warps]
    return sum(weight * error for weight, error in zip(weights, errors, strict=True)) / sum(weights)


def shrink(image: Tensor, size: torch.Size) -> Tensor:
    """x_B down: B,C,H,W -> B,C,h,w by area averages, as the exemplar is shrunk for the warps. `size` is (h, w)."""
    return image if image.shape[-2:] == size else F.interpolate(image, size=size, mode="area")
