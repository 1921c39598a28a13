"""What turns a photograph into a condition (edges, a pose), into face landmarks, or into a feature vector: by name.

Built-in extractors and those of installed packages (entry points, group "cocosctl.extractors") come through the same
door: a name leads to "module:factory", imported when it is asked for and called as `factory(device=...)`. What the
factory returns is an `Extractor`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from cocosnet.data.images import resize_shorter
from cocosnet.data.pose import Pose
from cocosnet.doors import doors, open_door
from cocosnet.errors import ConfigError, DataError, MissingDependency
from cocosnet.weights import has_weights

GROUP = "cocosctl.extractors"
WORK_SIDE = 256  # px; edges of smaller pictures are found at this shorter side: below it HED sees faces as blobs
_HERE = "cocosnet.data.extractors"
BUILT_IN = {
    "edge": {
        "hed": f"{_HERE}.edges:hed",
        "hed-small": f"{_HERE}.edges:hed_small",
        "canny": f"{_HERE}.edges:canny",
        "image": f"{_HERE}.edges:image",
        "hed-face": f"{_HERE}.faces:hed_face",
        "hed-small-face": f"{_HERE}.faces:hed_small_face",
    },
    "pose": {
        "openpose": f"{_HERE}.poses:openpose_files",
        "mediapipe": f"{_HERE}.poses:mediapipe",
        "rtmlib": f"{_HERE}.poses:rtmlib",
        "controlnet": f"{_HERE}.poses:controlnet",
    },
    "landmarks": {
        "dlib": f"{_HERE}.landmarks:dlib_landmarks",
        "mediapipe-face": f"{_HERE}.landmarks:mediapipe_landmarks",
    },
    "features": {
        "vgg19": f"{_HERE}.features:vgg19",
        "vgg16-caffe": f"{_HERE}.features:vgg16_caffe",
    },
}
KINDS = {"edge": "edge extractor", "pose": "pose extractor", "landmarks": "landmark detector", "features": "network"}
READY_MADE = {"edge": "image", "pose": "openpose"}  # the extractors that stand for files made by other means
_MODULES = {"mediapipe": "mediapipe", "rtmlib": "rtmlib", "controlnet": "controlnet_aux"}


class Extractor(Protocol):
    """What a factory returns.

    task: edge, pose, landmarks or features. provenance: what made the answer (network, sha256 of its weights,
    parameters), plain values that go into records. A call takes an upright RGB picture and answers, by task, with a
    picture of mode L (white edges on black); a `Pose`; 68,2 landmarks in px; or a vector of float32. Edges and poses
    are those of the picture with a shorter side of `size` px (None: its own). A call raises DataError where there is
    nothing to be found in the picture.
    """

    name: str
    task: str
    provenance: dict[str, Any]

    def __call__(self, image: Image.Image, size: int | None = None) -> Any:
        """The picture's edges, pose, landmarks or features."""


@dataclass(frozen=True)
class EdgeExtractor:
    """Edges by a network or a filter: call it with a picture."""

    name: str
    network: Callable[[Image.Image], torch.Tensor]  # RGB picture -> edges H,W float32 in [0,1]
    provenance: dict[str, Any] = field(default_factory=dict)
    task = "edge"

    def __call__(self, image: Image.Image, size: int | None = None) -> Image.Image:
        """Edges of an RGB picture as mode L, white on black, of the picture's proportions.

        Args:
            size: shorter side of the answer in px, by default the picture's own. The network sees the picture with a
                shorter side of max(size, WORK_SIDE), so give the big picture rather than one already reduced.
        """
        wanted = image.size if size is None else resize_shorter(image, size).size
        seen = resize_shorter(image, max(min(wanted), WORK_SIDE))
        edges = Image.fromarray((self.network(seen) * 255).round().byte().numpy())
        return edges if edges.size == wanted else edges.resize(wanted, Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class PoseExtractor:
    """Poses by a detector of people's joints: call it with a picture."""

    name: str
    detect: Callable[[np.ndarray], np.ndarray]  # H,W,3 uint8 RGB -> N,18,3 (x px, y px, confidence)
    provenance: dict[str, Any] = field(default_factory=dict)
    task = "pose"

    def __call__(self, image: Image.Image, size: int | None = None) -> Pose:
        """The people of an RGB picture. Raises DataError where nobody is seen."""
        people = self.detect(np.asarray(image.convert("RGB")))
        people = people[(people[..., 2] > 0).any(axis=1)] if len(people) else people
        if not len(people):
            raise DataError(f"{self.name} sees nobody in it; give its pose by hand or leave the picture out")
        pose = Pose(people.astype(np.float32), image.size)
        return pose if size is None else pose.resize(resize_shorter(image, size).size)


def extractor_names(task: str) -> list[str]:
    """Built-in names for `task`, and all names of other packages, whose task only their code knows; imports nothing."""
    return sorted(_table(task))


def resolve_name(name: str, task: str = "edge") -> str:
    """`auto` as the extractor that it stands for on this machine; any other name as it is.

    edge: hed where its weights are, else hed-small. pose: the first of mediapipe, rtmlib and controlnet that is
    installed. landmarks: dlib, else mediapipe-face. features: the first VGG whose weights are here.

    Raises:
        ConfigError: no extractor of that name. MissingDependency: auto, and none of them is installed.
    """
    if name != "auto":
        if name not in _table(task):
            open_door(name, KINDS[task], _table(task))
        return name
    if task == "edge":
        return "hed" if has_weights("hed") else "hed-small"
    if task == "features":
        return "vgg16-caffe" if has_weights("vgg16-caffe") and not has_weights("vgg19") else "vgg19"
    return _first_installed(task)


def get_extractor(name: str = "auto", device: str | torch.device = "cpu", task: str = "edge") -> Extractor:
    """The extractor `name` of `task`, on `device`.

    Raises:
        ConfigError: no such extractor, or one of another task.
        MissingWeights, MissingDependency: what it needs is not on this machine and may not or cannot be fetched.
        CheckpointError: its weights are damaged.
    """
    name = resolve_name(name, task)
    extractor = open_door(name, KINDS[task], _table(task))(device=torch.device(device))
    if extractor.task != task:
        raise ConfigError(f"{name!r} is for task {extractor.task}, not {task}; choose one of {extractor_names(task)}")
    return extractor


def _table(task: str) -> dict[str, Any]:
    others = {name for kind, names in BUILT_IN.items() if kind != task for name in names}
    return {name: door for name, door in doors(GROUP, BUILT_IN[task]).items() if name not in others}


def _first_installed(task: str) -> str:
    if task == "landmarks":
        for name, module in (("dlib", "dlib"), ("mediapipe-face", "mediapipe")):
            if find_spec(module):
                return name
        raise MissingDependency(
            "landmarks need a detector: pip install 'cocosctl[faces]', or name a JSON file of 68 points a picture "
            "as data.landmarks"
        )
    for name, module in _MODULES.items():
        if find_spec(module):
            return name
    raise MissingDependency(
        "poses need a detector: pip install 'cocosctl[pose]' (mediapipe), or rtmlib, or controlnet_aux; ready-made "
        "OpenPose files are read with --labels DIR"
    )


def sha256_of(path: Path) -> str:
    """Hash of a file's content, as provenance states it."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require(module: str, extra: str) -> Any:
    """Import an optional package. Raises MissingDependency with the way to install it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # broken installations raise all sorts of things
        raise MissingDependency(f"{module} does not load ({error}); pip install '{extra}'") from error
