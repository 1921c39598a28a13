"""The discriminator D (Section 3.4): patches judged on a pyramid of the picture, every layer spectrally normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cocosnet.config import DiscriminatorConfig
from cocosnet.model.layers import LEAK, instance_norm


class Discriminator(nn.Module):
    """D(condition, image): is this a real picture of that condition?

    condition B,C,H,W in [0, 1]; image B,3,H,W in [-1, 1]. Returns a list (a scale, fine to coarse) of lists (a layer)
    of feature maps; the last map of each, B,1,h,w, is the score: unbounded, larger is more real.
    """

    def __init__(self, condition_channels: int, config: DiscriminatorConfig):
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(condition_channels + 3, config) for _ in range(config.scales))

    def forward(self, condition: Tensor, image: Tensor) -> list[list[Tensor]]:
        """See the class for shapes."""
        x, outputs = torch.cat([condition, image], dim=1), []
        for discriminator in self.scales:
            outputs.append(discriminator(x))
            x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return outputs


class PatchDiscriminator(nn.Module):
    """4x4 convolutions, stride 2 but for the last hidden one and the score (release, which pads by 1, though).

    B,C,H,W -> list of maps.
    """

    def __init__(self, inputs: int, config: DiscriminatorConfig):
        super().__init__()
        widths = [min(config.width * 2**i, 8 * config.width) for i in range(config.layers)]
        self.hidden = nn.ModuleList(
            _conv4(a, b, stride=2 if i < config.layers - 1 else 1, bias=i == 0)
            for i, (a, b) in enumerate(zip([inputs, *widths], widths))
        )
        self.score = _conv4(widths[-1], 1, stride=1, bias=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of every hidden layer, then the score."""
        maps = []
        for index, layer in enumerate(self.hidden):
            x = layer(x)
            x = F.leaky_relu(instance_norm(x) if index else x, LEAK)
            maps.append(x)
        return [*maps, self.score(x)]


def _conv4(inputs: int, outputs: int, *, stride: int, bias: bool) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, 4, stride, padding=2, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    return spectral_norm(layer)
