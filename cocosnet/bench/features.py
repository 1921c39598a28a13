"""Features to match by that no training of ours has touched, and those of a trained model.

Fixed features are reduced to C unit vectors by a principal component analysis, so that every engine compares the same
C numbers as in the model.

- `colour`: the 5x5 patch around a pixel of the level's own picture;
- `vgg16`: the Caffe VGG-16's last rectifier at the level's scale (relu1_2 at full size, relu2_2, relu3_3, ...), with
  the next coarser one beside it, so that a pixel also knows its surroundings, as it does in the model's U-Net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.errors import ConfigError
from cocosnet.losses.perceptual import load_perceptual
from cocosnet.model.warp import downsample

Pyramid = list[Tensor]  # one map a level, coarse to fine
VGG_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")  # at 1, 1/2, 1/4, 1/8 and 1/16 of the size
PATCH = 5  # px, side of a colour patch
SAMPLES = 2**16  # pixels from which principal components are found
FIXED = ("colour", "vgg16")


def fixed_features(kind: str, levels: int, device: torch.device | str = "cpu") -> Callable[[Tensor], Pyramid]:
    """The function from pictures B,3,H,W in [-1, 1] to `levels` raw maps, coarse to fine, B,C_l,H/2^i,W/2^i.

    Raises:
        ConfigError: no features are called `kind`, or vgg16 has fewer scales than `levels`.
        MissingWeights: vgg16 is asked for and its file is not here.
    """
    if kind not in FIXED:
        raise ConfigError(f"no fixed features are called {kind!r}; they are {', '.join(FIXED)}")
    if kind == "colour":
        return lambda image: [_patches(downsample(image, 2**i)) for i in reversed(range(levels))]
    if levels > len(VGG_LAYERS):
        raise ConfigError(f"vgg16 has {len(VGG_LAYERS)} scales, {levels} were asked for; start at a finer level")
    network = load_perceptual("vgg16-caffe", device)
    layers = VGG_LAYERS[: min(levels + 1, len(VGG_LAYERS))]

    def pyramid(image: Tensor) -> Pyramid:
        found = network(image, layers)
        maps = [F.normalize(found[layer], dim=1) for layer in layers]
        return [_with_coarser(maps, i) for i in reversed(range(levels))]

    return pyramid


@dataclass(frozen=True)
class Reduction:
    """A level's features to unit vectors: the mean off, then the first principal components. mean N; axes N,C."""

    mean: Tensor
    axes: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """B,N,h,w -> B,C,h,w float32 of unit length."""
        reduced = torch.einsum("bnhw,nc->bchw", features - self.mean.view(1, -1, 1, 1), self.axes)
        return F.normalize(reduced, dim=1)


def fit_reduction(maps: Sequence[Tensor], channels: int) -> Reduction:
    """The reduction to `channels` numbers that keeps most of the variance of some maps, each B,N,h,w.

    Where N < channels the rest is zeros, which change no cosine.
    """
    rows = torch.cat([features.permute(0, 2, 3, 1).flatten(0, 2) for features in maps])
    rows = rows[:: max(1, len(rows) // SAMPLES)].double()
    mean = rows.mean(0)
    axes = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors.flip(1)[:, :channels]
    return Reduction(mean.float(), F.pad(axes, (0, channels - axes.shape[1])).float())


def reduced_pair(raw: Callable[[Tensor], Pyramid], query: Tensor, exemplar: Tensor, channels: int) -> list[Pyramid]:
    """Unit vectors of both pictures, two pyramids of B,channels,h,w, in the exemplar's principal components."""
    of_query, of_exemplar = raw(query), raw(exemplar)
    reductions = [fit_reduction([features], channels) for features in of_exemplar]
    return [[reduce(f) for reduce, f in zip(reductions, maps)] for maps in (of_query, of_exemplar)]


def _patches(image: Tensor) -> Tensor:
    """The PATCH x PATCH colours around each pixel: B,3 PATCH^2,h,w, the border repeated."""
    padded = F.pad(image, (PATCH // 2,) * 4, mode="replicate")
    return F.unfold(padded, PATCH).unflatten(2, image.shape[-2:])


def _with_coarser(maps: Pyramid, index: int) -> Tensor:
    """A map and the next coarser one, enlarged, side by side; maps run fine to coarse here."""
    if index + 1 >= len(maps):
        return maps[index]
    coarser = F.interpolate(maps[index + 1], size=maps[index].shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([maps[index], coarser], dim=1)
