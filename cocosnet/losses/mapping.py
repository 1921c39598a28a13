"""Mapping loss (Eq. 13-14): the features of either domain still know the picture."""

from __future__ import annotations

from torch import Tensor

from cocosnet.losses.correspondence import shrink


def mapping_loss(mapped_condition: Tensor, target: Tensor, mapped_exemplar: Tensor, exemplar: Tensor) -> Tensor:
    """|R(M_A(x_A)) - x_B|_1 + |R(M_B(y_B)) - y_B|_1, means over everything. All B,3,H,W in [-1, 1]; float32 scalar.

    Where the last matched level is not at full resolution, R's pictures are B,3,h,w, and the others are shrunk to that.
    """
    pairs = ((mapped_condition, target), (mapped_exemplar, exemplar))
    return sum((mapped - shrink(picture, mapped.shape[-2:])).abs().mean() for mapped, picture in pairs)
