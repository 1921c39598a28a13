"""Metrics of one picture against its own ground truth: L1, PSNR and SSIM, each a mean over pairs.

All are computed in float64 on uint8 RGB, as scikit-image does, and equal its values.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.metrics.base import Metric

SSIM_SIGMA = 1.5  # px, standard deviation of the window (Wang et al. 2004)
SSIM_RADIUS = 5  # px, the window is cut at 3.5 sigma: 11x11
SSIM_C1 = (0.01 * 255) ** 2  # constants of Wang et al. 2004 for a data range of 255
SSIM_C2 = (0.03 * 255) ** 2


class PairMean(Metric):
    """A metric whose value is the mean of one number a pair."""

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self._values: list[float] = []

    @torch.inference_mode()
    def _add(self, *pictures: Tensor) -> list[float | None]:
        values = self._per_pair(*(picture.double() for picture in pictures)).tolist()
        self._values.extend(values)
        return values

    def state(self) -> list[float]:
        """The numbers so far."""
        return self._values

    def absorb(self, state: list[float]) -> None:
        """Add another process's numbers."""
        self._values.extend(state)

    @abstractmethod
    def _per_pair(self, output_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """One number a pair, B, of float64 pictures in 0..255."""

    def _result(self) -> dict[str, Any]:
        return {"value": mean(self._values)}


class L1(PairMean):
    """Mean absolute difference in [0,1]: 0 identical, 1 black against white."""

    name = "l1"
    protocol = "l1: mean over pairs of the mean |output - target| over pixels and channels, uint8 RGB divided by 255"

    def _per_pair(self, output_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        return (output_B3HW - target_B3HW).abs().mean(dim=(1, 2, 3)) / 255


class PSNR(PairMean):
    """Peak signal-to-noise ratio in dB.

    It is infinite for identical pictures: such pairs are left out of the mean and counted as "identical"; the value is
    None where all are.
    """

    name = "psnr"
    protocol = (
        "psnr: mean over pairs, in dB, of 10 log10(255^2 / MSE), MSE over pixels and channels of uint8 RGB; "
        "identical pairs (infinite) are left out and counted"
    )

    def _per_pair(self, output_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        return 10 * torch.log10(255**2 / (output_B3HW - target_B3HW).square().mean(dim=(1, 2, 3)))

    def _result(self) -> dict[str, Any]:
        finite = [value for value in self._values if value != float("inf")]
        return {"value": mean(finite) if finite else None, "identical": len(self._values) - len(finite)}


class SSIM(PairMean):
    """Structural similarity (Wang et al. 2004) in [-1,1], 1 for identical pictures."""

    name = "ssim"
    protocol = (
        "ssim: mean over pairs, RGB channels and pixels whose whole window is inside; 11x11 Gaussian window, "
        "sigma 1.5, population covariance, data range 255, K1 0.01, K2 0.03, uint8 RGB "
        "(scikit-image with gaussian_weights)"
    )
    smallest = 2 * SSIM_RADIUS + 1

    def _per_pair(self, output_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        return ssim_map(output_B3HW, target_B3HW).mean(dim=(1, 2, 3))


class Warped:
    """The warp is compared at the target's size: a coarser one (Table 4's shorter pyramids) is enlarged to it first."""

    needs = ("warp", "target")
    same_size = False

    def check(self, warp: Tensor, target: Tensor) -> None:
        """As `Metric.check`, of the target; the warp will have its size."""
        super().check(target, target)

    def _add(self, warp: Tensor, target: Tensor) -> list[float | None]:
        if warp.shape != target.shape:
            enlarged = F.interpolate(warp.float(), size=target.shape[-2:], mode="bilinear", antialias=True)
            warp = enlarged.round().clamp(0, 255).byte()
        return super()._add(warp, target)


ENLARGED = "; a warp of another size is first brought to the target's (bilinear, antialiased, rounded)"


class WarpL1(Warped, L1):
    """L1 of the warped exemplar (the record's "warp") against the target, as in Tables 4 and 5 but in [0,1]."""

    name = "warp_l1"
    protocol = L1.protocol.replace("l1:", "warp_l1:").replace("output", "warp") + ENLARGED


class WarpPSNR(Warped, PSNR):
    """PSNR of the warped exemplar against the target, in dB (Tables 4 and 5)."""

    name = "warp_psnr"
    protocol = PSNR.protocol.replace("psnr:", "warp_psnr: warp against target,") + ENLARGED


class WarpSSIM(Warped, SSIM):
    """SSIM of the warped exemplar against the target (Tables 4 and 5)."""

    name = "warp_ssim"
    protocol = SSIM.protocol.replace("ssim:", "warp_ssim: warp against target,") + ENLARGED


def ssim_map(first_B3HW: Tensor, second_B3HW: Tensor) -> Tensor:
    """SSIM at every pixel whose window lies inside: B,3,H-10,W-10 of two B,3,H,W float64 tensors in 0..255."""
    mean_x, mean_y = _window_mean(first_B3HW), _window_mean(second_B3HW)
    variance_x = _window_mean(first_B3HW * first_B3HW) - mean_x**2
    variance_y = _window_mean(second_B3HW * second_B3HW) - mean_y**2
    covariance = _window_mean(first_B3HW * second_B3HW) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return luminance * (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)


def _window_mean(image_B3HW: Tensor) -> Tensor:
    """Gaussian mean over each window inside the picture, one axis after the other."""
    return _line_mean(_line_mean(image_B3HW, -1), -2)


def _line_mean(image_B3HW: Tensor, axis: int) -> Tensor:
    """Gaussian mean along one axis: shifted copies are added up, a sixth of the time of a float64 convolution."""
    weights = [math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(SSIM_RADIUS + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    inside = image_B3HW.shape[axis] - 2 * SSIM_RADIUS
    means = image_B3HW.narrow(axis, SSIM_RADIUS, inside) * (weights[0] / total)
    for offset in range(1, SSIM_RADIUS + 1):
        sides = (image_B3HW.narrow(axis, SSIM_RADIUS + shift, inside) for shift in (-offset, offset))
        means.add_(sum(sides), alpha=weights[offset] / total)
    return means


def mean(values: list[float]) -> float:
    """Mean that does not depend on the order of the values (they are summed smallest first)."""
    return sum(sorted(values)) / len(values)
