"""The HTML page: whole without a network, escaped, with every pair in it."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from cocosnet.data.pose import Pose, write_pose
from cocosnet.data.records import Record
from cocosnet.errors import DataError
from cocosnet.metrics import evaluate, records_from_folders
from cocosnet.viz.report import Row, shown_picture, write_report
from cocosnet.viz.scores import write_scores_page

HOSTILE = "<script>alert(\"x\")</script> & 'é' \ud800"


class Reader(HTMLParser):
    """Checks that tags are balanced; gathers images and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.text = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def picture(folder: Path, name: str, size: tuple[int, int] = (40, 30)) -> str:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def decoded(image: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))


def test_page_is_self_contained_and_escaped(tmp_path):
    record = Record(id=HOSTILE, exemplar=picture(tmp_path, "e.png"), output=picture(tmp_path, "o.png", (900, 300)))
    write_report(tmp_path / "page.html", [record], title="A <b> title", notes=["A note & more"])
    page = read(tmp_path / "page.html")
    assert "script" not in page.tags and "A <b> title" in page.text and "A note & more" in page.text
    assert '<script>alert("x")</script>' in page.text
    assert [decoded(image).size for image in page.images] == [(40, 30), (256, 85)]
    assert all(image["loading"] == "lazy" and image["src"].startswith("data:image/") for image in page.images)
    source = (tmp_path / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', source) and "url(" not in source and "http" not in source


def test_roles_are_shown_in_order_and_drawn_conditions_are_preferred(tmp_path):
    files = {name: picture(tmp_path, f"{name}.png") for name in ("condition", "exemplar", "warp", "output", "target")}
    drawn = picture(tmp_path, "drawn-condition.png", (17, 17))
    record = Record(
        id="a",
        condition=files["condition"],
        exemplar=files["exemplar"],
        target=files["target"],
        output=files["output"],
        extra={"warp": files["warp"], "condition_image": drawn},
    )
    write_report(tmp_path / "page.html", [record], title="t")
    page = read(tmp_path / "page.html")
    assert [image["alt"] for image in page.images] == [f"{name} of a" for name in files]
    assert decoded(page.images[0]).size == (17, 17)


def test_links_are_relative_and_quoted(tmp_path):
    (tmp_path / "pictures é #1").mkdir()
    path = picture(tmp_path / "pictures é #1", "a & b?.png")
    row = Row("a", {"output": path, "ready": Image.new("RGB", (9, 9))})
    write_report(tmp_path / "sub/page.html", [row], "t", embed=False)
    page = read(tmp_path / "sub/page.html")
    assert (tmp_path / "sub" / unquote(page.images[0]["src"])).resolve() == Path(path).resolve()
    assert "#" not in page.images[0]["src"] and page.images[0]["width"] == "40"
    assert page.images[1]["src"].startswith("data:")


def test_a_name_that_is_no_text_is_linked_by_its_bytes(tmp_path):
    path = picture(tmp_path, "o.png")
    odd = os.path.join(os.fsencode(tmp_path), b"bad\xff.png")
    os.rename(path, odd)
    write_report(tmp_path / "page.html", [Row("a", {"output": os.fsdecode(odd)})], "t", embed=False)
    assert read(tmp_path / "page.html").images[0]["src"] == "bad%FF.png"


@pytest.mark.parametrize("embed", [True, False])
def test_label_maps_and_poses_are_drawn_among_conditions(tmp_path, embed):
    """A map of 12 classes is black to the eye, and a pose is no picture; edges stay as they are."""
    indices = np.repeat(np.arange(12, dtype=np.uint8), 4)[None].repeat(9, axis=0)
    Image.fromarray(indices).save(tmp_path / "labels.png")
    Image.fromarray(np.where(indices % 2, 255, 0).astype(np.uint8)).save(tmp_path / "edges.png")
    joints = np.full((1, 18, 3), (10, 20, 0.9), np.float32)
    write_pose(Pose(joints, (30, 40)), tmp_path / "pose.json")
    rows = [Row(name, {"condition": tmp_path / name}) for name in ("labels.png", "pose.json", "edges.png")]
    write_report(tmp_path / "page.html", [*rows, Row("o", {"output": tmp_path / "labels.png"})], "t", embed=embed)
    labels, pose, *others = read(tmp_path / "page.html").images
    assert len(set(map(tuple, np.asarray(decoded(labels).convert("RGB"))[0].tolist()))) == 12
    assert decoded(pose).size == (30, 40) and np.asarray(decoded(pose)).max() > 200
    for image, file in zip(others, ("edges.png", "labels.png"), strict=True):
        shown = decoded(image) if embed else Image.open(tmp_path / image["src"])
        assert np.array_equal(np.asarray(shown.convert("L")), np.asarray(Image.open(tmp_path / file)))


def test_a_pose_of_a_big_photograph_is_drawn_at_the_size_that_is_shown(tmp_path):
    write_pose(Pose(np.full((1, 18, 3), (2000, 1500, 0.9), np.float32), (4000, 3000)), tmp_path / "pose.json")
    drawn, as_it_is = shown_picture("condition", tmp_path / "pose.json", 96)
    assert drawn.size == (128, 96) and not as_it_is and np.asarray(drawn)[48, 64].any()


def test_pictures_get_smaller_the_more_pairs_a_page_has(tmp_path):
    large = Image.effect_noise((300, 200), 60)
    rows = [Row("a", {"output": large}), *(Row(str(number)) for number in range(2000))]
    write_report(tmp_path / "page.html", rows, "t")
    assert decoded(read(tmp_path / "page.html").images[0]).size == (96, 64)


def test_scores_that_are_no_numbers_are_none(tmp_path):
    """Not-a-number compares with nothing: the page could not sort by it."""
    records = [Record("a", extra={"scores": {"psnr": float("nan"), "l1": 0.5}})]
    result = {"count": 1, "failed": 0, "metrics": {}, "warnings": [], "weights": {}}
    write_scores_page(tmp_path / "page.html", records, result)
    assert '"scores": {"psnr": null, "l1": 0.5}' in (tmp_path / "page.html").read_text()


def test_edges_stay_sharp_and_photographs_small(tmp_path):
    edges = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    rough = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    photo = Image.fromarray(rough).resize((256, 256), Image.Resampling.BICUBIC)
    write_report(tmp_path / "page.html", [Row("a", {"edges": edges, "photo": photo})], "t")
    shown = [decoded(image) for image in read(tmp_path / "page.html").images]
    assert shown[0].format == "PNG" and np.array_equal(np.asarray(shown[0].convert("L")), np.asarray(edges))
    assert shown[1].format == "JPEG"


def test_failures_are_named_and_the_rest_goes_on(tmp_path):
    good = Record(id="good", output=picture(tmp_path, "o.png"))
    gone = Record(id="gone", output=str(tmp_path / "gone.png"))
    failed = Record(id="failed", status="error", error="no <such> photo")
    write_report(tmp_path / "page.html", [gone, failed, good], "t")
    page = read(tmp_path / "page.html")
    assert "no such file" in page.text and "no <such> photo" in page.text and len(page.images) == 1


def test_metrics_are_a_table(tmp_path):
    for folder in ("out", "true"):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder, "a.png")
    result = evaluate(records_from_folders(tmp_path / "out", tmp_path / "true"), ["psnr", "l1"])
    write_report(tmp_path / "page.html", [], "t", metrics=result)
    page = read(tmp_path / "page.html")
    assert "psnr: mean over pairs" in page.text and "none" in page.text and "1 pairs measured, 0 failed" in page.text


def test_rows_are_taken_one_at_a_time_and_nothing_is_left_after_an_error(tmp_path):
    def rows():
        yield Row("a", {"output": Image.new("RGB", (8, 8))})
        raise DataError("the stream broke")

    with pytest.raises(DataError, match="the stream broke"):
        write_report(tmp_path / "page.html", rows(), "t")
    assert list(tmp_path.iterdir()) == []
    small = Image.new("RGB", (8, 8))
    write_report(tmp_path / "page.html", (Row(f"pair {index}", {"output": small}) for index in range(3000)), "t")
    assert len(read(tmp_path / "page.html").images) == 3000
