"""Poses: what people have is read, left stays left, and the channels are the release's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from cocosnet.config import DataConfig
from cocosnet.data.conditions import load_condition
from cocosnet.data.extractors.poses import from_candidates, from_coco_17, from_mediapipe
from cocosnet.data.pose import LIMBS, Pose, pose_channels, read_pose, write_pose
from cocosnet.errors import DataError

COCO_18 = ["nose", "neck", "rsho", "relb", "rwri", "lsho", "lelb", "lwri", "rhip", "rkne", "rank"]
COCO_18 += ["lhip", "lkne", "lank", "reye", "leye", "rear", "lear"]
BODY_25 = [*COCO_18[:8], "midhip", *COCO_18[8:], "lbig", "lsmall", "lheel", "rbig", "rsmall", "rheel"]
COCO_17 = ["nose", "leye", "reye", "lear", "rear", "lsho", "rsho", "lelb", "relb", "lwri", "rwri"]
COCO_17 += ["lhip", "rhip", "lkne", "rkne", "lank", "rank"]
MEDIAPIPE = ["nose", "leye_in", "leye", "leye_out", "reye_in", "reye", "reye_out", "lear", "rear", "mouth_l", "mouth_r"]
MEDIAPIPE += [
    "lsho",
    "rsho",
    "lelb",
    "relb",
    "lwri",
    "rwri",
    "lpinky",
    "rpinky",
    "lindex",
    "rindex",
    "lthumb",
    "rthumb",
]
MEDIAPIPE += ["lhip", "rhip", "lkne", "rkne", "lank", "rank", "lheel", "rheel", "lfoot", "rfoot"]
PLACE = {name: (10 + 7 * i, 15 + 5 * i) for i, name in enumerate(dict.fromkeys(COCO_18 + BODY_25 + MEDIAPIPE))}
PLACE["neck"] = tuple((np.array(PLACE["lsho"]) + PLACE["rsho"]) / 2)


def joints(names: list[str]) -> np.ndarray:
    """Each joint where PLACE says, confidence 0.9."""
    return np.array([[*PLACE[name], 0.9] for name in names])


def written(folder: Path, *people: np.ndarray, **more: int) -> Path:
    path = folder / "p_keypoints.json"
    people = [{"pose_keypoints_2d": person.ravel().tolist()} for person in people]
    path.write_text(json.dumps({"people": people, **more}))
    return path


@pytest.mark.parametrize("names", [COCO_18, BODY_25], ids=["coco", "body25"])
def test_openpose_joints_keep_their_names(names: list[str], tmp_path: Path) -> None:
    pose = read_pose(written(tmp_path, joints(names)), (400, 300))
    assert pose.people.shape == (1, 18, 3)
    assert np.allclose(pose.people[0], joints(COCO_18), atol=1e-4)


def test_other_networks_joints_are_brought_to_their_names() -> None:
    coco = joints(COCO_17)
    assert np.allclose(from_coco_17(coco[None, :, :2], coco[None, :, 2])[0], joints(COCO_18), atol=1e-4)

    class Mark:
        def __init__(self, row: np.ndarray) -> None:
            self.x, self.y, self.visibility = row[0] / 400, row[1] / 300, row[2]

    found = from_mediapipe([Mark(row) for row in joints(MEDIAPIPE)], 400, 300)
    assert np.allclose(found[0], joints(COCO_18), atol=1e-3)
    candidates = np.column_stack([joints(COCO_18)[::-1], np.arange(18)])
    assert np.allclose(from_candidates(candidates, np.array([[*range(17, -1, -1), 9.0, 18]]))[0], joints(COCO_18))


def test_a_half_seen_neck_is_not_seen() -> None:
    coco = joints(COCO_17)
    coco[COCO_17.index("lsho"), 2] = 0.1
    person = from_coco_17(coco[None, :, :2], coco[None, :, 2])[0]
    unseen = [name for name, joint in zip(COCO_18, person) if joint[2] == 0]
    assert unseen == ["neck", "lsho"]


@pytest.mark.parametrize("scale", [lambda p: p, lambda p: p / (400, 300), lambda p: p / (400, 300) * 2 - 1])
def test_pixels_and_both_normalisations_are_told_apart(scale, tmp_path: Path) -> None:
    person = joints(COCO_18)
    person[:, :2] = scale(person[:, :2])
    person[3] = 0  # not seen
    pose = read_pose(written(tmp_path, person, person), (400, 300))
    assert len(pose.people) == 2
    assert np.allclose(pose.people[1][4:], joints(COCO_18)[4:], atol=1e-3) and pose.people[0, 3].tolist() == [0, 0, 0]


def test_the_releases_text_equals_its_numbers(shared: Path) -> None:
    path = shared / "data/cocosnet_samples/DeepFashion/pose/WOMEN/Tees_Tanks/id_00007059/03_3_back_candidate.txt"
    pose = read_pose(path, (256, 256))
    candidates = np.loadtxt(path)
    subset = np.loadtxt(str(path).replace("candidate", "subset"))
    for joint in range(18):
        expected = candidates[int(subset[joint])][:3] if subset[joint] >= 0 else np.zeros(3)
        assert np.allclose(pose.people[0, joint], expected, atol=1e-4)


def test_written_poses_are_read_back_without_their_picture(tmp_path: Path) -> None:
    pose = Pose(joints(COCO_18)[None].astype(np.float32), (400, 300))
    write_pose(pose, tmp_path / "pose.json")
    again = read_pose(tmp_path / "pose.json")
    assert again.size == (400, 300) and np.allclose(again.people, pose.people, atol=0.006)
    tensor = load_condition(tmp_path / "pose.json", DataConfig(task="pose"), (150, 200))
    assert tensor.shape == (20, 150, 200)
    heat = load_condition(tmp_path / "pose.json", DataConfig(task="pose", pose_maps="heatmaps"), (150, 200))
    assert heat.shape == (18, 150, 200)
    peak = np.unravel_index(int(heat[4].argmax()), (150, 200))
    assert np.abs(np.array(peak)[::-1] + 0.5 - np.array(PLACE["rwri"]) / 2).max() <= 0.51


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot read"),
        ('{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}', "1 joints"),
        ('{"people": 3}', "cannot read"),
        ("[" * 100_000, "cannot read"),
        ('{"people": []}', "does not say the size of its picture; give it as JSON with canvas_width"),
        ('{"people": [], "canvas_width": 1000000000, "canvas_height": 1000000000}', "at most"),
    ],
)
def test_what_is_no_pose_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_pose(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_is_no_pose(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pose.json")
    with pytest.raises(DataError, match="a pipe"):
        read_pose(tmp_path / "pose.json")


def test_channels_are_the_releases(tmp_path: Path) -> None:
    """One horizontal limb (right shoulder to right elbow) whose ellipse and distances can be written down."""
    person = np.zeros((1, 18, 3), np.float32)
    person[0, 2], person[0, 3] = (300, 512, 1), (700, 512, 1)
    channels = pose_channels(Pose(person, (1024, 1024)))
    assert channels.shape == (20, 1024, 1024) and channels.dtype == torch.float32
    limb = LIMBS.index((2, 3))
    assert all(channels[3 + other].min() == 1 for other in range(17) if other != limb)
    y, x = np.mgrid[:1024, :1024]
    inside = ((x - 500) / 200) ** 2 + ((y - 512) / 20) ** 2 <= 1
    expected = np.minimum(distance_transform_cdt(~inside, "taxicab") / 3, 255) / 255
    assert np.abs(channels[3 + limb].numpy() - expected).max() < 3 / 765  # a pixel or two at the rim
    middle = (channels[:3, 512, 500] * 255).tolist()
    assert np.allclose(middle, [0, 0.6 * 170, 0.6 * 255], atol=1.1)  # the third limb's colour over black
    assert (channels[:3, 512, 300] * 255).tolist() != [0, 0, 0] and channels[:3, 100, 100].sum() == 0


def test_a_pose_moves_with_its_picture() -> None:
    pose = Pose(joints(COCO_18)[None].astype(np.float32), (400, 300))
    small = pose.resize((200, 150), box=(100, 0, 400, 300))
    assert np.allclose(small.people[0, :, 0], (joints(COCO_18)[:, 0] - 100) * 200 / 300, atol=1e-4)
    whole, half = pose_channels(pose), pose_channels(pose.resize((200, 150)))
    shrunk = torch.nn.functional.avg_pool2d(whole, 2)
    assert (shrunk - half).abs()[3:].max() < 0.02  # distances are relative to the picture


def test_pairs_of_poses_reach_training(shared: Path, tmp_path: Path) -> None:
    from cocosnet.config import Config
    from cocosnet.data.check import draw_sheet, find_faults
    from cocosnet.data.dataset import PairDataset
    from cocosnet.data.prepare import prepare

    for path in sorted((shared / "data/fashion512").iterdir())[:4]:
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "photos")
    config = Config(data=DataConfig(task="pose", size=96, val_fraction=0))
    records = list(prepare(tmp_path, tmp_path / "out", config, labels=shared / "data/fashion512_openpose"))
    assert [record.status for record in records] == ["ok"] * 4
    pairs = PairDataset(tmp_path / "out", config)
    item = pairs[0]
    assert item["condition"].shape == (20, *item["image"].shape[1:])
    assert item["exemplar_condition"].shape[0] == 20 and float(item["condition"][3:].min()) == 0
    original = read_pose(shared / f"data/fashion512_openpose/{records[0].id}_keypoints.json", (1, 1))
    size = Image.open(shared / f"data/fashion512/{records[0].id}.jpg").size
    prepared = read_pose(records[0].condition)
    assert np.allclose(prepared.people[..., 0] / prepared.width, original.people[..., 0] / size[0], atol=2e-3)
    assert list(find_faults(tmp_path / "out")) == []
    assert draw_sheet(tmp_path / "out").width > 400


def test_a_person_without_a_seen_joint_is_nobody(tmp_path: Path) -> None:
    from cocosnet.config import Config
    from cocosnet.data.prepare import prepare

    (tmp_path / "poses").mkdir()
    Image.new("RGB", (60, 80)).save(tmp_path / "one.png")
    people = [{"pose_keypoints_2d": [30, 40, 0.01] * 18}]
    (tmp_path / "poses/one_keypoints.json").write_text(json.dumps({"people": people}))
    (record,) = prepare(tmp_path, tmp_path / "out", Config(DataConfig("pose", size=32)), labels=tmp_path / "poses")
    assert record.failed and "nobody is in it" in record.error


def test_a_pose_model_translates_files_and_photographs(shared: Path, tmp_path: Path) -> None:
    """An untrained model: what is tested is that poses flow through, drawn alike from a file and from a photograph."""
    from cocosnet.checkpoint import save_model
    from cocosnet.config import load_config
    from cocosnet.data.records import Record
    from cocosnet.inference import Translator
    from cocosnet.model.cocosnet import CoCosNet

    torch.manual_seed(0)
    model = CoCosNet(load_config("tiny-cpu", ["data.task=pose", "data.poses=auto", "data.size=64"]))
    save_model(tmp_path / "pose.safetensors", model)
    photo = shared / "data/fashion512/1307.jpg"
    given = read_pose(shared / "data/fashion512_openpose/1307_keypoints.json", Image.open(photo).size)
    write_pose(given, tmp_path / "pose.json")
    files = Translator(tmp_path / "pose.safetensors", "cpu")
    record = Record("p", condition=str(tmp_path / "pose.json"), exemplar=str(shared / "data/fashion512/0001.jpg"))
    done = files.translate(record, tmp_path / "out.png")
    assert done.status == "ok" and min(Image.open(tmp_path / "out.png").size) == 64
    if importlib.util.find_spec("mediapipe") is None:
        return
    raw = Translator(tmp_path / "pose.safetensors", "cpu", raw=True)
    found = raw.load_pair(Record("p", condition=str(photo), exemplar=str(photo))).condition
    assert (found - files.load_pair(record).condition).abs()[:, 3:].mean() < 0.03
