"""The root command, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from cocosctl.exits import ExitCode, exit_code_of
from cocosctl.output import abandon, flush_or_abandon, prepare_streams, say, speaks, writing_stdout
from cocosctl.registry import LazyGroup
from cocosnet.errors import CocosError, DataError, Stopped
from cocosnet.threads import sleep_when_waiting

EPILOG = (
    "Data goes to stdout, everything else to stderr. Exit codes: "
    + "; ".join(f"{code:d} {code.meaning}" for code in ExitCode)
    + ". COCOSCTL_DEBUG=1 shows tracebacks."
)

LONG = 100  # characters of a file's name that a message shows where the system refuses it
SHARED = "starting processes needs shared memory (/dev/shm) and open files (ulimit -n); --workers 0 starts none"
OURS = ("cocosctl", "cocosnet")

app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    prepare_streams()
    sleep_when_waiting()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    A user's mistake is one line on stderr, with the traceback before it where COCOSCTL_DEBUG=1, and so is what the
    system refuses (a name too long, a full disk) and a package of others' that does not load. Any other exception is a
    defect and is raised. Ctrl-C is told by `__main__`, which hears it also while this loads.
    """
    try:
        _check_folder()
        code = _invoke(arguments)
        with writing_stdout():
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        abandon(sys.stdout)
        return ExitCode.READER_GONE
    except CocosError as error:
        _debug()
        say(str(error) if isinstance(error, Stopped) else f"error: {error}")
        return exit_code_of(error)
    except OSError as error:
        _debug()
        say(f"error: {_told_by_the_system(error)}")
        _hush_destructors()
        flush_or_abandon(sys.stdout)
        return ExitCode.BAD_INPUT
    except ImportError as error:
        package = _package_at_fault(error)
        if package in OURS:
            raise
        _debug()
        reason = " ".join(str(error).split())
        say(f"error: the package {package} does not load ({reason}); install it again, and see `cocosctl doctor`")
        return ExitCode.MISSING


def _package_at_fault(error: ImportError) -> str:
    """The package that could not be imported: the one that the error names, else the one that raised it."""
    return (error.name or _raised_by(error)).partition(".")[0]


def _raised_by(error: Exception) -> str:
    """The name of the module that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", ""))


def _hush_destructors() -> None:
    """Where an error was told: what a library's half-made objects raise while they are taken down is no news.

    Such are the loaders of PyTorch whose processes could not be started; Python would print a traceback for each.
    """
    sys.unraisablehook = lambda unraisable: None


def _check_folder() -> None:
    """Raises DataError where the working folder was deleted: a library of PyTorch's would end this process, with 2."""
    try:
        os.getcwd()
    except OSError as error:
        raise DataError(f"the working folder: {error.strerror}; it may have been deleted, so cd to another") from error


def _told_by_the_system(error: OSError) -> str:
    """The file at fault, shortened, and what the system says of it."""
    reason = error.strerror or " ".join(str(error).split())
    if error.filename is None:
        return f"{reason}; {SHARED}" if _raised_by(error).startswith("multiprocessing.") else reason
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    return f"{name if len(name) <= LONG else name[:LONG] + '...'}: {reason}"


def _invoke(arguments: list[str]) -> int:
    """Parse and run; Typer's own exceptions become codes here."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("cocosctl", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        _debug()
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "cocosctl"
        message = " ".join(error.format_message().split()).rstrip(".")
        if speaks():  # all processes under torchrun have the same command line
            say(f"error: {message} (see `{path} --help`)")
        return error.exit_code
    return ExitCode.OK


def _debug() -> None:
    """Show the traceback of the error at hand where it is asked for."""
    if os.environ.get("COCOSCTL_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()


def _version(wanted: bool) -> None:
    if wanted:
        from cocosnet import __version__

        typer.echo(f"cocosctl {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Translate edges, a label map or a pose into a picture in the look of an exemplar, with CoCosNet v2."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)
