"""Mapping loss (Eq. 13-14): the features of either domain still know the picture."""

from __future__ import annotations

from torch import Tensor


def mapping_loss(mapped_condition: Tensor, target: Tensor, mapped_exemplar: Tensor, exemplar: Tensor) -> Tensor:
    """|R(M_A(x_A)) - x_B|_1 + |R(M_B(y_B)) - y_B|_1, means over everything. All B,3,H,W in [-1, 1]; float32 scalar."""
    return (mapped_condition - target).abs().mean() + (mapped_exemplar - exemplar).abs().mean()
