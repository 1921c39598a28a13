"""Files that are never half-written: a temporary file in the same folder, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cocosnet.errors import OutputError

logger = logging.getLogger(__name__)

_locks: set[IO[str]] = set()  # files of the locks that this process holds
_NAME_LIMIT = 120  # bytes of an output's name that come from the id


@contextlib.contextmanager
def atomic_path(path: str | Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it to `path`, on any error remove it.

    The temporary name keeps `path`'s suffix, so that writers which look at it choose the same format. A link stays, and
    the file that it leads to is replaced. What is there and is no file (a pipe, a device) is itself yielded: it cannot
    be replaced, only written into. `failures`: what the writer raises, besides OSError, where it cannot write.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    try:
        if _is_special(path):
            yield Path(path)
            return
        with _renamed(Path(os.path.realpath(path)), Path(path).suffix) as temporary:
            yield temporary
    except (OSError, *failures) as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def _renamed(path: Path, suffix: str) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_special(path: str | Path) -> bool:
    """Whether there is something that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


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
    SHA-256 are added, so that ids that differ there have different names. An id may still be what another is called.
    """
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in identifier).lstrip(".")
    while len(name.encode()) > _NAME_LIMIT:
        name = name[:-1]
    if name == identifier:
        return name
    return f"{name}-{hashlib.sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@contextlib.contextmanager
def only_one(folder: Path, command: str) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, for one run of `command` at a time, by a lock on its `.lock`.

    The system takes the lock back when the process is killed, whatever its children still do: they do not keep it.

    Raises:
        OutputError: another run, of this process or another, holds it; or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows, where two runs at once are the user's own affair
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "w")
    except OSError as error:
        raise OutputError(f"{folder}: cannot write here: {error.strerror}; choose another folder") from error
    with stream, _not_inherited(stream):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another {command} is at work on this folder; wait for it, choose another folder, or delete "
                f"{folder / '.lock'} if its machine is gone"
            ) from error
        except OSError as error:  # a file system without locks, as Lustre is where it was mounted without them
            logger.warning("%s: no locks here (%s); see to it that no other run writes to it", folder, error.strerror)
        yield


@contextlib.contextmanager
def _not_inherited(stream: IO[str]) -> Iterator[None]:
    """Have forked children close a file, whose lock they would hold on to as long as they live."""
    _locks.add(stream)
    try:
        yield
    finally:
        _locks.discard(stream)


def _close_locks() -> None:
    for stream in _locks:
        stream.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def _umask() -> int:
    """The process's umask; reading it means setting it, so it is put back at once."""
    current = os.umask(0)
    os.umask(current)
    return current
