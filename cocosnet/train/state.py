"""Resume states: files of plain tensors and dicts, `checkpoints/state-IMAGES.pt`, of which the newest two are kept."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocosnet.config import Config, config_values, load_config
from cocosnet.errors import CheckpointError, ConfigError
from cocosnet.files import atomic_path

FORMAT = 1
KEPT = 2
MAY_CHANGE = (  # what no step depends on
    *("train.images", "train.log_images", "train.sample_images", "train.save_images", "train.val_images"),
    *("train.tensorboard", "train.workers", "train.accumulate", "train.checkpointing", "train.compile", "train.init"),
    "model.matching.checkpoint",
    *("data.edges", "data.poses", "data.crop", "data.landmarks", "data.val_fraction"),  # they are for `prepare`
)
_BACKEND = "model.matching.backend"  # all but "exact" find the same matches, so a run may move to another device


def save_state(folder: Path, images: int, state: dict[str, Any]) -> Path:
    """Write `state` as the one of `images` images, then drop all older ones but one. Raises DataError if it cannot."""
    path = folder / f"state-{images:09d}.pt"
    with atomic_path(path, (RuntimeError,)) as temporary, open(temporary, "wb") as stream:
        torch.save({"format": FORMAT, "images": images, **state}, stream)  # a full disk becomes a RuntimeError in there
        stream.flush()
        os.fsync(stream.fileno())  # a power cut must not leave an empty file and the old ones gone
    prune(path)
    return path


def prune(newest: Path) -> None:
    """Of `newest`, KIND-IMAGES.SUFFIX, and what came before it in its folder, remove all but two.

    Files of more images stay: damaged states that were passed over, or what another run has left.
    """
    kind = newest.name.partition("-")[0]
    before = [path for path in newest.parent.glob(f"{kind}-*{newest.suffix}") if path.name <= newest.name]
    for old in sorted(before)[:-KEPT]:
        old.unlink(missing_ok=True)


def has_state(folder: Path) -> bool:
    """Whether the folder holds any state, readable or not."""
    return any(folder.glob("state-*.pt"))


def newest_state(folder: Path, passed_over: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that can be read, on the CPU, and its file; None without any. `passed_over` hears of damage.

    Raises:
        CheckpointError: there are states, but all are damaged.
    """
    paths = sorted(folder.glob("state-*.pt"), reverse=True)
    for path in paths:
        try:
            return path, load_state(path)
        except CheckpointError as error:
            passed_over(f"{error}; passed over")
    if paths:
        raise CheckpointError(f"{folder}: none of the {len(paths)} states can be read; remove the folder to start anew")
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Read one state. Raises CheckpointError where it is damaged or of another kind."""
    try:
        with zipfile.ZipFile(path) as parts:
            if (damaged := parts.testzip()) is not None:  # torch.load does not compare the checksums
                raise CheckpointError(f"{damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise anything
        raise CheckpointError(f"{path}: damaged or missing ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a state of format {FORMAT}")
    return state


def settled_values(config: Config) -> dict[str, Any]:
    """The values, as `section.key` -> value, that a run keeps from its first step to its last."""
    values = config_values(config).items()
    return {key: value for key, value in values if key not in MAY_CHANGE and not key.startswith("prepare.")}


def check_same_run(path: Path, state: dict[str, Any], config: Config) -> None:
    """Refuse to go on from the state of `path` with another config than its run's, but for what may change.

    A state of before they held the config is judged by the config.yaml of the run folder that it lies in, if any.

    Raises:
        ConfigError: it names the first key that differs.
    """
    before = state.get("config")
    if before is None:
        path = path.absolute().parent.parent / "config.yaml"
        before = settled_values(load_config(path)) if path.exists() else None
    if before is None:
        return
    before = settled_values(Config()) | before  # values that were not there yet are at their defaults
    for key, now in settled_values(config).items():
        if before[key] != now and not (key == _BACKEND and "exact" not in (before[key], now)):
            raise ConfigError(
                f"{path}: this run has {key}={before[key]}, you ask for {now}; "
                "go on with the same config or choose another run folder"
            )


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
