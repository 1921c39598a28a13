"""Exact matching at one level: every pixel of the condition against every pixel of the exemplar.

Both the attention and the search are streamed, so memory grows linearly with the pixels. It is the coarse level's
engine, that of every level with `matching.backend: exact`, and the oracle that PatchMatch is measured against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.model.matches import Matches
from cocosnet.model.warp import is_open
from cocosnet.precision import without_autocast

CHUNK = 2**24  # similarities held at once while the top K are picked: 64 MiB of float32
WIDTH = 8  # numbers in a row of attention, or a multiple: otherwise a GPU's fused kernels stand back, and all is stored
GROUP = 64  # neighbouring similarities that are first looked at by their maximum alone


def exact_warp(features_x: Tensor, features_y: Tensor, exemplar: Tensor, temperature: float) -> Tensor:
    """softmax(f^x f^y / temperature) y over all positions of the exemplar (Eq. 8 with K = H W).

    features_x B,C,h,w and features_y B,C,H,W of unit length; exemplar B,3,H,W. Returns B,3,h,w float32.
    """
    maps = features_x, features_y, exemplar
    width = -(-max(t.shape[1] for t in maps) // WIDTH) * WIDTH
    queries, keys, values = (_rows(t.float(), width) for t in maps)
    with without_autocast(queries.device):  # tau = 0.01 magnifies every rounding a hundredfold
        warped = F.scaled_dot_product_attention(queries, keys, values, scale=1 / temperature)[..., : exemplar.shape[1]]
    return warped.squeeze(1).transpose(1, 2).unflatten(2, features_x.shape[-2:])


@torch.no_grad()
def exact_top_k(features_x: Tensor, features_y: Tensor, candidates: int) -> Matches:
    """The K most similar positions of every pixel (Eq. 4), best first; a map of fewer than K pixels leaves slots empty.

    features_x B,C,h,w and features_y B,C,H,W of unit length. Returns Matches with integer positions.
    """
    batch, _, height, width = features_x.shape
    queries, keys = features_x.float().flatten(2).transpose(1, 2), features_y.float().flatten(2)
    kept = min(candidates, keys.shape[-1])
    whole = is_open(keys.shape[-1])
    parts = [queries] if whole else queries.split(max(1, CHUNK // (batch * keys.shape[-1])), dim=1)
    with without_autocast(keys.device):
        best = [top_k_of_rows(part @ keys, kept) for part in parts]
    scores, indices = (torch.cat(parts, 1).transpose(1, 2).unflatten(2, (height, width)) for parts in zip(*best))
    rows = indices // features_y.shape[-1]
    positions = torch.stack([rows, indices - rows * features_y.shape[-1]], dim=2).float()
    return _fill(positions, scores.clamp(-1, 1), candidates)


def top_k_of_rows(similarities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest numbers of the last dimension and their indices, greatest first, as `torch.topk`.

    On long rows in two steps: the K greatest lie in the K groups of the greatest maxima, so only those are searched.
    """
    length = similarities.shape[-1]
    groups = 0 if is_open(length) or length % GROUP else length // GROUP
    if groups <= count:
        return tuple(torch.topk(similarities, count, dim=-1))
    grouped = similarities.unflatten(-1, (groups, GROUP))
    chosen = torch.topk(grouped.amax(-1), count, dim=-1).indices
    few = torch.gather(grouped, -2, chosen.unsqueeze(-1).expand(*chosen.shape, GROUP)).flatten(-2)
    values, order = torch.topk(few, count, dim=-1)
    return values, chosen.gather(-1, order // GROUP) * GROUP + order % GROUP


def _fill(positions: Tensor, scores: Tensor, candidates: int) -> Matches:
    """Add empty slots up to K."""
    missing = candidates - scores.shape[1]
    if missing:
        positions = torch.cat([positions, positions[:, :1].expand(-1, missing, -1, -1, -1)], 1)
        scores = torch.cat([scores, torch.full_like(scores[:, :1], -torch.inf).expand(-1, missing, -1, -1)], 1)
    return Matches(positions, scores)


def _rows(map_BCHW: Tensor, width: int) -> Tensor:
    """B,C,H,W -> B,1,HW,width: one head of attention, zeros after the C numbers of a row, which lie together."""
    rows = map_BCHW.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
    return F.pad(rows, (0, width - rows.shape[-1]))
