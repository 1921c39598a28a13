"""`cocosctl plugins`: which commands other packages add."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer
from typer import Option

from cocosctl import options
from cocosctl.output import Output
from cocosctl.registry import Command, all_commands, load_command, plugin_commands
from cocosnet.errors import MissingDependency

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="List the commands that other packages add.")


@app.callback()
def group() -> None:
    """List the commands that other packages add."""


@app.command("list")
def list_plugins(
    check: Annotated[bool, Option("--check", help="Import each one and say whether it loads.")] = False,
    as_json: options.Json = False,
) -> None:
    """List the commands that other packages add, and which of them are hidden by a command of the same name."""
    out = Output(as_json)
    table = all_commands()
    for command in plugin_commands():
        row = _row(command, table.get(command.name) == command, check)
        out.row(row, f"{command.name}  {command.target}  {command.origin}  {row['state']}")


def _row(command: Command, active: bool, check: bool) -> dict[str, Any]:
    """One command as plain values; state is active, hidden, loads, or why it does not load."""
    state = "active" if active else "hidden by another command of this name"
    if check and active:
        try:
            with contextlib.redirect_stdout(
                sys.stderr
            ):  # what a package prints while it is imported is none of our data
                load_command(command)
            state = "loads"
        except MissingDependency as error:
            state = str(error)
    return {
        "name": command.name,
        "target": command.target,
        "package": command.origin,
        "summary": command.summary,
        "state": state,
    }
