"""Frechet distance (FID, Heusel et al. 2017) and kernel distance (KID, Binkowski et al. 2018) of two sets' features.

FID and KID look through pytorch-fid's Inception network with its weights; `fd_vgg16` is the same Frechet distance
through Caffe's VGG-16, for where those weights are not, and is never called FID.

The distance is our own, in float64, and needs no matrix square root: with covariances written as A^T A and B^T B, the
trace of (A^T A B^T B)^(1/2) is the sum of the singular values of A B^T. For fewer pictures than features, A is simply
the centred features themselves.

Shapes: N pictures, D features (2048; 512 for VGG-16).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet import weights
from cocosnet.data.images import shown
from cocosnet.doors import import_package
from cocosnet.errors import CheckpointError, DataError
from cocosnet.files import atomic_path
from cocosnet.metrics.base import Metric
from cocosnet.metrics.features import Remembering, vgg_features

FEATURES = 2048  # of the last average pooling
INPUT_SIZE = 299  # px, side of the network's input
WEIGHTS = "fid-inception"  # the entry of cocosnet.weights
VGG_LAYER, VGG_FEATURES = "relu5_3", 512
KID_SUBSETS, KID_SIZE = 100, 1000  # as in torch-fidelity and the authors' code
SIDES = ("output", "target")


class Frechet(Metric):
    """Frechet distance between the outputs and the targets as sets; at least 2 pictures a side.

    A side can also be a file of statistics (`use_statistics`); its pictures are then not needed.
    """

    same_size = False
    paired = False
    from_statistics = True
    dimension: int

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self.sides = {side: GaussianFit(self.dimension) for side in SIDES}
        self.absent: str | None = None  # a side that stays empty

    def use_statistics(self, side: str, path: str | Path | None) -> None:
        """Take a side ("output" or "target") from a file; None: it stays empty. Raises as `load_statistics`."""
        if path is None:
            self.absent = side
        else:
            self.sides[side] = load_statistics(path, self.dimension)
        self.needs = tuple(role for role in self.needs if role != side)

    @torch.inference_mode()
    def _add(self, *pictures: Tensor) -> None:
        for side, batch in zip(self.needs, pictures, strict=True):
            self.sides[side].add(self._features(batch))

    @abstractmethod
    def _features(self, batch_B3HW: Tensor) -> Tensor:
        """uint8 pictures to B,D."""

    def state(self) -> dict[str, GaussianFit]:
        """The fits of the sides that are made of pictures."""
        return {side: self.sides[side] for side in self.needs}

    def absorb(self, state: dict[str, GaussianFit]) -> None:
        """Add another process's fits."""
        for side, fit in state.items():
            self.sides[side].merge(fit)

    def _result(self) -> dict[str, Any]:
        if self.absent:
            return {"value": None, "note": f"there are no {self.absent}s to measure against"}
        counts = [fit.count for fit in self.sides.values() if fit.count is not None]
        if min(counts, default=2) < 2:
            return {"value": None, "note": "needs at least 2 pictures"}
        result = {"value": frechet_distance(*self.sides.values())}
        if min(counts, default=self.dimension) >= self.dimension:
            return result
        note = f"only {min(counts)} pictures: biased upwards below {self.dimension}, compare equal counts only"
        return {**result, "note": note}

    def compute(self) -> dict[str, Any]:
        """As `Metric.compute`; two files of statistics have a value without any picture."""
        if self.needs:
            return super().compute()
        return {**self._result(), "protocol": self.protocol, "count": 0}


class FID(Frechet):
    """FID between the outputs and the targets as sets; at least 2 pictures, and read it with care below 2048.

    Both sets are taken as saved (8-bit), so that the file format counts: JPEG and PNG sets cannot be compared.
    """

    name = "fid"
    protocol = (
        "fid: outputs against targets as sets, uint8 RGB / 255 resized to 299x299 (bilinear, no antialias), "
        "pytorch-fid Inception pool3, 2048 features, sample covariances, Frechet distance in float64"
    )
    dimension = FEATURES
    side = INPUT_SIZE
    weights = (WEIGHTS,)

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self._inception = inception_features(self.device)

    def _features(self, batch_B3HW: Tensor) -> Tensor:
        return self._inception(batch_B3HW)


class FDVgg16(Frechet):
    """The Frechet distance of FID on VGG-16 features, a number of its own scale."""

    name = "fd_vgg16"
    protocol = (
        "fd_vgg16: outputs against targets as sets, at their own size, Caffe VGG-16 relu5_3 (divided by its mean "
        "activation 1.1) averaged over positions, 512 features, sample covariances, Frechet distance in float64"
    )
    dimension = VGG_FEATURES
    smallest = 16  # px, where relu5_3 still has a pixel
    weights = ("vgg16-caffe",)

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self._vgg = vgg_features("vgg16-caffe", self.device, [VGG_LAYER])

    def _features(self, batch_B3HW: Tensor) -> Tensor:
        return self._vgg(batch_B3HW)[VGG_LAYER].mean(dim=(2, 3))


class KID(Metric):
    """Kernel Inception distance between the outputs and the targets as sets: unbiased, so made for small sets."""

    name = "kid"
    protocol = (
        "kid: outputs against targets as sets, features as in fid, unbiased squared MMD with the kernel "
        "(x.y / 2048 + 1)^3, all pictures up to 1000 a side, beyond that mean of 100 random subsets of 1000"
    )
    same_size = False
    paired = False
    side = INPUT_SIZE
    weights = (WEIGHTS,)

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        super().__init__(device, seed)
        self._inception = inception_features(self.device)
        self._rows: dict[str, list[Tensor]] = {side: [] for side in SIDES}

    @torch.inference_mode()
    def _add(self, *pictures: Tensor) -> None:
        for side, batch in zip(SIDES, pictures, strict=True):
            self._rows[side].append(self._inception(batch).cpu())

    def state(self) -> dict[str, Tensor]:
        """The features so far."""
        return {side: torch.cat(rows) if rows else torch.empty(0, FEATURES) for side, rows in self._rows.items()}

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add another process's features."""
        for side, rows in state.items():
            self._rows[side].append(rows)

    def _result(self) -> dict[str, Any]:
        if self.count < 2:
            return {"value": None, "note": "needs at least 2 pictures"}
        first, second = (_in_order(torch.cat(self._rows[side])) for side in SIDES)
        if self.count <= KID_SIZE:
            return {"value": squared_mmd(first.double(), second.double())}
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.tensor([_subset_mmd(first, second, generator) for _ in range(KID_SUBSETS)], dtype=torch.float64)
        return {"value": values.mean().item(), "std": values.std(correction=0).item(), "seed": self.seed}


def squared_mmd(first_ND: Tensor, second_ND: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3, of two sets of equally many features."""
    count, dimension = first_ND.shape
    within = 0.0
    for rows in (first_ND, second_ND):
        kernel = (rows @ rows.T / dimension + 1) ** 3
        within += (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
    between = ((first_ND @ second_ND.T / dimension + 1) ** 3).mean()
    return float(within - 2 * between)


def _subset_mmd(first_ND: Tensor, second_ND: Tensor, generator: torch.Generator) -> float:
    picks = [torch.randperm(len(rows), generator=generator)[:KID_SIZE] for rows in (first_ND, second_ND)]
    return squared_mmd(first_ND[picks[0]].double(), second_ND[picks[1]].double())


def _in_order(rows_ND: Tensor) -> Tensor:
    """Rows sorted by their sum, so that random subsets do not depend on the order of the pictures."""
    return rows_ND[rows_ND.sum(dim=1, dtype=torch.float64).argsort(stable=True)]


def inception_features(device: torch.device) -> Remembering:
    """uint8 pictures B,3,H,W to B,2048 float32 on `device`; shared by all that ask while the weight file is the same.

    Raises:
        MissingWeights, MissingDependency, CheckpointError: as `load_inception`.
    """
    return _shared_inception(device, weights.fingerprint(WEIGHTS)["sha256"])


@functools.lru_cache(maxsize=1)
def _shared_inception(device: torch.device, sha256: str) -> Remembering:
    network = load_inception(weights.find_weights(WEIGHTS)).to(device)

    @torch.inference_mode()
    def features(batch_B3HW: Tensor) -> Tensor:
        return network(resize_for_inception(batch_B3HW) * 2 - 1)

    return Remembering(features)


def resize_for_inception(images_B3HW: Tensor) -> Tensor:
    """uint8 pictures as B,3,299,299 float32 in [0,1], resized as pytorch-fid does."""
    size = (INPUT_SIZE, INPUT_SIZE)
    return F.interpolate(images_B3HW.float() / 255, size=size, mode="bilinear", align_corners=False)


def load_inception(path: Any) -> nn.Module:
    """The network of pytorch-fid with the weights of `path`, up to its features: B,3,299,299 in [-1,1] to B,2048.

    Raises:
        MissingDependency: pytorch-fid or torchvision does not load.
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
    parts = import_package("pytorch_fid.inception", "fid", "pytorch-fid")
    network = import_package("torchvision.models", "fid", "torchvision").Inception3(
        num_classes=1008, aux_logits=False, transform_input=False, init_weights=False
    )
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
        self._known: tuple[Tensor, Tensor] | None = None  # mean and covariance, where nothing else is known

    @classmethod
    def of_statistics(cls, mean: Tensor, covariance: Tensor) -> GaussianFit:
        """A fit that is known by mean (D) and covariance (D,D), of an unknown number of vectors."""
        fit = cls(len(mean))
        fit._known = (mean.double(), covariance.double())
        return fit

    @property
    def count(self) -> int | None:
        """Vectors added so far; None where only the statistics are known."""
        return None if self._known else self._count + self._kept

    def merge(self, other: GaussianFit) -> None:
        """Add what another fit (of vectors, not of statistics) has gathered."""
        if other._scatter is not None:
            self._merge_scatter(other._mean, other._scatter, other._count)
        for rows in other._rows:
            self.add(rows)

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
        self._rows, self._kept = [], 0
        self._merge_scatter(mean, centred.T @ centred, len(rows))

    def _merge_scatter(self, mean: Tensor, scatter: Tensor, count: int) -> None:
        """Add `count` vectors that are known by their mean and scatter matrix."""
        shift, total = mean - self._mean, self._count + count
        if self._scatter is not None:
            scatter = scatter + self._scatter + torch.outer(shift, shift) * (self._count * count / total)
        self._mean, self._scatter, self._count = self._mean + shift * (count / total), scatter, total

    def mean(self) -> Tensor:
        """D float64."""
        if self._known:
            return self._known[0]
        kept = torch.cat(self._rows).sum(dim=0) if self._rows else 0
        return (self._mean * self._count + kept) / self.count

    def factor(self) -> Tensor:
        """A matrix A with A^T A equal to the sample covariance (divided by count - 1): N,D or D,D float64."""
        if self._known:
            return _root(self._known[1])
        if self._scatter is None:
            rows = torch.cat(self._rows)
            return (rows - rows.mean(dim=0)) / (self.count - 1) ** 0.5
        return _root(self.covariance())

    def covariance(self) -> Tensor:
        """The sample covariance (divided by count - 1), D,D float64."""
        if self._known:
            return self._known[1]
        if self._scatter is None:
            factor = self.factor()
            return factor.T @ factor
        if self._rows:
            self._merge()
        return self._scatter / (self._count - 1)


def _root(covariance_DD: Tensor) -> Tensor:
    """A with A^T A = covariance. Eigenvalues at the level of rounding count as 0: their roots would add up."""
    values, vectors = torch.linalg.eigh(covariance_DD)
    negligible = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > negligible, values, 0).sqrt()[:, None] * vectors.T


def save_statistics(path: str | Path, fit: GaussianFit) -> None:
    """Write mean and covariance as pytorch-fid does: an .npz with mu (D) and sigma (D,D), float64. Atomic.

    Raises:
        DataError: fewer than 2 vectors, or the file cannot be written.
    """
    if fit.count is not None and fit.count < 2:
        raise DataError(f"{shown(path)}: statistics need at least 2 pictures")
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, mu=fit.mean().numpy(), sigma=fit.covariance().numpy())


def load_statistics(path: str | Path, dimension: int) -> GaussianFit:
    """Read a file as pytorch-fid and `save_statistics` write it.

    Raises:
        DataError: unreadable, not such a file, of another number of features, or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            mean, covariance = (np.asarray(found[key], dtype=np.float64) for key in ("mu", "sigma"))
    except Exception as error:  # zipfile, numpy and zlib each raise their own
        reason = " ".join(shown(error).split())[:200]
        raise DataError(
            f"{shown(path)}: not statistics in pytorch-fid's format ({reason}); make them with --save-stats"
        ) from error
    if mean.shape != (dimension,) or covariance.shape != (dimension, dimension):
        raise DataError(f"{shown(path)}: holds {mean.shape} features, {dimension} are needed; use the same network")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{shown(path)}: holds numbers that are not finite; make the statistics again")
    return GaussianFit.of_statistics(torch.from_numpy(mean), torch.from_numpy(covariance))


def frechet_distance(first: GaussianFit, second: GaussianFit) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two fits of at least two vectors each, in float64."""
    first_factor, second_factor = first.factor(), second.factor()
    traces = first_factor.square().sum() + second_factor.square().sum()
    overlap = torch.linalg.svdvals(first_factor @ second_factor.T).sum()
    distance = (first.mean() - second.mean()).square().sum() + traces - 2 * overlap
    return max(distance.item(), 0.0)  # rounding can leave a tiny negative number for equal sets
