"""The whole pipe on small pictures with a tiny untrained model: streams, records, exit codes, signals."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_tools import COCOSCTL, TORCHRUN, clean_environment, draw_pictures, lines, run
from metric_tools import accept
from PIL import Image
from safetensors.torch import save_file

from cocosctl import app
from cocosnet import CoCosNet, load_config, weights
from cocosnet.checkpoint import save_model
from cocosnet.data.extractors.hed import HED
from cocosnet.data.records import read_manifest
from cocosnet.errors import is_out_of_memory
from cocosnet.inference import Translator
from cocosnet.model.build import build_model

# Runs the command lines of a JSON list, the second one with 200 MB more than the first has needed.
SHORT_OF_MEMORY = """
import json, resource, sys
from cocosctl.app import run
first, second = json.loads(sys.argv[1])
assert run(first) == 0
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
sys.exit(run(second))
"""
CLI = " ".join([sys.executable, "-m", "cocosctl"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures, their ready-made edges, a prepared dataset of them, and a tiny model."""
    folder = tmp_path_factory.mktemp("pipe")
    draw_pictures(folder / "photos", 6)
    (folder / "edges").mkdir()
    for photo in (folder / "photos").glob("*.png"):
        Image.open(photo).convert("L").point(lambda level: 255 * (level > 128)).save(folder / "edges" / photo.name)
    torch.manual_seed(0)
    save_model(folder / "tiny.safetensors", CoCosNet(load_config("tiny-cpu", ["data.edges=hed-small"])))
    done = run(
        "prepare",
        folder / "photos",
        "-o",
        folder / "prep",
        "--edges",
        "image",
        "--labels",
        folder / "edges",
        "--size",
        32,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert [record["status"] for record in lines(done.stdout)] == ["ok"] * 6
    photos = [str(path) for path in sorted((folder / "photos").iterdir())]
    raw = [{"id": str(i), "condition": photos[i], "exemplar": photos[i + 1]} for i in range(3)]
    (folder / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in raw))
    return folder


@pytest.fixture
def invoke(capfd):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = app.run([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


def bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", "set -o pipefail; " + script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env=clean_environment(),
    )


def test_the_pipe_ends_in_one_object(place):
    done = bash(
        f"{CLI} prepare photos --task edge --edges image --labels edges --size 32 --limit 4 -o P --json"
        f" | {CLI} translate -m - --weights tiny.safetensors -o T --json"
        f" | {CLI} eval -m - --metrics swd,psnr,ssim,l1 --json",
        place,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (result,) = lines(done.stdout)
    assert result["count"] == 4 and result["failed"] == 0 and set(result["metrics"]) == {"swd", "psnr", "ssim", "l1"}
    assert len(list((place / "T").glob("*.png"))) == 4


def test_records_that_are_stored_in_another_folder_are_a_manifest_there(place):
    done = bash(
        f"mkdir far && {CLI} prepare photos --task edge --edges image --labels edges --size 32 --limit 2 -o P3 --json"
        f" > far/pairs.jsonl && {CLI} translate -m far/pairs.jsonl --weights tiny.safetensors -o T3 --json"
        f" > far/made.jsonl && cd far && {CLI} eval -m made.jsonl --metrics psnr --json",
        place,
    )
    assert done.returncode == 0, done.stderr
    assert [(result["count"], result["failed"]) for result in lines(done.stdout)] == [(2, 0)]


@pytest.mark.parametrize(
    "command",
    [
        "prepare photos --edges image --labels edges --size 32 -o Q --json",
        "translate -m prep --weights tiny.safetensors -o Q2 --json",
        "eval -m prep --metrics psnr --json",
        "config show tiny-cpu",
    ],
)
def test_a_reader_that_has_gone_is_found_out_at_once(place, command):
    """141 is what `seq` or `cat` report there; the process says nothing at all of it, not even at its end."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*COCOSCTL, *command.split()],
        cwd=place,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=clean_environment(),
    )
    os.close(theirs)
    assert done.returncode == 141 and not any(word in done.stderr for word in ("Traceback", "Broken", "Exception"))


def test_a_reader_that_leaves_early_is_no_error(place):
    """As `head -n 1` does it: the first record is taken, and the second comes when nobody listens."""
    first, second, *_ = (place / "prep" / "manifest.jsonl").read_text().splitlines(keepends=True)
    process = streaming(place, "../left")
    process.stdin.write(first)
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["status"] == "ok"
    process.stdout.close()
    process.stdin.write(second)
    process.stdin.close()
    assert process.wait(timeout=120) == 141 and process.stderr.read() == ""


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("config list >&-", 0, ""),
        ("config list > /dev/full", 3, "stdout: cannot write: No space left on device"),
        ("--version > /dev/full", 3, "No space left on device"),
        ("config show nope 2>&-", 3, ""),
        ("config show nope 2> /dev/full", 3, ""),
        ("translate -m - -w tiny.safetensors -o never <&-", 3, "no record came in"),
        (f"config show {'x' * 300}", 3, "File name too long"),
        (f"eval --metrics l1 -m '{json.dumps({'id': 'x' * 5000})}'", 3, "File name too long"),
    ],
)
def test_what_the_shell_gives_badly_is_one_line(place, command, code, said):
    """Closed streams, a full disk, and text where a file's name belongs."""
    done = bash(f"{CLI} {command}", place)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, bool(said)) and said in done.stderr, done.stderr
    assert len(done.stderr) < 300


def streaming(place: Path, output: str) -> subprocess.Popen[str]:
    """`cocosctl translate` at work in the prepared folder, on the records that come on its stdin."""
    return subprocess.Popen(
        [*COCOSCTL, "translate", "-m", "-", "-w", "../tiny.safetensors", "-o", output, "--json"],
        cwd=place / "prep",
        text=True,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_records_flow_one_by_one(place):
    """The first record is out before the second is in; Ctrl-C while waiting is exit 130 and one line."""
    records = (place / "prep" / "manifest.jsonl").read_text().splitlines()
    process = streaming(place, "../flow")
    for line in records[:2]:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert answer["id"] == json.loads(line)["id"] and answer["status"] == "ok", answer
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert (process.returncode, rest, said) == (130, "", "cocosctl: interrupted\n")


def test_bad_records_travel_on_and_exit_is_4(place, invoke, monkeypatch):
    good = json.loads((place / "prep" / "manifest.jsonl").read_text().splitlines()[0])
    monkeypatch.chdir(place / "prep")
    (place / "broken.png").write_bytes(b"")
    records = [
        good | {"id": "good", "mine": [1]},
        good | {"id": "no file", "exemplar": "nothing.png"},
        good | {"id": "empty file", "condition": str(place / "broken.png")},
        good | {"id": "earlier", "status": "error", "error": "failed before", "seconds": math.inf, "mine": [math.nan]},
        good | {"id": "NUL", "condition": "a\0b.png"},
        good | {"id": "half a pair", "exemplar": "a\ud800b.png", "output": "a\ud800b.png"},
        good | {"id": "good again"},
    ]
    stream = "\n".join([*map(json.dumps, records), "not json", '{"no": "id"}', ""]) + "\n"
    (place / "mixed.jsonl").write_text(stream)
    done = run("translate", "-m", "-", "-w", place / "tiny.safetensors", "-o", place / "mixed", "--json", stdin=stream)
    out = lines(done.stdout)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert [record["status"] for record in out] == ["ok"] + ["error"] * 5 + ["ok"] + ["error"] * 2
    assert out[0]["mine"] == [1] and out[3]["error"] == "failed before" and out[3]["mine"] == [None]
    assert "Infinity" not in done.stdout and "seconds" not in out[3]  # JSON has no word for it
    assert "nothing.png" in out[1]["error"] and "broken.png" in out[2]["error"]
    assert r"a\x00b.png: no file can have this name" in out[4]["error"] and r"a\ud800b.png" in out[5]["error"]
    assert [record["id"] for record in out[7:]] == ["line-8", "line-9"]
    odd = json.dumps(out[0] | {"id": "odd", "output": "a\ud800b.png"}) + "\n"
    measured = run("eval", "-m", "-", "--metrics", "psnr", "--json", stdin=odd + done.stdout)
    (result,) = lines(measured.stdout)
    assert measured.returncode == 4 and (result["count"], result["failed"]) == (2, 8)


def test_no_output_replaces_a_picture_that_the_run_reads(place, invoke):
    """An id that is an exemplar's stem, straight and through a link, from a file and as a pair."""
    photos, tiny = draw_pictures(place / "mine", 2), place / "tiny.safetensors"
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    (place / "link").symlink_to(photos)
    record = {"condition": str(place / "edges" / "p0.png"), "exemplar": str(photos / "p1.png")}
    records = [record | {"id": "other"}, record | {"id": "p1"}]
    (place / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    for folder in ("mine", "link"):
        code, out, _ = invoke("translate", "-m", place / "mine.jsonl", "-w", tiny, "-o", place / folder, "--json")
        good, bad = lines(out)
        assert code == 4 and good["status"] != "error" and bad["status"] == "error"
        assert str(place / folder / "p1.png") in bad["error"] and str(photos / "p1.png") in bad["error"]
    pair = [place / "edges" / "p0.png", photos / "p1.png", "-o", photos / "p1.png"]
    for command in ("translate", "warp-visualize"):
        code, out, err = invoke(command, *pair, "-w", tiny)
        assert (code, out, len(err.splitlines())) == (3, "", 1) and "would replace" in err
    assert before == {name: (photos / name).read_bytes() for name in before}


def launched(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `cocosctl ARGUMENTS` in two processes under torchrun."""
    words = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=240, env=clean_environment())


@pytest.mark.parametrize("command", ["translate", "warp-visualize"])
def test_two_processes_share_the_records_and_the_first_one_speaks(place, invoke, command):
    """In the manifest's order; a record fails in the second process, and the last turn has nothing for it."""
    records = lines((place / "prep" / "manifest.jsonl").read_text())[:4]
    records[1]["exemplar"] = "nothing.png"
    manifest = place / "prep" / "five.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in [*records, records[0]]))
    options = [command, "-m", manifest, "-w", place / "tiny.safetensors", "--json", "-o"]
    one, two = place / f"one-{command}", place / f"two-{command}"
    alone, both = invoke(*options, one), launched(place, *options, two)
    assert alone[0] == 4 and both.returncode == 1, both.stderr  # torchrun makes 1 of a process's 4
    told = lines(both.stdout)
    assert [record["status"] for record in told] == ["ok", "error", "ok", "ok", "error"]
    assert [record["id"] for record in told] == [record["id"] for record in lines(alone[1])]
    assert both.stderr.count("3 done, 0 up to date, 2 failed") == 1
    made = {path.name: path.read_bytes() for path in two.iterdir()}
    assert len(made) == 3 and made == {path.name: path.read_bytes() for path in one.iterdir()}


def short_of_memory(first: list, second: list) -> subprocess.CompletedProcess[str]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs to know how much memory a process has")
    return subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, json.dumps([first, second], default=str)],
        capture_output=True,
        text=True,
        timeout=240,
        env=clean_environment(),
    )


def test_a_picture_too_large_for_the_memory_does_not_stop_the_others(place, tmp_path):
    Image.new("L", (60000, 32)).save(tmp_path / "long.png")
    Image.new("RGB", (11000, 9000)).save(tmp_path / "wide.png")  # which to decode takes 300 MB alone
    good, exemplar = place / "edges" / "p0.png", place / "photos" / "p1.png"
    files = {"long": tmp_path / "long.png", "wide": tmp_path / "wide.png", "good": good}
    records = [{"id": name, "condition": str(file), "exemplar": str(exemplar)} for name, file in files.items()]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["-w", place / "tiny.safetensors", "-q", "-o", tmp_path / "o.png"]
    many = ["translate", "-m", tmp_path / "m.jsonl", *options[:-1], tmp_path / "o"]
    done = short_of_memory(["translate", good, exemplar, *options], many)
    assert done.returncode == 4 and done.stdout.splitlines()[1:] == [str(tmp_path / "o" / "good.png")], done.stderr
    long, wide = done.stderr.splitlines()
    assert "long.png: 60000x32 px take more memory" in long
    assert "wide.png: reading it takes more memory" in wide


@pytest.mark.parametrize("end, short", [("", True), (" descriptor for the convolution", False)])
def test_what_onednn_says_for_want_of_memory_is_told_from_what_it_does_not_know(end, short):
    """Which of its allocations fails first under a limit is chance."""
    assert is_out_of_memory(RuntimeError(f"could not create a primitive{end}\n")) is short


def test_a_metric_that_needs_more_memory_than_there_is_is_named(tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "big.png")
    (tmp_path / "list.txt").write_text("big.png\n")
    measure = ["eval", "--outputs", tmp_path / "list.txt", "--targets", tmp_path / "list.txt", "-q", "--metrics"]
    done = short_of_memory([*measure, "l1"], [*measure, "ssim"])
    assert (done.returncode, len(done.stdout.splitlines()), len(done.stderr.splitlines())) == (3, 1, 1), done.stderr
    assert "1 big: ssim of 4000x3000 px takes more memory" in done.stderr


def test_processes_cannot_share_stdin():
    for command in (["translate", "-w", "demo", "-o", "never"], ["eval", "--metrics", "psnr"]):
        first, second = (run(*command, "-m", "-", WORLD_SIZE="2", RANK=rank) for rank in "01")
        assert first.returncode == second.returncode == 2 and second.stderr == ""
        assert "cannot share stdin" in first.stderr and len(first.stderr.splitlines()) == 1


def test_what_ends_a_batch_in_one_process_ends_it_in_all(place):
    """A folder is needed where a file is: one line, from the first process."""
    (place / "a file").write_text("")
    done = launched(place, "translate", "-m", "prep", "-w", "tiny.safetensors", "-o", "a file", "--json")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("cocosctl: error: a file/") == 1 and done.stderr.count("cocosctl:") == 1, done.stderr


def test_odd_ids_stay_inside_the_folder(place):
    good = json.loads((place / "prep" / "manifest.jsonl").read_text().splitlines()[0])
    for role in ("condition", "exemplar", "target", "exemplar_condition"):
        good[role] = str(place / "prep" / good[role])
    ids = ["../up", "/root", "new\nline", "Ünï 写真", "a/b", "..", "x" * 500]
    stream = "".join(json.dumps(good | {"id": name}) + "\n" for name in ids)
    done = run("translate", "-m", "-", "-w", place / "tiny.safetensors", "-o", place / "odd", "--json", stdin=stream)
    out = lines(done.stdout)
    assert done.returncode == 0 and [record["id"] for record in out] == ids
    made = {Path(record["output"]) for record in out}
    assert len(made) == len(ids) and all(path.parent == place / "odd" and path.is_file() for path in made)


def test_a_second_run_skips_and_overwrite_does_not(place, invoke):
    command = ("translate", "-m", place / "prep", "-w", place / "tiny.safetensors", "-o", place / "again", "--limit", 2)
    assert invoke(*command)[0] == 0
    code, out, err = invoke(*command)
    assert (code, len(out.splitlines())) == (0, 2) and "2 up to date" in err
    assert "2 done" in invoke(*command, "--overwrite")[2]
    assert invoke(*command, "--quiet")[2] == ""


def test_what_old_weights_made_is_stale_for_those_that_came_while_they_were_in_use(place, tmp_path):
    """As where `translate -m -` waits for its records while a training run saves."""
    checkpoint, record = tmp_path / "model.safetensors", read_manifest(place / "prep")[0]
    save_model(checkpoint, CoCosNet(load_config("tiny-cpu")))
    waiting = Translator(checkpoint, "cpu")
    save_model(checkpoint, CoCosNet(load_config("tiny-cpu")))
    assert waiting.translate(record, tmp_path / "o.png").status == "ok"
    assert waiting.translate(record, tmp_path / "o.png").status == "skipped"
    assert Translator(checkpoint, "cpu").translate(record, tmp_path / "o.png").status == "ok"


def test_other_extractors_make_outputs_anew_and_what_is_kept_says_how_it_was_made(place, invoke, monkeypatch, tmp_path):
    """With `data.edges: auto`, once the weights of HED arrive."""
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(tmp_path))
    save_model(tmp_path / "auto.safetensors", CoCosNet(load_config("tiny-cpu", ["data.edges=auto"])))
    raw = ("translate", "-m", place / "raw.jsonl", "-w", tmp_path / "auto.safetensors", "-o", tmp_path / "o", "--json")
    ready = ("translate", "-m", place / "prep", "-w", tmp_path / "auto.safetensors", "-o", tmp_path / "p", "--json")

    def statuses(command: tuple[object, ...]) -> tuple[list[str], list[str | None]]:
        records = lines(invoke(*command, "--limit", 2)[1])
        assert all(("seconds" in record) == (record["status"] == "ok") for record in records)
        return [record["status"] for record in records], [record["condition_source"]["network"] for record in records]

    assert statuses(raw) == (["ok"] * 2, ["hed-small"] * 2)
    assert statuses(raw) == (["skipped"] * 2, ["hed-small"] * 2) and statuses(ready)[0] == ["ok"] * 2
    hed = tmp_path / weights.REGISTRY["hed"].filename
    save_file(HED().state_dict(), hed)
    accept(monkeypatch, "hed", hed)
    assert statuses(raw) == (["ok"] * 2, ["hed"] * 2)
    assert statuses(raw) == (["skipped"] * 2, ["hed"] * 2)
    assert statuses(ready)[0] == ["skipped"] * 2


NOBODY = """
from cocosnet.data.extractors import PoseExtractor
def nobody(device):
    return PoseExtractor("nobody", lambda pixels: [])
"""


def test_the_photograph_in_which_nothing_is_found_is_named(place, invoke, monkeypatch, tmp_path):
    """The exemplar too, where the model asks for its pose."""
    metadata = tmp_path / "nobody-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nobody\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[cocosctl.extractors]\nnobody = nobody_found:nobody\n")
    (tmp_path / "nobody_found.py").write_text(NOBODY)
    monkeypatch.syspath_prepend(str(tmp_path))
    people = {"people": [{"pose_keypoints_2d": [10.0, 10.0, 1.0] * 18}]}
    (tmp_path / "pose.json").write_text(json.dumps(people | {"canvas_width": 40, "canvas_height": 40}))
    overrides = ["data.task=pose", "data.poses=nobody", "model.encoder.exemplar_condition=true"]
    save_model(tmp_path / "pose.safetensors", build_model(load_config("tiny-cpu", overrides)))
    photos, options = place / "photos", ("-w", tmp_path / "pose.safetensors", "-o", tmp_path / "o.png")
    for condition, raw, fault in ((photos / "p0.png", ["--raw"], "p0.png"), (tmp_path / "pose.json", [], "p1.png")):
        code, _, err = invoke("translate", condition, photos / "p1.png", *options, *raw)
        assert code == 3 and f"{photos / fault}: nobody sees nobody in it" in err, err


def test_a_drawing_on_white_paper_is_told_of(place, invoke, tmp_path):
    edges = Image.new("L", (48, 40), 0)
    edges.paste(255, (10, 10, 20, 12))
    edges.save(tmp_path / "edges.png")
    edges.point(lambda level: 255 - level).save(tmp_path / "drawing.png")
    options = (place / "photos" / "p1.png", "-w", place / "tiny.safetensors", "-o", tmp_path / "o.png")
    assert "light" not in invoke("translate", tmp_path / "edges.png", *options)[2]
    code, _, err = invoke("translate", tmp_path / "drawing.png", *options)
    assert code == 0 and f"warning: {tmp_path / 'drawing.png'}: too light for edges" in err


def test_edges_of_the_kind_that_a_model_learned_from_ready_made_ones_are_not_too_light(place, invoke, tmp_path):
    """Sets of drawings, dark on white, are learned as they are."""
    save_model(tmp_path / "ready.safetensors", build_model(load_config("tiny-cpu", ["data.edges=image"])))
    Image.new("L", (48, 40), 250).save(tmp_path / "drawing.png")
    options = ("-w", tmp_path / "ready.safetensors", "-o", tmp_path / "o.png")
    code, _, err = invoke("translate", tmp_path / "drawing.png", place / "photos" / "p1.png", *options)
    assert code == 0 and "light" not in err


def test_a_pipe_is_not_waited_for(place, tmp_path):
    """Whether it is up to date cannot be asked of it; that PNG cannot be written into it is one line."""
    os.mkfifo(tmp_path / "o.png")
    done = run("translate", place / "edges/p0.png", place / "photos/p1.png", "-w", place / "tiny.safetensors",
               "-o", tmp_path / "o.png")  # fmt: skip
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and "not seekable" in done.stderr


def test_a_dry_run_foretells_the_run(place, invoke, monkeypatch):
    monkeypatch.chdir(place)
    command = ["translate", "-m", "prep", "-w", "tiny.safetensors", "-o", "foretold", "--limit"]
    assert invoke(*command, 2)[0] == 0
    code, out, err = invoke(*command, 3, "--dry-run")
    assert (code, len(out.splitlines())) == (0, 3) and "1 would be made, 2 up to date, 0 failed" in err
    assert len(list((place / "foretold").iterdir())) == 2
    assert "3 would be made, 0 up to date" in invoke(*command, 3, "--dry-run", "--overwrite")[2]
    assert "3 would be made, 0 up to date" in invoke("warp-visualize", *command[1:], 3, "--dry-run")[2]
    code, out, err = invoke("translate", "absent.png", "photos/p0.png", *command[3:-1], "--dry-run")
    assert (code, out) == (3, "") and "absent.png" in err
    command[command.index("tiny.safetensors")] = "bogus"
    code, out, err = invoke(*command, 3, "--dry-run")
    assert (code, out, len(err.splitlines())) == (5, "", 1) and "bogus" in err


def test_a_condition_of_another_task_is_refused_not_misread(place, invoke):
    pictures, pose = place / "photos", place / "pose.json"
    pose.write_text("{}")
    labels = place / "labels.png"
    Image.new("L", (48, 40), 3).save(labels)
    record = {"id": "a", "condition": str(labels), "exemplar": str(pictures / "p0.png")}
    record["condition_source"] = {"network": "none", "labels": "index maps"}
    records = place / "labels.jsonl"
    records.write_text(json.dumps(record) + "\n")
    code, out, err = invoke("translate", "-m", records, "-w", "demo", "-o", place / "misread")
    assert (code, out) == (4, "") and "prepared for task mask" in err and "has learned task edge" in err
    code, out, err = invoke("translate", pose, pictures / "p0.png", "-w", "demo", "-o", place / "misread.png")
    assert (code, out, len(err.splitlines())) == (3, "", 1) and "prepared for task pose" in err
    code, out, err = invoke(
        "translate", "-m", place / "prep", "-w", "facades-small", "-o", place / "misread", "--dry-run"
    )
    assert code == 4 and err.count("prepared for task edge") == 6
    assert not (place / "misread").exists() or not list((place / "misread").glob("*.png"))


def test_a_dry_run_writes_nothing(place, invoke):
    code, out, _ = invoke("translate", "-m", place / "prep", "-w", "demo", "-o", place / "dry", "--dry-run")
    assert (code, len(out.splitlines())) == (0, 6) and not (place / "dry").exists()
    code, out, _ = invoke("prepare", place / "photos", "-o", place / "dry", "--dry-run")
    assert (code, len(out.splitlines())) == (0, 6) and not (place / "dry").exists()
    code, out, err = invoke("train", "tiny-cpu", "--data", place / "prep", "-o", place / "dry", "--dry-run")
    assert code == 0 and "task: edge" in out and "parameters" in err and not (place / "dry").exists()


@pytest.mark.parametrize("size, mode", [((400, 300), "RGB"), ((97, 131), "RGB"), ((64, 48), "P"), ((50, 40), "LA")])
def test_two_files_give_a_picture_of_the_conditions_proportions(place, invoke, size, mode):
    photo = place / f"{mode}{size[0]}.png"
    Image.open(place / "photos" / "p0.png").resize(size).convert(mode).save(photo)
    output = place / "two" / photo.name
    code, out, err = invoke(
        "translate", photo, place / "photos" / "p1.png", "-o", output, "-w", place / "tiny.safetensors"
    )
    assert (code, out) == (0, f"{output}\n"), err
    made = Image.open(output)
    assert made.mode == "RGB" and abs(made.width / made.height - size[0] / size[1]) < 0.05


@pytest.mark.parametrize(
    "condition, exemplar, weights, code, said",
    [
        ("photos/p0.png", "photos/p1.png", "nowhere", 5, "nowhere"),
        ("photos/p0.png", "photos/p1.png", "photos/p0.png", 3, "p0.png"),
        ("photos/absent.png", "photos/p1.png", "tiny.safetensors", 3, "absent.png"),
        ("edges/p0.png", "tiny.safetensors", "tiny.safetensors", 3, "tiny.safetensors"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(place, invoke, monkeypatch, condition, exemplar, weights, code, said):
    monkeypatch.chdir(place)
    found, out, err = invoke("translate", condition, exemplar, "-o", "never.png", "-w", weights)
    assert (found, out, len(err.splitlines())) == (code, "", 1) and said in err
    assert not (place / "never.png").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_picture_in_no_format_is_refused_before_the_network_runs(place, invoke, more):
    files = [place / "edges/p0.png", place / "photos/p1.png", "-o", place / "never.tiff"]
    code, out, err = invoke("translate", *files, "-w", place / "tiny.safetensors", *more)
    assert (code, out, len(err.splitlines())) == (3, "", 1) and "never.tiff: cannot write this format" in err


def test_a_photograph_for_a_model_of_ready_made_edges_is_told_of(place, invoke, tmp_path):
    save_model(tmp_path / "m.safetensors", CoCosNet(load_config("tiny-cpu")))
    files = [place / "photos/p0.png", place / "photos/p1.png", "-o", tmp_path / "grey.png"]
    code, _, err = invoke("translate", *files, "-w", tmp_path / "m.safetensors", "--raw")
    assert code == 0 and "ready-made edges" in err


@pytest.mark.parametrize(
    "command, config, output, code, said",
    [
        ("translate", ["data.edges=hed-small"], "a file", 3, "cannot write"),
        ("translate", ["data.edges=hed"], "never", 5, "network-bsds500"),
        ("warp-visualize", ["model.kind=spade"], "never", 3, "matches nothing"),
    ],
)
def test_what_all_records_share_is_said_once_and_ends_the_batch(
    place, invoke, monkeypatch, tmp_path, command, config, output, code, said
):
    """A file where a folder is needed; no weights for the extractor; a model that matches nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")
    (tmp_path / "a file").write_text("")
    save_model(tmp_path / "model.safetensors", build_model(load_config("tiny-cpu", config)))
    raw = ["--raw"] if "hed" in config[0] else []
    found, out, err = invoke(
        command, "-m", place / "raw.jsonl", "-w", "model.safetensors", "-o", output, *raw, "--json"
    )
    assert (found, out, len(err.splitlines())) == (code, "", 1) and said in err


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["translate", "-m", "absent.jsonl", "-o", "x", "-w", "tiny.safetensors"], 3, "absent.jsonl"),
        (["prepare", "--check", "absent"], 3, "absent: cannot read this manifest (No such file or directory); make"),
        (["prepare", "photos", "-o", "x", "--set", "prepare.only=a.txt"], 3, "a list, such as [a.txt], found 'a.txt'"),
        (
            ["train", "tiny-cpu", "--data", "prep", "-o", "x", "--set", "data.task=mask"],
            3,
            "dataset.json of a prepared",
        ),
        (["translate", "edges/p0.png", "photos/p1.png", "-o", "x.txt", "-w", "tiny.safetensors"], 3, ".png"),
        (
            ["translate", "edges/p0.png", "photos/p1.png", "-o", "x.png", "-w", "tiny.safetensors", "--device", "gpu9"],
            5,
            "gpu9",
        ),
        (["eval", "-m", "prep", "--metrics", "pnsr"], 3, "psnr"),
        (["eval", "--outputs", "photos", "--targets", "absent", "--metrics", "psnr"], 3, "absent"),
        (["prepare", "absent", "-o", "x"], 3, "absent"),
        (["prepare", "photos", "-o", "x", "--set", "data.sise=3"], 3, "size"),
        (["prepare", "photos", "-o", "x", "--edges", "sobel"], 3, "sobel"),
        (["train", "no-preset", "--data", "prep", "-o", "x"], 3, "no-preset"),
        (["train", "tiny-cpu", "--data", "absent", "-o", "x"], 3, "absent"),
    ],
)
def test_exit_codes(place, invoke, monkeypatch, arguments, code, said):
    monkeypatch.chdir(place)
    found, out, err = invoke(*arguments)
    assert (found, out, len(err.splitlines())) == (code, "", 1) and said in err


@pytest.mark.parametrize(
    "command", ["eval --metrics psnr", "translate -w tiny.safetensors -o x", "warp-visualize -w tiny.safetensors -o x"]
)
def test_an_empty_stream_is_bad_data(place, invoke, monkeypatch, command):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    code, out, err = invoke(*command.split(), "-m", "-", "--json")
    assert (code, out, len(err.splitlines())) == (3, "", 1) and "no record came in" in err


def test_eval_of_folders_in_both_forms(place, invoke):
    same = ("eval", "--outputs", place / "photos", "--targets", place / "photos", "--metrics", "l1,ssim")
    code, out, _ = invoke(*same)
    assert code == 0 and dict(line.split() for line in out.splitlines()) == {"l1": "0", "ssim": "1"}
    (result,) = lines(invoke(*same, "--json", "--limit", 2)[1])
    assert result["count"] == 2 and result["metrics"]["l1"]["protocol"]


def test_prepare_says_which_settings_change_nothing(place, invoke):
    settings = ("--set", "train.batch=3", "--set", "data.val_fraction=0", "--limit", 1, "--dry-run")
    code, _, err = invoke("prepare", place / "photos", "-o", place / "never", *settings)
    assert code == 0 and "warning: --set train.batch=3 changes nothing here" in err


def test_prepare_goes_on_with_the_next_after_a_bad_picture(tmp_path):
    """Names are as odd as file systems allow; the conditions come from the shipped extractor."""
    draw_pictures(tmp_path / "set", 2)
    (tmp_path / "set" / "p1.png").rename(tmp_path / "set" / "naïve\nname.png")
    (tmp_path / "set" / "empty.jpg").write_bytes(b"")
    done = run("prepare", tmp_path / "set", "-o", tmp_path / "prep", "--size", 32, "--edges", "hed-small", "--json")
    by_status = sorted(record["status"] for record in lines(done.stdout))
    assert (done.returncode, by_status) == (4, ["error", "ok", "ok"]), done.stderr
    assert lines(done.stdout)[-1]["condition_source"]["network"] == "hed-small"
    assert "empty.jpg" in done.stderr and all(line.startswith("cocosctl: ") for line in done.stderr.splitlines())


def test_warp_visualize_draws_one_picture_a_pair(place, invoke):
    output = place / "warps.png"
    code, out, err = invoke(
        "warp-visualize",
        place / "edges" / "p0.png",
        place / "photos" / "p1.png",
        "-o",
        output,
        "-w",
        place / "tiny.safetensors",
    )
    assert (code, out) == (0, f"{output}\n"), err
    assert min(Image.open(output).size) > 32
    code, out, _ = invoke(
        "warp-visualize", "-m", place / "prep", "-o", place / "warps", "-w", place / "tiny.safetensors", "--limit", 2
    )
    assert (code, len(out.splitlines())) == (0, 2)


def test_a_report_is_one_page(place, invoke):
    page = place / "reported" / "index.html"
    code, out, err = invoke(
        "translate",
        "-m",
        place / "prep",
        "-o",
        place / "reported",
        "-w",
        place / "tiny.safetensors",
        "--limit",
        2,
        "--report",
        page,
    )
    assert code == 0 and len(out.splitlines()) == 2 and str(page) in err, err
    assert "<img" in page.read_text()
    assert len(list((place / "reported" / ".parts").iterdir())) == 4
    (place / "true").mkdir()
    for path in map(Path, out.splitlines()):
        Image.open(path).save(place / "true" / path.name)
    code, out, err = invoke("eval", "--outputs", place / "reported", "--targets", place / "true", "--metrics", "l1")
    assert (code, out.split()) == (0, ["l1", "0"]), err  # what the page shows is not taken for outputs


def test_training_stops_on_a_signal_and_goes_on(place):
    run_folder = place / "run"
    command = ["train", "tiny-cpu", "--data", place / "prep", "-o", run_folder, "--set", "train.images=400", "--json"]
    process = subprocess.Popen(
        [*COCOSCTL, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    first = json.loads(process.stdout.readline())
    assert first["of"] == 400
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in said and "again" in said, said
    assert "error" not in said  # it is what was asked for
    (stopped,) = (int(word) for word in said.split() if word.isdigit())  # "stopped at N images"
    command[command.index("train.images=400")] = f"train.images={stopped + 16}"
    done = run(*command)
    *ticks, last = lines(done.stdout)
    assert done.returncode == 0 and last == {"model": str(run_folder / "model.safetensors")}, done.stderr
    assert f"goes on at {stopped} of {stopped + 16} images" in done.stderr
    assert first["images"] <= stopped < ticks[0]["images"] <= ticks[-1]["images"] == stopped + 16
    assert Path(last["model"]).is_file()
