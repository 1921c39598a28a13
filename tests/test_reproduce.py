"""`cocosctl reproduce`: a whole table at small size, baselines included; all tables' rows as configs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_tools import accept, write_random_inception, write_random_vgg
from PIL import Image
from train_tools import prepared_folder

from cocosctl.app import run
from cocosnet.config import load_config
from cocosnet.data.records import read_manifest
from cocosnet.data.sources import load_recipe
from cocosnet.model.build import build_model
from cocosnet.reproduce import table_cells, table_names

# The tiny-cpu preset's shapes, on top of the table's own rows.
SMALL = (
    "data.task=edge", "data.size=40", "data.edges=image", "model.encoder.levels=3", "model.encoder.stem_width=8",
    "model.encoder.widths=[8, 8, 8]", "model.encoder.spade_hidden=8", "model.matching.channels=8",
    "model.matching.candidates=4", "model.matching.iterations=2", "model.matching.hidden=8",
    "model.translator.widths=[8, 8, 8]", "model.translator.blocks=[1, 1, 1]", "model.translator.spade_hidden=8",
    "model.translator.code_size=8", "model.discriminator.width=8", "model.discriminator.layers=3",
    "loss.perceptual=none", "train.images=4", "train.batch=2", "train.precision=fp32", "train.workers=0",
    "train.save_images=4", "train.sample_images=4", "train.log_images=2",
)  # fmt: skip
PRESETS = {"deepfashion": "deepfashion-512", "metfaces": "metfaces-512"} | {
    name: name for name in ("ade20k", "ade20k-outdoor")
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    prepared_folder(folder / "deepfashion")
    return folder


def learned(stats):
    """The lines of a run that tell of steps."""
    return [line for line in stats.read_text().splitlines() if "note" not in line]


def reproduce(table, data, output, *more):
    changes = [word for change in SMALL for word in ("--set", change)]
    return run(["reproduce", table, "--data", str(data), "-o", str(output), "--device", "cpu", *changes, *more])


def test_a_table_is_trained_translated_and_measured_and_not_made_twice(data, tmp_path, capsys):
    options = ("--datasets", "deepfashion", "--metrics", "swd,psnr")
    assert reproduce("table1", data, tmp_path, *options, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["title"] for row in table["rows"]] == ["SPADE", "CoCosNet", "CoCosNet v2"]
    assert [row["paper"] for row in table["rows"]] == [{"swd": 38.0}, {"swd": 29.0}, {"swd": 24.6}]
    for row in table["rows"]:
        assert row["result"]["count"] == 2 and row["result"]["metrics"]["swd"]["value"] > 0
        assert (tmp_path / "deepfashion" / row["row"] / "model.safetensors").is_file()
    values = [row["result"]["metrics"]["psnr"]["value"] for row in table["rows"]]
    assert len(set(values)) == 3
    assert json.loads((tmp_path / "table1.json").read_text()) == table
    assert re.search(r"\| deepfashion \| SPADE \| \S+ \(38\) \| \S+ \| 2 \|", (tmp_path / "table1.md").read_text())
    before = learned(tmp_path / "deepfashion/full/stats.jsonl")
    assert reproduce("table1", data, tmp_path, *options, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["result"]["metrics"]["psnr"]["value"] for row in again["rows"]] == values
    assert learned(tmp_path / "deepfashion/full/stats.jsonl") == before


@pytest.fixture
def random_weights(tmp_path_factory, monkeypatch):
    """Inception and VGG-16 of random weights in the right files."""
    folder = tmp_path_factory.mktemp("weights")
    accept(monkeypatch, "fid-inception", write_random_inception(folder))
    accept(monkeypatch, "vgg16-caffe", write_random_vgg(folder))


@pytest.fixture(scope="module")
def label_data(tmp_path_factory):
    """As `data`, with label maps: 1 is the ground, 2 the outline."""
    folder = tmp_path_factory.mktemp("labels")
    for path in (prepared_folder(folder / "ade20k") / "conditions").glob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 128).astype(np.uint8) + 1).save(path)
    return folder


def test_tables_1_to_3_measure_the_same_models_by_their_own_metrics(label_data, random_weights, tmp_path, capsys):
    """Label maps, so that the metrics by region are measured as well; the models are trained for the first one only."""
    changes = ("--datasets", "ade20k", "--set", "data.task=mask", "--set", "data.classes=3")
    expected = {
        "table1": {"fid", "swd"},
        "table2": {"semantic", "semantic_region"},
        "table3": {"style_color", "style_texture", "style_color_region", "style_texture_region"},
    }
    trained = None
    for table, names in expected.items():
        assert reproduce(table, label_data, tmp_path, *changes) == 0
        assert f"# {table}: " in capsys.readouterr().out
        rows = json.loads((tmp_path / f"{table}.json").read_text())["rows"]
        assert [row["row"] for row in rows] == ["spade", "cocosnet", "full"]
        for name in names:
            values = [row["result"]["metrics"][name]["value"] for row in rows]
            assert len(set(values)) == 3 and None not in values, name
        assert all(set(row["result"]["metrics"]) == names and row["result"]["count"] == 2 for row in rows)
        runs = {row["row"]: learned(tmp_path / "ade20k" / row["row"] / "stats.jsonl") for row in rows}
        assert trained in (None, runs)
        trained = runs
    assert "| ade20k | CoCosNet v2 |" in (tmp_path / "table3.md").read_text()


@pytest.mark.parametrize("table", ["table4", "table5"])
def test_the_ablations_measure_warps(data, tmp_path, capsys, table):
    """Three levels here, so Table 4's third row is the full model's shape."""
    assert reproduce(table, data, tmp_path) == 0
    assert f"# {table}: " in capsys.readouterr().out
    rows = json.loads((tmp_path / f"{table}.json").read_text())["rows"]
    assert len(rows) == 4 and rows[-1]["paper"]["warp_l1"] == {"table4": 77.84, "table5": 81.97}[table]
    found = [row["result"]["metrics"] for row in rows]
    assert all(0 < row["warp_l1"]["value"] < 1 and -1 < row["warp_ssim"]["value"] < 1 for row in found)
    assert len({row["warp_psnr"]["value"] for row in found[:3]}) == 3


def test_every_row_of_every_table_is_a_config_of_its_own(tmp_path):
    """At full size, on every dataset; a run's folder stands for one config in all tables."""
    names = set(PRESETS)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.jsonl").write_text("")
    assert table_names() == [f"table{number}" for number in range(1, 6)]
    configs = {}
    for table in table_names():
        cells = table_cells(table, tmp_path, tmp_path)
        assert {cell.dataset for cell in cells} <= names
        for cell in cells:
            assert set(cell.paper) <= set(cell.metrics)
            assert configs.setdefault(cell.run, cell.config) == cell.config  # a run is one model, whatever the table
    assert len(configs) == 4 * 3 + 3 + 3
    assert len({repr(config) for config in configs.values()}) == len(configs)
    for dataset, preset in PRESETS.items():
        assert configs[tmp_path / dataset / "full"] == load_config(preset)


@pytest.mark.parametrize("row", ["spade", "cocosnet"])
def test_a_compared_system_is_its_preset(data, tmp_path, row):
    """The same networks and training; what the matcher's levels beyond the first are told is no part of them."""
    cells = table_cells("table1", data, tmp_path, datasets=["deepfashion"])
    found = next(cell.config for cell in cells if cell.row == row)
    preset = load_config(f"deepfashion-512-{row}")
    assert shapes(found) == shapes(preset)
    for section in ("data", "loss", "distortion", "train"):
        assert getattr(found, section) == getattr(preset, section), section


def shapes(config):
    """Name and shape of every tensor of a config's model."""
    with torch.device("meta"):
        return {name: value.shape for name, value in build_model(config).state_dict().items()}


def test_held_out_pairs_that_fail_are_counted_and_the_scores_are_a_manifest(data, tmp_path, monkeypatch, capsys):
    """With an output folder that is relative to the working folder."""
    folder = tmp_path / "data" / "deepfashion"
    shutil.copytree(data / "deepfashion", folder)
    lost = next(record for record in read_manifest(folder) if record.extra.get("split") == "val")
    Path(lost.condition).write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    options = ("--datasets", "deepfashion", "--metrics", "psnr")
    assert reproduce("table1", tmp_path / "data", Path("out"), *options, "--set", "train.images=2") == 4
    told = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(told) == 3 and "deepfashion/full: 1 of 2 held-out pairs failed" in told[-1] and lost.id in told[-1]
    rows = read_manifest(tmp_path / "out/deepfashion/full/scores.jsonl")
    assert [row.failed for row in rows].count(True) == 1
    assert all(Path(row.output).is_file() and row.extra["scores"]["psnr"] > 0 for row in rows if not row.failed)


def test_the_training_of_a_row_is_a_command(data, tmp_path, capsys):
    assert reproduce("table5", data, tmp_path / "none", "--dry-run") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 4 and commands[0].startswith("cocosctl train deepfashion-512 --data ")
    assert "--set model.matching.refinement=none" in commands[0] and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [
        ("deepfashion-hd", "deepfashion-512"), ("metfaces-512", "metfaces-512"), ("metfaces-1024", "metfaces-1024"),
        ("ade20k", "ade20k"), ("ade20k-outdoor", "ade20k-outdoor"), ("facades", "facades"),
    ],
)  # fmt: skip
def test_what_a_recipe_makes_its_preset_can_learn_from(recipe, preset):
    """The sizes, tasks, classes and extractors that the two files name."""
    made, learned_from = load_recipe(recipe).data, load_config(preset).data
    assert (made.task, made.condition_channels) == (learned_from.task, learned_from.condition_channels)
    assert made.size >= learned_from.size and learned_from.edges in ("auto", made.edges)


def test_a_folder_that_does_not_fit_a_row_is_named_before_the_first_is_trained(data, label_data, tmp_path, capsys):
    for name, folder in (("deepfashion", data), ("ade20k", label_data)):
        shutil.copytree(folder / name, tmp_path / "data" / name)
    summary = {"task": "mask", "size": 40, "classes": 151}
    (tmp_path / "data/ade20k/dataset.json").write_text(json.dumps(summary))
    options = ("--datasets", "deepfashion,ade20k", "--metrics", "psnr")
    assert reproduce("table1", tmp_path / "data", tmp_path / "out", *options) == 3
    error = capsys.readouterr().err
    assert "ade20k: prepared for task mask, the config says edge" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named_before_work_starts(data, tmp_path, capsys):
    for arguments, code, said in (
        (("table9", data, tmp_path), 3, "the tables are table1"),
        (("table1", data, tmp_path), 3, "metfaces"),
        (("table1", data, tmp_path, "--datasets", "cats"), 3, "no dataset 'cats'"),
        (("table1", data, tmp_path, "--datasets", "deepfashion", "--metrics", "swd,nope"), 3, "no metric is called"),
    ):
        assert reproduce(*arguments) == code
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
