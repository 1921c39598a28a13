"""Distortions and training pairs: exact where there is a closed form, repeatable everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import draw_pictures
from PIL import Image
from scipy.interpolate import RBFInterpolator
from skimage.transform import warp

from cocosnet.config import Config, DataConfig, DistortionConfig, load_config
from cocosnet.data.dataset import PairDataset, as_prepared, remarks
from cocosnet.data.distortion import apply_grid, distort, random_grid, spline_basis
from cocosnet.data.images import load_rgb, to_tensor
from cocosnet.data.prepare import prepare
from cocosnet.errors import ConfigError, DataError
from cocosnet.model.warp import pixel_grid

torch.set_num_threads(1)
STILL = DistortionConfig(rotate=0, scale=0, translate=0, tps=0, flip=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_spline_agrees_with_scipy() -> None:
    rng = np.random.default_rng(5)
    points, values, queries = rng.random((20, 2)), rng.normal(size=(20, 2)), rng.random((300, 2)) * 1.4 - 0.2
    theirs = RBFInterpolator(points, values, kernel="thin_plate_spline")(queries)
    ours = spline_basis(torch.from_numpy(points), torch.from_numpy(queries)) @ torch.from_numpy(values)
    assert np.abs(ours.numpy() - theirs).max() < 1e-9


def test_random_grid_is_the_spline_of_its_shifts() -> None:
    config = DistortionConfig(rotate=0, scale=0, translate=0, tps=0.05, tps_grid=3)
    height, width = 20, 31
    grid = random_grid(1, height, width, config, seeded(3))[0]
    shifts = torch.randn(1, 9, 2, generator=seeded(3))[0].numpy() * 0.05 * np.array([height, width])
    axes = np.meshgrid([0, 0.5, 1], [0, 0.5, 1], indexing="ij")
    own = pixel_grid(height, width).flatten(1).T.numpy()
    spline = RBFInterpolator(np.stack(axes, 2).reshape(-1, 2), shifts, kernel="thin_plate_spline")
    expected = own + spline(own / [height - 1, width - 1])
    assert np.abs(grid.flatten(1).T.numpy() - expected).max() < 1e-3


def test_no_distortion_changes_nothing() -> None:
    image = torch.rand(2, 4, 17, 23)
    assert torch.allclose(distort(image, STILL, seeded())[0], image, atol=1e-5)


def test_flip_mirrors() -> None:
    image = torch.rand(2, 3, 8, 9)
    config = DistortionConfig(rotate=0, scale=0, translate=0, tps=0, flip=1)
    assert torch.allclose(distort(image, config, seeded())[0], image.flip(3), atol=1e-5)


def test_affine_stays_within_its_bounds_and_is_rigid_up_to_scale() -> None:
    config = DistortionConfig(rotate=20, scale=0.2, translate=0.1, tps=0)
    grid = random_grid(64, 40, 60, config, seeded())
    down, across = grid[..., 1, 0] - grid[..., 0, 0], grid[..., 0, 1] - grid[..., 0, 0]
    assert torch.allclose(down.norm(dim=1), across.norm(dim=1), atol=1e-4)
    assert torch.allclose((down * across).sum(1), torch.zeros(64), atol=1e-3)
    assert 0.8 - 1e-4 <= down.norm(dim=1).min() and down.norm(dim=1).max() <= 1.2 + 1e-4
    angles = torch.rad2deg(torch.atan2(-down[:, 1], down[:, 0])).abs()
    assert 5 < angles.max() <= 20 + 1e-3
    moved = (grid.mean((2, 3)) - torch.tensor([19.5, 29.5])).abs()
    assert (moved <= torch.tensor([4.0, 6.0]) + 1e-3).all()


def test_sampling_agrees_with_scikit_image(shared: Path) -> None:
    image = to_tensor(load_rgb(shared / "demo_images" / "mona_lisa.jpg").resize((64, 80)))
    grid = random_grid(1, 80, 64, DistortionConfig(), seeded(1))
    ours = apply_grid(image[None], grid)[0].numpy()
    # scikit-image's "mirror" is reflection about the pixel centres at the border, as ours
    theirs = np.stack([warp(channel, grid[0].numpy(), order=1, mode="reflect") for channel in image.numpy()])
    assert np.abs(ours - theirs).mean() < 0.02
    inside = ((grid[0] >= 0) & (grid[0] <= torch.tensor([79.0, 63.0]).view(2, 1, 1))).all(0).numpy()
    assert inside.mean() > 0.5
    assert np.abs(ours - theirs)[:, inside].max() < 1e-3


def test_other_tensors_follow_the_same_grid() -> None:
    picture, condition = torch.rand(3, 3, 24, 24), torch.rand(3, 2, 24, 24)
    together, grid = distort(torch.cat([picture, condition], 1), DistortionConfig(), seeded(9))
    assert torch.equal(together[:, :3], apply_grid(picture, grid))
    assert torch.equal(together[:, 3:], apply_grid(condition, grid))


def test_the_generator_alone_decides() -> None:
    image = torch.rand(2, 3, 24, 32)
    first = distort(image, DistortionConfig(), seeded(4))[0]
    torch.manual_seed(99)
    assert torch.equal(first, distort(image, DistortionConfig(), seeded(4))[0])
    assert not torch.equal(first, distort(image, DistortionConfig(), seeded(5))[0])
    assert not torch.equal(*distort(image[:1].expand(2, -1, -1, -1), DistortionConfig(), seeded(4))[0])


def test_too_few_control_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="tps_grid"):
        load_config(None, ["distortion.tps_grid=1"])


@pytest.fixture(scope="module")
def prepared(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of facades with their labels, 40 px, half of them held out."""
    folder = tmp_path_factory.mktemp("prepared")
    config = Config(data=DataConfig(task="mask", classes=12, size=40, val_fraction=0.5))
    records = list(prepare(shared / "data" / "facades256", folder, config, limit=8))
    assert all(record.status == "ok" for record in records)
    return folder


MASKS = Config(data=DataConfig(task="mask", classes=12, size=32))


def test_pairs_of_a_prepared_folder(prepared: Path) -> None:
    train, val = (PairDataset(prepared, MASKS, split) for split in ("train", "val"))
    assert len(train) + len(val) == 8 and len(train) and len(val)
    assert not {train[i]["id"] for i in range(len(train))} & {val[i]["id"] for i in range(len(val))}
    item = train[0]
    assert item["image"].shape == item["exemplar"].shape == (3, 40, 40)
    assert item["condition"].shape == item["exemplar_condition"].shape == (13, 40, 40)
    assert torch.equal(item["image"], to_tensor(Image.open(prepared / "images" / f"{item['id']}.png")))
    assert not torch.equal(item["image"], item["exemplar"])
    assert torch.equal(item["condition"].sum(0), torch.ones(40, 40))


def test_memory_changes_nothing_but_speed(prepared: Path) -> None:
    kept, read = PairDataset(prepared, MASKS), PairDataset(prepared, MASKS, memory=0)
    for _ in range(2):
        for key in ("image", "condition", "exemplar", "exemplar_condition"):
            assert torch.equal(kept[0][key], read[0][key])
    kept[0]["image"].zero_()
    assert torch.equal(kept[0]["image"], read[0]["image"])


def test_another_exemplar_can_be_drawn(prepared: Path) -> None:
    pairs = PairDataset(prepared, MASKS)
    item = pairs.with_exemplar(0, 1)
    assert torch.equal(item["exemplar"], pairs[1]["image"])
    assert torch.equal(item["exemplar_condition"], pairs[1]["condition"])
    assert torch.equal(item["image"], pairs[0]["image"])


def test_folders_that_do_not_fit_are_refused(prepared: Path, tmp_path: Path) -> None:
    for config, reason in (
        (DataConfig(task="edge", size=32), "task"),
        (DataConfig(task="mask", classes=12), "512"),
        (DataConfig(task="mask", classes=2, size=32), "classes"),
    ):
        with pytest.raises(DataError, match=reason):
            PairDataset(prepared, Config(data=config))
    with pytest.raises(DataError, match="cocosctl prepare"):
        PairDataset(tmp_path, MASKS)


def test_edges_by_another_extractor_than_the_config_says_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """`translate --raw` takes the extractor that the model's config names."""
    photos, folder = draw_pictures(tmp_path / "photos", 2), tmp_path / "prepared"
    made = DataConfig(size=32, edges="hed-small")
    assert all(record.status == "ok" for record in prepare(photos, folder, Config(data=made)))
    with pytest.raises(DataError, match="by hed-small, the config says hed; add --set data.edges=hed-small"):
        PairDataset(folder, Config(data=DataConfig(size=32, edges="hed")))
    PairDataset(folder, Config(data=made))
    assert as_prepared(folder, Config(data=DataConfig(size=32, edges="auto"))).data == made


def test_pictures_that_are_larger_or_cropped_otherwise_than_the_config_means_are_remarked(tmp_path: Path) -> None:
    photos, folder = draw_pictures(tmp_path / "photos", 2), tmp_path / "prepared"
    list(prepare(photos, folder, Config(data=DataConfig(size=64)), extractor="hed-small"))
    assert remarks(folder, Config(data=DataConfig(size=64))) == []
    (large,) = remarks(folder, Config(data=DataConfig(size=32)))
    assert "prepare with --size 32" in large
    (crop,) = remarks(folder, Config(data=DataConfig(size=64, crop="pad")))
    assert "prepared with data.crop=none" in crop and "prepare with --set data.crop=pad" in crop
    padded = Config(data=DataConfig(size=64, crop="pad"))
    list(prepare(photos, folder, padded, extractor="hed-small"))
    assert remarks(folder, padded) == remarks(folder, Config(data=DataConfig(size=64))) == []


def test_a_lost_picture_is_named(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    pairs = PairDataset(tmp_path / "copy", MASKS)
    path = tmp_path / "copy" / "images" / f"{pairs.records[0].id}.png"
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        pairs[0]
