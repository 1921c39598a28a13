"""The short way of 3x3 convolutions beside PyTorch's: `python docs/measure_convolution.py`.

Milliseconds (the best of seven, in turn) on channels-last maps: the result, the gradient towards the input and that
towards the kernel. And the root mean square of the result's error against float64, where results have a standard
deviation of one. A table on stdout. Needs numba.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cocosnet.memory import keep_freed_memory
from cocosnet.model import winograd
from cocosnet.model.convolution import direct_gradients, short_gradients

SHAPES = (  # pictures, inputs, outputs, height, width
    (1, 128, 128, 72, 512),  # of the translator's and the encoders' at 512x512
    (1, 128, 64, 72, 512),
    (1, 64, 64, 512, 512),
    (1, 128, 128, 256, 256),
    (1, 512, 256, 68, 128),
    (1, 512, 512, 64, 64),
    (4, 32, 32, 128, 128),  # of a training step's at 128x128
    (4, 64, 64, 128, 128),
    (4, 256, 256, 32, 32),
    (4, 512, 512, 16, 16),
)
PARTS = "result", "input", "kernel"


@torch.no_grad()
def main() -> None:
    """Print a row a shape."""
    keep_freed_memory()
    torch.manual_seed(0)
    ways = "direct", "short"
    columns = "shape", *(f"{part}, {way}" for part in PARTS for way in ways), *(f"error, {way}" for way in ways)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for shape in SHAPES:
        print(f"| {', '.join(map(str, shape))} | {' | '.join(measure(*shape))} |", flush=True)


def measure(count: int, inputs: int, outputs: int, height: int, width: int) -> list[str]:
    """The figures of a row."""
    x = torch.randn(count, inputs, height, width).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(count, outputs, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, torch.randn(outputs)

    both = direct_gradients, short_gradients
    ways = (
        lambda: F.conv2d(x, weight, bias, padding=1),
        lambda: winograd.convolve(x, weight, bias, 1),
        *(lambda way=way: way(gradient, x, weight, 1, (True, False, False)) for way in both),
        *(lambda way=way: way(gradient, x, weight, 1, (False, True, False)) for way in both),
    )
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    errors = [(way() - truth).square().mean().sqrt().item() for way in ways[:2]]
    took = [min(part) for part in zip(*([_milliseconds(way) for way in ways] for _ in range(7)))]
    return [*(f"{ms:.0f}" for ms in took), *(f"{error:.1e}" for error in errors)]


def _milliseconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
