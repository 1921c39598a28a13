"""`cocosctl export`: a model as one file that runs without this package."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from cocosctl import options
from cocosctl.output import Output

SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def export(
    weights: options.Model,
    output: Annotated[
        Path,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            dir_okay=False,
            show_default=False,
            help="Ends in .pt2 (torch.export) or .onnx.",
        ),
    ],
    size: Annotated[
        str | None, Option("--size", metavar="HxW", help="Condition's size in px; one number is a square.")
    ] = None,
    exemplar_size: Annotated[
        str | None, Option("--exemplar-size", metavar="HxW", help="The exemplar's; by default the same.")
    ] = None,
    dynamic: Annotated[
        bool, Option("--dynamic", help="Leave all sizes open; a size given is what is checked.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a model with its matching as a torch.export program or as ONNX, for one pair at a time.

    The file is run and compared with the model before it is kept: `within` is the share of pixels that agree to 1e-3.
    """
    sizes = _size(size, "--size"), _size(exemplar_size, "--exemplar-size")
    from cocosnet.export import export_model, format_of

    out = Output(as_json, quiet)
    format_of(output)  # before a minute is announced
    out.note(f"exporting {weights}: this takes a minute or more")
    done = export_model(weights, output, *sizes, dynamic=dynamic)
    out.result(dataclasses.asdict(done))


def _size(text: str | None, option: str) -> tuple[int, int] | None:
    """Rows and columns of `HxW` or `N`. Raises BadParameter (usage)."""
    if text is None:
        return None
    found = SIZE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r}: rows and columns in px, such as 128x96, or one number", param_hint=option)
    return int(found[1]), int(found[2] or found[1])
