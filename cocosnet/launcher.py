"""Who this process is among those that a launcher (`torchrun`, SLURM) has started; no import of PyTorch."""

from __future__ import annotations

import os


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are, as RANK and WORLD_SIZE say; (0, 1) without a launcher."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), size) if size > 1 else (0, 1)
