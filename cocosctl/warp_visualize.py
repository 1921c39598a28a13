"""`cocosctl warp-visualize`: what was matched with what, level by level, as one picture a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from cocosctl import options
from cocosctl.jobs import FORETOLD, Step, check_form, finish, own_device, run
from cocosctl.output import Output


def warp_visualize(
    weights: options.Model,
    output: Annotated[
        Path, Option("--output", "-o", metavar="OUT", show_default=False, help="The picture; with --manifest a folder.")
    ],
    condition: options.Condition = None,
    exemplar: options.Exemplar = None,
    manifest: options.Manifest = None,
    raw: options.Raw = False,
    size: options.Size = None,
    device: options.Device = "auto",
    limit: options.Limit = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw every level's warp, flow, score and match lines.

    Two files give one picture; --manifest gives one picture a record, OUT/ID.png. Under torchrun the records are shared
    among the processes.
    """
    check_form(condition, exemplar, manifest)
    out = Output(as_json, quiet, verbose)

    def load() -> Step:
        return _visualization(weights, device, raw, size, dry_run)

    done = run(condition, exemplar, manifest, limit, output, load, out)
    finish(done, out, FORETOLD if dry_run else "done")


def _visualization(weights: str, device: str, raw: bool, size: int | None, dry_run: bool) -> Step:
    from cocosnet.inference import Translator

    translator = Translator(weights, device=own_device(device), raw=raw, size=size)
    translator.check_matching()
    return (lambda record, path: translator.plan(record, path, overwrite=True)) if dry_run else translator.visualize
