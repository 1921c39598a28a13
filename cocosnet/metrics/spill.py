"""Numbers that are needed again at the end, kept out of memory: metrics of whole sets stay small however many pairs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np

from cocosnet.errors import DataError

IN_MEMORY = 8 << 20  # bytes of a spill that stay in memory; beyond that all of it lies in a temporary file
CHUNK = 4 << 20  # bytes that `chunks` reads at once


class Spill:
    """A growing row of numbers of one type. Beyond 8 MB it lies in an unnamed file in the folder for temporary files.

    The file has no name and so disappears with the process, however that ends; $TMPDIR chooses the folder.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - it lives as long as the spill
        self._size = 0

    def __len__(self) -> int:
        """Numbers so far."""
        return self._size

    def add(self, numbers: np.ndarray) -> int:
        """Append an array of the spill's type, row by row; returns where it starts, for `read`.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(numbers, self._dtype).tobytes())
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: cannot keep intermediate numbers here ({error.strerror or error}); free "
                "some space or name another folder in TMPDIR"
            ) from error
        start, self._size = self._size, self._size + numbers.size
        return start

    def read(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """An array of `shape` whose first number is number `start`."""
        self._file.seek(start * self._dtype.itemsize)
        count = int(np.prod(shape))
        return np.frombuffer(bytearray(self._file.read(count * self._dtype.itemsize)), self._dtype).reshape(shape)

    def chunks(self, row: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Everything as arrays of many rows of the shape `row`, at most about 4 MB each."""
        size = int(np.prod(row))
        rows, step = self._size // size, max(1, CHUNK // (size * self._dtype.itemsize))
        for first in range(0, rows, step):
            yield self.read(first * size, (min(step, rows - first), *row))
