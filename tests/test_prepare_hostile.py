"""`prepare` among files that are none, on disks that are full, and with Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cli_tools import COCOSCTL, clean_environment, draw_pictures, lines, run
from hostile_files import lay_out, picture, png
from PIL import Image

from cocosnet.data.images import load_rgb
from cocosnet.data.png import ADAM7, png_bytes
from cocosnet.data.records import read_manifest
from cocosnet.errors import DataError


def prepare(source: Path, output: Path, *options: object) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr, and the peak of memory in MB of `cocosctl prepare`."""
    command = [*COCOSCTL, "prepare", str(source), "-o", str(output), "--size", "48", *map(str, options)]
    with open(output.with_suffix(".stdout"), "w+") as told, open(output.with_suffix(".stderr"), "w+") as said:
        process = subprocess.Popen(command, stdout=told, stderr=said, env=clean_environment())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0), said.seek(0)
        return process.returncode, told.read(), said.read(), usage.ru_maxrss / 1024


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], tuple[int, str, str, float]]:
    """A folder with the prepared hostile one, the names of its bad files, and what `prepare` told."""
    folder = tmp_path_factory.mktemp("hostile")
    good, bad = lay_out(folder / "photos")
    assert (len(good), len(bad)) == (50, 200)
    return folder, bad, prepare(folder / "photos", folder / "out", "--edges", "hed-small", "--json")


def test_two_hundred_bad_files_cost_two_hundred_records(hostile, tmp_path: Path) -> None:
    folder, bad, (code, told, said, memory) = hostile
    records = lines(told)
    failed = {record["source"]: record["error"] for record in records if record["status"] == "error"}
    assert code == 4 and len(records) == 250 and len(failed) == 200
    assert sorted(failed) == sorted(_shown(name) for name in bad)
    for source, error in failed.items():
        assert source in error and error.isprintable() and len(error) > len(source) + 10
    assert said.count("\n") == 201 and "50 done, 0 up to date, 200 failed" in said
    assert len(read_manifest(folder / "out")) == 50
    assert len(lines((folder / "out/errors.jsonl").read_text())) == 200
    (tmp_path / "few").mkdir()
    picture(1).save(tmp_path / "few/one.png")
    _, _, _, alone = prepare(tmp_path / "few", tmp_path / "out-few", "--edges", "hed-small")
    assert memory < alone + 200


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)[1:-1]


def test_odd_but_good_files_are_prepared_right(hostile) -> None:
    told = hostile[2][1]
    made = {
        record["source"]: np.asarray(Image.open(record["target"]), float)
        for record in lines(told)
        if "target" in record
    }

    def expected(seed: int, mode: str = "RGB") -> np.ndarray:
        return np.asarray(picture(seed).convert(mode).convert("RGB").resize((48, 64), Image.Resampling.LANCZOS), float)

    for name, seed, mode in (
        *(("cmyk.jpg", 2, "RGB"), ("sixteen bits.png", 1, "L"), ("palette.png", 3, "RGB"), ("moving.gif", 6, "RGB")),
        *(("really a png.jpg", 5, "RGB"), ("transparent.webp", 9, "RGB"), ("grey and alpha.png", 10, "L")),
    ):
        assert np.abs(made[name] - expected(seed, mode)).mean() < 8, name
    assert made["turned.jpg"].shape == (48, 64, 3)  # 72x96, a quarter turn to the right
    assert np.abs(made["turned.jpg"] - np.rot90(expected(4), -1)).mean() < 8


def test_bytes_of_a_png_are_counted_right(tmp_path: Path) -> None:
    for mode, bits in (("1", 1), ("L", 8), ("RGB", 24), ("RGBA", 32), ("I;16", 16), ("LA", 16)):
        for size in ((1, 1), (3, 5), (8, 8), (37, 21)):
            Image.new(mode, size).save(tmp_path / "a.png")
            assert png_bytes(tmp_path / "a.png") == (size[1] * (1 + (size[0] * bits + 7) // 8),) * 2
            assert load_rgb(tmp_path / "a.png").size == size  # all zeros, and whole


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (37, 21)])
def test_interlaced_pngs_are_counted_right(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    passes = [pixels[y::down, x::across] for x, y, across, down in ADAM7]
    rows = [b"\0" + row.tobytes() for part in passes if part.size for row in part]
    (tmp_path / "whole.png").write_bytes(png(*size, b"".join(rows), interlaced=1))
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "whole.png")), pixels)
    (tmp_path / "less.png").write_bytes(png(*size, b"".join(rows[:-1]), interlaced=1))
    with pytest.raises(DataError, match="rows are missing|truncated"):
        load_rgb(tmp_path / "less.png")


def test_a_folder_that_may_not_be_listed_is_one_error(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 2)
    draw_pictures(photos / "locked", 1)
    (photos / "locked").chmod(0)
    try:
        if os.access(photos / "locked", os.R_OK):
            pytest.skip("permissions do not bind the superuser")
        code, told, said, _ = prepare(photos, tmp_path / "out", "--edges", "hed-small", "--json")
    finally:
        (photos / "locked").chmod(0o755)
    assert code == 4 and [record["status"] for record in lines(told)].count("ok") == 2
    assert "locked" in said and "cannot list this folder" in said


def test_a_dry_run_waits_for_no_pipe(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 1)
    os.mkfifo(photos / "pipe.png")
    done = run("prepare", photos, "-o", tmp_path / "out", "--edges", "hed-small", "--dry-run", "--json")
    assert [record["status"] for record in lines(done.stdout)] == ["ok", "error"]
    assert "no file" in done.stderr and done.returncode == 4


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails alike, at the first picture that is too big."""
    photos = draw_pictures(tmp_path / "photos", 3)
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "q.png")
    command = f"ulimit -f 64; exec {' '.join(COCOSCTL)} prepare {photos} -o {tmp_path}/out --size 256 --edges hed-small"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 3 and done.stderr.count("error:") == 1
    assert "q.png" in done.stderr and "cannot write" in done.stderr and "free space" in done.stderr
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    again = run("prepare", photos, "-o", tmp_path / "out", "--size", 256, "--edges", "hed-small")
    assert again.returncode == 0 and "up to date" in again.stderr
    assert " 0 up to date" not in again.stderr and len(read_manifest(tmp_path / "out")) == 4


def started(command: list[object]) -> subprocess.Popen[str]:
    """A running `cocosctl`, in a process group of its own, as a terminal would have started it."""
    return subprocess.Popen(
        [*COCOSCTL, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    )


def helpers_of(process: subprocess.Popen) -> list[int]:
    """The processes that make pictures for this one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_ctrl_c_is_one_line_while_the_helpers_still_start(tmp_path: Path, seconds: float) -> None:
    photos = draw_pictures(tmp_path / "photos", 24, (400, 300))
    running = started(["prepare", photos, "-o", tmp_path / "out", "--edges", "hed-small", "--workers", 2])
    deadline = time.monotonic() + 120
    while len(helpers_of(running)) < 2:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and said == "cocosctl: interrupted\n"


def test_a_second_ctrl_c_adds_no_line(tmp_path: Path) -> None:
    """From an impatient user, or from `timeout`, which tells the process and then its group."""
    photos = draw_pictures(tmp_path / "photos", 24, (400, 300))
    process = started(["prepare", photos, "-o", tmp_path / "out", "--edges", "hed-small", "--workers", 2])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out/.stamps/[!.]*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said == "cocosctl: interrupted\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_is_one_line_and_the_next_run_goes_on(tmp_path: Path, workers: int) -> None:
    photos = draw_pictures(tmp_path / "photos", 24, (400, 300))
    command = ["prepare", photos, "-o", tmp_path / "out", "--size", 256, "--edges", "hed-small", "--workers", workers]
    process = started(command)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out/.stamps/[!.]*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said == "cocosctl: interrupted\n"
    made = len(list(tmp_path.glob("out/.stamps/[!.]*.json")))
    assert 3 <= made < 24
    again = run(*command, "--json")
    assert [record["status"] for record in lines(again.stdout)].count("skipped") >= made
    assert json.loads((tmp_path / "out/dataset.json").read_text())["pictures"] == 24


def test_a_killed_helper_is_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 40, (300, 260))
    command = [*COCOSCTL, "prepare", str(photos), "-o", str(tmp_path / "out"), "--edges", "hed-small", "--size", "256"]
    with open(tmp_path / "said", "w+") as said:
        running = subprocess.Popen(
            [*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=said, env=clean_environment()
        )
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out/.stamps/[!.]*.json"))) < 2:
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.01)
        os.kill(helpers_of(running)[-1], signal.SIGKILL)
        assert running.wait(timeout=120) == 75
        said.seek(0)
        lines_said = said.read().splitlines()
    assert len(lines_said) == 1 and "fewer --workers" in lines_said[0]
    made = len(list(tmp_path.glob("out/.stamps/[!.]*.json")))
    left = lines(run(*command[len(COCOSCTL) :], "--dry-run", "--json").stdout)
    assert made >= 2 and [record["status"] for record in left].count("skipped") == made
