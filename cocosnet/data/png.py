"""How much of a PNG is there: decoders take one whose compressed data end too early for a whole picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

SIGNATURE_BYTES = 8
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, steps
PIECE = 1 << 20  # bytes that are inflated at once


def png_bytes(path: str | Path) -> tuple[int, int]:
    """Bytes of filtered rows that a PNG's data inflate to, at most those that it needs, and how many it needs.

    Raises:
        ValueError, struct.error, zlib.error: no PNG, or a damaged one.
    """
    with open(path, "rb") as stream:
        stream.seek(SIGNATURE_BYTES)
        chunks = _chunks(stream)
        kind, header = next(chunks, (b"", b""))
        if kind != b"IHDR":
            raise ValueError("no header")
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        needed = _row_bytes(width, height, depth * CHANNELS[colour], bool(interlaced))
        found = 0
        for piece in _inflated(data for kind, data in chunks if kind == b"IDAT"):
            found += piece
            if found >= needed:
                return needed, needed
    return found, needed


def _chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        data = stream.read(length) if kind in (b"IHDR", b"IDAT") else stream.seek(length, 1) and b""
        yield kind, data
        stream.seek(4, 1)  # the check sum is the decoder's business


def _row_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for x, y, across, down in passes:
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)  # a row starts with the byte of its filter
    return total


def _inflated(parts: Iterator[bytes]) -> Iterator[int]:
    """Lengths of the pieces that the data inflate to."""
    stream = zlib.decompressobj()
    for part in parts:
        while part and not stream.eof:
            yield len(stream.decompress(part, PIECE))
            part = stream.unconsumed_tail
