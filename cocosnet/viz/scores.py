"""One HTML page of an evaluation: the metrics, and every pair with its scores and pictures, to be sorted by score.

The page is one file that opens without a network. Pairs are data inside it, and a short script draws some of them at a
time, so that 10,000 pairs are no trouble to a browser; pictures get smaller the more there are (`picture_side`).
"""

from __future__ import annotations

import html
import io
import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from cocosnet.data.records import Record, finite
from cocosnet.errors import DataError
from cocosnet.files import atomic_path
from cocosnet.viz.report import STYLE, metrics_table, picture_side, row_of, shown_picture

QUALITY = 80  # of the WebP pictures inside the page

MORE_STYLE = """
.bar { position: sticky; top: 0; background: var(--ground); padding: .5rem 0; display: flex;
  gap: .6rem; flex-wrap: wrap; align-items: center; border-bottom: 1px solid var(--line); z-index: 1; }
.bar input, .bar select, .bar button { font: inherit; }
.pictures img { image-rendering: auto; min-width: 6rem; }
.scores { color: var(--faint); font-variant-numeric: tabular-nums; }
"""

SCRIPT = """
const PAGE = 30;
const $ = id => document.getElementById(id);
let order = [], page = 0;
const make = (tag, text, kind) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (kind) e.className = kind;
  return e;
};
const score = p => (p.scores[$('key').value] ?? null);
function arrange() {
  const key = $('key').value, sign = $('down').checked ? -1 : 1, words = $('find').value.toLowerCase();
  order = pairs.map((_, i) => i).filter(i => pairs[i].id.toLowerCase().includes(words));
  if (key) order.sort((a, b) => {
    const x = score(pairs[a]), y = score(pairs[b]);
    return x === null || y === null ? (x === null) - (y === null) || a - b : sign * (x - y) || a - b;
  });
  else if (sign < 0) order.reverse();
  page = 0; draw();
}
function draw() {
  const last = Math.max(0, Math.ceil(order.length / PAGE) - 1), list = $('pairs');
  page = Math.min(Math.max(page, 0), last);
  list.replaceChildren(...order.slice(page * PAGE, page * PAGE + PAGE).map(i => section(pairs[i])));
  $('where').textContent = order.length + ' pairs, page ' + (page + 1) + ' of ' + (last + 1);
  $('before').disabled = page === 0; $('after').disabled = page === last;
}
function section(p) {
  const s = make('section'), row = make('div', undefined, 'pictures');
  s.append(make('h2', p.id));
  const told = Object.entries(p.scores).map(([k, v]) => k + ' ' + (v === null ? 'none' : +v.toPrecision(5)));
  if (told.length) s.append(make('p', told.join('   '), 'scores'));
  if (p.error) s.append(make('p', p.error, 'bad'));
  for (const [title, source, fault] of p.pictures) {
    const f = make('figure');
    if (source) { const i = make('img'); i.src = source; i.alt = title + ' of ' + p.id; f.append(i); }
    else f.append(make('p', fault, 'bad'));
    f.append(make('figcaption', title)); row.append(f);
  }
  s.append(row); return s;
}
for (const key of keys) $('key').append(make('option', key));
for (const id of ['key', 'down']) $(id).onchange = arrange;
$('find').oninput = arrange;
$('before').onclick = () => { page--; draw(); scrollTo(0, 0); };
$('after').onclick = () => { page++; draw(); scrollTo(0, 0); };
arrange();
"""

CONTROLS = """<div class="bar">
<label>sort by <select id="key"><option value="">order of the records</option></select></label>
<label><input type="checkbox" id="down"> largest first</label>
<label>find <input id="find" size="12"></label>
<button id="before">previous</button> <button id="after">next</button> <small id="where"></small>
</div>
<noscript><p class="bad">The pairs below are drawn by a script inside this page; let it run to see them.</p></noscript>
<div id="pairs"></div>
"""


def write_scores_page(
    path: str | Path, records: Sequence[Record], result: Mapping[str, Any], advance: Callable[[], None] = lambda: None
) -> None:
    """Write the page, atomically.

    Args:
        path: of the page.
        records: with their scores in extra["scores"] (`Evaluation.rows`); failed ones show their error.
        result: what `Evaluation.run` returned.
        advance: called after each record.

    Raises:
        DataError: the page cannot be written. A picture that cannot be read is named in its place.
    """
    side = picture_side(len(records))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as page:
        _write_head(page, result)
        page.write("<script>\nconst pairs = [];\n")
        for record in records:
            page.write(f"pairs.push({script_json(_pair(record, side))});\n")
            advance()
        page.write(f"const keys = {script_json(_keys(records))};\n{SCRIPT}</script>\n</main>\n</body>\n</html>\n")


def _write_head(page: TextIO, result: Mapping[str, Any]) -> None:
    title = f"cocosctl eval, {result['count']} pairs"
    page.write(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    )
    page.writelines(metrics_table(result))
    notes = [*result["warnings"], *(f"{name} {entry['sha256']}" for name, entry in result["weights"].items())]
    page.writelines(f"<p><small>{html.escape(note)}</small></p>\n" for note in notes)
    page.write(CONTROLS)


def _pair(record: Record, side: int) -> dict[str, Any]:
    row = row_of(record)
    pictures = [[title, *_picture(title, picture, side)] for title, picture in row.pictures.items()]
    return {"id": row.name, "scores": _scores(record), "error": row.error, "pictures": pictures}


def _picture(title: str, path: str | Path, side: int) -> tuple[str | None, str | None]:
    """The picture as a data URL, or why there is none."""
    try:
        image, _ = shown_picture(title, path, side)
    except DataError as error:
        return None, str(error)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    flat = image.getcolors(256) is not None  # edges and labels, which lossy compression smears
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=flat, quality=QUALITY, method=2)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}", None


def _keys(records: Sequence[Record]) -> list[str]:
    """Names of all scores that occur, in their order."""
    return list(dict.fromkeys(name for record in records for name in _scores(record)))


def _scores(record: Record) -> dict[str, float | None]:
    """The record's scores, None for what is no number; in one that failed the key may be another program's."""
    found = finite(record.extra.get("scores"))
    found = found if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if value is None or isinstance(value, (int, float))}


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element or begin a comment."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
