"""`evaluate` on real files, hostile records and folders; the registry and its plug-ins."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from cocosnet.data.records import Record, iter_records, read_manifest
from cocosnet.errors import ConfigError, DataError, MissingDependency
from cocosnet.metrics import evaluate, get_metric, metric_names, records_from, records_from_folders

torch.set_num_threads(1)


@pytest.fixture
def folders(tmp_path):
    """Folders "out" and "true" with five pairs of 40x32 PNGs."""
    generator = np.random.default_rng(0)
    for name in ("out", "true"):
        (tmp_path / name).mkdir()
        for index in range(5):
            pixels = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index} é.png")
    return tmp_path


def expected_psnr(folder, names):
    read = [[np.array(Image.open(folder / side / f"{name} é.png")) for side in ("true", "out")] for name in names]
    return float(np.mean([peak_signal_noise_ratio(true, out) for true, out in read]))


def test_folders_are_measured(folders):
    result = evaluate(records_from_folders(folders / "out", folders / "true"), ["psnr", "swd", "psnr"])
    assert result["schema"] == "cocosctl.eval/1"
    assert (result["count"], result["failed"], result["errors"]) == (5, 0, [])
    assert result["metrics"]["psnr"]["value"] == pytest.approx(expected_psnr(folders, range(5)))
    assert result["metrics"]["swd"]["count"] == 5 and result["metrics"]["swd"]["protocol"].startswith("swd:")
    assert "torch" in result["versions"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_order_of_records_does_not_matter(folders):
    records = records_from_folders(folders / "out", folders / "true")
    straight = evaluate(records, ["psnr", "ssim", "l1", "swd"])
    random.Random(1).shuffle(records)
    turned = evaluate(iter(records), ["psnr", "ssim", "l1", "swd"])
    for name, values in straight["metrics"].items():
        assert turned["metrics"][name]["value"] == pytest.approx(values["value"], rel=1e-6)


def test_hostile_records_fail_alone_and_the_rest_goes_on(folders):
    good = records_from_folders(folders / "out", folders / "true")
    (folders / "empty.png").write_bytes(b"")
    (folders / "cut.png").write_bytes((folders / "out/0 é.png").read_bytes()[:200])
    (folders / "text.png").write_text("not a picture")
    Image.new("RGB", (41, 32)).save(folders / "wide.png")
    Image.new("RGB", (8, 8)).save(folders / "tiny.png")
    target = good[0].target
    bad = [
        Record(id="empty", output=str(folders / "empty.png"), target=target),
        Record(id="cut", output=str(folders / "cut.png"), target=target),
        Record(id="text", output=str(folders / "text.png"), target=target),
        Record(id="wide", output=str(folders / "wide.png"), target=target),
        Record(id="gone", output=str(folders / "gone.png"), target=target),
        Record(id="folder", output=str(folders), target=target),
        Record(id="no target", output=target),
        Record(id="tiny", output=str(folders / "tiny.png"), target=str(folders / "tiny.png")),
        Record(id="earlier", output=target, target=target, status="error", error="no such photo"),
        *iter_records(["not json"]),
    ]
    result = evaluate([*bad[:5], *good, *bad[5:]], ["psnr", "swd"])
    assert result["count"] == 5 and result["failed"] == len(bad)
    assert result["metrics"]["psnr"]["value"] == pytest.approx(expected_psnr(folders, range(5)))
    assert result["metrics"]["swd"]["count"] == 5
    assert len(result["errors"]) == 5
    assert all("\n" not in message for message in result["errors"])
    assert "wide: psnr: pictures of a pair must agree in size" in result["errors"][3]
    assert "the output is 41x32, the target is 40x32" in result["errors"][3]
    last = evaluate(bad[-2:], ["l1"])
    assert last["errors"][0] == "earlier: no such photo"
    assert "not JSON" in last["errors"][1] and "--json" in last["errors"][1]


def test_a_pair_counts_for_all_metrics_or_none(folders):
    """A 12x12 pair suits l1 but not swd."""
    Image.new("RGB", (12, 12)).save(folders / "small.png")
    small = Record(id="small", output=str(folders / "small.png"), target=str(folders / "small.png"))
    assert evaluate([small], ["l1"])["count"] == 1
    both = evaluate([small], ["l1", "swd"])
    assert both["metrics"]["l1"]["count"] == both["count"] == 0 and both["failed"] == 1


def test_lines_end_at_newlines_alone(folders):
    """A manifest's or a list's line may hold what Unicode calls a line's end."""
    odd = "two\u2028or\x85three"
    (folders / "out/0 é.png").rename(folders / f"out/{odd}.png")
    record = {"id": odd, "output": f"out/{odd}.png", "target": "true/0 é.png"}
    text = json.dumps(record, ensure_ascii=False) + "\r\n\n" + json.dumps(record | {"id": "again"}) + "\n"
    (folders / "odd.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [(one.id, one.failed) for one in read_manifest(folders / "odd.jsonl")] == [(odd, False), ("again", False)]
    (folders / "list.txt").write_text(f"out/{odd}.png\n", encoding="utf-8")
    (listed,) = records_from({"output": folders / "list.txt"})
    assert evaluate([*read_manifest(folders / "odd.jsonl"), listed], ["l1"])["failed"] == 1  # the last has no target
    assert (
        evaluate(records_from({"output": folders / "list.txt", "target": folders / "list.txt"}), ["l1"])["count"] == 1
    )


def test_a_picture_is_a_list_of_one_and_lists_may_come_from_windows(folders):
    pair = {"output": folders / "out" / "1 é.png", "target": folders / "true" / "1 é.png"}
    for role, path in pair.items():
        (folders / f"{role}.txt").write_bytes(f"\ufeff{path}\r\n".encode())
    by_list = evaluate(records_from({role: folders / f"{role}.txt" for role in pair}), ["psnr"])
    alone = evaluate(records_from(pair), ["psnr"])
    for result in (by_list, alone):
        assert result["metrics"]["psnr"]["value"] == pytest.approx(expected_psnr(folders, [1])), result["errors"]


def test_skipped_records_are_measured(folders):
    """ "skipped" means that an up-to-date output was already there."""
    record = records_from_folders(folders / "out", folders / "true")[0]
    record.status = "skipped"
    assert evaluate([record], ["l1"])["count"] == 1


def test_nothing_to_measure():
    result = evaluate([], ["psnr"])
    assert result["count"] == 0 and result["metrics"]["psnr"]["value"] is None


def test_names_are_checked_before_any_record_is_taken():
    def records():
        raise RuntimeError("a record was taken")
        yield

    with pytest.raises(ConfigError, match="did you mean 'ssim'"):
        evaluate(records(), ["psnr", "sssim"])
    with pytest.raises(ConfigError, match="no metric is named"):
        evaluate(records(), [])
    with pytest.raises(ConfigError, match="a list of names, is the text 'psnr'"):
        evaluate(records(), "psnr")


def test_folders_that_do_not_match_are_refused_in_one_line(folders):
    (folders / "out/0 é.png").rename(folders / "out/extra.png")
    with pytest.raises(DataError) as error:
        records_from_folders(folders / "out", folders / "true")
    assert "out lacks 1 (0 é)" in str(error.value) and "true lacks 1 (extra)" in str(error.value)
    assert "5 against 5" in str(error.value) and "\n" not in str(error.value)


def test_folders_with_other_suffixes_and_subfolders_match(folders):
    for side in ("out", "true"):
        (folders / side / "a").mkdir()
    Image.new("RGB", (32, 32)).save(folders / "out/a/0 é.webp", lossless=True)
    Image.new("RGB", (32, 32)).save(folders / "true/a/0 é.png")
    records = records_from_folders(folders / "out", folders / "true", exemplars=folders / "true")
    assert [record.id for record in records] == ["0 é", "1 é", "2 é", "3 é", "4 é", "a/0 é"]
    assert records[-1].output.endswith("out/a/0 é.webp") and records[-1].exemplar == records[-1].target


def test_folders_that_are_missing_empty_or_ambiguous(folders):
    with pytest.raises(DataError, match="no such folder"):
        records_from_folders(folders / "nowhere", folders / "true")
    (folders / "blank").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        records_from_folders(folders / "out", folders / "blank")
    Image.new("RGB", (4, 4)).save(folders / "out/0 é.jpg")
    with pytest.raises(DataError, match="same name without the suffix"):
        records_from_folders(folders / "out", folders / "true")


PLUGIN = '''
import torch
print("welcome to toy")
from cocosnet.metrics import Metric

class Style(Metric):
    """Mean difference of the mean colours of output and exemplar."""
    name, needs, same_size = "toy-style", ("output", "exemplar"), False
    protocol = "toy-style: |mean output - mean exemplar|"

    def __init__(self, device="cpu", seed=0):
        super().__init__(device, seed)
        self.total = 0.0

    def _add(self, output, exemplar):
        self.total += (output.double().mean((1, 2, 3)) - exemplar.double().mean((1, 2, 3))).abs().sum().item()

    def _result(self):
        return {"value": self.total / self.count}
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed package that offers one good metric, one broken one and a name of ours."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy_metrics.py").write_text(PLUGIN)
    (site / "toy-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (site / "toy-1.0.dist-info/entry_points.txt").write_text(
        "[cocosctl.metrics]\ntoy-style = toy_metrics:Style\ntoy-broken = toy_absent:Thing\npsnr = toy_absent:Thing\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("toy_metrics", None)


def test_a_plugin_metric_runs_like_our_own(plugin, folders, capsys):
    assert "toy-style" in metric_names()
    Image.new("RGB", (20, 20), (100, 100, 100)).save(folders / "exemplar.png")
    Image.new("RGB", (32, 40), (110, 110, 110)).save(folders / "output.png")
    record = Record(id="a", output=str(folders / "output.png"), exemplar=str(folders / "exemplar.png"))
    assert evaluate([record], ["toy-style"])["metrics"]["toy-style"]["value"] == pytest.approx(10)
    assert capsys.readouterr().out == ""


def test_a_broken_plugin_is_one_line_and_cannot_take_our_names(plugin):
    with pytest.raises(MissingDependency, match="toy_absent:Thing"):
        get_metric("toy-broken")
    assert get_metric("psnr").protocol.startswith("psnr:")


def test_listing_names_imports_no_torch():
    code = "import sys, cocosnet.metrics as m; m.metric_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
