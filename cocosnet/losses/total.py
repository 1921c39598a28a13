"""Total loss (Eq. 19): a visible weighted sum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cocosnet.config import LossConfig


def loss_weights(config: LossConfig) -> dict[str, float]:
    """The lambdas of Eq. 19 by the name of the generator's losses; 0 for Eq. 15-16 without a perceptual network."""
    perceptual = float(config.perceptual != "none")
    return {
        "align": config.align,  # lambda_1, Eq. 11
        "corr": config.corr,  # lambda_2, Eq. 12
        "match": config.match,  # not in the paper
        "map": config.map,  # lambda_3, Eq. 13-14
        "sem": config.sem * perceptual,  # lambda_4, Eq. 15
        "contextual": config.contextual * perceptual,  # lambda_4 u_m, Eq. 16
        "feature": config.feature * perceptual,  # lambda_4 eta_m, Eq. 16
        "adv": config.adv,  # lambda_5, Eq. 18
    }


def total_loss(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Eq. 19 for the generator: sum of weight * loss over the losses that were computed (scalars)."""
    return sum(weights[name] * value for name, value in parts.items())
