"""`cocosctl eval` as a user runs it: lists, statistics, scores, the page, several processes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cli_tools import clean_environment, lines
from metric_tools import (
    START,
    accept,
    smooth_picture,
    write_random_inception,
    write_random_trunk,
    write_random_vgg,
)
from PIL import Image

from cocosctl.app import run as run_here
from cocosnet import weights
from cocosnet.data.records import Record
from cocosnet.metrics import metric_names
from cocosnet.viz import report
from cocosnet.viz.report import picture_side
from cocosnet.viz.scores import write_scores_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders out, true, warp and labels of seven pairs, one of another size, their records, and random weights."""
    folder = tmp_path_factory.mktemp("eval")
    write_random_vgg(folder / "weights")
    write_random_inception(folder / "weights")
    write_random_trunk(folder / "weights", "alexnet")
    for index in range(7):
        size = (64, 48) if index == 3 else (48, 48)
        for seed, side in enumerate(("out", "true", "warp")):
            (folder / side).mkdir(exist_ok=True)
            smooth_picture(10 * seed + index, size).save(folder / side / f"p{index}.png")
        (folder / "labels").mkdir(exist_ok=True)
        Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[::-1]) // (400 + index) % 5).convert(
            "L"
        ).save(folder / "labels" / f"p{index}.png")
    (folder / "records.jsonl").write_text("".join(json.dumps(a_record(index)) + "\n" for index in range(7)))
    (folder / "start.py").write_text(START)
    return folder


def a_record(index):
    """Two outputs each have one condition; the exemplar is the next target. The fourth pair is of another size."""
    condition = "three" if index == 3 else "even" if index % 2 == 0 else "odd"
    fields = {"output": "out", "target": "true", "warp": "warp", "labels": "labels"}
    known = {role: f"{side}/p{index}.png" for role, side in fields.items()}
    other = (index + 1) % 7
    exemplar = {"exemplar": f"true/p{other}.png", "exemplar_labels": f"labels/p{other}.png"}
    return {"id": f"p{index}", "condition": condition, **known, **exemplar}


@pytest.fixture
def evaluate(folder, monkeypatch, capsys):
    """Run `cocosctl eval ARGUMENTS` in `folder`, in this process, as the command line does."""
    for name in ("vgg16-caffe", "fid-inception", "alexnet"):
        accept(monkeypatch, name, folder / "weights" / weights.REGISTRY[name].filename)
    monkeypatch.chdir(folder)

    def call(*arguments):
        capsys.readouterr()
        code = run_here(["eval", *map(str, arguments)])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


def launched(folder, *arguments, **environment):
    """`cocosctl eval ARGUMENTS` on two processes of their own under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(folder / "start.py"), "eval", *map(str, arguments)]
    environment = {"COCOSCTL_WEIGHTS_DIR": str(folder / "weights"), "PYTHONWARNINGS": "ignore"} | environment
    environment = clean_environment(TORCH_HOME=str(folder / "none"), **environment)
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=folder)


def values(done):
    assert done.returncode == 0, done.stderr
    return {name: entry["value"] for name, entry in json.loads(done.stdout)["metrics"].items()}


def test_two_processes_give_what_one_gives(folder, evaluate):
    """Every metric there is."""
    options = ("-m", "records.jsonl", "--metrics", ",".join(metric_names()), "--json", "--scores")
    single, pair = evaluate(*options, "1.jsonl"), launched(folder, *options, "2.jsonl")
    expected = values(single)
    assert values(pair) == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
    assert None not in expected.values() and len(expected) == 18
    first, second = ((folder / name).read_text() for name in ("1.jsonl", "2.jsonl"))
    assert [row["id"] for row in lines(second)] == [f"p{index}" for index in range(7)]
    for ours, theirs in zip(lines(first), lines(second)):
        assert ours["scores"] == {name: pytest.approx(value, rel=1e-5) for name, value in theirs["scores"].items()}
    result = json.loads(pair.stdout)
    assert result["processes"] == 2 and result["count"] == 7
    assert all(entry["seconds"] >= 0 and entry["count"] == 7 for entry in result["metrics"].values())
    assert set(result["weights"]) == {"vgg16-caffe", "fid-inception", "alexnet"}
    assert len(pair.stdout.splitlines()) == 1 and re.search(r"semantic +0\.\d+", pair.stderr)


FAILS = """
import os
from cocosnet.errors import DataError
from cocosnet.metrics import Metric

class Fails(Metric):
    name, protocol = "fails", "fails in the second process"
    def _add(self, *pictures):
        if os.environ["RANK"] == "1":
            raise DataError("the second cannot go on")
    def _result(self):
        return {"value": 0.0}
    def state(self):
        return None
"""


def test_a_process_that_fails_ends_the_others_too(folder, tmp_path):
    """By a third party's metric, which torchrun's processes find as any installed one."""
    (tmp_path / "failing.py").write_text(FAILS)
    (tmp_path / "failing-1.0.dist-info").mkdir()
    (tmp_path / "failing-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1.0\n")
    (tmp_path / "failing-1.0.dist-info/entry_points.txt").write_text("[cocosctl.metrics]\nfails = failing:Fails\n")
    done = launched(folder, "-m", "records.jsonl", "--metrics", "fails", PYTHONPATH=str(tmp_path))
    ours = [line for line in done.stderr.splitlines() if line.startswith("cocosctl:")]
    assert done.returncode == 1 and done.stdout == "" and "cocosctl: error: the second cannot go on" in ours
    assert "Error" not in done.stderr.partition("cocosctl:")[0] and len(ours) <= 2


def test_what_is_wrong_in_all_processes_is_said_once(folder, tmp_path):
    done = launched(folder, "-m", "records.jsonl", "--metrics", "l1,lpips", COCOSCTL_WEIGHTS_DIR=str(tmp_path))
    assert done.stderr.count("cocosctl: error: the weights 'alexnet' are not on this machine") == 1
    done = launched(folder, "--outputs", "nowhere", "--targets", "true", "--metrics", "l1")
    assert done.stderr.count("cocosctl: error: nowhere: no such folder") == 1


def test_lists_pair_line_by_line_and_say_where_they_end(folder, evaluate):
    for side in ("out", "true"):
        (folder / f"{side}.txt").write_text("".join(f"{side}/p{index}.png\n" for index in range(7)))
    options = ("--metrics", "l1,warp_psnr", "--json")
    (folder / "warp.txt").write_text("".join(f"warp/p{index}.png\n\n" for index in range(7)))
    from_lists = evaluate("--outputs", "out.txt", "--targets", "true.txt", "--warps", "warp.txt", *options)
    from_folders = evaluate("--outputs", "out", "--targets", "true", "--warps", "warp", *options)
    assert values(from_lists) == values(from_folders)
    (folder / "short.txt").write_text("true/p0.png\ntrue/p1.png\n")
    short = evaluate("--outputs", "out.txt", "--targets", "short.txt", *options)
    assert short.returncode == 3 and "short.txt has 2 pictures, out.txt has 7" in short.stderr
    assert "p2.png" in short.stderr and len(short.stderr.splitlines()) == 1
    mixed = evaluate("--outputs", "out.txt", "--targets", "true", *options)
    assert mixed.returncode == 3 and "folders or lists, not both" in mixed.stderr


def test_scores_are_a_manifest_wherever_they_lie(folder, evaluate, monkeypatch):
    """The paths of a stream are relative to the working folder, those of the file that is made of it to the file's."""
    stream = (folder / "records.jsonl").read_text()
    monkeypatch.setattr(sys, "stdin", io.StringIO(stream))
    first = evaluate("-m", "-", "--metrics", "l1", "--scores", "far/scores.jsonl", "--json")
    again = evaluate("-m", "far/scores.jsonl", "--metrics", "l1,style_color_region", "--json")
    assert values(again)["l1"] == values(first)["l1"] and json.loads(again.stdout)["count"] == 7


def test_an_error_in_the_scores_names_its_record_once(folder, evaluate):
    """Also where the scores are measured again, and the error is that of an earlier step."""
    gone = {"id": "gone", "output": "no.png", "target": "true/p0.png"}
    (folder / "gone.jsonl").write_text(json.dumps(gone) + "\n")
    options = ("--metrics", "l1", "--json", "--scores", "scores.jsonl")
    first, again = (json.loads(evaluate("-m", f, *options).stdout)["errors"] for f in ("gone.jsonl", "scores.jsonl"))
    assert again == first and first[0].startswith("gone: ") and first[0].count("gone: ") == 1


def test_files_are_written_through_links_and_into_pipes(folder, evaluate, tmp_path):
    """A link and a pipe stay what they are; what reads the pipe gets the scores."""
    options = ("-m", "records.jsonl", "--metrics", "l1", "--limit", "2", "--scores")
    (tmp_path / "far").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "far" / "scores.jsonl")
    assert evaluate(*options, tmp_path / "link.jsonl").returncode == 0
    found = (tmp_path / "far" / "scores.jsonl").read_text()
    assert (tmp_path / "link.jsonl").is_symlink() and len(lines(found)) == 2
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    assert evaluate(*options, tmp_path / "pipe").returncode == 0
    assert lines(reader.communicate(timeout=30)[0]) == lines(found) and (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"far", "link.jsonl", "pipe"}


def test_statistics_give_the_same_number_as_pictures(folder, evaluate):
    saved = evaluate("--outputs", "true", "--metrics", "fd_vgg16", "--save-stats", "true.npz")
    assert saved.returncode == 0 and "fd_vgg16: there are no targets to measure against" in saved.stderr, saved.stderr
    again = evaluate("--outputs", "true.npz", "--metrics", "fd_vgg16", "--save-stats", "copy.npz")
    assert again.returncode == 0 and "no targets to measure against" in again.stderr
    with np.load(folder / "true.npz") as found:
        assert found["mu"].shape == (512,) and found["sigma"].shape == (512, 512)
    evaluate("--outputs", "out", "--metrics", "fd_vgg16", "--save-stats", "out.npz")
    ways = [("out", "true"), ("out", "true.npz"), ("out.npz", "true.npz")]
    found = [
        values(evaluate("--outputs", first, "--targets", second, "--metrics", "fd_vgg16", "--json"))["fd_vgg16"]
        for first, second in ways
    ]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)
    options = ("--outputs", "out", "--exemplars", "warp", "--metrics", "fd_vgg16,style_color", "--json")
    beside = values(evaluate(*options, "--targets", "true.npz"))
    assert beside["fd_vgg16"] == pytest.approx(found[0], rel=1e-6) and beside["style_color"] > 0
    assert values(evaluate(*options, "--save-stats", "out.npz")) == {**beside, "fd_vgg16": None}
    wrong = evaluate("--outputs", "out", "--targets", "true.npz", "--metrics", "psnr")
    assert wrong.returncode == 3 and "psnr needs the pictures" in wrong.stderr
    (folder / "bad.npz").write_text("no")
    bad = evaluate("--outputs", "out", "--targets", "bad.npz", "--metrics", "fd_vgg16")
    assert bad.returncode == 3 and "not statistics in pytorch-fid's format" in bad.stderr


def test_other_formats_of_the_same_pictures_are_warned_about(folder, evaluate):
    (folder / "jpeg").mkdir()
    for index in range(3):
        Image.open(folder / f"true/p{index}.png").save(folder / f"jpeg/p{index}.jpg")
    (folder / "three").mkdir()
    for index in range(3):
        Image.open(folder / f"true/p{index}.png").save(folder / f"three/p{index}.png")
    done = evaluate("--outputs", "jpeg", "--targets", "three", "--metrics", "l1")
    assert done.returncode == 0 and "warning: outputs are JPEG, targets are PNG" in done.stderr
    same = evaluate("--outputs", "three", "--targets", "three", "--metrics", "l1,ssim,semantic", "--json")
    assert values(same) == pytest.approx({"l1": 0, "ssim": 1, "semantic": 1}, abs=1e-6)
    assert "warning" not in same.stderr


def test_the_first_pairs_of_other_sizes_are_named(folder, evaluate):
    (folder / "sizes").mkdir()
    for index in range(7):
        Image.open(folder / f"true/p{index}.png").resize((40, 40)).save(folder / f"sizes/p{index}.png")
    done = evaluate("--outputs", "sizes", "--targets", "true", "--metrics", "psnr")
    assert done.returncode == 4
    assert "p0: psnr: pictures of a pair must agree in size, the output is 40x40, the target is 48x48" in done.stderr


def page_data(path):
    """The pairs inside a page."""
    text = path.read_text(encoding="utf-8")
    return text, [json.loads(line[11:-2]) for line in text.splitlines() if line.startswith("pairs.push(")]


def test_the_page_holds_every_pair_and_needs_no_network(folder, evaluate, tmp_path):
    hostile = '</script><b>"x" & \ud800\u2028'
    foreign = {"warp": ["x"], "condition_image": 5, "scores": 5, "labels": {}}
    records = [
        {"id": hostile, "output": str(folder / "out/p0.png"), "target": str(folder / "true/p0.png")},
        {"id": "gone", "output": str(folder / "none.png"), "target": str(folder / "true/p1.png")},
        {"id": "good", "output": str(folder / "out/p2.png"), "target": str(folder / "true/p2.png")} | foreign,
        {"id": "failed", "status": "error", "error": "earlier", "scores": {"psnr": "high", "mine": 1}},
        {"id": "failed too", "status": "error", "error": "earlier", **foreign},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = evaluate("-m", tmp_path / "records.jsonl", "--metrics", "psnr,l1", "--report", tmp_path / "page")
    assert done.returncode == 4
    text, pairs = page_data(tmp_path / "page/index.html")
    assert [pair["id"] for pair in pairs] == [hostile, "gone", "good", "failed", "failed too"]
    assert [pair["scores"] for pair in pairs[3:]] == [{"mine": 1}, {}]
    assert set(pairs[2]["scores"]) == {"psnr", "l1"} and "no such file" in pairs[1]["error"]
    assert [title for title, *_ in pairs[0]["pictures"]] == ["output", "target"]
    assert pairs[0]["pictures"][0][1].startswith("data:image/webp;base64,")
    assert text.count("</script>") == 1 and "http" not in text and not re.search(r'(src|href)="', text)
    assert "psnr: mean over pairs" in text


def test_ten_thousand_pairs_stay_a_page_that_opens(tmp_path, monkeypatch):
    smooth_picture(1, (256, 256)).save(tmp_path / "a.png")
    picture, result = str(tmp_path / "a.png"), {"metrics": {}, "count": 0, "failed": 0, "warnings": [], "weights": {}}
    records = [Record(id=str(i), output=picture, target=picture, extra={"scores": {"l1": i}}) for i in range(40)]
    monkeypatch.setattr(report, "SIDES", ())  # pictures as in a page of 10,000 pairs
    write_scores_page(tmp_path / "index.html", records, result)
    size = (tmp_path / "index.html").stat().st_size * 250 * 2.5  # 10,000 pairs of five pictures instead of 40 of two
    monkeypatch.undo()
    assert picture_side(10_000) == report.SMALLEST and picture_side(100) == 256
    assert size < 150e6
