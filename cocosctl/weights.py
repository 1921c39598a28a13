"""`cocosctl weights`: what is where, and the authors' released weights."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from cocosctl import options
from cocosctl.output import Output

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="Show which weights are here and where they were found."
)


@app.callback()
def group() -> None:
    """Show which weights are here and where they were found."""


@app.command("list")
def list_weights(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """List the shipped, the imported and the external weights; opens no socket."""
    from cocosnet import weights

    out = Output(as_json, quiet)
    for path in sorted(weights.ASSET_FOLDER.glob("*.safetensors")):
        _row(out, path, "shipped with the package")
    for name, path in weights.imported_models().items():
        _row(out, path, f"--weights {name}")
    for weight in weights.REGISTRY.values():
        found = weights.locate_weights(weight.name)
        row = dataclasses.asdict(weight) | {"path": str(found) if found else None}
        absent = f"absent, {weight.filename}; needed by: {weight.used_by}"
        out.row(row, _line(weight.name, weight.size, str(found) if found else absent))
    searched = ", ".join(map(str, weights.search_folders()))
    out.note(f"searched: {searched}; new files go to {weights.store_folder()}")


@app.command("import")
def import_weights(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", show_default=False, help="Corr and G, and D at will.")
    ],
    name: Annotated[str, typer.Option("--as", metavar="NAME", show_default=False, help="What to call the model.")],
    mended: Annotated[
        bool, typer.Option("--mended", help="Mend three defects of its matching (release-fixed).")
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert the authors' CoCosNet v2 release (.pth or .safetensors) to a checkpoint that `--weights NAME` takes.

    Nothing but plain tensors is read from a .pth file. What does not fit is listed, and nothing is written.
    """
    from cocosnet.checkpoint import SHIPPED, save_model
    from cocosnet.convert import convert_release
    from cocosnet.weights import imported_folder

    if not name or name in SHIPPED or name != Path(name).name or name.startswith(".") or name.endswith(".safetensors"):
        raise typer.BadParameter(f"{name!r}: a name of one's own, without folders or suffix", param_hint="--as")
    path = imported_folder() / f"{name}.safetensors"
    if os.path.exists(path) and not overwrite:
        raise typer.BadParameter(f"{path} is there already; choose another name or --overwrite", param_hint="--as")
    out = Output(as_json, quiet)
    model = convert_release(files, "release-fixed" if mended else "release", out.note)
    save_model(
        path, model, {"cocosctl.source": "the authors' CoCosNet v2 release: " + ", ".join(f.name for f in files)}
    )
    size = path.stat().st_size
    out.row({"name": name, "path": str(path), "size": size, "used_by": f"--weights {name}"}, str(path))
    out.note(f"use it as --weights {name} ({size / 1e6:.0f} MB)")


def _row(out: Output, path: Path, used_by: str) -> None:
    """A checkpoint that is here, called as its file."""
    size = path.stat().st_size
    out.row({"name": path.stem, "path": str(path), "size": size, "used_by": used_by}, _line(path.stem, size, str(path)))


def _line(name: str, size: int, where: str) -> str:
    return f"{name:<14} {size / 1e6:>7.1f} MB  {where}"
