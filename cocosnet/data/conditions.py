"""Condition files to condition tensors: what x_A of the paper is for each task.

edge   grey picture, white edges on black    1 channel, edge strength in [0,1]
mask   PNG of class indices                  one channel a class (0 or 1), and a last one for every other index
pose   OpenPose's JSON or candidate text     20 channels (drawn skeleton, distance to each limb) or 18 heat maps
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cocosnet.config import DataConfig
from cocosnet.data.images import load_gray, load_labels
from cocosnet.data.labels import UNKNOWN
from cocosnet.data.pose import Pose, pose_channels, read_pose

EXTENDED_UNKNOWN = 65535  # "no class" of 16-bit maps, stored in place of indices that they cannot hold
NO_CLASS = (UNKNOWN, EXTENDED_UNKNOWN)  # indices that stand for no class, where the classes do not reach up to them


def load_condition(path: str | Path, data: DataConfig, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The condition file as C,H,W float32 in [0,1], C = data.condition_channels.

    Args:
        size: (height, width) to resize to; edges are filtered, labels take the nearest index.

    Raises:
        DataError: the file cannot be read, or is no label map where one is needed.
    """
    image = load_condition_image(path, data)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), condition_filter(data))
    return condition_to_tensor(image, data)


def load_condition_image(path: str | Path, data: DataConfig) -> Image.Image | Pose:
    """The condition file as a picture: mode L for edges, L or I;16 of class indices, or a `Pose`, which can be resized
    as a picture can. Raises as `load_condition`."""
    if data.task == "pose":
        return read_pose(path)
    return load_gray(path) if data.task == "edge" else labels_to_image(load_labels(path))


def condition_to_tensor(image: Image.Image | Pose, data: DataConfig) -> torch.Tensor:
    """A condition, as `load_condition_image` or an extractor gives it, as C,H,W float32 in [0,1]."""
    if isinstance(image, Pose):
        return pose_channels(image, data.pose_maps)
    if data.task == "edge":
        return torch.from_numpy(np.array(image.convert("L"))).float()[None] / 255
    return one_hot(torch.from_numpy(np.asarray(image).astype(np.int64)), data.classes)


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Class indices H,W as classes+1,H,W float32 of 0 and 1; indices outside 0..classes-1 set the last channel.

    Raises ValueError for what is not H,W, such as a coloured picture.
    """
    if labels.ndim != 2:
        raise ValueError(f"a label map has one class index a pixel, H,W; this is {tuple(labels.shape)}")
    known = (labels >= 0) & (labels < classes)
    indices = torch.where(known, labels.long(), torch.full_like(labels.long(), classes))
    return torch.zeros(classes + 1, *labels.shape).scatter_(0, indices[None], 1.0)


def condition_filter(data: DataConfig) -> Image.Resampling:
    """The resampling filter for condition pictures of the task: indices are never mixed."""
    return Image.Resampling.NEAREST if data.task == "mask" else Image.Resampling.BILINEAR


def labels_to_image(labels: np.ndarray) -> Image.Image:
    """Class indices H,W as a picture, mode L where all fit in 8 bits, else I;16."""
    if labels.min(initial=0) >= 0 and labels.max(initial=0) <= 255:
        return Image.fromarray(labels.astype(np.uint8))
    labels = np.where((labels < 0) | (labels > EXTENDED_UNKNOWN), EXTENDED_UNKNOWN, labels)
    return Image.fromarray(labels.astype(np.uint16))
