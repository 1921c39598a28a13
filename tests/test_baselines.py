"""The paper's compared systems: the same trainer, checkpoints and commands as the paper's own method."""

from __future__ import annotations

import pytest
import torch
from cli_tools import lines, run
from PIL import Image
from train_tools import prepared_folder, tiny

from cocosnet.checkpoint import load_model
from cocosnet.config import load_config
from cocosnet.data.dataset import PairDataset
from cocosnet.errors import ConfigError
from cocosnet.losses.perceptual import Vgg, VggShape
from cocosnet.losses.total import loss_weights, total_loss
from cocosnet.model.build import build_model
from cocosnet.model.cocosnet import CoCosNet
from cocosnet.train.batches import StepBatches
from cocosnet.train.networks import build_networks
from cocosnet.train.steps import generator_losses
from cocosnet.train.trainer import Trainer

KINDS = ("cocosnet", "spade")
SMALL_VGG = VggShape(counts=(2, 2, 2, 2, 2), widths=(8,) * 5, scale=(1.0,) * 3, shift=(0.0,) * 3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, other", [((32, 32), (32, 32)), ((33, 47), (29, 18)), ((97, 13), (8, 64))])
def test_any_sizes_go_in_and_the_conditions_size_comes_out(kind, size, other):
    model = build_model(tiny(f"model.kind={kind}")).eval()
    condition, exemplar = torch.rand(2, 1, *size), torch.rand(2, 3, *other) * 2 - 1
    out = model(condition, exemplar)
    assert out.image.shape == (2, 3, *size) and out.image.abs().max() <= 1
    assert torch.equal(out.image, model(condition, exemplar).image)
    assert (out.image - model(condition, exemplar.flip(2)).image).abs().max() > 1e-4  # the exemplar's look matters
    assert (out.image - model(1 - condition, exemplar).image).abs().max() > 1e-4  # and so does the condition


def test_cocosnet_warps_one_level_by_exact_attention_over_all_positions():
    """The warp against softmax(f^x f^y / tau) y written out with the whole matrix."""
    model = build_model(tiny("model.kind=cocosnet", "model.encoder.levels=2")).eval()
    condition, exemplar = torch.rand(1, 1, 32, 48), torch.rand(1, 3, 48, 32) * 2 - 1
    out = model(condition, exemplar)
    assert [warp.shape for warp in out.warps] == [(1, 3, 16, 24)]
    project = model.hierarchy.projections[0]
    x, y = (project(f)[0].flatten(1) for f in (out.features_x[0], out.features_y[0]))
    small = torch.nn.functional.avg_pool2d(exemplar, 2)[0].flatten(1)
    expected = (small @ torch.softmax(x.T @ y / 0.01, dim=1).T).view(1, 3, 16, 24)
    torch.testing.assert_close(out.warps[0], expected, atol=2e-4, rtol=0)
    assert torch.equal(out.matches[0].positions[0, 0].flatten(1)[0] * 16 + out.matches[0].positions[0, 0].flatten(1)[1],
                       (x.T @ y).argmax(1).float())  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind, prepared):
    config = tiny(f"model.kind={kind}", "train.batch=4", "train.real_exemplars=0.5", "loss.perceptual=vgg16-caffe")
    networks = build_networks(tiny(f"model.kind={kind}"), torch.device("cpu"), torch.float32)
    networks.perceptual = Vgg(SMALL_VGG)
    batches = StepBatches(PairDataset(prepared, config, split="train"), config)
    batch = next(b for b in map(batches.__getitem__, range(9)) if 0 < b.pseudo.sum() < 4)
    parts, _ = generator_losses(networks, batch, config.loss, adversarial_on=True)
    assert set(parts) == {"sem", "feature", "contextual", "adv"} | ({"align", "corr"} if kind == "cocosnet" else set())
    total_loss(parts, loss_weights(config.loss)).backward()
    for name, parameter in networks.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_and_its_checkpoint_translates(kind, prepared, tmp_path):
    Trainer(tiny(f"model.kind={kind}", "train.images=4"), prepared, tmp_path / "run", device="cpu").train()
    Trainer(tiny(f"model.kind={kind}", "train.images=8"), prepared, tmp_path / "run", device="cpu").train()
    assert load_model(tmp_path / "run").config.model.kind == kind
    files = (prepared / "conditions/0.png", prepared / "images/1.png")
    done = run("translate", *files, "-o", tmp_path / "out.png", "-w", tmp_path / "run", "--json",
               "--report", tmp_path / "page.html")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout)[0]["status"] == "ok" and Image.open(tmp_path / "out.png").size == (32, 35)
    drawn = run("warp-visualize", *files, "-o", tmp_path / "warp.png", "-w", tmp_path / "run")
    if kind == "cocosnet":
        assert drawn.returncode == 0 and Image.open(tmp_path / "warp.png").width > 200
    else:
        assert drawn.returncode == 3 and drawn.stderr.count("\n") == 1 and "matches nothing" in drawn.stderr


def test_another_systems_config_makes_no_cocosnet():
    with pytest.raises(ValueError, match="build_model makes its network"):
        CoCosNet(tiny("model.kind=spade"))


def test_the_presets_fit_together():
    for preset in ("demo", "deepfashion-512"):
        own, v1, spade = (load_config(name) for name in (preset, f"{preset}-cocosnet", f"{preset}-spade"))
        assert (v1.model.kind, spade.model.kind) == KINDS
        assert own.train == v1.train == spade.train and own.data == v1.data == spade.data and own.loss == v1.loss
        assert own.model.translator.widths == v1.model.translator.widths == spade.model.translator.widths
        assert v1.data.size // 2 ** (v1.model.encoder.levels - 1) == 64


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="model.kind is 'spad' .did you mean 'spade'"):
        load_config("tiny-cpu", ["model.kind=spad"])
