"""The translation network G (Section 3.3, Eq. 9-10): a constant code, modulated at every scale by the warps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import TranslatorConfig
from cocosnet.model.layers import LEAK, SpadeBlock, conv, enlarge, in_own_type

CODE_GAIN = 1.0  # standard deviation of the code's numbers at the start


class Translator(nn.Module):
    """x_B = G(z, w). The guide is the concatenation of all warps (and of x_A where the config says so).

    Guide: B,guide_channels,H,W with sides that are multiples of 2^(scales-1). Output: B,3,H,W in [-1, 1].
    """

    def __init__(self, guide_channels: int, config: TranslatorConfig):
        super().__init__()
        self.scales = len(config.widths)
        self.code = nn.Parameter(_initial_code(config))
        inputs = (config.widths[0], *config.widths)
        self.blocks = nn.ModuleList(
            _scale(inputs[i], width, count, guide_channels, config.spade_hidden)
            for i, (width, count) in enumerate(zip(config.widths, config.blocks))
        )
        self.to_rgb = conv(config.widths[-1], 3, spectral=True)
        # Spectral normalisation bounds the last layer; a learned contrast lets it still reach black and white.
        self.contrast = nn.Parameter(torch.ones(()))

    def forward(self, guide: Tensor, style: Tensor | None = None) -> Tensor:
        """Eq. 10. See the class for shapes. `style` B,widths[0],s,s is added to the code (the SPADE baseline's)."""
        height, width = (side // 2 ** (self.scales - 1) for side in guide.shape[-2:])
        code = self.code if style is None else self.code + style
        x = enlarge(code, (height, width))
        x = x.expand(guide.shape[0], -1, -1, -1)
        for scale, blocks in enumerate(self.blocks):
            with in_own_type(x):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest") if scale else x
            for block in blocks:
                x = block(x, guide)
        return torch.tanh(self.contrast * self.to_rgb(F.leaky_relu(x, LEAK)).float())


def join_warps(warps: list[Tensor], size: torch.Size) -> Tensor:
    """[w_1 up, ..., w_L up]: the warps of all levels at full size H,W, side by side. Returns B,3L,H,W."""
    return torch.cat([enlarge(warp, size) for warp in warps], dim=1)


def _scale(inputs: int, width: int, count: int, guide_channels: int, hidden: int) -> nn.ModuleList:
    return nn.ModuleList(SpadeBlock(inputs if i == 0 else width, width, guide_channels, hidden) for i in range(count))


def _initial_code(config: TranslatorConfig) -> Tensor:
    """A fixed draw, from a generator of its own, so that building a network leaves the global one alone."""
    generator = torch.Generator().manual_seed(0)
    return CODE_GAIN * torch.randn(1, config.widths[0], config.code_size, config.code_size, generator=generator)
