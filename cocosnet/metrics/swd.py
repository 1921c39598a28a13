"""Sliced Wasserstein distance between two sets of pictures (Karras et al. 2018, Section 5).

The protocol is that of the progressive GAN code; we add seeds, other sizes than squares of a power of two, and
independence of the order of the pictures. Pictures and patches are float32; means over them are summed in float64.

Shapes: B pictures, N patches of a set, D = 3*7*7 numbers a patch, R directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.metrics.base import Metric
from cocosnet.metrics.spill import Spill

COARSEST = 16  # px, the pyramid is halved while its shorter side stays at least this
PATCH = 7  # px, side of a patch
PATCHES = 128  # patches a picture and level
REPEATS = 4  # draws of directions
DIRECTIONS = 128  # directions a draw
D = 3 * PATCH**2  # numbers of a patch
ROW = (3, PATCH, PATCH)
PROJECTED = 128 << 20  # bytes of projections that a set may take at once; directions are taken in turns beyond that
SCALE = 1000.0  # the unit in which the value is printed
SIDES = ("output", "target")


class SWD(Metric):
    """SWD x 1000 between the outputs and the targets as sets; 0 would be equal sets of patches.

    Patch positions are drawn apart for each side, as in the original, so that even a set against itself reads a small
    positive floor, which shrinks with the count (docs/metrics.md). A picture's positions depend on the seed, its side
    and its own pixels only, never on its place in the stream.

    Memory: at most about 0.4 GB. The patches, 75 kB a picture, side and level (0.75 MB a pair at 256x256), lie in
    temporary files where they are many.
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
        self._patches: dict[int, dict[str, Spill]] = {}  # by octave and side, N,3,7,7 float32 each

    def _add(self, *pictures: Tensor) -> None:
        for side, batch in zip(SIDES, pictures, strict=True):
            for picture in batch:
                self._add_picture(side, picture)

    def _add_picture(self, side: str, picture_3HW: Tensor) -> None:
        generator = torch.Generator().manual_seed(picture_seed(picture_3HW, side, self.seed))
        pyramid = laplacian_pyramid(picture_3HW[None].float())
        for depth, level in enumerate(pyramid):
            patches = sample_patches(level[0], generator).cpu().numpy()
            self._spill(len(pyramid) - 1 - depth, side).add(patches)

    def _spill(self, octave: int, side: str) -> Spill:
        return self._patches.setdefault(octave, {side: Spill("float32") for side in SIDES})[side]

    def states(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """The patches so far, by octave and side, some at a time."""
        for octave, sides in self._patches.items():
            for side, spill in sides.items():
                for patches in spill.chunks(ROW):
                    yield octave, side, patches

    def absorb(self, state: tuple[int, str, np.ndarray]) -> None:
        """Add some of another process's patches."""
        octave, side, patches = state
        self._spill(octave, side).add(patches)

    def _result(self) -> dict[str, Any]:
        levels = {str(COARSEST << octave): self._level(octave) for octave in sorted(self._patches, reverse=True)}
        result = {"value": sum(levels.values()) / len(levels), "levels": levels, "seed": self.seed}
        counts = {len(sides[SIDES[0]]) for sides in self._patches.values()}
        return result if len(counts) == 1 else {**result, "note": "pictures of several sizes: finer levels hold fewer"}

    def _level(self, octave: int) -> float:
        outputs, targets = (Descriptors(self._patches[octave][side], self.device) for side in SIDES)
        generator = torch.Generator().manual_seed(self.seed)
        return SCALE * sliced_distance(outputs, targets, outputs.count, generator)


class Descriptors:
    """The patches of a set, normalised: zero mean and unit (population) standard deviation a channel over the set.

    Iterating gives n,D float32 for some patches after the others, `count` in all. A channel that is constant in the
    whole set becomes zeros.
    """

    def __init__(self, patches: Spill, device: torch.device) -> None:
        self._patches, self._device = patches, device
        self.count = len(patches) // D
        self._mean = self._average(lambda patches_n377: patches_n377)
        variance = self._average(lambda patches_n377: (patches_n377 - self._mean).square())
        self._deviation = variance.sqrt().clamp_min(1e-8)

    def __iter__(self) -> Iterator[Tensor]:
        for patches_n377 in self._chunks():
            yield ((patches_n377 - self._mean) / self._deviation).flatten(1)

    def _average(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean of the changed patches over patches and pixels, 1,3,1,1 float32; summed in float64."""
        total = torch.zeros(3, dtype=torch.float64, device=self._device)
        for patches in self._chunks():
            total += change(patches).sum(dim=(0, 2, 3), dtype=torch.float64)
        return (total / (self.count * PATCH**2)).float().view(1, 3, 1, 1)

    def _chunks(self) -> Iterator[Tensor]:
        return (torch.from_numpy(patches).to(self._device) for patches in self._patches.chunks(ROW))


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


def sliced_distance(first: Iterable[Tensor], second: Iterable[Tensor], count: int, generator: torch.Generator) -> float:
    """Mean over 4 x 128 random directions of the 1-D Wasserstein-1 distance of two sets' projections.

    Args:
        first, second: `count` vectors each as tensors of some of them, n,D float32; gone through repeatedly.
        generator: draws the directions.
    """
    step = max(1, PROJECTED // (4 * count))
    repeats = []
    for _ in range(REPEATS):
        directions = torch.randn(D, DIRECTIONS, generator=generator, dtype=torch.float64)
        directions = (directions / directions.norm(dim=0, keepdim=True)).float()
        sums = [_gaps(first, second, count, some).sum() for some in directions.split(step, dim=1)]
        repeats.append(sum(sums).item() / DIRECTIONS)
    return sum(repeats) / REPEATS


def _gaps(first: Iterable[Tensor], second: Iterable[Tensor], count: int, directions_DR: Tensor) -> Tensor:
    """The 1-D distance for each direction, R float64."""
    gap, other = (_sorted_projections(vectors, count, directions_DR) for vectors in (first, second))
    means = gap.new_empty(len(gap), dtype=torch.float64)
    for mean, row in zip(means, gap.sub_(other).abs_()):  # all at once would be copied as float64
        torch.mean(row, dim=0, dtype=torch.float64, out=mean)
    return means


def _sorted_projections(vectors: Iterable[Tensor], count: int, directions_DR: Tensor) -> Tensor:
    """R,N float32, each row in ascending order; on the CPU by numpy, which takes a third of the time of PyTorch."""
    projections_RN, filled = None, 0
    for some_nD in vectors:
        if projections_RN is None:
            projections_RN = some_nD.new_empty(directions_DR.shape[1], count)
        upto = filled + len(some_nD)
        torch.mm(directions_DR.T.to(some_nD), some_nD.T, out=projections_RN[:, filled:upto])
        filled = upto
    if projections_RN.device.type == "cpu":
        projections_RN.numpy().sort(axis=1)
        return projections_RN
    return projections_RN.sort(dim=1).values
