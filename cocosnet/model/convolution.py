"""The convolutions of all networks: PyTorch's, but by a shorter way where one is known to be quicker."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cocosnet.model.quick import LANES, compiled_module, is_plain

LEAST_PRODUCTS = 2**24  # of pixels, inputs and outputs; below that either way takes some milliseconds


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`: the same numbers up to rounding, in half the time where `winograd.convolve` can compute them.

    That is for 3x3 kernels in float32 on a CPU with numba, without a gradient, on maps of some size; what comes of it
    is channels-last.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        # First whether a graph is traced: to ask for its sizes would fix them.
        if plain and _is_plain(x, weight) and _fits(x, weight, self.padding):
            short, _ = compiled_module("winograd")
            if short is not None:
                return short.convolve(x, weight, bias, self.padding[0])
        return super()._conv_forward(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    """Whether the short cut can compute it, and is quicker."""
    outputs, inputs, *kernel = weight.shape
    return (
        kernel == [3, 3]
        and padding in ((0, 0), (1, 1))
        and inputs % LANES == outputs % LANES == 0
        and x.dim() == 4
        and x.shape[1] == inputs
        and min(x.shape[2:]) >= 3
        and x.numel() * outputs >= LEAST_PRODUCTS
    )


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled code may work on them, in float32 and not in what autocast would make of them."""
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return single and is_plain(x, weight)
