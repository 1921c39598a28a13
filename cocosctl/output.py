"""The one place that decides what goes where: data to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cocosnet.data.records import Record, finite
from cocosnet.files import cannot_write
from cocosnet.launcher import place

if TYPE_CHECKING:
    from rich.console import Console


def speaks() -> bool:
    """Whether this process speaks for its group: without a launcher it does, of several the first one."""
    return place()[0] == 0


class Output:
    """What a command says. With `as_json` data is JSON, one object a line; otherwise it is text, one path a line.

    Of several processes under torchrun only the first says anything.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.mute = not speaks()
        self.as_json, self.quiet = as_json, quiet or self.mute
        self.verbose = verbose and not self.quiet
        self._lift_bar: Callable[[], None] = lambda: None  # before data that is shown where the bar stands
        logging.getLogger("cocosnet").handlers = [_FromLibrary(self)]
        logging.getLogger("cocosnet").setLevel(logging.INFO)

    def record(self, record: Record, role: str = "output") -> None:
        """Send one record on: as JSON, or as the path of its `role`. A failed one is also told on stderr.

        Paths in JSON are absolute, so that what is stored in whatever folder is a manifest.
        """
        if self.mute:
            return
        if record.failed:
            self.error(f"{record.id}: {record.error}")
        if self.as_json:
            self._send(record.rebased(_absolute).to_json())
        elif not record.failed:
            self._send((getattr(record, role) or "").replace("\r", "\\r").replace("\n", "\\n"))  # one path a line

    def result(self, values: dict[str, Any]) -> None:
        """Print one object: as JSON, or as a line `name value` for each entry."""
        if self.mute:
            return
        if self.as_json:
            self._send(_json(values))
            return
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            self._send(f"{name:<{width}}  {_readable(value)}")

    def row(self, values: dict[str, Any], text: str) -> None:
        """Print one row of a list: the object as JSON, or `text`."""
        if not self.mute:
            self._send(_json(values) if self.as_json else text)

    def note(self, text: str) -> None:
        """Say something of interest, unless quiet."""
        if not self.quiet:
            say(text)

    def detail(self, text: str) -> None:
        """Say something that only --verbose asks for."""
        if self.verbose:
            say(text)

    def error(self, text: str) -> None:
        """Say what went wrong, however quiet."""
        if not self.mute:
            say(f"error: {text}")

    @contextlib.contextmanager
    def progress(self, task: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Yield a function to call after each item; draws a bar where stderr is a terminal, and nothing elsewhere."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn(task), BarColumn(), MofNCompleteColumn(), rate, TextColumn("left"), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True) as bar:
            item = bar.add_task(task, total=total, rate="")

            def advance() -> None:
                bar.advance(item)
                bar.update(item, rate=f"{bar.tasks[item].speed or 0:.1f}/s")

            with self._bar_on(console):
                yield advance

    @contextlib.contextmanager
    def _bar_on(self, console: Console) -> Iterator[None]:
        """While a bar stands: data that goes to a terminal, too, takes the bar's line, and the bar is drawn below."""
        from rich.control import Control
        from rich.segment import ControlType

        before = self._lift_bar
        if sys.stdout.isatty():
            erase = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
            self._lift_bar = lambda: console.control(erase)
        try:
            yield
        finally:
            self._lift_bar = before

    def _send(self, text: str) -> None:
        """Write a line of data to stdout at once, so that the next command of a pipe can start on it."""
        self._lift_bar()
        with writing_stdout():
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


class _FromLibrary(logging.Handler):
    """What the library tells and warns of, said as the command says everything; else Python would print it bare."""

    def __init__(self, out: Output) -> None:
        super().__init__(logging.INFO)
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless quiet."""
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        self.out.note(kind + record.getMessage())


def say(text: str) -> None:
    """Write one line to stderr; control characters of odd file names are shown, not obeyed."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    with contextlib.suppress(OSError):
        sys.stderr.write(f"cocosctl: {line}\n")
    flush_or_abandon(sys.stderr)


def prepare_streams() -> None:
    """Make the standard streams UTF-8 whatever the locale, and let file names that are not UTF-8 pass through.

    One that the caller has closed (`>&-`) leads nowhere, and nothing comes from it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it lives as long as the process
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def abandon(stream: TextIO) -> None:
    """Where a stream cannot be written: send what is still buffered nowhere, so that Python's exit stays silent."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def flush_or_abandon(stream: TextIO) -> None:
    """Send on what is buffered, nowhere if need be."""
    try:
        stream.flush()
    except OSError:
        abandon(stream)


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """Around what writes to stdout: a full disk behind it is one line. Raises OutputError; a reader that has gone away
    is none of these."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon(sys.stdout)
        raise cannot_write("stdout", error) from error


def _readable(value: Any) -> str:
    """A number shortly, anything nested as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    """One line of JSON; numbers that JSON has no word for (NaN, infinities) become null."""
    return json.dumps(finite(value), allow_nan=False)


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if name else name
