"""Sliced Wasserstein distance between two sets of pictures (Karras et al. 2018, Section 5).

The protocol is that of the progressive GAN code; we add seeds, other sizes than squares of a power of two, and
independence of the order of the pictures. Pictures and patches are float32; means over them are summed in float64.

Shapes: B pictures, N patches of a set, D = 3*7*7 numbers a patch, R directions.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.metrics.base import Metric

COARSEST = 16  # px, the pyramid is halved while its shorter side stays at least this
PATCH = 7  # px, side of a patch
PATCHES = 128  # patches a picture and level
REPEATS = 4  # draws of directions
DIRECTIONS = 128  # directions a draw
SCALE = 1000.0  # the unit in which the value is printed
SIDES = ("output", "target")


class SWD(Metric):
    """SWD x 1000 between the outputs and the targets as sets; 0 would be equal sets of patches.

    Patch positions are drawn apart for each side, as in the original, so that even a set against itself reads a small
    positive floor, which shrinks with the count (docs/metrics.md). A picture's positions depend on the seed, its side
    and its own pixels only, never on its place in the stream.

    Memory: about 75 kB a picture, side and level (0.75 MB a pair at 256x256).
    """

    name = "swd"
    protocol = (
        "swd: Laplacian pyramid (5x5 binomial, mirrored borders) halved while the shorter side is at least "
        "16 px; 128 random 7x7x3 patches a picture and level; per set, level and channel minus mean, over "
        "standard deviation; 4 x 128 random directions; mean |sorted difference| x 1000; mean of the levels"
    )
    smallest = COARSEST

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self._patches: dict[int, dict[str, list[Tensor]]] = {}

    def _add(self, *pictures: Tensor) -> None:
        for side, batch in zip(SIDES, pictures, strict=True):
            for picture in batch:
                self._add_picture(side, picture)

    def _add_picture(self, side: str, picture_3HW: Tensor) -> None:
        generator = torch.Generator().manual_seed(picture_seed(picture_3HW, side, self.seed))
        pyramid = laplacian_pyramid(picture_3HW[None].float())
        for depth, level in enumerate(pyramid):
            patches = sample_patches(level[0], generator).cpu()
            sides = self._patches.setdefault(len(pyramid) - 1 - depth, {side: [] for side in SIDES})
            sides[side].append(patches)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """The patches so far, by octave and side."""
        return {
            octave: {side: torch.cat(patches) for side, patches in sides.items()}
            for octave, sides in self._patches.items()
        }

    def absorb(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Add another process's patches."""
        for octave, found in state.items():
            sides = self._patches.setdefault(octave, {side: [] for side in SIDES})
            for side, patches in found.items():
                sides[side].extend(patches.split(PATCHES))

    def _result(self) -> dict[str, Any]:
        levels = {str(COARSEST << octave): self._level(octave) for octave in sorted(self._patches, reverse=True)}
        result = {"value": sum(levels.values()) / len(levels), "levels": levels, "seed": self.seed}
        counts = {len(sides[SIDES[0]]) for sides in self._patches.values()}
        return result if len(counts) == 1 else {**result, "note": "pictures of several sizes: finer levels hold fewer"}

    def _level(self, octave: int) -> float:
        outputs, targets = (normalise(torch.cat(self._patches[octave][side]).to(self.device)) for side in SIDES)
        generator = torch.Generator().manual_seed(self.seed)
        return SCALE * sliced_distance(outputs, targets, generator)


def picture_seed(picture_3HW: Tensor, side: str, seed: int) -> int:
    """A 63-bit seed made of the pixels (uint8), the side ("output" or "target") and the metric's seed."""
    digest = hashlib.blake2b(f"{seed} {side} {tuple(picture_3HW.shape)} ".encode(), digest_size=8)
    digest.update(picture_3HW.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def laplacian_pyramid(image_BCHW: Tensor) -> list[Tensor]:
    """Band-pass levels, fine to coarse, the last one the low-pass rest; B,C,ceil(H/2^i),ceil(W/2^i) float32."""
    pyramid = [image_BCHW]
    while min(pyramid[-1].shape[-2:]) // 2 >= COARSEST:
        coarser = _blur(pyramid[-1])[..., ::2, ::2]
        spread = torch.zeros_like(pyramid[-1])
        spread[..., ::2, ::2] = coarser
        pyramid[-1] = pyramid[-1] - 4 * _blur(spread)
        pyramid.append(coarser)
    return pyramid


def _blur(image_BCHW: Tensor) -> Tensor:
    """Convolve with the 5x5 binomial kernel of sum 1; borders are mirrored without repeating the edge pixel."""
    weights = image_BCHW.new_tensor([1, 4, 6, 4, 1]) / 16
    padded = F.pad(image_BCHW, (2, 2, 2, 2), mode="reflect").flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 5, 1)), weights.view(1, 1, 1, 5)).view_as(image_BCHW)


def sample_patches(level_3HW: Tensor, generator: torch.Generator) -> Tensor:
    """128 patches of 7x7 at random places inside one level: 128,3,7,7. Rows are drawn first, then columns."""
    height, width = level_3HW.shape[-2:]
    top = torch.randint(height - PATCH + 1, (PATCHES, 1, 1), generator=generator)
    left = torch.randint(width - PATCH + 1, (PATCHES, 1, 1), generator=generator)
    span = torch.arange(PATCH)
    rows, columns = top + span.view(1, -1, 1), left + span.view(1, 1, -1)
    return level_3HW[:, rows.to(level_3HW.device), columns.to(level_3HW.device)].transpose(0, 1)


def normalise(patches_N377: Tensor) -> Tensor:
    """Zero mean and unit (population) standard deviation a channel over the whole set; N,D float32.

    A channel that is constant in the whole set becomes zeros.
    """
    centred = patches_N377 - patches_N377.mean(dim=(0, 2, 3), keepdim=True, dtype=torch.float64).float()
    deviation = centred.square().mean(dim=(0, 2, 3), keepdim=True, dtype=torch.float64).sqrt()
    return (centred / deviation.clamp_min(1e-8).float()).flatten(1)


def sliced_distance(first_ND: Tensor, second_ND: Tensor, generator: torch.Generator) -> float:
    """Mean over 4 x 128 random directions of the 1-D Wasserstein-1 distance of the projections (equal N)."""
    repeats = []
    for _ in range(REPEATS):
        directions = torch.randn(first_ND.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
        directions = (directions / directions.norm(dim=0, keepdim=True)).to(first_ND)
        first, second = (_sorted(directions.T @ patches.T) for patches in (first_ND, second_ND))
        repeats.append((first - second).abs().mean(dtype=torch.float64).item())
    return sum(repeats) / REPEATS


def _sorted(projections_RN: Tensor) -> Tensor:
    """Each row in ascending order; on the CPU numpy's sort, which takes a third of the time of PyTorch's."""
    if projections_RN.device.type == "cpu":
        return torch.from_numpy(np.sort(projections_RN.numpy(), axis=1))
    return projections_RN.sort(dim=1).values
