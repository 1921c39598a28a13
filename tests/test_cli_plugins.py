"""Commands that other packages add: found by name, imported on use, and harmless when broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import lines, run


def install(folder: Path, package: str, entry_points: str, modules: dict[str, str]) -> Path:
    """Lay a distribution into `folder` as an installer would."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nSummary: What {package} does.\n"
    )
    (metadata / "entry_points.txt").write_text(f"[cocosctl.plugins]\n{entry_points}\n")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    return folder


@pytest.fixture
def site(tmp_path):
    """One good package with a function and an app, and one that cannot be imported."""
    install(
        tmp_path,
        "greeter",
        "greet = greeter:greet\ngreets = greeter:app\nprepare = greeter:greet",
        {
            "greeter": '''
import sys, typer
print("greeter is imported", file=sys.stderr)
if "--check" in sys.argv: print("hello from greeter")
app = typer.Typer()
@app.command()
def hello(): print("hello")
@app.command()
def bye(): print("bye")
def greet(name: str, loud: bool = False):
    """Greet somebody."""
    print(name.upper() if loud else name)
'''
        },
    )
    install(
        tmp_path,
        "broken",
        "crash = broken:main\nabsent = broken_too:main\nnothing = greeter:nothing\nquits = quits:main",
        {"broken": "raise RuntimeError('out of order')", "quits": "import sys\nsys.exit('no licence')"},
    )
    return str(tmp_path)


def test_root_help_lists_them_without_importing(site):
    done = run("--help", PYTHONPATH=site)
    assert done.returncode == 0 and done.stderr == ""
    assert "greet " in done.stdout and "What greeter does." in done.stdout and "crash" in done.stdout


def test_a_function_is_a_command(site):
    done = run("greet", "ann", "--loud", PYTHONPATH=site)
    assert (done.returncode, done.stdout) == (0, "ANN\n")
    assert "Greet somebody." in run("greet", "--help", PYTHONPATH=site).stdout


def test_an_app_is_a_group(site):
    assert run("greets", "bye", PYTHONPATH=site).stdout == "bye\n"


@pytest.mark.parametrize(
    "name, reason", [("crash", "out of order"), ("absent", "broken_too"), ("nothing", "nothing"), ("quits", "licence")]
)
def test_a_broken_one_costs_only_itself(site, name, reason):
    done = run(name, PYTHONPATH=site)
    assert (done.returncode, done.stdout) == (5, "")
    said = [line for line in done.stderr.splitlines() if line != "greeter is imported"]
    assert len(said) == 1 and "broken" in said[0] and reason in said[0]
    assert run("config", "list", PYTHONPATH=site).returncode == 0


def test_a_built_in_command_cannot_be_replaced(site):
    assert "Turn a folder of pictures" in run("prepare", "--help", PYTHONPATH=site).stdout


def test_a_package_without_metadata_costs_nobody_anything(site):
    bare = Path(site) / "bare-1.0.dist-info"
    bare.mkdir()
    (bare / "entry_points.txt").write_text("[cocosctl.plugins]\nbare = greeter:greet [fast]\n")
    rows = lines(run("plugins", "list", "--json", PYTHONPATH=site).stdout)
    assert next(row["package"] for row in rows if row["name"] == "bare") == "unknown"
    assert run("bare", "ann", PYTHONPATH=site).stdout == "ann\n"


def test_plugins_list_says_what_is_there(site):
    rows = {
        row["name"]: row
        for row in lines(run("plugins", "list", "--json", "--check", PYTHONPATH=site).stdout)
        if row["package"] in ("greeter", "broken")
    }
    assert rows["greet"]["state"] == "loads" and "out of order" in rows["crash"]["state"]
    assert "no licence" in rows["quits"]["state"]
    assert rows["prepare"]["state"].startswith("hidden") and rows["greet"]["kind"] == "command"
    assert "did you mean 'greet'" in run("greeet", PYTHONPATH=site).stderr


def test_plugins_list_needs_no_torch(site, tmp_path):
    """It is what one looks at where something does not load, and PyTorch takes seconds."""
    (tmp_path / "torch.py").write_text("raise ImportError('of another machine')")
    done = run("plugins", "list", PYTHONPATH=site)
    assert done.returncode == 0 and "greet " in done.stdout and done.stderr == ""


def test_plugins_list_tells_of_metrics_and_extractors_too(tmp_path):
    for package in ("apples", "pears"):
        install(tmp_path, package, "", {package: "class Gap: pass"})
        points = (
            f"[cocosctl.metrics]\ngap = {package}:Gap\nswd = {package}:Gap\n[cocosctl.extractors]\nink = absent:ink\n"
        )
        (tmp_path / f"{package}-1.0.dist-info/entry_points.txt").write_text(points)
    rows = lines(run("plugins", "list", "--json", "--check", PYTHONPATH=str(tmp_path)).stdout)
    states = {(row["kind"], row["name"], row["package"]): row["state"] for row in rows}
    assert states["metric", "gap", "apples"] == "loads"
    assert "absent" in states["extractor", "ink", "apples"]
    for hidden in (("metric", "gap", "pears"), ("metric", "swd", "apples")):
        assert states[hidden].startswith("hidden")
