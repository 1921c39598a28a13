"""What may be wrong with a prepared folder, and a sheet of its pairs to look at."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.config import Config, DataConfig
from cocosnet.data.conditions import NO_CLASS, condition_to_tensor, load_condition_image
from cocosnet.data.dataset import read_summary
from cocosnet.data.images import load_rgb, shown
from cocosnet.data.pose import Pose
from cocosnet.data.records import Record, read_manifest
from cocosnet.errors import DataError
from cocosnet.viz.panels import condition_image
from cocosnet.viz.sheet import contact_sheet

logger = logging.getLogger(__name__)
SHEET_ROW = 192  # px, height of a row of the sheet
MOST_PAIRS = 500  # of the sheet, two a row


def data_of(folder: Path) -> DataConfig:
    """How the folder's conditions are to be read, from its dataset.json. Raises DataError."""
    summary = read_summary(folder)
    return dataclasses.replace(
        Config().data,
        task=summary["task"],
        size=summary["size"],
        classes=summary["classes"],
        pose_maps=str(summary.get("pose_maps", "limbs")),
    )


def find_faults(folder: str | Path) -> Iterator[Record]:
    """An error record for every pair of a prepared folder that cannot be trained on; its error names all faults.

    Looked for: missing and unreadable files, a condition of another size than its picture, pictures smaller than the
    dataset says, label indices that are neither a class nor "no class", poses without anyone, ids that come twice,
    pictures that are their own exemplar, and training pairs with a held-out exemplar. A warning tells of a manifest
    with another number of pairs than `prepare` made: someone chose among them, or it was cut off.

    Raises:
        DataError: no manifest or no dataset.json to check against.
    """
    folder = Path(folder)
    data, records, made = data_of(folder), read_manifest(folder), read_summary(folder).get("pictures")
    if made not in (None, len(records)):
        logger.warning("%s: its manifest has %d pairs, and %s were prepared", shown(folder), len(records), made)
    held_out = {record.target for record in records if record.extra.get("split") == "val"}
    seen: set[str] = set()
    for record in records:
        faults = [record.error or "bad record"] if record.failed else [*_faults(record, data, held_out)]
        if record.id in seen:
            faults.append("this id came before")
        seen.add(record.id)
        if faults:
            yield record.failure("; ".join(faults))


def _faults(record: Record, data: DataConfig, held_out: set[str | None]) -> Iterator[str]:
    if record.exemplar is not None and record.exemplar == record.target:
        yield "the picture is its own exemplar"
    if record.extra.get("split") == "train" and record.exemplar in held_out:
        yield "a training pair with a held-out exemplar"
    for name in ("exemplar", "exemplar_condition"):
        path = getattr(record, name)
        if path is not None and not Path(path).is_file():
            yield f"{name} {shown(path)} is missing"
    try:
        if record.target is None or record.condition is None:
            raise DataError("needs a target and a condition")
        yield from _own_faults(load_rgb(record.target), load_condition_image(record.condition, data), data)
    except DataError as error:
        yield str(error)


def _own_faults(image: Image.Image, condition: Image.Image | Pose, data: DataConfig) -> Iterator[str]:
    if min(image.size) < data.size:
        yield f"the picture is {image.width}x{image.height} px, smaller than the dataset's {data.size}"
    if condition.size != image.size:
        yield (
            f"the condition is {condition.size[0]}x{condition.size[1]} px, the picture {image.width}x{image.height} px"
        )
    if isinstance(condition, Pose):
        if not condition.seen:
            yield "nobody is in the pose"
    elif data.task == "mask":
        indices = np.unique(np.asarray(condition))
        beyond = [int(index) for index in indices if index >= data.classes and index not in NO_CLASS]
        if beyond:
            yield f"label indices {beyond[:5]} are not among the {data.classes} classes"


def draw_sheet(folder: str | Path, count: int = 24) -> Image.Image:
    """`count` pairs, evenly spread: picture, condition over it, condition, exemplar; mode RGB.

    At most MOST_PAIRS, which a JPEG holds. Pairs that cannot be read are left out. Raises DataError where none can.
    """
    folder = Path(folder)
    data, records = data_of(folder), [record for record in read_manifest(folder) if not record.failed]
    places = np.linspace(0, len(records) - 1, min(count, MOST_PAIRS)).round().astype(int)
    chosen = [records[place] for place in np.unique(places)]
    rows, captions = [], []
    for record in chosen:
        try:
            rows.append(_row(record, data))
            captions.append([record.id, record.extra.get("split", ""), "", Path(record.exemplar or "").stem])
        except (DataError, TypeError):
            continue
    if not rows:
        raise DataError(f"{shown(folder)}: holds no pair that can be drawn; prepare the folder again")
    half = (len(rows) + 1) // 2
    blank: list[Any] = [None] * 4
    pairs = list(zip(rows, rows[half:] + [blank] * (2 * half - len(rows))))
    texts = list(zip(captions, captions[half:] + [[""] * 4] * (2 * half - len(captions))))
    titles = ["picture", "both", "condition", "exemplar"] * 2
    return contact_sheet([a + b for a, b in pairs], titles=titles, captions=[a + b for a, b in texts], height=SHEET_ROW)


def _row(record: Record, data: DataConfig) -> list[Image.Image | None]:
    image = load_rgb(record.target)
    condition = load_condition_image(record.condition, data)
    tensor: torch.Tensor = condition_to_tensor(condition, data)
    drawn = condition_image(tensor).resize(image.size)
    exemplar = None if record.exemplar is None else load_rgb(record.exemplar)
    return [image, Image.blend(image, drawn, 0.55), drawn, exemplar]
