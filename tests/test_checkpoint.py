"""Released checkpoints: what is written is what is read, and what does not fit is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cocosnet
from cocosctl.app import run
from cocosnet.checkpoint import CONFIG_KEY, find_checkpoint, read_metadata, save_model
from cocosnet.config import load_config
from cocosnet.errors import CheckpointError, MissingDependency, MissingWeights
from cocosnet.model.cocosnet import CoCosNet


@pytest.fixture
def saved(tmp_path):
    """A tiny random model and the file it was saved to."""
    torch.manual_seed(0)
    model = (
        CoCosNet(load_config("tiny-cpu")).eval().to(memory_format=torch.channels_last)
    )  # the layout that loading gives
    save_model(tmp_path / "model.safetensors", model, {"note": "random"})
    return model, tmp_path / "model.safetensors"


def test_a_saved_model_translates_exactly_as_before(saved):
    model, path = saved
    condition, exemplar = torch.rand(1, 1, 40, 33), torch.rand(1, 3, 32, 32) * 2 - 1
    loaded = cocosnet.load_model(path, device="cpu")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(condition, exemplar).image, model(condition, exemplar).image)
    assert read_metadata(path)["note"] == "random"


def test_compact_files_are_half_as_large_and_nearly_equal(saved, tmp_path):
    model, path = saved
    save_model(tmp_path / "compact.safetensors", model, compact=True)
    assert (tmp_path / "compact.safetensors").stat().st_size < 0.75 * path.stat().st_size
    assert isinstance(cocosnet.load_model(tmp_path / "compact.safetensors", device="cpu"), CoCosNet)


def test_the_same_model_is_the_same_file_byte_for_byte(saved, tmp_path):
    texts = {"note": 'é\n\x01\x7f"\\/', **{letter: letter for letter in "dcba"}}
    for index in range(5):
        save_model(tmp_path / f"{index}.safetensors", saved[0], texts)
    assert len({(tmp_path / f"{index}.safetensors").read_bytes() for index in range(5)}) == 1
    assert read_metadata(tmp_path / "0.safetensors").items() >= texts.items()
    assert load_file(tmp_path / "0.safetensors").keys() == load_file(saved[1]).keys()


def test_a_run_folder_stands_for_its_model(saved):
    assert cocosnet.load_model(saved[1].parent, device="cpu").config == saved[0].config


def damage(kind, path):
    """Spoil a checkpoint in one of the ways that happen."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    with torch.no_grad():
        metadata = {CONFIG_KEY: read_metadata(path)[CONFIG_KEY]}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        torch.save({"a": torch.zeros(1)}, path)
    elif kind == "no config":
        save_file(tensors, path)
    elif kind == "broken config":
        save_file(tensors, path, metadata={CONFIG_KEY: '{"model": {"encoder": {"stem_widht": 4}}}'})
    elif kind == "missing tensor":
        save_file({key: value for key, value in tensors.items() if key != name}, path, metadata=metadata)
    elif kind == "wrong shape":
        save_file({**tensors, name: torch.zeros(3)}, path, metadata=metadata)
    elif kind == "extra tensor":
        save_file({**tensors, "stranger": torch.zeros(3)}, path, metadata=metadata)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "not a readable"),
        ("empty", "not a readable"),
        ("pickle", "not a readable"),
        ("no config", "holds no config"),
        ("broken config", "stem_width"),
        ("missing tensor", "missing"),
        ("wrong shape", "expected"),
        ("extra tensor", "unexpected stranger"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_of_one_line(saved, kind, words):
    damage(kind, saved[1])
    with pytest.raises(CheckpointError, match=words) as caught:
        cocosnet.load_model(saved[1], device="cpu")
    assert str(saved[1]) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_weights_and_devices_name_the_remedy(saved, tmp_path):
    with pytest.raises(MissingWeights, match="nowhere.*run folder"):
        cocosnet.load_model(tmp_path / "nowhere.safetensors")
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependency, match="--device cpu"):
            cocosnet.load_model(saved[1], device="cuda")


@pytest.fixture
def named(saved, tmp_path, monkeypatch):
    """`official`, imported into the second search folder; the working folder is an empty one."""
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "torch" / "hub" / "checkpoints" / "cocosctl" / "official.safetensors"
    path.parent.mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return saved[1].rename(path)


def test_an_imported_name_is_found_in_every_search_folder_and_named_where_names_are(named, capsys):
    assert find_checkpoint("official") == named
    Path("official").mkdir()  # some folder, which holds no model
    assert find_checkpoint("official") == named
    with pytest.raises(MissingWeights, match="imported model: demo, .*, official"):
        find_checkpoint("oficial")
    with pytest.raises(MissingWeights, match="no such checkpoint"):
        find_checkpoint("long" * 100)
    assert run(["weights", "list", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["official"]["path"] == str(named) and rows["official"]["used_by"] == "--weights official"


@pytest.mark.parametrize("name", ["official", "demo"])
def test_a_name_that_is_also_a_path_asks_which(named, name):
    Path(name).mkdir()
    (Path(name) / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match=f"write ./{name} for"):
        find_checkpoint(name)
    with pytest.raises(MissingWeights, match=f"{name}: this run has no checkpoint yet"):
        find_checkpoint(f"./{name}")
    with pytest.raises(MissingWeights, match=f"give the folder {name} for what it has, or wait for the first valid"):
        find_checkpoint(f"{name}/best.safetensors")
    shutil.copy(named, Path(name) / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"write ./{name} for"):
        find_checkpoint(name)
    assert find_checkpoint(f"./{name}") == find_checkpoint(Path(name)) == Path(name, "model.safetensors")


def test_the_config_inside_is_the_whole_tree(saved):
    assert dataclasses.asdict(cocosnet.load_model(saved[1], device="cpu").config) == dataclasses.asdict(
        load_config("tiny-cpu")
    )
