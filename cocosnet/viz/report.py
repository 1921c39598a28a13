"""One HTML page that shows what became of every pair: no scripts, no network, light or dark as the reader's system is.

Pictures are put into the page itself (one file to send around) or linked by relative paths (a small page beside its
pictures). The page is written row by row, and browsers load pictures only when they come into view, so that thousands
of rows are no trouble.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

import numpy as np
from PIL import Image

from cocosnet.data.images import load_rgb, shorter_size
from cocosnet.data.labels import UNKNOWN
from cocosnet.data.pose import POSE_SUFFIXES, Pose, draw_skeleton, read_pose
from cocosnet.data.records import Record
from cocosnet.errors import DataError
from cocosnet.files import atomic_path
from cocosnet.viz.canvas import distinct_colors

SIDES = ((300, 256), (1500, 128), (4000, 96))  # up to so many pairs: px, longer side of a picture inside the page
SMALLEST = 64  # px, beyond that
QUALITY = 88  # of JPEGs inside the page
COLUMNS = ("condition", "exemplar", "warp", "output", "target")
VALUE_DIGITS = 5  # significant digits of a metric
MOST_INDICES = 64  # grey levels from which on a picture is no map of class indices; those of more classes show as grey
WEB_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")  # formats that every browser shows

STYLE = """
:root { color-scheme: light dark;
  --ink: #1c1c1c; --faint: #6a6a6a; --ground: #fdfdfd; --line: #dedede; --bad: #a4262c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #9a9a9a; --ground: #161616; --line: #3a3a3a; --bad: #f1707b; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; max-width: 60rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; }
small, figcaption { color: var(--faint); font-size: .85rem; }
section { border-top: 1px solid var(--line); padding: .8rem 0; content-visibility: auto;
  contain-intrinsic-size: auto 320px; }
section h2 { font-size: .95rem; font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; }
img { display: block; height: auto; max-width: min(100%, 16rem); max-height: 16rem; width: auto; }
.bad { color: var(--bad); overflow-wrap: anywhere; }
"""


@dataclass
class Row:
    """One pair on the page.

    pictures: by column title, in the order of display; a file or a ready picture. error: what went wrong, if anything.
    """

    name: str
    pictures: Mapping[str, str | Path | Image.Image] = field(default_factory=dict)
    note: str = ""
    error: str | None = None


def row_of(record: Record) -> Row:
    """Condition, exemplar, warp, output and target of a record, those that it has.

    The extra keys "condition_image" (a drawn condition) and "warp", as `translate` leaves them, are used where present.
    """
    known = {name: getattr(record, name, None) for name in COLUMNS}
    known["condition"] = _named(record, "condition_image") or known["condition"]
    known["warp"] = _named(record, "warp")
    return Row(record.id, {name: path for name, path in known.items() if path}, error=record.error)


def _named(record: Record, key: str) -> str | None:
    """The file of an extra key, which a foreign record may use for anything."""
    found = record.extra.get(key)
    return found if isinstance(found, str) else None


def write_report(
    path: str | Path,
    rows: Iterable[Row | Record],
    title: str,
    notes: Iterable[str] = (),
    *,
    metrics: Mapping[str, Any] | None = None,
    embed: bool = True,
) -> None:
    """Write the page.

    Args:
        path: of the page, written atomically.
        rows: pairs, taken one at a time. A picture that cannot be read is named in its place; the rest goes on.
        title: heading and window title; plain text, as are all names (they are escaped).
        notes: paragraphs below the heading.
        metrics: what `cocosnet.metrics.evaluate` returned, shown as a table.
        embed: put reduced pictures into the page: about 30 kB each, and less where `rows` has a length and is long
            (`picture_side`). False links the files by paths relative to the page, and only ready or drawn pictures
            and formats that browsers do not know are put in.

    Raises:
        DataError: the page cannot be written.
    """
    folder = Path(path).absolute().parent
    side = picture_side(len(rows) if isinstance(rows, Sized) else 0)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as page:
        _write_head(page, title, notes, metrics)
        for row in rows:
            page.writelines(_section(row_of(row) if isinstance(row, Record) else row, folder, embed, side))
        page.write("</main>\n</body>\n</html>\n")


def picture_side(count: int) -> int:
    """px, longer side of the pictures inside a page of `count` pairs."""
    return next((side for limit, side in SIDES if count <= limit), SMALLEST)


def _write_head(page: TextIO, title: str, notes: Iterable[str], metrics: Mapping[str, Any] | None) -> None:
    heading = html.escape(title)
    page.write(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{heading}</h1>\n"
    )
    page.writelines(f"<p>{html.escape(note)}</p>\n" for note in notes)
    if metrics:
        page.writelines(metrics_table(metrics))


def metrics_table(result: Mapping[str, Any]) -> Iterator[str]:
    """The object of `evaluate` as a table."""
    yield "<table>\n<tr><th>metric</th><th>value</th><th>pairs</th><th>protocol</th></tr>\n"
    for name, entry in result["metrics"].items():
        value = "none" if entry["value"] is None else f"{entry['value']:.{VALUE_DIGITS}g}"
        remark = f"<br>{html.escape(entry['note'])}" if entry.get("note") else ""
        yield (
            f'<tr><td>{html.escape(name)}</td><td class="number">{value}</td>'
            f'<td class="number">{entry["count"]}</td>'
            f"<td><small>{html.escape(entry['protocol'])}{remark}</small></td></tr>\n"
        )
    yield f"</table>\n<p><small>{result['count']} pairs measured, {result['failed']} failed</small></p>\n"


def _section(row: Row, folder: Path, embed: bool, side: int) -> Iterator[str]:
    """One pair: name, note or error, and its pictures."""
    yield f"<section>\n<h2>{html.escape(row.name)}</h2>\n"
    if row.note:
        yield f"<p><small>{html.escape(row.note)}</small></p>\n"
    if row.error:
        yield f'<p class="bad">{html.escape(row.error)}</p>\n'
    yield '<div class="pictures">\n'
    for title, picture in row.pictures.items():
        yield f"<figure>{_picture(picture, title, row.name, folder, embed, side)}<figcaption>{html.escape(title)}"
        yield "</figcaption></figure>\n"
    yield "</div>\n</section>\n"


def _picture(picture: str | Path | Image.Image, title: str, name: str, folder: Path, embed: bool, side: int) -> str:
    """The img element, or why there is none."""
    try:
        image, as_it_is = shown_picture(title, picture, side if embed else None)
    except DataError as error:
        return f'<p class="bad">{html.escape(str(error))}</p>'
    link = as_it_is and not embed and Path(picture).suffix.lower() in WEB_SUFFIXES
    reduced = image if link else thumbnail(image, side)
    source = _relative(picture, folder) if link else data_uri(reduced)
    return (
        f'<img src="{source}" width="{reduced.width}" height="{reduced.height}" '
        f'alt="{html.escape(f"{title} of {name}")}" loading="lazy" decoding="async">'
    )


def shown_picture(
    title: str, picture: str | Path | Image.Image, shorter: int | None = None
) -> tuple[Image.Image, bool]:
    """A picture of a column as people can read it, mode RGB, and whether it is the file as it is.

    Among conditions a pose is drawn, and a map of class indices gets the colours of `condition_image`.

    Args:
        title: of the column.
        shorter: shorter side in px that the caller will reduce it to, as for `load_rgb`.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB"), False
    if title != "condition":
        return load_rgb(picture, shorter), True
    if Path(picture).suffix.lower() in POSE_SUFFIXES:
        return draw_skeleton(_reduced(read_pose(picture), shorter)), False
    image = load_rgb(picture, shorter)
    return (_coloured(image), False) if _shows_indices(image) else (image, True)


def _reduced(pose: Pose, shorter: int | None) -> Pose:
    """A pose of no more px than are shown: 4000x3000 px would take 5 s and 900 MB to draw."""
    return pose if shorter is None or min(pose.size) <= shorter else pose.resize(shorter_size(pose.size, shorter))


def _shows_indices(image: Image.Image) -> bool:
    """Whether a picture is grey, nearly black, and has steps between black and white that edges do not stop at."""
    if image.getcolors(MOST_INDICES + 1) is None:
        return False
    pixels = np.asarray(image)
    values = np.unique(pixels[..., 0])
    grey = (pixels == pixels[..., :1]).all()
    return bool(
        grey and len(np.setdiff1d(values, (0, UNKNOWN))) and not ((values >= MOST_INDICES) & (values < UNKNOWN)).any()
    )


def _coloured(image: Image.Image) -> Image.Image:
    palette = np.zeros((256, 3), np.uint8)
    palette[:MOST_INDICES] = distinct_colors(MOST_INDICES)
    return Image.fromarray(palette[np.asarray(image)[..., 0]])


def _relative(path: str | Path, folder: Path) -> str:
    """URL of a file as seen from the page's folder."""
    return html.escape(quote(os.fsencode(Path(os.path.relpath(os.path.abspath(path), folder)).as_posix())))


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy of mode RGB whose longer side is at most `side` px."""
    reduced = image.convert("RGB")
    reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
    return reduced


def data_uri(image: Image.Image) -> str:
    """The picture as a `data:` URL: JPEG, or PNG for at most 256 colours (edges, labels), which JPEG smears."""
    flat = image.getcolors(256) is not None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True) if flat else image.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
