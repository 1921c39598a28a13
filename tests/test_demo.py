"""What ships: the demo's checkpoint, its pictures, and how good they are together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cocosnet
from cocosnet.checkpoint import ASSET_FOLDER, read_metadata
from cocosnet.config import DistortionConfig
from cocosnet.data.conditions import condition_to_tensor
from cocosnet.data.distortion import distort
from cocosnet.data.extractors import get_extractor
from cocosnet.data.images import load_rgb, resize_shorter, to_tensor
from cocosnet.data.records import read_manifest

ROOT = Path(__file__).resolve().parent.parent
PICTURES = sorted((ASSET_FOLDER / "demo").glob("*.jpg"))


@pytest.fixture(scope="module")
def demo():
    """The shipped model, a function that reads a picture as edges and picture, batches of one, and the extractor."""
    model, extractor = cocosnet.load_model("demo", device="cpu"), get_extractor("hed-small")

    def read(path):
        photo = load_rgb(path)
        picture = to_tensor(resize_shorter(photo, model.config.data.size))[None]
        return condition_to_tensor(extractor(photo, model.config.data.size), model.config.data)[None], picture

    return model, read, extractor


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def detail(x):
    return float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())


@pytest.fixture(scope="module")
def restored(demo):
    """Every demo picture found again in a distorted copy of itself.

    PSNR, and sharpness relative to the picture, of the copy, the coarse warp, the finest warp and the output.
    """
    model, read, _ = demo
    errors, sharpness = [], []
    for number, path in enumerate(PICTURES):
        condition, picture = read(path)
        copy = distort(picture, DistortionConfig(tps=0.04), torch.Generator().manual_seed(number))[0]
        with torch.inference_mode():
            out = model(condition, copy)
        coarse = torch.nn.functional.interpolate(out.warps[0], size=picture.shape[-2:], mode="bilinear")
        stages = (copy, coarse, out.warps[-1], out.image)
        errors.append([psnr(x, picture) for x in stages])
        sharpness.append([detail(x) / detail(picture) for x in stages])
    return torch.tensor(errors), torch.tensor(sharpness)


def test_the_checkpoint_is_small_and_says_what_it_is():
    assert (ASSET_FOLDER / "demo.safetensors").stat().st_size < 16 << 20
    assert (ASSET_FOLDER / "hed-small.safetensors").stat().st_size < 1 << 20
    card = read_metadata("demo")
    assert card["license"] and card["trained_on"] and card["held_out"]
    assert cocosnet.load_model("demo").config.data.edges == "hed-small"


def test_the_finest_warp_puts_a_distorted_picture_back_better_than_the_coarse_one(restored):
    copy, coarse, fine, _ = restored[0].mean(0).tolist()
    assert fine > copy + 5 and fine > coarse + 1, restored[0]


def test_full_resolution_matches_bring_the_detail_that_the_coarse_level_lacks(restored):
    """Sharpness is the mean difference of neighbouring pixels, as a share of the true picture's."""
    _, coarse, fine, _ = restored[1].mean(0).tolist()
    assert coarse < 0.6 and 0.7 < fine < 1.4


def test_the_output_is_closer_to_the_truth_than_the_exemplar_and_the_coarse_warp(restored):
    copy, coarse, _, output = restored[0].mean(0).tolist()
    assert output > copy + 5 and output > coarse + 0.5, restored[0]


def test_outputs_have_the_conditions_edges_and_the_exemplars_colours(demo):
    model, read, extractor = demo
    own_edges, other_edges, own_colour, other_colour = [], [], [], []
    for record in read_manifest(ASSET_FOLDER / "demo"):
        condition, photo = read(record.condition)
        exemplar_edges, exemplar = read(record.exemplar)
        with torch.inference_mode():
            output = model(condition, exemplar).image
        edges = extractor(Image.fromarray(((output[0] + 1) * 127.5).byte().permute(1, 2, 0).numpy()))
        found = condition_to_tensor(edges, model.config.data)[None]
        own_edges.append((found - condition).abs().mean())
        other_edges.append((found - exemplar_edges).abs().mean())
        own_colour.append((output.mean((2, 3)) - exemplar.mean((2, 3))).abs().mean())
        other_colour.append((photo.mean((2, 3)) - exemplar.mean((2, 3))).abs().mean())
    assert sum(own_edges) < 0.75 * sum(other_edges)
    assert sum(own_colour) < 0.5 * sum(other_colour)


def test_the_demo_command_makes_every_picture_and_one_page(tmp_path):
    command = [sys.executable, "-m", "cocosctl", "translate", "-m", "demo", "--weights", "demo", "--raw"]
    command += ["-o", str(tmp_path), "--report", str(tmp_path / "index.html"), "--limit", "4"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COCOSCTL_OFFLINE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    records = read_manifest(ASSET_FOLDER / "demo")[:4]
    assert done.stdout.splitlines() == [str(tmp_path / f"{record.id}.png") for record in records]
    page = (tmp_path / "index.html").read_text()
    for record in records:
        assert Image.open(tmp_path / f"{record.id}.png").size == (128, 128)
        assert record.id in page


@pytest.mark.parametrize(("name", "task", "size"), [("facades-small", "mask", 64), ("fashion-small", "pose", 64)])
def test_a_shipped_model_is_small_and_paints_a_condition_in_the_exemplars_colours(name, task, size):
    """Two flat exemplars: the outputs for one condition take their different brightness."""
    assert (ASSET_FOLDER / f"{name}.safetensors").stat().st_size < 16 << 20
    model = cocosnet.load_model(name, device="cpu")
    assert (model.config.data.task, model.config.data.size) == (task, size)
    condition = torch.zeros(2, model.config.data.condition_channels, size, size)
    condition[:, 1], condition[:, 1, 16:32, 16:32], condition[:, 2, 16:32, 16:32] = 1, 0, 1
    exemplars = torch.stack([torch.full((3, size, size), value) for value in (-0.6, 0.6)])
    with torch.no_grad():
        dark, light = model(condition, exemplars).image.mean((1, 2, 3))
    assert light - dark > 0.2
