"""How good matches are where the truth is known."""

from __future__ import annotations

import torch
from torch import Tensor

from cocosnet.metrics.pixels import SSIM_RADIUS, ssim_map


def endpoint_error(found: Tensor, truth: Tensor) -> Tensor:
    """Distance between found and true positions, B,2,h,w each, in their px. Returns B,h,w."""
    return (found - truth).square().sum(1).sqrt()


def error_summary(errors: Tensor) -> dict[str, float]:
    """Mean and median end-point error, and the shares within 1 and 3 px (of 1), over errors N."""
    return {
        "epe": errors.mean().item(),
        "epe_median": errors.median().item(),
        "within_1px": (errors <= 1).float().mean().item(),
        "within_3px": (errors <= 3).float().mean().item(),
    }


def warp_quality(warp: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    """L1 (of 0..255), PSNR (dB) and SSIM of a warp against its target, both B,3,h,w in [-1, 1], where `valid` B,h,w.

    SSIM's window must lie inside the picture: its border of 5 px does not count (nan in a picture that has no inside).
    """
    first, second = ((picture.double().clamp(-1, 1) + 1) * 127.5 for picture in (warp, target))
    inside = valid.unsqueeze(1).expand_as(first)
    difference = (first - second)[inside]
    return {
        "l1": difference.abs().mean().item(),
        "psnr": (10 * torch.log10(255**2 / difference.square().mean())).item(),
        "ssim": _masked_ssim(first, second, inside),
    }


def _masked_ssim(first: Tensor, second: Tensor, inside: Tensor) -> float:
    if min(first.shape[-2:]) <= 2 * SSIM_RADIUS:
        return float("nan")
    border = slice(SSIM_RADIUS, -SSIM_RADIUS)
    return ssim_map(first, second)[inside[..., border, border]].mean().item()
