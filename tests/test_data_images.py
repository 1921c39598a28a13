"""Hostile picture files become plain pixels or one clear line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import resize as skimage_resize

from cocosnet.config import DataConfig
from cocosnet.data.conditions import labels_to_image, load_condition
from cocosnet.data.images import (
    find_images,
    load_gray,
    load_labels,
    load_rgb,
    resize_shorter,
    save_image,
    to_image,
    to_tensor,
)
from cocosnet.errors import DataError


@pytest.fixture
def photo(shared: Path) -> Path:
    return shared / "data" / "portraits512" / "adam-schiff.jpg"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message.isprintable()
    return message


def test_damaged_files_name_themselves(tmp_path: Path, photo: Path) -> None:
    content = photo.read_bytes()
    cases = {
        "empty.jpg": b"",
        "text.png": b"hello\n" * 100,
        "cut.jpg": content[: len(content) // 2],
        "head.jpg": content[:30],
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError) as error:
            load_rgb(path)
        assert name in one_line(error)


def test_truncated_png(tmp_path: Path, photo: Path) -> None:
    path = tmp_path / "whole.png"
    Image.open(photo).save(path)
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=r"cut\.png"):
        load_rgb(tmp_path / "cut.png")


def test_missing_and_folder(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "absent.png", "no such file"), (tmp_path, "a folder, no file; give one file")):
        with pytest.raises(DataError, match=said):
            load_rgb(path)


def test_newline_in_a_name_stays_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines.png"
    path.write_bytes(b"x")
    with pytest.raises(DataError) as error:
        load_rgb(path)
    assert r"two\nlines.png" in one_line(error)


@pytest.mark.parametrize("side", [13_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)))
    with pytest.raises(DataError, match="too big"):
        load_rgb(path)


def test_every_mode_becomes_rgb_of_about_the_same_pixels(tmp_path: Path, photo: Path) -> None:
    image = Image.open(photo).resize((160, 120))
    rgb, gray = np.asarray(image, dtype=float), np.asarray(image.convert("L"), dtype=float)
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    fractions = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    transparent = image.convert("RGBA")
    cases = [
        ("cmyk.jpg", image.convert("CMYK"), rgb, 4),
        ("palette.png", image.quantize(256), rgb, 6),
        ("palette.gif", image.quantize(256), rgb, 6),
        ("alpha.png", transparent, rgb, 0),
        ("gray-alpha.png", image.convert("LA"), gray[..., None], 0),
        ("sixteen.png", sixteen, gray[..., None], 0.6),
        ("sixteen.tif", sixteen, gray[..., None], 0.6),
        ("photo.webp", image, rgb, 8),
        ("float.tif", fractions, gray[..., None], 0.6),
        ("ycc.tif", image.convert("YCbCr"), rgb, 2),
    ]
    for name, picture, truth, tolerance in cases:
        picture.save(tmp_path / name)
        loaded = load_rgb(tmp_path / name)
        assert loaded.mode == "RGB" and loaded.size == (160, 120), name
        assert np.abs(np.asarray(loaded, dtype=float) - truth).mean() <= tolerance, name


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (9, 9), 3)
    palette.putpalette([0, 0, 0] * 8)
    palette.save(tmp_path / "clear-palette.png", transparency=3)
    for name in ("clear.png", "clear-palette.png"):
        assert load_rgb(tmp_path / name).getpixel((4, 4)) == (255, 255, 255), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste((255, 0, 0), (0, 0, 10, 10))
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "turned.png")), np.asarray(upright))


def test_broken_exif_does_not_stop_a_good_picture(tmp_path: Path, photo: Path) -> None:
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    (tmp_path / "exif.jpg").write_bytes(buffer.getvalue())
    assert load_rgb(tmp_path / "exif.jpg").size == Image.open(photo).size


def test_big_jpeg_is_decoded_reduced_but_looks_the_same(tmp_path: Path, photo: Path) -> None:
    Image.open(photo).resize((4000, 3000)).save(tmp_path / "big.jpg")
    reduced = load_rgb(tmp_path / "big.jpg", shorter=128)
    assert 256 <= min(reduced.size) < 600
    full = np.asarray(resize_shorter(load_rgb(tmp_path / "big.jpg"), 128), dtype=float)
    assert np.abs(np.asarray(resize_shorter(reduced, 128), dtype=float) - full).mean() < 1.0


def test_a_phone_s_jpeg_of_several_pictures_is_decoded_reduced(tmp_path: Path, photo: Path) -> None:
    large = Image.open(photo).convert("RGB").resize((1600, 1600))
    large.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[large.resize((160, 160))])
    assert load_rgb(tmp_path / "phone.jpg", 200).size == (400, 400)


def test_a_transparent_colour_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "keyed.png", transparency=(10, 20, 30))
    assert (np.asarray(load_rgb(tmp_path / "keyed.png")) == 255).all()


def test_find_images_is_recursive_sorted_and_passes_over_hidden_ones(tmp_path: Path) -> None:
    names = ["b.png", "a b.JPG", "ü/ñ.webp", "two\nlines.png", ".hidden.png", ".git/c.png", "notes.txt", "out/x.png"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path, exclude=[tmp_path / "out"])]
    assert found == ["a b.JPG", "b.png", "two\nlines.png", "ü/ñ.webp"]
    with pytest.raises(DataError, match="no such folder"):
        find_images(tmp_path / "absent")


def test_links_to_folders_are_followed_and_each_folder_is_listed_once(tmp_path: Path) -> None:
    """A link that comes first by name, two to one folder, one to a folder above, and one to the own output."""
    photos, disk = tmp_path / "photos", tmp_path / "disk"
    for path in (photos / "z" / "1.png", disk / "deep" / "2.png", disk / "out" / "made.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    links = {"a": photos / "z", "b": disk, "c": disk / "deep", "top": photos, "made": disk / "out"}
    for name, target in links.items():
        (photos / name).symlink_to(target)
    (disk / "deep" / "above").symlink_to(tmp_path)
    found = find_images(photos, exclude=[disk / "out"])
    assert [str(path.relative_to(photos)) for path in found] == ["b/deep/2.png", "z/1.png"]
    (tmp_path / "way").symlink_to(photos)
    assert len(find_images(tmp_path / "way", exclude=[disk / "out"])) == 2


def test_pictures_that_are_not_read_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.jfif", "IMG_1.HEIC", "IMG_2.heic", "c.avif", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "b.jfif"]
    (told,) = caplog.messages
    assert told.endswith("1 .avif, 2 .heic")


def test_tensor_round_trip_is_exact_and_clamps(photo: Path) -> None:
    image = load_rgb(photo)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 512, 512) and tensor.dtype == torch.float32
    assert tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(image))
    assert to_image(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)


def test_resize_shorter_agrees_with_scikit_image(photo: Path) -> None:
    image = load_rgb(photo)
    ours = np.asarray(resize_shorter(image, 128), dtype=float) / 255
    theirs = skimage_resize(np.asarray(image) / 255.0, (128, 128), order=3, anti_aliasing=True)
    assert np.abs(ours - theirs).mean() < 0.01


@pytest.mark.parametrize(
    ("size", "result"), [((100, 300), (64, 192)), ((97, 131), (64, 86)), ((1, 1), (64, 64)), ((3, 1), (192, 64))]
)
def test_resize_shorter_keeps_proportions(size: tuple[int, int], result: tuple[int, int]) -> None:
    assert resize_shorter(Image.new("RGB", size), 64).size == result


def test_absurd_proportions_and_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="ask for a smaller size"):
        resize_shorter(Image.new("L", (64, 64)), 100_000)
    with pytest.raises(DataError, match="long and thin"):
        resize_shorter(Image.new("L", (600_000, 1)), 512)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_save_and_load(tmp_path: Path, photo: Path, suffix: str) -> None:
    image = load_rgb(photo)
    save_image(image, tmp_path / "new folder" / f"picture{suffix}")
    again = load_rgb(tmp_path / "new folder" / f"picture{suffix}")
    assert np.abs(np.asarray(again, dtype=float) - np.asarray(image, dtype=float)).mean() < 3
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == [f"picture{suffix}"]


def test_save_refuses_unknown_formats_and_unwritable_places(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(DataError, match="cannot write this format"):
        save_image(image, tmp_path / "picture.xyz")
    with pytest.raises(DataError, match="a folder; name the picture to write, such as .*out.png"):
        save_image(image, tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot write"):
        save_image(image, tmp_path / "file" / "picture.png")


def test_a_picture_too_long_for_jpeg_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="65500 px a side"):
        save_image(Image.new("L", (1, 66_000)), tmp_path / "long.jpg")


def test_edge_condition_is_gray_in_unit_range(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4) * 23
    Image.fromarray(values).save(tmp_path / "edges.png")
    condition = load_condition(tmp_path / "edges.png", DataConfig(task="edge"))
    assert condition.shape == (1, 3, 4)
    assert torch.equal(condition[0], torch.from_numpy(values).float() / 255)
    assert load_condition(tmp_path / "edges.png", DataConfig(task="edge"), size=(6, 9)).shape == (1, 6, 9)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_labels_are_one_hot_with_a_channel_for_the_rest(tmp_path: Path, mode: str) -> None:
    indices = np.array([[0, 1, 2], [3, 200, 1]])
    picture = Image.fromarray(indices.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        picture = Image.fromarray(indices.astype(np.uint8), "L")
        picture.putpalette([255 - i // 3 for i in range(768)])
    picture.save(tmp_path / "labels.png")
    assert np.array_equal(load_labels(tmp_path / "labels.png"), indices)
    condition = load_condition(tmp_path / "labels.png", DataConfig(task="mask", classes=3))
    assert condition.shape == (4, 2, 3)
    assert torch.equal(condition.argmax(0), torch.tensor([[0, 1, 2], [3, 3, 1]]))
    assert torch.equal(condition.sum(0), torch.ones(2, 3))


def test_labels_are_resized_without_mixing(tmp_path: Path, shared: Path) -> None:
    label = shared / "data" / "facades256" / "labels" / "train_1.png"
    condition = load_condition(label, DataConfig(task="mask", classes=12), size=(100, 90))
    assert condition.shape == (13, 100, 90)
    assert set(condition.unique().tolist()) == {0.0, 1.0}
    assert condition[-1].sum() == 0


def test_many_classes_survive_as_sixteen_bits(tmp_path: Path) -> None:
    indices = np.array([[0, 300], [70_000, -1]])
    labels_to_image(indices).save(tmp_path / "labels.png")
    assert load_labels(tmp_path / "labels.png").tolist() == [[0, 300], [65535, 65535]]


def test_colour_pictures_are_no_labels(tmp_path: Path, photo: Path) -> None:
    with pytest.raises(DataError, match="class index"):
        load_labels(photo)
    with pytest.raises(DataError, match=f"{photo.name}: cannot read this pose"):
        load_condition(photo, DataConfig(task="pose"))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_indices_of_few_bits_are_not_stretched(tmp_path: Path, depth: int) -> None:
    """As grey a PNG's largest value is white, whatever its bits; as an index it is what it is."""
    indices = np.arange(16) % 2**depth
    bits = "".join(f"{index:0{depth}b}" for index in indices)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", 16, 1, depth, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (tmp_path / "few.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert load_labels(tmp_path / "few.png")[0].tolist() == indices.tolist()


def test_a_jpeg_is_no_label_map(tmp_path: Path) -> None:
    indices = np.kron(np.arange(64).reshape(8, 8) % 12, np.ones((13, 13))).astype(np.uint8)
    Image.fromarray(indices).save(tmp_path / "labels.png", format="JPEG")
    with pytest.raises(DataError, match="JPEG does not keep"):
        load_labels(tmp_path / "labels.png")


def test_gray_of_a_colour_picture(photo: Path) -> None:
    assert np.array_equal(np.asarray(load_gray(photo)), np.asarray(Image.open(photo).convert("L")))
