"""An exponential moving average of the weights, counted in images; this is the network that is released."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

RAMP = 0.05  # the half-life is at most this share of the images seen, so that the first weights are soon forgotten
POWER_ITERATIONS = 100  # of the spectral norms, before the averaged network is used


class Ema:
    """`network` is a copy in evaluation mode that follows the one given. half_life: images."""

    def __init__(self, network: nn.Module, half_life: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life = half_life

    @torch.no_grad()
    def update(self, network: nn.Module, images: int, batch: int) -> None:
        """Follow by one step of `batch` images; `images` were seen in all."""
        half_life = min(self.half_life, RAMP * images)
        keep = 0.5 ** (batch / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - keep)

    @torch.no_grad()
    def settled(self) -> nn.Module:
        """A copy of the averaged network that is ready for use; the same weights always give the same copy.

        Its spectral norms are estimated for its own weights, where `network` still has the estimates of the start.
        """
        network = copy.deepcopy(self.network)
        for module in network.modules():
            if parametrize.is_parametrized(module, "weight"):
                module.train()
                for _ in range(POWER_ITERATIONS):
                    _ = module.weight  # in training mode each access makes one power iteration
        return network.eval()
