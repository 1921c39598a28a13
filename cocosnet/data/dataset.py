"""A prepared folder as training pairs, decoded once and kept in memory as bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from cocosnet.config import Config
from cocosnet.data.conditions import condition_to_tensor, load_condition_image
from cocosnet.data.images import load_rgb, shown, to_tensor
from cocosnet.data.records import DATASET_NAME, Record, read_manifest
from cocosnet.errors import DataError

MEMORY = 2 << 30  # bytes of decoded pictures that one process keeps
WHOLE = 1.5  # times `data.size`: squares cut out of pictures of up to this size still show most of them


class PairDataset(Dataset):
    """The pairs of one split of a prepared folder; `dataset[i]` is always the same.

    An item is a dict: condition C,H,W float32 in [0,1]; image 3,H,W float32 in [-1,1]; exemplar and exemplar_condition
    of the same kinds (of another picture and its size, or None where the set has only one); id, text. Pictures have
    their whole prepared size; training crops them.
    """

    def __init__(self, folder: str | Path, config: Config, split: str = "train", memory: int = MEMORY) -> None:
        """Open the folder that `cocosctl prepare` made.

        Args:
            split: train or val, as the manifest says; records without a split belong to train.
            memory: bytes of decoded pictures to keep.

        Raises:
            DataError: no manifest, or the folder was prepared for another task or other classes than the config's.
        """
        self.folder, self.data, self.memory = Path(folder), config.data, memory
        check_prepared(self.folder, config)
        self.records = [
            record
            for record in read_manifest(self.folder)
            if not record.failed and record.extra.get("split", "train") == split
        ]
        self._kept: dict[str, np.ndarray] = {}
        self._used = 0

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair `index` with the exemplar of its record. Raises DataError where a file cannot be used."""
        record = self.records[index]
        return self._item(record, record.exemplar, record.exemplar_condition)

    def alone(self, index: int) -> dict[str, Any]:
        """The pair `index` without an exemplar, for a pseudo exemplar: nothing else is read."""
        return self._item(self.records[index], None, None)

    def with_exemplar(self, index: int, other: int) -> dict[str, Any]:
        """The pair `index` with picture `other` of this split as exemplar instead, for drawing exemplars anew."""
        exemplar = self.records[other]
        return self._item(self.records[index], exemplar.target, exemplar.condition)

    def _item(self, record: Record, exemplar: str | None, exemplar_condition: str | None) -> dict[str, Any]:
        alone = exemplar is None or exemplar_condition is None
        return {
            "id": record.id,
            "image": self._picture(record.target, record),
            "condition": self._condition(record.condition, record),
            "exemplar": None if alone else self._picture(exemplar, record),
            "exemplar_condition": None if alone else self._condition(exemplar_condition, record),
        }

    def _picture(self, path: str | None, record: Record) -> torch.Tensor:
        return to_tensor(Image.fromarray(self._pixels(path, record, "image")))

    def _condition(self, path: str | None, record: Record) -> torch.Tensor:
        if self.data.task == "pose" and path is not None:  # a few numbers: drawn anew each time rather than kept
            return condition_to_tensor(load_condition_image(path, self.data), self.data)
        return condition_to_tensor(Image.fromarray(self._pixels(path, record, "condition")), self.data)

    def _pixels(self, path: str | None, record: Record, kind: str) -> np.ndarray:
        """Decoded pixels of a file, kept as long as they fit."""
        if path is None:
            raise DataError(f"{shown(self.folder)}: pair {record.id} has no {kind}; prepare the folder again")
        if path in self._kept:
            return self._kept[path]
        image = load_rgb(path) if kind == "image" else load_condition_image(path, self.data)
        pixels = np.asarray(image)
        if self._used + pixels.nbytes <= self.memory:
            self._kept[path] = pixels
            self._used += pixels.nbytes
        return pixels


def read_summary(folder: str | Path) -> dict[str, Any]:
    """What `prepare` wrote into a folder's dataset.json: task, size, classes and more.

    Raises:
        DataError: missing or damaged.
    """
    path = Path(folder) / DATASET_NAME
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {
            **summary,
            "task": str(summary["task"]),
            "size": int(summary["size"]),
            "classes": int(summary["classes"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown(path)}: cannot read this summary; make the folder with `cocosctl prepare`") from error


def check_prepared(folder: str | Path, config: Config) -> None:
    """Refuse a folder that was prepared for another task, more classes, smaller pictures or by another edge extractor.

    A model would be told of other edges than it learned from: `translate --raw` finds those that its config names.

    A folder without dataset.json, made by other means, is taken on trust.

    Raises:
        DataError: the folder does not fit, or its dataset.json is damaged.
    """
    if not (Path(folder) / DATASET_NAME).exists():
        return
    summary, data = read_summary(folder), config.data
    misfits = (
        ("task", summary["task"] != data.task, f"prepared for task {summary['task']}, the config says {data.task}"),
        ("size", summary["size"] < data.size, f"prepared at {summary['size']} px, the config needs {data.size}"),
        (
            "classes",
            data.task == "mask" and summary["classes"] > data.classes,
            f"has {summary['classes']} classes, the config {data.classes}",
        ),
    )
    for key, wrong, text in misfits:
        if wrong:
            raise DataError(
                f"{shown(folder)}: {text}; add --set data.{key}={summary[key]}, or prepare the folder again"
            )
    made_by = _edges(summary)
    if made_by and data.edges not in ("auto", made_by):
        raise DataError(
            f"{shown(folder)}: its edges are by {made_by}, the config says {data.edges}; "
            f"add --set data.edges={made_by}, or prepare the folder again"
        )


def as_prepared(folder: str | Path, config: Config) -> Config:
    """The config with the extractor that made the folder's edges in place of `auto`, which elsewhere may be another.

    Raises:
        DataError: the folder's dataset.json is damaged.
    """
    made_by = _edges(read_summary(folder)) if (Path(folder) / DATASET_NAME).exists() else None
    if made_by is None or config.data.edges != "auto":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, edges=made_by))


def remarks(folder: str | Path, config: Config) -> list[str]:
    """A line for each way in which a folder is less than the config means, where training goes on all the same.

    That is: pictures so much larger than `data.size` that training would see small pieces of them, and pictures that
    are not cropped as the config says.

    Raises:
        DataError: the folder's dataset.json is damaged.
    """
    if not (Path(folder) / DATASET_NAME).exists():
        return []
    summary, data, found = read_summary(folder), config.data, []
    if summary["size"] > WHOLE * data.size:
        found.append(
            f"{shown(folder)}: its pictures are prepared at {summary['size']} px, and only squares of {data.size} px "
            f"of them are learned from; for whole ones prepare with --size {data.size}, or train with "
            f"--set data.size={summary['size']}"
        )
    crop = summary.get("crop", data.crop)
    if data.crop not in ("none", crop):
        found.append(
            f"{shown(folder)}: prepared with data.crop={crop}, and the config is meant for data.crop={data.crop}; if "
            f"results are poor, prepare with --set data.crop={data.crop}"
        )
    return found


def _edges(summary: dict[str, Any]) -> str | None:
    """The extractor of a summary's folder of edges; None where it does not say."""
    source = summary.get("condition_source")
    return source.get("network") if summary["task"] == "edge" and isinstance(source, dict) else None
