"""What `translate` and `warp-visualize` share: where records come from, and the loop over them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import typer

from cocosctl.exits import ExitCode
from cocosctl.output import Output
from cocosnet.data.records import Record, iter_records, read_manifest
from cocosnet.errors import CocosError
from cocosnet.files import safe_name

DEMO_MANIFEST = "demo/manifest.jsonl"

Step = Callable[[Record, Path], Record]


def open_records(manifest: str, limit: int | None = None) -> Iterable[Record]:
    """Records of a manifest file, a prepared folder, `demo` (the shipped one) or `-` (stdin, as the lines come).

    Raises:
        DataError: the manifest cannot be read or is empty. A bad line is an error record, not an exception.
        MissingWeights: the shipped demo is not there.
    """
    if manifest == "-":
        return islice(iter_records(sys.stdin), limit)
    if manifest == "demo" and not Path(manifest).exists():
        from cocosnet.weights import packed_file

        manifest = str(packed_file(DEMO_MANIFEST))
    return read_manifest(manifest)[:limit]


def check_form(condition: Path | None, exemplar: Path | None, manifest: str | None) -> None:
    """Two files or a manifest, not both and not neither. Raises BadParameter (usage)."""
    if manifest is not None and condition is not None:
        raise typer.BadParameter("give two files or --manifest, not both", param_hint="CONDITION")
    if manifest is None and (condition is None or exemplar is None):
        raise typer.BadParameter("give two files, CONDITION and EXEMPLAR, or --manifest", param_hint="CONDITION")


def run(
    condition: Path | None,
    exemplar: Path | None,
    manifest: str | None,
    limit: int | None,
    output: Path,
    step: Step,
    out: Output,
) -> list[Record]:
    """Handle two files, or the records of a manifest where one is given. Returns the records as they were printed."""
    if manifest is None:
        return [run_pair(condition, exemplar, output, step, out)]
    return run_many(open_records(manifest, limit), output, step, out)


def run_pair(condition: Path, exemplar: Path, output: Path, step: Step, out: Output) -> Record:
    """Handle one pair of files and print what became of it; what is wrong is raised."""
    record = step(Record(id=output.stem or "pair", condition=str(condition), exemplar=str(exemplar)), output)
    out.record(record)
    return record


def run_many(records: Iterable[Record], folder: Path, step: Step, out: Output) -> list[Record]:
    """Handle records one after the other, printing each as it is done; a failed one does not stop the others.

    Returns:
        the records as they were printed.
    """
    done = []
    total = len(records) if isinstance(records, list) else None
    with out.progress("pairs", total) as advance:
        for record, path in name_outputs(records, folder):
            done.append(_attempt(record, path, step))
            out.record(done[-1])
            advance()
    return done


def finish(done: list[Record], out: Output) -> None:
    """Sum up on stderr, and exit with 4 where records failed."""
    counts = {status: sum(record.status == status for record in done) for status in ("ok", "skipped", "error")}
    out.note(f"{counts['ok']} done, {counts['skipped']} up to date, {counts['error']} failed")
    if counts["error"]:
        raise typer.Exit(ExitCode.FAILED_ITEMS)


def name_outputs(records: Iterable[Record], folder: Path) -> Iterator[tuple[Record, Path]]:
    """Give every record its file `folder`/ID.png; an id that comes twice is an error, so that no output is lost."""
    seen: set[str] = set()
    for record in records:
        if record.id in seen and not record.failed:
            record = record.failure("this id came before in the same run; ids must differ")
        seen.add(record.id)
        yield record, folder / f"{safe_name(record.id)}.png"


def _attempt(record: Record, path: Path, step: Step) -> Record:
    """A record after `step`; one that has failed before travels on untouched."""
    if record.failed:
        return record
    try:
        return step(record, path)
    except CocosError as error:
        return record.failure(str(error))


def planned(record: Record, path: Path) -> Record:
    """The step of a dry run: the record with the output that it would get."""
    return dataclasses.replace(record, output=str(path), status="skipped")
