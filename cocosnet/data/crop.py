"""Which part of a picture is used: all of it, its central square, or the square around a face.

Boxes are (left, top, right, bottom) in px of the upright picture. Landmarks are 68 points (x, y) a picture, numbered as
by dlib and iBUG 300-W: 36-41 and 42-47 are the eyes, 48 and 54 the corners of the mouth.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from cocosnet.data.images import shown
from cocosnet.errors import DataError

Box = tuple[int, int, int, int]
FACE_POINTS = 68
FACE_SIDE = 4.0  # side of a face's square over its measure; FFHQ's and MetFaces' framing (median of MetFaces: 4.0)
MOUTH_SHARE = 0.9  # a face's measure is its eyes' distance or this share of eyes to mouth, whichever is longer
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


def square_box(size: tuple[int, int]) -> Box:
    """The central square of a picture of (width, height)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


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
