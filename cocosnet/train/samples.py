"""Pictures of how far a run has come: one row a pair, from condition to target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.data.images import to_tensor
from cocosnet.model.build import Model
from cocosnet.train.batches import Batch
from cocosnet.viz.panels import condition_image

GAP = 2  # px of white between two pictures


@torch.no_grad()
def sample_grid(model: Model, batch: Batch) -> Tensor:
    """Rows of condition, exemplar, the warps of every level (coarse to fine, enlarged), output, target.

    `model` in evaluation mode. Returns 3,H,W in [-1, 1] on the CPU.
    """
    out = model(*batch.inputs)
    size = batch.image.shape[-2:]
    warps = [F.interpolate(warp.float(), size=size, mode="nearest") for warp in out.warps]
    conditions = torch.stack([to_tensor(condition_image(condition)) for condition in batch.condition.cpu()])
    stages = [conditions.to(batch.image.device), batch.exemplar, *warps, out.image.float(), batch.image]
    padded = [F.pad(column.clamp(-1, 1), (GAP, GAP, GAP, GAP), value=1.0) for column in stages]
    rows = torch.cat(padded, dim=3)
    return torch.cat(list(rows), dim=1).cpu()
