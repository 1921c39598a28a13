"""`cocosctl plugins`: which commands, metrics and extractors other packages add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer import Option

from cocosctl import options
from cocosctl.output import Output
from cocosctl.registry import Command, all_commands, load_command, plugin_commands
from cocosnet.doors import GROUPS, doors, open_door
from cocosnet.errors import MissingDependency
from cocosnet.metrics.registry import BUILT_IN

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="List what other packages add: commands, metrics, extractors."
)


@app.callback()
def group() -> None:
    """List what other packages add: commands, metrics, extractors."""


@app.command("list")
def list_plugins(
    check: Annotated[bool, Option("--check", help="Import each one and say whether it loads.")] = False,
    as_json: options.Json = False,
) -> None:
    """List the commands, metrics and extractors that other packages add, and which another of the same name hides."""
    out = Output(as_json)
    for row in [*_commands(check), *_named("metric", check), *_named("extractor", check)]:
        out.row(row, "  ".join((row["kind"], row["name"], row["target"], row["package"], row["state"])))


def _commands(check: bool) -> Iterator[dict[str, Any]]:
    table = all_commands()
    for command in plugin_commands():
        active = table.get(command.name) == command
        yield _row("command", command, active, (lambda command=command: load_command(command)) if check else None)


def _named(kind: str, check: bool) -> Iterator[dict[str, Any]]:
    """What other packages add to the names that `eval --metrics`, or `prepare --extractor`, knows."""
    found = plugin_commands(GROUPS[kind])
    if not found:  # the extractors' own names come with PyTorch, which takes seconds to load
        return
    own, table = _built_in(kind), doors(GROUPS[kind], {})
    for point in found:
        active = point.name not in own and table[point.name].value == point.target
        load = (lambda name=point.name: open_door(name, kind, table)) if check else None
        yield _row(kind, point, active, load)


def _built_in(kind: str) -> set[str]:
    """Names that no other package can take."""
    if kind == "metric":
        return set(BUILT_IN)
    from cocosnet.data import extractors

    return {name for names in extractors.BUILT_IN.values() for name in names}


def _row(kind: str, found: Command, active: bool, load: Callable[[], object] | None) -> dict[str, Any]:
    """One of them as plain values; state is active, hidden, loads, or why it does not load."""
    state = "active" if active else f"hidden by another {kind} of this name"
    if load and active:
        try:
            load()
            state = "loads"
        except MissingDependency as error:
            state = str(error)
    return {
        "kind": kind,
        "name": found.name,
        "target": found.target,
        "package": found.origin,
        "summary": found.summary,
        "state": state,
    }
