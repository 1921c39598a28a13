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
    given_ = (*make(1, inputs, outputs, side, side), 1)
    direct = rounding(F.conv2d(*given_[:3], padding=1), *given_)
    short = rounding(winograd.convolve(*given_), *given_)
    assert short[0] < 3 * direct[0] and short[1] < 3 * direct[1]


def test_the_number_of_threads_changes_no_bit():
    x, weight, bias = make(2, 48, 80, 37, 50)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(winograd.convolve(x, weight, bias, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def big():
    """A layer and a picture for which the short way is taken."""
    torch.manual_seed(0)
    layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 96, 96)
    assert x.numel() * layer.out_channels >= LEAST_PRODUCTS
    return layer, x


def direct(layer, x):
    return nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)


def test_a_large_map_takes_the_short_way_and_gradients_the_direct_one():
    layer, x = big()
    with torch.no_grad():
        assert torch.equal(layer(x), winograd.convolve(x, layer.weight, layer.bias, 1))
    recorded = layer(x)
    assert recorded.requires_grad and torch.equal(recorded, direct(layer, x))
    recorded.sum().backward()
    assert layer.weight.grad is not None
    frozen = layer.requires_grad_(False)
    assert torch.equal(frozen(x), winograd.convolve(x, layer.weight, layer.bias, 1))


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


def test_edges_are_the_same_either_way():
    torch.manual_seed(0)
    network, picture = HED().eval(), 255 * torch.rand(1, 3, 160, 144)
    expected = network(picture)
    with torch.no_grad():
        found = network(picture)
    assert expected.requires_grad and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


def test_without_numba_it_is_the_direct_one():
    code = (
        "import torch; from cocosnet.model.convolution import Conv2d; layer = Conv2d(64, 64, 3, padding=1)\n"
        "x = torch.randn(1, 64, 96, 96); expected = layer(x).detach()\n"
        "with torch.no_grad(): print(torch.equal(layer(x), expected))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=clean_environment(NUMBA_DISABLE_JIT="1"),
    )
    assert done.stdout == "True\n", done.stderr
