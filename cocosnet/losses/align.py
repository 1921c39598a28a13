"""Domain alignment loss (Eq. 11): what M_A sees in a condition is what M_B sees in its picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def align_loss(features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
    """Eq. 11: mean absolute difference of M_A(x_A) and M_B(x_B), summed over the levels.

    Both: L maps B,C_l,h,w of unit length over the channels; so a level's value lies in [0, 2 / sqrt(C_l)]. Returns a
    float32 scalar.
    """
    return sum((a.float() - b.float()).abs().mean() for a, b in zip(features_a, features_b, strict=True))
