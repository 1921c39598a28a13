"""Whole runs of the tiny preset: what the folder holds, and that a run can be killed, stopped and damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from cli_tools import COCOSCTL
from PIL import Image
from safetensors.torch import load_file
from train_tools import prepared_folder, tiny

import cocosnet
from cocosnet.checkpoint import read_metadata
from cocosnet.config import config_to_yaml, load_config
from cocosnet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependency,
    MissingWeights,
    OutputError,
    Stopped,
)
from cocosnet.files import only_one
from cocosnet.train.runlog import Averages, RunLog
from cocosnet.train.state import load_state
from cocosnet.train.trainer import SKIP_LIMIT, Trainer

ROOT = Path(__file__).resolve().parent.parent
RUN = """
    import os, signal, sys, torch
    from cocosnet.config import load_config
    from cocosnet.train.trainer import Trainer
    torch.set_num_threads(1)
    config, data, run, kill_at = sys.argv[1:]
    def tick(values):
        if values["images"] == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
    Trainer(load_config(config), data, run, "cpu", tick).train()
"""
STUCK = """
    import multiprocessing, sys, time
    from cocosnet.config import load_config
    from cocosnet.train.batches import StepBatches
    from cocosnet.train.trainer import Trainer
    class Lost(StepBatches):
        def __getitem__(self, step):
            time.sleep(3600)  # a disk of the network that does not answer
    if __name__ == "__main__":
        config, data, run, method = sys.argv[1:]
        multiprocessing.set_start_method(method)
        trainer = Trainer(load_config(config), data, run, "cpu")
        trainer.batches.__class__ = Lost
        trainer.train()
"""

MATCHING = """
    import hashlib, torch
    from cocosnet.model.compiled import descend, evaluate, propagate, soft_warp
    def tell(what, *values):
        print(what, hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in values)).hexdigest())
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(1, 32, 16, 16, generator=draw), dim=1) for _ in range(2))
    given = [value.requires_grad_() for value in (torch.rand(1, 4, 2, 16, 16, generator=draw) * 15, x, y)]
    scores = evaluate(*given).scores
    scores[scores.isfinite()].square().sum().backward()
    tell("gradients", *(value.grad for value in given))
    with torch.no_grad():
        tell("evaluate", evaluate(*given).scores)
        tell("descend", descend(given[0] / 2, x, y).scores)
        found = propagate(*given, iterations=2)
        tell("propagate", found.positions, found.scores)
        tell("warp", soft_warp(torch.rand(1, 3, 16, 16, generator=draw), found.positions, found.scores, 0.01))
"""
KILLED_HOLDER = """
    import os, signal, sys, time
    from pathlib import Path
    from cocosnet.files import only_one
    with only_one(Path(sys.argv[1]), "train"):
        child = os.fork()
        if child == 0:
            os.close(1)
            time.sleep(60)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
LIMITED = """
    import os, resource, sys
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    os.execv(sys.argv[1], sys.argv[1:])
"""
ONE_CORE = """
    import os, sys
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of four steps that was left alone, and the ticks that it gave."""
    run, ticks = tmp_path_factory.mktemp("finished"), []
    model = Trainer(tiny(), data, run, "cpu", ticks.append).train()
    return run, ticks, model


def stats(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def state(run, images):
    return torch.load(run / "checkpoints" / f"state-{images:09d}.pt", weights_only=True)


def differences(a, b, where=""):
    """Names of the entries of two nested states that are not the same, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def test_the_run_folder_says_all_about_itself(finished):
    run, ticks, model = finished
    assert model == run / "model.safetensors"
    assert load_config(run / "config.yaml") == tiny()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "model-000000004.safetensors",
        "model-000000008.safetensors",
        "state-000000004.pt",
        "state-000000008.pt",
    ]
    assert [tick["images"] for tick in ticks] == [2, 4, 6, 8] and ticks[0]["of"] == 8
    lines = stats(run)
    assert [line["images"] for line in lines] == [2, 4, 6, 8]
    measures = "images_per_second", "seconds", "memory_mib"
    for key in ("total", "align", "corr", "map", "adv", "disc", "lr_g", "lr_d", *measures):
        assert all(isinstance(line[key], float) for line in lines), key
    assert any("warp_psnr" in line for line in lines)


def test_the_grid_has_a_row_a_held_out_pair_and_a_column_a_stage(finished):
    run, _, _ = finished
    columns = 1 + 1 + 3 + 1 + 1  # condition, exemplar, the warps of three levels, output, target
    assert Image.open(run / "samples" / "000000008.jpg").size == (columns * 36, 2 * 36)


def test_the_averaged_model_loads_and_translates(finished):
    run, _, path = finished
    model = cocosnet.load_model(path, device="cpu")
    assert model.config == tiny() and read_metadata(path)["cocosctl.images"] == "8"
    with torch.no_grad():
        out = model(torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32))
    assert out.image.shape == (1, 3, 32, 32) and out.image.isfinite().all()


def test_killed_and_resumed_is_the_same_as_left_alone_bit_for_bit(data, tmp_path):
    """SIGKILL after two of four steps, then the same command again.

    Both runs are processes of their own: what the tests before have left in this one (threads, compiled parts) is
    allowed to round differently.
    """
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny()))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def train(run, kill_at):
        command = [sys.executable, "-c", textwrap.dedent(RUN), tmp_path / "config.yaml", data, tmp_path / run, kill_at]
        return subprocess.run(command, env=environment, timeout=200).returncode

    assert train("alone", "-1") == 0
    assert train("killed", "4") == -signal.SIGKILL
    assert not (tmp_path / "killed/checkpoints/state-000000008.pt").exists()
    assert train("killed", "-1") == 0
    assert differences(state(tmp_path / "killed", 8), state(tmp_path / "alone", 8)) == []
    models = [load_file(tmp_path / run / "model.safetensors") for run in ("killed", "alone")]
    assert differences(*models) == []


def test_a_process_that_compiles_the_matcher_rounds_as_one_that_finds_it_compiled(tmp_path):
    """Otherwise a run that is resumed, and so finds it, would end with other bits than one that was left alone, and
    the first picture of an installation would differ from the next one of the same inputs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(MATCHING)]
    compiling, finding = (subprocess.check_output(command, env=environment, timeout=300) for _ in range(2))
    assert compiling.decode().splitlines() == finding.decode().splitlines()


def test_work_after_the_last_state_is_done_again_and_logged_once(data, tmp_path, finished):
    class Cut(Exception):
        pass

    def cut(tick):
        if tick["images"] == 6:
            raise Cut

    with pytest.raises(Cut):
        Trainer(tiny(), data, tmp_path, "cpu", cut).train()
    assert [line["images"] for line in stats(tmp_path)] == [2, 4, 6]
    Trainer(tiny(), data, tmp_path, "cpu").train()
    lines = stats(tmp_path)
    assert [line["images"] for line in lines if "total" in line] == [2, 4, 6, 8]
    assert {"images": 4, "note": "resumed"} in lines
    assert differences(state(tmp_path, 8), state(finished[0], 8)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(data, tmp_path, number):
    handler = signal.getsignal(number)

    def tick(values):
        if values["images"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="stopped at 2 images"):
        Trainer(tiny(), data, tmp_path, "cpu", tick).train()
    assert state(tmp_path, 2)["images"] == 2
    assert signal.getsignal(number) is handler


def test_a_longer_run_goes_on_but_another_config_is_refused_by_name(data, tmp_path):
    Trainer(tiny("train.images=2"), data, tmp_path, "cpu").train()
    with pytest.raises(ConfigError, match="train.lr_g=0.0001, you ask for 0.01"):
        Trainer(tiny("train.lr_g=0.01"), data, tmp_path, "cpu").train()
    cheaper = ("train.log_images=1", "model.matching.checkpoint=true", "train.checkpointing=true")
    Trainer(tiny("train.images=4", *cheaper), data, tmp_path, "cpu").train()
    assert state(tmp_path, 4)["images"] == 4
    assert load_config(tmp_path / "config.yaml").train.images == 4


def test_a_state_with_other_bytes_than_were_written_is_damaged_too(finished, tmp_path):
    """As after a power cut, where a file can have its full length and blocks of zeros."""
    path = Path(shutil.copy(next((finished[0] / "checkpoints").glob("state-*8.pt")), tmp_path))
    assert load_state(path)["images"] == 8
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(path)


def test_a_damaged_state_is_passed_over_with_a_note(data, tmp_path, finished, caplog):
    Trainer(tiny(), data, tmp_path, "cpu").train()
    newest = tmp_path / "checkpoints" / "state-000000008.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    Trainer(tiny(), data, tmp_path, "cpu").train()
    assert any("state-000000008.pt: damaged" in line.get("note", "") for line in stats(tmp_path))
    assert "state-000000008.pt: damaged" in caplog.text
    assert differences(state(tmp_path, 8), state(finished[0], 8)) == []
    for path in (tmp_path / "checkpoints").glob("state-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 states can be read"):
        Trainer(tiny(), data, tmp_path, "cpu").train()


def test_a_state_outlives_damaged_ones_of_more_images_and_what_another_run_has_left(data, tmp_path):
    """Only the newest two are kept, and a broken file or a stranger's is not newer because of its name."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for images in (300, 400):
        (folder / f"model-{images:09d}.safetensors").write_bytes(b"of another run")
    Trainer(tiny("train.images=2"), data, tmp_path, "cpu").train()
    for images in (300, 400):
        (folder / f"state-{images:09d}.pt").write_bytes(b"half of")
    Trainer(tiny("train.images=4"), data, tmp_path, "cpu").train()
    assert load_state(folder / "state-000000004.pt")["images"] == 4
    assert read_metadata(folder / "model-000000004.safetensors")["cocosctl.images"] == "4"


def test_two_runs_do_not_write_into_one_folder_and_a_killed_one_leaves_it_free(data, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny("train.images=40000", "train.workers=1")))
    command = [*COCOSCTL, "train", tmp_path / "config.yaml", "--data", data, "-o", run, "-q"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not list((run / "checkpoints").glob("state-*.pt")) and first.poll() is None:
            time.sleep(0.1)
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert second.returncode == 3 and first.poll() is None
        assert second.stderr.count("\n") == 1 and "another train is at work on this folder" in second.stderr
    finally:
        first.kill()
        first.wait()
    longer = load_state(max((run / "checkpoints").glob("state-*.pt")))["images"] + 2
    command += ["--set", f"train.images={longer}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_what_a_killed_run_has_started_does_not_keep_its_folder(tmp_path):
    """Loading processes look only now and then whether their trainer still lives."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED_HOLDER), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, timeout=60)
    child = int(done.stdout)
    try:
        assert done.returncode == -signal.SIGKILL and Path(f"/proc/{child}").exists()
        with only_one(tmp_path, "train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_no_room_for_a_state_is_said_in_one_line_and_the_one_before_stays(data, tmp_path, finished):
    """A limit on the size of files stands in for a full disk: the writers meet an OSError in the same place."""
    run = tmp_path / "run"
    Trainer(tiny("train.images=4"), data, run, "cpu").train()
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny()))
    command = [sys.executable, "-m", "cocosctl", "train", tmp_path / "config.yaml", "--data", data, "-o", run, "-q"]
    limited = textwrap.dedent(LIMITED)
    done = subprocess.run(
        [sys.executable, "-c", limited, *command], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1 and "state-000000008.pt: cannot write: File too large" in done.stderr
    assert [path.name for path in (run / "checkpoints").glob("*.pt")] == ["state-000000004.pt"]
    assert not list(run.rglob(".tmp-*"))
    Trainer(tiny(), data, run, "cpu").train()
    assert differences(state(run, 8), state(finished[0], 8)) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot hold a process to one core")
def test_a_core_is_enough_for_a_run_that_asks_for_more_loading_processes(data, tmp_path):
    """PyTorch warns of more loading processes than cores; nobody has to read that."""
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny("train.images=2", "train.workers=2")))
    command = [
        sys.executable,
        "-m",
        "cocosctl",
        "train",
        tmp_path / "config.yaml",
        "--data",
        data,
        "-o",
        tmp_path / "r",
    ]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ONE_CORE), *command, "-q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def damaged(tmp_path):
    """A prepared folder, and the path of a picture in it that is not whole."""
    folder = prepared_folder(tmp_path / "data")
    picture = folder / "images" / "3.png"
    picture.write_bytes(picture.read_bytes()[:60])
    return folder, picture


def test_a_damaged_picture_ends_the_run_with_its_state_saved_and_mended_it_goes_on(damaged, data, tmp_path, finished):
    folder, picture = damaged
    run = tmp_path / "run"
    with pytest.raises(DataError, match="images/3.png") as caught:
        Trainer(tiny("train.workers=1", "train.save_images=1000"), folder, run, "cpu").train()
    assert "Traceback" not in str(caught.value)
    assert len(list((run / "checkpoints").glob("state-*.pt"))) == 1
    picture.write_bytes((data / "images" / "3.png").read_bytes())
    Trainer(tiny("train.save_images=1000"), folder, run, "cpu").train()
    assert differences(state(run, 8)["model"], state(finished[0], 8)["model"]) == []


def test_what_would_end_a_run_at_its_first_validation_is_said_at_its_start(damaged, data, tmp_path, monkeypatch):
    for variable in ("COCOSCTL_WEIGHTS_DIR", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")
    run = tmp_path / "run"
    with pytest.raises((MissingWeights, MissingDependency)):
        Trainer(tiny("train.val_metric=fid", "train.val_images=8"), data, run, "cpu").train()
    folder, picture = damaged
    picture.rename(folder / "images" / "5.png")  # a held-out one
    with pytest.raises(DataError, match="images/5.png"):
        Trainer(tiny(), folder, run, "cpu").train()
    assert not run.exists()


def test_leftovers_of_a_killed_save_are_removed(data, tmp_path):
    for folder in ("", "checkpoints", "samples"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".tmp-left.pt").write_bytes(b"half")
    Trainer(tiny("train.images=2"), data, tmp_path, "cpu").train()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_run_folder_that_cannot_be_changed_is_said_in_one_line(data, tmp_path):
    (tmp_path / "stopped").mkdir()  # stands in for a folder that is read-only, which it never is for root
    with pytest.raises(OutputError, match="stopped: cannot write"):
        Trainer(tiny(), data, tmp_path, "cpu").train()


def test_without_room_in_shared_memory_the_run_ends_with_the_remedy(data, tmp_path):
    """As in a container, whose /dev/shm has 64 MB unless it is asked for more."""
    small = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o size=100k none /dev/shm && exec "$@"', "bash"]
    if not shutil.which("unshare") or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny("train.workers=1", "train.batch=8")))
    command = [*small, *COCOSCTL, "train", tmp_path / "config.yaml", "--data", data, "-o", tmp_path / "run", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and "train.workers=0" in done.stderr, done.stderr


def loading(process, behind_a_server=False):
    """Process ids of a trainer's loading processes, once it has them; they may be children of its children."""
    deadline, found = time.monotonic() + 90, []
    while not found and time.monotonic() < deadline:
        time.sleep(0.1)
        found = children(process.pid)
        if behind_a_server:
            found = [pid for server in found for pid in children(server)]
    return found


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def are_gone(pids, seconds):
    """Whether these processes end within the time."""
    deadline = time.monotonic() + seconds
    while (left := any(Path(f"/proc/{pid}").exists() for pid in pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the loading processes")
def test_a_signal_to_the_whole_group_still_saves(data, tmp_path):
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny("train.images=40000", "train.workers=1")))
    command = [*COCOSCTL, "train", tmp_path / "config.yaml", "--data", data, "-o", tmp_path / "run", "-q"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    workers = loading(process)
    while not (tmp_path / "run" / "stats.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75 and errors.count("\n") == 1, errors
    assert list((tmp_path / "run" / "checkpoints").glob("state-*.pt"))
    assert workers and are_gone(workers, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the loading processes")
@pytest.mark.parametrize("method", ["fork", "forkserver"])  # the latter is Python's own choice from 3.14 on
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_loading_process_that_is_stuck_ends_with_the_trainer(data, tmp_path, number, method):
    """The second Ctrl-C interrupts at once."""
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny("train.workers=1")))
    (tmp_path / "stuck.py").write_text(textwrap.dedent(STUCK))
    command = [sys.executable, tmp_path / "stuck.py", tmp_path / "config.yaml", data, tmp_path / "run", method]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    workers = loading(process, behind_a_server=method == "forkserver")
    time.sleep(1)
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.5)
    process.wait(timeout=30)
    assert workers and are_gone(workers, 10)


def test_a_run_whose_numbers_stay_not_finite_gives_up_with_its_state_saved(data, tmp_path):
    config = tiny(*(f"train.{key}=50" for key in ("images", "save_images", "sample_images")))
    trainer = Trainer(config, data, tmp_path, "cpu")
    with torch.no_grad():
        trainer.networks.mapping.to_rgb.bias.fill_(float("nan"))
    with pytest.raises(ConfigError, match="20 steps in a row were not finite"):
        trainer.train()
    assert state(tmp_path, 2 * SKIP_LIMIT)["skipped"] == SKIP_LIMIT
    assert sum("step skipped" in line.get("note", "") for line in stats(tmp_path)) == SKIP_LIMIT


def test_the_adversarial_loss_sets_in_when_it_is_told_to(data, tmp_path):
    Trainer(tiny("train.adv_start=4"), data, tmp_path, "cpu").train()
    assert ["adv" in line for line in stats(tmp_path)] == [False, False, True, True]


def test_loading_processes_change_nothing(data, tmp_path, finished):
    Trainer(tiny("train.workers=1"), data, tmp_path, "cpu").train()
    assert differences(state(tmp_path, 8), state(finished[0], 8)) == []


def test_a_run_can_start_from_a_model_and_does_not_need_it_again(data, tmp_path, finished):
    model = tmp_path / "start.safetensors"
    model.write_bytes(finished[2].read_bytes())
    config = tiny(f"train.init={model}", "train.images=2")
    trainer = Trainer(config, data, tmp_path / "run", "cpu")
    assert differences(trainer.networks.model.state_dict(), load_file(model)) == []
    trainer.train()
    model.unlink()
    Trainer(tiny(f"train.init={model}", "train.images=4"), data, tmp_path / "run", "cpu").train()
    with pytest.raises(MissingWeights, match="start.safetensors"):
        Trainer(config, data, tmp_path / "other", "cpu")


def test_a_start_of_another_shape_is_refused(data, tmp_path, finished):
    config = tiny(f"train.init={finished[2]}", "model.kind=spade")
    with pytest.raises(CheckpointError, match="does not fit the config at hand: missing style_encoder"):
        Trainer(config, data, tmp_path, "cpu")


def test_averages_leave_out_what_has_no_value():
    averages = Averages()
    for value in (1.0, float("nan"), 3.0):
        averages.add({"a": torch.tensor(value), "b": torch.tensor(float("nan"))})
    assert averages.take() == {"a": 2.0} and averages.take() == {}


def test_the_log_drops_what_will_be_done_again_and_half_a_line(tmp_path):
    log = RunLog(tmp_path / "stats.jsonl")
    for images in (2, 4, 6):
        log.write(images, {"total": float("inf")})
    with open(log.path, "a") as stream:
        stream.write('{"images": 8, "to')
    log.rewind(4)
    assert stats(tmp_path) == [{"images": 2, "total": None}, {"images": 4, "total": None}]
