"""Who this process is among those that a launcher (`torchrun`, SLURM) has started, and what it may use; no import of
PyTorch."""

from __future__ import annotations

import os

from cocosnet.errors import ConfigError


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are, as RANK and WORLD_SIZE say; (0, 1) without a launcher.

    Raises ConfigError where they say something else.
    """
    size = number("WORLD_SIZE", 1)
    return (number("RANK", 0), size) if size > 1 else (0, 1)


def number(name: str, otherwise: int) -> int:
    """The launcher's variable of that name; `otherwise` where it is not set, or empty. Raises ConfigError."""
    text = os.environ.get(name, "").strip()
    if not text:
        return otherwise
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a number from 0 on; a launcher such as torchrun sets it, or unset it")
    return int(text)


def usable_cores() -> int:
    """Cores that this process may run on, at least 1: a scheduler may have given it fewer than there are."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(found or 1, 1)
