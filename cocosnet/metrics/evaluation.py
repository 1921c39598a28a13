"""From pair records (or folders) to one JSON-able dict of numbers."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocosnet.data.images import find_images, load_rgb, shown
from cocosnet.data.records import Record
from cocosnet.errors import ConfigError, DataError
from cocosnet.metrics.base import Metric
from cocosnet.metrics.registry import get_metric

SCHEMA = "cocosctl.eval/1"
ERRORS_SHOWN = 5  # messages kept of the records that failed
PACKAGES = ("cocosctl", "torch", "torchvision", "numpy", "pillow", "pytorch-fid")  # whose versions can move a number


def evaluate(
    records: Iterable[Record], metrics: Sequence[str], device: str = "cpu", *, seed: int = 0
) -> dict[str, Any]:
    """Run the metrics over a stream of records, in one pass, and say what was counted.

    A record that arrives as an error, or whose pictures are missing, unreadable or do not fit each other, is counted in
    "failed" and left out of every metric, so that all values are over the same pairs.

    Returns:
        {"schema": "cocosctl.eval/1", "metrics": {name: {"value", "protocol", "count", ...}}, "count": pairs measured,
        "failed": records left out, "errors": the first few reasons, "versions": {package: version}}

    Raises:
        ConfigError: no metric is named, or a name is unknown.
        MissingWeights, MissingDependency: a metric cannot run here; found out before the first record is taken.
    """
    if not metrics:
        raise ConfigError("no metric is named; name at least one, e.g. swd,psnr")
    running = {name: get_metric(name, device=device, seed=seed) for name in metrics}
    count, errors, failed = 0, [], 0
    for record in records:
        try:
            _update(list(running.values()), record)
            count += 1
        except DataError as error:
            failed += 1
            errors = [*errors, str(error)][:ERRORS_SHOWN]
    return {
        "schema": SCHEMA,
        "metrics": {name: metric.compute() for name, metric in running.items()},
        "count": count,
        "failed": failed,
        "errors": errors,
        "versions": package_versions(),
    }


def _update(metrics: list[Metric], record: Record) -> None:
    """Give one pair to all metrics, or to none (DataError)."""
    if record.failed:
        raise DataError(f"{shown(record.id)}: {record.error or 'failed in an earlier step'}")
    roles = dict.fromkeys(role for metric in metrics for role in metric.needs)
    try:
        pictures = {role: load_role(record, role) for role in roles}
        for metric in metrics:
            metric.check(*(pictures[role] for role in metric.needs))
    except DataError as error:
        raise DataError(f"{shown(record.id)}: {error}") from error
    for metric in metrics:
        metric.update(*(pictures[role] for role in metric.needs))


def load_role(record: Record, role: str) -> Tensor:
    """The picture of one role ("output", "target", "exemplar") as 1,3,H,W uint8 RGB.

    Raises:
        DataError: the record has no such file, or it cannot be read.
    """
    path = getattr(record, role)
    if path is None:
        raise DataError(f"the record has no {role}; add one or leave out the metrics that need it")
    return torch.from_numpy(np.array(load_rgb(path))).permute(2, 0, 1)[None]


def records_from_folders(outputs: str | Path, targets: str | Path, exemplars: str | Path | None = None) -> list[Record]:
    """Records that pair the pictures of two or three folders by their path below the folder, without the suffix.

    Returns:
        one Record a picture, sorted by id (that path, "/" between folders), with absolute paths.

    Raises:
        DataError: a folder is missing or empty, holds two pictures of one name, or the names of the folders differ.
    """
    folders = {"output": Path(outputs), "target": Path(targets)}
    if exemplars is not None:
        folders["exemplar"] = Path(exemplars)
    named = {role: _by_stem(folder) for role, folder in folders.items()}
    for role, files in named.items():
        _compare_names(folders["output"], named["output"], folders[role], files)
    return [
        Record(id=stem, **{role: str(files[stem].absolute()) for role, files in named.items()})
        for stem in sorted(named["output"])
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
