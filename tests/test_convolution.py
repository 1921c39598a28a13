"""The convolutions' short way: as exact as the direct one, and taken where it can be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cli_tools import clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cocosnet.data.extractors.hed import HED
from cocosnet.model.convolution import LEAST_PRODUCTS, Conv2d

winograd = pytest.importorskip("cocosnet.model.winograd", reason="needs numba, of the extra `fast`")


def make(batch, inputs, outputs, height, width, seed=0):
    """A picture and a kernel whose results have a standard deviation of about one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, height, width, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def rounding(result, x, weight, bias, padding):
    """The largest and the mean square error, against float64."""
    error = result - F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    return error.abs().max().item(), error.square().mean().sqrt().item()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(3, 21), st.integers(3, 21)),
    padding=st.sampled_from([0, 1]),
    has_bias=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size_and_border_gives_the_direct_result(shape, padding, has_bias, last, seed):
    batch, inputs, outputs, height, width = shape
    x, weight, bias = make(batch, 16 * inputs, 16 * outputs, height, width, seed)
    bias = bias if has_bias else None
    layout = torch.channels_last if last else torch.contiguous_format
    found = winograd.convolve(
        x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias, padding
    )
    assert found.shape == (batch, 16 * outputs, height + 2 * padding - 2, width + 2 * padding - 2)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert rounding(found, x, weight, bias, padding)[0] < 2e-5


@pytest.mark.parametrize("inputs, outputs, side", [(64, 64, 130), (128, 256, 66), (512, 512, 20)])
def test_it_rounds_at_most_three_times_as_much_as_the_direct_one(inputs, outputs, side):
    """Of channels-last maps, as the networks have: in which order PyTorch adds depends on the layout."""
    x, weight, bias = make(1, inputs, outputs, side, side)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    given_ = (x, weight, bias, 1)
    direct = rounding(F.conv2d(*given_[:3], padding=1), *given_)
    short = rounding(winograd.convolve(*given_), *given_)
    assert short[0] < 3 * direct[0] and short[1] < 3 * direct[1]


def test_the_number_of_threads_changes_no_bit(set_threads):
    x, weight, bias = make(2, 48, 80, 37, 50)
    found = []
    for count in (1, 2):
        set_threads(count)
        found.append(winograd.convolve(x, weight, bias, 1))
    assert torch.equal(*found)


def big():
    """A layer and a picture for which the short way is taken."""
    torch.manual_seed(0)
    layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 96, 96)
    assert x.numel() * layer.out_channels >= LEAST_PRODUCTS
    return layer, x


def direct(layer, x):
    return nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)


def test_a_large_map_takes_the_short_way():
    layer, x = big()
    with torch.no_grad():
        assert torch.equal(layer(x), winograd.convolve(x, layer.weight, layer.bias, 1))
    assert torch.equal(layer(x), winograd.convolve(x, layer.weight, layer.bias, 1))
    assert not torch.equal(layer(x), direct(layer, x))  # else the tests below compare nothing


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(3, 21), st.integers(3, 21)),
    padding=st.sampled_from([0, 1]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_kernel_has_the_gradient_of_the_direct_way(shape, padding, last, seed):
    batch, inputs, outputs, height, width = shape
    x, weight, _ = make(batch, 16 * inputs, 16 * outputs, height, width, seed)
    truth = weight.double().requires_grad_()
    result = F.conv2d(x.double(), truth, padding=padding)
    gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)) / result[0, 0].numel() ** 0.5
    result.backward(gradient.double())
    layout = torch.channels_last if last else torch.contiguous_format
    found = winograd.weight_gradient(x, gradient.contiguous(memory_format=layout), padding)
    torch.testing.assert_close(found.double(), truth.grad, atol=3e-5, rtol=1e-5)


def test_many_pictures_are_laid_out_in_parts(monkeypatch):
    x, _, _ = make(5, 16, 32, 12, 9)
    gradient = make(5, 32, 16, 12, 9, seed=1)[0]
    whole = winograd.weight_gradient(x, gradient, 1)
    monkeypatch.setattr(winograd, "MOST", 2 * 9 * 48 * winograd.PLACES)  # two pictures of nine tiles at once
    torch.testing.assert_close(winograd.weight_gradient(x, gradient, 1), whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_gradients_are_the_direct_ones_up_to_rounding(padding):
    layer, x = big()
    layer.padding = (padding, padding)
    found, truth = gradients(layer, x), gradients(layer.double(), x.double(), way=direct)
    for mine, exact in zip(found, truth):
        assert (mine - exact).abs().max() < 1e-5 * exact.abs().max()


def gradients(layer, x, way=lambda layer, x: layer(x)):
    """Of a sum of squares, towards x, weight and bias."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    way(layer, x).square().mean().backward()
    return [g.clone() for g in (x.grad, layer.weight.grad, layer.bias.grad)]


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone_is_the_same(wanted):
    layer, x = big()
    every = dict(zip(("x", "weight", "bias"), gradients(layer, x)))
    given_ = {"x": x.clone(), "weight": layer.weight, "bias": layer.bias}
    layer.zero_grad()
    layer.requires_grad_(False)
    given_[wanted].requires_grad_(True)
    layer(given_["x"]).square().mean().backward()
    assert torch.equal(given_[wanted].grad, every[wanted])
    assert all(tensor.grad is None for name, tensor in given_.items() if name != wanted)


def test_a_gradient_has_a_gradient_of_its_own():
    """As a penalty on the discriminator's gradient would need it."""
    layer, x = big()

    def penalty(way):
        layer.zero_grad()
        picture = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(way(layer, picture).square().mean(), picture, create_graph=True)
        (1e6 * gradient.square().mean()).backward()
        return layer.weight.grad.clone(), picture.grad.clone()

    for mine, exact in zip(penalty(lambda layer, x: layer(x)), penalty(direct)):
        torch.testing.assert_close(mine, exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


def test_the_number_of_threads_changes_no_bit_of_what_is_passed_back(set_threads):
    layer, x = big()
    found = []
    for count in (1, 2):
        set_threads(count)
        found.append(gradients(layer, x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(64, 64, 3),
        Conv2d(64, 64, 3, padding=1, stride=2),
        Conv2d(64, 64, 3, padding=2),
        Conv2d(64, 64, 3, padding=2, dilation=2),
        Conv2d(64, 64, 3, padding="same"),
        Conv2d(64, 64, 3, padding=1, groups=2),
        Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        Conv2d(64, 60, 3, padding=1),
        Conv2d(64, 64, 5, padding=2),
        Conv2d(64, 128, 1),
        Conv2d(64, 64, 3, padding=1).double(),
    ],
    ids=str,
)
def test_any_layer_gives_what_pytorchs_gives(layer):
    x = torch.randn(1, 64, 96, 96, dtype=layer.weight.dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), direct(layer, x), atol=1e-5, rtol=1e-5)


def test_small_maps_autocast_and_traced_graphs_take_the_direct_way():
    layer, x = big()
    with torch.no_grad():
        assert torch.equal(layer(x[..., :20]), direct(layer, x[..., :20]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        height = {2: torch.export.Dim("height", min=8, max=4096)}
        traced = torch.export.export(nn.Sequential(layer.eval()), (x,), dynamic_shapes=(height,)).module()
        for part in (x, x[:, :, :40]):
            assert torch.equal(traced(part), direct(layer, part))


def test_a_picture_of_the_wrong_shape_is_refused_as_by_pytorch():
    layer, x = big()
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        layer(x[:, :48])
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0]), direct(layer, x)[0], atol=1e-5, rtol=1e-5)


def test_edges_are_the_same_either_way(monkeypatch):
    torch.manual_seed(0)
    network, picture = HED().eval(), 255 * torch.rand(1, 3, 160, 144)
    with torch.no_grad():
        found = network(picture)
        monkeypatch.setattr(Conv2d, "_conv_forward", nn.Conv2d._conv_forward)
        expected = network(picture)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_without_numba_it_is_the_direct_one():
    code = (
        "import torch; from cocosnet.model.convolution import Conv2d; layer = Conv2d(64, 64, 3, padding=1)\n"
        "x = torch.randn(1, 64, 96, 96); expected = torch.nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)\n"
        "print(torch.equal(layer(x), expected))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=clean_environment(NUMBA_DISABLE_JIT="1"),
    )
    assert done.stdout == "True\n", done.stderr
