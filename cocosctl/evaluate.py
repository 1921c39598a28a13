"""`cocosctl eval`: outputs -> numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from cocosctl import options
from cocosctl.exits import ExitCode
from cocosctl.jobs import open_records
from cocosctl.output import Output
from cocosnet.data.records import Record
from cocosnet.errors import DataError


def evaluate(
    metrics: Annotated[
        str, Option("--metrics", metavar="A,B,..", show_default=False, help="Names of metrics, e.g. swd,psnr,ssim.")
    ],
    manifest: options.Manifest = None,
    outputs: Annotated[Path | None, Option("--outputs", metavar="DIR", help="Made pictures, not records.")] = None,
    targets: Annotated[Path | None, Option("--targets", metavar="DIR", help="True pictures of the same names.")] = None,
    exemplars: Annotated[Path | None, Option("--exemplars", metavar="DIR", help="Exemplars of the same names.")] = None,
    device: options.Device = "auto",
    seed: options.Seed = None,
    limit: options.Limit = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure outputs: against targets, or against exemplars.

    Prints one object: with --json as JSON with protocols, counts and versions, otherwise a line `name value` a metric.
    """
    records = _records(manifest, outputs, targets, exemplars, limit)
    from cocosnet.checkpoint import resolve_device
    from cocosnet.metrics import evaluate as measure

    out = Output(as_json, quiet, verbose)
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    with out.progress("pairs", len(records) if isinstance(records, list) else None) as advance:
        result = measure(_counted(records, advance), names, str(resolve_device(device)), seed=seed or 0)
    if not result["count"] and not result["failed"]:
        raise DataError("there is nothing to measure: no record came in; check the command before this one in the pipe")
    out.result(result if as_json else {name: entry["value"] for name, entry in result["metrics"].items()})
    _sum_up(result, out)


def _records(
    manifest: str | None, outputs: Path | None, targets: Path | None, exemplars: Path | None, limit: int | None
) -> Iterable[Record]:
    """Records of a manifest or of folders, whichever is named."""
    if manifest is not None:
        if outputs or targets or exemplars:
            raise typer.BadParameter("give --manifest or folders, not both", param_hint="--manifest")
        return open_records(manifest, limit)
    if outputs is None or targets is None:
        raise typer.BadParameter("give --manifest, or --outputs and --targets", param_hint="--manifest")
    from cocosnet.metrics import records_from_folders

    return records_from_folders(outputs, targets, exemplars)[:limit]


def _counted(records: Iterable[Record], advance: Any) -> Iterable[Record]:
    for record in records:
        yield record
        advance()


def _sum_up(result: dict[str, Any], out: Output) -> None:
    """Counts and the first reasons to stderr; exit 4 where a record could not be measured."""
    for message in result["errors"]:
        out.error(message)
    out.note(f"{result['count']} pairs measured, {result['failed']} failed")
    if result["failed"]:
        raise typer.Exit(ExitCode.FAILED_ITEMS)
