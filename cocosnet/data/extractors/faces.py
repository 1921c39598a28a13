"""Edges of faces as in the paper's MetFaces task: drawn landmark contours inside the face, HED's edges around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw
from scipy.spatial import ConvexHull, QhullError

from cocosnet.data.extractors import EdgeExtractor, Extractor, get_extractor
from cocosnet.errors import DataError

CONTOURS = (  # (first point, one past the last, closed): jaw, brows, nose, nostrils, eyes, outer and inner lips
    *((0, 17, False), (17, 22, False), (22, 27, False), (27, 31, False), (31, 36, False)),
    *((36, 42, True), (42, 48, True), (48, 60, True), (60, 68, True)),
)
LINE = 1 / 170  # thickness of a drawn line as a share of the shorter side: 3 px at 512 (ours)
FINE = 4  # lines are drawn so many times larger and reduced, which smooths them


@dataclass
class FaceEdges:
    """An edge extractor that draws the face. Landmarks come with the call, or from the detector at hand."""

    name: str
    base: EdgeExtractor
    task = "edge"
    wants_points = True

    @property
    def provenance(self) -> dict[str, Any]:
        """That of the network around the face, and the drawing's numbers."""
        return self.base.provenance | {"network": self.name, "face": "68 landmarks", "line": round(LINE, 5)}

    @cached_property
    def detector(self) -> Extractor:
        """The landmark detector for pictures whose points are not given. Raises MissingDependency."""
        return get_extractor("auto", task="landmarks")

    def __call__(self, image: Image.Image, size: int | None = None, points: np.ndarray | None = None) -> Image.Image:
        """Edges as mode L. `points`: 68,2 landmarks in px of `image`. Raises DataError where there is no face."""
        points = self.detector(image) if points is None else points
        return self.many([image], size, 1, [points])[0]

    def many(
        self, images: Sequence[Image.Image], size: int | None, batch: int, points: Sequence[np.ndarray]
    ) -> list[Image.Image]:
        """Edges of several pictures, of which `batch` go through the network at once; `points` of each as in a call."""
        found = self.base.many(images, size, batch)
        scales = [np.array(edges.size) / np.array(image.size) for edges, image in zip(found, images)]
        return [draw_face(edges, face * scale) for edges, face, scale in zip(found, points, scales)]


def hed_face(device: torch.device) -> FaceEdges:
    """HED around the face."""
    return FaceEdges("hed-face", get_extractor("hed", device))


def hed_small_face(device: torch.device) -> FaceEdges:
    """hed-small around the face."""
    return FaceEdges("hed-small-face", get_extractor("hed-small", device))


def draw_face(edges: Image.Image, points: np.ndarray) -> Image.Image:
    """Edges of mode L, emptied inside the hull of 68,2 landmarks (px) and filled with their contours.

    Raises:
        DataError: the points do not span a face.
    """
    try:
        hull = points[ConvexHull(points).vertices]
    except (QhullError, ValueError) as error:
        raise DataError("the landmarks do not span a face; mend them or leave the picture out") from error
    empty = edges.copy()
    ImageDraw.Draw(empty).polygon([tuple(point) for point in hull.tolist()], fill=0)
    return ImageChops.lighter(empty, _contours(edges.size, points))


def _contours(size: tuple[int, int], points: np.ndarray) -> Image.Image:
    large = Image.new("L", (size[0] * FINE, size[1] * FINE))
    draw, width = ImageDraw.Draw(large), max(FINE, round(LINE * min(size) * FINE))
    for first, last, closed in CONTOURS:
        path = [*range(first, last), *([first] if closed else [])]
        draw.line([tuple(point) for point in (points[path] * FINE).tolist()], fill=255, width=width, joint="curve")
    return large.resize(size, Image.Resampling.BOX)
