"""Memory of matching with gradients, by size: `python docs/measure_memory.py [SIZE ...]` (by default 128 256 512).

Matching alone, as in the preset `deepfashion-512` (four levels), on random features, Eq. 12 and its backward pass,
without and with `model.matching.checkpoint`. A row a size on stdout: what a step adds to a process's memory at its
peak, each in a process of its own, in MiB and in KiB a pixel.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.bench.machine import measured
from cocosnet.config import LossConfig, load_config
from cocosnet.losses.correspondence import correspondence_loss
from cocosnet.model.hierarchy import Hierarchy

LEVELS, WIDTH, SMALL = 4, 64, 64


def main(sizes: list[int]) -> None:
    """Print the table."""
    print("| size | MiB | KiB a pixel | checkpoint, MiB | KiB a pixel |\n|---|---|---|---|---|")
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        for size in sizes:
            peaks = list(pool.map(peak, [size, size], [False, True]))
            cells = [cell for mib in peaks for cell in (f"{mib:.0f}", f"{1024 * mib / size**2:.1f}")]
            print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


def peak(size: int, checkpoint: bool) -> float:
    """MiB that a step adds; a small one, which loads and compiles, does not count."""
    step(SMALL, checkpoint)
    return measured(lambda: step(size, checkpoint), torch.device("cpu"))[1].peak_mib


def step(size: int, checkpoint: bool) -> None:
    """A forward and a backward pass of matching on a pair of `size` px."""
    torch.manual_seed(0)
    config = dataclasses.replace(load_config("deepfashion-512").model.matching, checkpoint=checkpoint)
    matcher = Hierarchy((WIDTH,) * LEVELS, config).train()
    x, y = pyramid(size), pyramid(size)
    exemplar, target = torch.rand(2, 1, 3, size, size) * 2 - 1
    levels = matcher(x, y, exemplar)
    correspondence_loss([level.warps for level in levels], target, torch.ones(1), LossConfig.iteration_decay).backward()


def pyramid(size: int) -> list[Tensor]:
    """Random features that ask for a gradient, coarse to fine, 1,WIDTH,h,w of unit length."""
    sides = [size >> (LEVELS - 1 - level) for level in range(LEVELS)]
    return [F.normalize(torch.randn(1, WIDTH, side, side), dim=1).requires_grad_() for side in sides]


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [128, 256, 512])
