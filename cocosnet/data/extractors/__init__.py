"""What turns a photograph into a condition (edges, a pose), into face landmarks, or into a feature vector: by name.

Built-in extractors and those of installed packages (entry points, group "cocosctl.extractors") come through the same
door: a name leads to "module:factory", imported when it is asked for and called as `factory(device=...)`. What the
factory returns is an `Extractor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from cocosnet.config import DataConfig
from cocosnet.data.images import resize_shorter, shorter_size
from cocosnet.data.pose import Pose
from cocosnet.doors import GROUPS, doors, open_door
from cocosnet.errors import ConfigError, DataError, MissingDependency
from cocosnet.weights import has_weights

GROUP = GROUPS["extractor"]
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

    An extractor that is quicker with several pictures at once also has `many(images, size, batch)`: the list of what
    a call answers to each, whose numbers depend on `batch` but not on how many pictures there are, nor on which.
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
    network: Callable[[Sequence[Image.Image]], Sequence[torch.Tensor]]  # RGB, of one size -> edges H,W float32 in [0,1]
    provenance: dict[str, Any] = field(default_factory=dict)
    least: int = WORK_SIDE  # px, shorter side of the smallest pictures that the network sees
    task = "edge"

    def __call__(self, image: Image.Image, size: int | None = None) -> Image.Image:
        """Edges of an RGB picture as mode L, white on black, of the picture's proportions.

        Args:
            size: shorter side of the answer in px, by default the picture's own. The network sees the picture with a
                shorter side of max(size, least), so give the big picture rather than one already reduced.
        """
        return self.many([image], size, 1)[0]

    def many(self, images: Sequence[Image.Image], size: int | None, batch: int) -> list[Image.Image]:
        """Edges of several pictures, of which those that the network sees at one size go through it `batch` at once."""
        wanted = [image.size if size is None else shorter_size(image.size, size) for image in images]
        seen = [resize_shorter(image, max(min(goal), self.least)) for image, goal in zip(images, wanted)]
        found = [Image.fromarray((e * 255).round().byte().numpy()) for e in in_batches(self.network, seen, batch)]
        return [e if e.size == goal else e.resize(goal, Image.Resampling.BILINEAR) for e, goal in zip(found, wanted)]


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
        return pose if size is None else pose.resize(shorter_size(image.size, size))


def in_batches(network: Callable, images: Sequence[Image.Image], batch: int) -> list[Any]:
    """What `network` answers to each picture, given `batch` pictures of one size at a time.

    The last batch of a size is filled up with copies of its last picture. So the network always sees the same shapes,
    and what it finds in a picture does not depend on which others were there.
    """
    answers: list[Any] = [None] * len(images)
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        by_size.setdefault(image.size, []).append(place)
    for places in by_size.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            full = some + some[-1:] * (batch - len(some))
            for place, answer in zip(some, network([images[i] for i in full])):
                answers[place] = answer
    return answers


def when_needed(load: Callable[[], Callable]) -> Callable:
    """What `load` returns, loaded at its first call: where everything is up to date no network is loaded at all."""
    loaded = functools.cache(load)
    return lambda *arguments: loaded()(*arguments)


def condition_extractor(data: DataConfig, device: str | torch.device = "cpu") -> Extractor:
    """What finds the conditions of a model in photographs, as its training had them; for ready-made poses any detector.

    Raises:
        ConfigError: a model of label maps, which nothing here can find. Otherwise as `get_extractor`.
    """
    if data.task == "mask":
        raise ConfigError("label maps cannot be found in photographs; give them as files")
    if data.task == "pose":
        return get_extractor("auto" if data.poses == "openpose" else data.poses, device, "pose")
    return get_extractor(data.edges, device)


def extractor_names(task: str) -> list[str]:
    """Built-in names for `task`, and all names of other packages, whose task only their code knows; imports nothing."""
    return sorted(_table(task))


def names_detector(name: str) -> bool:
    """Whether data.landmarks names a detector, as `auto` and nothing at all do, rather than a file of points."""
    return name in ("", "auto") or name in _table("landmarks")


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
        "poses need a detector: pip install 'cocosctl[pose]' (mediapipe), or rtmlib, or controlnet_aux; `prepare` "
        "reads ready-made OpenPose files with --labels DIR"
    )
