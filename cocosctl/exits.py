"""The exit codes, and which error means which."""

from __future__ import annotations

from enum import IntEnum

from cocosnet import errors


class ExitCode(IntEnum):
    """What a finished command tells the shell; `meaning` is what the help says of it."""

    OK = 0, "done"
    FAILURE = 1, "a defect of cocosctl"
    USAGE = 2, "wrong command line"
    BAD_INPUT = 3, "bad data, config or checkpoint"
    FAILED_ITEMS = 4, "finished, but some records failed"
    MISSING = 5, "weights, a dependency or a device is missing"
    STOPPED = 75, "stopped by a signal after saving; run again to go on"
    INTERRUPTED = 130, "Ctrl-C"
    READER_GONE = 141, "the reader of stdout went away, as with `| head -1`; what every Unix filter reports"

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        """An int with its meaning."""
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code


_CODES = (
    (errors.MissingWeights, ExitCode.MISSING),
    (errors.MissingDependency, ExitCode.MISSING),
    (errors.Stopped, ExitCode.STOPPED),
    (errors.HelperKilled, ExitCode.STOPPED),
    (errors.DataError, ExitCode.BAD_INPUT),
    (errors.ConfigError, ExitCode.BAD_INPUT),
    (errors.CheckpointError, ExitCode.BAD_INPUT),
)


def exit_code_of(error: errors.CocosError) -> ExitCode:
    """The exit code for an error that reached the top; a class that the table does not know is a plain failure."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILURE)
