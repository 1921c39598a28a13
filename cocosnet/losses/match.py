"""Match loss (ours, beside Eq. 12): how surprised matching is by the right place, where that is known.

A pseudo exemplar is x_B bent by a known map, so the true match of each of its pixels is known. Eq. 12 sees a wrong
match only where it shows another colour. This loss sees it everywhere and at every level at once: a fine level's
features get a gradient from places that its candidates have not reached yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.model.warp import downsample_field, of_axes, sample
from cocosnet.precision import without_autocast

QUERIES = 256  # pixels of a level, about, that are asked for
PLACES = 4096  # pixels of a level, about, it is compared with: all of 64x64, a quarter of 128x128


def match_loss(
    features_x: Sequence[Tensor],
    features_y: Sequence[Tensor],
    field: Tensor,
    pseudo: Tensor,
    temperature: float,
    count: Tensor | None = None,
) -> Tensor:
    """-log softmax(cos(f^x, f^y) / temperature) at the true match, as in Eq. 4 but over about PLACES of a level.

    Summed over the levels, averaged over about QUERIES pixels and over the samples whose exemplar is a pseudo exemplar.
    features_x of x_A, features_y of the exemplar: L maps B,C,h,w float32 of unit length, as they are compared.
    field: B,2,H,W, the exemplar's pixel p shows x_B at field(p), (y, x) in px; those of the outside do not count.
    pseudo, count: as for Eq. 12 (`correspondence_loss`). Returns a float32 scalar, 0 where no sample is pseudo.
    """
    samples = sum(_level(x, y, field, temperature) for x, y in zip(features_x, features_y, strict=True))
    count = pseudo.sum() if count is None else count
    return (pseudo * samples).sum() / torch.where(count > 0, count, 1)


def _level(x: Tensor, y: Tensor, field: Tensor, temperature: float) -> Tensor:
    """One level's value for each sample: B."""
    truth = downsample_field(field, field.shape[-1] // y.shape[-1])
    y, truth = _thinned(y, PLACES), _thinned(truth, PLACES)
    height, width = y.shape[-2:]
    places = torch.arange(height * width, device=y.device).view(1, height, width)
    asked, right = _thinned(truth, QUERIES), _thinned(places, QUERIES).flatten()
    limit = of_axes(asked, x.shape[-2] - 1, x.shape[-1] - 1).squeeze(1)
    inside = ((asked >= 0) & (asked <= limit)).all(1).flatten(1)
    queries = F.normalize(sample(x, asked.unsqueeze(1)).squeeze(2).flatten(2), dim=1)
    with without_autocast(x.device):  # tau = 0.01 magnifies every rounding a hundredfold
        logits = queries.transpose(1, 2) @ y.flatten(2) / temperature  # B,queries,places
    surprise = F.cross_entropy(logits.transpose(1, 2), right.expand(len(y), -1), reduction="none")
    return (surprise * inside).sum(1) / inside.sum(1).clamp(min=1)


def _thinned(maps: Tensor, count: int) -> Tensor:
    """Every n-th row and column of ...,h,w, so that about `count` pixels are left; the middle one of n."""
    step = max(1, math.isqrt(maps.shape[-2] * maps.shape[-1] // count))
    return maps[..., step // 2 :: step, step // 2 :: step]
