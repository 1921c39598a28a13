"""Label maps in the layouts that datasets come in, to class indices H,W int32.

index         one class index a pixel (a palette is only for display)
colours       one colour a class, PNG or JPEG; the palette is given, or found in the files
ade20k-full   the full ADE20K's _seg.png: the class is R // 10 * 256 + G, 0 where there is none
celeba-parts  CelebAMask-HQ's files, one a part, white where the part is; later ones cover earlier ones
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from cocosnet.data.images import load_gray, load_labels, load_rgb, shown
from cocosnet.errors import DataError

logger = logging.getLogger(__name__)
UNKNOWN = 255  # index of pixels whose colour is in no palette, and of "no class" in most label maps
PARTS = (  # class 1, 2, ..: the numbering of the label maps that the authors of CoCosNet gave out
    *("skin", "hair", "l_brow", "r_brow", "l_eye", "r_eye", "l_ear", "r_ear", "nose", "u_lip", "mouth", "l_lip"),
    *("neck", "cloth", "hat", "eye_g", "ear_r", "neck_l"),
)
PAINTED = (  # bottom to top, as CelebAMask-HQ's own script paints them
    *("skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth", "u_lip"),
    *("l_lip", "neck", "neck_l", "cloth", "hair", "hat"),
)
NEAR = 40  # largest difference in a channel at which a colour counts as a palette's
RARE = 5e-4  # share of a file's pixels below which a JPEG's colour is taken for smear
FLAT = 16  # largest difference in a channel between a pixel of a JPEG and those around it that counts as one colour
FOUND_AT_MOST = 254  # colours; more mean that the files are photographs


def read_labels(files: Sequence[Path], kind: str, palette: np.ndarray | None = None) -> np.ndarray:
    """Class indices H,W int32 of one picture's label files (several for celeba-parts, else one).

    Raises:
        DataError: unreadable, or not of this kind.
    """
    if kind == "celeba-parts" and not (len(files) == 1 and _part(files[0]) not in PARTS):
        return _merge_parts(files)
    if kind == "ade20k-full":
        pixels = np.asarray(load_rgb(files[0])).astype(np.int32)
        return pixels[..., 0] // 10 * 256 + pixels[..., 1]
    if kind == "colours":
        return nearest_colours(np.asarray(load_rgb(files[0])), palette, 255 if _smeared(files[0]) else NEAR)
    return load_labels(files[0])


def _part(path: Path) -> str:
    """`nose` of 00012_nose.png; empty where the name has no part."""
    return path.stem.partition("_")[2]


def _merge_parts(files: Sequence[Path]) -> np.ndarray:
    by_part = {_part(path): path for path in files}
    merged = None
    for part in PAINTED:
        if part in by_part:
            mask = np.asarray(load_gray(by_part[part])) > 127
            merged = np.zeros(mask.shape, np.int32) if merged is None else merged
            if mask.shape != merged.shape:
                raise DataError(f"{shown(by_part[part])}: differs in size from the picture's other parts")
            merged[mask] = PARTS.index(part) + 1
    return merged


def nearest_colours(pixels: np.ndarray, palette: np.ndarray, near: int = NEAR) -> np.ndarray:
    """Indices H,W int32 of H,W,3 uint8 colours: the nearest of the palette's N,3, or UNKNOWN beyond `near`."""
    codes = pixels.astype(np.int32) @ (65536, 256, 1)
    colours, where = np.unique(codes, return_inverse=True)
    triples = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
    indices = np.empty(len(colours), np.int32)
    for start in range(0, len(colours), 4096):
        distance = np.abs(triples[start : start + 4096, None] - palette[None].astype(np.int32)).max(axis=2)
        best = distance.argmin(axis=1)
        indices[start : start + 4096] = np.where(distance.min(axis=1) <= near, best, UNKNOWN)
    return indices[where].reshape(codes.shape)


def _smeared(path: Path) -> bool:
    """Whether the format mixes neighbouring colours. At the rims of areas every pixel then takes the nearest class."""
    return path.suffix.lower() in (".jpg", ".jpeg", ".webp")


def _flat(pixels: np.ndarray) -> np.ndarray:
    """H,W bool: pixels whose neighbours have nearly their colour, which the rims in a JPEG have not."""
    span = maximum_filter(pixels, (5, 5, 1)).astype(int) - minimum_filter(pixels, (5, 5, 1))
    return (span <= FLAT).all(axis=2)


def read_palette(path: str | Path) -> np.ndarray:
    """A palette N,3 uint8 from JSON: a list of [r, g, b] by class, or an object that has it as palette_rgb.

    Raises:
        DataError: unreadable, or of another layout.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        palette = np.array(content["palette_rgb"] if isinstance(content, dict) else content)
        if palette.ndim != 2 or palette.shape[1] != 3 or palette.min() < 0 or palette.max() > 255:
            raise ValueError("not a list of [r, g, b] in 0..255")
        fractions = palette.dtype.kind == "f" and (palette.max() <= 1 or (palette % 1).any())
        if fractions or palette.dtype.kind not in "iuf" or len(palette) > UNKNOWN:
            raise ValueError(f"not whole numbers, or more than {UNKNOWN} colours")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{shown(path)}: cannot read this palette ({error}); write [[r, g, b], ..] by class") from error
    return palette.astype(np.uint8)


def find_palette(files: Sequence[Path]) -> np.ndarray:
    """The colours of all label files, N,3 uint8, darkest red first (sorted by r, g, b); unreadable files are left out.

    In a PNG every colour counts; in a JPEG those that are common in it and not near a commoner one. A warning tells of
    the latter, since a class of thin or small areas may be missed there.

    Raises:
        DataError: no file can be read, or there are too many colours for label maps.
    """
    counts: dict[int, int] = {}
    for path in files:
        for code, count in _colours_of(path):
            counts[code] = counts.get(code, 0) + count
        if len(counts) > 50 * FOUND_AT_MOST:
            break
    smeared = any(_smeared(path) for path in files)
    kept: list[tuple[int, int, int]] = []
    for code in sorted(counts, key=lambda code: (-counts[code], code)):
        colour = (code >> 16, code >> 8 & 255, code & 255)
        if not smeared or all(max(abs(a - b) for a, b in zip(colour, other)) > NEAR for other in kept):
            kept.append(colour)
    if not 0 < len(kept) <= FOUND_AT_MOST:
        raise DataError(f"the label maps have {len(kept)} colours, not 1 to {FOUND_AT_MOST}; give prepare.palette")
    if smeared:
        logger.warning(
            "found %d colours in label maps with lossy compression, which may hide thin or rare classes; better give "
            "prepare.palette",
            len(kept),
        )
    return np.array(sorted(kept), np.uint8)


def _colours_of(path: Path) -> list[tuple[int, int]]:
    try:
        image = load_rgb(path)
    except DataError:
        return []
    smeared = _smeared(path)
    pixels = np.asarray(image)
    codes = pixels.astype(np.int32) @ (65536, 256, 1)
    codes, counts = np.unique(codes[_flat(pixels)] if smeared else codes, return_counts=True)
    enough = RARE * counts.sum() if smeared else 0
    return [(int(code), int(count)) for code, count in zip(codes, counts) if count > enough]
