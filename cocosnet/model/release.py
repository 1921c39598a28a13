"""The networks of the authors' release, with its arithmetic, so that its checkpoints run unchanged (`matching.compat`).

Attributes are called as in the release's state dicts, which `cocosnet/convert.py` renames only at the top. Spectral
normalisation is folded into the weights when a checkpoint is converted: these networks are for use, not for training.
How they differ from ours is in docs/release.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import Config, DiscriminatorConfig, EncoderConfig, TranslatorConfig
from cocosnet.model.cocosnet import Output, check_inputs, crop_output
from cocosnet.model.convolution import Conv2d
from cocosnet.model.layers import LEAK, SPADE_HALO, in_bands
from cocosnet.model.release_matching import InstanceNorm, ReleaseHierarchy, resized, side_by_side, unit


class ReleaseCoCosNet(nn.Module):
    """The release's correspondence network and generator, called as `CoCosNet` is.

    `exemplar_condition` is needed: the exemplar's encoder sees it. `discriminator` is there where the config's
    `discriminator.scales` is not 0, that is, where it was imported too.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        shape, channels = config.model, config.data.condition_channels
        self.condition_encoder = ReleaseEncoder(channels, shape.encoder)
        self.image_encoder = ReleaseEncoder(channels + 3, shape.encoder)
        self.hierarchy = ReleaseHierarchy(shape.encoder.out_widths, shape.matching)
        self.translator = ReleaseGenerator(3 * shape.encoder.levels + channels, shape.translator)
        if shape.discriminator.scales:
            self.discriminator = ReleaseDiscriminator(channels + 3, shape.discriminator)
        self.multiple = 2 ** max(len(shape.encoder.widths) - 1, len(shape.translator.widths) - 1)

    def forward(
        self,
        condition: Tensor,
        exemplar: Tensor,
        exemplar_condition: Tensor | None = None,
        propagation_orders: Sequence[str] | None = None,
    ) -> Output:
        """condition B,C,H,W in [0, 1]; exemplar B,3,H',W' in [-1, 1]; exemplar_condition B,C,H',W'.

        propagation_orders: `horizontal-first` or `vertical-first` for each iteration of each level, coarse to fine, as
        the release draws them; by default horizontal first throughout.

        Raises:
            ValueError: an input has the wrong shape, the exemplar's condition is missing, or the orders are not as many
                as the iterations or are called otherwise.
        """
        size = check_inputs(self.config.data.condition_channels, condition, exemplar, exemplar_condition)
        x_a, y_b = self.padded(condition), self.padded(exemplar)
        features_x, features_y = self.encode_condition(x_a), self.encode_image(y_b, exemplar_condition)
        levels = self.hierarchy(features_x, features_y, y_b, propagation_orders)
        image = self.translate([level.warps[-1] for level in levels], x_a)
        return crop_output(image, levels, features_x, features_y, size, exemplar.shape[-2:], 1)

    def encode_condition(self, condition: Tensor) -> list[Tensor]:
        """L maps of unit vectors, coarse to fine."""
        return [unit(f) for f in self.condition_encoder(self.padded(condition))]

    def encode_image(self, image: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """L maps of unit vectors, coarse to fine. `condition` belongs to the image. Raises ValueError without it."""
        if condition is None:
            raise ValueError("the release's image encoder also sees the exemplar's condition: pass exemplar_condition")
        return [unit(f) for f in self.image_encoder(torch.cat([self.padded(image), self.padded(condition)], dim=1))]

    def padded(self, x: Tensor) -> Tensor:
        """B,C,H,W with its border repeated to multiples of `multiple`, two at least: a map of one pixel has no
        neighbour to reflect."""
        bottom, right = (
            -side % self.multiple + (self.multiple if side <= self.multiple else 0) for side in x.shape[-2:]
        )
        return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x

    def translate(self, warps: list[Tensor], condition: Tensor) -> Tensor:
        """The generator on all warps, enlarged by the nearest pixel, and the padded condition. B,3,H,W in [-1, 1]."""
        return self.translator(_guide(warps, condition))


class ReleaseEncoder(nn.Module):
    """One of the two feature networks. B,C,H,W -> four maps (before their normalisation), coarse to fine."""

    def __init__(self, in_channels: int, config: EncoderConfig):
        super().__init__()
        widths = (config.stem_width, *config.widths)
        self.layer1 = _normed(in_channels, widths[0])
        for index in range(1, 5):
            down = _normed(widths[index - 1], widths[index], stride=1 if index == 1 else 2)
            setattr(self, f"layer{index + 1}", nn.Sequential(down, ReleaseResidual(widths[index])))
        names, hidden = ("head_0", "G_middle_0", "G_middle_1", "G_middle_2"), config.spade_hidden
        for name, inputs, outputs in zip(names, widths[:0:-1], widths[-2::-1]):
            setattr(self, name, ReleaseSpadeBlock(inputs, outputs, in_channels, hidden))

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class for shapes."""
        y, skips = self.layer1(x), []
        for layer in (self.layer2, self.layer3, self.layer4, self.layer5):
            y = layer(F.leaky_relu(y, LEAK))
            skips.append(y)
        features = [self.head_0(skips.pop(), x)]
        for block in (self.G_middle_0, self.G_middle_1, self.G_middle_2):
            up = F.interpolate(features[-1], scale_factor=2, mode="bilinear", align_corners=True)
            features.append(block(up.add_(skips.pop()), x))
        return features


class ReleaseGenerator(nn.Module):
    """The generator. Guide B,G,H,W with sides that are multiples of 32 -> B,3,H,W in [-1, 1].

    Unlike the encoders it may compute in another order than the release: no match turns on its last bits.
    """

    def __init__(self, guide_channels: int, config: TranslatorConfig):
        super().__init__()
        self.fc = nn.Conv2d(guide_channels, config.widths[0], 3, padding=1)
        widths = [config.widths[0], *(w for w, n in zip(config.widths, config.blocks) for _ in range(n))]
        self.names = ("head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3")
        for name, inputs, outputs in zip(self.names, widths, widths[1:]):
            setattr(self, name, ReleaseSpadeBlock(inputs, outputs, guide_channels, config.spade_hidden, Conv2d))
        self.conv_img = nn.Conv2d(config.widths[-1], 3, 3, padding=1)

    def forward(self, guide: Tensor) -> Tensor:
        """See the class for shapes."""
        x = self.fc(F.interpolate(guide, size=[side // 32 for side in guide.shape[-2:]]))
        for name in self.names:
            x = getattr(self, name)(x, guide, scale=1 if name in ("head_0", "G_middle_1") else 2)
        return torch.tanh(self.conv_img(F.leaky_relu(x, LEAK)))


class ReleaseDiscriminator(nn.Module):
    """The discriminator. condition B,C,H,W, image B,3,H,W -> a list (a scale, fine to coarse) of lists of maps."""

    def __init__(self, in_channels: int, config: DiscriminatorConfig):
        super().__init__()
        for scale in range(config.scales):
            setattr(self, f"discriminator_{scale}", ReleasePatchDiscriminator(in_channels, config.width))
        self.scales = config.scales

    def forward(self, condition: Tensor, image: Tensor) -> list[list[Tensor]]:
        """See the class for shapes; the last map of a scale is its score."""
        x, outputs = torch.cat([condition, image], dim=1), []
        for scale in range(self.scales):
            outputs.append(getattr(self, f"discriminator_{scale}")(x))
            x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return outputs


class ReleasePatchDiscriminator(nn.Module):
    """4x4 convolutions: strides 2, 2, 2, 1, 1. B,C,H,W -> five maps."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        widths, strides = (in_channels, width, 2 * width, 4 * width, 8 * width, 1), (2, 2, 2, 1, 1)
        for index, (a, b, stride) in enumerate(zip(widths, widths[1:], strides)):
            layer = nn.Conv2d(a, b, 4, stride, padding=1, bias=index in (0, 4))
            normed = nn.Sequential(nn.Sequential(layer, InstanceNorm())) if index in (1, 2, 3) else nn.Sequential(layer)
            setattr(self, f"model{index}", normed)

    def forward(self, x: Tensor) -> list[Tensor]:
        """See the class for shapes."""
        maps = []
        for index in range(5):
            x = getattr(self, f"model{index}")(x)
            x = F.leaky_relu(x, LEAK) if index < 4 else x
            maps.append(x)
        return maps


class ReleaseSpadeBlock(nn.Module):
    """A SPADE residual block: reflected borders, and a shortcut with a SPADE of its own where the widths differ.

    conv: what its convolutions are made of.
    """

    def __init__(self, inputs: int, outputs: int, guide_channels: int, hidden: int, conv: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        middle = min(inputs, outputs)
        self.norm_0, self.conv_0 = ReleaseSpade(inputs, guide_channels, hidden, conv), conv(inputs, middle, 3)
        self.norm_1, self.conv_1 = ReleaseSpade(middle, guide_channels, hidden, conv), conv(middle, outputs, 3)
        self.learned = inputs != outputs
        if self.learned:
            self.norm_s = ReleaseSpade(inputs, guide_channels, hidden, conv)
            self.conv_s = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor, guide: Tensor, scale: int = 1) -> Tensor:
        """x B,inputs,h,w is first enlarged `scale` times by the nearest pixel; guide B,G,H,W of any size. Returns
        B,outputs,scale h,scale w."""
        size = tuple(scale * side for side in x.shape[-2:])
        return in_bands(self._rows, (resized(guide, size), x), SPADE_HALO)[0]

    def _rows(self, guide: Tensor, x: Tensor) -> tuple[Tensor]:
        """The block on some rows of both; x is enlarged to the guide's size here, for the whole of it is large."""
        x = resized(x, guide.shape[-2:])
        normed = _positional_norm(x)
        shortcut = self.conv_s(self.norm_s(normed, guide)) if self.learned else x
        y = self.conv_0(_reflect(F.leaky_relu(self.norm_0(normed, guide), LEAK)))
        y = self.norm_1(_positional_norm(y), guide)
        return (shortcut + self.conv_1(_reflect(F.leaky_relu(y, LEAK))),)


class ReleaseSpade(nn.Module):
    """Scale and shift of a normalised map, from the guide. conv: what its convolutions are made of."""

    def __init__(self, channels: int, guide_channels: int, hidden: int, conv: type[nn.Conv2d]):
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.ReflectionPad2d(1), conv(guide_channels, hidden, 3), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = conv(hidden, channels, 3), conv(hidden, channels, 3)

    def forward(self, normed: Tensor, guide: Tensor) -> Tensor:
        """normed B,C,h,w; guide B,G,h,w. Returns B,C,h,w."""
        gamma, beta = side_by_side(_reflect(self.mlp_shared(guide)), self.mlp_gamma, self.mlp_beta)
        return normed * (1 + gamma) + beta


def _guide(warps: list[Tensor], condition: Tensor) -> Tensor:
    """What the generator sees, B,G,H,W, in the layout that its convolutions want."""
    maps = [*(resized(warp, condition.shape[-2:]) for warp in warps), condition]
    return torch.cat(maps, dim=1).contiguous(memory_format=torch.channels_last)


def _positional_norm(x: Tensor) -> Tensor:
    """Over the channels of each position, with the unbiased variance. B,C,h,w -> B,C,h,w."""
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True)
    return (x - mean) / (variance + 1e-8).sqrt()


class ReleaseResidual(nn.Module):
    """Two 3x3 convolutions with reflected borders; one PReLU, used twice, which the release's files hold twice."""

    def __init__(self, channels: int):
        super().__init__()
        self.relu = nn.PReLU()
        self.model = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(), self.relu,
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """B,C,h,w -> B,C,h,w."""
        return self.relu(x + self.model(x))


def _normed(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), InstanceNorm())


def _reflect(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")
