"""numba, as its users need it: known to work before they stand on it, on PyTorch's threads, and never out of date.

Importing this module raises ImportError where numba cannot work, with what would help. Its settings and its cache's
folder come from the environment, and numba itself tells of them late, or in its own words.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import torch

from cocosnet.errors import OutputError

REMEDY = "name another folder for it by the environment's NUMBA_CACHE_DIR"
# Modules whose code or constants are compiled into others' kernels.
SHARED = ("desk", "lanes", "patchmatch", "quick", "warp")
_TURN = threading.RLock()


@contextlib.contextmanager
def torch_threads() -> Iterator[None]:
    """Run numba on as many threads as PyTorch uses, and leave PyTorch's number alone.

    The two share one OpenMP, whose number numba sets; left changed, PyTorch would sum in another order from then on,
    and a resumed run would differ from an undisturbed one in its last bits.

    Threads of the caller take turns where numba's own cannot serve two at once: that ends the process.

    Raises:
        OutputError: what numba has compiled cannot be kept, as where the home folder's quota is used up, or what it
            kept is damaged.
    """
    count = torch.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        with _TURN if numba.threading_layer() == "workqueue" else contextlib.nullcontext():
            yield
    except OSError as error:
        raise OutputError(f"what numba compiled cannot be written: {error.strerror}; {REMEDY}") from error
    except EOFError as error:  # an empty file, as a power cut leaves it
        raise OutputError(f"what numba compiled earlier is damaged; delete {_folder()}, or {REMEDY}") from error
    finally:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


def parallel_njit(**options: Any) -> Callable[[Callable], Callable]:
    """Decorator: `numba.njit` in parallel, what it compiles kept in a folder of these very sources (`SHARED`).

    numba itself looks at the kernel's own file alone: with another constant of another module, or after a checkout of
    another commit, it would go on with the machine code of before. Where that folder cannot be written it is numba's
    choice.
    """

    def decorate(function: Callable) -> Callable:
        named, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_folder())
        try:
            return numba.njit(parallel=True, cache=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = named

    return decorate


def _folder() -> Path:
    """Where what is compiled is kept: below NUMBA_CACHE_DIR, or beside the sources."""
    here = Path(__file__).parent
    sources = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in SHARED))
    return Path(numba.config.CACHE_DIR or here / "__pycache__") / f"numba-{sources.hexdigest()[:12]}"


def _check() -> None:
    if numba.config.DISABLE_JIT:
        raise ImportError("NUMBA_DISABLE_JIT is set")
    try:
        with torch_threads():
            pass
    except ValueError as error:  # NUMBA_THREADING_LAYER names none that is here
        raise ImportError(" ".join(str(error).split())) from error
    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError as error:
        raise ImportError(f"no folder for what it compiles can be written; {REMEDY}") from error


def _nothing() -> None:
    """What `_check` would compile."""


_check()
