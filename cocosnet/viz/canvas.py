"""Small drawing helpers that the other modules of this package share: pictures, text, colours, rows and columns."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cocosnet.data.images import to_image

Picture = Image.Image | np.ndarray | Tensor
BACKGROUND = (255, 255, 255)
INK = (20, 20, 20)
FAINT = (110, 110, 110)
GAP = 8  # px between pictures
TEXT_SIZE = 13  # px, height of the default font
LINE = TEXT_SIZE + 5  # px, one line of text with its space
GOLDEN = 0.618034  # share of the colour circle between neighbours, which keeps any number of hues apart


def as_image(picture: Picture) -> Image.Image:
    """Mode RGB of a PIL picture, an H,W or H,W,3 uint8 array, or a 3,H,W tensor (uint8, or float in [-1,1])."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    if not picture.dtype.is_floating_point:
        return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    return to_image(picture)


def fit_height(image: Image.Image, height: int) -> Image.Image:
    """Scaled to `height` px with its proportions kept; enlarged without smoothing, so that pixels stay visible."""
    width = max(1, round(image.width * height / image.height))
    smooth = height < image.height
    return image.resize((width, height), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


@functools.cache
def font(size: int = TEXT_SIZE) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's built-in font."""
    return ImageFont.load_default(size)


def shorten(text: str, width: int) -> str:
    """`text`, cut with "..." to at most `width` px in the default font."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def titled(image: Image.Image, title: str, note: str = "") -> Image.Image:
    """The picture under a line of title and, where given, a fainter line of note; widened where the text is longer."""
    lines = [(title, INK), *([(note, FAINT)] if note else [])]
    width = max(image.width, *(int(font().getlength(text)) + 1 for text, _ in lines))
    canvas = Image.new("RGB", (width, image.height + LINE * len(lines)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, (text, colour) in enumerate(lines):
        draw.text((0, row * LINE), text, fill=colour, font=font())
    canvas.paste(image, (0, LINE * len(lines)))
    return canvas


def side_by_side(images: Sequence[Image.Image], widths: Sequence[int] = (), gap: int = GAP) -> Image.Image:
    """In one row, bottoms aligned; `widths` reserves px for each (default: each its own), so that rows can line up."""
    widths = widths or [image.width for image in images]
    size = (sum(widths) + gap * (len(images) - 1), max(image.height for image in images))
    canvas, left = Image.new("RGB", size, BACKGROUND), 0
    for image, width in zip(images, widths, strict=True):
        canvas.paste(image, (left, canvas.height - image.height))
        left += width + gap
    return canvas


def stacked(images: Sequence[Image.Image], gap: int = 2 * GAP, margin: int = GAP) -> Image.Image:
    """One below the other, left edges aligned, with a margin around."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (max(image.width for image in images) + 2 * margin, height + 2 * margin), BACKGROUND)
    top = margin
    for image in images:
        canvas.paste(image, (margin, top))
        top += image.height + gap
    return canvas


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` saturated RGB colours; the same first ones whatever the count."""
    colours = (
        colorsys.hsv_to_rgb(index * GOLDEN % 1, 1 - 0.35 * (index % 2), 1 - 0.2 * (index % 3 == 2))
        for index in range(count)
    )
    return [tuple(round(255 * value) for value in colour) for colour in colours]
