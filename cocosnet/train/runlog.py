"""The log of a run, `stats.jsonl`: one JSON object a line, oldest first."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocosnet.errors import MissingDependency
from cocosnet.files import atomic_write, cannot_write


class RunLog:
    """Lines are {"images": .., "total": .., ...}, or {"images": .., "note": ".."} for an event."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, images: int, values: Mapping[str, Any]) -> None:
        """Add a line at once. Numbers that are not finite become null, which JSON can hold. DataError: no room."""
        line = json.dumps({"images": images, **{name: _plain(value) for name, value in values.items()}})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def note(self, images: int, text: str) -> None:
        """Add a line about something that happened."""
        self.write(images, {"note": text})

    def rewind(self, images: int) -> None:
        """Drop the lines of work that is about to be done again: those after `images`, and a half-written last one."""
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _images(line) <= images]
            atomic_write(self.path, "".join(line + "\n" for line in kept))


class TensorBoard:
    """The same numbers, and the sample grids, for TensorBoard. What was there of work after `images` is hidden.

    Raises:
        MissingDependency: TensorBoard is not installed. OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, images: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency(
                "train.tensorboard needs TensorBoard: pip install 'cocosctl[tensorboard]'"
            ) from error
        try:
            self._writer = SummaryWriter(str(folder), purge_step=images + 1)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """Add the numbers that are finite."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, images)
        self._writer.flush()

    def picture(self, images: int, grid: Tensor) -> None:
        """Add a picture, 3,H,W in [-1, 1]."""
        self._writer.add_image("samples", (grid.clamp(-1, 1) + 1) / 2, images)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left; nothing can be added afterwards."""
        self._writer.close()


class Averages:
    """Means of named scalars (tensors that stay on their device) since the last `take`; NaN entries are left out."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one more value of each name."""
        for name, value in values.items():
            known = ~torch.isnan(value)
            self._sums[name] = self._sums.get(name, 0) + torch.where(known, value, 0)
            self._counts[name] = self._counts.get(name, 0) + known.int()

    def take(self) -> dict[str, float]:
        """The means; start afresh. A name that had no value is left out."""
        means = fetch({name: total / self._counts[name] for name, total in self._sums.items()})
        self._sums, self._counts = {}, {}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def fetch(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Named scalars of one device as numbers, fetched from it at once rather than one by one."""
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist())) if values else {}


def memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _images(line: str) -> float:
    try:
        return float(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError):
        return math.inf
