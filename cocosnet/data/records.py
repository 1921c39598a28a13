"""Pair records: the one thing that flows through the pipe, one JSON object a line.

    {"schema": "cocosctl.pair/1", "id": .., "condition": .., "exemplar": .., "exemplar_condition": .., "target": ..,
     "output": .., "status": "ok|skipped|error", "error": .., "seconds": .., <unknown keys pass through>}

Paths in a manifest file are relative to the manifest's folder; paths on a stream are relative to the working folder.
Commands print absolute ones, which are right in both.
A record whose status is "error" travels on untouched, so that the last command of a pipe still knows of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocosnet.errors import DataError
from cocosnet.files import atomic_path

SCHEMA = "cocosctl.pair/1"
MANIFEST_NAME, DATASET_NAME = "manifest.jsonl", "dataset.json"  # of a prepared folder
PATH_FIELDS = ("condition", "exemplar", "exemplar_condition", "target", "output")
LABEL_PATHS = ("labels", "exemplar_labels")  # keys of `extra` that name label maps
EXTRA_PATHS = ("condition_image", "warp", *LABEL_PATHS)  # keys of `extra` that name files
STATUSES = ("ok", "skipped", "error")


@dataclass
class Record:
    """One pair: files by role (kept as text, None where absent), what became of it, and keys that pass through."""

    id: str
    condition: str | None = None
    exemplar: str | None = None
    exemplar_condition: str | None = None
    target: str | None = None
    output: str | None = None
    status: str = "ok"
    error: str | None = None
    seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in PATH_FIELDS:
            setattr(self, name, _as_text(getattr(self, name)))
        self.extra = {key: _as_text(value) for key, value in (self.extra or {}).items()}

    @property
    def failed(self) -> bool:
        """True where an earlier or this step could not handle the pair."""
        return self.status == "error"

    def failure(self, message: str) -> Record:
        """A copy that says what went wrong."""
        return dataclasses.replace(self, status="error", error=message)

    def to_json(self) -> str:
        """One line of JSON; absent fields are left out."""
        known = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        return json.dumps({"schema": SCHEMA, **known, **self.extra}, default=os.fspath)

    def rebased(self, change: Any) -> Record:
        """A copy with `change` applied to every path that is present."""
        paths = {name: change(getattr(self, name)) for name in PATH_FIELDS if getattr(self, name) is not None}
        extra = {name: change(self.extra[name]) for name in EXTRA_PATHS if isinstance(self.extra.get(name), str)}
        return dataclasses.replace(self, **paths, extra={**self.extra, **extra})


def _as_text(value: Any) -> Any:
    """A `Path` as the text that JSON and all readers of records know; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_FIELDS = tuple(f.name for f in dataclasses.fields(Record) if f.name != "extra")


def parse_record(line: str, number: int = 0) -> Record:
    """Read one line; a number that JSON has no word for (1e999) counts as absent.

    Raises:
        DataError: not a JSON object, another schema, no id, or a field of the wrong type.
    """
    try:
        values = finite(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise DataError(f"record {number}: not JSON: {error}; of a command in a pipe, --json makes records") from error
    if not isinstance(values, dict):
        raise DataError(f"record {number}: expected a JSON object, found {type(values).__name__}")
    if values.pop("schema", SCHEMA) != SCHEMA:
        raise DataError(f"record {number}: not a {SCHEMA} record")
    _check_values(values, number)
    known = {name: values.pop(name) for name in _FIELDS if name in values}
    return Record(**known, extra=values)


def finite(value: Any) -> Any:
    """A copy of a JSON value in which numbers that JSON has no word for (NaN, infinities) are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_values(values: dict[str, Any], number: int) -> None:
    if not isinstance(values.get("id"), str) or not values["id"]:
        raise DataError(f"record {number}: needs an id (text)")
    for name in (*PATH_FIELDS, "error"):
        if not isinstance(values.get(name), (str, type(None))):
            raise DataError(f"record {number} ({values['id']}): {name} must be text")
    if values.get("status", "ok") not in STATUSES:
        raise DataError(f"record {number} ({values['id']}): status must be one of {', '.join(STATUSES)}")
    if not isinstance(values.get("seconds"), (int, float, type(None))):
        raise DataError(f"record {number} ({values['id']}): seconds must be a number")


def iter_records(lines: Iterable[str]) -> Iterator[Record]:
    """Records of a stream, as they arrive; a bad line becomes an error record `line-N`, blank ones are passed over."""
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix("\ufeff") if number == 1 else line  # Windows writes a mark before the first record
        if line.strip():
            try:
                yield parse_record(line, number)
            except DataError as error:
                yield Record(id=f"line-{number}", status="error", error=str(error))


def read_manifest(path: str | Path) -> list[Record]:
    """Records of a manifest file, or of the manifest in a prepared folder, with paths made absolute.

    Raises:
        DataError: the file is missing, unreadable or holds no record.
    """
    path = Path(path)
    path = path / MANIFEST_NAME if path.is_dir() else path
    folder = path.parent.absolute()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:  # as on stdin: a name may be any bytes
            records = [record.rebased(lambda name: str(folder / name)) for record in iter_records(lines)]
    except OSError as error:
        raise DataError(
            f"{path}: cannot read this manifest ({error.strerror}); make one with `cocosctl prepare`"
        ) from error
    if not records:
        raise DataError(f"{path}: holds no records; make one with `cocosctl prepare`")
    return records


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` has made all of a folder."""
    return (folder / MANIFEST_NAME).is_file() and (folder / DATASET_NAME).is_file()


def write_manifest(path: str | Path, records: Iterable[Record]) -> None:
    """Write records (with absolute paths) as a manifest whose paths are relative to its folder where they lie in it."""
    folder = Path(path).parent.absolute()

    def relative(name: str) -> str:
        absolute = Path(name).absolute()
        return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)

    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for record in records:
            print(record.rebased(relative).to_json(), file=stream)
