"""Held-out pairs, looked at now and then: does it match, is it any good, does it copy, does it heed the exemplar?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.config import Config
from cocosnet.data.dataset import PairDataset
from cocosnet.metrics.registry import get_metric
from cocosnet.model.cocosnet import Output
from cocosnet.train.batches import Batch, make_sample, stack, step_generator
from cocosnet.train.steps import psnr, warp_error

STREAM = 3  # of random numbers, see batches.step_generator
STRUCTURE = 64  # px, size at which the outlines of two pictures are compared, so that a shift of a pixel is forgiven


@torch.no_grad()
def validate(
    model: Callable[..., Output], pairs: PairDataset, config: Config, device: torch.device, at_once: int
) -> dict[str, float]:
    """Measure `model` (called as one, in evaluation mode) on the first `train.val_pairs` pairs, always alike.

    at_once: pairs that it is given in one call; at least 2, so that there is another exemplar for `val_heed`.

    Returns, by name (NaN where there is nothing to measure it on):
        val_warp_psnr: dB, the finest warp of a pseudo exemplar against x_B.
        val_warp_gain: dB that this is above the pseudo exemplar as it lies; at 0 the correspondence does nothing.
        val_<metric>: `train.val_metric` between outputs for other pictures as exemplars, and x_B; less is better.
        val_copy: how much more than x_B the output has the exemplar's outlines: 0 not at all, 1 it is a copy.
        val_heed: how far outputs for two exemplars differ, over how far these differ; at 0 the exemplar is ignored.

    Raises:
        MissingWeights: the metric's network is not here. DataError: a picture cannot be used.
    """
    metric = get_metric(config.train.val_metric, device=str(device), seed=config.train.seed)
    errors, unmoved, copies, heeds = [], [], [], []
    for pseudo, real in _batches(pairs, config, max(at_once, 2)):
        pseudo, real = pseudo.to(device), real.to(device)
        out = model(*pseudo.inputs)
        if out.warps:
            errors.append(_errors(out.warps[-1], pseudo))
            unmoved.append(_errors(pseudo.exemplar, pseudo))
        real = _with_exemplars(real)
        if len(real.pseudo):
            image = model(*real.inputs).image.float()
            metric.update(_pixels(image), _pixels(real.image))
            copies.append(copied(image, real.image, real.exemplar))
            heeds.append(_heed(model, real, image))
    warp, still = _mean(errors), _mean(unmoved)
    value = metric.compute()["value"] if metric.count else None
    return {
        "val_warp_psnr": _decibel(warp),
        "val_warp_gain": _decibel(warp) - _decibel(still),
        f"val_{config.train.val_metric}": math.nan if value is None else float(value),
        "val_copy": _mean(copies),
        "val_heed": _mean(heeds),
    }


def copied(image: Tensor, target: Tensor, exemplar: Tensor) -> Tensor:
    """How far the outlines of `image` have left those of `target` for those of `exemplar`. B,3,H,W each; returns B.

    (c - c_0) / (1 - c_0), where c is the correlation of the outlines of image and exemplar and c_0 that of target and
    exemplar: 0 where the image has no more of the exemplar's structure than the truth has, 1 where it is the exemplar.
    """
    ours, truth, theirs = (_outlines(picture) for picture in (image, target, exemplar))
    by_chance = _correlation(truth, theirs)
    return (_correlation(ours, theirs) - by_chance) / (1 - by_chance).clamp(min=1e-3)


def _batches(pairs: PairDataset, config: Config, size: int) -> Iterator[tuple[Batch, Batch]]:
    """Each held-out pair twice: with a pseudo exemplar, and with its own exemplar (a pseudo one if it has none)."""
    count = min(config.train.val_pairs, len(pairs))
    for start in range(0, count, size):
        chosen = [pairs[index] for index in range(start, min(start + size, count))]
        yield tuple(
            stack(
                [
                    make_sample(item, config, pseudo=pseudo, generator=step_generator(0, STREAM, start + offset))
                    for offset, item in enumerate(chosen)
                ]
            )
            for pseudo in (True, False)
        )


def _with_exemplars(batch: Batch) -> Batch:
    """The samples of a batch whose exemplar is another picture."""
    return Batch(**{name: value[batch.pseudo == 0] for name, value in vars(batch).items()})


def _heed(model: Callable[..., Output], batch: Batch, image: Tensor) -> Tensor:
    """Each condition with the next one's exemplar: by how much that changes its output. Returns B, or none alone."""
    if len(image) < 2:
        return image.new_zeros(0)
    others = dataclasses.replace(
        batch, exemplar=batch.exemplar.roll(1, 0), exemplar_condition=batch.exemplar_condition.roll(1, 0)
    )
    other = model(*others.inputs).image.float()
    changed, given = ((a - b).abs().mean((1, 2, 3)) for a, b in ((image, other), (batch.exemplar, others.exemplar)))
    return changed / given.clamp(min=1e-3)


def _outlines(image: Tensor) -> Tensor:
    """Magnitude of the gradient of the grey picture, averaged down: B,N, zero mean and unit length."""
    grey = image.mean(1, keepdim=True)
    down, across = F.pad(grey.diff(dim=2), (0, 0, 0, 1)), F.pad(grey.diff(dim=3), (0, 1, 0, 0))
    size = tuple(min(side, STRUCTURE) for side in image.shape[-2:])
    flat = F.adaptive_avg_pool2d(torch.hypot(down, across), size).flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _errors(warp: Tensor, batch: Batch) -> Tensor:
    """Mean squared difference to x_B of each sample of pseudo exemplars; B."""
    return torch.stack([warp_error(warp[i : i + 1], part, part.pseudo.mean()) for i, (part, _) in _singly(batch)])


def _singly(batch: Batch) -> Iterator[tuple[int, tuple[Batch, float]]]:
    return enumerate(batch.split(len(batch.pseudo)))


def _pixels(images: Tensor) -> Tensor:
    """B,3,H,W in [-1, 1] as the uint8 that a file of it would hold."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def _mean(values: list[Tensor]) -> float:
    flat = torch.cat(values) if values else torch.zeros(0)
    return float(flat.mean()) if len(flat) else math.nan


def _decibel(error: float) -> float:
    return float(psnr(torch.tensor(error))) if error > 0 else math.nan
