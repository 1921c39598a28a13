"""Who becomes whose exemplar, recipes, and work in several processes, killed ones included."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cli_tools import COCOSCTL, clean_environment, draw_pictures, lines, run
from PIL import Image

from cocosnet.config import Config, DataConfig, PrepareConfig
from cocosnet.data.check import find_faults
from cocosnet.data.conditions import load_condition
from cocosnet.data.pairs import listed, nearest, random_round, same_item
from cocosnet.data.prepare import plan, prepare
from cocosnet.data.records import read_manifest
from cocosnet.data.sources import Item, find_items, load_recipe, recipe_names
from cocosnet.errors import ConfigError, DataError

SAMPLES = "data/cocosnet_samples"


def items(*names: str, split: str = "train") -> list[Item]:
    return [Item(name.replace("/", "-")[:-4], Path(name), name, split) for name in names]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a reader would look at."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in shown}


def test_training_pairs_stay_in_training() -> None:
    splits = ["train", "val", "train", "val", "train"]
    following = random_round(splits, 3)
    assert all(splits[other] == split for other, split in zip(following, splits))
    assert sorted(following) == [0, 1, 2, 3, 4] and all(other != index for index, other in enumerate(following))
    assert random_round(["train", "val", "train"], 0)[1] in (0, 2)
    assert random_round(["train"], 0) == [0]


def test_same_item_is_the_folder_or_what_an_expression_finds() -> None:
    photos = items("id_1/01_1_front.jpg", "id_1/01_2_side.jpg", "id_1/02_1_front.jpg", "id_2/01_1_front.jpg")
    by_folder = [[choice.index for choice in row] for row in same_item(photos, "")]
    assert by_folder == [[1, 2], [2, 0], [0, 1], []]
    by_colour = [[choice.index for choice in row] for row in same_item(photos, r"^(.*id_\d+/\d+)_")]
    assert by_colour == [[1], [0], [], []]
    with pytest.raises(ConfigError, match="regular expression"):
        same_item(photos, "(")


def test_thousands_of_views_of_one_item_take_little_memory() -> None:
    views = items(*[f"clip/{number}.jpg" for number in range(3000)])
    tracemalloc.start()
    choices = same_item(views, "")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert len(choices[0]) == 2999 and choices[2999][0].index == 0 and choices[7][2998].index == 6


def test_nearest_is_exact_and_never_oneself_nor_its_copy() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 16))
    vectors[7] = vectors[3]  # the same picture under two names
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    splits = ["val" if index % 5 == 0 else "train" for index in range(40)]
    choices = nearest({index: vectors[index].astype(np.float32) for index in range(40)}, splits, 4)
    for index in range(40):
        pool = [i for i in range(40) if splits[i] == splits[index] and i != index and {i, index} != {3, 7}]
        expected = sorted(pool, key=lambda i: 1 - float(vectors[i] @ vectors[index]))[:4]
        assert [choice.index for choice in choices[index]] == expected
        exact = [1 - vectors[i] @ vectors[index] for i in expected]
        assert np.allclose([choice.distance for choice in choices[index]], exact, atol=1e-4)


def test_lists_in_the_authors_spelling(tmp_path: Path) -> None:
    (tmp_path / "ref.txt").write_text("img\\a\\1.jpg,a/2.jpg,img/a/1.jpg,nowhere.jpg\n\n2,1\n")
    found = listed(items("a/1.jpg", "a/2.jpg", "a/3.jpg"), [tmp_path / "ref.txt"])
    assert [[choice.index for choice in row] for row in found] == [[1], [0], []]


def test_lists_name_photographs_of_folders_called_as_the_authors_are(tmp_path: Path) -> None:
    (tmp_path / "ref.csv").write_text("images/a/1.jpg,images/b/1.jpg\nimages/b/1,./images/a/1.jpg\n")
    found = listed(items("images/a/1.jpg", "images/b/1.jpg"), [tmp_path / "ref.csv"])
    assert [[choice.index for choice in row] for row in found] == [[1], [0]]


def test_a_list_saved_by_windows_counts_from_its_first_name(tmp_path: Path) -> None:
    (tmp_path / "ref.csv").write_bytes(b"\xef\xbb\xbf1.jpg,2.jpg\r\n")
    (first, _) = listed(items("1.jpg", "2.jpg"), [tmp_path / "ref.csv"])
    assert [choice.index for choice in first] == [1]


def test_listed_exemplars_are_not_held_out_from_training(tmp_path: Path) -> None:
    (tmp_path / "ref.csv").write_text("1.jpg,2.jpg,3.jpg\n2.jpg,1.jpg\n")
    photos = [*items("1.jpg"), *items("2.jpg", split="val"), *items("3.jpg")]
    found = listed(photos, [tmp_path / "ref.csv"])
    assert [[choice.index for choice in row] for row in found] == [[2], [0], []]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"val_lists": ("absent.txt",)}, "val_lists: there is no absent.txt"),
        ({"train_lists": ("here.txt",)}, "counts only beside"),
        ({"only": ("absent.txt",)}, "only: there is no absent.txt"),
        ({"val_lists": ("other.txt",)}, "val_lists: names none"),
        ({"pairs": "here.txt"}, "1 of 3 pictures"),
        ({"pairs": "same-item"}, "0 of 3 pictures"),
    ],
)
def test_lists_that_change_nothing_are_told_of(
    settings: dict, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures(tmp_path, 3)
    (tmp_path / "here.txt").write_text("p0.png,p1.png\n")
    (tmp_path / "other.txt").write_text("elsewhere.png\n")
    monkeypatch.chdir(tmp_path)
    config = Config(DataConfig(size=32, val_fraction=0), prepare=PrepareConfig(**settings))
    list(prepare(tmp_path, tmp_path / "out", config, extractor="hed-small"))
    (told,) = caplog.messages
    assert says in told


def test_an_extractor_of_label_maps_is_refused(tmp_path: Path) -> None:
    done = run(
        "prepare", draw_pictures(tmp_path / "photos", 1), "--task", "mask", "--edges", "hed", "-o", tmp_path / "o"
    )
    assert done.returncode == 2 and "nothing to extract" in done.stderr and not (tmp_path / "o").exists()


def test_what_a_changed_option_does_not_touch_is_kept(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 4)

    def made(**settings: str) -> dict[str, int]:
        list(prepare(photos, tmp_path / "out", Config(DataConfig(size=32, **settings)), extractor=settings["edges"]))
        return {str(path.parent.name): path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("p1.png")}

    first = made(edges="hed-small")
    second = made(edges="canny")
    assert second["images"] == first["images"] and second["conditions"] > first["conditions"]
    random = [record.exemplar for record in read_manifest(tmp_path / "out")]
    (tmp_path / "pairs.csv").write_text("p0,p3,p2\n")
    settings = Config(DataConfig(size=32, edges="canny"), prepare=PrepareConfig(pairs=str(tmp_path / "pairs.csv")))
    records = list(prepare(photos, tmp_path / "out", settings))
    assert {record.status for record in records} == {"skipped"}
    assert [choice["id"] for choice in records[0].extra["exemplars"]] == ["p3", "p2"]
    assert [record.exemplar for record in records[1:]] == random[1:]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_config_with_a_card(name: str) -> None:
    config = load_recipe(name, ["data.size=64"])
    assert config.data.size == 64
    root = Path(__file__).resolve().parent.parent / "datasets"
    (recipe,) = root.glob(f"*/{name}.yaml")
    assert name in (recipe.parent / "README.md").read_text()


def test_unknown_recipes_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="ade20k-outdoor"):
        load_recipe("ade")


@pytest.mark.parametrize(
    ("recipe", "folder", "count", "held_out"),
    [("deepfashion", "DeepFashion", 8, 4), ("ade20k", "ade20k", 12, 6), ("celeba-hq-masks", "celebahq", 8, 4)],
)
def test_the_authors_samples_prepare_unchanged(
    recipe: str, folder: str, count: int, held_out: int, shared: Path, tmp_path: Path
) -> None:
    config = load_recipe(recipe, ["data.size=48", "prepare.pairs=random"])
    records = list(prepare(shared / SAMPLES / folder, tmp_path / "out", config))
    assert Counter(record.status for record in records) == {"ok": count}
    assert sum(record.extra["split"] == "val" for record in records) == held_out
    assert list(find_faults(tmp_path / "out")) == []


def write_maps(folder: Path, *names: str) -> None:
    """A label map of class 2 with a corner of class 1 under each name, 40x30 px."""
    for name in names:
        image = Image.new("RGB" if name.endswith("_seg.png") else "L", (40, 30), "#140005" if "_seg" in name else 2)
        image.paste("#000000" if "_seg" in name else 1, (0, 0, 10, 10))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)


@pytest.mark.parametrize(
    ("recipe", "photos", "maps", "classes"),
    [
        ("ade20k", "images/training/ADE_{}.jpg", "annotations/training/ADE_{}.png", 151),
        ("ade20k-full", "images/ADE/training/cat/ADE_{}.jpg", "images/ADE/training/cat/ADE_{}_seg.png", 513),
        ("coco-stuff", "images/train2017/{}.jpg", "stuffthingmaps_trainval2017/train2017/{}.png", 182),
        ("facades", "base/cmp_b{}.jpg", "base/cmp_b{}.png", 13),
        ("celeba-hq-masks", "CelebA-HQ-img/{}.jpg", "CelebAMask-HQ-mask-anno/all_parts_except_glasses/0000{}.png", 19),
    ],
)
def test_recipes_find_the_label_maps_of_their_layouts(
    recipe: str, photos: str, maps: str, classes: int, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(draw_pictures(tmp_path / "drawn", 3, (40, 30)).iterdir())):
        place = tmp_path / "set" / photos.format(number)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(place)
    write_maps(tmp_path / "set", *[maps.format(number) for number in range(3)])
    config = load_recipe(recipe, ["data.size=30", "prepare.pairs=random"])
    records = list(prepare(tmp_path / "set", tmp_path / "out", config))
    assert [record.status for record in records] == ["ok"] * 3
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == classes
    indices = np.asarray(Image.open(records[0].condition))
    full = recipe == "ade20k-full"
    assert (indices[2, 2], indices[20, 20]) == ((0, 512) if full else (1, 2))
    assert list(find_faults(tmp_path / "out")) == []


@pytest.mark.parametrize("recipe", ["metfaces-512", "metfaces-1024", "celeba-hq-edges", "folder"])
def test_recipes_of_edges_find_their_photographs(recipe: str, shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("CelebA-HQ-img" if recipe.startswith("celeba") else "images")
    folder.mkdir()
    for path in sorted((shared / "data/portraits512").iterdir())[:2]:
        shutil.copy(path, folder)
    changes = ["data.size=64", "prepare.pairs=random", f"data.landmarks={shared}/data/portraits512_landmarks68.json"]
    small = "hed-small-face" if recipe.startswith("metfaces") else "hed-small"
    records = list(prepare(tmp_path, tmp_path / "out", load_recipe(recipe, changes), extractor=small))
    assert [record.status for record in records] == ["ok", "ok"]
    assert records[0].extra["condition_source"]["network"] == small


def test_moved_landmarks_touch_only_the_drawn_face(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(shared / "data/portraits512/adam-schiff.jpg", tmp_path / "photos")
    points = json.loads((shared / "data/portraits512_landmarks68.json").read_text())["adam-schiff.jpg"]
    times = []
    for shift in (0, 5):
        points["points"][0][0] += shift
        (tmp_path / "points.json").write_text(json.dumps({"adam-schiff.jpg": points}))
        data = DataConfig(size=64, edges="hed-small-face", landmarks=str(tmp_path / "points.json"))
        (record,) = prepare(tmp_path / "photos", tmp_path / "out", Config(data))
        times.append([Path(path).stat().st_mtime_ns for path in (record.target, record.condition)])
        assert record.status == "ok"
    assert times[0][0] == times[1][0] and times[0][1] < times[1][1]


def test_check_of_a_folder_without_one_good_pair(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 2)
    list(prepare(photos, tmp_path / "out", Config(DataConfig(size=32)), extractor="hed-small"))
    shutil.rmtree(tmp_path / "out/images")
    done = run("prepare", "--check", tmp_path / "out", "--json")
    assert done.returncode == 4 and len(lines(done.stdout)) == 2
    assert "2 pairs, 2 faults; no sheet" in done.stderr


def test_outdoor_scenes_are_told_by_their_classes_or_a_list(shared: Path, tmp_path: Path) -> None:
    config = load_recipe("ade20k-outdoor")
    found = find_items(shared / SAMPLES / "ade20k", tmp_path, config, None, True)
    for item in found:
        present = set(np.unique(np.asarray(Image.open(item.labels[0]))).tolist())
        assert present & {3, 14, 17} and not present & {6, 8, 48}
    assert 0 < len(found) < 12
    shutil.copytree(shared / SAMPLES / "ade20k", tmp_path / "set")
    (tmp_path / "set" / "outdoor.txt").write_text(f"{found[0].photo.name}\n")
    assert len(find_items(tmp_path / "set", tmp_path / "out", config, None, True)) == 1
    (tmp_path / "set" / "outdoor.txt").write_text("elsewhere.jpg\n")
    with pytest.raises(DataError, match="leave none of its 12 pictures"):
        find_items(tmp_path / "set", tmp_path / "out", config, None, True)


def test_capital_suffixes_are_the_same(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "one.JPG")
    Image.new("L", (40, 40)).save(tmp_path / "one.png")
    (item,) = find_items(tmp_path, tmp_path / "out", load_recipe("facades"), None, True)
    assert item.photo.name == "one.JPG" and item.labels == (tmp_path / "one.png",)


def test_classes_of_colours_are_told_by_the_palette(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "photos", 2)
    (tmp_path / "labels").mkdir()
    for name, colour in (("p0", "red"), ("p1", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "palette.json").write_text("[[255, 0, 0], [0, 0, 255]]")
    settings = PrepareConfig(kind="colours", any_class=(1,), palette=str(tmp_path / "palette.json"))
    (found,) = find_items(tmp_path, tmp_path / "out", Config(DataConfig("mask"), prepare=settings), None, True)
    assert found.id == "p1"
    with pytest.raises(ConfigError, match=r"prepare\.palette"):
        settings = PrepareConfig(kind="colours", any_class=(1,))
        find_items(tmp_path, tmp_path / "out", Config(DataConfig("mask"), prepare=settings), None, True)


def test_deepfashion_hd_pads_with_232_and_reads_its_canvas(tmp_path: Path) -> None:
    folder = tmp_path / "img/WOMEN/Dresses/id_00000001"
    folder.mkdir(parents=True)
    Image.new("RGB", (750, 1101), (10, 20, 30)).save(folder / "01_1_front.jpg", quality=100)
    pose = tmp_path / "pose/WOMEN/Dresses/id_00000001"
    pose.mkdir(parents=True)
    (pose / "01_1_front_candidate.txt").write_text("512 256 0.9 0\n256 768 0.8 1\n")
    (pose / "01_1_front_subset.txt").write_text(" ".join(["0", "1", *["-1"] * 16, "1.7", "2"]))
    (record,) = prepare(tmp_path, tmp_path / "out", load_recipe("deepfashion-hd"))
    image = np.asarray(Image.open(record.target))
    assert image.shape == (512, 512, 3)
    left = round(175 / 1101 * 512)  # 750 px in the middle of 1101
    assert (image[:, : left - 4] == 232).all() and (image[:, -left + 5 :] == 232).all()
    assert abs(image[256, 256].astype(int) - (10, 20, 30)).max() <= 3
    joints = np.array(json.loads(Path(record.condition).read_text())["people"][0]["pose_keypoints_2d"]).reshape(18, 3)
    assert joints[0].tolist() == [256, 128, 0.9] and joints[1].tolist() == [128, 384, 0.8]
    for path in pose.iterdir():
        path.unlink()
    for canvas, nose in (((750, 1101), (100, 550.5)), ((512, 512), (128, 256))):  # as the file says: photograph, square
        people = [{"pose_keypoints_2d": [*nose, 0.9] + [0] * 51}]
        content = {"canvas_width": canvas[0], "canvas_height": canvas[1], "people": people}
        (pose / "01_1_front.json").write_text(json.dumps(content))
        (record,) = prepare(tmp_path, tmp_path / "out", load_recipe("deepfashion-hd"))
        joints = json.loads(Path(record.condition).read_text())["people"][0]["pose_keypoints_2d"]
        assert np.allclose(joints[:2], (128, 256), atol=0.5)
    with pytest.raises(ConfigError, match="crop=pad"):
        list(prepare(tmp_path, tmp_path / "out", load_recipe("deepfashion-hd", ["data.crop=none"])))


def test_the_ground_of_padded_maps_of_many_classes_is_none_of_them(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "photos", 1, (60, 40))
    (tmp_path / "labels").mkdir()
    indices = np.full((40, 60), 299, np.uint16)
    indices[0] = 65535  # "no class" of 16 bits
    Image.fromarray(indices).save(tmp_path / "labels/p0.png")
    (record,) = prepare(tmp_path, tmp_path / "out", Config(DataConfig("mask", size=60, crop="pad")))
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == 300
    condition = load_condition(record.condition, DataConfig("mask", classes=300))
    assert condition[300, :11].all() and condition[300, 50:].all() and condition[299, 11:50].all()
    assert not list(find_faults(tmp_path / "out"))


def test_check_names_every_fault(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "set/photos", 6)
    for path in photos.iterdir():
        (tmp_path / "set/labels").mkdir(exist_ok=True)
        Image.new("L", Image.open(path).size, 2).save(tmp_path / "set/labels" / path.name)
    config = Config(DataConfig(task="mask", size=32, classes=3, val_fraction=0))
    list(prepare(tmp_path / "set", tmp_path / "out", config))
    assert list(find_faults(tmp_path / "out")) == []
    Image.new("L", (38, 32), 9).save(tmp_path / "out/conditions/p0.png")
    Image.new("L", (20, 20), 1).save(tmp_path / "out/conditions/p1.png")
    (tmp_path / "out/images/p2.png").write_bytes(b"half")
    manifest = tmp_path / "out/manifest.jsonl"
    rows = lines(manifest.read_text())
    rows[3] |= {"exemplar": rows[3]["target"]}
    rows[4] |= {"exemplar": rows[5]["target"]}
    rows[5] |= {"split": "val"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("prepare", "--check", tmp_path / "out", "--json")
    faults = {record["id"]: record["error"] for record in lines(done.stdout)}
    assert done.returncode == 4
    assert Image.open(tmp_path / "out/contact-sheet.jpg").width > 200
    for name, word in {"p0": "label indices", "p1": "20x20", "p2": "p2.png", "p3": "own", "p4": "held-out"}.items():
        assert word in faults[name]
    assert "p5" not in faults and "manifest has" not in done.stderr
    manifest.write_text("".join(manifest.read_text().splitlines(True)[:4]))
    assert "its manifest has 4 pairs, and 6 were prepared" in run("prepare", "--check", tmp_path / "out").stderr


def test_dry_run_says_bytes_and_writes_nothing(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 3, (300, 200))
    (photos / "p0.png").rename(photos / "two\nlines.png")
    command = ["prepare", photos, "-o", tmp_path / "out", "--size", 128, "--edges", "hed-small"]
    told = run(*command, "--dry-run")
    assert told.returncode == 0 and "3 of 3 pictures" in told.stderr and "MB" in told.stderr
    assert len(told.stdout.splitlines()) == 3 and r"two\nlines.png" in told.stdout  # one path a line
    assert not (tmp_path / "out").exists()
    settings = Config(DataConfig(size=128))
    list(prepare(photos, tmp_path / "out", settings, extractor="hed-small"))
    left = plan(photos, tmp_path / "out", settings, extractor="hed-small").todo()
    assert [(record.status, size) for record, size in left] == [("skipped", 0)] * 3
    checked = run("prepare", "--check", tmp_path / "out", "--dry-run")
    assert (checked.returncode, checked.stdout) == (0, "") and "3 pairs, 0 faults; no sheet" in checked.stderr
    assert not (tmp_path / "out/contact-sheet.jpg").exists()


def test_processes_and_ranks_make_the_same_bytes(tmp_path: Path) -> None:
    photos = draw_pictures(tmp_path / "photos", 7)
    (photos / "bad.png").write_bytes(b"no picture")
    command = ["prepare", str(photos), "--size", "32", "--edges", "hed-small", "--json", "-o"]
    alone = run(*command, tmp_path / "alone")
    several = run(*command, tmp_path / "several", "--workers", 2)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cocosctl",
    ]
    ranks = subprocess.run(
        [*launcher, *command, str(tmp_path / "ranks")], capture_output=True, text=True, env=clean_environment()
    )
    assert alone.returncode == several.returncode == 4
    assert tree(tmp_path / "alone").keys() == tree(tmp_path / "several").keys() == tree(tmp_path / "ranks").keys()
    for name, content in tree(tmp_path / "alone").items():
        for other in ("several", "ranks"):
            where = str(tmp_path / other).encode(), str(tmp_path / "alone").encode()
            assert (tmp_path / other / name).read_bytes().replace(*where) == content
    ids = [record["id"] for record in lines(alone.stdout)]
    assert ids == [record["id"] for record in lines(several.stdout)] == [r["id"] for r in lines(ranks.stdout)]
    assert len(ids) == 8


def test_killed_with_retrieval_ends_with_the_same_bytes(shared: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((shared / "data/metfaces256").iterdir())[:8]:
        shutil.copy(path, photos)
    weights = {"COCOSCTL_WEIGHTS_DIR": str(shared / "weights")}
    command = ["prepare", str(photos), "--size", "64", "--edges", "hed-small", "--pairs", "retrieval", "--json", "-o"]
    process = subprocess.Popen(
        [*COCOSCTL, *command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, env=clean_environment(**weights)
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("killed/images/[!.]*.png"))) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run(*command, tmp_path / "killed", **weights)
    calm = run(*command, tmp_path / "calm", **weights)
    assert again.returncode == calm.returncode == 0 and '"skipped"' in again.stdout
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")
    for record in lines(calm.stdout):
        distances = [choice["distance"] for choice in record["exemplars"]]
        assert distances == sorted(distances) and record["id"] not in [c["id"] for c in record["exemplars"]]
        assert Path(record["exemplar"]).stem == record["exemplars"][0]["id"]
