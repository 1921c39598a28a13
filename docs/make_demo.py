"""The picture of the README, from what ships: `python docs/make_demo.py [MODEL]` (default `demo`)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from cocosnet.data.images import load_rgb, resize_shorter
from cocosnet.data.records import Record, read_manifest
from cocosnet.files import atomic_path
from cocosnet.inference import Translator
from cocosnet.viz.panels import condition_image
from cocosnet.viz.sheet import contact_sheet
from cocosnet.weights import packed_file

DOCS = Path(__file__).resolve().parent
ROWS = (  # two pairs side by side
    ("collins-as-morisot", "hopper-as-tanguy"),
    ("collins-as-manuel", "mona-lisa-as-hopper"),
    ("hopper-as-segoyewatha", "elizabeth-as-mona-lisa"),
)
TITLES = ("photograph", "its edges", "exemplar", "warp", "output")
SIDE = 128  # px


def main(model: str = "demo") -> None:
    """Photograph, edges, exemplar, finest warp and output of some of the demo's pairs."""
    translator = Translator(model, device="cpu", raw=True, size=SIDE)
    records = {record.id: record for record in read_manifest(str(packed_file("demo/manifest.jsonl")))}
    rows = [[cell for name in names for cell in strip(translator, records[name])] for names in ROWS]
    with atomic_path(DOCS / "demo.jpg") as path:
        contact_sheet(rows, titles=2 * TITLES, height=SIDE).save(path, quality=88)


@torch.inference_mode()
def strip(translator: Translator, record: Record) -> list[Image.Image | torch.Tensor]:
    """One pair, left to right."""
    pair = translator.load_pair(record)
    out = translator.model(pair.condition, pair.exemplar)
    edges, photo = condition_image(pair.condition[0]), resize_shorter(load_rgb(record.condition), SIDE)
    return [photo, edges, pair.exemplar[0], out.warps[-1][0], out.image[0]]


if __name__ == "__main__":
    main(*sys.argv[1:])
