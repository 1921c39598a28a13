"""The dot products of the release's matching on a CPU, compiled: the one part of it that PyTorch would do slowly."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


def similarity(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    """As `release_matching.similarity`: x B,C,h,w and y B,C,H,W float32 on the CPU, indices B,N,h,w. Returns B,N,h,w.

    The result lies in memory with the candidates of a pixel side by side.
    """
    batch, count, height, width = indices.shape
    out = torch.empty(batch, height * width, count)
    for b in range(batch):
        rows = [f[b].flatten(1).t().contiguous().numpy() for f in (x, y)]
        _dots(*rows, indices[b].flatten(1).t().contiguous().numpy(), out[b].numpy())
    return out.transpose(1, 2).unflatten(2, (height, width))


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"}, boundscheck=False)
def _dots(x: np.ndarray, y: np.ndarray, indices: np.ndarray, out: np.ndarray) -> None:
    for p in range(indices.shape[0]):
        for k in range(indices.shape[1]):
            q, total = indices[p, k], np.float32(0)
            for c in range(x.shape[1]):
                total += x[p, c] * y[q, c]
            out[p, k] = total
