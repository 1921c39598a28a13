"""docs/library.md, run as a reader would run it, and the slips that a reader makes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cocosnet
from cocosnet.data.conditions import condition_to_tensor
from cocosnet.data.images import to_image
from cocosnet.data.records import Record, read_manifest, write_manifest
from cocosnet.errors import ConfigError, DataError, MissingDependency
from cocosnet.inference import Translator
from cocosnet.metrics import evaluate, get_metric
from cocosnet.model.matches import Matches
from cocosnet.viz.panels import warp_panel
from cocosnet.weights import ASSET_FOLDER

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capfd):
    """All of its code, in order, with nothing printed; each file that it names is there afterwards."""
    pictures = sorted((ASSET_FOLDER / "demo").glob("*.jpg"))
    shutil.copy(pictures[0], tmp_path / "photo.jpg")
    shutil.copy(pictures[1], tmp_path / "painting.jpg")
    shutil.copytree(ASSET_FOLDER / "demo", tmp_path / "photos", ignore=shutil.ignore_patterns("*.jsonl", "*.md"))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert capfd.readouterr() == ("", "")
    assert Image.open("out.png").size == names["photo"].size and Image.open("levels.png").width > 500
    height, width = names["out"].warps[-1].shape[-2:]
    assert 0 <= names["y"] < height and 0 <= names["x"] < width and -1 <= names["cosine"] <= 1
    assert names["done"].status == "ok" and Path(names["done"].output).is_file() and Path("first-levels.png").is_file()
    assert names["scores"] == [names["value"]] and 0 < names["value"] < 1
    assert all(entry["value"] is not None for entry in names["result"]["metrics"].values())
    assert [tick["images"] for tick in names["ticks"]] == [2, 4, 6]
    assert names["trained"].config.data.size == 32


DEMO = ASSET_FOLDER / "demo"


def test_paths_and_texts_are_the_same_to_everything_that_takes_a_file(tmp_path):
    files = {"condition": DEMO / "hopper.jpg", "exemplar": DEMO / "tanguy.jpg"}
    done = Translator("demo", device="cpu", size=32).translate(Record(id="a", **files), str(tmp_path / "a.png"))
    assert done.status == "ok" and done.condition == str(files["condition"])
    record = Record(id="a", output=tmp_path / "a.png", target=tmp_path / "a.png", extra={"warp": tmp_path / "a.png"})
    assert evaluate([record], ["l1", "warp_l1"], device="auto")["metrics"]["warp_l1"]["value"] == 0
    write_manifest(tmp_path / "m.jsonl", [record])
    (read,) = read_manifest(tmp_path / "m.jsonl")
    assert read.output == read.extra["warp"] == str(tmp_path / "a.png")


def test_one_picture_of_a_batch_is_drawn_with_its_own_matches():
    model = cocosnet.load_model("demo", device="cpu")
    noise = torch.Generator().manual_seed(0)
    condition, exemplar = torch.rand(2, 1, 32, 32, generator=noise), torch.rand(2, 3, 32, 32, generator=noise) * 2 - 1
    both, alone = model(condition, exemplar), model(condition[1:], exemplar[1:])
    warps = [warp[1] for warp in both.warps]
    with pytest.raises(ValueError, match="matches are of several pictures"):
        warp_panel(condition[1], exemplar[1], both.image[1], warps, both.matches)
    drawn = warp_panel(condition[1], exemplar[1], both.image[1], warps, [level[1] for level in both.matches])
    own = warp_panel(condition[1], exemplar[1], alone.image[0], [warp[0] for warp in alone.warps], alone.matches)
    assert np.mean(np.array(drawn) != np.array(own)) < 0.01


@pytest.mark.parametrize("name", ["l1", "ssim", "warp_ssim", "swd"])
def test_a_metric_takes_as_many_of_one_role_as_of_the_other(name):
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    metric = get_metric(name, device="auto")
    with pytest.raises(DataError, match="as many of every role, not 2 of .*, 1 of "):
        metric.update(pictures, pictures[:1])
    assert metric.count == 0


def test_sets_may_be_of_different_sizes(shared, monkeypatch):
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(shared / "weights"))
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    at_once, apart = get_metric("fd_vgg16"), get_metric("fd_vgg16")
    at_once.update(pictures, pictures[:2])
    apart.update(pictures[:2], pictures[:1])
    apart.update(pictures[2:], pictures[1:2])
    assert at_once.compute()["value"] == pytest.approx(apart.compute()["value"], rel=1e-6)


def test_slips_are_named_where_they_are_made():
    for batch in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match="a picture is 3,H,W"):
            to_image(batch)
    masks = cocosnet.load_model("facades-small", device="cpu").config.data
    with pytest.raises(ValueError, match="one class index a pixel"):
        condition_to_tensor(Image.new("RGB", (8, 8)), masks)
    for overrides in ("data.size=64", {"data.size": 64}):
        with pytest.raises(ConfigError, match="must be a list of section.key=value texts"):
            cocosnet.load_config("demo", overrides)
    with pytest.raises(ConfigError, match="at least 1 px, is 0"):
        Translator("demo", device="cpu", size=0)
    with pytest.raises(TypeError):
        Matches(torch.zeros(2, 4, 2, 8, 8), torch.zeros(2, 4, 8, 8))[0:1]
    with pytest.raises(MissingDependency, match="'gpu9' cannot be used here"):
        evaluate([], ["l1"], device="gpu9")
