"""Records that come back: what one step told of its output must not be taken for another one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_tools import ROOT, lines, run
from PIL import Image

from cocosnet.config import load_config
from cocosnet.data.records import read_manifest
from cocosnet.errors import ConfigError

DEMO = ROOT / "cocosnet" / "assets" / "demo"
FILES = {"condition": "hopper.jpg", "exemplar": "tanguy.jpg"}


def translated(records: list[dict], folder: Path, *options: str) -> list[dict]:
    """What `translate` prints of records, made into `folder`."""
    manifest = folder.with_suffix(".jsonl")
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    small = ("--weights", "demo", "--size", "32", "--json")
    done = run("translate", "-m", manifest, "-o", folder, *small, *options)
    return lines(done.stdout)


@pytest.fixture
def pair(tmp_path):
    """A record of two of the demo's pictures, copied."""
    paths = {role: str(shutil.copy(DEMO / name, tmp_path)) for role, name in FILES.items()}
    return {"id": "a", **paths}


def test_what_was_told_of_an_output_does_not_go_on_beside_another_one(pair, tmp_path):
    (first,) = translated([pair], tmp_path / "one", "--report", str(tmp_path / "one.html"))
    assert Path(first["warp"]).is_file() and Path(first["condition_image"]).is_file()
    (again,) = translated([first], tmp_path / "one")
    assert again["status"] == "skipped" and again["warp"] == first["warp"]
    (second,) = translated([{**first, "scores": {"l1": 0.5}}], tmp_path / "two")
    assert second["status"] == "ok" and not {"warp", "condition_image", "scores"} & second.keys()


def test_a_label_map_that_a_record_names_is_not_written_over(pair, tmp_path):
    labels = tmp_path / "out" / "a.png"
    labels.parent.mkdir()
    labels.write_bytes(b"a label map")
    (record,) = translated([{**pair, "labels": str(labels)}], labels.parent)
    assert record["status"] == "error" and "would replace" in record["error"]
    assert labels.read_bytes() == b"a label map"


def test_a_record_that_failed_can_be_tried_again_from_wherever_it_was_stored(pair, tmp_path, monkeypatch):
    relative = {**pair, "condition": "hopper.jpg", "exemplar": "missing.jpg"}
    monkeypatch.chdir(tmp_path)
    done = run("translate", "-m", "-", "--weights", "demo", "-o", "out", "--json", stdin=json.dumps(relative))
    (record,) = lines(done.stdout)
    assert record["status"] == "error"
    assert record["exemplar"] == str(tmp_path / "missing.jpg") and record["condition"] == pair["condition"]


def test_a_manifest_from_windows_and_one_with_any_bytes_in_its_names_are_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "first", "condition": "a.png"}\r\n{"id": "\xff", "condition": "b.png"}\r\n')
    assert [record.status for record in read_manifest(path)] == ["ok", "ok"]


@pytest.mark.parametrize("text", ["007", "1e3", "2026-11-27", "1:30", "0x10", " a b "])
def test_a_name_that_looks_like_a_number_stays_as_it_was_typed(text):
    assert load_config("tiny-cpu", [f"data.landmarks={text}"]).data.landmarks == text.strip()


def test_values_of_the_command_line_are_what_their_fields_are():
    typed = [
        "train.images=0x10",
        "train.lr_g=1e-3",
        "train.compile=true",
        "data.landmarks=",
        "model.encoder.widths=[8, 9, 010]",
    ]
    config = load_config("tiny-cpu", typed)
    assert (config.train.images, config.train.lr_g, config.train.compile) == (16, 1e-3, True)
    assert config.data.landmarks == "" and config.model.encoder.widths == (8, 9, 8)
    with pytest.raises(ConfigError, match="data.landmarks: expected str, found False"):
        load_config("tiny-cpu", ["data.landmarks=no"])
    assert load_config("tiny-cpu", ["data.landmarks='no'"]).data.landmarks == "no"


@pytest.mark.parametrize("name", ["a.png", "A.JPG", "run.npz", "model.safetensors"])
def test_scores_do_not_replace_a_picture_or_a_model(pair, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"precious")
    one = pair["condition"]
    done = run("eval", "--outputs", one, "--targets", one, "--metrics", "l1", "--scores", path)
    assert done.returncode == 2 and "name it so" in done.stderr and path.read_bytes() == b"precious"


def test_a_thin_strip_does_not_take_the_memory_of_its_enlargement(pair, tmp_path):
    Image.new("L", (2000, 8)).save(tmp_path / "strip.png")
    strip = {**pair, "condition": str(tmp_path / "strip.png")}
    for options in (("--raw",), ()):  # looked through for edges, and enlarged to --size
        (record,) = translated([strip], tmp_path / "out", *options)
        assert record["status"] == "error" and "strip.png: 2000x8 px is too thin" in record["error"]


def test_a_key_that_is_given_twice_is_an_error(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  images: 4\ntrain:\n  batch: 2\n")
    with pytest.raises(ConfigError, match="train is given twice"):
        load_config(path)


@pytest.mark.parametrize("device", ["meta", "privateuseone"])
def test_a_device_that_no_network_runs_on_is_refused_in_a_line(device, pair, tmp_path):
    inputs = pair["condition"], pair["exemplar"]
    done = run("translate", *inputs, "-w", "demo", "-o", tmp_path / "x.png", "--device", device)
    assert done.returncode == 5 and "is none of cpu, cuda, mps" in done.stderr and "Traceback" not in done.stderr
