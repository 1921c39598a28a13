"""RTMPose and OpenPose through the packages that bring them: their real code, small or random weights in their files.

The packages are optional: `pip install rtmlib controlnet_aux`. What they find in photographs needs their own weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import lines, run
from PIL import Image

from cocosnet.data.extractors import get_extractor
from cocosnet.data.extractors.poses import at_most
from cocosnet.errors import CheckpointError, DataError, MissingWeights

BOX = (40.0, 20.0, 232.0, 276.0)  # px of the detector's 640x640 picture
DETECTOR, JOINTS = (
    "yolox_m_8xb8-300e_humanart-c2c7a14a.onnx",
    ("rtmpose-m_simcc-body7_pt-body7_420e-256x192-e48f03d0_20230504.onnx"),
)


def constant_model(path: Path, size: tuple[int, int], outputs: dict[str, np.ndarray]) -> None:
    """An ONNX model that answers the same to every picture of (height, width) `size`."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    path.parent.mkdir(parents=True, exist_ok=True)
    nodes = [helper.make_node("ReduceMin", ["input"], ["least"], keepdims=0)]
    nodes += [helper.make_node("Mul", ["least", "nothing"], ["zero"])]
    nodes += [helper.make_node("Add", [f"{name}_value", "zero"], [name]) for name in outputs]
    values = [numpy_helper.from_array(array.astype(np.float32), f"{name}_value") for name, array in outputs.items()]
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("input", kind, [1, 3, *size])],
        [helper.make_tensor_value_info(name, kind, list(array.shape)) for name, array in outputs.items()],
        [*values, numpy_helper.from_array(np.zeros((), np.float32), "nothing")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))


def peaks(places: np.ndarray, length: int, scores: np.ndarray) -> np.ndarray:
    """RTMPose's answer for one axis: 1,17,length with each joint's score at its place."""
    maps = np.zeros((1, 17, length), np.float32)
    maps[0, np.arange(17), places] = scores
    return maps


@pytest.fixture
def rtm_weights(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder of models that see one person with 17 joints (half px of a 192x256 picture); TORCH_HOME points there."""
    pytest.importorskip("rtmlib", reason="an optional package")
    checkpoints = tmp_path / "home/hub/checkpoints"
    constant_model(checkpoints / DETECTOR, (640, 640), {"dets": np.array([[[*BOX, 0.9]]])})
    rng = np.random.default_rng(0)
    at = np.stack([rng.integers(20, 360, 17), rng.integers(20, 490, 17)], axis=1)
    scores = np.full(17, 0.8)
    scores[9] = 0.1  # the left wrist is not seen
    maps = {"simcc_x": peaks(at[:, 0], 384, scores), "simcc_y": peaks(at[:, 1], 512, scores)}
    constant_model(checkpoints / JOINTS, (256, 192), maps)
    return tmp_path / "home", at, scores


def test_rtmlib_s_joints_arrive_where_they_are(rtm_weights, monkeypatch: pytest.MonkeyPatch) -> None:
    home, at, _ = rtm_weights
    monkeypatch.setenv("TORCH_HOME", str(home))
    pose = get_extractor("rtmlib", task="pose")(Image.new("RGB", (320, 320), "grey"))
    left, top, right, bottom = np.array(BOX) / 2  # 320 px are seen at 640
    centre, width = np.array([left + right, top + bottom]) / 2, max(right - left, (bottom - top) * 0.75) * 1.25
    expected = at / 2 / (192, 256) * (width, width / 0.75) + centre - np.array([width, width / 0.75]) / 2
    places = {0: 0, 2: 6, 3: 8, 4: 10, 5: 5, 6: 7, 8: 12, 9: 14, 10: 16, 11: 11, 12: 13, 13: 15, 14: 2, 17: 3}
    for joint, theirs in places.items():
        assert np.allclose(pose.people[0, joint, :2], expected[theirs], atol=1.5), joint
    assert np.allclose(pose.people[0, 1, :2], (expected[5] + expected[6]) / 2, atol=1.5)  # the neck
    assert pose.people[0, 7, 2] == 0


def test_rtmlib_prints_nothing_between_the_records(rtm_weights, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 80), "grey").save(tmp_path / "photos/one.png")
    command = ["prepare", tmp_path / "photos", "--task", "pose", "--extractor", "rtmlib", "--size", 64, "--json"]
    done = run(*command, "-o", tmp_path / "out", TORCH_HOME=str(rtm_weights[0]))
    (record,) = lines(done.stdout)
    assert done.returncode == 0 and record["status"] == "ok"
    assert record["condition_source"]["network"] == "rtmpose" and len(record["condition_source"]["sha256"]) == 64
    people = json.loads(Path(record["condition"]).read_text())["people"]
    assert len(people) == 1 and len(people[0]["pose_keypoints_2d"]) == 54


def test_rtmlib_says_which_weights_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rtmlib", reason="an optional package")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")
    with pytest.raises(MissingWeights, match=DETECTOR):
        get_extractor("rtmlib", task="pose")


def test_big_pictures_are_reduced_for_a_hungry_network_and_joints_put_back() -> None:
    pixels = np.zeros((1500, 1000, 3), np.uint8)
    pixels[600:640, 300:340, 0] = 255  # red

    def red_square(bgr: np.ndarray) -> np.ndarray:
        assert bgr.shape == (768, 512, 3)
        rows, columns = np.nonzero(bgr[..., 2] > 128)
        return np.tile(np.array([columns.mean() + 0.5, rows.mean() + 0.5, 0.7], np.float32), (1, 18, 1))

    people = at_most(512, red_square)(pixels)
    assert np.allclose(people, (320, 620, 0.7), atol=1)


def test_openpose_runs_from_a_file_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("controlnet_aux", reason="an optional package")
    from controlnet_aux.open_pose.model import bodypose_model

    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(MissingWeights, match="body_pose_model.pth"):
        get_extractor("controlnet", task="pose")
    torch.manual_seed(0)
    state = {name.partition(".")[2]: value for name, value in bodypose_model().state_dict().items()}
    torch.save(state, tmp_path / "body_pose_model.pth")
    extractor = get_extractor("controlnet", task="pose")
    assert extractor.provenance["network"] == "openpose" and len(extractor.provenance["sha256"]) == 64
    with pytest.raises(DataError, match="sees nobody"):  # its weights are random: what is tested is that they are run
        extractor(Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)))
    (tmp_path / "body_pose_model.pth").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="body_pose_model.pth"):
        get_extractor("controlnet", task="pose")(Image.new("RGB", (64, 64)))
