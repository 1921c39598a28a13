"""The warp panel: what every level of the matcher found, in one picture; and conditions made visible."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cocosnet.data.images import to_image
from cocosnet.data.pose import JOINTS
from cocosnet.model.matches import Matches
from cocosnet.model.warp import pixel_grid
from cocosnet.viz.canvas import GAP, as_image, distinct_colors, fit_height, side_by_side, stacked, titled
from cocosnet.viz.flow import flow_colors, score_colors, typical_maximum
from cocosnet.viz.matches import draw_matches

BAR = 10  # px, height of the colour bar under a score map
WHEEL = 96  # px, side of the legend of offset colours
LOWEST_SCORES = 0.02  # share of the scores that fall below its colours


def condition_image(condition_CHW: Tensor) -> Image.Image:
    """A condition (C,H,W float in [0,1]) as a picture of mode RGB and the same size.

    One channel (edges) is shown as grey. One-hot labels, that is channels of 0 and 1 of which one is set in every
    pixel, get a fixed colour a class, black for the last class ("unknown"). The 18 heat maps of a pose get a colour
    each, of which the brightest shows. Of anything else, such as the 20 channels of a pose, the first three channels
    are shown as red, green and blue.
    """
    condition = condition_CHW.detach().float().cpu()
    if condition.shape[0] == 1:
        return to_image(condition.expand(3, -1, -1) * 2 - 1)
    if _is_one_hot(condition):
        palette = np.array([*distinct_colors(condition.shape[0] - 1), (0, 0, 0)], dtype=np.uint8)
        return Image.fromarray(palette[condition.argmax(dim=0).numpy()])
    if condition.shape[0] == JOINTS:
        colours = torch.tensor(distinct_colors(JOINTS)).view(JOINTS, 3, 1, 1) / 255
        return to_image((condition[:, None] * colours).amax(dim=0) * 2 - 1)
    shown = torch.zeros(3, *condition.shape[1:])
    shown[: condition.shape[0]] = condition[:3]
    return to_image(shown * 2 - 1)


def _is_one_hot(condition_CHW: Tensor) -> bool:
    return bool((((condition_CHW == 0) | (condition_CHW == 1)).all() & (condition_CHW.sum(dim=0) == 1).all()).item())


def warp_panel(
    condition: Tensor,
    exemplar: Tensor,
    image: Tensor,
    warps: Sequence[Tensor],
    matches: Sequence[Matches],
    *,
    height: int = 256,
    lines: int = 24,
) -> Image.Image:
    """One picture that explains one translation.

    First row: condition, exemplar, output, and the colours of offsets around a pixel. Then one row a level, coarse to
    fine: the warp, the offset of the best candidate (colours of `cocosnet.viz.flow`, one scale for all levels, relative
    to the picture), its cosine, and match lines from the output to the exemplar.

    Args:
        condition: C,H,W float in [0,1].
        exemplar: 3,H,W float in [-1,1]; its size may differ from the condition's.
        image: 3,H,W float in [-1,1], the output.
        warps: a level each, 3,h,w float in [-1,1].
        matches: a level each, of a batch of one: positions 1,K,2,h,w and scores 1,K,h,w, best candidate first.
        height: px, of every tile; maps smaller than that are enlarged without smoothing.
        lines: about how many match lines a level.

    Returns:
        mode RGB.

    Raises:
        ValueError: the matches are of several pictures.
    """
    if any(len(level.positions) != 1 for level in matches):
        raise ValueError("the matches are of several pictures; take one's: [level[index] for level in matches]")
    fields = [level.positions[0, 0].detach().float().cpu() for level in matches]
    offsets = [field - pixel_grid(*field.shape[-2:]) for field in fields]
    scale = max((typical_maximum(offset) / max(offset.shape[-2:]) for offset in offsets), default=0.0)
    first = {"condition": condition_image(condition), "exemplar": to_image(exemplar), "output": to_image(image)}
    rows = []
    for index, (warp, offset, level) in enumerate(zip(warps, offsets, matches, strict=True)):
        name = f"level {index + 1} of {len(matches)}: {warp.shape[-1]}x{warp.shape[-2]}"
        rows.append(
            [
                titled(fit_height(to_image(warp), height), name, "warp"),
                _flow_tile(offset, scale, height),
                _score_tile(level.scores[0, 0], height),
                _match_tile(image, exemplar, fields[index], height, lines),
            ]
        )
    widths = [max(tile.width for tile in column) for column in zip(*rows, strict=True)]
    top = side_by_side(
        [
            *(titled(fit_height(tile, height), name, f"{tile.width}x{tile.height}") for name, tile in first.items()),
            titled(_wheel(), "offset colours", "where the match lies, seen from the pixel in the middle"),
        ]
    )
    return stacked([top, *(side_by_side(row, widths) for row in rows)])


def _wheel() -> Image.Image:
    """The colours of all offsets up to the longest, each drawn where it leads to."""
    place = pixel_grid(WHEEL, WHEEL) - (WHEEL - 1) / 2
    inside = (place.square().sum(dim=0).sqrt() <= WHEEL / 2).float()
    return as_image(flow_colors((place * inside)[None], WHEEL / 2)[0])


def _flow_tile(offset_2hw: Tensor, scale: float, height: int) -> Image.Image:
    """Offsets, full colour at `scale` times the longer side of the level."""
    maximum = max(scale * max(offset_2hw.shape[-2:]), 1e-6)
    tile = fit_height(as_image(flow_colors(offset_2hw[None], maximum)[0]), height)
    return titled(tile, "offset of best match", f"full: {maximum:.0f} px; right red, down yellow")


def _score_tile(score_hw: Tensor, height: int) -> Image.Image:
    """Cosines from their 2nd percentile to 1, the colour bar in the tile's lowest rows, and their mean.

    Trained features are close to each other wherever they match: over all of 0 to 1 the map would be one colour.
    """
    finite = score_hw[torch.isfinite(score_hw)].detach().float().cpu()
    low = min(float(np.quantile(finite.numpy(), LOWEST_SCORES)), 1 - 1e-4) if finite.numel() else 0.0
    tile = fit_height(Image.fromarray(score_colors(score_hw, low=low)), height)
    bar = Image.fromarray(score_colors(torch.linspace(0, 1, tile.width).expand(BAR, -1)))
    tile.paste((255, 255, 255), (0, height - BAR - 2, tile.width, height - BAR))
    tile.paste(bar, (0, height - BAR))
    mean = f"mean {finite.mean().item():.3f}" if finite.numel() else "none"
    return titled(tile, "cosine of best match", f"violet {low:.3f} to yellow 1, {mean}")


def _match_tile(image: Tensor, exemplar: Tensor, field_2hw: Tensor, height: int, lines: int) -> Image.Image:
    """Match lines from the output to the exemplar. A level's px spans a power of two of the picture's."""
    factor = 2 ** round(math.log2(max(image.shape[-2:]) / max(field_2hw.shape[-2:])))
    drawn = draw_matches(image, exemplar, field_2hw, count=lines, height=height, factor=factor, gap=GAP)
    return titled(drawn, "matches", "output to exemplar")
