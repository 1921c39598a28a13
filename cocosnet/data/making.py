"""One photograph to its prepared files: picture, condition, feature vector.

A stamp says what each of the three was made of, so that a changed option makes again only what it touches.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocosnet.config import Config, DataConfig
from cocosnet.data import crop
from cocosnet.data.conditions import condition_filter, labels_to_image
from cocosnet.data.extractors import BUILT_IN, READY_MADE, WORK_SIDE, Extractor, get_extractor
from cocosnet.data.images import load_gray, load_rgb, resize_shorter, save_image, shown
from cocosnet.data.labels import UNKNOWN, read_labels
from cocosnet.data.pose import Pose, read_pose, write_pose
from cocosnet.data.records import Record
from cocosnet.data.sources import Item, digest
from cocosnet.errors import DataError
from cocosnet.files import atomic_write

IMAGES, CONDITIONS, STAMPS, FEATURES = "images", "conditions", ".stamps", ".features"
SQUARE_BY_FACE = ("face", "align")


@dataclass(frozen=True)
class Made:
    """What became of an item: its record without an exemplar, and the highest class index of its label map."""

    index: int
    record: Record
    top: int = -1


@dataclass
class Frame:
    """The part of a photograph that is used, and how it is brought to its size.

    size: (width, height) of the photograph as decoded; box or corners: px of it, at most one of them; corners
    are cut to a square of `side` px.
    """

    size: tuple[int, int]
    box: crop.Box | None = None
    corners: np.ndarray | None = None
    side: int = 0

    def apply(
        self, image: Image.Image, fill: int, resample: Image.Resampling = Image.Resampling.BICUBIC
    ) -> Image.Image:
        """That part of a picture of the photograph's proportions, at the picture's own resolution."""
        scale = np.array(image.size) / self.size
        if self.corners is not None:
            return crop.cut(image, self.corners * scale, self.side, resample)
        if self.box is None:
            return image
        box = tuple(int(round(value)) for value in np.array(self.box) * np.tile(scale, 2))
        ground = Image.new(image.mode, (box[2] - box[0], box[3] - box[1]), (fill,) * len(image.getbands()))
        ground.paste(image, (-box[0], -box[1]))
        return ground

    def points(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Points ..,2 in px of the photograph, in px of the part at (width, height) `size`."""
        if self.corners is not None:
            return crop.into_square(points, self.corners, size[0])
        left, top, right, bottom = self.box or (0, 0, *self.size)
        return (points - (left, top)) * (np.array(size) / (right - left, bottom - top))


@dataclass
class Maker:
    """Makes items by their position. It can be sent to another process; networks are loaded where it is first used."""

    items: list[Item]
    output: Path
    config: Config
    extractor: str | None  # by name; None where conditions are label maps
    device: str = "cpu"
    overwrite: bool = False
    palette: np.ndarray | None = None
    _networks: dict[str, Extractor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the networks."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("provenance", "_common")}
        return state | {"_networks": {}}

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def data(self) -> DataConfig:
        """How pictures become tensors."""
        return self.config.data

    def network(self, task: str) -> Extractor:
        """The extractor of conditions, landmarks or features. Raises as `get_extractor` does."""
        if task not in self._networks:
            names = {"landmarks": self.data.landmarks, "features": self.config.prepare.features}
            self._networks[task] = get_extractor(names.get(task, self.extractor), self.device, task)
        return self._networks[task]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What goes into records as condition_source."""
        if self.extractor is None:
            source = {"network": "none", "labels": f"{self.config.prepare.kind} maps"}
            return source if self.palette is None else source | {"palette": digest(self.palette.tolist())}
        return self.network(self.data.task).provenance

    @property
    def ready_made(self) -> bool:
        """Whether conditions come from files."""
        return self.extractor is None or self.extractor == READY_MADE.get(self.data.task)

    @property
    def retrieves(self) -> bool:
        """Whether feature vectors are needed."""
        return self.config.prepare.pairs == "retrieval"

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What the stamps of all items share, by part."""
        image = [self.data.size, self.data.crop]
        image += [self.config.prepare.pad_value] if self.data.crop == "pad" else []
        if self.data.crop in SQUARE_BY_FACE and self.data.landmarks in BUILT_IN["landmarks"]:
            image.append(self.network("landmarks").provenance)
        features = self.network("features").provenance if self.retrieves else None
        condition = [self.data.task, self.provenance, self.config.prepare.kind, self.config.prepare.pose_canvas]
        return {"image": image, "condition": condition, "feature": features}

    def paths(self, item: Item) -> dict[str, Path]:
        """Where the item's parts and its stamp lie."""
        suffix = "json" if self.data.task == "pose" else "png"
        return {
            "image": self.output / IMAGES / f"{item.id}.png",
            "condition": self.output / CONDITIONS / f"{item.id}.{suffix}",
            "feature": self.output / FEATURES / f"{item.id}.npy",
            "stamp": self.output / STAMPS / f"{item.id}.json",
        }

    def stale(self, item: Item) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """What the parts would be made of, the stamp that is there, and the parts to make. Raises DataError."""
        paths, old = self.paths(item), self._old_stamp(item)
        points = None if item.points is None else item.points.tolist()
        image = digest([self._common["image"], item.relative, _file_state(item.photo), points])
        labels = [_file_state(path) for path in item.labels]
        new = {"image": image, "condition": digest([image, self._common["condition"], labels])}
        if self.retrieves:
            new["feature"] = digest([image, self._common["feature"]])
        parts = [part for part in new if self.overwrite or old.get(part) != new[part] or not paths[part].is_file()]
        return new, old, parts

    def __getitem__(self, index: int) -> Made:
        """Make the item, or find that it is up to date; what cannot be made becomes an error record."""
        item, start = self.items[index], time.monotonic()
        extra = {"source": shown(item.relative), "split": item.split, "condition_source": self.provenance}
        try:
            new, old, parts = self.stale(item)
            if parts:
                old = self._make(item, new, old, parts)
        except DataError as error:
            message = str(error) if shown(item.photo) in str(error) else f"{shown(item.photo)}: {error}"
            return Made(index, Record(item.id, status="error", error=message, seconds=_since(start), extra=extra))
        paths = self.paths(item)
        record = Record(
            item.id,
            condition=str(paths["condition"]),
            target=str(paths["image"]),
            status="ok" if parts else "skipped",
            seconds=_since(start),
            extra=extra | old.get("extra", {}),
        )
        return Made(index, record, old.get("top", -1))

    def _old_stamp(self, item: Item) -> dict[str, Any]:
        try:
            stamp = json.loads(self.paths(item)["stamp"].read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _make(self, item: Item, new: dict[str, str], old: dict[str, Any], parts: list[str]) -> dict[str, Any]:
        """Make `parts`; the stamp is taken away first and written last, so that it never says too much."""
        paths = self.paths(item)
        paths["stamp"].unlink(missing_ok=True)
        stamp = {**new, "top": old.get("top", -1), "extra": old.get("extra", {})}
        if parts == ["feature"]:
            picture = load_rgb(paths["image"])
        else:
            picture, stamp = self._make_pictures(item, paths, stamp, parts)
        if "feature" in parts:
            _save_vector(self.network("features")(picture), paths["feature"])
        atomic_write(paths["stamp"], json.dumps(stamp))
        return stamp

    def _make_pictures(
        self, item: Item, paths: dict[str, Path], stamp: dict[str, Any], parts: list[str]
    ) -> tuple[Image.Image, dict[str, Any]]:
        whole = self.data.crop in SQUARE_BY_FACE or (self.data.task == "pose" and self.ready_made)
        image = load_rgb(item.photo, shorter=None if whole else max(self.data.size, WORK_SIDE))
        frame = self._frame(item, image)
        part = frame.apply(image, self.config.prepare.pad_value)
        picture = resize_shorter(part, self.data.size)
        if "condition" in parts:
            condition, top = self._condition(item, frame, part, picture.size)
            _save_condition(condition, paths["condition"])
            stamp = {**stamp, "top": top, "extra": _crop_record(frame, self.data)}
        if "image" in parts:
            save_image(picture, paths["image"])
        return picture, stamp

    def _frame(self, item: Item, image: Image.Image) -> Frame:
        if self.data.crop in SQUARE_BY_FACE:
            points = self._points(item, image)
            if self.data.crop == "face":
                return Frame(image.size, box=crop.face_box(image.size, points))
            return Frame(image.size, corners=crop.face_corners(points), side=max(self.data.size, WORK_SIDE))
        boxes = {"square": crop.square_box, "pad": crop.pad_box}
        return Frame(image.size, box=boxes[self.data.crop](image.size) if self.data.crop in boxes else None)

    def _points(self, item: Item, image: Image.Image) -> np.ndarray:
        if item.points is not None:
            return item.points
        if self.data.landmarks == "auto" or self.data.landmarks in BUILT_IN["landmarks"]:
            return self.network("landmarks")(image)
        raise DataError(f"has no landmarks in {shown(self.data.landmarks)}; add them or use another data.crop")

    def _condition(
        self, item: Item, frame: Frame, part: Image.Image, size: tuple[int, int]
    ) -> tuple[Image.Image | Pose, int]:
        """The condition at (width, height) `size`, and the highest class index of a label map."""
        if not self.ready_made:
            return self._extracted(item, frame, part), -1
        if not item.labels:
            raise DataError("no condition file has this name in the labels folder; add it or remove the photograph")
        if self.data.task == "pose":
            return self._given_pose(item, frame, size), -1
        if self.data.task == "edge":
            edges = load_gray(item.labels[0])
            self._check_proportions(item, frame, edges.size)
            return self._resized(frame, edges, size, 0), -1
        labels = read_labels(item.labels, self.config.prepare.kind, self.palette)
        image = labels_to_image(labels)
        self._check_proportions(item, frame, image.size)
        top = int(labels[labels != UNKNOWN].max(initial=-1))
        return self._resized(frame, image, size, UNKNOWN), top

    def _resized(self, frame: Frame, image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
        """The frame's part of a ready-made condition, resized once where the frame is an upright box inside."""
        resample = condition_filter(self.data)
        if frame.corners is None and self.data.crop != "pad":
            return image.resize(size, resample, box=_scaled(frame.box, frame.size, image.size))
        return frame.apply(image, fill, resample).resize(size, resample)

    def _extracted(self, item: Item, frame: Frame, part: Image.Image) -> Image.Image | Pose:
        network = self.network(self.data.task)
        if getattr(network, "wants_points", False) and item.points is not None:
            return network(part, self.data.size, points=frame.points(item.points, part.size))
        return network(part, self.data.size)

    def _given_pose(self, item: Item, frame: Frame, size: tuple[int, int]) -> Pose:
        side = self.config.prepare.pose_canvas
        pose = read_pose(item.labels[0], (side, side) if side else frame.size)
        if not len(pose.people):
            raise DataError(f"{shown(item.labels[0])}: nobody is in it; add a pose or remove the photograph")
        if side:
            return pose.resize(size)
        if pose.size != frame.size:
            pose = pose.resize(frame.size)
        return pose.mapped(lambda points: frame.points(points, size), size)

    def _check_proportions(self, item: Item, frame: Frame, size: tuple[int, int]) -> None:
        if abs(size[0] * frame.size[1] / (size[1] * frame.size[0]) - 1) > 0.02:
            raise DataError(
                f"is {frame.size[0]}x{frame.size[1]} px but {shown(item.labels[0])} is {size[0]}x{size[1]}; "
                "they must have the same proportions"
            )


def _crop_record(frame: Frame, data: DataConfig) -> dict[str, Any]:
    """What a record says of a cut-out face: its corners in px of the upright photograph, so that it can be put back."""
    if data.crop not in SQUARE_BY_FACE:
        return {}
    corners = crop.box_corners(frame.box) if frame.corners is None else frame.corners
    return {"crop": {"corners": np.round(corners, 3).tolist(), "size": list(frame.size)}}


def _scaled(box: crop.Box | None, full: tuple[int, int], size: tuple[int, int]) -> tuple[float, ...] | None:
    """A box of a picture of size `full` in px of a picture of size `size`."""
    if box is None:
        return None
    across, down = size[0] / full[0], size[1] / full[1]
    return box[0] * across, box[1] * down, min(box[2] * across, size[0]), min(box[3] * down, size[1])


def _save_condition(condition: Image.Image | Pose, path: Path) -> None:
    if isinstance(condition, Pose):
        write_pose(condition, path)
    else:
        save_image(condition, path)


def _save_vector(vector: np.ndarray, path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, vector.astype(np.float32))
    atomic_write(path, stream.getvalue())


def load_vector(path: Path) -> np.ndarray:
    """A feature vector that `Maker` wrote. Raises DataError where it is damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{shown(path)}: this feature vector is damaged; remove the file and prepare again") from error


def without_status(record: Record) -> Record:
    """A record as the manifest has it: it tells of the folder, not of one run."""
    return dataclasses.replace(record, status="ok", seconds=None)


def _file_state(path: Path) -> list[int]:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot read this file: {error.strerror}; check its permissions") from error
    return [state.st_size, state.st_mtime_ns]


def _since(start: float) -> float:
    return round(time.monotonic() - start, 4)
