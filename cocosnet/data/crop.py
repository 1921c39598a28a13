"""Which part of a picture is used: all of it, its central square, the square around a face (upright or turned), or all
of it on a square ground.

Boxes are (left, top, right, bottom) in px of the upright picture. Landmarks are 68 points (x, y) a picture, numbered as
by dlib and iBUG 300-W: 36-41 and 42-47 are the eyes, 48 and 54 the corners of the mouth.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from cocosnet.data.images import shown
from cocosnet.errors import DataError

Box = tuple[int, int, int, int]
Corners = np.ndarray  # 4,2 px of the picture: upper left, upper right, lower right, lower left of the part that is used
FACE_POINTS = 68
FACE_SIDE = 4.0  # side of a face's square over its measure; FFHQ's and MetFaces' framing (median of MetFaces: 4.0)
MOUTH_SHARE = 0.9  # a face's measure is its eyes' distance or this share of eyes to mouth, whichever is longer
MARGIN = 2  # px around a square that the filter reads, too
FACE_DROP = 0.1  # the square's centre lies so far on the way from the eyes to the mouth


def load_landmarks(path: str | Path) -> dict[str, np.ndarray]:
    """Landmarks by picture name from `{"name.jpg": {"points": [[x, y] * 68], ..}, ..}`; 68,2 float64 each, px.

    Raises:
        DataError: unreadable, not of this layout, or a face without 68 finite points.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        points = {name: np.array(face["points"], dtype=np.float64) for name, face in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{shown(path)}: cannot read these landmarks ({' '.join(str(error).split())}); "
            'the layout is {"name.jpg": {"points": [[x, y], ..]}}'
        ) from error
    for name, face in points.items():
        if face.shape != (FACE_POINTS, 2) or not np.isfinite(face).all():
            raise DataError(f"{shown(path)}: {shown(name)} needs {FACE_POINTS} points [x, y]; remove or mend the entry")
    return points


def check_points(size: tuple[int, int], points: np.ndarray) -> None:
    """Raises DataError where landmarks 68,2 do not fit a picture of (width, height), as those of another size."""
    centre, extent = points.mean(0), np.ptp(points, axis=0)
    if not ((centre >= 0) & (centre <= size)).all() or (extent > 2 * np.array(size)).any():
        raise DataError(
            f"the landmarks around x={centre[0]:.0f}, y={centre[1]:.0f} do not fit its {size[0]}x{size[1]} px; "
            "they must count in px of the upright photograph"
        )


def square_box(size: tuple[int, int]) -> Box:
    """The central square of a picture of (width, height)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def pad_box(size: tuple[int, int]) -> Box:
    """The square that holds all of a picture of (width, height) in its middle; it reaches beyond the shorter sides."""
    side = max(size)
    left, top = -((side - size[0]) // 2), -((side - size[1]) // 2)
    return left, top, left + side, top + side


def face_corners(points: np.ndarray) -> Corners:
    """The square around a face as FFHQ and MetFaces cut it: turned with the face, wherever it reaches.

    Args:
        points: 68,2 landmarks (x, y) in px.

    Raises:
        DataError: the points do not span a face.
    """
    left_eye, right_eye = points[36:42].mean(0), points[42:48].mean(0)
    eyes, mouth = (left_eye + right_eye) / 2, (points[48] + points[54]) / 2
    across, down = right_eye - left_eye, mouth - eyes
    half = across - np.array([-down[1], down[0]])  # the two directions weigh as FFHQ weighs them
    length = np.hypot(*half)
    if length < 1e-6:
        raise DataError("the landmarks do not span a face; mend them or leave this picture out")
    half = half / length * max(np.hypot(*across), MOUTH_SHARE * np.hypot(*down)) * FACE_SIDE / 2
    lower = np.array([-half[1], half[0]])
    if np.hypot(*half) < 4:
        raise DataError("the face is only a few px wide; leave this picture out")
    centre = eyes + FACE_DROP * down
    return np.stack([centre - half - lower, centre + half - lower, centre + half + lower, centre - half + lower])


def box_corners(box: tuple[float, float, float, float]) -> Corners:
    """An upright box as corners."""
    left, top, right, bottom = box
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=np.float64)


def cut(image: Image.Image, corners: Corners, side: int, resample: Image.Resampling) -> Image.Image:
    """The square inside `corners` as a picture of `side` px; what lies outside of `image` is its reflection.

    A larger square is cut at its own resolution and then reduced, so that nothing is skipped over; indices (NEAREST)
    are only picked.
    """
    wide = float(np.hypot(*(corners[1] - corners[0])))
    if resample != Image.Resampling.NEAREST and wide > side:
        if wide >= 4 * side:  # far too much detail: the quick way down to twice or thrice the side
            factor = int(wide // (2 * side))
            image, corners, wide = image.reduce(factor), corners / factor, wide / factor
        large = cut(image, corners, math.ceil(wide), resample)
        return large.resize((side, side), Image.Resampling.LANCZOS)
    part, start = _continued(image, corners)
    return part.transform(
        (side, side), Image.Transform.QUAD, (corners[[0, 3, 2, 1]] - start).ravel().tolist(), resample
    )


def _continued(image: Image.Image, corners: Corners) -> tuple[Image.Image, np.ndarray]:
    """The upright part of a picture and its reflections that holds `corners`, and the px (x, y) at which it starts."""
    start, end = np.floor(corners.min(0)).astype(int) - MARGIN, np.ceil(corners.max(0)).astype(int) + MARGIN
    columns, rows = (_reflected(np.arange(*span), size) for *span, size in zip(start, end, image.size))
    return Image.fromarray(np.asarray(image)[rows[:, None], columns]), start


def _reflected(places: np.ndarray, size: int) -> np.ndarray:
    """Where in 0..size-1 the px of an axis are found that is reflected at its ends, again and again."""
    places = places % (2 * size)
    return np.minimum(places, 2 * size - 1 - places)


def into_square(points: np.ndarray, corners: Corners, side: int) -> np.ndarray:
    """Points ..,2 of the picture in px of the square of `side` px that `cut` makes of it."""
    axes = np.stack([corners[1] - corners[0], corners[3] - corners[0]], axis=1) / side
    return (points - corners[0]) @ np.linalg.inv(axes).T


def undo_cut(square: Image.Image, original: Image.Image, corners: Corners) -> Image.Image:
    """`original` with `square`, a picture that was cut out at `corners` and perhaps changed, put back in its place.

    Args:
        corners: as the record's crop.corners states them, px of `original` (upright).
    """
    wide = math.ceil(np.hypot(*(corners[1] - corners[0])))
    if wide < square.width:  # the transform below picks px; it does not average them
        square = square.resize((wide, wide), Image.Resampling.LANCZOS)
    inside = np.stack([corners[1] - corners[0], corners[3] - corners[0]], axis=1)
    back = np.linalg.inv(inside) * np.array(square.size)[:, None]
    shift = -back @ corners[0]
    matrix = (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1])
    where = Image.new("L", square.size, 255)
    placed, mask = (
        image.transform(original.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        for image in (square, where)
    )
    return Image.composite(placed, original, mask)


def face_box(size: tuple[int, int], points: np.ndarray) -> Box:
    """The square around a face, framed as FFHQ and MetFaces are, but upright.

    A square that would leave the picture is moved inside, and made smaller only where the picture itself is.

    Args:
        size: (width, height) of the picture.
        points: 68,2 landmarks (x, y) in px.

    Raises:
        DataError: the points do not span a face.
    """
    left_eye, right_eye = points[36:42].mean(0), points[42:48].mean(0)
    eyes, mouth = (left_eye + right_eye) / 2, (points[48] + points[54]) / 2
    measure = max(math.dist(left_eye, right_eye), MOUTH_SHARE * math.dist(eyes, mouth))
    side = min(round(FACE_SIDE * measure), *size)
    if side < 8:
        raise DataError(f"the face is only {side} px wide; leave this picture out")
    centre = eyes + FACE_DROP * (mouth - eyes)
    left, top = (int(np.clip(round(middle - side / 2), 0, limit - side)) for middle, limit in zip(centre, size))
    return left, top, left + side, top + side
