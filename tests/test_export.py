"""Exported files against the model: run where this package is not, at fixed sizes and at open ones."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import clean_environment, lines, run
from torch import Tensor, nn

from cocosnet.checkpoint import load_model, save_model
from cocosnet.config import config_from_dict
from cocosnet.errors import CocosError, ConfigError, DataError
from cocosnet.export import _save_onnx, compare, example_inputs, export_model, format_of, open_sizes, read_exported
from cocosnet.model.build import build_model

MODEL = {
    "encoder": {"levels": 3, "stem_width": 8, "widths": [8, 8, 8], "spade_hidden": 8},
    "matching": {"channels": 8, "candidates": 4, "iterations": 1, "hidden": 8},
    "translator": {"widths": [8, 8, 8], "blocks": [1, 1, 1], "spade_hidden": 8, "code_size": 8},
    "discriminator": {"width": 8, "layers": 3, "scales": 2},
}
# Run with neither this package nor, for ONNX, PyTorch: FILE IN.npz OUT.npz
RUN_ONNX = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
numpy.savez(sys.argv[3], **dict(zip(names, session.run(names, dict(numpy.load(sys.argv[2]))))))
assert not {"cocosnet", "torch"} & set(sys.modules)
"""
RUN_PROGRAM = """
import sys, numpy, torch
run = torch.export.load(sys.argv[1]).module()
results = run(**{name: torch.from_numpy(value) for name, value in numpy.load(sys.argv[2]).items()})
numpy.savez(sys.argv[3], **{name: value.numpy() for name, value in results.items()})
assert "cocosnet" not in sys.modules
"""


def checkpoint(folder: Path, **model: object) -> Path:
    """A small model of the given sections, with fixed random weights, as a checkpoint."""
    tree = {"data": {"size": 32, "edges": "image"}, "model": {**MODEL, **model}}
    torch.manual_seed(0)
    path = folder / "model.safetensors"
    save_model(path, build_model(config_from_dict(tree)))
    return path


def run_elsewhere(script: str, path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a file in a process of its own, in a folder from which this package cannot be imported."""
    given, taken = path.with_suffix(".in.npz"), path.with_suffix(".out.npz")
    np.savez(given, **{name: value.numpy() for name, value in inputs.items()})
    subprocess.run([sys.executable, "-c", script, path, given, taken], check=True, cwd=path.parent, timeout=240)
    return {name: torch.from_numpy(value) for name, value in np.load(taken).items()}


@torch.inference_mode()
def original(weights: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself says."""
    out = load_model(weights, "cpu")(**inputs)
    return {"image": out.image} | {f"warp_{level}": warp for level, warp in enumerate(out.warps, 1)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 0.97) -> None:
    """Matches are discrete, so rounding may change a few pixels; all others agree to 1e-3."""
    assert list(found) == list(wanted)
    for name, agreement in compare(found, wanted).items():
        assert found[name].shape == wanted[name].shape
        assert agreement["within"] >= share and agreement["mean_error"] < 2e-3, (name, agreement)


def test_onnx_gives_the_models_pictures_in_onnxruntime(tmp_path):
    """At a fixed size that needs padding, the exemplar of another size."""
    weights, path = checkpoint(tmp_path), tmp_path / "model.onnx"
    done = export_model(weights, path, (30, 36), (40, 24))
    inputs = example_inputs(load_model(weights, "cpu").config, (30, 36), (40, 24))
    assert_same(run_elsewhere(RUN_ONNX, path, inputs), original(weights, inputs))
    assert done.outputs == {
        "image": [1, 3, 30, 36],
        "warp_1": [1, 3, 8, 9],
        "warp_2": [1, 3, 15, 18],
        "warp_3": [1, 3, 30, 36],
    }
    said = read_exported(path)
    assert said["sizes"] == {"height": 30, "width": 36, "exemplar_height": 40, "exemplar_width": 24}
    assert said["inputs"] == {"condition": [1, 1, 30, 36], "exemplar": [1, 3, 40, 24]}
    assert said["ranges"]["exemplar"] == [-1, 1] and said["config"]["model"]["kind"] == "cocosnet-v2"
    assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()  # no paths of this machine


def test_one_program_takes_every_size(tmp_path):
    """Its limits hold, sizes in between too, and it refuses what it cannot take."""
    weights, path = checkpoint(tmp_path), tmp_path / "model.pt2"
    done, model = export_model(weights, path, dynamic=True), load_model(weights, "cpu")
    limits = open_sizes(model)
    assert done.sizes["exemplar_width"] == dataclasses.asdict(limits)
    assert done.outputs["warp_1"] == [1, 3, "height/4", "width/4"]
    low = limits.smallest
    for size, exemplar_size in (((low, low), (low, low)), ((64, 20), (36, 100))):
        inputs = example_inputs(model.config, size, exemplar_size)
        assert_same(run_elsewhere(RUN_PROGRAM, path, inputs), original(weights, inputs))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.export.load(path).module()(**example_inputs(model.config, (limits.multiple + low + 1, low), (low, low)))
    assert read_exported(path)["sizes"] == done.sizes


def test_capitals_are_a_suffix_where_the_format_has_no_objection():
    pytest.importorskip("onnx")
    assert format_of("a.ONNX") == format_of("a.onnx")
    with pytest.raises(ConfigError, match="small letters"):
        format_of("a.PT2")


@pytest.mark.parametrize("kind, name, script", [("cocosnet", "a.pt2", RUN_PROGRAM), ("spade", "a.onnx", RUN_ONNX)])
def test_baselines_are_exported_alike(tmp_path, kind, name, script):
    if name.endswith(".onnx") and torch.__version__.startswith("2.6."):
        pytest.skip("PyTorch 2.6 writes ONNX of fixed sizes only")
    weights = checkpoint(tmp_path, kind=kind)
    export_model(weights, tmp_path / name, dynamic=True)
    inputs = example_inputs(load_model(weights, "cpu").config, (40, 64), (32, 36))
    assert_same(run_elsewhere(script, tmp_path / name, inputs), original(weights, inputs), share=1)


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_a_graph_that_pytorch_cannot_write_as_onnx_is_refused_with_what_would_do(tmp_path):
    pytest.importorskip("onnx")
    traced = torch.export.export(Eigenvalues(), (torch.eye(3),))
    with pytest.raises(CocosError, match=r"cannot write this graph as ONNX: .*fixed sizes.*\.pt2"):
        _save_onnx(traced, tmp_path / "a.onnx", {}, ["x"])
    assert not list(tmp_path.iterdir())


def test_the_releases_networks_are_exported_in_compatibility_mode(tmp_path):
    encoder = {"stem_width": 4, "widths": [4, 4, 4, 4], "spade_hidden": 4, "exemplar_condition": True}
    matching = {"compat": "release", "channels": 8, "candidates": 16, "iterations": 1, "hidden": 8}
    translator = {"widths": [8] * 6, "spade_hidden": 4, "use_condition": True}
    sections = {"encoder": encoder, "matching": matching, "translator": translator, "discriminator": {"scales": 0}}
    weights, path = checkpoint(tmp_path, **sections), tmp_path / "model.pt2"
    done = export_model(weights, path, (64, 20), (40, 96))
    assert done.inputs["exemplar_condition"] == [1, 1, 40, 96]
    inputs = example_inputs(load_model(weights, "cpu").config, (64, 20), (40, 96))
    assert_same(run_elsewhere(RUN_PROGRAM, path, inputs), original(weights, inputs))


def test_the_command_says_what_it_wrote(tmp_path):
    weights, path = checkpoint(tmp_path, kind="spade"), tmp_path / "a" / "model.pt2"
    done = run("export", "--weights", weights, "-o", path, "--size", "24x32", "--json")
    assert done.returncode == 0, done.stderr
    (record,) = lines(done.stdout)
    assert record["path"] == str(path) and record["format"] == "torch.export" and record["opset"] is None
    assert record["bytes"] == path.stat().st_size and record["inputs"]["exemplar"] == [1, 3, 24, 32]
    assert record["check"]["image"]["within"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["-o", "model.txt"], 3, ".pt2 or .onnx"),
        (["-o", "model.pt2", "--size", "0x5"], 3, "a side of 0 px"),
        (["-o", "model.pt2", "--size", "wide"], 2, "'wide'"),
        (["-o", "model.pt2", "--size", "30", "--dynamic"], 3, "a multiple of 4 px"),
        (["-o", "file/model.pt2"], 3, "cannot write"),
        (["-o", "model.pt2", "--weights", "absent.safetensors"], 5, "absent.safetensors"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, arguments, code, said):
    weights = checkpoint(tmp_path, kind="spade")
    (tmp_path / "file").write_text("")
    (tmp_path / "model.pt2").write_text("what was there")
    arguments = [tmp_path / text if text.startswith(("model", "file")) else text for text in arguments]
    done = run("export", "--weights", weights, *arguments)
    assert done.returncode == code and said in done.stderr.splitlines()[-1], done.stderr
    assert done.stdout == "" and (tmp_path / "model.pt2").read_text() == "what was there"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, suffix):
    """As a limit on what the process may write to a file, which fails alike."""
    path, tight = tmp_path / "o" / f"model.{suffix}", "resource.setrlimit(resource.RLIMIT_FSIZE, (9000,) * 2)"
    arguments = ["export", "--weights", str(checkpoint(tmp_path, kind="spade")), "-o", str(path)]
    code = f"import resource, sys\n{tight}\nfrom cocosctl.app import run\nsys.exit(run({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 3 and f"error: {path}: cannot write: File too large" in done.stderr.splitlines()[-1]
    assert not list(path.parent.iterdir())


def test_a_missing_package_is_named_with_its_remedy(tmp_path):
    """A stand-in that does not import shadows onnxruntime."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here', name='onnxruntime')")
    weights = checkpoint(tmp_path, kind="spade")
    done = run("export", "--weights", weights, "-o", tmp_path / "model.onnx", PYTHONPATH=str(tmp_path))
    assert done.returncode == 5
    assert "onnxruntime" in done.stderr and "pip install 'cocosctl[onnx]'" in done.stderr


def test_a_foreign_file_is_no_export(tmp_path):
    """By its suffix, by its content, and, of both formats, a file that another program wrote."""
    (tmp_path / "model.gif").write_bytes(b"GIF89a")
    with pytest.raises(ConfigError):
        read_exported(tmp_path / "model.gif")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "other",
        *([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])] for name in "xy"),
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    for suffix in ("pt2", "onnx"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"GIF89a")
        for name in ("other", "broken", "absent"):
            with pytest.raises(DataError, match=f"{name}.{suffix}: not a file of cocosctl export"):
                read_exported(tmp_path / f"{name}.{suffix}")
