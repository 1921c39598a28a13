"""`cocosctl reproduce`: one of the paper's tables, every row trained, translated and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from cocosctl import options
from cocosctl.exits import ExitCode
from cocosctl.output import Output


def reproduce(
    table: Annotated[str, Argument(metavar="TABLE", show_default=False, help="table1 to table5.")],
    data: Annotated[
        Path, Option("--data", metavar="DIR", show_default=False, help="Holds one prepared folder a dataset.")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", show_default=False, help="Runs and the table.")],
    datasets: Annotated[str | None, Option("--datasets", metavar="A,B,..", help="Leave out the others.")] = None,
    metrics: Annotated[str | None, Option("--metrics", metavar="A,B,..", help="Instead of the table's.")] = None,
    overrides: options.Set = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Reproduce a table of the paper.

    Trains the model of every row on every dataset, translates what was held out, measures, and writes DIR/TABLE.md and
    DIR/TABLE.json. The same command goes on where it stopped; --dry-run prints the training of each row as a command.
    """
    from cocosnet import reproduce as library

    out = Output(as_json, quiet, verbose)
    cells = library.table_cells(
        table, data, output, datasets=_names(datasets), metrics=_names(metrics), overrides=overrides or []
    )
    if dry_run:
        for cell in cells:
            out.row({"dataset": cell.dataset, "row": cell.row, "command": cell.command}, cell.command)
        return
    found = library.reproduce(table, cells, output, device, out.note)
    out.row(found, library.as_markdown(found).rstrip())
    _finish(found["rows"], out)


def _finish(rows: list[dict[str, Any]], out: Output) -> None:
    """Say which rows lack pairs, and exit with 4 where one does."""
    incomplete = [row for row in rows if row["result"]["failed"]]
    for row in incomplete:
        failed, total = row["result"]["failed"], row["result"]["failed"] + row["result"]["count"]
        place = f"{row['dataset']}/{row['row']}"
        out.error(f"{place}: {failed} of {total} held-out pairs failed, e.g. {row['result']['errors'][0]}")
    if incomplete:
        raise Exit(ExitCode.FAILED_ITEMS)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
