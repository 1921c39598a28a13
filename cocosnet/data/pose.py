"""Poses: 18 joints a person, read from what people have, drawn as the channels that the network sees.

Joints are OpenPose's COCO-18: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee,
ankle, left hip, knee, ankle, right eye, left eye, right ear, left ear. "Right" is the person's own right hand side.
Coordinates are (x, y) in px of the picture, from its upper left corner; a confidence of 0 means "not seen".
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_cdt

from cocosnet.data.images import MAX_PIXELS, check_file, shown
from cocosnet.errors import DataError
from cocosnet.files import atomic_write

POSE_SUFFIXES = (".json", ".txt")
JOINTS = 18
LIMBS = (  # the first 17 of OpenPose's 19 limbs: one distance map each (release)
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
_HUES = (  # OpenPose's colours, in the channel order that the release's network was trained on
    *((0, 0, 255), (0, 85, 255), (0, 170, 255), (0, 255, 255), (0, 255, 170), (0, 255, 85), (0, 255, 0)),
    *((85, 255, 0), (170, 255, 0), (255, 255, 0), (255, 170, 0), (255, 85, 0), (255, 0, 0), (255, 0, 85)),
    *((255, 0, 170), (255, 0, 255), (170, 0, 255), (85, 0, 255)),
)
CANVAS = 1024  # px of the longer side at which the next three are counted (release)
RADIUS = 20  # px of a joint's disc, and half the thickness of a limb's ellipse (release)
BLEND = 0.6  # share of a limb's colour over what is below it (release)
REACH = 3 * 255  # px, city-block distance at which a limb's map saturates at 1 (release)
HEAT_SIGMA = 12.0  # px at CANVAS, standard deviation of a joint's heat map (ours)
UNSEEN = 0.05  # confidence below which a joint counts as not seen (OpenPose's own threshold for drawing)
FROM_BODY_25 = (*range(8), *range(9, 19))  # BODY_25 has the middle of the hips at 8, and feet after 18
FROM_COCO_17 = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)  # None: the middle of the shoulders
FROM_MEDIAPIPE = (0, None, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)


@dataclass(frozen=True)
class Pose:
    """The people of one picture. It can be cropped and resized as a PIL picture can.

    people: N,18,3 float32 of (x, y, confidence); size: (width, height) of the picture in px.
    """

    people: np.ndarray
    size: tuple[int, int]

    @property
    def width(self) -> int:
        """px"""
        return self.size[0]

    @property
    def height(self) -> int:
        """px"""
        return self.size[1]

    @property
    def seen(self) -> bool:
        """Whether there is a joint of anyone."""
        return bool((self.people[..., 2] > 0).any())

    def resize(self, size: tuple[int, int], resample: Any = None, box: tuple[float, ...] | None = None) -> Pose:
        """In a picture of (width, height) `size`, of all or the part `box` of this one; `resample` has no meaning."""
        left, top, right, bottom = box or (0, 0, *self.size)
        scale = np.array([size[0] / (right - left), size[1] / (bottom - top)])
        return self.mapped(lambda points: (points - (left, top)) * scale, size)

    def mapped(self, change: Any, size: tuple[int, int]) -> Pose:
        """With `change`, a function of points ..,2 to points ..,2, applied to every joint."""
        moved = np.concatenate([change(self.people[..., :2]), self.people[..., 2:]], axis=-1)
        return dataclasses.replace(self, people=moved.astype(np.float32), size=tuple(size))


def reorder(points: np.ndarray, order: tuple[int | None, ...], shoulders: tuple[int, int] = (5, 6)) -> np.ndarray:
    """Joints N,J,3 of another scheme in the order of COCO-18; None in `order` is the middle of the `shoulders`."""
    points = np.asarray(points, dtype=np.float32)
    left, right = (points[:, index] for index in shoulders)
    neck = np.concatenate([(left + right)[:, :2] / 2, np.minimum(left, right)[:, 2:]], axis=1)
    return np.stack([neck if index is None else points[:, index] for index in order], axis=1)


def read_pose(path: str | Path, size: tuple[int, int] | None = None) -> Pose:
    """A pose file: OpenPose's JSON (BODY_25 or COCO-18; pixels or normalised), or the release's candidate text.

    Args:
        path: a .json file, or NAME_candidate.txt with NAME_subset.txt beside it.
        size: (width, height) of the picture that the coordinates belong to, where the file does not say it
            (canvas_width and canvas_height, which this program and ControlNet's tools write).

    Raises:
        DataError: unreadable, of another layout, of an unknown number of joints, or the size is nowhere said.
    """
    path = Path(path)
    check_file(path)
    try:
        if path.suffix == ".txt":
            people, own = _read_text(path), None
        else:
            people, own = _read_openpose(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{shown(path)}: cannot read this pose ({' '.join(str(error).split())[:120]}); it is OpenPose's JSON "
            "(people with pose_keypoints_2d), or the text NAME_candidate.txt with NAME_subset.txt"
        ) from error
    size = own or size
    if size is None:
        raise DataError(
            f"{shown(path)}: does not say the size of its picture; give it as JSON with canvas_width and canvas_height "
            "in px, as `cocosctl prepare` writes it"
        )
    return Pose(_in_pixels(people, size), size)


def _read_openpose(content: Any, path: Path) -> tuple[np.ndarray, tuple[int, int] | None]:
    if isinstance(content, list) and len(content) == 1:  # ControlNet's tools wrap the object in a list
        content = content[0]
    people = [_person(person["pose_keypoints_2d"], path) for person in content["people"]]
    own = (int(content["canvas_width"]), int(content["canvas_height"])) if "canvas_width" in content else None
    if own is not None and (min(own) < 1 or own[0] * own[1] > MAX_PIXELS):
        raise ValueError(f"canvas_width and canvas_height must be positive, and at most {MAX_PIXELS:,} px")
    return np.stack(people) if people else np.zeros((0, JOINTS, 3), np.float32), own


def _person(flat: list[float], path: Path) -> np.ndarray:
    with np.errstate(over="ignore"):  # a joint that is infinitely far off is none, and left out below
        points = np.array(flat, dtype=np.float32)
    if points.size not in (75, 54):
        raise DataError(
            f"{shown(path)}: a person has {points.size / 3:g} joints; BODY_25 (25) or COCO-18 (18) is needed"
        )
    points = points.reshape(-1, 3)
    return _without_unseen(points[list(FROM_BODY_25)] if len(points) == 25 else points)


def _read_text(path: Path) -> np.ndarray:
    """The release's files: rows (x, y, score, index) of found joints, and rows of indices a person, -1 for none."""
    candidates = _rows(path)
    subset = _rows(path.with_name(path.name.replace("candidate", "subset")))
    people = np.zeros((len(subset), JOINTS, 3), np.float32)
    for person, row in zip(people, subset):
        for joint, index in enumerate(row[:JOINTS]):
            if index >= 0:
                person[joint] = candidates[int(index)][:3]
    return people


def _rows(path: Path) -> list[list[float]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[float(word) for word in line.split()] for line in lines if line.strip()]


def _without_unseen(points: np.ndarray) -> np.ndarray:
    good = np.isfinite(points).all(-1) & (points[..., 2] >= UNSEEN)
    return np.where(good[..., None], points, 0).astype(np.float32)


def _in_pixels(people: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Coordinates in [0,1] or [-1,1] (OpenPose's keypoint_scale 3 and 4) become px; nobody's pose spans two px."""
    seen = people[people[..., 2] > 0][:, :2]
    if not len(seen) or np.abs(seen).max() > 2:
        return people
    signed = seen.min() < -0.2
    points = (people[..., :2] + 1) / 2 if signed else people[..., :2]
    scaled = np.concatenate([points * np.array(size, np.float32), people[..., 2:]], axis=-1)
    return np.where(people[..., 2:] > 0, scaled, 0).astype(np.float32)


def write_pose(pose: Pose, path: str | Path) -> None:
    """Write OpenPose's JSON (COCO-18, px to two decimals) with the picture's size. Raises DataError."""
    rounded = np.round(pose.people.astype(np.float64), 2)
    content = {
        "version": 1.3,
        "canvas_width": pose.width,
        "canvas_height": pose.height,
        "people": [{"pose_keypoints_2d": person.ravel().tolist()} for person in rounded],
    }
    atomic_write(path, json.dumps(content) + "\n")


def pose_channels(pose: Pose, kind: str = "limbs") -> torch.Tensor:
    """What the network sees, C,H,W float32 in [0,1] at the pose's size.

    `limbs`: the release's 20 channels, three of the drawn skeleton and one a limb of the city-block distance to it
    (0 on the limb, 1 from 765/1024 of the longer side on, and where the limb is not seen). `heatmaps`: 18 channels, a
    Gaussian a joint. Where there are several people, limbs and joints of one kind share a channel.
    """
    if kind == "heatmaps":
        return torch.from_numpy(_heat_maps(pose))
    masks = np.stack([_limb_mask(pose, limb) for limb in LIMBS])
    distance = city_block(masks) * (_unit(pose) / REACH)
    drawn = np.asarray(draw_skeleton(pose, masks)).transpose(2, 0, 1) / np.float32(255)
    return torch.from_numpy(np.concatenate([drawn, np.minimum(distance, 1)]).astype(np.float32))


def draw_skeleton(pose: Pose, masks: np.ndarray | None = None) -> Image.Image:
    """The people as coloured sticks on black, mode RGB; `masks` (17,H,W bool) where the limbs were drawn already."""
    image = Image.new("RGB", pose.size)
    draw, radius = ImageDraw.Draw(image), RADIUS / _unit(pose)
    for joint, hue in enumerate(_HUES):
        for x, y, confidence in pose.people[:, joint]:
            if confidence > 0:
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=hue)
    canvas = np.asarray(image).astype(np.float32)
    for index, limb in enumerate(LIMBS):
        mask = _limb_mask(pose, limb) if masks is None else masks[index]
        canvas[mask] = (1 - BLEND) * canvas[mask] + BLEND * np.array(_HUES[index], np.float32)
    return Image.fromarray(canvas.round().astype(np.uint8))


def _unit(pose: Pose) -> float:
    """px of the release's canvas a px of this picture."""
    return CANVAS / max(pose.size)


def _limb_mask(pose: Pose, limb: tuple[int, int]) -> np.ndarray:
    """H,W bool: an ellipse from joint to joint for everyone whose two joints are seen."""
    mask = Image.new("1", pose.size)
    draw, thick = ImageDraw.Draw(mask), RADIUS / _unit(pose)
    turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    for (x0, y0, seen0), (x1, y1, seen1) in pose.people[:, limb]:
        if seen0 > 0 and seen1 > 0:
            half, angle = math.hypot(x1 - x0, y1 - y0) / 2, math.atan2(y1 - y0, x1 - x0)
            along, across = half * np.cos(turn), thick * np.sin(turn)
            x = (x0 + x1) / 2 + along * math.cos(angle) - across * math.sin(angle)
            y = (y0 + y1) / 2 + along * math.sin(angle) + across * math.cos(angle)
            draw.polygon(list(zip(x.tolist(), y.tolist())), fill=1)
    return np.asarray(mask)


def city_block(masks: np.ndarray) -> np.ndarray:
    """City-block distance in px to the nearest True of N,H,W bool, as float32; infinite where there is none."""
    maps = [distance_transform_cdt(~mask, "taxicab") if mask.any() else np.inf for mask in masks]
    return np.stack([np.broadcast_to(np.float32(distance), masks.shape[1:]) for distance in maps])


def _heat_maps(pose: Pose) -> np.ndarray:
    y, x = (np.arange(side, dtype=np.float32) + 0.5 for side in (pose.height, pose.width))
    sigma = HEAT_SIGMA / _unit(pose)
    maps = np.zeros((JOINTS, pose.height, pose.width), np.float32)
    for person in pose.people:
        for joint, (px, py, confidence) in enumerate(person):
            if confidence > 0:
                rows, columns = (np.exp(-((axis - at) ** 2) / (2 * sigma**2)) for axis, at in ((y, py), (x, px)))
                maps[joint] = np.maximum(maps[joint], rows[:, None] * columns)
    return maps
