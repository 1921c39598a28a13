"""A folder such as people have: good pictures in odd forms, and files that only look like pictures."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SUFFIXES = ("jpg", "png", "webp", "tif", "bmp", "gif", "ppm")


def picture(seed: int, size: tuple[int, int] = (72, 96)) -> Image.Image:
    """A picture with something to see in it; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(
        np.linspace(rng.integers(0, 255, 3), rng.integers(0, 255, 3), size[0]).astype(np.uint8)[None]
    )
    image = image.resize(size)
    ImageDraw.Draw(image).ellipse([9, 12, size[0] - 20, size[1] // 2], fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, rows: bytes, interlaced: int = 0) -> bytes:
    """A PNG that says it is width x height in RGB and holds these filtered rows, every check sum right."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def good_files() -> Iterator[tuple[str, bytes]]:
    """Fifty files that are pictures, whatever else they are."""
    grey = picture(1).convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "cmyk.jpg", encoded(picture(2).convert("CMYK"), "JPEG")
    yield "sixteen bits.png", encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    yield "palette.png", encoded(picture(3).quantize(64), "PNG")
    yield "turned.jpg", encoded(picture(4), "JPEG", exif=turned)
    yield "really a png.jpg", encoded(picture(5), "PNG")
    frames = [picture(seed).quantize(64) for seed in (6, 7, 8)]
    yield "moving.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "transparent.webp", encoded(picture(9).convert("RGBA"), "WEBP")
    yield "grey and alpha.png", encoded(picture(10).convert("LA"), "PNG")
    yield "one bit.tif", encoded(picture(11).convert("1"), "TIFF")
    yield "progressive.JPEG", encoded(picture(12), "JPEG", progressive=True)
    yield "two\nlines.png", encoded(picture(13), "PNG")
    yield "ünïcödé 图片.jpg", encoded(picture(14), "JPEG")
    yield "-rf *.jpg", encoded(picture(15), "JPEG")
    yield "black.png", encoded(Image.new("RGB", (64, 64)), "PNG")
    yield "deep/in/folders/a.jpg", encoded(picture(16), "JPEG")
    for number in range(35):
        yield (
            f"plain {number}.{'jpg' if number % 2 else 'png'}",
            encoded(picture(20 + number), "JPEG" if number % 2 else "PNG"),
        )


def bad_contents() -> Iterator[tuple[str, bytes]]:
    """A hundred and seventy contents that are no whole picture, with a name for each."""
    jpeg, whole = encoded(picture(99, (240, 320)), "JPEG"), encoded(picture(99, (240, 320)), "PNG")
    noise = np.random.default_rng(0)
    others = [
        *(
            b"<html><body>404</body></html>",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%PDF-1.7\n",
            b"PK\3\4" + b"\0" * 60,
        ),
        *(b"hello\n" * 50, b"\0" * 4096, encoded(picture(98), "EPS"), encoded(picture(98), "ICO"), b"\xff\xd8\xff\xe0"),
    ]
    for number in range(30):
        yield f"cut {number}.jpg", jpeg[: len(jpeg) * (number + 1) // 40]
    for number in range(30):
        yield f"cut {number}.png", whole[: len(whole) * (number + 1) // 32]
    for number in range(20):
        yield f"few rows {number}.png", png(80, 100, (b"\0" + b"some" * 60) * (4 * number + 3), interlaced=number % 2)
    for number in range(20):
        yield f"bomb {number}.png", png(12_300 + 2500 * number, 12_300 + 2500 * number, b"\0" * 99)
    for number in range(20):
        yield f"empty {number}.{SUFFIXES[number % 7]}", b""
    for number in range(27):
        name = "noise \udcff.jpg" if number == 3 else f"noise\t{number}.{SUFFIXES[number % 7]}"
        yield name, noise.bytes(3000)
    for number in range(18):
        yield f"other {number}.{SUFFIXES[number % 7]}", others[number % 9]
    yield "huge.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 9999, 0, 0, 54, 40, 65000, 65000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield (
        "huge.gif",
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0" + struct.pack("<HHB", 65535, 65535, 0),
    )
    yield "huge.ppm", b"P6 60000 60000 255\n" + b"\0" * 99
    yield "line.png", encoded(Image.new("L", (600_000, 1)), "PNG")
    yield "line too.png", encoded(Image.new("L", (1, 600_000)), "PNG")


def no_files(folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Thirty names that lead to no file: links to nowhere, to themselves, in circles, and pipes."""
    for number in range(10):
        yield f"dangling {number}.jpg", lambda path: path.symlink_to(folder / "nowhere.jpg")
    for number in range(10):
        yield f"itself {number}.png", lambda path: path.symlink_to(path)
    for number in range(10):
        yield f"pipe {number}.jpg", os.mkfifo


def lay_out(folder: Path) -> tuple[list[str], list[str]]:
    """Write 50 good and 200 bad files below `folder`, and things that are not to be counted; the names of both."""
    good, bad = [], []
    for names, files in ((good, good_files()), (bad, bad_contents())):
        for name, content in files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            names.append(name)
    for name, make in no_files(folder):
        make(folder / name)
        bad.append(name)
    (folder / "folder.jpg").mkdir()
    (folder / "circle").symlink_to(folder)
    (folder / "notes.txt").write_text("no picture, and not called one")
    return good, bad
