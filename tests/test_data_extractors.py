"""Extractors by name, faces drawn into edges, faces cut out and put back."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cli_tools import clean_environment
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio as psnr

from cocosnet.config import Config, DataConfig
from cocosnet.data.crop import box_corners, cut, face_corners, into_square, load_landmarks, undo_cut
from cocosnet.data.extractors import condition_extractor, extractor_names, get_extractor
from cocosnet.data.extractors.faces import draw_face
from cocosnet.data.extractors.landmarks import largest_face
from cocosnet.data.prepare import prepare
from cocosnet.errors import ConfigError, DataError, MissingDependency


@pytest.fixture
def portrait(shared: Path) -> tuple[Image.Image, np.ndarray]:
    points = load_landmarks(shared / "data/portraits512_landmarks68.json")
    return Image.open(shared / "data/portraits512/adam-schiff.jpg").convert("RGB"), points["adam-schiff.jpg"]


def test_another_package_adds_an_extractor(tmp_path: Path) -> None:
    (tmp_path / "invert.py").write_text(
        "from PIL import ImageOps\n"
        "class Invert:\n"
        "    name, task, provenance = 'invert', 'edge', {'network': 'invert'}\n"
        "    def __call__(self, image, size=None):\n"
        "        return ImageOps.invert(image.convert('L')).resize((size, size))\n"
        "def make(device):\n    return Invert()\n"
    )
    info = tmp_path / "invert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: invert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cocosctl.extractors]\ninvert = invert:make\nbroken = nowhere:x\n")
    Image.new("RGB", (40, 40), (10, 10, 10)).save(tmp_path / "dark.png")
    command = [sys.executable, "-m", "cocosctl", "prepare", str(tmp_path), "-o", str(tmp_path / "out"), "--size", "32"]
    environment = clean_environment(PYTHONPATH=str(tmp_path))

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--extractor", name], capture_output=True, text=True, env=environment)

    assert run("invert").returncode == 0
    assert np.asarray(Image.open(tmp_path / "out/conditions/dark.png")).mean() == 245
    broken = run("broken")
    assert broken.returncode == 5 and "broken" in broken.stderr and broken.stderr.count("\n") == 1


def test_names_belong_to_tasks() -> None:
    assert {"hed", "hed-small", "canny", "image"} <= set(extractor_names("edge"))
    with pytest.raises(ConfigError, match="no pose extractor is called 'hed'"):
        get_extractor("hed", task="pose")


def test_a_model_s_conditions_are_found_as_its_task_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    assert condition_extractor(DataConfig(task="edge", edges="hed-small")).provenance["network"] == "hed-small"
    with pytest.raises(ConfigError, match="label maps"):
        condition_extractor(DataConfig(task="mask", classes=3))
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(MissingDependency, match=r"cocosctl\[pose\]"):
        condition_extractor(DataConfig(task="pose", poses="mediapipe"))


def test_an_extractor_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(MissingDependency, match=r"cocosctl\[pose\]"):
        get_extractor("mediapipe", task="pose")


def test_mediapipe_sees_left_and_right_where_they_are(shared: Path) -> None:
    pytest.importorskip("mediapipe", reason="an optional extra")
    extractor = get_extractor("mediapipe", task="pose")
    pose = extractor(Image.open(shared / "data/fashion512/1307.jpg"))
    given = json.loads((shared / "data/fashion512_openpose/1307_keypoints.json").read_text())
    expected = np.array(given["people"][0]["pose_keypoints_2d"]).reshape(18, 3)
    assert np.median(np.hypot(*(pose.people[0] - expected)[:, :2].T)) < 8


def test_landmark_detectors_agree_with_given_points(portrait) -> None:
    image, points = portrait
    for name, module, within in (("dlib", "dlib", 2.5), ("mediapipe-face", "mediapipe", 12)):
        if __import__("importlib").util.find_spec(module):
            assert np.abs(get_extractor(name, task="landmarks")(image) - points).mean() < within


@dataclass
class Box:
    """As dlib's rectangle; a face is where a picture is black."""

    edges: tuple[int, int, int, int]

    def __getattr__(self, name: str) -> Callable[[], int]:
        left, top, right, bottom = self.edges
        sides = {"left": left, "top": top, "right": right, "bottom": bottom, "area": (right - left) * (bottom - top)}
        return lambda: sides[name]


@pytest.mark.parametrize(("wide", "looks"), [(600, [1024]), (60, [1024, 4096])])
def test_a_big_picture_is_looked_at_as_a_small_one_first(wide: int, looks: list[int]) -> None:
    """This detector of ours sees squares of 40 px and more."""
    seen = []

    def detector(pixels: np.ndarray, doubled: int) -> list[Box]:
        seen.append(pixels.shape[1])
        rows, columns = np.nonzero(pixels[..., 0] < 128)
        box = Box((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        return [box] if box.right() - box.left() >= 40 else []

    picture = np.full((2000, 4096, 3), 255, np.uint8)
    picture[800 : 800 + wide, 1200 : 1200 + wide] = 0
    assert np.allclose(largest_face(detector, picture), (1200, 800, 1200 + wide, 800 + wide), atol=4)
    assert seen == looks


def test_canny_finds_a_square() -> None:
    image = Image.new("RGB", (300, 300))
    image.paste((255, 255, 255), (100, 100, 200, 200))
    edges = np.asarray(get_extractor("canny")(image)) > 0
    assert edges[95:105, 110:190].any(axis=0).all() and not edges[120:180, 120:180].any() and not edges[:80].any()


def test_faces_are_drawn_inside_and_found_outside(portrait) -> None:
    image, points = portrait
    found = get_extractor("hed-small")(image)
    drawn = get_extractor("hed-small-face")
    edges = np.asarray(drawn(image, points=points))
    far = np.zeros(edges.shape, bool)
    far[: int(points[:, 1].min()) - 20] = True
    assert np.array_equal(edges[far], np.asarray(found)[far])
    for x, y in points[[8, 30, 36, 45, 48, 54]].astype(int):
        assert edges[y - 3 : y + 4, x - 3 : x + 4].max() > 200
    cheek = ((points[2] + points[31]) / 2).astype(int)
    assert edges[cheek[1] - 4 : cheek[1] + 5, cheek[0] - 4 : cheek[0] + 5].max() == 0
    with pytest.raises(DataError, match="span a face"):
        draw_face(found, np.ones((68, 2)))


def test_an_aligned_face_is_upright_framed_and_can_be_put_back(portrait) -> None:
    image, points = portrait
    turned = image.rotate(25, Image.Resampling.BICUBIC, expand=False)
    angle, centre = np.deg2rad(-25), np.array(image.size) / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (points - centre) @ turn.T + centre
    corners = face_corners(moved)
    inside = into_square(moved, corners, 256)
    eyes = inside[36:42].mean(0), inside[42:48].mean(0)
    assert abs(eyes[0][1] - eyes[1][1]) < 6 and 0.2 * 256 < eyes[1][0] - eyes[0][0] < 0.3 * 256
    straight = cut(image, face_corners(points), 256, Image.Resampling.BICUBIC)
    again = cut(turned, corners, 256, Image.Resampling.BICUBIC)
    middle = (slice(60, 200), slice(60, 200))
    assert psnr(np.asarray(straight)[middle], np.asarray(again)[middle]) > 30
    black = Image.new("RGB", image.size)
    square = cut(image, face_corners(points), 512, Image.Resampling.BICUBIC)
    back = np.asarray(undo_cut(square, black, face_corners(points)))
    left, top = points.min(0).astype(int)
    right, bottom = points.max(0).astype(int)
    box = (slice(top, bottom), slice(left, right))
    assert psnr(np.asarray(image)[box], back[box]) > 34
    fine = cut(image, face_corners(points), 2048, Image.Resampling.BICUBIC)
    rng = np.random.default_rng(0)
    noisy = Image.fromarray((np.asarray(fine) * 0.5 + rng.uniform(0, 127, (2048, 2048, 1))).astype(np.uint8))
    smooth = np.asarray(undo_cut(noisy, black, face_corners(points)))[box].astype(float)
    assert (smooth - (np.asarray(image)[box] * 0.5 + 63)).std() < 20  # noise of 37, averaged over many px


@pytest.mark.parametrize("wide", [300, 450, 512, 1300])
def test_a_square_is_cut_as_smoothly_as_it_would_be_resized(portrait, wide: int) -> None:
    image = portrait[0].resize((2048, 2048), Image.Resampling.BICUBIC) if wide > 512 else portrait[0]
    box = (0, 0, wide, wide)
    expected = image.resize((128, 128), Image.Resampling.LANCZOS, box=box)
    found = cut(image, box_corners(box), 128, Image.Resampling.BICUBIC)
    assert psnr(np.asarray(expected), np.asarray(found)) > 45


def test_what_a_square_lacks_is_reflected_in_little_memory() -> None:
    columns = Image.fromarray(np.tile(np.arange(2000, dtype=np.uint16) % 251, (3000, 1)).astype(np.uint8))
    tracemalloc.start()
    square = cut(columns, box_corners((-10_000, 0, -9_900, 100)), 100, Image.Resampling.NEAREST)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    there = (np.arange(-10_000, -9_900) % 4000)[None]  # reflected at both ends, again and again
    assert np.array_equal(np.asarray(square)[:1], np.minimum(there, 3999 - there) % 251)


def test_landmarks_of_a_picture_of_another_size_are_refused(portrait, tmp_path: Path) -> None:
    image, points = portrait
    (tmp_path / "photos").mkdir()
    image.resize((200, 200)).save(tmp_path / "photos" / "small.png")
    (tmp_path / "points.json").write_text(json.dumps({"small.png": {"points": points.tolist()}}))
    config = Config(DataConfig(size=64, crop="face", landmarks=str(tmp_path / "points.json")))
    (record,) = prepare(tmp_path, tmp_path / "out", config, extractor="hed-small")
    assert record.failed and "do not fit its 200x200 px" in record.error


def test_records_of_aligned_faces_say_where_they_were(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("adam-schiff.jpg", "abigail-spanberger.jpg"):
        (tmp_path / "photos" / name).symlink_to(shared / "data/portraits512" / name)
    landmarks = str(shared / "data/portraits512_landmarks68.json")
    config = Config(data=DataConfig(size=128, crop="align", landmarks=landmarks, edges="hed-small-face"))
    records = list(prepare(tmp_path, tmp_path / "out", config))
    assert [record.status for record in records] == ["ok", "ok"]
    again = list(prepare(tmp_path, tmp_path / "out", config))
    for record, later in zip(records, again):
        assert later.status == "skipped" and later.extra == record.extra
        original = Image.open(shared / "data/portraits512" / record.extra["source"]).convert("RGB")
        corners = np.array(record.extra["crop"]["corners"])
        assert record.extra["crop"]["size"] == list(original.size)
        back = undo_cut(Image.open(record.target), original, corners)
        assert psnr(np.asarray(original), np.asarray(back)) > 28
        assert np.asarray(Image.open(record.condition)).max() == 255
