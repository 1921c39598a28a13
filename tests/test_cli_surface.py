"""The surface of the command line: small, frozen, documented, and quick to show."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from cli_tools import ROOT, broken_torchvision, clean_environment, run

import cocosnet
from cocosctl.registry import ALIASES, COMMANDS, load_command
from cocosnet.weights import weight_file

SURFACE = ROOT / "tests" / "cli_surface.txt"


def test_surface_is_frozen():
    """Every command and flag is listed in cli_surface.txt; a change there is a decision, not an accident."""
    assert "\n".join(describe()) + "\n" == SURFACE.read_text()


def describe() -> list[str]:
    found = [f"{alias} = {name}" for alias, name in ALIASES.items()]
    for command in COMMANDS:
        found += _lines(command.name, load_command(command))
    return sorted(found)


def _lines(path: str, command) -> list[str]:
    if hasattr(command, "commands"):
        return [line for name, child in command.commands.items() for line in _lines(f"{path} {name}", child)]
    options = sorted("/".join(sorted(p.opts)) if p.opts[0].startswith("-") else p.name.upper() for p in command.params)
    return [f"{path}: {' '.join(options)}"]


def test_help_page_is_up_to_date():
    """docs/cli.md holds what the commands say; `make docs` writes it."""
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_cli.py"],
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
        cwd=ROOT,
    ).stdout
    if made != (ROOT / "docs" / "cli.md").read_text() and version("typer").split(".")[:2] != ["0", "29"]:
        pytest.skip("docs/cli.md was made with Typer 0.29, which lays help out in its own way")
    assert made == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`"


def test_help_is_quick_and_imports_no_torch():
    """In processor time, which other work on the machine does not stretch; idle, it is the time on the clock."""

    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        start = seconds()
        assert run("--help").returncode == 0
        times.append(seconds() - start)
    assert min(times) < 0.3

    report = (
        "import sys; sys.argv[1:] = ['--help']\nfrom cocosctl.app import run\nrun(['--help'])\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'PIL', 'rich'}))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, env=clean_environment(), check=True
    )
    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("loaded", ["typer", "cocosctl.app", "cocosctl.registry"])
def test_an_interrupt_while_the_command_loads_is_told_in_one_line(loaded, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupted:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {loaded!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted)\n"
    )
    command = Path(sys.executable).parent / "cocosctl"
    for start in ([command], [sys.executable, "-m", "cocosctl"]):
        environment = clean_environment(PYTHONPATH=str(tmp_path))
        ended = subprocess.run([*start, "--version"], capture_output=True, text=True, env=environment)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "cocosctl: interrupted\n")


@pytest.mark.parametrize(
    "command", ["prepare", "train", "translate", "warp-visualize", "eval", "weights list", "doctor"]
)
def test_help_of_a_command_imports_no_torch(command):
    code = (
        f"import sys\nfrom cocosctl.app import run\nrun({command.split()} + ['--help'])\nprint('torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(), check=True
    )
    assert shown.stdout.splitlines()[-1] == "False"


def test_version():
    assert run("--version").stdout == f"cocosctl {cocosnet.__version__}\n"


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_aliases_are_the_same_command(alias, name):
    usage, rest = run(alias, "--help").stdout.split("\n", 1)
    assert usage.startswith(f"Usage: cocosctl {alias}") and rest == run(name, "--help").stdout.split("\n", 1)[1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["trnslate"], "did you mean 'translate'?"),
        (["prepare"], "Missing argument 'SOURCE'"),
        (["prepare", "x", "-o", "y", "--task", "mosk"], "'mosk'"),
        (["prepare", "x", "-o", "y", "--nope"], "No such option: --nope"),
        (["translate", "a.png", "-o", "o.png", "-w", "demo"], "CONDITION and EXEMPLAR"),
        (["translate", "a.png", "b.png", "-m", "-", "-o", "o", "-w", "demo"], "not both"),
        (["eval", "--metrics", "psnr"], "--outputs and --targets"),
        (["eval", "--metrics", "psnr", "-m", "-", "--outputs", "x"], "not both"),
        (["eval", "--metrics", "swd", "--outputs", "x", "--targets", "y", "--seed", 2**63], "'--seed'"),
        (["prepare", "x", "-o", "y", "--task", "edge", "--seed", -1], "'--seed'"),
        (["eval", "--metrics", "l1", "-m", "-", "--scores", "."], "'.' is a directory"),
        (["eval", "--metrics", "l1", "-m", "-", "--scores", "-"], "give the scores a file"),
        (["eval", "--metrics", "l1", "-m", "-", "--report", __file__], "is a file"),
        (["eval", "--metrics", "fid", "--outputs", "x", "--save-stats", "x.stats"], ".npz"),
        (["translate", "-m", "-", "-o", "o", "-w", "demo", "--report", "."], "'.' is a directory"),
        (["translate", "a.png", "b.png", "-o", "c.png", "-w", "demo", "--report", "c.png"], ".html"),
        (["export", "-w", "demo", "-o", "."], "'.' is a directory"),
        (["config"], "Missing command"),
        (["--nope"], "No such option: --nope"),
        (["translate", "a", "b", "-o", "c", "-w", "demo", "--limit", "none"], "valid integer"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr and "--help" in done.stderr


def test_no_command_shows_the_help_on_stderr():
    done = run()
    assert (done.returncode, done.stdout) == (2, "") and "Commands:" in done.stderr


def test_debug_shows_the_traceback_and_keeps_the_code():
    plain, shown = run("config", "show", "nope"), run("config", "show", "nope", COCOSCTL_DEBUG="1")
    assert plain.returncode == shown.returncode == 3
    assert "Traceback" not in plain.stderr and "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


def test_typer_is_the_whole_dependency():
    """Typer carries its own Click; a stray `import click` would work here and fail on a user's machine."""
    assert not any("import click" in path.read_text() for path in (ROOT / "cocosctl").glob("*.py"))
    assert issubclass(typer.BadParameter, typer.TyperException)


def test_config_commands(tmp_path):
    names = run("config", "list").stdout.split()
    assert names
    shown = run("config", "show", names[0])
    (tmp_path / "mine.yaml").write_text(shown.stdout)
    assert run("config", "validate", tmp_path / "mine.yaml").returncode == 0
    assert run("config", "diff", names[0], tmp_path / "mine.yaml").stdout == ""
    changed = run("config", "show", names[0], "--set", "train.batch=7", "--json")
    assert json.loads(changed.stdout)["train"]["batch"] == 7
    (tmp_path / "mine.yaml").write_text("train: {batch: 7, bach: 3}\n")
    wrong = run("config", "validate", tmp_path / "mine.yaml")
    assert wrong.returncode == 3 and "did you mean 'batch'" in wrong.stderr and wrong.stdout == ""
    (tmp_path / "mine.yaml").write_text("train: {batch: 7}\n")
    rows = run("config", "diff", names[0], tmp_path / "mine.yaml", "--json").stdout.splitlines()
    assert {"key", "a", "b"} == set(json.loads(rows[0]))


def test_weights_list_says_what_is_where(tmp_path):
    (tmp_path / "network-bsds500.pytorch").write_bytes(b"x")
    rows = [
        json.loads(line)
        for line in run("weights", "list", "--json", COCOSCTL_WEIGHTS_DIR=str(tmp_path)).stdout.splitlines()
    ]
    by_name = {row["name"]: row for row in rows}
    assert by_name["hed"]["path"] == str(tmp_path / "network-bsds500.pytorch")
    assert {"url", "sha256", "licence", "size"} <= set(by_name["vgg19"])
    text = run("weights", "list", COCOSCTL_WEIGHTS_DIR=str(tmp_path))
    assert "vgg16_caffe_imagenet_fp16.safetensors; needed by" in text.stdout and f"go to {tmp_path}" in text.stderr


def test_doctor_is_one_object():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["torch"] and report["bf16_speedup"] > 0 and "weights.hed" in report
    assert report["package.tensorboard"] and "package.pytest" not in report


def test_doctor_says_which_weights_are_damaged(tmp_path):
    path = tmp_path / weight_file("hed").filename
    path.write_bytes(b"half of it")
    report = json.loads(run("doctor", "--json", COCOSCTL_WEIGHTS_DIR=str(tmp_path)).stdout)
    assert report["weights.hed"].startswith(f"damaged ({path}: sha256 is ")


def test_doctor_finds_a_torchvision_of_another_torch(tmp_path):
    broken_torchvision(tmp_path)
    report = json.loads(run("doctor", "--json", PYTHONPATH=str(tmp_path)).stdout)
    assert "does not load (operator torchvision::nms" in report["torchvision"] and report["bf16_speedup"] > 0


@pytest.mark.parametrize(
    "content", ["raise ImportError('libtorch_cpu.so: failed to map segment')", "from torch._C import nothing_of_this"]
)
def test_a_pytorch_that_does_not_load_is_one_line(tmp_path, content):
    (tmp_path / "torch.py").write_text(content)
    done = run("translate", "-m", "demo", "-w", "demo", "-o", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 5 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "the package torch does not load" in done.stderr
