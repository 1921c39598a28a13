"""`cocosctl bench`: the matcher on known warps of photographs, and the paper's ablations of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from cocosctl import options
from cocosctl.exits import ExitCode
from cocosctl.output import Output

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="Measure the matcher on known warps of real photographs."
)
Pictures = Annotated[
    Path | None, Argument(metavar="PICTURES", show_default=False, help="A folder of photographs; else the demo's.")
]
Features = Annotated[
    str, Option("--features", metavar="NAME|FILE", help="colour, vgg16, or a trained model: demo, or a file.")
]
COLUMNS = (
    ("side", "level", "{:.0f}"),
    ("epe", "EPE px", "{:.2f}"),
    ("epe_median", "median", "{:.2f}"),
    ("within_1px", "<= 1 px", "{:.1%}"),
    ("within_3px", "<= 3 px", "{:.1%}"),
    ("exact_within_1px", "exact <= 1", "{:.1%}"),
    ("psnr", "PSNR", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("similarity", "similarity", "{:.4f}"),
    ("exact_similarity", "exact", "{:.4f}"),
    ("nearest", "nearest", "{:.1%}"),
    ("candidates", "distinct", "{:.1f}"),
    ("seconds", "s", "{:.3f}"),
    ("peak_mib", "peak MiB", "{:.0f}"),
)


@app.command()
def matching(
    pictures: Pictures = None,
    size: Annotated[int, Option("--size", metavar="PX", min=16, help="Side of the pictures.")] = 512,
    coarse: Annotated[
        int | None,
        Option("--coarse", metavar="PX", min=4, help="Side of the exact level; else size/8, or the model's."),
    ] = None,
    features: Features = "colour",
    engine: Annotated[str, Option("--engine", metavar="NAME", help="As model.matching.backend.")] = "auto",
    candidates: Annotated[
        int | None, Option("--candidates", metavar="K", min=1, help="Matches kept a pixel; else 16, or the model's.")
    ] = None,
    iterations: Annotated[
        int | None, Option("--iterations", metavar="T", min=1, help="Iterations a level; else 5, or the model's.")
    ] = None,
    start: Annotated[
        str | None,
        Option("--start", metavar="best|wide", help="As model.matching.start; else wide, or the model's."),
    ] = None,
    repeats: Annotated[int, Option("--repeats", metavar="N", min=1, help="Timings, of which the least counts.")] = 1,
    baseline: Annotated[
        bool, Option("--baseline/--no-baseline", help="Time the release's arithmetic too, for the speedup.")
    ] = True,
    device: options.Device = "auto",
    seed: options.Seed = None,
    limit: options.Limit = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Match photographs with smooth warps of themselves, where every true match is known.

    A table of every level goes to stderr; stdout gets the sums, with --json one object of everything.
    """
    from cocosnet.bench.matching import BenchSettings, bench_matching
    from cocosnet.checkpoint import resolve_device
    from cocosnet.config import MatchingConfig, load_config

    out = Output(as_json, quiet)
    asked = {"backend": engine, "candidates": candidates, "iterations": iterations, "start": start}
    asked = {name: value for name, value in asked.items() if value is not None}
    load_config(None, [f"model.matching.{name}={value}" for name, value in asked.items()])  # refuses what is none
    paths = _pictures(pictures)[:limit]
    settings = BenchSettings(
        size, coarse, features, MatchingConfig(start="wide"), asked, seed=seed or 0, repeats=repeats, baseline=baseline
    )
    with out.progress("pictures", len(paths)) as advance:
        result = bench_matching(paths, settings, resolve_device(device), _teller(out, advance))
    if not quiet:
        _table(result)
    names = ("engine", "pictures", "seconds", "peak_mib", "speedup")
    out.result(result if as_json else {name: result[name] for name in names})
    if result["failed"]:
        raise typer.Exit(ExitCode.FAILED_ITEMS)


@app.command()
def ablation(
    pictures: Pictures = None,
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Results, a file each; what is there is not done again.")
    ] = Path("ablation"),
    features: Annotated[str, Option("--features", metavar="NAME", help="colour or vgg16.")] = "colour",
    size: Annotated[int, Option("--size", metavar="PX", min=16, help="Side of the pictures.")] = 128,
    coarse: Annotated[int, Option("--coarse", metavar="PX", min=4, help="Side of the exact level.")] = 32,
    hidden: Annotated[int, Option("--hidden", metavar="N", min=1, help="Channels of the refinement's state.")] = 16,
    steps: Annotated[int, Option("--steps", metavar="N", min=1, help="Training steps of a row.")] = 150,
    seeds: Annotated[int, Option("--seeds", metavar="N", min=1, help="Runs of every row, with seeds 1 to N.")] = 3,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train and measure every row of the paper's Tables 4 and 5; writes table.md and table.json into the output folder.

    Prints the tables; with --json the object of table.json.
    """
    import dataclasses
    import json

    from cocosnet.bench.ablation import AblationSettings, rows_of, run_ablation, summarise, tables_as_markdown
    from cocosnet.files import atomic_write

    out = Output(as_json, quiet)
    settings = AblationSettings(size=size, coarse=coarse, features=features, hidden=hidden, steps=steps)
    results = []
    with out.progress("rows", seeds * len(rows_of(settings))) as advance:
        for result in run_ablation(_pictures(pictures), settings, range(1, seeds + 1), output):
            results.append(result)
            out.note(f"{result['row']}, seed {result['seed']}: EPE {result['epe']:.2f} px, PSNR {result['psnr']:.2f}")
            advance()
    tables = summarise(results)
    text = tables_as_markdown(tables, settings)
    whole = {"settings": dataclasses.asdict(settings), "tables": tables}
    atomic_write(output / "table.md", text)
    atomic_write(output / "table.json", json.dumps(whole, indent=1) + "\n")
    out.row(whole, text.rstrip())


def _pictures(folder: Path | None) -> list[Path]:
    """The pictures in a folder; without one, those that travel with the package."""
    from cocosnet.data.images import find_images
    from cocosnet.errors import DataError
    from cocosnet.weights import ASSET_FOLDER

    found = find_images(folder or ASSET_FOLDER / "demo")
    if not found:
        raise DataError(f"{folder}: there are no pictures in this folder; give one that holds photographs")
    return found


def _teller(out: Output, advance: Any) -> Any:
    """What is said of each picture that is done."""

    def tell(path: Path, error: Exception | None) -> None:
        if error is not None:
            out.error(str(error))
        advance()

    return tell


def _table(result: dict[str, Any]) -> None:
    """Every level's figures, and the contest's, on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160)
    title = (
        f"{result['pictures']} pictures, {result['size']}x{result['size']}, {result['features']}, {result['engine']}"
    )
    table = Table(*(heading for _, heading, _ in COLUMNS), title=title)
    for level in result["levels"]:
        table.add_row(*(shape.format(level[name]) for name, _, shape in COLUMNS))
    console.print(table)
    if result["speedup"]:
        console.print(_contest(result))


def _contest(result: dict[str, Any]) -> Any:
    """Ours beside the release's arithmetic, on the PatchMatch levels of one picture."""
    from rich.table import Table

    columns = [column for column in COLUMNS if column[0] in result["ours"]["levels"][0]]
    table = Table("", *(heading for _, heading, _ in columns), title=f"without refinement: {result['speedup']:.1f} x")
    for name in ("ours", "baseline"):
        for level in result[name]["levels"]:
            cells = [shape.format(level[key]) for key, _, shape in columns]
            table.add_row(f"{name}, {result[name]['seconds']:.2f} s", *cells)
    return table
