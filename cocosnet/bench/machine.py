"""What a piece of work costs here, and what it could cost at best: time, peak memory, and the machine's own limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MEBI = 2**20
STATUS, CLEAR = "/proc/self/status", "/proc/self/clear_refs"


@dataclass(frozen=True)
class Cost:
    """Seconds, the least of the repetitions, and MiB added at the peak (nan where the system does not say)."""

    seconds: float
    peak_mib: float


def measured(work: Callable[[], Any], device: torch.device, repeats: int = 1) -> tuple[Any, Cost]:
    """Run `work` `repeats` times: its last result, and its cost."""
    best, peaks = math.inf, []
    for _ in range(repeats):
        before = _reset_peak(device)
        start = time.perf_counter()
        result = work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
        peaks.append(_peak(device) - before)
    return result, Cost(best, math.nan if any(map(math.isnan, peaks)) else max(0.0, *peaks))


def multiply_rate(device: torch.device, side: int | None = None) -> float:
    """FLOP/s of a float32 matrix product of side x side, the best of five: what arithmetic can reach here.

    The default side is 1024, and 8192 on a GPU, where a smaller product takes no longer than its launch.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    matrix = torch.ones(side, side, device=device)
    return 2 * side**3 / measured(lambda: matrix @ matrix, device, 5)[1].seconds


def copy_rate(device: torch.device, count: int = 2**25) -> float:
    """Bytes/s read and written by copying `count` float32 numbers, the best of five: what memory can reach here."""
    source, target = torch.zeros(count, device=device), torch.empty(count, device=device)
    return 8 * count / measured(lambda: target.copy_(source), device, 5)[1].seconds


def matching_floor(pixels: int, channels: int, candidates: int, iterations: int) -> dict[str, float]:
    """The least work of PatchMatch propagation over levels of `pixels` pixels together, both passes of all iterations.

    flop: 3K dot products of C numbers a pixel and pass. bytes: every map read once a pass (f^x and f^y, C float32 each,
    K positions of two) and every result written once (K positions and scores), as if caches were boundless and nothing
    stayed in them between passes. gathered_bytes: the same where each of the 3K candidates' features come from memory.
    """
    passes = 2 * iterations * pixels
    once = 4 * (2 * channels + 2 * candidates + 3 * candidates)
    gathered = 4 * (channels + 3 * candidates * channels + 2 * candidates + 3 * candidates)
    return {
        "flop": passes * 3 * candidates * 2 * channels,
        "bytes": passes * once,
        "gathered_bytes": passes * gathered,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> float:
    """Forget the peak so far; returns the memory in use, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MEBI
    try:
        with open(CLEAR, "w") as file:
            file.write("5")  # Linux: the high-water mark starts anew
    except OSError:
        return math.nan
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBI
    return _status("VmHWM")


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB; nan where there is none."""
    try:
        with open(STATUS) as file:
            line = next(line for line in file if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return math.nan
    return int(line.split()[1]) / 1024
