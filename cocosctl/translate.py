"""`cocosctl translate`: condition + exemplar -> picture, for two files or for a stream of records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

from cocosctl import options
from cocosctl.jobs import FORETOLD, Step, check_form, finish, own_device, run
from cocosctl.output import Output, speaks
from cocosnet.data.records import Record

PAGES = (".html", ".htm")


def translate(
    weights: options.Model,
    output: Annotated[
        Path, Option("--output", "-o", metavar="OUT", show_default=False, help="The picture; with --manifest a folder.")
    ],
    condition: options.Condition = None,
    exemplar: options.Exemplar = None,
    manifest: options.Manifest = None,
    raw: options.Raw = False,
    size: options.Size = None,
    report: Annotated[
        Path | None,
        Option(
            "--report",
            metavar="FILE",
            dir_okay=False,
            help="Also write an HTML page, and the conditions and warps that it shows to OUT/.parts; makes all again.",
        ),
    ] = None,
    device: options.Device = "auto",
    limit: options.Limit = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Render a condition in the look of an exemplar.

    Two files give one picture of the condition's proportions; --manifest gives one picture a record, OUT/ID.png. Under
    torchrun the records are shared among the processes.
    """
    check_form(condition, exemplar, manifest)
    if report is not None and report.suffix.lower() not in PAGES:  # a picture's name would lose the picture
        raise BadParameter(f"{report}: give a name that ends in {PAGES[0]}", param_hint="--report")
    out = Output(as_json, quiet, verbose)

    def load() -> Step:
        return _translation(weights, device, raw, size, overwrite, report is not None, dry_run)

    done = run(condition, exemplar, manifest, limit, output, load, out)
    if report is not None and not dry_run and speaks():
        _report(report, done, weights)
        out.note(f"report: {report}")
    finish(done, out, FORETOLD if dry_run else "done")


def _translation(
    weights: str, device: str, raw: bool, size: int | None, overwrite: bool, keep_parts: bool, dry_run: bool
) -> Step:
    from cocosnet.inference import Translator

    translator = Translator(weights, device=own_device(device), raw=raw, size=size, keep_parts=keep_parts)

    work = translator.plan if dry_run else translator.translate
    return lambda record, path: work(record, path, overwrite=overwrite)


def _report(path: Path, done: list[Record], weights: str) -> None:
    from cocosnet.viz.report import write_report

    write_report(path, done, title=f"cocosctl translate, weights {weights}")
