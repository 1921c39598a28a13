"""From files to files: what `translate` and `warp-visualize` do with one record.

A condition and an exemplar are read, brought to the working size, put through the network, and the picture is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat, PngImagePlugin
from torch import Tensor

from cocosnet.checkpoint import find_checkpoint, load_model
from cocosnet.config import DataConfig
from cocosnet.data.conditions import condition_filter, condition_to_tensor, load_condition_image
from cocosnet.data.extractors import Extractor, condition_extractor, extractor_names
from cocosnet.data.images import (
    check_file,
    check_format,
    check_not_thin,
    load_rgb,
    resize_shorter,
    save_image,
    shown,
    to_image,
    to_tensor,
)
from cocosnet.data.pose import Pose
from cocosnet.data.records import Record
from cocosnet.errors import ConfigError, DataError, memory_named
from cocosnet.files import atomic_path
from cocosnet.model.build import Model
from cocosnet.model.cocosnet import Output
from cocosnet.model.layers import fold_spectral_norms
from cocosnet.precision import autocast, full_float32, layout_of, precision_of
from cocosnet.weights import sha256_of

logger = logging.getLogger(__name__)

STAMP_KEY = "cocosctl.stamp"  # text chunk of a written PNG: what it was made of
STAMP = {"made_of", "extractor", "condition_source"}  # keys of that JSON
OF_OUTPUT = {"warp", "condition_image", "scores"}  # keys of a record that speak of its very output
FROM_FILE = {"network": "file"}  # how a ready-made condition came about
COLOURED = 12.0  # mean saturation (0..255) above which a picture is a photograph, not a grey edge map
LIGHT = 127.0  # mean (0..255) above which a grey picture is no edge map: HED's have about 50, a drawing on paper 230
MIN_SIDE = 8  # px; below it a picture has nothing to match


@dataclass
class Pair:
    """One pair as the network sees it: tensors with a batch of 1, and how the condition came about.

    extracted: whether a condition, or the exemplar's, was found in a photograph.
    """

    condition: Tensor
    exemplar: Tensor
    exemplar_condition: Tensor | None
    source: dict[str, Any]
    extracted: bool


class Translator:
    """Translates records with one checkpoint.

    Args:
        weights: a shipped name, a .safetensors file or a run folder.
        device: auto, cpu, cuda or cuda:N.
        raw: conditions are photographs; extract them on the way. For edge models a coloured picture is always taken
            as a photograph, since an edge map is grey.
        size: px, shorter side of the output; by default the model's own, or the condition's where that is smaller.
        keep_parts: also write each output's condition and full-resolution warp (OUT/.parts/ID.*.png), and name them in
            the record as condition_image and warp; nothing is skipped then.

    Raises:
        MissingWeights, CheckpointError, MissingDependency: as `load_model`.
        ConfigError: a size that is not positive.
    """

    def __init__(
        self,
        weights: str | Path,
        device: str = "auto",
        raw: bool = False,
        size: int | None = None,
        keep_parts: bool = False,
    ):
        if size is not None and size < 1:
            raise ConfigError(f"size must be at least 1 px, is {size}")
        self.checkpoint, self.raw, self.size, self.keep_parts = find_checkpoint(weights), raw, size, keep_parts
        self.fingerprint = sha256_of(self.checkpoint)  # first: outputs of what a training run puts here later are stale
        self.model: Model = load_model(self.checkpoint, device)
        fold_spectral_norms(self.model)
        self.device = next(self.model.parameters()).device

    @property
    def precision(self) -> torch.dtype:
        """The type that convolutions compute in."""
        return precision_of(self.model.config, self.device)

    @property
    def data(self) -> DataConfig:
        """How the model's pictures become tensors."""
        return self.model.config.data

    @cached_property
    def extractor(self) -> Extractor:
        """The extractor of edges or poses that the model was trained with; for ready-made poses any."""
        if self.data.task == "edge" and self.data.edges == "image":
            logger.warning(
                "%s: this model learned ready-made edges (data.edges: image), so a photograph's grey values are taken "
                "for its edges; give an edge map",
                shown(self.checkpoint),
            )
        return condition_extractor(self.data, self.device)

    def translate(self, record: Record, output: str | Path, overwrite: bool = False) -> Record:
        """Render one record to `output`; skipped where the file is there and was made of the same inputs.

        Raises:
            DataError: an input cannot be read, the memory does not suffice, or the output cannot be written.
        """
        check_format(output := Path(output))
        start, made_of = time.perf_counter(), self._digest(record)
        if not overwrite and (found := self._up_to_date(made_of, output)):
            return _handled(record, output, "skipped", None, found["condition_source"])
        pair, result = self._run(record)
        _save(to_image(result.image[0]), output, self._stamp(made_of, pair))
        parts = self._save_parts(pair, result, output) if self.keep_parts else {}
        done = _handled(record, output, "ok", round(time.perf_counter() - start, 3), pair.source)
        return dataclasses.replace(done, extra=done.extra | parts)

    def plan(self, record: Record, output: str | Path, overwrite: bool = False) -> Record:
        """What `translate` would do, without doing it: status ok (would be made) or skipped (is up to date).

        Raises:
            DataError: an input is not there, or the output's suffix names no format that is written.
        """
        for path in _inputs(record):
            check_file(path)
        self._check_task(record)
        check_format(output := Path(output))
        found = None if overwrite else self._up_to_date(self._digest(record), output)
        return dataclasses.replace(record, output=str(output), status="skipped" if found else "ok", seconds=None)

    def visualize(self, record: Record, output: str | Path) -> Record:
        """Draw every level's warp, flow, score and match lines of one record to `output`.

        Raises as `translate` and `check_matching`.
        """
        self.check_matching()
        check_format(output := Path(output))
        from cocosnet.viz.panels import warp_panel

        start = time.perf_counter()
        pair, result = self._run(record)
        panel = warp_panel(
            pair.condition[0].cpu(),
            pair.exemplar[0].cpu(),
            result.image[0].cpu(),
            [warp[0].cpu() for warp in result.warps],
            [matches.cpu() for matches in result.matches],
        )
        save_image(panel, output)
        return _handled(record, output, "ok", round(time.perf_counter() - start, 3), pair.source)

    def check_matching(self) -> None:
        """Raises ConfigError where the model matches nothing, so that there is nothing to draw."""
        if self.model.config.model.matched_levels == 0:
            raise ConfigError(
                f"{self.checkpoint}: model.kind={self.model.config.model.kind} matches nothing, so there is "
                "no warp to draw; use translate, or the weights of a model that matches"
            )

    def load_pair(self, record: Record) -> Pair:
        """Read a record's files at the working size. Raises DataError naming the file at fault."""
        condition_file, exemplar_file, *_ = _inputs(record)
        self._check_task(record)
        condition, source = self._condition(condition_file, self.raw)
        photo = self._sized(load_rgb(exemplar_file, self._side), exemplar_file)
        exemplar_condition = (
            self._exemplar_condition(record, photo) if self.model.config.model.encoder.exemplar_condition else None
        )
        found = exemplar_condition is not None and record.exemplar_condition is None
        extracted = source is not FROM_FILE or found
        return Pair(condition, to_tensor(photo)[None], exemplar_condition, source, extracted)

    def _check_task(self, record: Record) -> None:
        """Raises DataError for a condition of another task: read as this model's it would be nonsense, silently."""
        task = self.data.task if self.raw else self._task_of(record)
        if task not in (None, self.data.task):
            raise DataError(
                f"{shown(record.condition)}: prepared for task {task}, but {shown(self.checkpoint)} has learned task "
                f"{self.data.task}; give other weights"
            )

    def _task_of(self, record: Record) -> str | None:
        """What task a record's condition is of, where its name or an earlier step says so."""
        if Path(record.condition).suffix.lower() == ".json":
            return "pose"
        source = record.extra.get("condition_source")
        if not isinstance(source, dict):
            return None
        if "labels" in source:
            return "mask"
        return "edge" if source.get("network") in self._edge_extractors else None

    @cached_property
    def _edge_extractors(self) -> list[str]:
        """Their names; looking for other packages' takes milliseconds, too long for every record."""
        return extractor_names("edge")

    @property
    def _side(self) -> int:
        return self.size or self.data.size

    @torch.inference_mode()
    def _run(self, record: Record) -> tuple[Pair, Output]:
        with memory_named(lambda _: _too_large(record, "reading it takes more memory than there is")):
            pair = self.load_pair(record)
        height, width = pair.condition.shape[-2:]
        inputs, layout = (pair.condition, pair.exemplar, pair.exemplar_condition), layout_of(self.model.config)
        short = f"{width}x{height} px take more memory than there is ({self.device})"
        with memory_named(lambda _: _too_large(record, short)):
            placed = [x if x is None else x.to(self.device, memory_format=layout) for x in inputs]
            with autocast(self.precision, self.device), full_float32():
                return pair, self.model(*placed)

    def _condition(self, path: str, raw: bool) -> tuple[Tensor, dict[str, Any]]:
        """The condition tensor 1,C,H,W of a file, and how it came about."""
        if raw and self.data.task == "mask":
            raise DataError(f"{shown(path)}: --raw extracts edges and poses; give task mask its label map")
        if raw or (self.data.task == "edge" and _is_coloured(path, self._side)):
            photo = load_rgb(path, self._side)
            side = min(self._side, *photo.size) if self.size is None else self.size
            condition = self._extracted(photo, path, side)
            return condition_to_tensor(_large_enough(condition, path), self.data)[None], self.extractor.provenance
        image = self._sized(load_condition_image(path, self.data), path, condition_filter(self.data))
        found = self.data.task == "edge" and self.data.edges != "image"  # ready-made ones may be dark on white
        if found and ImageStat.Stat(image).mean[0] > LIGHT:
            logger.warning(
                "%s: too light for edges, which are white on black; invert a drawing, and give --raw for a photograph",
                shown(path),
            )
        return condition_to_tensor(image, self.data)[None], FROM_FILE

    def _exemplar_condition(self, record: Record, photo: Image.Image) -> Tensor:
        """The exemplar's own condition, from its file or, for edges, extracted."""
        if record.exemplar_condition is not None:
            image = load_condition_image(record.exemplar_condition, self.data)
            return condition_to_tensor(image.resize(photo.size, condition_filter(self.data)), self.data)[None]
        if self.data.task == "mask":
            raise DataError(
                f"{shown(record.exemplar)}: this model also needs the exemplar's own label map, as a record's "
                "exemplar_condition (--manifest)"
            )
        return condition_to_tensor(self._extracted(photo, record.exemplar), self.data)[None]

    def _extracted(self, photo: Image.Image, path: str, side: int | None = None) -> Image.Image | Pose:
        """What the extractor finds in the photograph of that file. Raises DataError naming the file."""
        with _named(path):
            check_not_thin(photo)
            return self.extractor(photo, side)

    def _sized(
        self, image: Image.Image, path: str, resample: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Image.Image:
        """At the working size: never enlarged unless a size was asked for, and a strip not even then."""
        side = self.size or min(self.data.size, *image.size)
        if side > min(image.size):
            with _named(path):
                check_not_thin(image)
        return _large_enough(resize_shorter(image, side, resample), path)

    def _save_parts(self, pair: Pair, result: Output, output: Path) -> dict[str, str]:
        from cocosnet.viz.panels import condition_image

        parts = {"condition_image": condition_image(pair.condition[0])}
        if result.warps:
            parts["warp"] = to_image(result.warps[-1][0])
        for name, image in parts.items():
            save_image(image, _part(output, name))
        return {name: str(_part(output, name)) for name in parts}

    def _stamp(self, made_of: str, pair: Pair) -> dict[str, Any]:
        """What an output was made of, and how its condition came about."""
        extractor = self.extractor.provenance if pair.extracted else None
        return {"made_of": made_of, "extractor": extractor, "condition_source": pair.source}

    def _digest(self, record: Record) -> str:
        """All that the output depends on, but for the extractor: inputs by size and time, checkpoint, options."""
        files = [_state(path) for path in (record.condition, record.exemplar, record.exemplar_condition)]
        text = json.dumps([files, self.fingerprint, self.raw, self.size])
        return hashlib.sha256(text.encode()).hexdigest()

    def _up_to_date(self, made_of: str, output: Path) -> dict[str, Any] | None:
        """The stamp of an output that is as it would be made again; None where it is not, or parts are wanted, too."""
        found = None if self.keep_parts else _stamp_of(output)
        if found is None or found["made_of"] != made_of:
            return None
        same = found["extractor"] is None or found["extractor"] == _plain(self.extractor.provenance)
        return found if same else None


def _state(path: str | None) -> list[Any] | None:
    """A file's name, size and time; a missing file is left for the reader to complain about."""
    if path is None:
        return None
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return [path]
    return [str(Path(path).absolute()), status.st_size, status.st_mtime_ns]


def _inputs(record: Record) -> list[str]:
    """The files that a record is made of. Raises DataError where one that every model needs is not named."""
    if record.condition is None or record.exemplar is None:
        raise DataError("the record needs a condition and an exemplar")
    return [path for path in (record.condition, record.exemplar, record.exemplar_condition) if path is not None]


def _handled(record: Record, output: Path, status: str, seconds: float | None, source: dict[str, Any]) -> Record:
    """The record after this step; how its condition came about stays what an earlier step said.

    What is told of an output does not go on beside another one.
    """
    same = status == "skipped" and record.output == str(output)
    kept = {key: value for key, value in record.extra.items() if same or key not in OF_OUTPUT}
    extra = {**kept, "condition_source": record.extra.get("condition_source", source)}
    return dataclasses.replace(record, output=str(output), status=status, error=None, seconds=seconds, extra=extra)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Around what raises a DataError that does not name the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return json.loads(json.dumps(values))


def _stamp_of(path: Path) -> dict[str, Any] | None:
    """The stamp inside an output that is there and whole, else None. Formats without text chunks have none."""
    if not os.path.isfile(path):  # reading the pipe that is to be written would wait for ever
        return None
    try:
        with Image.open(path) as image:
            found = json.loads(image.info.get(STAMP_KEY, "null"))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return None
    return found if isinstance(found, dict) and found.keys() == STAMP else None


def _save(image: Image.Image, path: Path, stamp: dict[str, Any]) -> None:
    if path.suffix.lower() != ".png":
        save_image(image, path)
        return
    texts = PngImagePlugin.PngInfo()
    texts.add_text(STAMP_KEY, json.dumps(stamp))
    with atomic_path(path) as temporary:
        image.save(temporary, pnginfo=texts)


def _part(output: Path, name: str) -> Path:
    """Where a part of an output lies: OUT/.parts/ID.NAME.png, hidden from who takes OUT for a folder of outputs."""
    return output.parent / ".parts" / f"{output.stem}.{name}.png"


def _is_coloured(path: str, side: int) -> bool:
    """Whether a picture has colour; an edge map has none."""
    small = load_rgb(path, side).resize((64, 64))
    return ImageStat.Stat(small.convert("HSV").getchannel("S")).mean[0] > COLOURED


def _large_enough(image: Image.Image, path: str) -> Image.Image:
    if min(image.size) < MIN_SIDE:
        raise DataError(
            f"{shown(path)}: {image.width}x{image.height} px is too small to match; use at least {MIN_SIDE} px a side"
        )
    return image


def _too_large(record: Record, reason: str) -> DataError:
    return DataError(f"{shown(record.condition)}: {reason}; reduce the picture or ask for a smaller --size")
