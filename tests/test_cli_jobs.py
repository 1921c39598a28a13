"""Names of outputs, and the loop over records: nothing escapes, nothing is lost, nothing stops the others."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import COCOSCTL, clean_environment, draw_pictures, run
from hypothesis import given
from hypothesis import strategies as st

from cocosctl.jobs import name_outputs, run_many, safe_name
from cocosctl.output import Output
from cocosnet.data.records import Record
from cocosnet.errors import DataError
from cocosnet.launcher import place

ANY_TEXT = st.text(min_size=1, max_size=300) | st.text(alphabet="./\\~ab\0\n", min_size=1)


@given(ANY_TEXT)
def test_any_id_names_a_file_in_the_folder(identifier):
    path = Path("out") / f"{safe_name(identifier)}.png"
    assert path.parent == Path("out") and path.name.isprintable() and "/" not in path.name
    assert len(path.name.encode()) < 150 and not path.name.startswith(".")


@given(st.lists(ANY_TEXT, min_size=2, unique=True))
def test_no_two_records_have_one_file(identifiers):
    """Not even where an id is what another is called on the disk: then the later one fails."""
    called = [safe_name(identifier) for identifier in identifiers]
    named = list(name_outputs([Record(name) for name in dict.fromkeys(identifiers + called)], Path("out")))
    good = [path for record, path in named if not record.failed]
    assert len(set(good)) == len(good) and set(good) == {path for _, path in named}


def test_plain_ids_stay_as_they_are():
    for identifier in ("0001", "a-b_c.d", "Ärger", "写真"):
        assert safe_name(identifier) == identifier
    assert safe_name("../../etc/passwd").startswith("_.._etc_passwd-")


def test_an_id_that_comes_twice_is_an_error_not_a_lost_output():
    (first, _), (second, _) = name_outputs([Record("a"), Record("a")], Path("out"))
    assert not first.failed and second.failed and "came before" in second.error


def test_an_id_whose_record_failed_is_free(tmp_path):
    failed = Record("a", status="error", error="failed earlier")
    assert [record.failed for record, _ in name_outputs([failed, Record("a"), Record("a")], tmp_path)] == [
        True,
        False,
        True,
    ]


def test_a_stream_whose_picture_was_written_over_says_so(tmp_path):
    """Of a stream nobody knows what it will read later."""
    records = iter([Record("a"), Record("b", exemplar=str(tmp_path / "a.png"))])
    (_, path), (second, _) = name_outputs(records, tmp_path)
    assert second.failed and str(path) in second.error and "'a'" in second.error


def test_a_failed_record_does_not_stop_the_others(capsys):
    def step(record: Record, path: Path) -> Record:
        if record.id == "bad":
            raise DataError("bad.png: not a picture\nat all")
        return Record(record.id, output=str(path))

    before = Record("before", status="error", error="failed earlier", extra={"kept": 1})
    done = run_many([Record("a"), Record("bad"), before, Record("b")], Path("out"), step, Output())
    assert [record.status for record in done] == ["ok", "error", "error", "ok"]
    assert done[2].extra == {"kept": 1} and done[2].error == "failed earlier"
    shown = capsys.readouterr()
    assert shown.out == "out/a.png\nout/b.png\n"
    assert shown.err.splitlines() == [
        "cocosctl: error: bad: bad.png: not a picture\\nat all",
        "cocosctl: error: before: failed earlier",
    ]


def test_processes_that_cannot_meet_are_told_how_to_start():
    done = run("translate", "-m", "demo", "-w", "demo", "-o", "out", "--dry-run", WORLD_SIZE="2", RANK="0")
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "MASTER_ADDR" in done.stderr and "torchrun" in done.stderr


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK"])
def test_a_launchers_number_that_is_none_is_one_line(variable):
    environment = {"WORLD_SIZE": "2"} | {variable: "two"}
    done = run("translate", "-m", "demo", "-w", "demo", "-o", "out", "--dry-run", **environment)
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"{variable}=two" in done.stderr


def test_a_launchers_variable_that_is_empty_counts_as_absent(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert place() == (0, 1)


def test_a_meeting_place_that_another_program_holds_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = run("translate", "-m", "demo", "-w", "demo", "-o", "out", WORLD_SIZE="2", RANK="0", **meeting)
    said = [line for line in done.stderr.splitlines() if line.startswith("cocosctl:")]  # PyTorch tells of it, too
    assert done.returncode == 3 and len(said) == 1 and "torchrun" in said[0]


def test_a_working_folder_that_was_deleted_is_one_line():
    command = f"cd $(mktemp -d) && rmdir $PWD && exec {sys.executable} -m cocosctl doctor"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "working folder" in done.stderr


def test_processes_that_cannot_be_started_are_one_line_that_says_what_they_need(tmp_path):
    draw_pictures(tmp_path / "photos", 3)
    command = f"ulimit -n 16; exec {' '.join(COCOSCTL)} prepare photos -o out --size 32 --workers 2"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environment(),
    )
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "--workers 0" in done.stderr, done.stderr


def test_on_a_terminal_a_path_does_not_end_the_line_of_the_bar(tmp_path):
    draw_pictures(tmp_path / "photos", 4)
    ours, theirs = pty.openpty()
    command = [*COCOSCTL, "prepare", "photos", "-o", "out", "--size", "32"]
    environment = clean_environment(TERM="xterm", COLUMNS="120")
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # where the other side is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    rows = re.findall(rb"[^\r\n]*out/conditions/p\d\.png\r\n", seen)
    assert process.wait() == 0 and b"pictures" in seen
    assert rows == [b"\x1b[2K" + bytes(tmp_path / f"out/conditions/p{number}.png") + b"\r\n" for number in range(4)]
