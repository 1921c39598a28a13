"""`cocosctl prepare`: a folder of pictures -> a dataset of pairs; and what is wrong with one that is there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from cocosctl import options
from cocosctl.exits import ExitCode
from cocosctl.jobs import finish, first_process_speaks, own_device
from cocosctl.output import Output, speaks
from cocosnet.config import Config

if TYPE_CHECKING:
    from cocosnet.data.prepare import Preparation

SHEET_NAME = "contact-sheet.jpg"


def prepare(
    source: Annotated[
        Path, Argument(metavar="SOURCE", show_default=False, help="A folder of pictures; with --check a prepared one.")
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", show_default=False, help="The prepared dataset.")
    ] = None,
    recipe: Annotated[
        str | None,
        Option("--recipe", metavar="NAME", help="A dataset's layout and options: ade20k, .., or a YAML file."),
    ] = None,
    task: Annotated[
        Literal["edge", "mask", "pose"] | None, Option("--task", help="What a condition is; else edge.")
    ] = None,
    size: options.Size = None,
    labels: Annotated[
        Path | None, Option("--labels", metavar="DIR", help="Ready-made conditions, named as the pictures.")
    ] = None,
    extractor: Annotated[
        str | None, Option("--extractor", "--edges", metavar="NAME", help="What finds edges or poses, such as hed.")
    ] = None,
    pairs: Annotated[
        str | None,
        Option("--pairs", metavar="HOW", help="Exemplars: random, same-item, retrieval, or a list file."),
    ] = None,
    check: Annotated[
        bool, Option("--check", help="Look for faults in a prepared folder and draw a sheet of it.")
    ] = False,
    overrides: options.Set = None,
    device: options.Device = "auto",
    seed: options.Seed = None,
    workers: options.Workers = None,
    limit: options.Limit = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Turn a folder of pictures into a dataset of pairs.

    Pictures are turned upright, resized and written to DIR/images, their conditions to DIR/conditions, and the pairs to
    DIR/manifest.jsonl; the exemplar of each is another picture of the folder. Running again goes on where it stopped.
    """
    out = Output(as_json, quiet, verbose)
    if check:
        if speaks():
            _check(source, output, limit, dry_run, out)
        return
    if output is None:
        raise typer.BadParameter("say where to write the prepared dataset", param_hint="--output")
    config = _config(recipe, task, {"size": size}, pairs, overrides or [])
    if extractor is not None and config.data.task == "mask":
        raise typer.BadParameter("label maps are files; there is nothing to extract them", param_hint="--extractor")
    _tell_of_idle(overrides or [], out)
    out.detail(f"{config.data} {config.prepare}")
    with first_process_speaks():
        preparation = _plan(source, output, config, limit, overwrite, labels, extractor, seed, device, workers)
        if dry_run:
            _foretell(preparation, out)
        else:
            _run(preparation, out)


def _plan(
    source: Path,
    output: Path,
    config: Config,
    limit: int | None,
    overwrite: bool,
    labels: Path | None,
    extractor: str | None,
    seed: int | None,
    device: str,
    workers: int | None,
) -> Preparation:
    from cocosnet.data.prepare import plan

    return plan(
        source,
        output,
        config,
        limit=limit,
        overwrite=overwrite,
        labels=labels,
        extractor=extractor or "auto",
        seed=seed or 0,
        device=own_device(device),
        workers=workers or 0,
    )


def _config(
    recipe: str | None, task: str | None, data: dict[str, object], pairs: str | None, overrides: list[str]
) -> Config:
    """The recipe or the defaults, with the flags applied; label classes may be left to `prepare` to count."""
    from cocosnet.data.sources import build_config, load_recipe

    flags = [f"data.{key}={value}" for key, value in data.items() if value is not None]
    flags += [f"prepare.pairs={pairs}"] if pairs else []
    if recipe is None:
        return build_config({}, overrides + flags, task)
    if task is not None:
        raise typer.BadParameter("a recipe says the task itself", param_hint="--task")
    return load_recipe(recipe, overrides + flags)


def _tell_of_idle(overrides: list[str], out: Output) -> None:
    """A folder may be prepared with a whole training config's overrides, but most of these change nothing here."""
    idle = [text for text in overrides if not text.strip().startswith(("data.", "prepare.", "data=", "prepare="))]
    if idle:
        out.note(f"warning: --set {', '.join(idle)} changes nothing here; prepare looks at data.* and prepare.*")


def _run(preparation: Preparation, out: Output) -> None:
    from cocosnet.data.prepare import helpers_may_be_killed

    start, done = time.monotonic(), []
    with helpers_may_be_killed(), out.progress("pictures", len(preparation)) as advance:
        for record in preparation.run(advance):
            out.record(record, role="condition")
            done.append(record)
    if done:  # under torchrun the first process speaks for all
        seconds = time.monotonic() - start
        out.detail(f"{seconds:.1f} s, {len(done) / max(seconds, 1e-3):.1f} pictures a second")
        finish(done, out)


def _foretell(preparation: Preparation, out: Output) -> None:
    """What a run would do, and how much it would write."""
    if not speaks():
        return
    total, done = 0, []
    for record, size in preparation.todo():
        out.record(record, role="target")
        done.append(record)
        total += size
    count = sum(record.status == "ok" for record in done)
    out.note(f"would write about {total / 1e6:.2f} MB to {preparation.output}: {count} of {len(done)} pictures")
    if any(record.failed for record in done):
        raise typer.Exit(ExitCode.FAILED_ITEMS)


def _check(folder: Path, output: Path | None, limit: int | None, dry_run: bool, out: Output) -> None:
    """Faults as error records, the sheet's path, and exit 4 where there are faults. A dry run draws no sheet."""
    from cocosnet.data.check import draw_sheet, find_faults
    from cocosnet.data.images import save_image
    from cocosnet.data.records import read_manifest

    records = read_manifest(folder)
    faults = list(find_faults(folder))
    for record in faults:
        out.record(record)
    sheet = output or folder / SHEET_NAME
    drawn = len(faults) < len(records) and not dry_run
    if drawn:
        save_image(draw_sheet(folder, limit or 24), sheet)
    out.note(f"{len(records)} pairs, {len(faults)} faults; " + (f"look at {sheet}" if drawn else "no sheet"))
    if faults:
        raise typer.Exit(ExitCode.FAILED_ITEMS)
    if drawn and not out.as_json:
        out.row({}, str(sheet))
