"""What numba compiles and keeps: never out of date, named where it is damaged, and used by one thread at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from cli_tools import ROOT

pytest.importorskip("numba", reason="needs numba, of the extra `fast`")

# A blend of two opposite vectors is short; SHORTEST says from which length on it is stretched to a cosine.
SCORES = """if True:
    import torch
    from cocosnet.errors import OutputError
    from cocosnet.model import compiled, patchmatch
    y = torch.tensor([[1.0, 0.0], [-0.9, 0.1]]).T.reshape(1, 2, 1, 2)
    field = torch.tensor([0.0, 0.45]).view(1, 1, 2, 1, 1)
    try:
        print(*(f"{engine.evaluate(field, y[..., :1], y).scores.item():.4f}" for engine in (patchmatch, compiled)))
    except OutputError as error:
        print(error)
"""
TWO_THREADS = """if True:
    import threading
    import numba, torch
    from cocosnet.model import compiled
    x = torch.nn.functional.normalize(torch.randn(1, 32, 64, 64), dim=1)
    field = torch.rand(1, 8, 2, 64, 64) * 63
    found = [compiled.evaluate(field, x, x).scores]
    def work():
        found.extend(compiled.evaluate(field, x, x).scores for _ in range(20))
    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(numba.threading_layer(), len(found), all(torch.equal(found[0], scores) for scores in found))
"""


def told(program, folder, **environment):
    """What a program prints that runs in a process of its own on the sources in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder)} | environment
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_compiled_code_follows_its_sources_and_is_named_where_it_is_damaged(tmp_path):
    """A constant of another module than the kernel's counts too: after a checkout the engines must still agree."""
    package = tmp_path / "cocosnet"
    shutil.copytree(ROOT / "cocosnet", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    kept = tmp_path / "kept"
    before = told(SCORES, tmp_path, NUMBA_CACHE_DIR=str(kept)).split()
    assert before[0] == before[1]

    source = package / "model" / "patchmatch.py"
    text = source.read_text()
    assert text.count("SHORTEST = 0.5") == 1
    source.write_text(text.replace("SHORTEST = 0.5", "SHORTEST = 0.05"))
    after = told(SCORES, tmp_path, NUMBA_CACHE_DIR=str(kept)).split()
    assert after[0] == after[1] != before[1]

    for index in kept.rglob("*.nbi"):
        index.write_bytes(b"")
    sentence = told(SCORES, tmp_path, NUMBA_CACHE_DIR=str(kept))
    assert "damaged" in sentence and str(kept) in sentence and "NUMBA_CACHE_DIR" in sentence


def test_threads_take_turns_where_numba_cannot_serve_two():
    """Without OpenMP numba falls back to a layer of its own, which ends the process when two threads meet in it."""
    assert told(TWO_THREADS, ROOT, NUMBA_THREADING_LAYER="workqueue") == "workqueue 61 True"
