"""The convolutions of all networks: PyTorch's, but by a shorter way where one is known to be quicker."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from cocosnet.model.quick import LANES, compiled_module, is_compilable

LEAST_PRODUCTS = 2**24  # of pixels, inputs and outputs; below that either way takes some milliseconds


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`: the same numbers up to rounding, in half the time where `winograd` can compute them.

    That is for 3x3 kernels in float32 on a CPU with numba, on maps of some size; what comes of it is channels-last. In
    training its gradients come the same way.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        # First whether a graph is traced: to ask for its sizes would fix them.
        if plain and _is_single(x, weight) and _fits(x, weight, self.padding):
            if compiled_module("winograd")[0] is not None:
                return _Short.apply(x, weight, bias, self.padding[0])
        return super()._conv_forward(x, weight, bias)


class _Short(torch.autograd.Function):
    """A convolution of stride 1 by `winograd`, from x B,C,H,W, weight K,C,3,3, bias K or None, and the padding."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return compiled_module("winograd")[0].convolve(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # A gradient that has a gradient of its own is PyTorch's.
        way = direct_gradients if torch.is_grad_enabled() else short_gradients
        return *way(gradient, x, weight, ctx.padding, needs), None


def short_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: int, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those of x, weight and bias that are needed. The first is a convolution too, with the kernel turned round."""
    short, turned = compiled_module("winograd")[0], weight.flip(2, 3).transpose(0, 1)
    return (
        short.convolve(gradient, turned, None, 2 - padding) if needs[0] else None,
        short.weight_gradient(x, gradient, padding) if needs[1] else None,
        gradient.sum((0, 2, 3)) if needs[2] else None,
    )


def direct_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: int, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same by PyTorch, which records how it made them."""
    one, around = [1, 1], [padding, padding]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], one, around, one, False, [0, 0], 1, list(needs)
    )


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


def _is_single(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled code may work on them, in float32 and not in what autocast would make of them."""
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return single and is_compilable(x, weight)
