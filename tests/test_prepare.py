"""`prepare`: whole folders or clear errors, again and again, whatever interrupts it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import resize as skimage_resize

from cocosnet.config import Config, DataConfig, PrepareConfig
from cocosnet.data.conditions import load_condition
from cocosnet.data.crop import face_box, load_landmarks
from cocosnet.data.prepare import prepare
from cocosnet.data.records import Record, read_manifest
from cocosnet.data.sources import make_ids, split_of
from cocosnet.errors import ConfigError, DataError, OutputError

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # small pictures: waking a second thread takes longer than it saves


def config(**data: object) -> Config:
    return Config(data=DataConfig(**{"size": 48, **data}))


def run(source: Path, output: Path, settings: Config | None = None, **options: object) -> list[Record]:
    return list(prepare(source, output, settings or config(), **{"extractor": "hed-small", **options}))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a reader would look at."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture
def photos(shared: Path, tmp_path: Path) -> Path:
    """Six portraits in a folder of their own."""
    folder = tmp_path / "photos of people"
    folder.mkdir()
    for path in sorted((shared / "data" / "portraits512").iterdir())[:6]:
        shutil.copy(path, folder)
    return folder


def test_every_picture_gets_a_pair(photos: Path, tmp_path: Path) -> None:
    records = run(photos, tmp_path / "out")
    assert [record.id for record in records] == sorted(path.stem for path in photos.iterdir())
    assert {record.status for record in records} == {"ok"}
    for record in records:
        assert Image.open(record.target).size == Image.open(record.condition).size == (48, 48)
        assert Image.open(record.condition).mode == "L"
        assert record.exemplar != record.target
        assert Path(record.exemplar).stem == Path(record.exemplar_condition).stem
        assert record.extra["condition_source"]["network"] == "hed-small"
    assert len({record.exemplar for record in records}) == len(records)


def test_the_manifest_can_be_moved(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    records = read_manifest(tmp_path / "elsewhere")
    assert len(records) == 6
    assert all(
        Path(getattr(record, name)).is_file()
        for record in records
        for name in ("condition", "exemplar", "exemplar_condition", "target")
    )
    assert {record.extra["split"] for record in records} <= {"train", "val"}
    summary = json.loads((tmp_path / "elsewhere" / "dataset.json").read_text())
    assert (summary["task"], summary["size"], summary["pictures"]) == ("edge", 48, 6)


def test_a_record_is_ready_when_it_arrives(photos: Path, tmp_path: Path) -> None:
    for record in prepare(photos, tmp_path / "out", config(), extractor="hed-small"):
        for name in ("condition", "exemplar", "exemplar_condition", "target"):
            Image.open(getattr(record, name)).load()


def test_second_run_skips_and_changes_nothing(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    before = tree(tmp_path / "out")
    assert {record.status for record in run(photos, tmp_path / "out")} == {"skipped"}
    assert tree(tmp_path / "out") == before


def test_only_what_changed_is_made_again(photos: Path, tmp_path: Path) -> None:
    first, second, third, *_ = sorted(photos.iterdir())
    ids = {record.id: record for record in run(photos, tmp_path / "out")}
    shutil.copy(second, first)
    os.utime(first, (1, 1))
    Path(ids[third.stem].condition).unlink()
    changed = {record.id for record in run(photos, tmp_path / "out") if record.status == "ok"}
    assert changed == {first.stem, third.stem}
    assert {record.status for record in run(photos, tmp_path / "out", config(size=40))} == {"ok"}
    assert {record.status for record in run(photos, tmp_path / "out", config(size=40), overwrite=True)} == {"ok"}


def test_a_release_that_makes_pictures_in_another_way_makes_them_anew(photos, tmp_path, monkeypatch) -> None:
    run(photos, tmp_path / "out")
    monkeypatch.setattr("cocosnet.data.making.METHOD", 1)
    records = prepare(photos, tmp_path / "out", config(), extractor="hed-small")
    assert next(records).status == "ok"
    assert not (tmp_path / "out" / "manifest.jsonl").exists()  # it told of the pictures that were
    assert {record.status for record in records} == {"ok"}


def test_another_filling_is_not_passed_off_as_the_folder_that_was(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", config(crop="pad"))
    white = dataclasses.replace(config(crop="pad"), prepare=PrepareConfig(pad_value=255))
    next(prepare(photos, tmp_path / "out", white, extractor="hed-small"))
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_the_seed_decides_the_pairs(photos: Path, tmp_path: Path) -> None:
    def pairs(seed: int) -> list[str]:
        return [Path(record.exemplar).stem for record in run(photos, tmp_path / "out", seed=seed)]

    assert pairs(1) == pairs(1)
    assert any(pairs(1) != pairs(seed) for seed in (2, 3, 4))


def test_one_bad_file_is_one_error_record(photos: Path, tmp_path: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"no picture")
    (photos / "dangling.png").symlink_to(photos / "nowhere.png")
    (photos / "thin.png").write_bytes(b"")
    records = {record.id: record for record in run(photos, tmp_path / "out")}
    bad = [name for name, record in records.items() if record.failed]
    assert bad == ["bad", "dangling", "thin"]
    for name in bad:
        assert name in records[name].error and "\n" not in records[name].error
    good = [record for record in records.values() if not record.failed]
    assert len(good) == 6 and all(Path(record.exemplar).is_file() for record in good)
    assert len(read_manifest(tmp_path / "out")) == 6


def test_a_picture_alone_has_no_exemplar(photos: Path, tmp_path: Path) -> None:
    (record,) = run(photos, tmp_path / "out", limit=1)
    assert record.status == "ok" and record.exemplar is None and record.exemplar_condition is None


def test_strange_names_give_plain_unique_ids(photos: Path, tmp_path: Path) -> None:
    source = sorted(photos.iterdir())[0]
    folder = tmp_path / "odd"
    names = ["a.jpg", "A.jpg", "a.png", "sub/a.jpg", "two\nlines.jpg", "ünï.jpg", "-rf.jpg", "x" * 200 + ".jpg"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    records = run(folder, tmp_path / "out", config(size=16))
    ids = [record.id for record in records]
    assert len({name.lower() for name in ids}) == len(names)
    assert all(name.isascii() and name.isprintable() and "/" not in name and name[0] not in ".-" for name in ids)
    assert all(record.status == "ok" for record in records)
    assert [record.id for record in run(folder, tmp_path / "out", config(size=16))] == ids


def test_ids_do_not_depend_on_the_other_pictures() -> None:
    names = ["plain.jpg", "sub/deep name.png"]
    assert make_ids(names)[0] == "plain"
    assert make_ids([*names, "more.jpg"])[:2] == make_ids(names)


def test_split_is_stable_and_of_the_asked_share() -> None:
    names = [f"picture-{number}" for number in range(4000)]
    held = [name for name in names if split_of(name, 0.05) == "val"]
    assert 0.035 < len(held) / len(names) < 0.065
    assert set(held) < {name for name in names if split_of(name, 0.2) == "val"}


def test_proportions_are_kept_or_squared(tmp_path: Path, shared: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    Image.open(shared / "demo_images" / "grace_hopper.jpg").convert("RGB").resize((300, 150)).save(folder / "wide.png")
    (record,) = run(folder, tmp_path / "out")
    assert Image.open(record.target).size == Image.open(record.condition).size == (96, 48)
    (record,) = run(folder, tmp_path / "square", config(crop="square"))
    assert Image.open(record.target).size == Image.open(record.condition).size == (48, 48)


def test_faces_are_framed_as_in_metfaces(shared: Path) -> None:
    measured = []
    for name, points in list(load_landmarks(shared / "data" / "metfaces256_landmarks68.json").items())[:200]:
        left, top, right, bottom = face_box((256, 256), points)
        assert right - left == bottom - top, name
        measured.append((left, top, right - left))
    # MetFaces is framed already, so its own squares must be nearly the whole picture
    assert np.median([side for _, _, side in measured]) >= 246
    assert np.percentile([max(left, top) for left, top, _ in measured], 90) <= 14


def test_face_crops_need_landmarks(photos: Path, shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="landmarks"):
        run(photos, tmp_path / "out", config(crop="face"))
    points = json.loads((shared / "data" / "portraits512_landmarks68.json").read_text())
    missing = sorted(photos.iterdir())[0].name
    del points[missing]
    (tmp_path / "points.json").write_text(json.dumps(points))
    records = run(photos, tmp_path / "out", config(crop="face", landmarks=str(tmp_path / "points.json")))
    assert [record.status for record in records] == ["error"] + ["ok"] * 5
    assert missing in records[0].error and "landmarks" in records[0].error
    assert all(Image.open(record.target).size == (48, 48) for record in records[1:])
    (tmp_path / "points.json").write_text('{"a.jpg": {"points": [[1, 2]]}}')
    with pytest.raises(DataError, match="68 points"):
        run(photos, tmp_path / "out", config(crop="face", landmarks=str(tmp_path / "points.json")))


def test_label_maps_follow_their_photographs(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "facades256"
    records = run(source, tmp_path / "out", config(task="mask", size=64), limit=4)
    assert [record.status for record in records] == ["ok"] * 4
    summary = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert 8 <= summary["classes"] <= 12
    for record in records:
        indices = np.asarray(Image.open(source / "labels" / f"{record.id}.png")).astype(np.uint8)
        expected = skimage_resize(indices, (64, 64), order=0, anti_aliasing=False, preserve_range=True)
        assert (np.asarray(Image.open(record.condition)) == expected).mean() > 0.98
        assert load_condition(record.condition, DataConfig(task="mask", classes=12)).shape == (13, 64, 64)


def test_labels_that_do_not_fit_are_error_records(photos: Path, tmp_path: Path) -> None:
    labels = photos / "labels"
    labels.mkdir()
    first, second, third, fourth, *_ = sorted(path for path in photos.iterdir() if path.suffix == ".jpg")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.new("RGB", (60, 40)).save(fourth, exif=turned)
    Image.new("L", (60, 40), 2).save(labels / f"{fourth.stem}.png")
    Image.new("L", (64, 64), 2).save(labels / f"{first.stem}.png")
    Image.new("L", (64, 32), 2).save(labels / f"{second.stem}.png")
    Image.new("RGB", (64, 64)).save(labels / f"{third.stem}.png")
    records = {record.id: record for record in run(photos, tmp_path / "out", config(task="mask", classes=3))}
    assert len(records) == 6 and not records[first.stem].failed
    assert "proportions" in records[second.stem].error
    assert "class index" in records[third.stem].error and "--set prepare.kind=colours" in records[third.stem].error
    assert "40x60" in records[fourth.stem].error and "EXIF" in records[fourth.stem].error
    sought = [record.error for record in records.values() if "no condition file" in (record.error or "")]
    assert len(sought) == 2 and all("sought as labels/{parent}/{stem}.*" in error for error in sought)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert f"sought in {elsewhere}" in run(photos, tmp_path / "out", config(task="mask"), labels=elsewhere)[0].error
    with pytest.raises(DataError, match="no such folder"):
        run(photos, tmp_path / "out", config(task="mask", classes=3), labels=tmp_path / "absent")


@pytest.mark.parametrize("way", ["../photos of people", "link"])
def test_labels_among_the_photographs_are_none_whatever_way_leads_to_them(
    photos: Path, tmp_path: Path, way: str
) -> None:
    (tmp_path / "link").symlink_to(photos)
    names = sorted(path.stem for path in photos.iterdir())
    (photos / "labels").mkdir()
    for name in names:
        Image.new("L", (512, 512)).save(photos / "labels" / f"{name}.png")
    source = tmp_path / "photos of people" / way if way.startswith("..") else tmp_path / way
    records = run(source, tmp_path / "out", config(task="mask"), labels=photos / "labels")
    assert [(record.id, record.status) for record in records] == [(name, "ok") for name in names]


def test_ready_made_edges(photos: Path, tmp_path: Path) -> None:
    edges = tmp_path / "edges"
    edges.mkdir()
    for path in photos.iterdir():
        Image.open(path).convert("L").save(edges / f"{path.stem}.png")
    record = run(photos, tmp_path / "out", labels=edges, extractor="auto")[0]
    assert record.extra["condition_source"]["network"] == "image"
    gray = Image.open(edges / f"{record.id}.png").resize((48, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(Image.open(record.condition)), np.asarray(gray))
    assert run(photos, tmp_path / "out", labels=edges, extractor="image")[0].status == "skipped"
    with pytest.raises(ConfigError, match="would not be looked at"):
        run(photos, tmp_path / "out", labels=edges, extractor="hed-small")


def test_what_cannot_work_is_refused_at_once(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(DataError, match="a file, no folder"):
        run(sorted(photos.iterdir())[0], tmp_path / "out")
    with pytest.raises(DataError, match="labels: no such folder"):
        run(photos, tmp_path / "out", config(task="pose"), extractor="openpose")
    with pytest.raises(ConfigError, match="no edge extractor"):
        run(photos, tmp_path / "out", extractor="sobel")
    assert not (tmp_path / "out").exists()


def test_output_inside_the_source_is_not_taken_for_photographs(photos: Path) -> None:
    first = [record.id for record in run(photos, photos / "prepared")]
    assert [record.id for record in run(photos, photos / "prepared")] == first


@pytest.mark.parametrize("output", [".", "..", "../images/.."])
def test_photographs_are_never_written_over(photos: Path, output: str) -> None:
    """The folder of photographs is called images, as the folder that `prepare` writes pictures to."""
    images = photos.rename(photos.with_name("images"))
    before = tree(images.parent)
    with pytest.raises(ConfigError, match="folder of its own"):
        run(images, images / output)
    assert tree(images.parent) == before


def test_a_prepared_folder_is_no_source(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", limit=2)
    with pytest.raises(ConfigError, match="prepared folder"):
        run(tmp_path / "out", tmp_path / "again")
    assert len(run(tmp_path / "out/images", tmp_path / "again")) == 2
    count = len(run(photos, photos / "first"))
    assert len(run(photos, photos / "second")) == count


def test_two_runs_at_once_do_not_meet(photos: Path, tmp_path: Path) -> None:
    running = prepare(photos, tmp_path / "out", config(), extractor="hed-small")
    next(running)
    with pytest.raises(DataError, match="another prepare"):
        run(photos, tmp_path / "out")
    running.close()
    assert len(run(photos, tmp_path / "out")) == 6


def test_a_file_system_without_locks_is_no_other_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert [record.status for record in run(photos, tmp_path / "out", limit=1)] == ["ok"]
    assert "no locks here" in caplog.text


def test_a_half_changed_folder_does_not_look_whole(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    again = prepare(photos, tmp_path / "out", config(), extractor="hed-small")
    next(again)
    again.close()
    assert len(read_manifest(tmp_path / "out")) == 6
    changed = prepare(photos, tmp_path / "out", config(size=32), extractor="hed-small")
    next(changed)
    changed.close()
    with pytest.raises(DataError, match="cocosctl prepare"):
        read_manifest(tmp_path / "out")
    assert len(run(photos, tmp_path / "out", config(size=32))) == len(read_manifest(tmp_path / "out")) == 6


def test_the_manifest_comes_last(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out/dataset.json").mkdir(parents=True)  # where a file cannot be put
    with pytest.raises(OutputError, match=r"dataset\.json"):
        run(photos, tmp_path / "out", limit=2)
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_enlarged_pictures_are_told_of(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(photos, tmp_path / "out", limit=2)
    assert not caplog.messages
    Image.new("RGB", (60, 47)).save(photos / "a small one.png")
    run(photos, tmp_path / "out")
    (told,) = caplog.messages
    assert "size=48" in told and "1 of 7 pictures" in told


def test_a_picture_like_a_ribbon_costs_one_record(photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1700, 100)).save(photos / "ribbon.png")
    failed = [record for record in run(photos, tmp_path / "out") if record.failed]
    assert [record.id for record in failed] == ["ribbon"] and "1700x100 px is too thin" in failed[0].error


def test_killed_and_run_again_equals_an_undisturbed_run(photos: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, torch; from pathlib import Path; from cocosnet.config import Config, DataConfig\n"
        "from cocosnet.data.prepare import prepare; torch.set_num_threads(1)\n"
        "for record in prepare(Path(sys.argv[1]), Path(sys.argv[2]), Config(data=DataConfig(size=48)),\n"
        "                      extractor='hed-small'): time.sleep(0.05)\n"
    )
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    for enough in (2, 4):
        process = subprocess.Popen([sys.executable, "-c", script, str(photos), str(killed)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(list(killed.glob("images/[!.]*.png"))) < enough and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in killed.glob("*/[!.]*.png"):  # a temporary file may be half-written
            Image.open(path).load()
    (killed / "images" / ".tmp-left.png").write_bytes(b"half")
    assert "skipped" in {record.status for record in run(photos, killed)}
    run(photos, calm)
    assert tree(killed) == tree(calm)
    assert not list(killed.rglob(".tmp-*"))
