"""numba, as its two users need it: known to work before they stand on it, and on PyTorch's threads.

Importing this module raises ImportError where numba cannot work, with what would help. Its settings and its cache's
folder come from the environment, and numba itself tells of them late, or in its own words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numba
import torch

from cocosnet.errors import OutputError

REMEDY = "name another folder for it by the environment's NUMBA_CACHE_DIR"


@contextlib.contextmanager
def torch_threads() -> Iterator[None]:
    """Run numba on as many threads as PyTorch uses, and leave PyTorch's number alone.

    The two share one OpenMP, whose number numba sets; left changed, PyTorch would sum in another order from then on,
    and a resumed run would differ from an undisturbed one in its last bits.

    Raises:
        OutputError: what numba has compiled cannot be kept, as where the home folder's quota is used up.
    """
    count = torch.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    except OSError as error:
        raise OutputError(f"what numba compiled cannot be written: {error.strerror}; {REMEDY}") from error
    finally:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


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
