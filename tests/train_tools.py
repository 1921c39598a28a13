"""What the tests of training share: a small prepared folder, and the tiny preset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cocosnet.config import Config, load_config
from cocosnet.data.records import MANIFEST_NAME, Record, write_manifest

QUICK = ("train.images=8", "train.save_images=4", "train.sample_images=8", "train.log_images=2")


def tiny(*overrides: str) -> Config:
    """The preset tiny-cpu for a run of four steps, with `section.key=value` changes."""
    return load_config("tiny-cpu", [*QUICK, *overrides])


def prepared_folder(folder: Path, count: int = 7, held_out: int = 2) -> Path:
    """Pictures of one coloured disc each, 40x44 px, with its outline as condition; the exemplar is the next picture."""
    records = [_pair(folder, index, count) for index in range(count)]
    for record in records[count - held_out :]:
        record.extra["split"] = "val"
    write_manifest(folder / MANIFEST_NAME, records)
    return folder


def _pair(folder: Path, index: int, count: int) -> Record:
    random = np.random.default_rng(index)
    rows, columns = np.mgrid[0:44, 0:40]
    distance = np.hypot(rows - random.uniform(16, 28), columns - random.uniform(14, 26))
    radius, colour, ground = random.uniform(8, 13), random.integers(0, 255, 3), random.integers(0, 255, 3)
    image = np.where((distance < radius)[..., None], colour, ground) + random.normal(0, 6, (44, 40, 3))
    edges = np.clip(255 - 120 * np.abs(distance - radius), 0, 255)
    _write(folder / "images" / f"{index}.png", image)
    _write(folder / "conditions" / f"{index}.png", edges)
    own, other = f"{index}.png", f"{(index + 1) % count}.png"
    return Record(
        id=str(index),
        target=str(folder / "images" / own),
        condition=str(folder / "conditions" / own),
        exemplar=str(folder / "images" / other),
        exemplar_condition=str(folder / "conditions" / other),
    )


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
