"""`prepare` with many pictures: several at once through a network, several processes, and what the user sees of it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_tools import COCOSCTL, TORCHRUN, clean_environment, draw_pictures, lines, run
from PIL import Image

from cocosnet.config import Config, DataConfig, PrepareConfig
from cocosnet.data.prepare import prepare
from cocosnet.data.records import read_manifest


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "conditions").iterdir())}


def test_what_a_batch_finds_depends_on_no_neighbour(shared: Path, tmp_path: Path, monkeypatch) -> None:
    """A picture's numbers may not depend on which others were still to be made."""
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(shared / "weights"))
    photos = draw_pictures(tmp_path / "photos", 6, (300, 260))
    draw_pictures(photos / "tall", 3, (40, 60))
    (photos / "bad.png").write_bytes(b"no picture")

    def made(name: str, batch: int, *limits: int | None) -> Path:
        settings = Config(DataConfig(size=64), prepare=PrepareConfig(pairs="retrieval", batch=batch))
        for limit in limits:
            list(prepare(photos, tmp_path / name, settings, extractor="hed-small", limit=limit))
        return tmp_path / name

    alone, at_once, by_parts = made("alone", 1, None), made("at-once", 4, None), made("by-parts", 4, 2, 5, None)
    for name, edges in pixels(at_once).items():
        assert np.array_equal(edges, pixels(by_parts)[name])
        assert np.abs(edges.astype(int) - pixels(alone)[name]).max() <= 2
    for path in (at_once / ".features").iterdir():
        assert path.read_bytes() == (by_parts / ".features" / path.name).read_bytes()
        assert np.dot(np.load(path), np.load(alone / ".features" / path.name)) > 0.99999
    assert len(read_manifest(at_once)) == 9


def test_one_face_without_a_hull_does_not_spoil_its_batch(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 4, (90, 80))
    rng = np.random.default_rng(0)
    faces = {f"p{n}.png": {"points": (rng.random((68, 2)) * 60 + 10).tolist()} for n in range(4)}
    faces["p2.png"] = {"points": [[5, 5]] * 68}
    (tmp_path / "points.json").write_text(json.dumps(faces))
    data = DataConfig(size=64, edges="hed-small-face", landmarks=str(tmp_path / "points.json"))
    records = list(prepare(photos, tmp_path / "out", Config(data, prepare=PrepareConfig(batch=4))))
    assert [record.status for record in records] == ["ok", "ok", "error", "ok"]
    assert "span a face" in records[2].error and "p2.png" in records[2].error
    assert records[0].extra["condition_source"]["landmarks"] == "from a file"


def install_troublemaker(folder: Path) -> str:
    """A package whose extractors fail in the second process: one when it is asked for, one at its second picture."""
    folder.mkdir()
    (folder / "trouble.py").write_text(
        "import os, signal\n"
        "from cocosnet.errors import MissingWeights\n"
        "second = os.environ.get('RANK') == '1'\n"
        "class Edges:\n"
        "    name, task, provenance, seen = 'edges', 'edge', {'network': 'edges'}, 0\n"
        "    def __call__(self, image, size=None):\n"
        "        self.seen += 1\n"
        "        if second and self.seen == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return image.convert('L').resize((size, size))\n"
        "def dies(device): return Edges()\n"
        "def lacks(device):\n"
        "    if second: raise MissingWeights('the second machine has no weights; copy them')\n"
        "    return Edges()\n"
    )
    info = folder / "trouble-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cocosctl.extractors]\ndies = trouble:dies\nlacks = trouble:lacks\n")
    return str(folder)


@pytest.mark.parametrize(("name", "said"), [("lacks", "the second machine has no weights"), ("dies", "")])
def test_a_process_that_fails_leaves_no_other_waiting(name: str, said: str, tmp_path: Path) -> None:
    site, photos = install_troublemaker(tmp_path / "site"), draw_pictures(tmp_path / "photos", 8, (32, 32))
    command = ["prepare", str(photos), "--size", "32", "--extractor", name, "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        [*TORCHRUN, *command], capture_output=True, text=True, env=clean_environment(PYTHONPATH=site), timeout=250
    )
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("cocosctl: error:") == bool(said) and said in done.stderr
    again = run(*command, PYTHONPATH=site)
    assert again.returncode == 0 and len(lines(again.stdout)) == 8


def test_a_dry_run_in_several_processes_speaks_once(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 3)
    command = ["prepare", str(photos), "--size", "32", "--edges", "hed-small", "-o", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0 and done.stdout.count("p0.png") == 1 and "3 of 3 pictures" in done.stderr


def test_a_terminal_sees_rate_and_time_left_and_a_pipe_nothing(shared: Path, tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 14, (300, 260))
    weights = {"COCOSCTL_WEIGHTS_DIR": str(shared / "weights")}
    command = ["prepare", photos, "--size", 128, "--edges", "hed-small", "--pairs", "retrieval", "-o", tmp_path / "out"]
    ours, theirs = pty.openpty()
    environment = clean_environment(**weights, TERM="xterm", COLUMNS="120")
    words = [*COCOSCTL, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side was closed
            break
        if not piece:
            break
        seen += piece
    told = process.communicate()[0]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert process.returncode == 0 and len(told.splitlines()) == 14
    assert re.search(r"\b([1-9]|1[0-3])/14\b", text), "the bar moves before the records come, which is at the end"
    assert re.search(r"\d/s", text) and re.search(r"left +\d+:\d\d:\d\d", text)
    piped = run(*command, "--overwrite", **weights)
    assert piped.stderr == "cocosctl: 14 done, 0 up to date, 0 failed\n"


def test_a_second_run_loads_no_network(shared: Path, tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 4)
    script = (
        "import sys\nfrom torch.nn.modules.module import register_module_module_registration_hook as watch\n"
        "from cocosctl.app import run\ncount = []\nwatch(lambda *parts: count.append(parts))\n"
        "code = run(sys.argv[1:])\nprint(code, len(count), file=sys.stderr)\n"
    )
    command = ["prepare", photos, "--size", 32, "--edges", "hed", "--pairs", "retrieval", "-o", tmp_path / "out"]
    for loads in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, command)],
            capture_output=True,
            text=True,
            env=clean_environment(COCOSCTL_WEIGHTS_DIR=str(shared / "weights")),
        )
        code, count = map(int, done.stderr.splitlines()[-1].split())
        assert code == 0 and (count > 0) == loads
