"""What `translate` and `warp-visualize` share: where records come from, and the loop over them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import typer

from cocosctl.exits import ExitCode, exit_code_of
from cocosctl.output import Output, speaks
from cocosnet.data.records import LABEL_PATHS, Record, iter_records, read_manifest
from cocosnet.errors import CocosError, DataError, OutputError
from cocosnet.files import safe_name
from cocosnet.launcher import place
from cocosnet.memory import keep_freed_memory

DEMO_MANIFEST = "demo/manifest.jsonl"

FORETOLD = "would be made"  # what a dry run says of a record that is not up to date

Step = Callable[[Record, Path], Record]


def open_records(manifest: str, limit: int | None = None) -> Iterable[Record]:
    """Records of a manifest file, a prepared folder, `demo` (the shipped one) or `-` (stdin, as the lines come).

    Raises:
        DataError: the manifest cannot be read, or no record comes. A bad line is an error record, not an exception.
        MissingWeights: the shipped demo is not there.
        BadParameter (usage): stdin, and there are several processes.
    """
    if manifest == "-":
        if place()[1] > 1:
            raise typer.BadParameter(
                "processes cannot share stdin; save the records to a file", param_hint="--manifest"
            )
        return _some(islice(iter_records(sys.stdin), limit))
    if manifest == "demo" and not Path(manifest).exists():
        from cocosnet.weights import packed_file

        manifest = str(packed_file(DEMO_MANIFEST))
    return read_manifest(manifest)[:limit]


def _some(records: Iterator[Record]) -> Iterator[Record]:
    """The records of a stream; raises DataError where it ends before the first."""
    first = next(records, None)
    if first is None:
        raise DataError("no record came in; check the command before this one in the pipe")
    yield first
    yield from records


def own_device(device: str) -> str:
    """The device of that name for this process: under torchrun each takes the GPU of its number.

    Raises MissingDependency where it is not there.
    """
    import torch

    from cocosnet import groups
    from cocosnet.checkpoint import resolve_device

    if device == "cuda":  # before anything is put on it: all processes would start on the first GPU
        device = str(groups.own_device(torch.device(device)))
    own = groups.own_device(resolve_device(device))
    groups.check_own_gpu(own)
    return str(own)


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
    load: Callable[[], Step],
    out: Output,
) -> list[Record]:
    """Handle two files, or the records of a manifest where one is given, by the step that `load` gives.

    Of several processes (`torchrun`) each handles its share of the manifest; two files are the first one's.

    Returns:
        the records as they were printed.
    """
    keep_freed_memory()
    if manifest is None:
        return [run_pair(condition, exemplar, output, load(), out)] if speaks() else []
    with first_process_speaks():
        records = open_records(manifest, limit)
        with _group() as agreed:
            return run_many(records, output, agreed(load), out)


def run_pair(condition: Path, exemplar: Path, output: Path, step: Step, out: Output) -> Record:
    """Handle one pair of files and print what became of it; what is wrong is raised."""
    record = Record(id=output.stem or "pair", condition=str(condition), exemplar=str(exemplar))
    fault = _fault(record, output, _inputs(record), {})
    if fault is not None:
        raise DataError(fault)
    record = step(record, output)
    out.record(record)
    return record


def run_many(records: Iterable[Record], folder: Path, step: Step, out: Output) -> list[Record]:
    """Handle records one after the other, printing each as it is done; a failed one does not stop the others.

    Returns:
        the records as they were printed, in every process.

    Raises:
        OutputError, or what is no DataError: the next record would fare no better.
    """
    done = []
    total = len(records) if isinstance(records, list) else None
    with out.progress("pairs", total) as advance:
        for record in _handled(name_outputs(records, folder), step):
            done.append(record)
            out.record(record)
            advance()
    return done


def finish(done: list[Record], out: Output, made: str = "done") -> None:
    """Sum up on stderr, and exit with 4 where records failed. `made`: what has become of those that are ok."""
    counts = {status: sum(record.status == status for record in done) for status in ("ok", "skipped", "error")}
    out.note(f"{counts['ok']} {made}, {counts['skipped']} up to date, {counts['error']} failed")
    if counts["error"] and speaks():  # torchrun would end the first process where another exits with an error
        raise typer.Exit(ExitCode.FAILED_ITEMS)


def name_outputs(records: Iterable[Record], folder: Path) -> Iterator[tuple[Record, Path]]:
    """Give every record its file `folder`/ID.png.

    No file is lost: a record whose file is another's output already, or a picture that the run's records name, is an
    error. Of a stream only the records so far are known, so one is an error, too, whose picture was written over.
    """
    outputs: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for record in records if isinstance(records, list) else ():
        inputs |= _inputs(record)
    for record in records:
        path = folder / f"{safe_name(record.id)}.png"
        if not record.failed:
            inputs |= _inputs(record)
            fault = _fault(record, path, inputs, outputs)
            if fault is None:
                outputs[_real(path)] = record.id
            else:
                record = record.failure(fault)
        yield record, path


def _fault(record: Record, path: Path, inputs: dict[str, str], outputs: dict[str, str]) -> str | None:
    """Why a record may not be written to `path`, if so; both tables are of a file's real path."""
    real = _real(path)
    if real in outputs:
        return f"id {outputs[real]!r} came before in the same run, with the same file {path}; ids must differ"
    if real in inputs:
        return f"its output {path} would replace {inputs[real]}, which this run reads; write somewhere else"
    lost = next((file for file in _inputs(record) if file in outputs), None)
    return lost and f"{lost} is now the output of {outputs[lost]!r} in the same run; write somewhere else"


def _inputs(record: Record) -> dict[str, str]:
    """The pictures that a record names: real path -> path."""
    labels = (record.extra.get(role) for role in LABEL_PATHS)
    files = (record.condition, record.exemplar, record.exemplar_condition, record.target, *labels)
    return {_real(file): file for file in files if isinstance(file, str)}


def _real(path: str | Path) -> str:
    """The path with all links followed; one that no file can have stays as it is."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return str(path)


@contextlib.contextmanager
def first_process_speaks() -> Iterator[None]:
    """Under torchrun an error is raised in all processes; the others only exit with its code."""
    try:
        yield
    except CocosError as error:
        if not speaks():
            raise typer.Exit(exit_code_of(error)) from error
        raise


@contextlib.contextmanager
def _group() -> Iterator[Callable[[Callable[[], Step]], Step]]:
    """Yield what calls a function in all processes and raises in all what is wrong in one; ends the group after it."""
    if place()[1] == 1:
        yield lambda work: work()
        return
    from cocosnet import groups

    groups.join_group()
    try:
        yield groups.agree
    finally:
        groups.end_group()


def _handled(named: Iterator[tuple[Record, Path]], step: Step) -> Iterator[Record]:
    """Records after `step`, in their order. Several processes take one record each and come together after it."""
    rank, size = place()
    if size == 1:
        yield from (_attempt(record, path, step) for record, path in named)
        return
    from cocosnet.groups import all_alive, everyone

    while turn := list(islice(named, size)):
        mine = _caught(*turn[rank], step) if rank < len(turn) else None
        with all_alive():
            found = everyone(mine)
        for record in found[: len(turn)]:
            if isinstance(record, CocosError):
                raise record
            yield record


def _caught(record: Record, path: Path, step: Step) -> Record | CocosError:
    """As `_attempt`, with what ends the batch as a value, for the other processes."""
    try:
        return _attempt(record, path, step)
    except CocosError as error:
        return error


def _attempt(record: Record, path: Path, step: Step) -> Record:
    """A record after `step`; one that has failed before travels on untouched. What all records share is raised."""
    if record.failed:
        return record
    try:
        return step(record, path)
    except OutputError:
        raise
    except DataError as error:
        return record.failure(str(error))
