"""R of the mapping loss (Eq. 13-14): features of either domain to a picture. Used in training only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.model.layers import LEAK, conv, enlarge


class Mapping(nn.Module):
    """Fuses the levels coarse to fine. Small on purpose: what the picture needs must be in the features.

    widths: channels C_1..C_L of the features, coarse to fine. Input: L maps B,C_l,h,w. Output: B,3,H,W in [-1, 1] at
    the finest level's size. There is no normalisation, so every bias reaches the output.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 32):
        super().__init__()
        self.lateral = nn.ModuleList(conv(width, hidden, 1, bias=False) for width in widths)
        self.fuse = nn.ModuleList(conv(hidden, hidden) for _ in widths)
        self.to_rgb = conv(hidden, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """See the class for shapes; the result is float32."""
        x = None
        for lateral, fuse, feature in zip(self.lateral, self.fuse, features, strict=True):
            y = lateral(feature)
            y = y if x is None else y + enlarge(x, y.shape[-2:])
            x = F.leaky_relu(fuse(y), LEAK)
        return torch.tanh(self.to_rgb(x).float())
