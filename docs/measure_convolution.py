"""The short way of 3x3 convolutions beside PyTorch's: `python docs/measure_convolution.py`.

Milliseconds (the best of seven, in turn) on channels-last maps, and the root mean square of each one's error against
float64 where results have a standard deviation of one. A table on stdout. Needs numba.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.memory import keep_freed_memory
from cocosnet.model import winograd

SHAPES = (  # inputs, outputs, height, width: of the translator's and the encoders' at 512x512
    (128, 128, 72, 512),
    (128, 64, 72, 512),
    (64, 64, 512, 512),
    (128, 128, 256, 256),
    (512, 256, 68, 128),
    (512, 512, 64, 64),
)


@torch.no_grad()
def main() -> None:
    """Print a row a shape."""
    keep_freed_memory()
    torch.manual_seed(0)
    columns = "inputs, outputs, height, width", "ms direct", "ms short", "error direct", "error short"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for shape in SHAPES:
        print(f"| {', '.join(map(str, shape))} | {' | '.join(measure(*shape))} |")


def measure(inputs: int, outputs: int, height: int, width: int) -> list[str]:
    """The figures of a row."""
    x = torch.randn(1, inputs, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, torch.randn(outputs)
    ways = (lambda: F.conv2d(x, weight, bias, padding=1)), (lambda: winograd.convolve(x, weight, bias, 1))
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    errors = [(way() - truth).square().mean().sqrt().item() for way in ways]
    took = [min(part) for part in zip(*([_milliseconds(way) for way in ways] for _ in range(7)))]
    return [*(f"{ms:.0f}" for ms in took), *(f"{error:.1e}" for error in errors)]


def _milliseconds(work: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
