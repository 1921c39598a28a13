"""CoCosNet v2, the whole of Figure 2: features, matching, warp, translation. Start reading here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cocosnet.config import Config
from cocosnet.model.encoders import Encoder
from cocosnet.model.hierarchy import Hierarchy, Level
from cocosnet.model.layers import Size, cut, pad_to_multiple
from cocosnet.model.matches import Matches
from cocosnet.model.translator import Translator, join_warps
from cocosnet.model.warp import clamp_positions, downsample


@dataclass
class Output:
    """What a forward pass gives. Lists run from the coarse level to the full resolution."""

    image: Tensor  # x_B: B,3,H,W in [-1, 1]
    warps: list[Tensor]  # w_l: B,3,h,w in [-1, 1]; empty lists for a model that does not match (SPADE)
    matches: list[Matches]  # H_l and S_l
    iteration_warps: list[list[Tensor]]  # w_l after every iteration while training; the last one alone otherwise
    features_x: list[Tensor]  # f_l^x: B,C_l,h,w, unit length
    features_y: list[Tensor]  # f_l^y


class CoCosNet(nn.Module):
    """CoCosNet v2 (Zhou et al., CVPR 2021) of a config's shape.

    With `model.kind: cocosnet` the coarsest level alone is matched, each position with all others: that is the warp of
    its predecessor, CoCosNet (Zhang et al., CVPR 2020), with everything else alike.

        out = model(condition, exemplar)

    condition x_A: B,C,H,W in [0, 1]; exemplar y_B: B,3,H',W' in [-1, 1]; any sizes, which need not agree.
    exemplar_condition: B,C,H',W', used where the config's `encoder.exemplar_condition` says so.
    All are float32, as are the weights: in bfloat16 positions would be off by pixels, so half the precision is what
    `torch.autocast` gives to the convolutions alone, never `.to(torch.bfloat16)`.
    The pass is deterministic: there are no random numbers in it.

    Raises:
        ValueError: an input is not float32, is empty, has the wrong number of dimensions, channels or pictures, or the
            exemplar's condition another size than the exemplar; or the config is another system's, whose network
            `cocosnet.model.build.build_model` makes.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        shape, channels = config.model, config.data.condition_channels
        if shape.kind == "spade" or shape.matching.compat != "none":
            raise ValueError(
                "another system's config (model.kind, model.matching.compat): build_model makes its network"
            )
        self.levels = shape.matched_levels
        # Side, in px of the picture, of one pixel of the last level that is matched: 1 but for CoCosNet.
        self.finest = 2 ** (shape.encoder.levels - self.levels)
        self.condition_encoder = Encoder(channels, shape.encoder, self.levels)
        self.image_encoder = Encoder(3 + channels * shape.encoder.exemplar_condition, shape.encoder, self.levels)
        self.hierarchy = Hierarchy(shape.encoder.out_widths[: self.levels], shape.matching)
        self.translator = Translator(3 * self.levels + channels * shape.translator.use_condition, shape.translator)
        self.multiple = 2 ** max(len(shape.encoder.widths) - 1, len(shape.translator.widths) - 1)

    def forward(self, condition: Tensor, exemplar: Tensor, exemplar_condition: Tensor | None = None) -> Output:
        """The paper's Figure 2. See the class for shapes."""
        size = check_inputs(self.config.data.condition_channels, condition, exemplar, exemplar_condition)
        x_a, y_b = pad_to_multiple(condition, self.multiple), pad_to_multiple(exemplar, self.multiple)
        features_x = self.encode_condition(x_a)  # Eq. 1
        features_y = self.encode_image(exemplar, exemplar_condition)  # Eq. 2; padding has no match
        levels = self.hierarchy(features_x, features_y, downsample(y_b, self.finest))  # Eq. 3-8
        image = self.translate([level.warps[-1] for level in levels], x_a)  # Eq. 9-10
        return crop_output(image, levels, features_x, features_y, size, exemplar.shape[-2:], self.finest)

    def encode_condition(self, condition: Tensor) -> list[Tensor]:
        """M_A, Eq. 1: L maps of unit vectors, coarse to fine; of a level, the picture's share of it, rounded up."""
        return self._encode(self.condition_encoder, condition)

    def encode_image(self, image: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """M_B, Eq. 2: maps of the image, as those of `encode_condition`. `condition` belongs to the image.

        Raises:
            ValueError: this model also looks at the image's condition, which is missing.
        """
        if not self.config.model.encoder.exemplar_condition:
            return self._encode(self.image_encoder, image)
        if condition is None:
            raise ValueError("this model's image encoder also sees the exemplar's condition: pass exemplar_condition")
        return self._encode(self.image_encoder, image, condition)

    def _encode(self, encoder: Encoder, *pictures: Tensor) -> list[Tensor]:
        """An encoder on pictures side by side, of the first one's size; what padding adds is cut off again."""
        padded = [pad_to_multiple(picture, self.multiple) for picture in pictures]
        features = encoder(padded[0] if len(padded) == 1 else torch.cat(padded, dim=1))
        if padded[0] is pictures[0]:
            return features
        return [cut(f, share) for f, share in zip(features, shares(pictures[0].shape[-2:], len(features), self.finest))]

    def compared(self, out: Output) -> tuple[list[Tensor], list[Tensor]]:
        """What matching compared: both pyramids of features, projected. B,channels,h,w float32 each, unit length."""
        return self.hierarchy.project(out.features_x), self.hierarchy.project(out.features_y)

    def translate(self, warps: list[Tensor], condition: Tensor) -> Tensor:
        """G, Eq. 10: warps coarse to fine (padded sizes) and the padded condition to B,3,H,W in [-1, 1]."""
        guide = join_warps(warps, condition.shape[-2:])
        if self.config.model.translator.use_condition:
            guide = torch.cat([guide, condition], dim=1)
        return self.translator(guide)


def check_inputs(
    channels: int, condition: Tensor, exemplar: Tensor, exemplar_condition: Tensor | None = None
) -> torch.Size:
    """Refuse what a model whose conditions have `channels` channels cannot take. Returns the condition's H,W.

    Raises:
        ValueError: as `CoCosNet`.
    """
    for name, tensor, wanted in (
        ("condition", condition, channels),
        ("exemplar", exemplar, 3),
        ("exemplar_condition", exemplar_condition, channels),
    ):
        if tensor is None and name == "exemplar_condition":
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor B,{wanted},H,W, got {type(tensor).__name__}")
        if tensor.dim() != 4 or tensor.shape[1] != wanted or 0 in tensor.shape:
            raise ValueError(f"{name}: expected B,{wanted},H,W, got {','.join(map(str, tensor.shape))}")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: expected torch.float32, got {tensor.dtype}")
    if condition.shape[0] != exemplar.shape[0]:
        raise ValueError(f"{condition.shape[0]} conditions but {exemplar.shape[0]} exemplars")
    other = exemplar if exemplar_condition is None else exemplar_condition
    if (other.shape[0], other.shape[2:]) != (exemplar.shape[0], exemplar.shape[2:]):
        expected = ",".join(map(str, (exemplar.shape[0], channels, *exemplar.shape[2:])))
        raise ValueError(f"exemplar_condition: expected {expected}, got {','.join(map(str, other.shape))}")
    return condition.shape[-2:]


def crop_output(
    image: Tensor,
    levels: list[Level],
    features_x: list[Tensor],
    features_y: list[Tensor],
    size: torch.Size,
    exemplar_size: torch.Size,
    finest: int,
) -> Output:
    """Cut off what padding added: at each level, what lies beyond the original picture's share, rounded up.

    `finest`: px of the picture, along a side, in one pixel of the last level. A match in the exemplar's padding, which
    repeats its border, is moved onto that border; only the release's networks look there.
    """
    ours, theirs = (shares(whole, len(levels), finest) for whole in (size, exemplar_size))
    steps = [[cut(warp, share) for warp in level.warps] for level, share in zip(levels, ours)]
    return Output(
        image=cut(image, size),
        warps=[warps[-1] for warps in steps],
        matches=[_cut_matches(level.matches, *both) for level, *both in zip(levels, ours, theirs)],
        iteration_warps=steps,
        features_x=[cut(feature, share) for feature, share in zip(features_x, ours)],
        features_y=[cut(feature, share) for feature, share in zip(features_y, theirs)],
    )


def shares(size: Size, levels: int, finest: int) -> list[Size]:
    """h,w of each level, coarse to fine, of a picture of `size` (H, W): its share of it, rounded up.

    `finest`: px of the picture, along a side, in one pixel of the last level.
    """
    factors = [finest * 2**level for level in reversed(range(levels))]
    return [(-(-size[0] // factor), -(-size[1] // factor)) for factor in factors]


def _cut_matches(matches: Matches, size: Size, exemplar_size: Size) -> Matches:
    return Matches(clamp_positions(cut(matches.positions, size), *exemplar_size), cut(matches.scores, size))
