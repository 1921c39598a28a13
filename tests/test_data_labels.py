"""Label maps of every layout become the indices that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocosnet.data.labels import PARTS, UNKNOWN, find_palette, nearest_colours, read_labels, read_palette
from cocosnet.errors import DataError

COLOURS = np.array([[0, 0, 0], [8, 8, 218], [40, 250, 228], [220, 20, 60], [250, 170, 30]], np.uint8)


@pytest.fixture
def indices() -> np.ndarray:
    """Blocks of five classes, 48x64."""
    return np.kron(np.arange(12).reshape(3, 4) % 5, np.ones((16, 16), int))


@pytest.mark.parametrize(("suffix", "share"), [(".png", 1.0), (".jpg", 0.9)])
def test_colours_are_found_and_read(
    indices: np.ndarray, suffix: str, share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"map{suffix}"
    Image.fromarray(COLOURS[indices]).save(path, quality=85)
    palette = find_palette([path])
    assert bool(caplog.messages) == (suffix == ".jpg") and all("give prepare.palette" in m for m in caplog.messages)
    assert len(palette) == 5 and palette.tolist() == sorted(palette.tolist())
    found = palette[read_labels([path], "colours", palette)].astype(int)
    assert (np.abs(found - COLOURS[indices]).max(axis=2) <= 12).mean() >= share


def test_a_given_palette_keeps_its_order_and_knows_what_it_lacks(indices: np.ndarray, tmp_path: Path) -> None:
    for given in (COLOURS[:4].astype(float), COLOURS[:4]):
        (tmp_path / "palette.json").write_text(str(given.tolist()))
        palette = read_palette(tmp_path / "palette.json")
        assert palette.tolist() == COLOURS[:4].tolist()
    found = nearest_colours(COLOURS[indices], palette)
    assert np.array_equal(found, np.where(indices == 4, UNKNOWN, indices))
    for wrong in ("[[1, 2]]", "[[0.5, 0.5, 1.0]]", "[[0.0, 0.0, 1.0]]", "[[0.5, 128, 1]]", str([[1, 2, 3]] * 256)):
        (tmp_path / "palette.json").write_text(wrong)
        with pytest.raises(DataError, match="palette"):
            read_palette(tmp_path / "palette.json")


def test_photographs_are_not_taken_for_label_maps(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    with pytest.raises(DataError, match="colours"):
        find_palette([tmp_path / "photo.png"])


def test_full_ade20k_codes(tmp_path: Path) -> None:
    classes = np.array([[0, 1, 300], [2977, 255, 12]])
    pixels = np.stack([classes // 256 * 10, classes % 256, np.full_like(classes, 7)], 2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a_seg.png")
    assert np.array_equal(read_labels([tmp_path / "a_seg.png"], "ade20k-full"), classes)


def test_parts_are_painted_in_the_right_order(tmp_path: Path) -> None:
    """Hair covers the brow, the brow the skin; the numbers are those of the authors' own maps."""
    for part, box in {"hair": (0, 0, 32, 8), "skin": (4, 4, 28, 32), "l_brow": (8, 6, 20, 10)}.items():
        mask = np.zeros((32, 32), np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(mask).save(tmp_path / f"00007_{part}.png")
    merged = read_labels(sorted(tmp_path.iterdir()), "celeba-parts")
    assert [merged[y, x] for y, x in ((0, 0), (7, 10), (9, 10), (20, 10), (31, 0))] == [
        *(PARTS.index(part) + 1 for part in ("hair", "hair", "l_brow", "skin")),
        0,
    ]


def test_the_numbering_is_that_of_the_authors_maps(shared: Path) -> None:
    folder = shared / "data/cocosnet_samples/celebahq/CelebAMask-HQ-mask-anno"
    whole = read_labels([folder / "all_parts_except_glasses/23071.png"], "celeba-parts")
    for part in ("l_eye", "r_eye"):
        mask = np.asarray(Image.open(folder / f"11/23071_{part}.png").convert("L")) > 127
        values, counts = np.unique(whole[mask], return_counts=True)
        assert values[counts.argmax()] == PARTS.index(part) + 1
