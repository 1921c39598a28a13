"""Lines from pixels of one picture to the places that they are matched with in another."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cocosnet.viz.canvas import BACKGROUND, GAP, Picture, as_image, distinct_colors, fit_height

OVERSAMPLING = 2  # lines are drawn at this scale and reduced, which smooths them
RADIUS = 3  # px, of the dots at the ends of a line


def spread(height: int, width: int, count: int = 24) -> Tensor:
    """About `count` pixels (y, x) in the middles of a regular grid of nearly square cells: N,2 int64, row by row.

    N lies between 1 and height * width; the same sizes always give the same pixels.
    """
    rows = min(height, max(1, round(math.sqrt(count * height / width))))
    columns = min(width, max(1, round(count / rows)))
    ys = ((torch.arange(rows) + 0.5) * height / rows).long()
    xs = ((torch.arange(columns) + 0.5) * width / columns).long()
    return torch.cartesian_prod(ys, xs)


def draw_matches(
    left: Picture,
    right: Picture,
    positions_2hw: Tensor,
    *,
    count: int = 24,
    height: int = 256,
    factor: float | None = None,
    gap: int = GAP,
) -> Image.Image:
    """Two pictures side by side, with a line from each chosen pixel of the left one to its match in the right one.

    A match outside the right picture (in what a network padded it with) is drawn at the nearest border.

    Args:
        left: picture of the field's own side (condition or output).
        right: picture that the positions point into (exemplar).
        positions_2hw: (y, x) in px of the level, float.
        count: about how many lines, spread evenly (`spread`); each has a colour of its own.
        height: px, of both pictures in the result.
        factor: px of both pictures that one px of the level spans; None: each picture spans h, w px of the level.
        gap: px of white between the pictures.

    Returns:
        mode RGB.
    """
    own_size = tuple(positions_2hw.shape[-2:])
    originals = [as_image(picture) for picture in (left, right)]
    sizes = [own_size if factor is None else (picture.height / factor, picture.width / factor) for picture in originals]
    images = [fit_height(picture, height) for picture in originals]
    canvas = Image.new("RGB", (images[0].width + gap + images[1].width, height), BACKGROUND)
    canvas.paste(images[0], (0, 0))
    canvas.paste(images[1], (images[0].width + gap, 0))
    canvas = canvas.resize((canvas.width * OVERSAMPLING, canvas.height * OVERSAMPLING), Image.Resampling.NEAREST)
    starts = spread(*own_size, count)
    ends = positions_2hw.detach().float().cpu()[:, starts[:, 0], starts[:, 1]].T
    from_xy = _to_canvas(starts.float(), sizes[0], images[0].size)
    to_xy = _to_canvas(ends, sizes[1], images[1].size) + torch.tensor([images[0].width + gap, 0])
    _draw_lines(canvas, from_xy * OVERSAMPLING, to_xy * OVERSAMPLING)
    return canvas.reduce(OVERSAMPLING)


def _to_canvas(positions_N2: Tensor, level_size: tuple[float, float], shown_size: tuple[int, int]) -> Tensor:
    """(y, x) of a level with pixel centres at integers to (x, y) of a drawing, where pixel 0 spans 0 to 1."""
    scale = torch.tensor([shown_size[1] / level_size[0], shown_size[0] / level_size[1]])
    xy = ((positions_N2 + 0.5) * scale).flip(1)
    return torch.minimum(xy.clamp(min=0), torch.tensor(shown_size))


def _draw_lines(canvas: Image.Image, from_xy: Tensor, to_xy: Tensor) -> None:
    """All lines first, then the dots on top, each with a dark rim that shows on any ground."""
    draw = ImageDraw.Draw(canvas)
    pairs = list(zip(from_xy.tolist(), to_xy.tolist(), distinct_colors(len(from_xy)), strict=True))
    for start, end, colour in pairs:
        draw.line([*start, *end], fill=colour, width=OVERSAMPLING + 1)
    for start, end, colour in pairs:
        for x, y in (start, end):
            draw.circle((x, y), RADIUS * OVERSAMPLING, fill=colour, outline=(0, 0, 0), width=OVERSAMPLING)
