"""Perceptual loss against the ground truth (Eq. 15)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cocosnet.losses.appearance import mean_difference

LAYER = "relu4_2"  # phi_m (release; it takes the squared difference, the paper the absolute one)


def semantic_loss(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Eq. 15: mean absolute difference of relu4_2 of the output and of x_B. Feature maps by name; float32 scalar."""
    return mean_difference(output[LAYER], target[LAYER]).mean()
