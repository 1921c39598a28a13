"""`cocosctl prepare`: a folder of pictures -> a dataset of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from cocosctl import options
from cocosctl.jobs import finish
from cocosctl.output import Output
from cocosnet.config import Config, load_config
from cocosnet.data.records import Record


def prepare(
    source: Annotated[Path, Argument(metavar="SOURCE", show_default=False, help="A folder of pictures.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", show_default=False, help="The prepared dataset.")],
    task: Annotated[Literal["edge", "mask"] | None, Option("--task", help="What a condition is.")] = None,
    size: options.Size = None,
    labels: Annotated[
        Path | None, Option("--labels", metavar="DIR", help="Ready-made conditions, named as the pictures.")
    ] = None,
    edges: Annotated[
        str | None, Option("--edges", metavar="NAME", help="Edge extractor: auto, hed, hed-small or image.")
    ] = None,
    overrides: options.Set = None,
    device: options.Device = "auto",
    seed: options.Seed = None,
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
    config = _config(task, size, edges, overrides or [])
    out.detail(f"{config.data}")
    if dry_run:
        records = _found(source, limit)
    else:
        from cocosnet.checkpoint import resolve_device
        from cocosnet.data.prepare import prepare as prepare_folder

        records = prepare_folder(
            source,
            output,
            config,
            limit=limit,
            overwrite=overwrite,
            labels=labels,
            seed=seed or 0,
            device=str(resolve_device(device)),
        )
    done = []
    with out.progress("pictures", limit) as advance:
        for record in records:
            out.record(record, role="target" if dry_run else "condition")
            done.append(record)
            advance()
    finish(done, out)


def _config(task: str | None, size: int | None, edges: str | None, overrides: list[str]) -> Config:
    """The defaults with the flags applied. The task comes last, as classes may be left to `prepare` to count."""
    named = {"size": size, "edges": edges}
    config = load_config(None, overrides + [f"data.{key}={value}" for key, value in named.items() if value is not None])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, task=task or config.data.task))


def _found(source: Path, limit: int | None) -> Iterator[Record]:
    """The pictures that would be prepared."""
    from cocosnet.data.images import find_images

    for path in find_images(source)[:limit]:
        yield Record(id=str(path.relative_to(source)), target=str(path), status="skipped")
