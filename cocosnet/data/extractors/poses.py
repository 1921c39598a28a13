"""Pose extractors: packages that find people's joints, brought to the 18 joints of `cocosnet.data.pose`.

Each is an optional package, imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.data.extractors import PoseExtractor, when_needed
from cocosnet.data.extractors.packages import mediapipe_process, package_version, require
from cocosnet.data.images import resize_shorter
from cocosnet.data.pose import FROM_COCO_17, FROM_MEDIAPIPE, JOINTS, reorder
from cocosnet.errors import CheckpointError, DataError, MissingWeights
from cocosnet.weights import search_folders, sha256_of, store_folder

VISIBLE = 0.5  # MediaPipe's visibility below which a joint is guessed rather than seen
SCORED = 0.3  # RTMPose's score below which its authors do not draw a joint
RTM_MODE = "balanced"  # of rtmlib: YOLOX-m finds people, RTMPose-m their joints
CONTROLNET_SIDE = 512  # px; the network sees 184, but answers with 57 numbers of 64 bits a px of what it is given
CONTROLNET_FILE = "body_pose_model.pth"


def openpose_files(device: torch.device) -> PoseExtractor:
    """Stands for ready-made pose files: it says where they come from, but cannot look at a picture."""

    def refuse(pixels: np.ndarray) -> np.ndarray:
        raise DataError("ready-made poses are files, one a picture; name their folder with --labels")

    return PoseExtractor("openpose", refuse, {"network": "openpose files"})


def mediapipe(device: torch.device) -> PoseExtractor:
    """MediaPipe's BlazePose (full model), the most prominent person, on the CPU. Raises MissingDependency."""
    pose = require("mediapipe.python.solutions.pose", "cocosctl[pose]")

    def load() -> Callable:
        options = {"static_image_mode": True, "model_complexity": 1, "min_detection_confidence": 0.3}
        process = mediapipe_process(lambda: pose.Pose(**options))

        def detect(pixels: np.ndarray) -> np.ndarray:
            found = process(pixels).pose_landmarks
            if found is None:
                return np.zeros((0, JOINTS, 3), np.float32)
            return from_mediapipe(found.landmark, pixels.shape[1], pixels.shape[0])

        return detect

    made_by = {"network": "mediapipe-pose", "version": package_version("mediapipe")}
    return PoseExtractor("mediapipe", when_needed(load), made_by)


def from_mediapipe(landmarks: Any, width: int, height: int) -> np.ndarray:
    """33 landmarks (x, y in 0..1 of the picture, visibility) as 1,18,3; guessed and outlying joints are not seen."""
    points = np.array([[mark.x * width, mark.y * height, mark.visibility] for mark in landmarks], np.float32)
    inside = ((points[:, :2] >= 0) & (points[:, :2] <= (width, height))).all(axis=1)
    points[~inside | (points[:, 2] < VISIBLE)] = 0
    return _without_half_necks(reorder(points[None], FROM_MEDIAPIPE, shoulders=(11, 12)))


def rtmlib(device: torch.device) -> PoseExtractor:
    """RTMPose through rtmlib, everyone in the picture. Raises MissingDependency, or MissingWeights when offline."""
    package = require("rtmlib", "rtmlib onnxruntime")
    require("onnxruntime", "rtmlib onnxruntime")
    files = _rtm_files(package.Body.MODE[RTM_MODE])
    missing = [path.name for path in files if not path.is_file()]
    if missing and os.environ.get("COCOSCTL_OFFLINE") == "1":
        raise MissingWeights(
            f"rtmlib fetches its weights itself, but COCOSCTL_OFFLINE=1; put {' and '.join(missing)} "
            f"(the end2end.onnx of its archives, renamed) into {files[0].parent}"
        )
    if missing:
        _rtm_body(package, device)  # fetches them
    made_by = {"network": "rtmpose", "version": package_version("rtmlib"), "mode": RTM_MODE}
    made_by |= {"detector_sha256": sha256_of(files[0]), "sha256": sha256_of(files[1])}

    def load() -> Callable:
        network = _rtm_body(package, device)
        return lambda pixels: from_coco_17(*network(np.ascontiguousarray(pixels[..., ::-1])))

    return PoseExtractor("rtmlib", when_needed(load), made_by)


def _rtm_files(mode: dict[str, Any]) -> list[Path]:
    """Where rtmlib keeps the detector of people and the one of joints that a mode of its names by URL."""
    cache = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "rtmlib")
    folder = Path(os.path.expanduser(cache)) / "hub" / "checkpoints"
    return [folder / f"{PurePosixPath(mode[part]).name.partition('.')[0]}.onnx" for part in ("det", "pose")]


def _rtm_body(package: Any, device: torch.device) -> Any:
    kind = str(device) if device.type == "cuda" else "cpu"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads, where records belong
            return package.Body(mode=RTM_MODE, backend="onnxruntime", device=kind)
    except Exception as error:  # a download, an archive or ONNX Runtime may fail in any way
        reason = " ".join(str(error).split())[:160]
        raise MissingWeights(f"rtmlib cannot load its weights ({reason}); remove damaged ones, try again") from error


def from_coco_17(keypoints: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Key points N,17,2 in px and scores N,17 as N,18,3; joints under SCORED are not seen."""
    points = np.concatenate([np.reshape(keypoints, (-1, 17, 2)), np.reshape(scores, (-1, 17, 1))], axis=-1)
    points = np.where(points[..., 2:] >= SCORED, points, 0)
    return _without_half_necks(reorder(points, FROM_COCO_17))


def controlnet(device: torch.device) -> PoseExtractor:
    """OpenPose's own network through controlnet_aux. Raises MissingDependency, or MissingWeights for its file."""
    body = require("controlnet_aux.open_pose.body", "controlnet_aux")

    path = next((folder / CONTROLNET_FILE for folder in search_folders() if (folder / CONTROLNET_FILE).is_file()), None)
    if path is None:
        raise MissingWeights(
            f"controlnet needs {CONTROLNET_FILE} (huggingface.co/lllyasviel/Annotators); "
            f"put it at {store_folder() / CONTROLNET_FILE}"
        )

    def load() -> Callable:
        try:
            network = body.Body(str(path)).to(device)
        except Exception as error:  # unpickling and shape errors share no base class
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path}: not OpenPose's body network ({reason}); get the file again") from error
        return at_most(CONTROLNET_SIDE, lambda bgr: from_candidates(*network(bgr)))

    made_by = {"network": "openpose", "sha256": sha256_of(path), "version": package_version("controlnet_aux")}
    made_by |= {"side": CONTROLNET_SIDE}
    return PoseExtractor("controlnet", when_needed(load), made_by)


def at_most(side: int, detect: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A detector of RGB pictures from one of BGR pictures, which sees them with a shorter side of at most `side` px."""

    def detect_reduced(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        seen = image if min(image.size) <= side else resize_shorter(image, side)
        people = detect(np.ascontiguousarray(np.asarray(seen)[..., ::-1]))
        return people * np.array([*(np.array(image.size) / seen.size), 1], np.float32)

    return detect_reduced


def from_candidates(candidates: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """OpenPose's candidates (x, y, score, ..) and, a person, the index of each joint's candidate, as N,18,3."""
    people = np.zeros((len(subset), JOINTS, 3), np.float32)
    for person, row in zip(people, subset):
        for joint, index in enumerate(np.asarray(row)[:JOINTS].astype(int)):
            if index >= 0:
                person[joint] = candidates[index][:3]
    return people


def _without_half_necks(people: np.ndarray) -> np.ndarray:
    """Joints without confidence lie at 0, 0; a neck between a seen and an unseen shoulder is not seen either."""
    return np.where(people[..., 2:] > 0, people, 0).astype(np.float32)
