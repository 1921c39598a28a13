"""Two processes under torchrun are one training run: the same steps as one process with the whole batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train_tools import prepared_folder

from cocosnet.errors import ConfigError
from cocosnet.train.distributed import Ranks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


def train_command(data, run, processes, *settings):
    """The command line of a tiny run with pseudo exemplars alone, so that every loss is a plain mean over the batch."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    flags = [part for setting in ("train.real_exemplars=0", *settings) for part in ("--set", setting)]
    return [
        sys.executable,
        *launcher,
        "-m",
        "cocosctl",
        "train",
        "tiny-cpu",
        "--data",
        str(data),
        "-o",
        str(run),
        "--quiet",
        *flags,
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def test_two_processes_learn_what_one_process_learns_from_the_whole_batch(data, tmp_path):
    for processes in (1, 2):
        run = tmp_path / str(processes)
        command = train_command(data, run, processes, "train.images=8", "train.batch=4")
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{run}/model.safetensors\n"
    one, two = (load_file(tmp_path / str(processes) / "model.safetensors") for processes in (1, 2))
    # Adam divides by the gradient's size, so a last-bit difference in a tiny gradient may show at the learning rate.
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 5e-4


def test_a_signal_stops_both_processes_and_the_run_goes_on(data, tmp_path):
    run = tmp_path / "run"
    started = subprocess.Popen(
        train_command(data, run, 2, "train.images=4000", "train.batch=4"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (run / "stats.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    errors = started.communicate(timeout=60)[1]
    assert started.returncode != 0
    saved = sorted((run / "checkpoints").glob("state-*.pt"))
    assert saved, errors
    images = int(saved[-1].stem.split("-")[1])
    done = subprocess.run(
        train_command(data, run, 2, f"train.images={images + 8}", "train.batch=4"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert '"resumed"' in (run / "stats.jsonl").read_text()


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="train.batch=4 must be a multiple of the 3 processes"):
        Ranks.join(Ranks().device, 4)
