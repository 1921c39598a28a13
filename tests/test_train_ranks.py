"""Two processes under torchrun are one training run: the same steps as one process with the whole batch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from train_tools import prepared_folder, steps_by

from cocosnet.errors import ConfigError, MissingDependency
from cocosnet.groups import own_device
from cocosnet.train.distributed import Ranks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


def train_command(data, run, processes, *settings):
    """The command line of a tiny run."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    flags = [part for setting in settings for part in ("--set", setting)]
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


STEP = """
    import sys, torch
    from train_tools import steps_by
    torch.set_num_threads(1)
    torch.save(steps_by(sys.argv[1]), sys.argv[2] + __import__("os").environ.get("RANK", "0"))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_behind_one_ranks_output_ends_all_of_them(data, tmp_path):
    """The first rank alone prints; the others would wait for it until the group's patience ends."""
    command = [part for part in train_command(data, tmp_path / "run", 2) if part != "--quiet"] + ["--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=150)
    assert done.returncode != 0 and "No space left" in done.stderr, done.stderr[-1000:]
    assert not (tmp_path / "run" / "stopped").exists()  # which would have a scheduler start it again
    assert list((tmp_path / "run" / "checkpoints").glob("state-*.pt"))


def test_two_processes_make_the_steps_that_one_makes_with_the_whole_batch(data, tmp_path):
    """The whole objective, exemplars of both kinds mixed: the same losses to 1e-5, the same weights on both ranks."""
    (tmp_path / "step.py").write_text(textwrap.dedent(STEP))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "step.py"), str(data), str(tmp_path / "two-")]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, env=environment() | path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, (first, second) = steps_by(data), (torch.load(tmp_path / f"two-{rank}") for rank in range(2))
    for ours, theirs in zip(one["parts"], first["parts"], strict=True):
        assert ours.keys() == theirs.keys() >= {"align", "corr", "map", "sem", "contextual", "feature", "adv", "disc"}
        for name in ours:
            bound = 1e-2 if name.endswith("grad_norm") else 1e-5  # of two matches that tie, either may win
            assert theirs[name] == pytest.approx(ours[name], rel=bound, abs=bound), name
    assert first["parts"] == second["parts"]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert max((one["weights"][name] - first["weights"][name]).abs().max() for name in one["weights"]) < 3e-4


def test_a_signal_to_the_launcher_stops_both_processes_and_the_run_goes_on(data, tmp_path):
    """The processes end with 75 themselves; torchrun makes 1 of it, so RUN/stopped tells."""
    run = tmp_path / "run"
    command = train_command(data, run, 2, "train.images=40000", "train.batch=4")
    started = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(run / "stats.jsonl")
    begun = time.monotonic()
    started.send_signal(signal.SIGTERM)
    errors = started.communicate(timeout=60)[1]
    assert time.monotonic() - begun < 20
    assert started.returncode == 1 and (run / "stopped").exists(), errors
    assert "stopped at" in errors
    images = int(sorted((run / "checkpoints").glob("state-*.pt"))[-1].stem.split("-")[1])
    command = train_command(data, run, 2, f"train.images={images + 8}", "train.batch=4")
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run}/model.safetensors\n"  # said by the first process alone
    assert '"resumed"' in (run / "stats.jsonl").read_text() and not (run / "stopped").exists()


def start_two(command):
    """The command twice, told who it is by the environment alone."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment() | place | {"RANK": str(r)}, **options) for r in range(2)]


AVERAGE = """if True:
    import sys, torch
    from cocosnet.train.distributed import Ranks
    ranks = Ranks.join(torch.device("cpu"), 2)
    both, second, neither = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.full((2,), 1.0 + ranks.rank)
    second.grad = torch.ones(2) if ranks.rank == 1 else None
    ranks.average_gradients([both, neither, second])
    torch.save([both.grad, neither.grad, second.grad], sys.argv[1] + str(ranks.rank))
    ranks.leave()
"""


def test_a_gradient_that_one_process_lacks_counts_as_zero_and_one_that_all_lack_stays_missing(tmp_path):
    processes = start_two([sys.executable, "-c", AVERAGE, str(tmp_path / "rank")])
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for rank in range(2):
        both, neither, second = torch.load(tmp_path / f"rank{rank}")
        assert both.tolist() == [1.5, 1.5] and neither is None and second.tolist() == [0.5, 0.5]


def test_processes_that_the_scheduler_starts_end_with_75_together(data, tmp_path):
    """As `srun` does it: no launcher, one process told by SIGUSR1, both save at the same step and end with 75."""
    run = tmp_path / "run"
    command = train_command(data, run, 1, "train.images=40000", "train.batch=4", "train.workers=1")
    both = start_two(command)
    wait_for(run / "stats.jsonl")
    begun = time.monotonic()
    both[1].send_signal(signal.SIGUSR1)
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [75, 75], errors
    assert time.monotonic() - begun < 20
    state = torch.load(sorted((run / "checkpoints").glob("state-*.pt"))[-1], weights_only=True)
    assert len(state["random"]) == 2


def test_a_damaged_picture_ends_all_processes_with_its_name_and_the_state_saved(tmp_path):
    data, run = prepared_folder(tmp_path / "data"), tmp_path / "run"
    damaged = data / "images" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    command = train_command(data, run, 1, "train.images=400", "train.batch=4", "train.workers=1")
    both = start_two(command)
    errors = [process.communicate(timeout=90)[1] for process in both]
    assert [process.returncode for process in both] == [3, 3], errors
    assert all(text.count("\n") == 1 and str(damaged) in text for text in errors), errors
    assert list((run / "checkpoints").glob("state-*.pt"))


def wait_for(path):
    deadline = time.monotonic() + 90
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_every_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda")) == torch.device("cuda", 3)
    assert own_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    assert own_device(torch.device("cpu")) == torch.device("cpu")


def test_more_processes_than_gpus_are_told_so(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(MissingDependency, match="process 99 of this node .* has no GPU"):
        Ranks.join(torch.device("cuda"), 4)


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="train.batch=4 must be a multiple of the 3 processes"):
        Ranks.join(Ranks().device, 4)


FORGETFUL = """
    import atexit, torch.distributed as dist
    from cocosnet.groups import everyone, join_group
    atexit.register(lambda: print("alive " if dist.is_initialized() else "ended ", end=""))
    join_group()
    everyone("something")
"""


def test_a_group_that_nobody_ends_is_ended_before_the_interpreter_is(tmp_path):
    """Else a worker thread of gloo, which frees what was exchanged, now and then aborts the process."""
    script = tmp_path / "forgetful.py"
    script.write_text(textwrap.dedent(FORGETFUL))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment() | paths)
    assert done.returncode == 0 and done.stdout.split() == ["ended", "ended"], done.stderr
