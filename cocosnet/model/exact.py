"""Exact matching at one level: every pixel of the condition against every pixel of the exemplar.

The attention is streamed, so memory grows linearly with the pixels. It is the coarse level's engine and the oracle
that PatchMatch is measured against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.model.matches import Matches

CHUNK = 2**24  # similarities held at once while the top K are picked: 64 MiB of float32


def exact_warp(features_x: Tensor, features_y: Tensor, exemplar: Tensor, temperature: float) -> Tensor:
    """softmax(f^x f^y / temperature) y over all positions of the exemplar (Eq. 8 with K = H W).

    features_x B,C,h,w and features_y B,C,H,W of unit length; exemplar B,3,H,W. Returns B,3,h,w float32.
    """
    queries, keys, values = (_rows(t.float()) for t in (features_x, features_y, exemplar))
    # Fused attention kernels want values as wide as the keys.
    padded = F.pad(values, (0, max(keys.shape[-1] - values.shape[-1], 0)))
    with torch.autocast(queries.device.type, enabled=False):  # tau = 0.01 magnifies every rounding a hundredfold
        warped = F.scaled_dot_product_attention(queries, keys, padded, scale=1 / temperature)[..., : values.shape[-1]]
    return warped.squeeze(1).transpose(1, 2).unflatten(2, features_x.shape[-2:])


@torch.no_grad()
def exact_top_k(features_x: Tensor, features_y: Tensor, candidates: int) -> Matches:
    """The K most similar positions of every pixel (Eq. 4), best first; a map of fewer than K pixels leaves slots empty.

    features_x B,C,h,w and features_y B,C,H,W of unit length. Returns Matches with integer positions.
    """
    batch, _, height, width = features_x.shape
    queries, keys = features_x.float().flatten(2).transpose(1, 2), features_y.float().flatten(2)
    kept = min(candidates, keys.shape[-1])
    step = max(1, CHUNK // (batch * keys.shape[-1]))
    with torch.autocast(keys.device.type, enabled=False):
        best = [torch.topk(part @ keys, kept, dim=-1) for part in queries.split(step, dim=1)]
    scores = torch.cat([b.values for b in best], 1).transpose(1, 2).unflatten(2, (height, width))
    indices = torch.cat([b.indices for b in best], 1).transpose(1, 2).unflatten(2, (height, width))
    columns = features_y.shape[-1]
    positions = torch.stack([indices // columns, indices % columns], dim=2).float()
    return _fill(positions, scores.clamp(-1, 1), candidates)


def _fill(positions: Tensor, scores: Tensor, candidates: int) -> Matches:
    """Add empty slots up to K."""
    missing = candidates - scores.shape[1]
    if missing:
        positions = torch.cat([positions, positions[:, :1].expand(-1, missing, -1, -1, -1)], 1)
        scores = torch.cat([scores, torch.full_like(scores[:, :1], -torch.inf).expand(-1, missing, -1, -1)], 1)
    return Matches(positions, scores)


def _rows(map_BCHW: Tensor) -> Tensor:
    """B,C,H,W -> B,1,HW,C: one head of attention."""
    return map_BCHW.flatten(2).transpose(1, 2).unsqueeze(1)
