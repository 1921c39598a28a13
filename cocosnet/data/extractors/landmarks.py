"""Detectors of 68 face landmarks (numbered as by dlib and iBUG 300-W), each an optional package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.data.extractors import when_needed
from cocosnet.data.extractors.packages import mediapipe_process, package_version, require
from cocosnet.errors import DataError
from cocosnet.weights import sha256_of

DLIB_SIDE = 1024  # px, longer side at which dlib looks for a face: 4000 px would take it 17 s and 1.4 GB
FROM_FACE_MESH = (  # MediaPipe's 468 points at the places of the 68
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87),
)


@dataclass(frozen=True)
class LandmarkDetector:
    """Finds the largest face's landmarks: call it with a picture."""

    name: str
    detect: Callable[[np.ndarray], np.ndarray | None]  # H,W,3 uint8 RGB -> 68,2 px
    provenance: dict[str, Any] = field(default_factory=dict)
    task = "landmarks"

    def __call__(self, image: Image.Image, size: int | None = None) -> np.ndarray:
        """68,2 float64 landmarks (x, y) in px of the picture. Raises DataError where no face is seen."""
        points = self.detect(np.ascontiguousarray(np.asarray(image.convert("RGB"))))
        if points is None:
            raise DataError(f"{self.name} sees no face in it; give its landmarks by hand or leave the picture out")
        return points


def dlib_landmarks(device: torch.device) -> LandmarkDetector:
    """dlib's detector and shape predictor, whose model face_recognition_models ships. Raises MissingDependency."""
    dlib = require("dlib", "cocosctl[faces]")
    path = _models_folder() / "shape_predictor_68_face_landmarks.dat"

    def load() -> Callable:
        detector, predictor = dlib.get_frontal_face_detector(), dlib.shape_predictor(str(path))

        def detect(pixels: np.ndarray) -> np.ndarray | None:
            box = largest_face(detector, pixels)
            if box is None:
                return None
            shape = predictor(pixels, dlib.rectangle(*box))
            return np.array([[point.x, point.y] for point in shape.parts()], np.float64)

        return detect

    made_by = {"network": "dlib-68", "sha256": sha256_of(path), "side": DLIB_SIDE}
    return LandmarkDetector("dlib", when_needed(load), made_by)


def largest_face(detector: Callable[[np.ndarray, int], Any], pixels: np.ndarray) -> list[int] | None:
    """Left, top, right and bottom px of the largest face; None without one.

    A big picture is looked at with a longer side of DLIB_SIDE px, and as it is where that shows no face.

    Args:
        detector: as dlib's, of H,W,3 uint8 and how often to double it: boxes.
    """
    sides = np.array(pixels.shape[1::-1])
    scales = [1.0] if max(sides) <= DLIB_SIDE else [DLIB_SIDE / max(sides), 1.0]
    for scale in scales:
        small = Image.fromarray(pixels).resize(np.maximum(1, np.round(sides * scale)).astype(int).tolist())
        boxes = detector(np.asarray(small), 1)
        if boxes:
            box = max(boxes, key=lambda box: box.area())
            return [round(edge / scale) for edge in (box.left(), box.top(), box.right(), box.bottom())]
    return None


def _models_folder() -> Path:
    """Where face_recognition_models keeps its files, found without importing it (it needs setuptools)."""
    spec = find_spec("face_recognition_models")
    if spec is None:
        require("face_recognition_models", "cocosctl[faces]")
    return Path(spec.origin).parent / "models"


def mediapipe_landmarks(device: torch.device) -> LandmarkDetector:
    """MediaPipe's face mesh at the places of the 68 points. Raises MissingDependency."""
    mesh = require("mediapipe.python.solutions.face_mesh", "cocosctl[pose]")

    def load() -> Callable:
        options = {"static_image_mode": True, "max_num_faces": 1, "min_detection_confidence": 0.3}
        process = mediapipe_process(lambda: mesh.FaceMesh(**options))

        def detect(pixels: np.ndarray) -> np.ndarray | None:
            faces = process(pixels).multi_face_landmarks
            if not faces:
                return None
            points = np.array([[mark.x, mark.y] for mark in faces[0].landmark], np.float64)
            return points[list(FROM_FACE_MESH)] * (pixels.shape[1], pixels.shape[0])

        return detect

    made_by = {"network": "mediapipe-face-mesh", "version": package_version("mediapipe")}
    return LandmarkDetector("mediapipe-face", when_needed(load), made_by)
