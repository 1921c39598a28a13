"""Appearance loss (Eq. 16): contextual for an arbitrary exemplar, feature matching for a pseudo exemplar.

Both give one number a sample, so that each sample of a batch can take the term that fits its exemplar.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.precision import without_autocast

BANDWIDTH = 0.1  # h of the contextual loss (release)
NEAREST_EPSILON = 1e-3  # added to the distance of the nearest neighbour before dividing by it (release)
MAX_POSITIONS = 4096  # of one map, so that the matrix of all pairs stays at 64 MiB; larger maps are averaged down
CONTEXTUAL_WEIGHTS = {"relu3_2": 2.0, "relu4_2": 4.0, "relu5_2": 8.0}  # u_m (release)
# eta_m (release)
FEATURE_WEIGHTS = {"relu1_2": 1 / 32, "relu2_2": 1 / 16, "relu3_2": 1 / 8, "relu4_2": 1 / 4, "relu5_2": 1.0}


def feature_loss(output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Second term of Eq. 16: sum over the layers of eta_m times the mean absolute difference. Maps by name; returns B.

    The target is x_B itself: the pseudo exemplar brought into line with x_A (see docs/deviations.md).
    """
    return sum(weight * mean_difference(output[name], target[name]) for name, weight in FEATURE_WEIGHTS.items())


def mean_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each sample: two B,C,h,w of one type, float32 or bfloat16, to B, summed in float32.

    Of bfloat16 features only the difference is rounded to bfloat16, never its sign, which is all that the gradient has.
    """
    return torch.linalg.vector_norm(a - b, ord=1, dim=(1, 2, 3), dtype=torch.float32) / a[0].numel()


def contextual_loss(output: Mapping[str, Tensor], exemplar: Mapping[str, Tensor]) -> Tensor:
    """First term of Eq. 16: sum over the layers of u_m * -log CX. Maps by name, of any sizes; returns B, at least 0.

    relu3_2 is averaged down 2x (release), and any map further until it has at most 4096 positions.
    """
    return sum(
        weight * contextual_distance(_pooled(output[name], name), _pooled(exemplar[name], name))
        for name, weight in CONTEXTUAL_WEIGHTS.items()
    )


def contextual_distance(x: Tensor, y: Tensor) -> Tensor:
    """-log CX(x, y) of Mechrez et al. (ECCV 2018), in the release's direction. x B,C,h,w; y B,C,H,W; returns B float32.

    Cosine distance d_ij after the channel means of y are taken off both; d_ij / (min_j d_ij + 1e-3);
    w_ij = exp((1 - d_ij) / h), normalised over j; CX is the mean over i of the largest over j. Any permutation of the
    positions of x or of y gives the same value. Autocast does not reach in here.
    """
    with without_autocast(x.device):
        distance = _cosine_distances(x.float().flatten(2), y.float().flatten(2))
    relative = distance / (distance.amin(2, keepdim=True) + NEAREST_EPSILON)
    logits = (1 - relative) / BANDWIDTH
    # The largest of a softmax is exp(max - logsumexp): the matrix of the normalised weights is never made.
    similarity = torch.exp(logits.amax(2) - logits.logsumexp(2)).mean(1)
    return -torch.log(similarity)


def _cosine_distances(x: Tensor, y: Tensor) -> Tensor:
    """1 - cosine of all pairs of positions, about the mean of y. x B,C,N; y B,C,M; returns B,N,M, at least 0."""
    mean = y.mean(2, keepdim=True)
    x, y = F.normalize(x - mean, dim=1), F.normalize(y - mean, dim=1)
    return (1 - x.transpose(1, 2) @ y).clamp(min=0)


def _pooled(x: Tensor, name: str) -> Tensor:
    factor = 2 if name == "relu3_2" and min(x.shape[-2:]) > 1 else 1
    while (x.shape[-2] // factor) * (x.shape[-1] // factor) > MAX_POSITIONS:
        factor *= 2
    return F.avg_pool2d(x.float(), factor) if factor > 1 else x
