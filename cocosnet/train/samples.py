"""Pictures of how far a run has come: one row a pair, from condition to target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.model.cocosnet import CoCosNet
from cocosnet.train.batches import Batch

GAP = 2  # px of white between two pictures


@torch.no_grad()
def sample_grid(model: CoCosNet, batch: Batch) -> Tensor:
    """Rows of condition, exemplar, the warps of every level (coarse to fine, enlarged), output, target.

    `model` in evaluation mode. Returns 3,H,W in [-1, 1] on the CPU.
    """
    out = model(batch.condition, batch.exemplar, batch.exemplar_condition)
    size = batch.image.shape[-2:]
    warps = [F.interpolate(warp.float(), size=size, mode="nearest") for warp in out.warps]
    columns = [condition_picture(batch.condition), batch.exemplar, *warps, out.image.float(), batch.image]
    padded = [F.pad(column.clamp(-1, 1), (GAP, GAP, GAP, GAP), value=1.0) for column in columns]
    rows = torch.cat(padded, dim=3)
    return torch.cat(list(rows), dim=1).cpu()


def condition_picture(condition: Tensor) -> Tensor:
    """B,C,H,W in [0, 1] to B,3,H,W in [-1, 1]: one channel as grey; of several, each in a fixed colour of its own."""
    count = condition.shape[1]
    if count == 1:
        return condition.expand(-1, 3, -1, -1) * 2 - 1
    hues = torch.arange(count, device=condition.device) / count
    phases = torch.tensor([0.0, 1 / 3, 2 / 3], device=condition.device)
    colours = 0.5 + 0.5 * torch.cos(2 * torch.pi * (hues[:, None] + phases))
    total = condition.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bchw,ck->bkhw", condition, colours) / total * 2 - 1
