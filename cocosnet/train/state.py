"""Resume states: files of plain tensors and dicts, `checkpoints/state-IMAGES.pt`, of which the newest two are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocosnet.errors import CheckpointError
from cocosnet.files import atomic_path

FORMAT = 1
KEPT = 2


def save_state(folder: Path, images: int, state: dict[str, Any]) -> Path:
    """Write `state` as the one of `images` images, then drop all but the newest two. Raises DataError if it cannot."""
    path = folder / f"state-{images:09d}.pt"
    with atomic_path(path, (RuntimeError,)) as temporary, open(temporary, "wb") as stream:
        torch.save({"format": FORMAT, "images": images, **state}, stream)  # a full disk becomes a RuntimeError in there
    prune(folder, "state-*.pt")
    return path


def prune(folder: Path, pattern: str) -> None:
    """Remove all but the newest two of the files that match; their names hold the images, so they sort by age."""
    for old in sorted(folder.glob(pattern))[:-KEPT]:
        old.unlink(missing_ok=True)


def has_state(folder: Path) -> bool:
    """Whether the folder holds any state, readable or not."""
    return any(folder.glob("state-*.pt"))


def newest_state(folder: Path, passed_over: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest state that can be read, on the CPU; None where there is none. `passed_over` hears of damaged ones.

    Raises:
        CheckpointError: there are states, but all are damaged.
    """
    paths = sorted(folder.glob("state-*.pt"), reverse=True)
    for path in paths:
        try:
            return load_state(path)
        except CheckpointError as error:
            passed_over(f"{error}; passed over")
    if paths:
        raise CheckpointError(f"{folder}: none of the {len(paths)} states can be read; remove the folder to start anew")
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Read one state. Raises CheckpointError where it is damaged or of another kind."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise anything
        raise CheckpointError(f"{path}: damaged or missing ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a state of format {FORMAT}")
    return state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """This process's own generators, of the CPU and of its GPU. The sampling of batches has no state: see `batches`."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(states: list[dict[str, Tensor]], rank: int, size: int, device: torch.device) -> None:
    """Take up what `random_state` gave in `rank`; with another number of processes than then, nothing is taken up."""
    if len(states) != size:
        return
    torch.set_rng_state(states[rank]["cpu"])
    if device.type == "cuda" and "cuda" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["cuda"], device)
