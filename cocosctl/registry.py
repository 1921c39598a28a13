"""The table of commands: name -> "module:attribute", imported only when the command runs or its own help is asked for.

Built-in commands and those of installed packages come through the same table. A package adds one with

    [project.entry-points."cocosctl.plugins"]
    stylize = "my_package.cli:stylize"        # a typed function, or a Typer app

and its distribution's summary is what the root help shows.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from cocosnet.errors import CocosError, MissingDependency

PLUGIN_GROUP = "cocosctl.plugins"
BUILT_IN = "cocosctl"


@dataclass(frozen=True)
class Command:
    """One row: where a command lives and what the root help says of it."""

    name: str
    target: str  # "module:attribute"; the attribute is a typed function or a Typer app
    summary: str
    origin: str = BUILT_IN  # the distribution that brings it


COMMANDS = (
    Command("prepare", "cocosctl.prepare:prepare", "Turn a folder of pictures into a dataset of pairs."),
    Command("train", "cocosctl.train:train", "Train a model on a prepared dataset; run again to resume."),
    Command("translate", "cocosctl.translate:translate", "Render a condition in the look of an exemplar."),
    Command("warp-visualize", "cocosctl.warp_visualize:warp_visualize", "Draw what was matched, level by level."),
    Command("eval", "cocosctl.evaluate:evaluate", "Measure outputs: swd, psnr, ssim, l1, fid and more."),
    Command("reproduce", "cocosctl.reproduce:reproduce", "Run one of the paper's tables: train, translate, measure."),
    Command("bench", "cocosctl.bench:app", "Measure the matcher where every true match is known."),
    Command("export", "cocosctl.export:export", "Write a model as a torch.export program or as ONNX."),
    Command("weights", "cocosctl.weights:app", "Show which weights are here and where they were found."),
    Command("config", "cocosctl.configs:app", "List, show, check and compare configs."),
    Command("doctor", "cocosctl.doctor:doctor", "Report what this machine has and what is missing."),
    Command("plugins", "cocosctl.plugins:app", "List what other packages add: commands, metrics, extractors."),
)
ALIASES = {"prepare-data": "prepare", "evaluate": "eval"}


def plugin_commands(group: str = PLUGIN_GROUP) -> list[Command]:
    """What installed packages declare in a group of entry points, their commands unless another is asked for, by name.

    Reads their metadata and imports none of them.
    """
    found = [
        Command(point.name, point.value, _summary(point), (point.dist and point.dist.name) or "unknown")
        for point in entry_points(group=group)
    ]
    return sorted(found, key=lambda command: (command.name, command.origin))


def all_commands() -> dict[str, Command]:
    """The whole table. A plug-in can neither replace a built-in command nor an alias; of two alike the first counts."""
    table = {command.name: command for command in COMMANDS}
    for command in plugin_commands():
        if command.name not in ALIASES:
            table.setdefault(command.name, command)
    return table


def load_command(command: Command) -> Any:
    """Import a command and return it as a Typer command object.

    Raises:
        MissingDependency: a plug-in cannot be imported, or names something that is no command. The other commands are
            not touched by it. A built-in command's own import error is a defect and is raised as it is.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a package prints while it is imported is no data
            return _as_command(EntryPoint(command.name, command.target, PLUGIN_GROUP).load())
    except CocosError:
        raise
    except (Exception, SystemExit) as error:  # whatever a foreign module raises while it is imported
        if command.origin == BUILT_IN:
            raise
        raise MissingDependency(
            f"{command.name}: the plug-in {command.target} of package {command.origin} does not "
            f"load ({type(error).__name__}: {error}); update or uninstall it"
        ) from error


class LazyGroup(TyperGroup):
    """The root group: knows every command by name and imports the one that is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """Names in the order of the help."""
        return list(all_commands())

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        """The command called `cmd_name` or aliased so; None where there is none. Raises as `load_command` does."""
        command = all_commands().get(ALIASES.get(cmd_name, cmd_name))
        return load_command(command) if command else None

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        """The command that `args` begins with and the rest of `args`; an unknown name is a usage error with a hint."""
        names = [*all_commands(), *ALIASES]
        if args and not args[0].startswith("-") and args[0] not in names:
            ctx.fail(f"there is no command {args[0]!r}{_nearest(args[0], names)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        """Write the table of the root help from the summaries, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, _described(command)) for command in all_commands().values()])


def _as_command(loaded: Any) -> Any:
    """A Typer app as it is, a function as an app of one command."""
    if not isinstance(loaded, typer.Typer):
        function, loaded = loaded, typer.Typer(add_completion=False, rich_markup_mode=None)
        if not callable(function):
            raise TypeError(f"{function!r} is neither a function nor a Typer app")
        loaded.command()(function)
    return typer.main.get_command(loaded)


def _described(command: Command) -> str:
    names = ", ".join(alias for alias, name in ALIASES.items() if name == command.name)
    return command.summary + (f" Also: {names}." if names else "")


def _summary(point: Any) -> str:
    summary = (point.dist.metadata or {}).get("Summary") if point.dist else None
    return " ".join((summary or "").split()) or "(no summary)"


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; `cocosctl --help` lists them"
