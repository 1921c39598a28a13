"""`kill -9` at random moments: no checkpoint is ever unreadable, and the run ends as if it had been left alone.

COCOSCTL_KILLS=20 pytest tests/test_train_kills.py    # the long variant: twenty kills over 200 steps
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_tools import prepared_folder

from cocosnet.train.state import load_state

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("COCOSCTL_KILLS", "2"))
pytestmark = pytest.mark.timeout(120 + 60 * KILLS)
STEPS = 10 * KILLS


def start(data, run):
    """The run in a process of its own: a checkpoint every other step, so that many kills meet one being written."""
    settings = (f"train.images={2 * STEPS}", "train.save_images=4", "train.log_images=2", "train.real_exemplars=0.5")
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "cocosctl", "train", "tiny-cpu", "--data", data, "-o", run, "-q", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment)


def images(run):
    """How far the newest checkpoint is."""
    return max((int(path.stem[-9:]) for path in (run / "checkpoints").glob("state-*.pt")), default=0)


def kill_at_a_random_moment(data, run, chance):
    """Let it make a checkpoint, and a little more. Returns whether there was anything left to kill."""
    process, before = start(data, run), images(run)
    while process.poll() is None and images(run) == before:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_killed_at_random_moments_a_run_ends_as_if_left_alone(tmp_path):
    data, run, chance = prepared_folder(tmp_path / "data"), tmp_path / "run", random.Random(7)
    assert start(data, tmp_path / "alone").wait() == 0
    killed = 0
    for _ in range(KILLS):
        killed += kill_at_a_random_moment(data, run, chance)
        for path in (run / "checkpoints").glob("state-*.pt"):
            assert load_state(path)["images"] == int(path.stem[-9:])
        for path in (run / "checkpoints").glob("model-*.safetensors"):
            assert load_file(path)
    assert killed >= min(KILLS, 2)
    assert start(data, run).wait() == 0
    assert not list(run.rglob(".tmp-*"))
    last = f"checkpoints/state-{2 * STEPS:09d}.pt"
    alone, survived = (load_state(folder / last) for folder in (tmp_path / "alone", run))
    for part in ("model", "mapping", "discriminator", "ema"):
        assert all(torch.equal(value, survived[part][name]) for name, value in alone[part].items()), part
    print(f"{killed} kills over {STEPS} steps")
