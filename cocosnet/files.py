"""Files that are never half-written: a temporary file in the same folder, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cocosnet.errors import OutputError

_NAME_LIMIT = 120  # bytes of an output's name that come from the id


@contextlib.contextmanager
def atomic_path(path: str | Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it to `path`, on any error remove it.

    The temporary name keeps `path`'s suffix, so that writers which look at it choose the same format. `failures`: what
    the writer raises, besides OSError, where it cannot write.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, *failures) as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: Exception) -> OutputError:
    """What to raise where writing `path` failed with `error`."""
    cause = (
        error.__context__ if isinstance(error.__context__, OSError) else error
    )  # what a writer met, not what it says
    reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
    return OutputError(f"{path}: cannot write: {reason}; check the folder and its free space")


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` atomically. Raises OutputError as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def safe_name(identifier: str) -> str:
    """A file name for an id that may come from anywhere: no separators, no control characters, not too long.

    Letters (of any script), digits, "-", "_" and inner "." stay. Where anything had to change, eight digits of the id's
    SHA-256 are added, so that two ids never share a name.
    """
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in identifier).lstrip(".")
    while len(name.encode()) > _NAME_LIMIT:
        name = name[:-1]
    if name == identifier:
        return name
    return f"{name}-{hashlib.sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _umask() -> int:
    """The process's umask; reading it means setting it, so it is put back at once."""
    current = os.umask(0)
    os.umask(current)
    return current
