"""`cocosctl weights`: what is where."""

from __future__ import annotations

import dataclasses

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
    """List the shipped and the external weights; opens no socket."""
    from cocosnet import weights

    out = Output(as_json, quiet)
    for path in sorted(weights.ASSET_FOLDER.glob("*.safetensors")):
        row = {"name": path.stem, "path": str(path), "size": path.stat().st_size, "used_by": "shipped with the package"}
        out.row(row, _line(path.stem, row["size"], str(path)))
    for weight in weights.REGISTRY.values():
        found = weights.locate_weights(weight.name)
        row = dataclasses.asdict(weight) | {"path": str(found) if found else None}
        out.row(row, _line(weight.name, weight.size, str(found) if found else f"absent; needed by: {weight.used_by}"))
    out.note("searched: " + ", ".join(map(str, weights.search_folders())))


def _line(name: str, size: int, where: str) -> str:
    return f"{name:<14} {size / 1e6:>7.1f} MB  {where}"
