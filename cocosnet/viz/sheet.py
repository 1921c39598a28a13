"""Contact sheets: rows of pictures with titles over the columns and captions under the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from cocosnet.viz.canvas import BACKGROUND, FAINT, GAP, INK, LINE, Picture, as_image, fit_height, font, shorten


def contact_sheet(
    rows: Sequence[Sequence[Picture | None]],
    *,
    titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    height: int = 128,
) -> Image.Image:
    """A grid of pictures.

    Args:
        rows: pictures row by row, each as `cocosnet.viz.canvas.as_image` takes them; None leaves a cell empty. Rows may
            differ in length.
        titles: one a column, drawn above the first row.
        captions: one a picture, row by row, drawn below it and cut to the column's width; shorter lists leave the rest
            without one.
        height: px, of every picture; smaller ones are enlarged without smoothing.

    Returns:
        mode RGB; a column is as wide as its widest picture.
    """
    cells = [[None if picture is None else fit_height(as_image(picture), height) for picture in row] for row in rows]
    widths = _column_widths(cells, titles)
    step = height + (LINE if captions else 0) + GAP
    top = GAP + (LINE if titles else 0)
    canvas = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), top + step * len(cells)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    lefts = [GAP + sum(widths[:column]) + GAP * column for column in range(len(widths))]
    for left, width, title in zip(lefts, widths, titles, strict=False):
        draw.text((left, GAP // 2), shorten(title, width), fill=INK, font=font())
    for index, row in enumerate(cells):
        for left, picture in zip(lefts, row, strict=False):
            if picture is not None:
                canvas.paste(picture, (left, top + index * step))
    for index, row in enumerate(captions[: len(cells)]):
        for left, width, caption in zip(lefts, widths, row, strict=False):
            draw.text((left, top + index * step + height + 2), shorten(caption, width), fill=FAINT, font=font())
    return canvas


def _column_widths(cells: Sequence[Sequence[Image.Image | None]], titles: Sequence[str]) -> list[int]:
    count = max([len(titles), *(len(row) for row in cells)])
    return [
        max([1, *(row[column].width for row in cells if column < len(row) and row[column] is not None)])
        for column in range(count)
    ]
