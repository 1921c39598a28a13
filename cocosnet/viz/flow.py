"""Offsets and scores as colours.

Hue is the direction of an offset, after Baker et al. (A Database and Evaluation Methodology for Optical Flow, 2011):
right red, down yellow, left cyan to blue, up violet. White is no offset; full colour is `maximum` px or more.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

# Anchors of the viridis colour map (Smith and van der Walt, CC0) at equal steps from 0 to 1.
VIRIDIS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (110, 206, 88),
    (181, 222, 43),
    (253, 231, 37),
)
# The wheel's arcs: how many steps lead from each corner colour to the next (red, yellow, green, cyan, blue, magenta).
ARCS = (
    (15, (255, 0, 0)),
    (6, (255, 255, 0)),
    (4, (0, 255, 0)),
    (11, (0, 255, 255)),
    (13, (0, 0, 255)),
    (6, (255, 0, 255)),
)


@functools.cache
def color_wheel() -> Tensor:
    """The 55 hues of Baker et al., starting at red (right) and turning over yellow (down): 55,3 float32 in 0..255."""
    colours = []
    for index, (steps, start) in enumerate(ARCS):
        end = ARCS[(index + 1) % len(ARCS)][1]
        for step in range(steps):
            share = math.floor(255 * step / steps)
            colours.append([a + (share if b > a else -share if b < a else 0) for a, b in zip(start, end, strict=True)])
    return torch.tensor(colours, dtype=torch.float32)


def flow_colors(offset_B2hw: Tensor, maximum: float | None = None) -> Tensor:
    """Colours of offsets.

    Args:
        offset_B2hw: (dy, dx), rows first, in px, any float type; not-a-number shows as no offset.
        maximum: length in px that gets full colour, longer ones look the same; None: the longest of each picture.

    Returns:
        B,3,h,w uint8 RGB.
    """
    offset = torch.nan_to_num(offset_B2hw.detach().float().cpu())
    length = offset.square().sum(dim=1).sqrt()
    full = length.amax(dim=(1, 2), keepdim=True) if maximum is None else torch.tensor(float(maximum))
    strength = (length / full.clamp_min(1e-9)).clamp(max=1)[..., None]
    wheel = color_wheel()
    turn = (torch.atan2(-offset[:, 0], -offset[:, 1]) / math.pi + 1) / 2 * (len(wheel) - 1)
    lower = turn.floor().long().clamp(max=len(wheel) - 1)
    share = (turn - lower)[..., None]
    hue = (wheel[lower] * (1 - share) + wheel[(lower + 1) % len(wheel)] * share) / 255
    return ((1 - strength * (1 - hue)) * 255).floor().byte().permute(0, 3, 1, 2)


def typical_maximum(offset_2hw: Tensor) -> float:
    """The length in px that 99 of 100 offsets stay below; a scale that single wild matches cannot spoil."""
    lengths = torch.nan_to_num(offset_2hw.detach().float().cpu()).square().sum(dim=0).sqrt()
    return float(np.percentile(lengths.numpy(), 99))


def score_colors(score_hw: Tensor, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Viridis (violet at `low`, over green, to yellow at `high`; values outside are clamped): h,w,3 uint8.

    A score of -inf or not-a-number, which marks an empty slot, is grey.
    """
    score = score_hw.detach().float().cpu().numpy()
    empty = ~np.isfinite(score)
    place = np.clip((np.where(empty, low, score) - low) / (high - low), 0, 1)
    anchors = np.linspace(0, 1, len(VIRIDIS))
    colours = np.stack([np.interp(place, anchors, channel) for channel in np.array(VIRIDIS, dtype=float).T], axis=-1)
    return np.where(empty[..., None], 128, colours.round()).astype(np.uint8)
