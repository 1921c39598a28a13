"""The flags that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Json = Annotated[bool, Option("--json", help="Print data as JSON, one object a line.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Say more on stderr.")]
Device = Annotated[str, Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int | None, Option("--seed", metavar="N", min=0, max=2**63 - 1, help="Seed of every random choice.")]
Workers = Annotated[int | None, Option("--workers", metavar="N", min=0, help="Processes that load data.")]
Limit = Annotated[int | None, Option("--limit", metavar="N", min=1, help="Stop after N items.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Make again what is up to date.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what would be done; write nothing.")]
Set = Annotated[
    list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="Override one config value; repeat at will.")
]
Manifest = Annotated[
    str | None,
    Option(
        "--manifest",
        "-m",
        metavar="FILE",
        help="Records to work on: a manifest, a prepared folder, - for stdin, or demo for the shipped pictures.",
    ),
]
Model = Annotated[
    str,
    Option(
        "--weights",
        "-w",
        metavar="NAME|FILE",
        help="The model: a .safetensors file, a folder of `train`, or a shipped (demo, ..) or imported name.",
    ),
]
Raw = Annotated[bool, Option("--raw", help="The condition is a photo: extract the condition from it on the way.")]
Size = Annotated[int | None, Option("--size", metavar="PX", min=1, help="Shorter side of the pictures.")]
Condition = Annotated[
    Path | None,
    Argument(
        metavar="CONDITION", show_default=False, help="What to render: edges, a label map, a pose; with --raw a photo."
    ),
]
Exemplar = Annotated[
    Path | None, Argument(metavar="EXEMPLAR", show_default=False, help="The picture whose look to take.")
]
