"""The whole network: sizes, determinism, and the paper's configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cocosnet.config import load_config
from cocosnet.model import patchmatch
from cocosnet.model.cocosnet import CoCosNet
from cocosnet.model.discriminator import Discriminator
from cocosnet.model.layers import Spade, SpadeBlock, fold_spectral_norms, instance_norm
from cocosnet.model.patchmatch import select_engine

TINY = load_config("tiny-cpu")


def build(config=TINY, seed=0):
    """A freshly initialised network of a seed."""
    torch.manual_seed(seed)
    return CoCosNet(config)


@pytest.mark.parametrize(
    "size, other", [((32, 32), (32, 32)), ((33, 47), (29, 18)), ((97, 13), (8, 64)), ((5, 9), (4, 4))]
)
def test_any_sizes_go_in_and_the_conditions_size_comes_out(size, other):
    out = build().eval()(torch.rand(1, 1, *size), torch.rand(1, 3, *other) * 2 - 1)
    assert out.image.shape == (1, 3, *size) and out.image.abs().max() <= 1
    for level, (warp, matches) in enumerate(zip(out.warps, out.matches)):
        factor = 2 ** (2 - level)
        wanted = (-(-size[0] // factor), -(-size[1] // factor))
        assert warp.shape[-2:] == wanted and matches.positions.shape[-2:] == wanted
        assert warp.abs().max() <= 1 + 1e-5
        limits = torch.tensor([-(-side // factor) - 1 for side in other]).view(1, 1, 2, 1, 1)
        assert ((matches.positions >= 0) & (matches.positions <= limits)).all()  # inside the exemplar, not its padding


@pytest.mark.parametrize("size, other", [((32, 32), (32, 32)), ((33, 47), (29, 18)), ((30, 50), (37, 41))])
def test_matches_are_distinct_and_scored_where_they_lie_at_sizes_that_are_padded_too(size, other):
    model = build().eval()
    out = model(torch.rand(1, 1, *size), torch.rand(1, 3, *other) * 2 - 1)
    for x, y, matches in zip(*model.compared(out), out.matches):
        assert torch.isfinite(matches.scores).all()
        rows, columns = matches.positions.round().unbind(2)
        pixels = (rows * 1000 + columns).sort(1).values
        assert (pixels.diff(dim=1) > 0).all()
        torch.testing.assert_close(patchmatch.cosine(x, y, matches.positions), matches.scores, atol=1e-5, rtol=0)


def test_the_same_input_gives_the_same_bytes_whatever_the_global_random_state():
    model = build().eval()
    condition, exemplar = torch.rand(2, 1, 32, 40), torch.rand(2, 3, 32, 40) * 2 - 1
    torch.manual_seed(1)
    first = model(condition, exemplar).image
    torch.manual_seed(2)
    assert torch.equal(first, model(condition, exemplar).image)


def test_a_picture_is_translated_alike_alone_and_in_a_batch():
    model = build().eval()
    condition, exemplar = torch.rand(3, 1, 32, 32), torch.rand(3, 3, 32, 32) * 2 - 1
    together, alone = model(condition, exemplar).image[1], model(condition[1:2], exemplar[1:2]).image[0]
    # Matches are discrete: where sums round differently, a near-tie between two candidates may fall the other way.
    assert ((together - alone).abs().amax(0) < 1e-3).float().mean() > 0.95


@pytest.mark.parametrize(
    "condition, exemplar, words",
    [
        ((1, 2, 32, 32), (1, 3, 32, 32), "condition: expected B,1,H,W, got 1,2,32,32"),
        ((1, 1, 32, 32), (3, 32, 32), "exemplar: expected B,3,H,W"),
        ((2, 1, 32, 32), (1, 3, 32, 32), "2 conditions but 1 exemplars"),
        ((1, 1, 32, 0), (1, 3, 32, 32), "condition: expected B,1,H,W, got 1,1,32,0"),
        ((0, 1, 32, 32), (0, 3, 32, 32), "condition: expected B,1,H,W, got 0,1,32,32"),
    ],
)
def test_wrong_shapes_are_named(condition, exemplar, words):
    with pytest.raises(ValueError, match=words):
        build()(torch.rand(condition), torch.rand(exemplar))


def test_what_is_no_tensor_is_named():
    condition, exemplar = torch.rand(1, 1, 32, 32), torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="exemplar: expected a tensor B,3,H,W, got NoneType"):
        build()(condition, None)
    with pytest.raises(ValueError, match="condition: expected a tensor B,1,H,W, got ndarray"):
        build()(condition.numpy(), exemplar)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16])
def test_numbers_of_another_type_are_named_also_where_autocast_would_take_them(dtype):
    """A warp whose positions are bfloat16 would be off by pixels, and nothing would say so."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=f"exemplar: expected .*, got {dtype}"):
        build()(torch.rand(1, 1, 32, 32), torch.ones(1, 3, 32, 32).to(dtype))


@pytest.mark.parametrize("refinement", ["gru", "conv", "none"])
@pytest.mark.parametrize("propagation", [True, False])
def test_every_row_of_table_5_is_a_switch(refinement, propagation):
    matching = dataclasses.replace(TINY.model.matching, refinement=refinement, propagation=propagation)
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, matching=matching))
    out = build(config)(torch.rand(1, 1, 32, 32), torch.rand(1, 3, 32, 32))
    assert len(out.iteration_warps[-1]) == TINY.model.matching.iterations
    assert torch.isfinite(out.image).all()


def test_the_discriminator_judges_at_every_scale_and_every_layer_is_spectrally_normalised():
    discriminator = Discriminator(1, TINY.model.discriminator)
    outputs = discriminator(torch.rand(2, 1, 48, 32), torch.rand(2, 3, 48, 32))
    assert len(outputs) == TINY.model.discriminator.scales and all(maps[-1].shape[:2] == (2, 1) for maps in outputs)
    discriminator.eval()
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d):
            for _ in range(50):  # let the power iteration settle
                discriminator.train()
                weight = module.weight
            assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_instance_norm_equals_pytorchs_in_value_and_gradient():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(instance_norm(x), torch.nn.functional.instance_norm(x))
    assert torch.autograd.gradcheck(instance_norm, x)
    assert torch.equal(instance_norm(torch.full((1, 2, 1, 1), 7.0)), torch.full((1, 2, 1, 1), 7.0))


def test_a_second_derivative_is_refused_where_the_code_of_the_first_has_none():
    """A gradient penalty on the discriminator, say, would otherwise have a wrong gradient, in silence."""
    x = torch.randn(1, 3, 5, 4, requires_grad=True)
    scores = select_engine("auto", x).evaluate(torch.full((1, 1, 2, 5, 4), 1.5), x, x).scores
    for value in (instance_norm(x).square(), scores.square()):
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward()


@pytest.mark.timeout(1200)  # half a minute of processor time, more where the machine is shared
def test_folded_spectral_norms_give_the_same_bytes_and_leave_nothing_to_work_out():
    model, condition, exemplar = build().eval(), torch.rand(1, 1, 32, 32), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        before = model(condition, exemplar).image
    fold_spectral_norms(model)
    assert not any("parametrizations" in name for name in model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(condition, exemplar).image, before)


def test_the_modulation_is_eq_9():
    """alpha(w) (T - mu) / sigma + beta(w): mu and sigma of each position over the channels, w shrunk by averages."""
    torch.manual_seed(0)
    spade = Spade(channels=5, guide_channels=3, hidden=7)
    x, guide = torch.randn(2, 5, 4, 6), torch.randn(2, 3, 8, 12)
    small = guide.reshape(2, 3, 4, 2, 6, 2).mean((3, 5))
    alpha, beta = spade.alpha_beta(torch.relu(spade.shared(small))).double().split(5, dim=1)
    mu = x.double().mean(1, keepdim=True)
    sigma = ((x.double() - mu).square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = (1 + alpha) * (x.double() - mu) / sigma + beta
    torch.testing.assert_close(spade(x, guide).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("widths", [(6, 4), (4, 4)])
def test_a_spade_block_band_by_band_gives_what_the_whole_gives(widths, monkeypatch):
    torch.manual_seed(0)
    block = SpadeBlock(*widths, guide_channels=3, hidden=8).eval()
    x, guide = torch.randn(2, widths[0], 37, 9), torch.randn(2, 3, 74, 18)
    monkeypatch.setattr("cocosnet.model.layers.BAND", 10)
    with torch.no_grad():
        bands = block(x, guide)
    torch.testing.assert_close(bands, block(x, guide))


def test_the_papers_512_configuration_runs_forward_and_backward_at_reduced_width():
    config = load_config(
        "deepfashion-512",
        [
            "model.encoder.stem_width=4",
            "model.encoder.widths=[4,8,8,8]",
            "model.encoder.spade_hidden=4",
            "model.matching.channels=4",
            "model.matching.hidden=4",
            "model.translator.widths=[16,16,16,8,8,4]",
            "model.translator.spade_hidden=4",
        ],
    )
    model = build(config)
    out = model(torch.rand(1, 20, 512, 512), torch.rand(1, 3, 512, 512) * 2 - 1)
    assert [warp.shape[-1] for warp in out.warps] == [64, 128, 256, 512]
    assert out.matches[-1].positions.shape == (1, 16, 2, 512, 512)
    (out.image.square().mean() + sum(w.square().mean() for warps in out.iteration_warps for w in warps)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_instance_norm_of_bfloat16_is_that_of_float32_but_for_the_result_s_rounding():
    """Means far from 0, and pictures that are mostly blank: what cancels must not have been rounded before."""
    torch.manual_seed(0)
    far = (50 + torch.randn(1, 4, 64, 64)).bfloat16()
    torch.testing.assert_close(
        instance_norm(far).float(), torch.nn.functional.instance_norm(far.float()), atol=0.02, rtol=0
    )
    blank, asked = torch.full((1, 4, 128, 128), 0.3), torch.zeros(1, 4, 128, 128)
    blank[..., 56:72, 56:72] += torch.randn(1, 4, 16, 16)
    asked[..., 50:78, 50:78] = torch.randn(1, 4, 28, 28)
    x = blank.bfloat16().requires_grad_()
    instance_norm(x).backward(asked.bfloat16())
    sums, sizes = x.grad.float().sum((2, 3)), x.grad.float().abs().sum((2, 3))
    assert (sums.abs() < 1e-3 * sizes).all()  # moving all pixels alike changes nothing, so they add up to 0
