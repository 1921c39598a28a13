"""Frechet Inception distance (Heusel et al. 2017) with pytorch-fid's Inception network and weights.

The distance is our own, in float64, and needs no matrix square root: with covariances written as A^T A and B^T B, the
trace of (A^T A B^T B)^(1/2) is the sum of the singular values of A B^T. For fewer pictures than features, A is simply
the centred features themselves.

Shapes: N pictures, D features (2048).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet import weights
from cocosnet.errors import CheckpointError, MissingDependency
from cocosnet.metrics.base import Metric

FEATURES = 2048  # of the last average pooling
INPUT_SIZE = 299  # px, side of the network's input
BATCH = 16  # pictures a call of the network
WEIGHTS = "fid-inception"  # the entry of cocosnet.weights


class FID(Metric):
    """FID between the outputs and the targets as sets; at least 2 pictures, and read it with care below 2048.

    Both sets are taken as saved (8-bit), so that the file format counts: JPEG and PNG sets cannot be compared.
    """

    name = "fid"
    protocol = (
        "fid: outputs against targets as sets, uint8 RGB / 255 resized to 299x299 (bilinear, no antialias), "
        "pytorch-fid Inception pool3, 2048 features, sample covariances, Frechet distance in float64"
    )
    same_size = False

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self._network = load_inception(weights.find_weights(WEIGHTS)).to(self.device)
        self._sides = tuple(FeatureStream(self._features) for _ in self.needs)

    @torch.inference_mode()
    def _add(self, *pictures: Tensor) -> None:
        for side, batch in zip(self._sides, pictures, strict=True):
            side.add(resize_for_inception(batch))

    @torch.inference_mode()
    def _features(self, inputs_B3SS: Tensor) -> Tensor:
        return self._network(inputs_B3SS * 2 - 1)

    def _result(self) -> dict[str, Any]:
        if self.count < 2:
            return {"value": None, "note": "needs at least 2 pictures"}
        result = {"value": frechet_distance(*(side.statistics() for side in self._sides))}
        note = f"only {self.count} pictures: biased upwards below {FEATURES}, compare equal counts only"
        return result if self.count >= FEATURES else {**result, "note": note}


def resize_for_inception(images_B3HW: Tensor) -> Tensor:
    """uint8 pictures as B,3,299,299 float32 in [0,1], resized as pytorch-fid does."""
    size = (INPUT_SIZE, INPUT_SIZE)
    return F.interpolate(images_B3HW.float() / 255, size=size, mode="bilinear", align_corners=False)


def load_inception(path: Any) -> nn.Module:
    """The network of pytorch-fid with the weights of `path`, up to its features: B,3,299,299 in [-1,1] to B,2048.

    Raises:
        MissingDependency: pytorch-fid is not installed.
        CheckpointError: the file is damaged or of another network.
    """
    network = _build_inception()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file raises nearly anything, from KeyError to UnpicklingError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not pytorch-fid's Inception weights ({reason}); fetch it again") from error
    network.fc = nn.Identity()
    return network.eval().requires_grad_(False)


def _build_inception() -> nn.Module:
    """torchvision's Inception v3 with the blocks that pytorch-fid replaces; weights are left as they were allocated."""
    try:
        from pytorch_fid import inception as parts
        from torchvision.models import Inception3
    except ImportError as error:
        raise MissingDependency("fid needs the package pytorch-fid; run `pip install pytorch-fid`") from error
    network = Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    network.Mixed_5b = parts.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = parts.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = parts.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = parts.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = parts.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = parts.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = parts.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = parts.FIDInceptionE_1(1280)
    network.Mixed_7c = parts.FIDInceptionE_2(2048)
    return network


class FeatureStream:
    """Features of one set: gathers network inputs into full batches and keeps only what the distance needs."""

    def __init__(self, features: Any) -> None:
        """`features` maps B,... inputs to B,D features."""
        self._features = features
        self._waiting: list[Tensor] = []
        self._gathered = GaussianFit(FEATURES)

    def add(self, inputs: Tensor) -> None:
        """Take B inputs."""
        self._waiting.extend(inputs)
        while len(self._waiting) >= BATCH:
            self._flush()

    def statistics(self) -> GaussianFit:
        """The fit of all that was added."""
        while self._waiting:
            self._flush()
        return self._gathered

    def _flush(self) -> None:
        batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        self._gathered.add(self._features(torch.stack(batch)))


class GaussianFit:
    """Mean and covariance of a stream of feature vectors, in float64 on the CPU.

    Up to `dimension` rows are kept as they are; beyond that only their count, mean and scatter matrix (sum of outer
    products about the mean) are, merged batch by batch (Chan et al. 1979). Memory: at most 2 D^2 float64.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._rows: list[Tensor] = []
        self._kept = 0  # rows in `_rows`
        self._count = 0  # rows merged into `_mean` and `_scatter`
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter: Tensor | None = None

    @property
    def count(self) -> int:
        """Vectors added so far."""
        return self._count + self._kept

    def add(self, features_ND: Tensor) -> None:
        """Take N vectors of any float type."""
        self._rows.append(features_ND.detach().cpu().double())
        self._kept += features_ND.shape[0]
        if self._kept > self._dimension:
            self._merge()

    def _merge(self) -> None:
        """Fold the kept rows into mean and scatter."""
        rows = torch.cat(self._rows)
        mean, centred = rows.mean(dim=0), rows - rows.mean(dim=0)
        shift, total = mean - self._mean, self._count + self._kept
        scatter = centred.T @ centred
        if self._scatter is not None:
            scatter += self._scatter + torch.outer(shift, shift) * (self._count * self._kept / total)
        self._mean, self._scatter = self._mean + shift * (self._kept / total), scatter
        self._rows, self._kept, self._count = [], 0, total

    def mean(self) -> Tensor:
        """D float64."""
        kept = torch.cat(self._rows).sum(dim=0) if self._rows else 0
        return (self._mean * self._count + kept) / self.count

    def factor(self) -> Tensor:
        """A matrix A with A^T A equal to the sample covariance (divided by count - 1): N,D or D,D float64."""
        if self._scatter is None:
            rows = torch.cat(self._rows)
            return (rows - rows.mean(dim=0)) / (self.count - 1) ** 0.5
        if self._rows:
            self._merge()
        values, vectors = torch.linalg.eigh(self._scatter / (self._count - 1))
        return values.clamp_min(0).sqrt()[:, None] * vectors.T


def frechet_distance(first: GaussianFit, second: GaussianFit) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two fits of at least two vectors each, in float64."""
    first_factor, second_factor = first.factor(), second.factor()
    traces = first_factor.square().sum() + second_factor.square().sum()
    overlap = torch.linalg.svdvals(first_factor @ second_factor.T).sum()
    distance = (first.mean() - second.mean()).square().sum() + traces - 2 * overlap
    return max(distance.item(), 0.0)  # rounding can leave a tiny negative number for equal sets
