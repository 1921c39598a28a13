"""Adversarial losses (Eq. 17-18), hinge form, averaged over the scales of the discriminator.

The hinge is h(t) = min(0, -1 + t), as printed. The paper calls the real sample y_B; ours is x_B with its own condition
x_A, because a discriminator that sees the condition needs a pair that belongs together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hinge(t: Tensor) -> Tensor:
    """h(t) = min(0, -1 + t), elementwise."""
    return torch.clamp(t - 1, max=0)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Eq. 17: -E[h(D(real))] - E[h(-D(fake))]. Score maps, one a scale, B,1,h,w each; float32 scalar, at least 0."""
    values = [-hinge(r.float()).mean() - hinge(-f.float()).mean() for r, f in zip(real, fake, strict=True)]
    return sum(values) / len(values)


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """Eq. 18: -E[D(fake)]. Score maps, one a scale, B,1,h,w each; float32 scalar."""
    return -sum(f.float().mean() for f in fake) / len(fake)
