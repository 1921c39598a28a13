"""A folder of photographs becomes a prepared folder: pictures, conditions, pairs.

    output/images/ID.png       the photograph, cropped, its shorter side of data.size px
    output/conditions/ID.png   its edges or labels, same size
    output/manifest.jsonl      one pair a picture: its condition, and another picture of the set as exemplar
    output/dataset.json        what was done: task, size, classes, extractor, options
    output/.stamps/ID.json     what an item was made of; an item whose stamp still holds is not made again

Every file is written whole or not at all, and a stamp only after its item, so the work may be killed at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocosnet.config import Config, DataConfig
from cocosnet.data.conditions import labels_to_image
from cocosnet.data.crop import Box, face_box, load_landmarks, square_box
from cocosnet.data.extractors import WORK_SIDE, Extractor, get_extractor
from cocosnet.data.images import find_images, load_gray, load_labels, load_rgb, resize_shorter, save_image, shown
from cocosnet.data.records import MANIFEST_NAME, Record, write_manifest
from cocosnet.errors import ConfigError, DataError
from cocosnet.files import atomic_write

SCHEMA = "cocosctl.dataset/1"
DATASET_NAME = "dataset.json"
IMAGES, CONDITIONS, STAMPS = "images", "conditions", ".stamps"
LONGEST_ID = 80  # characters before the hash
IGNORED_LABEL = 255  # index that label maps use for "no class"; it does not count when classes are counted


@dataclass(frozen=True)
class Item:
    """One photograph to prepare."""

    id: str
    photo: Path
    relative: str  # to the source folder, with /
    label: Path | None = None  # label map or ready-made edges, where the task needs one
    points: np.ndarray | None = None  # 68,2 landmarks


def prepare(
    source: Path,
    output: Path,
    config: Config,
    *,
    limit: int | None = None,
    overwrite: bool = False,
    labels: Path | None = None,
    extractor: str = "auto",
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[Record]:
    """Prepare the photographs below `source` into `output`, yielding a record as each is done, in order of their names.

    A record has absolute paths: condition, exemplar and exemplar_condition (another picture of the set, chosen by
    `seed`, already prepared; absent where there is no other) and target (the photograph itself). Extra keys: source,
    split and condition_source (the extractor's provenance). Status is ok, skipped (was up to date) or error; an error
    stops nothing. The manifest (good pairs only) and dataset.json are written when the last record was taken.

    Args:
        source: folder of photographs; where it has a folder `photos`, that one.
        limit: take only the first so many photographs.
        overwrite: make everything again.
        labels: folder of label maps (task mask) or edge pictures (extractor image) with the photographs' names; by
            default source/labels.
        extractor: edge extractor; `auto` defers to config.data.edges.

    Raises:
        DataError: no photographs, no labels where they are needed, or another run is at work on `output`.
        ConfigError: an unknown extractor, a task without support, or face crops without landmarks.
        MissingWeights: the chosen extractor's weights are not here.
    """
    source, output = Path(source).absolute(), Path(output).absolute()
    name = extractor if extractor != "auto" else config.data.edges
    maker = _condition_maker(config.data, name, device)
    items = find_items(source, output, config.data, _label_folder(source, labels, config.data, maker))[:limit]
    return _Preparation(items, output, config.data, maker, overwrite, seed).run()


def find_items(source: Path, output: Path, data: DataConfig, labels: Path | None) -> list[Item]:
    """The photographs below `source` with their ids, label maps and landmarks, sorted by name.

    Raises:
        DataError: no photographs, or unreadable landmarks.
        ConfigError: data.crop is face but data.landmarks names no file.
    """
    if not source.is_dir():
        raise DataError(f"{shown(source)}: no such folder; give the folder that holds the photographs")
    root = source / "photos" if (source / "photos").is_dir() else source
    photos = [
        photo for photo in find_images(root, exclude=output) if labels in (None, root) or labels not in photo.parents
    ]
    if not photos:
        raise DataError(f"{shown(source)}: holds no pictures; give a folder of PNG, JPEG or WebP files")
    if data.crop == "face" and not data.landmarks:
        raise ConfigError("data.crop=face needs data.landmarks, a JSON file of 68 points a picture")
    points = load_landmarks(data.landmarks) if data.crop == "face" else {}
    maps = {_stem(path, labels): path for path in find_images(labels)} if labels else {}
    relatives = [photo.relative_to(root).as_posix() for photo in photos]
    return [
        Item(name, photo, relative, maps.get(_stem(photo, root)), points.get(relative, points.get(photo.name)))
        for name, photo, relative in zip(make_ids(relatives), photos, relatives)
    ]


def make_ids(names: list[str]) -> list[str]:
    """An id for each relative path: its stem, where that is plain and only one has it; else cleaned, plus a short hash.

    Ids are unique, also where upper and lower case are one, and are safe as file names.
    """
    stems = [name.rpartition(".")[0] for name in names]
    count = Counter(stem.lower() for stem in stems)
    return [
        stem if _is_plain(stem) and count[stem.lower()] == 1 else _hashed(stem, name)
        for stem, name in zip(stems, names)
    ]


def _is_plain(stem: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", stem) is not None and len(stem) <= LONGEST_ID


def _hashed(stem: str, name: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", stem).strip("-.")[:LONGEST_ID] or "picture"
    return f"{slug}-{_digest(name)[:8]}"


def _digest(value: Any) -> str:
    """Stable hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def split_of(name: str, val_fraction: float) -> str:
    """`val` for about `val_fraction` of all ids, else `train`; the id alone decides."""
    return "val" if int(_digest(name)[:8], 16) / 2**32 < val_fraction else "train"


def count_classes(labels: Path) -> int:
    """Highest index of all label maps in a folder plus one; 255 ("no class") is left out. Raises DataError."""
    highest = -1
    for path in find_images(labels):
        indices = load_labels(path)
        highest = max(highest, int(indices[indices != IGNORED_LABEL].max(initial=-1)))
    return highest + 1


def _condition_maker(data: DataConfig, name: str, device: str) -> Extractor | None:
    """The extractor of the task's conditions; None where they are label maps."""
    if data.task == "mask":
        return None
    if data.task != "edge":
        raise ConfigError(f"data.task={data.task} cannot be prepared yet; use edge or mask")
    return get_extractor(name, device)


def _label_folder(source: Path, labels: Path | None, data: DataConfig, maker: Extractor | None) -> Path | None:
    """Where ready-made conditions lie, None where none are needed."""
    if maker is not None and maker.name != "image":
        return None
    folder = Path(labels).absolute() if labels is not None else source / "labels"
    if not folder.is_dir():
        raise DataError(f"{shown(folder)}: no such folder; give the one with a condition picture for each photograph")
    return folder


def _stem(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


class _Preparation:
    """One run over the items; what is made is remembered, because an item is its own target and another's exemplar."""

    def __init__(
        self, items: list[Item], output: Path, data: DataConfig, maker: Extractor | None, overwrite: bool, seed: int
    ) -> None:
        self.items, self.output, self.data, self.maker = items, output, data, maker
        self.overwrite, self.seed = overwrite, seed
        self.provenance = maker.provenance if maker else {"network": "none", "labels": "index maps"}
        self.options = _digest([data.task, data.size, data.crop, self.provenance])
        self.made: dict[int, Record] = {}
        self.next = _cycle(len(items), seed)

    def run(self) -> Iterator[Record]:
        with _only_one(self.output):
            _remove_leftovers(self.output)
            records = []
            for index in range(len(self.items)):
                records.append(self._pair(index))
                yield records[-1]
            self._write_summary([record for record in records if not record.failed])

    def _pair(self, index: int) -> Record:
        """The item's record, with the first good picture after it in the cycle as exemplar."""
        record, other = self._item(index), self.next[index]
        while not record.failed and other != index:
            exemplar = self._item(other)
            if not exemplar.failed:
                return dataclasses.replace(record, exemplar=exemplar.target, exemplar_condition=exemplar.condition)
            other = self.next[other]
        return record

    def _item(self, index: int) -> Record:
        if index not in self.made:
            self.made[index] = self._make_or_skip(self.items[index])
        return self.made[index]

    def _make_or_skip(self, item: Item) -> Record:
        start = time.monotonic()
        extra = {
            "source": shown(item.relative),
            "split": split_of(item.id, self.data.val_fraction),
            "condition_source": self.provenance,
        }
        target, condition = (self.output / kind / f"{item.id}.png" for kind in (IMAGES, CONDITIONS))
        stamp_path = self.output / STAMPS / f"{item.id}.json"
        try:
            stamp = self._stamp(item)
            fresh = not self.overwrite and target.is_file() and condition.is_file() and _read(stamp_path) == stamp
            if not fresh:
                stamp_path.unlink(missing_ok=True)
                self._make(item, target, condition)
                atomic_write(stamp_path, stamp)
        except DataError as error:
            message = str(error) if shown(item.photo) in str(error) else f"{shown(item.photo)}: {error}"
            return Record(item.id, status="error", error=message, seconds=_since(start), extra=extra)
        return Record(
            item.id,
            condition=str(condition),
            target=str(target),
            status="skipped" if fresh else "ok",
            seconds=_since(start),
            extra=extra,
        )

    def _stamp(self, item: Item) -> str:
        """All that decides an item's pictures, as JSON text."""
        files = [_file_state(path) for path in (item.photo, item.label) if path is not None]
        points = None if item.points is None else item.points.tolist()
        return json.dumps({"options": self.options, "source": item.relative, "files": files, "points": _digest(points)})

    def _make(self, item: Item, target: Path, condition: Path) -> None:
        seen = max(self.data.size, WORK_SIDE)
        image = load_rgb(item.photo, shorter=seen if self.data.crop != "face" else None)
        box = self._box(item, image.size)
        cut = image.crop(box) if box else image
        picture = resize_shorter(cut, self.data.size)
        save_image(self._condition(item, cut, image.size, box, picture.size), condition)
        save_image(picture, target)

    def _box(self, item: Item, size: tuple[int, int]) -> Box | None:
        if self.data.crop == "face":
            if item.points is None:
                raise DataError(f"has no landmarks in {shown(self.data.landmarks)}; add them or use another data.crop")
            return face_box(size, item.points)
        return square_box(size) if self.data.crop == "square" else None

    def _condition(
        self, item: Item, cut: Image.Image, full: tuple[int, int], box: Box | None, size: tuple[int, int]
    ) -> Image.Image:
        if self.maker is not None and self.maker.name != "image":
            return self.maker(cut, self.data.size)
        if item.label is None:
            raise DataError("no condition picture has this name in the labels folder; add it or remove the photograph")
        image = labels_to_image(load_labels(item.label)) if self.data.task == "mask" else load_gray(item.label)
        resample = Image.Resampling.NEAREST if self.data.task == "mask" else Image.Resampling.BILINEAR
        if abs(image.width * full[1] / (image.height * full[0]) - 1) > 0.02:
            raise DataError(
                f"is {full[0]}x{full[1]} px but {shown(item.label)} is {image.width}x{image.height}; "
                "they must have the same proportions"
            )
        return image.resize(size, resample, box=_scaled(box, full, image.size))

    def _write_summary(self, records: list[Record]) -> None:
        """Manifest and dataset.json tell of the folder, not of this run: no status but ok, no seconds."""
        classes = self.data.classes
        if self.data.task == "mask" and not classes:
            classes = count_classes(self.output / CONDITIONS)
        write_manifest(
            self.output / MANIFEST_NAME, [dataclasses.replace(record, status="ok", seconds=None) for record in records]
        )
        summary = {
            "schema": SCHEMA,
            "task": self.data.task,
            "size": self.data.size,
            "classes": classes,
            "pictures": len(records),
            "condition_source": self.provenance,
            "crop": self.data.crop,
            "val_fraction": self.data.val_fraction,
            "seed": self.seed,
        }
        atomic_write(self.output / DATASET_NAME, json.dumps(summary, indent=1) + "\n")


def _scaled(box: Box | None, full: tuple[int, int], size: tuple[int, int]) -> tuple[float, ...] | None:
    """A box of a picture of size `full` in px of a picture of size `size`."""
    if box is None:
        return None
    across, down = size[0] / full[0], size[1] / full[1]
    return box[0] * across, box[1] * down, min(box[2] * across, size[0]), min(box[3] * down, size[1])


def _cycle(count: int, seed: int) -> list[int]:
    """For each of `count` pictures another one, along one closed round through all (a picture alone gets itself)."""
    order = np.random.default_rng(seed).permutation(count)
    following = np.empty(count, dtype=int)
    following[order] = np.roll(order, -1)
    return following.tolist()


def _file_state(path: Path) -> list[int]:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot read this file: {error.strerror}; check its permissions") from error
    return [state.st_size, state.st_mtime_ns]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _since(start: float) -> float:
    return round(time.monotonic() - start, 4)


@contextlib.contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a killed process. Raises DataError where it is held."""
    try:
        import fcntl
    except ImportError:  # not on Windows; two runs at once are then the user's own affair
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        stream = open(output / ".lock", "w")
    except OSError as error:
        raise DataError(f"{shown(output)}: cannot write here: {error.strerror}; choose another folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{shown(output)}: another prepare is at work on this folder; wait for it") from error
        yield


def _remove_leftovers(output: Path) -> None:
    """Temporary files of a run that was killed."""
    for folder in (output, *(output / name for name in (IMAGES, CONDITIONS, STAMPS))):
        for path in folder.glob(".tmp-*"):
            path.unlink(missing_ok=True)
