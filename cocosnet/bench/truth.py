"""Pairs of pictures whose true matches are known: a photograph and a smooth warp of it.

The query shows the photograph, which is its exemplar, at `field`: query(p) = exemplar(field(p)). So the truth is exact
by construction, and nothing has to be inverted; that the photograph is a smooth warp of the query says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageOps
from torch import Tensor

from cocosnet.config import DistortionConfig
from cocosnet.data.distortion import apply_grid, random_grid
from cocosnet.data.images import load_rgb, to_tensor
from cocosnet.errors import ConfigError
from cocosnet.model.warp import downsample, downsample_field


@dataclass
class Pair:
    """query and exemplar B,3,H,W in [-1, 1]; field B,2,H,W: the true position (y, x), in px of the exemplar."""

    query: Tensor
    exemplar: Tensor
    field: Tensor

    def truth(self, factor: int) -> tuple[Tensor, Tensor]:
        """At a `factor` times smaller level: positions B,2,h,w in its px, and B,h,w bool, true inside the exemplar.

        A pixel of the level stands for factor x factor pixels; its truth is the mean of theirs.
        """
        field = downsample_field(self.field, factor)
        height, width = field.shape[-2:]
        limit = field.new_tensor([height - 1, width - 1]).view(1, 2, 1, 1)
        return field, ((field >= 0) & (field <= limit)).all(1)

    def shrunk(self, factor: int) -> Pair:
        """The same pair at a `factor` times smaller size."""
        return Pair(downsample(self.query, factor), downsample(self.exemplar, factor), self.truth(factor)[0])


def levels_between(coarse: int, size: int) -> int:
    """How many levels lie between a coarse side and a fine one (px), both counted.

    Raises:
        ConfigError: `size` is not a power of two times `coarse`.
    """
    ratio, rest = divmod(size, coarse)
    if rest or ratio < 1 or ratio & (ratio - 1):
        raise ConfigError(f"size {size} is not {coarse} (coarse) times a power of two")
    return ratio.bit_length()


def make_pair(pictures: Tensor, config: DistortionConfig, generator: torch.Generator) -> Pair:
    """Warp pictures B,3,H,W in [-1, 1] at random, each in its own way; `generator` is the only source of randomness."""
    field = random_grid(*pictures.shape[:1], *pictures.shape[-2:], config, generator)
    return Pair(apply_grid(pictures, field.to(pictures.device)), pictures, field.to(pictures.device))


def read_square(path: Path, size: int) -> Tensor:
    """The middle square of a picture file, resized: 1,3,size,size in [-1, 1]. Raises DataError as `load_rgb`."""
    return to_tensor(ImageOps.fit(load_rgb(path, size), (size, size))).unsqueeze(0)
