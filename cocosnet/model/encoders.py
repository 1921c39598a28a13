"""Multi-level domain alignment (Section 3.1, Eq. 1-2): a U-Net that maps an input to a pyramid of L features.

The down path halves the size from scale to scale; the up path adds the skip connections and is modulated by the
network's own input (SPADE), so that instance normalisation cannot wash out a sparse condition.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import EncoderConfig
from cocosnet.model.layers import LEAK, ResidualBlock, SpadeBlock, conv, enlarge, instance_norm


class Encoder(nn.Module):
    """M_A or M_B. Input B,in_channels,H,W with sides that are multiples of 2^(len(widths)-1).

    Output: L features, coarse to fine, B,C_l,H/2^(L-l),W/2^(L-l), unit length over the channels at each position.
    Where `matched` is less than L, only that many are computed, the coarsest ones.
    """

    def __init__(self, in_channels: int, config: EncoderConfig, matched: int | None = None):
        super().__init__()
        self.levels = config.levels if matched is None else matched
        self.finest = config.levels - self.levels  # scale at which the up path ends; 0 is full resolution
        channels = (config.stem_width, *config.widths)
        self.stem = conv(in_channels, config.stem_width, spectral=True)
        self.down = nn.ModuleList(
            Down(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(zip(channels, channels[1:]))
        )
        # The block of a scale ends with the width that the next finer scale's skip connection has.
        self.up = nn.ModuleList(
            SpadeBlock(b, a, in_channels, config.spade_hidden)
            for a, b in list(zip(channels, channels[1:]))[self.finest :]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Eq. 1-2. See the class for shapes."""
        skips = self._downward(x)
        y, features = None, []
        for scale in reversed(range(self.finest, len(skips))):
            y = skips[scale] if y is None else skips[scale] + enlarge(y, skips[scale].shape[-2:])
            y = self.up[scale - self.finest](y, x)
            features.append(y)
        return [F.normalize(f.float(), dim=1) for f in features[-self.levels :]]

    def _downward(self, x: Tensor) -> list[Tensor]:
        """Features of the down path, fine to coarse."""
        y, skips = self.stem(x), []
        for block in self.down:
            y = block(y)
            skips.append(y)
        return skips


class Down(nn.Module):
    """LeakyReLU, a (strided) spectrally normalised convolution with instance normalisation, and a residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv = conv(inputs, outputs, stride=stride, bias=False, spectral=True)
        self.residual = ResidualBlock(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """B,inputs,h,w -> B,outputs,h/stride,w/stride."""
        return self.residual(instance_norm(self.conv(F.leaky_relu(x, LEAK))))
