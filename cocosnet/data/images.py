"""Picture files in and out: every odd file becomes plain RGB, grey or index pixels, or one clear error.

This module owns how files are decoded and how pixel values map to tensors: 0..255 becomes [-1,1].
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from cocosnet.data.png import png_bytes
from cocosnet.errors import DataError
from cocosnet.files import atomic_path

logger = logging.getLogger(__name__)
MAX_PIXELS = 150_000_000  # pixels of one picture that we decode (450 MB as RGB); Pillow's own bound is 179 million
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # others are refused: EPS would start a program
JPEG_MARK, PNG_MARK = b"\xff\xd8\xff", b"\x89PNG"  # what files begin with
PNG_DEPTH, HEAD_BYTES = 24, 26  # where a PNG's bits a value and its colour type are, and where they end
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with further pictures behind it, as many phones write them
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FOREIGN_SUFFIXES = (  # pictures that people have, too
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
ROWS = 256  # of a picture of deep grey that are converted at once
LONGEST = 16  # longer side over shorter one of what networks look through: at a given shorter side memory grows with it
JPEG_SIDE = 65_500  # px, longest side that libjpeg writes
SAVE_OPTIONS = {
    ".png": {"compress_level": 3},  # a photograph in 40 % of the time that 6 takes, 4 % bigger
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95},
}


def shown(path: str | Path) -> str:
    """The path as text for a one-line message: line breaks, control characters and undecodable bytes are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)[1:-1]


UNLISTED = "cannot list this folder; check its permissions"


def find_images(folder: str | Path, exclude: Sequence[str | Path] = ()) -> list[Path]:
    """Paths of the pictures in `folder` and below, by suffix, sorted; hidden files and folders are passed over.

    Links to folders are followed. A folder that is reached in several ways is listed once, by its own name if it lies
    in `folder`. `exclude` names folders to leave out, such as one's own output. A folder below that cannot be listed
    is in the answer itself, so that reading it tells why its pictures are missing. A warning tells of pictures in
    formats that are not read.

    Raises:
        DataError: `folder` is not a folder, or cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{shown(folder)}: no such folder; give the folder that holds the pictures")
    files, refused = find_files(folder, exclude)
    if folder in refused:
        raise DataError(f"{shown(folder)}: {UNLISTED}")
    foreign = Counter(path.suffix.lower() for path in files if path.name.lower().endswith(FOREIGN_SUFFIXES))
    if foreign:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(foreign.items()))
        logger.warning("%s: passed over pictures in formats that are not read: %s", shown(folder), kinds)
    return sorted([*(path for path in files if path.name.lower().endswith(SUFFIXES)), *refused])


def find_files(folder: Path, exclude: Sequence[str | Path] = ()) -> tuple[list[Path], list[Path]]:
    """All files in `folder` and below that `find_images` would look at, whatever they hold; and unlistable folders."""
    passed = {os.path.realpath(place) for place in exclude} - {os.path.realpath(folder)}
    starts, files, refused = [os.fspath(folder)], [], []
    for start in starts:  # grows by the links that are met, so that they come after all folders' own names
        for place, folders, names in os.walk(start, onerror=lambda error: refused.append(Path(error.filename))):
            if (real := os.path.realpath(place)) in passed:
                folders.clear()
                continue
            passed.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            files += [Path(place, name) for name in names if not name.startswith(".")]
    return files, refused


def load_rgb(path: str | Path, shorter: int | None = None) -> Image.Image:
    """The picture as mode RGB, turned upright by its EXIF tag.

    CMYK, palettes, 16-bit and float grey become 8-bit RGB; transparency is laid over white; an animation gives its
    first frame.

    Args:
        shorter: shorter side in px that the caller will resize to; a bigger JPEG is then decoded at a fraction of its
            size (never below twice `shorter`), which saves most of the time and memory.

    Raises:
        DataError: missing, empty, truncated, not a picture in one of FORMATS, or more than MAX_PIXELS pixels.
    """
    image = _decode(path, shorter)
    return image if image.mode == "RGB" and "transparency" not in image.info else _flatten(image)


def load_gray(path: str | Path) -> Image.Image:
    """The picture as mode L (0..255), e.g. an edge map; converted and refused as by `load_rgb`."""
    image = _decode(path, None)
    return image if image.mode == "L" else _flatten(image).convert("L")


def load_labels(path: str | Path) -> np.ndarray:
    """The class indices of a label map, H,W int32. A palette is only for display: the indices count.

    Raises:
        DataError: as `load_rgb`, or a picture with colours instead of indices, or a JPEG, which changes them.
    """
    image = _decode(path, None)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise DataError(
            f"{shown(path)}: a label map has one class index a pixel, this is a {image.mode} picture; "
            "save it as a grey or palette PNG of indices, or prepare it with --set prepare.kind=colours"
        )
    with open(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(JPEG_MARK):
        raise DataError(f"{shown(path)}: JPEG does not keep the class index of a pixel; save the label map as PNG")
    return np.asarray(image).astype(np.int32) // _grey_step(head)


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in px as stored; only the file's header is read. Raises DataError as `load_rgb` does."""
    with _explained(path), _opened(path) as image:
        return image.size


def _decode(path: str | Path, shorter: int | None) -> Image.Image:
    """Open, check, decode and turn upright; the mode is the file's own."""
    with _explained(path):
        return _decode_unchecked(path, shorter)


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Around what reads a picture: whatever is wrong with the file becomes one DataError that names it."""
    check_file(path)
    try:
        yield
    except (DataError, MemoryError):
        raise
    except PermissionError as error:
        raise DataError(f"{shown(path)}: cannot read this file; check its permissions") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{shown(path)}: too big (over {MAX_PIXELS:,} pixels); reduce the picture first") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly every built-in exception
        reason = " ".join(shown(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not a picture in a known format"
        raise DataError(f"{shown(path)}: cannot read this picture ({reason}); save it again as PNG or JPEG") from error


def check_file(path: str | Path) -> None:
    """Raises DataError where there is no file with something in it; opening a pipe would wait for ever."""
    try:
        state = os.stat(path)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise DataError(f"{shown(path)}: no file can have this name; check the path") from error
    except OSError as error:
        reason = "no such file; check the path" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        raise DataError(f"{shown(path)}: {reason}") from error
    if stat.S_ISDIR(state.st_mode):
        readable = os.access(path, os.R_OK)  # else it stands for the pictures in it, in a list of pictures
        raise DataError(f"{shown(path)}: a folder, no file; {'give one file' if readable else UNLISTED}")
    if not stat.S_ISREG(state.st_mode):
        raise DataError(f"{shown(path)}: a pipe, socket or device, no file; remove it")
    if state.st_size == 0:
        raise DataError(f"{shown(path)}: the file is empty; copy it again or remove it")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture before it is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bombs are bounded below, and odd EXIF blocks are no news to a user
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{shown(path)}: too big ({width}x{height}, over {MAX_PIXELS:,} pixels); reduce the picture first"
                )
            yield image


def _decode_unchecked(path: str | Path, shorter: int | None) -> Image.Image:
    with _opened(path) as image:
        if shorter is not None and min(image.size) > 2 * shorter and image.format in JPEGS:
            image.draft(None, tuple(2 * shorter * side // min(image.size) for side in image.size))
        image.load()
        if image.format == "PNG" and (image.info.get("interlace") or not _last_row(image).any()):
            _check_rows(path)  # rows that did not come are zeros
        return ImageOps.exif_transpose(image)


def _last_row(image: Image.Image) -> np.ndarray:
    return np.asarray(image.crop((0, image.height - 1, image.width, image.height)))


def _check_rows(path: str | Path) -> None:
    """Raises DataError for a PNG whose data end before its last row, which Pillow does not mind."""
    found, needed = png_bytes(path)
    if found < needed:
        raise DataError(f"{shown(path)}: rows are missing, {found / needed:.0%} of the picture is there; copy it again")


def _grey_step(head: bytes) -> int:
    """What a decoder multiplies the values of a grey PNG of 2 or 4 bits by; 1 for any other file."""
    depth, colour = head[PNG_DEPTH : PNG_DEPTH + 2] if head.startswith(PNG_MARK) else (8, 0)
    return 255 // (2**depth - 1) if colour == 0 and depth in (2, 4) else 1


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_gray(np.asarray(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def _deep_gray(values: np.ndarray) -> Image.Image:
    """Grey of more than 8 bits to mode L; the white point is guessed among the three in use: 1, 255 and 65535."""
    fractions = values.dtype.kind == "f"
    peak = np.nan_to_num(values.max(initial=0, where=~np.isnan(values))) if fractions else values.max(initial=0)
    white = 1.0 if fractions and peak <= 1 else 255.0 if peak <= 255 and values.dtype.itemsize > 2 else 65535.0
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS):  # a picture of MAX_PIXELS would take gigabytes as a whole
        rows = np.nan_to_num(values[start : start + ROWS].astype(np.float32))
        grey[start : start + ROWS] = np.clip(rows / white, 0, 1) * 255 + 0.5
    return Image.fromarray(grey)


def check_not_thin(image: Image.Image) -> None:
    """Raises DataError, which does not name the file, where the longer side is over LONGEST times the shorter."""
    if max(image.size) > LONGEST * min(image.size):
        raise DataError(f"{image.width}x{image.height} px is too thin, over {LONGEST} to 1; crop it first")


def resize_shorter(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture with its shorter side of `size` px, as `shorter_size` says. Raises DataError as that does."""
    target = shorter_size(image.size, size)
    return image if target == image.size else image.resize(target, resample)


def shorter_size(full: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) `full` with the shorter side of `size` px and the proportions kept (the longer side rounded).

    Raises:
        DataError: the result would have more than MAX_PIXELS pixels.
    """
    width, height = full
    scale = size / min(full)
    target = tuple(size if side == min(full) else max(size, round(side * scale)) for side in full)
    if target[0] * target[1] > MAX_PIXELS:
        raise DataError(
            f"{width}x{height} px with {size} px on the shorter side is over {MAX_PIXELS:,} pixels; ask for a smaller "
            "size, and crop a picture that is long and thin"
        )
    return target


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as 3,H,W float32 in [-1,1]; modes other than RGB are converted."""
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def to_image(tensor: torch.Tensor) -> Image.Image:
    """A 3,H,W tensor in [-1,1] (values outside are clamped) as a picture of mode RGB; exact inverse of `to_tensor`.

    Raises ValueError for another shape.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"a picture is 3,H,W, this is {tuple(tensor.shape)}; of a batch take one, such as image[0]")
    pixels = (tensor.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())


def check_format(path: str | Path) -> None:
    """Raises DataError for a folder, and where the suffix names no format that `save_image` writes."""
    if os.path.isdir(path):
        raise DataError(f"{shown(path)}: a folder; name the picture to write, such as {shown(Path(path) / 'out.png')}")
    if Path(path).suffix.lower() not in SAVE_OPTIONS:
        raise DataError(f"{shown(path)}: cannot write this format; use one of {', '.join(SAVE_OPTIONS)}")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write the picture atomically; its suffix chooses the format (.png, .jpg, .jpeg, .webp).

    Raises:
        DataError: another suffix, a picture that the format cannot hold, or the file cannot be written.
    """
    check_format(path)
    options = SAVE_OPTIONS[Path(path).suffix.lower()]
    if Path(path).suffix.lower() in (".jpg", ".jpeg") and max(image.size) > JPEG_SIDE:
        raise DataError(f"{shown(path)}: JPEG holds {JPEG_SIDE} px a side, not {image.width}x{image.height}; try .png")
    try:
        with atomic_path(path) as temporary:
            image.save(temporary, **options)
    except ValueError as error:
        raise DataError(f"{shown(path)}: cannot write this picture ({error}); try .png") from error
