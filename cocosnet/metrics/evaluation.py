"""From pair records (or folders) to one JSON-able dict of numbers."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cocosnet.checkpoint import resolve_device
from cocosnet.data.images import SUFFIXES, find_images, load_labels, load_rgb, shown
from cocosnet.data.records import PATH_FIELDS, Record
from cocosnet.errors import ConfigError, DataError, memory_named
from cocosnet.metrics.base import size_text
from cocosnet.metrics.features import sharing
from cocosnet.metrics.registry import get_metric
from cocosnet.metrics.shards import ALONE, Shards
from cocosnet.precision import full_float32
from cocosnet.weights import fingerprint

SCHEMA = "cocosctl.eval/1"
SPACES = " \t"  # around a list's paths; other blanks may be part of a name
ERRORS_SHOWN = 5  # messages kept of the records that failed
PACKAGES = (
    "cocosctl",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "pytorch-fid",
    "lpips",
)  # whose versions can move a number
BATCH_PIXELS = 4 * 256 * 256  # of one role's pictures that pass the networks at once on a CPU; 8 times as many on a GPU
LABELS = {
    "labels": "condition",
    "exemplar_labels": "exemplar_condition",
}  # role -> the field that serves where it is not


def evaluate(
    records: Iterable[Record], metrics: Sequence[str], device: str = "cpu", *, seed: int = 0
) -> dict[str, Any]:
    """Run the metrics over a stream of records in this process: what `Evaluation.run` returns."""
    return Evaluation(metrics, device, seed=seed).run(records)


class Evaluation:
    """One pass of metrics over a stream of records.

    A record that arrives as an error, or whose pictures are missing, unreadable or do not fit each other, is counted in
    "failed" and left out of every metric, so that all values are over the same pairs.

    Args:
        metrics: names, as `get_metric` knows them.
        device: where the arithmetic is done: auto, cpu, cuda or cuda:N.
        seed: of what metrics sample.
        sides: "output" or "target" -> a file of statistics to take instead of pictures, or None for a side that is not
            there (its metrics have no value, but their statistics can be saved).
        shards: the processes that share the work; each measures its part, and the first one gets the whole result.

    Attributes:
        metrics: the running metrics by name.
        rows: after `run`, the records in their order with their scores in extra["scores"]; of the first process only.

    Raises:
        ConfigError: no metric is named, a text is given for the list, a name is unknown, or a metric cannot do with
            statistics or several processes.
        DataError: a file of statistics cannot be used.
        MissingWeights, MissingDependency: a metric cannot run here; found out before the first record is taken.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        device: str = "cpu",
        *,
        seed: int = 0,
        sides: Mapping[str, Path | None] | None = None,
        shards: Shards = ALONE,
    ) -> None:
        if not metrics:
            raise ConfigError("no metric is named; name at least one, e.g. swd,psnr")
        if isinstance(metrics, str):  # its letters would be taken for names
            raise ConfigError(f"metrics must be a list of names, is the text {metrics!r}")
        self._device, self._shards = resolve_device(device), shards
        self.metrics = {name: get_metric(name, device=str(self._device), seed=seed) for name in metrics}
        self.rows: list[Record] = []
        self._gathered = _Gathered({name: 0.0 for name in self.metrics})
        for side, path in (sides or {}).items():
            self._take_side(side, path)
        if shards.size > 1:
            for metric in self.metrics.values():
                next(iter(metric.states()), None)  # refused by those that run in one process only

    def run(self, records: Iterable[Record]) -> dict[str, Any] | None:
        """Measure all records.

        Returns:
            {"schema": "cocosctl.eval/1", "metrics": {name: {"value", "protocol", "count", .., "seconds"}},
            "count": pairs measured, "failed": records left out, "errors": the first few reasons, "warnings",
            "weights": {name: {"file", "sha256"}}, "versions": {package: version}, "device", "processes",
            "reading_seconds", "seconds"}; None in all processes but the first.
        """
        start = time.perf_counter()
        for batch in self._batches(self._shards.share(records)):
            self._measure(batch)
        self._sum_up()
        if self._shards.rank > 0:
            return None
        self.rows = [record for _, record in sorted(self._gathered.rows, key=lambda row: row[0])]
        return self._result(start)

    def _take_side(self, side: str, path: Path | None) -> None:
        for metric in self.metrics.values():
            if side not in metric.needs:
                continue
            if not metric.from_statistics:
                raise ConfigError(
                    f"{metric.name} needs the pictures of every {side}; statistics serve fid and fd_vgg16"
                )
            metric.use_statistics(side, path)

    def _sum_up(self) -> None:
        """Bring what all processes have gathered to the first one."""
        for other in (self._shards.gather(self._gathered) or [])[1:]:
            self._gathered.absorb(other)
        for metric in self.metrics.values():
            for count in (self._shards.gather(metric.count) or [])[1:]:
                metric.count += count
            for state in self._shards.stream(metric.states()):
                metric.absorb(state)

    def _batches(self, records: Iterable[tuple[int, Record]]) -> Iterator[list[_Pair]]:
        """Readable pairs, neighbours of the same sizes together, as many as BATCH_PIXELS allows at a network's size."""
        batch: list[_Pair] = []
        enlarged = max(metric.side for metric in self.metrics.values()) ** 2
        for index, record in records:
            try:
                pair = self._read(index, record)
            except DataError as error:
                self._gathered.fail(index, record, str(error))
                continue
            pixels = (len(batch) + 1) * max(pair.pixels, enlarged)
            if batch and (pair.sizes != batch[0].sizes or pixels > self._batch_pixels()):
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch

    def _batch_pixels(self) -> int:
        return BATCH_PIXELS * (8 if self._device.type == "cuda" else 1)

    def _read(self, index: int, record: Record) -> _Pair:
        """One pair that all metrics can take. Raises DataError, which does not name the record."""
        if record.failed:
            raise DataError(record.error or "failed in an earlier step")
        roles = dict.fromkeys(role for metric in self.metrics.values() for role in metric.needs)
        start = time.perf_counter()
        pictures = {role: load_role(record, role) for role in roles}
        for metric in self.metrics.values():
            metric.check(*(pictures[role] for role in metric.needs))
        self._gathered.reading += time.perf_counter() - start
        return _Pair(index, record, pictures)

    def _measure(self, batch: list[_Pair]) -> None:
        """Give pairs of the same sizes to all metrics."""
        pictures = {role: torch.cat([pair.pictures[role] for pair in batch]) for role in batch[0].pictures}
        pictures = {role: picture.to(self._device) for role, picture in pictures.items()}
        scores: list[dict[str, float | None]] = [{} for _ in batch]
        with sharing(), full_float32():
            for name, metric in self.metrics.items():
                found = self._update(name, [pictures[role] for role in metric.needs], batch[0])
                for score, value in zip(scores, found or (), strict=found is not None):
                    score[name] = value
        for pair, score in zip(batch, scores, strict=True):
            self._gathered.add(pair, score)

    def _update(self, name: str, pictures: list[Tensor], first: _Pair) -> list[float | None] | None:
        """Give pictures to one metric and count its seconds. `first`: the pair to name where memory is too small."""
        start = time.perf_counter()
        with memory_named(lambda _: _too_large(name, first, self._device)):
            found = self.metrics[name].update(*pictures)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._gathered.seconds[name] += time.perf_counter() - start
        return found

    def _result(self, start: float) -> dict[str, Any]:
        gathered = self._gathered
        return {
            "schema": SCHEMA,
            "metrics": {name: self._entry(name) for name in self.metrics},
            "count": gathered.count,
            "failed": gathered.failed,
            "errors": [text for _, text in sorted(gathered.errors)][:ERRORS_SHOWN],
            "warnings": gathered.warnings(),
            "weights": {w: fingerprint(w) for w in dict.fromkeys(w for m in self.metrics.values() for w in m.weights)},
            "versions": package_versions(),
            "device": str(self._device),
            "processes": self._shards.size,
            "reading_seconds": round(gathered.reading, 3),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _entry(self, name: str) -> dict[str, Any]:
        start = time.perf_counter()
        entry = self.metrics[name].compute()
        return {**entry, "seconds": round(self._gathered.seconds[name] + time.perf_counter() - start, 3)}


@dataclass
class _Pair:
    """A record with its pictures, 1,C,H,W each, and its number in the stream."""

    index: int
    record: Record
    pictures: dict[str, Tensor]

    @property
    def sizes(self) -> list[torch.Size]:
        return [picture.shape for picture in self.pictures.values()]

    @property
    def pixels(self) -> int:
        return max(picture.shape[-2:].numel() for picture in self.pictures.values())


def _too_large(metric: str, pair: _Pair, device: torch.device) -> DataError:
    sizes = ", ".join(dict.fromkeys(size_text(picture) for picture in pair.pictures.values()))
    return DataError(
        f"{shown(pair.record.id)}: {metric} of {sizes} px takes more memory than there is ({device}); leave this "
        "metric out, measure smaller pictures, or take another --device"
    )


@dataclass
class _Gathered:
    """What one process has seen, apart from the metrics' own states."""

    seconds: dict[str, float]
    reading: float = 0.0
    count: int = 0
    failed: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)
    rows: list[tuple[int, Record]] = field(default_factory=list)
    formats: dict[str, set[str]] = field(default_factory=lambda: {"output": set(), "target": set()})

    def add(self, pair: _Pair, scores: dict[str, float | None]) -> None:
        """Count a measured pair."""
        self.count += 1
        for role, known in self.formats.items():
            if role in pair.pictures:
                known.add(_format(getattr(pair.record, role)))
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in scores.items()}
        self.rows.append((pair.index, replace(pair.record, extra={**pair.record.extra, "scores": finite})))

    def fail(self, index: int, record: Record, message: str) -> None:
        """Count a record that could not be measured."""
        self.failed += 1
        self.errors = [*self.errors, (index, f"{shown(record.id)}: {message}")][:ERRORS_SHOWN]
        self.rows.append((index, record if record.failed else record.failure(message)))

    def absorb(self, other: _Gathered) -> None:
        """Add another process's."""
        self.seconds = {name: seconds + other.seconds[name] for name, seconds in self.seconds.items()}
        self.reading, self.count, self.failed = (
            self.reading + other.reading,
            self.count + other.count,
            self.failed + other.failed,
        )
        self.errors, self.rows = self.errors + other.errors, self.rows + other.rows
        for role, known in self.formats.items():
            known |= other.formats[role]

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        outputs, targets = (sorted(self.formats[role]) for role in ("output", "target"))
        if not outputs or not targets or outputs == targets:
            return []
        return [
            f"outputs are {' and '.join(outputs)}, targets are {' and '.join(targets)}: the traces of a lossy format "
            "count in every metric; compare only with numbers that were made of the same formats"
        ]


def _format(path: str) -> str:
    """Format of a picture that could be read, whatever its name says."""
    with Image.open(path) as image:
        return image.format or Path(path).suffix


def load_role(record: Record, role: str) -> Tensor:
    """What a metric asks for by role (`Metric.update`), with a batch of 1.

    "labels" are those that the record names, else its condition; "exemplar_labels" likewise, else exemplar_condition.

    Raises:
        DataError: the record has no such file, or it cannot be read.
    """
    if role == "condition_id":
        digest = hashlib.blake2b(_path(record, "condition").encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return torch.tensor([int.from_bytes(digest, "big", signed=True)])
    if role in LABELS:
        return torch.from_numpy(load_labels(_path(record, role, LABELS[role])))[None, None]
    return torch.from_numpy(np.array(load_rgb(_path(record, role)))).permute(2, 0, 1)[None]


def _path(record: Record, role: str, otherwise: str | None = None) -> str:
    path = getattr(record, role, None) or record.extra.get(role) or (getattr(record, otherwise) if otherwise else None)
    if not isinstance(path, str):
        raise DataError(f"the record has no {role}; add one or leave out the metrics that need it")
    return path


def records_from_lists(lists: Mapping[str, str | Path]) -> list[Record]:
    """Records that pair the pictures of text files, one path a line, line by line.

    Args:
        lists: role ("output", "target", ..) -> file. Paths are relative to the file's folder; blank lines are
            passed over. A picture stands for a list of itself alone.

    Raises:
        DataError: a list cannot be read, is empty, or the lists differ in length.
    """
    named = {role: _read_list(Path(path)) for role, path in lists.items()}
    first, longest = next(iter(named)), max(named, key=lambda role: len(named[role]))
    for role, paths in named.items():
        if len(paths) < len(named[longest]):
            raise DataError(
                f"{shown(lists[role])} has {len(paths)} pictures, {shown(lists[longest])} has {len(named[longest])}: "
                f"nothing is paired with {shown(named[longest][len(paths)])}; give lists of equal length"
            )
    return [_record(number, row, first) for number, row in enumerate(_rows(named), start=1)]


def _rows(named: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    for paths in zip(*named.values(), strict=True):
        yield dict(zip(named, paths, strict=True))


def _record(number: int, row: dict[str, str], first: str) -> Record:
    """A record called by its line and its first picture's name; roles that are no fields go into `extra`."""
    fields = {role: path for role, path in row.items() if role in PATH_FIELDS}
    extra = {role: path for role, path in row.items() if role not in PATH_FIELDS}
    return Record(id=f"{number} {Path(row[first]).stem}", **fields, extra=extra)


def _read_list(path: Path) -> list[str]:
    if path.suffix.lower() in SUFFIXES:
        return [str(path.absolute())]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows writes a mark before the first path
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{shown(path)}: cannot read this list ({error}); give a text file of one path a line"
        ) from error
    folder = path.parent.absolute()
    paths = [str(folder / line.strip(SPACES)) for line in lines if line.strip(SPACES)]
    if not paths:
        raise DataError(f"{shown(path)}: the list is empty; write one path a line")
    return paths


def records_from(sources: Mapping[str, str | Path]) -> list[Record]:
    """Records of folders or of lists, by role. Raises DataError as the two do, or where both kinds are mixed."""
    listed = [role for role, path in sources.items() if Path(path).is_file()]
    if listed and len(listed) < len(sources):
        raise DataError(
            f"{shown(sources[listed[0]])} is a file and others are folders; give folders or lists, not both"
        )
    return records_from_lists(sources) if listed else _records_of_folders(sources)


def records_from_folders(outputs: str | Path, targets: str | Path, exemplars: str | Path | None = None) -> list[Record]:
    """Records that pair the pictures of two or three folders by their path below the folder, without the suffix.

    Returns:
        one Record a picture, sorted by id (that path, "/" between folders), with absolute paths.

    Raises:
        DataError: a folder is missing or empty, holds two pictures of one name, or the names of the folders differ.
    """
    folders = {"output": outputs, "target": targets}
    return _records_of_folders(folders if exemplars is None else {**folders, "exemplar": exemplars})


def _records_of_folders(sources: Mapping[str, str | Path]) -> list[Record]:
    folders = {role: Path(path) for role, path in sources.items()}
    named, first = {role: _by_stem(folder) for role, folder in folders.items()}, next(iter(folders))
    for role, files in named.items():
        _compare_names(folders[first], named[first], folders[role], files)
    return [
        replace(_record(0, {role: str(files[stem].absolute()) for role, files in named.items()}, first), id=stem)
        for stem in sorted(named[first])
    ]


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise DataError(
                f"{shown(folder)}: {shown(files[stem].name)} and {shown(path.name)} have the same name "
                "without the suffix; keep one"
            )
        files[stem] = path
    if not files:
        raise DataError(f"{shown(folder)}: holds no pictures; give the folder that holds them")
    return files


def _compare_names(first: Path, first_files: dict[str, Path], second: Path, second_files: dict[str, Path]) -> None:
    """Refuse names that only one of two folders has, naming the first few."""
    problems = []
    for folder, files, others in ((first, first_files, second_files), (second, second_files, first_files)):
        missing = others.keys() - files.keys()
        if missing:
            names = ", ".join(shown(name) for name in sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            problems.append(f"{shown(folder)} lacks {len(missing)} ({names})")
    if problems:
        counts = f"{len(first_files)} against {len(second_files)}"
        raise DataError(f"pictures are paired by name: {'; '.join(problems)}; {counts}; give folders with equal names")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a number can depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
