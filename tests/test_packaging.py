"""What a plain `pip install` brings, read from the wheel itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info", ".tmp-*")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, so that no build folder is left in them."""
    work = tmp_path_factory.mktemp("wheel")
    for folder in ("cocosctl", "cocosnet", "datasets"):
        shutil.copytree(ROOT / folder, work / folder, ignore=JUNK)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, work)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        work / "dist",
        work,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((work / "dist").glob("*.whl")))


def test_every_module_is_inside(wheel):
    """The list of packages in pyproject.toml is explicit; this says when a new one was forgotten."""
    sources = {
        str(path.relative_to(ROOT)) for package in ("cocosctl", "cocosnet") for path in (ROOT / package).rglob("*.py")
    }
    assert sources - set(wheel.namelist()) == set()


def test_presets_assets_and_cards_are_inside(wheel):
    wanted = [
        *(ROOT / "cocosnet" / "configs").glob("*.yaml"),
        *(path for path in (ROOT / "cocosnet" / "assets").rglob("*") if path.is_file() and path.name[0] != "."),
    ]
    names = {str(path.relative_to(ROOT)) for path in wanted}
    cards = {
        f"cocosnet/dataset_cards/{path.relative_to(ROOT / 'datasets')}" for path in (ROOT / "datasets").rglob("*.md")
    }
    assert names and (names | cards) - set(wheel.namelist()) == set()


def test_only_two_packages_are_importable(wheel):
    """Above all no top-level `datasets`."""
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cocosctl", "cocosnet"}


def test_the_command_and_the_licence_are_declared(wheel):
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    assert "cocosctl = cocosctl.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: MIT" in metadata and f"{info}/licenses/LICENSE" in wheel.namelist()


def test_it_is_small(wheel):
    assert sum(entry.compress_size for entry in wheel.infolist()) < 32e6


def test_what_is_imported_is_declared():
    """Every third-party import of the two packages is a dependency or an extra."""
    import ast

    declared = " ".join(
        PROJECT["project"]["dependencies"] + sum(PROJECT["project"]["optional-dependencies"].values(), [])
    )
    names = {"PIL": "pillow", "yaml": "pyyaml", "pytorch_fid": "pytorch-fid", "skimage": "scikit-image"}
    found = set()
    for path in [*(ROOT / "cocosctl").rglob("*.py"), *(ROOT / "cocosnet").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {module.partition(".")[0] for module in modules}
    foreign = found - set(sys.stdlib_module_names) - {"cocosctl", "cocosnet"}
    assert {name for name in foreign if names.get(name, name) not in declared} == set()
