"""One photograph to its prepared files: picture, condition, feature vector.

A stamp says what each of the three was made of, so that a changed option makes again only what it touches.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocosnet.config import Config, DataConfig
from cocosnet.data import crop
from cocosnet.data.conditions import EXTENDED_UNKNOWN, NO_CLASS, condition_filter, labels_to_image
from cocosnet.data.extractors import READY_MADE, WORK_SIDE, Extractor, get_extractor, names_detector
from cocosnet.data.images import check_not_thin, load_gray, load_rgb, resize_shorter, save_image, shown
from cocosnet.data.labels import UNKNOWN, read_labels
from cocosnet.data.pose import Pose, read_pose, write_pose
from cocosnet.data.records import Record
from cocosnet.data.sources import Item, digest
from cocosnet.errors import DataError, OutputError
from cocosnet.files import atomic_write

IMAGES, CONDITIONS, STAMPS, FEATURES = "images", "conditions", ".stamps", ".features"
METHOD = 2  # raised where the same options give other pictures or conditions, which are then made anew
SQUARE_BY_FACE = ("face", "align")
BATCH = 8  # pictures that a network on a GPU sees at once, where the config does not say


@dataclass(frozen=True)
class Made:
    """What became of an item: its record without an exemplar, the highest class index of its label map, and whether
    its picture was made just now from fewer px than it has."""

    index: int
    record: Record
    top: int = -1
    enlarged: bool = False


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

    @property
    def shorter(self) -> float:
        """px of the photograph on that part's shorter side."""
        if self.corners is not None:
            return float(np.hypot(*(self.corners[1] - self.corners[0])))
        left, top, right, bottom = self.box or (0, 0, *self.size)
        return min(right - left, bottom - top)

    def points(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Points ..,2 in px of the photograph, in px of the part at (width, height) `size`."""
        if self.corners is not None:
            return crop.into_square(points, self.corners, size[0])
        left, top, right, bottom = self.box or (0, 0, *self.size)
        return (points - (left, top)) * (np.array(size) / (right - left, bottom - top))


@dataclass
class _Job:
    """An item on its way: what is known of it after each step."""

    index: int
    item: Item
    start: float
    error: str = ""
    parts: list[str] = field(default_factory=list)  # to be made: image, condition, feature
    stamp: dict[str, Any] = field(default_factory=dict)
    picture: Image.Image | None = None  # as it is stored
    part: Image.Image | None = None  # the same, before it is reduced
    frame: Frame | None = None
    points: np.ndarray | None = None  # 68,2 landmarks, px of the photograph as decoded
    condition: Image.Image | Pose | None = None
    vector: np.ndarray | None = None


@dataclass
class Maker:
    """Makes items by their positions. It can be sent to another process; networks are loaded where they are used."""

    items: list[Item]
    output: Path
    config: Config
    extractor: str | None  # by name; None where conditions are label maps
    device: str = "cpu"
    overwrite: bool = False
    palette: np.ndarray | None = None
    sought: str = ""  # where ready-made conditions were looked for, in words
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

    @property
    def batch(self) -> int:
        """Pictures that a network sees at once."""
        return self.config.prepare.batch or (1 if self.device == "cpu" else BATCH)

    def network(self, task: str) -> Extractor:
        """The extractor of conditions, landmarks or features. Raises as `get_extractor` does."""
        if task not in self._networks:
            names = {"landmarks": self.data.landmarks or "auto", "features": self.config.prepare.features}
            self._networks[task] = get_extractor(names.get(task, self.extractor), self.device, task)
        return self._networks[task]

    def tasks(self) -> list[str]:
        """The networks that making all items may take."""
        by_need = {self.data.task: not self.ready_made, "features": self.retrieves, "landmarks": self.finds_points}
        return [task for task, needed in by_need.items() if needed]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What goes into records as condition_source."""
        if self.extractor is None:
            source = {"network": "none", "labels": f"{self.config.prepare.kind} maps"}
            return source if self.palette is None else source | {"palette": digest(self.palette.tolist())}
        found = self.network(self.data.task).provenance
        if not self.draws_faces:
            return found
        return found | {"landmarks": self.network("landmarks").provenance if self.finds_points else "from a file"}

    @property
    def ready_made(self) -> bool:
        """Whether conditions come from files."""
        return self.extractor is None or self.extractor == READY_MADE.get(self.data.task)

    @property
    def retrieves(self) -> bool:
        """Whether feature vectors are needed."""
        return self.config.prepare.pairs == "retrieval"

    @property
    def crops_faces(self) -> bool:
        """Whether landmarks say which part of a photograph is used."""
        return self.data.crop in SQUARE_BY_FACE

    @property
    def draws_faces(self) -> bool:
        """Whether landmarks are drawn into the condition."""
        return not self.ready_made and getattr(self.network(self.data.task), "wants_points", False)

    @property
    def finds_points(self) -> bool:
        """Whether landmarks are needed and come from a detector."""
        return (self.crops_faces or self.draws_faces) and names_detector(self.data.landmarks)

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What the stamps of all items share, by part."""
        image = [METHOD, self.data.size, self.data.crop]
        image += [self.config.prepare.pad_value] if self.data.crop == "pad" else []
        if self.crops_faces and self.finds_points:
            image.append(self.network("landmarks").provenance)
        features = self.network("features").provenance if self.retrieves else None
        condition = [self.data.task, self.provenance, self.config.prepare.kind, self.config.prepare.pose_canvas]
        return {"image": image, "condition": condition, "feature": features}

    @property
    def recipe(self) -> str:
        """A hash of how pictures and conditions are made."""
        return digest([self._common["image"], self._common["condition"]])

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
        if self.ready_made and not item.labels:
            raise DataError(f"no condition file has its name, sought {self.sought}; add it or remove the photograph")
        paths, old = self.paths(item), self._old_stamp(item)
        points = None if item.points is None else item.points.tolist()
        made_of = [self._common["image"], item.relative, _file_state(item.photo), points if self.crops_faces else None]
        image, labels = digest(made_of), [_file_state(path) for path in item.labels]
        drawn = points if self.draws_faces else None
        new = {"image": image, "condition": digest([image, self._common["condition"], labels, drawn])}
        if self.retrieves:
            new["feature"] = digest([image, self._common["feature"]])
        parts = [part for part in new if self.overwrite or old.get(part) != new[part] or not paths[part].is_file()]
        return new, old, parts

    def __getitem__(self, indices: list[int]) -> list[Made]:
        """Make the items, or find that they are up to date; what cannot be made becomes an error record.

        Raises:
            OutputError: the folder cannot be written.
        """
        jobs = [_Job(index, self.items[index], time.monotonic()) for index in indices]
        _each(jobs, self._look)
        todo = [job for job in jobs if job.parts]
        _each(todo, self._open)
        self._find("condition", [job for job in todo if "condition" in job.parts and not self.ready_made])
        self._find("vector", [job for job in todo if "feature" in job.parts])
        _each(todo, self._save)
        return [self._made(job) for job in jobs]

    def _made(self, job: _Job) -> Made:
        extra = {"source": shown(job.item.relative), "split": job.item.split, "condition_source": self.provenance}
        paths, seconds = self.paths(job.item), _since(job.start)
        if job.error:
            return Made(job.index, Record(job.item.id, status="error", error=job.error, seconds=seconds, extra=extra))
        record = Record(
            job.item.id,
            condition=str(paths["condition"]),
            target=str(paths["image"]),
            status="ok" if job.parts else "skipped",
            seconds=seconds,
            extra=extra | job.stamp.get("extra", {}),
        )
        enlarged = "image" in job.parts and job.frame.shorter < self.data.size
        return Made(job.index, record, job.stamp.get("top", -1), enlarged)

    def _old_stamp(self, item: Item) -> dict[str, Any]:
        try:
            stamp = json.loads(self.paths(item)["stamp"].read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _look(self, job: _Job) -> None:
        """What is to be made of the item."""
        new, old, job.parts = self.stale(job.item)
        job.stamp = {**new, "top": old.get("top", -1), "extra": old.get("extra", {})}

    def _open(self, job: _Job) -> None:
        """Decode the photograph, cut the frame, and read a ready-made condition."""
        if job.parts == ["feature"]:
            job.picture = load_rgb(self.paths(job.item)["image"])
            return
        image = load_rgb(job.item.photo, shorter=None if self._in_its_own_px else max(self.data.size, WORK_SIDE))
        job.points = self._points(job, image)
        job.frame = self._frame(image.size, job.points)
        job.part = job.frame.apply(image, self.config.prepare.pad_value)
        check_not_thin(job.part)
        job.picture = resize_shorter(job.part, self.data.size)
        if "condition" in job.parts:
            job.stamp |= {"top": -1, "extra": _crop_record(job.frame, self.data)}
            if self.ready_made:
                job.condition, job.stamp["top"] = self._given(job.item, job.frame, job.picture.size)

    @property
    def _in_its_own_px(self) -> bool:
        """Whether something counts in px of the photograph, so that it may not be decoded at a fraction of its size."""
        return self.crops_faces or self.draws_faces or (self.data.task == "pose" and self.ready_made)

    def _find(self, what: str, jobs: list[_Job]) -> None:
        """Let a network find the jobs' conditions or feature vectors, in several pictures at once where it can."""
        jobs = [job for job in jobs if not job.error]
        if not jobs:
            return
        network = self.network("features" if what == "vector" else self.data.task)
        if self.batch > 1 and hasattr(network, "many"):
            try:
                for job, answer in zip(jobs, network.many(**self._questions(what, jobs), batch=self.batch)):
                    setattr(job, what, answer)
                return
            except DataError:  # one of them is at fault; each for itself, it is known which
                pass
        _each(jobs, lambda job: setattr(job, what, self._found_alone(network, what, job)))

    def _found_alone(self, network: Extractor, what: str, job: _Job) -> Any:
        asked = self._questions(what, [job])
        if self.batch > 1 and hasattr(network, "many"):
            return network.many(**asked, batch=self.batch)[0]
        points = {name: values[0] for name, values in asked.items() if name == "points"}
        return network(asked["images"][0], asked["size"], **points)

    def _questions(self, what: str, jobs: list[_Job]) -> dict[str, Any]:
        """The arguments of an extractor's `many`."""
        if what == "vector":
            return {"images": [job.picture for job in jobs], "size": None}
        asked = {"images": [job.part for job in jobs], "size": self.data.size}
        if self.draws_faces:
            asked["points"] = [job.frame.points(job.points, job.part.size) for job in jobs]
        return asked

    def _save(self, job: _Job) -> None:
        """Write the parts; the stamp is taken away first and written last, so that it never says too much."""
        paths = self.paths(job.item)
        paths["stamp"].unlink(missing_ok=True)
        if "condition" in job.parts:
            _save_condition(job.condition, paths["condition"])
        if "image" in job.parts:
            save_image(job.picture, paths["image"])
        if "feature" in job.parts:
            _save_vector(job.vector, paths["feature"])
        atomic_write(paths["stamp"], json.dumps(job.stamp))

    def _frame(self, size: tuple[int, int], points: np.ndarray | None) -> Frame:
        if self.data.crop == "face":
            return Frame(size, box=crop.face_box(size, points))
        if self.data.crop == "align":
            return Frame(size, corners=crop.face_corners(points), side=max(self.data.size, WORK_SIDE))
        boxes = {"square": crop.square_box, "pad": crop.pad_box}
        return Frame(size, box=boxes[self.data.crop](size) if self.data.crop in boxes else None)

    def _points(self, job: _Job, image: Image.Image) -> np.ndarray | None:
        """The landmarks, where something is done with them."""
        if not self.crops_faces and not (self.draws_faces and "condition" in job.parts):
            return None
        if self.finds_points:
            return self.network("landmarks")(image)
        if job.item.points is None:
            raise DataError(f"has no landmarks in {shown(self.data.landmarks)}; add them or leave the picture out")
        crop.check_points(image.size, job.item.points)
        return job.item.points

    def _given(self, item: Item, frame: Frame, size: tuple[int, int]) -> tuple[Image.Image | Pose, int]:
        """The ready-made condition at (width, height) `size`, and the highest class index of a label map."""
        if self.data.task == "pose":
            return self._given_pose(item, frame, size), -1
        if self.data.task == "edge":
            edges = load_gray(item.labels[0])
            self._check_proportions(item, frame, edges.size)
            return self._resized(frame, edges, size, 0), -1
        labels = read_labels(item.labels, self.config.prepare.kind, self.palette)
        image = labels_to_image(labels)
        self._check_proportions(item, frame, image.size)
        top = int(labels[~np.isin(labels, NO_CLASS)].max(initial=-1))
        return self._resized(frame, image, size, UNKNOWN if image.mode == "L" else EXTENDED_UNKNOWN), top

    def _resized(self, frame: Frame, image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
        """The frame's part of a ready-made condition, resized once where the frame is an upright box inside."""
        resample = condition_filter(self.data)
        if frame.corners is None and self.data.crop != "pad":
            return image.resize(size, resample, box=_scaled(frame.box, frame.size, image.size))
        return frame.apply(image, fill, resample).resize(size, resample)

    def _given_pose(self, item: Item, frame: Frame, size: tuple[int, int]) -> Pose:
        side = self.config.prepare.pose_canvas
        pose = read_pose(item.labels[0], (side, side) if side else frame.size)
        if not pose.seen:
            raise DataError(f"{shown(item.labels[0])}: nobody is in it; add a pose or remove the photograph")
        if side and pose.width == pose.height:  # the padded square, in whatever px the file counts
            return pose.resize(size)
        if pose.size != frame.size:
            pose = pose.resize(frame.size)
        return pose.mapped(lambda points: frame.points(points, size), size)

    def _check_proportions(self, item: Item, frame: Frame, size: tuple[int, int]) -> None:
        if not _alike(frame.size, size):
            lying = "; was it made before the photograph was turned upright by its EXIF tag?"
            raise DataError(
                f"is {frame.size[0]}x{frame.size[1]} px but {shown(item.labels[0])} is {size[0]}x{size[1]}; "
                f"they must have the same proportions{lying if _alike(frame.size, size[::-1]) else ''}"
            )


def _alike(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes have the same proportions, rounding aside."""
    return abs(second[0] * first[1] / (second[1] * first[0]) - 1) <= 0.02


def _each(jobs: list[_Job], step: Callable[[_Job], None]) -> None:
    """Take `step` with every job that has not failed; what is wrong with one does not concern the others.

    Raises:
        OutputError: that concerns them all.
    """
    for job in jobs:
        if job.error:
            continue
        try:
            step(job)
        except OutputError:
            raise
        except DataError as error:
            name = shown(job.item.photo)
            job.error = str(error) if name in str(error) else f"{name}: {error}"


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
