"""SWD against a slow numpy implementation of the protocol, closed forms and its floor."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import torch

from cocosnet.metrics import get_metric, spill, swd

torch.set_num_threads(1)

KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def slow_pyramid(image: np.ndarray) -> list[np.ndarray]:
    """H,W,3 to Laplacian levels with scipy's plain 2-D convolution."""

    def blur(values):
        return np.stack([scipy.ndimage.convolve(values[..., c], KERNEL, mode="mirror") for c in range(3)], axis=-1)

    levels, current = [], image.astype(np.float64)
    while min(current.shape[0] // 2, current.shape[1] // 2) >= 16:
        small = blur(current)[::2, ::2]
        spread = np.zeros_like(current)
        spread[::2, ::2] = small
        levels.append(current - 4 * blur(spread))
        current = small
    return [*levels, current]


def slow_patches(level: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """128,3,7,7, one patch after the other; only the random numbers come from the generator under test."""
    tops = torch.randint(level.shape[0] - 6, (128, 1, 1), generator=generator).flatten().tolist()
    lefts = torch.randint(level.shape[1] - 6, (128, 1, 1), generator=generator).flatten().tolist()
    return np.stack([level[y : y + 7, x : x + 7].transpose(2, 0, 1) for y, x in zip(tops, lefts, strict=True)])


def slow_distance(first: np.ndarray, second: np.ndarray, seed: int) -> float:
    """Per-channel normalisation, then a loop over directions, each with scipy's 1-D Wasserstein distance."""

    def descriptors(patches):
        for channel in range(3):
            values = patches[:, channel]
            patches[:, channel] = (values - values.mean()) / values.std()
        return patches.reshape(len(patches), -1)

    first, second = descriptors(first.copy()), descriptors(second.copy())
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(4):
        directions = torch.randn(147, 128, generator=generator, dtype=torch.float64).numpy()
        for direction in directions.T:
            unit = direction / np.linalg.norm(direction)
            distances.append(np.abs(np.sort(first @ unit) - np.sort(second @ unit)).mean())
    return 1000 * float(np.mean(distances))


def sets(seed: int, size: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and smoothed noise: B,3,H,W uint8 each."""
    random = np.random.default_rng(seed)
    first = random.integers(0, 256, (count, 3, *size), dtype=np.uint8)
    second = scipy.ndimage.gaussian_filter(random.integers(0, 256, first.shape).astype(float), (0, 0, 2, 1)) * 3 % 256
    return torch.from_numpy(first), torch.from_numpy(second.astype(np.uint8))


def measure(outputs: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> dict:
    metric = get_metric("swd", seed=seed)
    metric.update(outputs, targets)
    return metric.compute()


@pytest.mark.parametrize("size", [(64, 64), (45, 67)])
def test_equals_a_slow_implementation_level_by_level(size):
    outputs, targets = sets(1, size, count=2)
    gathered: dict[str, list[list[np.ndarray]]] = {}
    for side, batch in (("output", outputs), ("target", targets)):
        for picture in batch:
            generator = torch.Generator().manual_seed(swd.picture_seed(picture, side, 5))
            levels = [slow_patches(level, generator) for level in slow_pyramid(picture.permute(1, 2, 0).numpy())]
            gathered.setdefault(side, []).append(levels)
    per_level = [[np.concatenate(level) for level in zip(*pictures, strict=True)] for pictures in gathered.values()]
    expected = [slow_distance(first, second, seed=5) for first, second in zip(*per_level, strict=True)]
    result = measure(outputs, targets, seed=5)
    assert list(result["levels"].values()) == pytest.approx(expected, rel=1e-4)
    assert result["value"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_levels_are_halved_down_to_sixteen():
    def names(height, width):
        return list(measure(*sets(2, (height, width), 1))["levels"])

    assert names(256, 256) == ["256", "128", "64", "32", "16"]
    assert names(128, 200) == ["128", "64", "32", "16"]
    assert names(16, 16) == ["16"]
    assert names(97, 131) == ["64", "32", "16"]


def test_pyramid_of_a_flat_picture_is_flat_and_of_a_picture_sums_back():
    flat = swd.laplacian_pyramid(torch.full((1, 3, 64, 48), 7.0))
    assert all(level.abs().max() < 1e-5 for level in flat[:-1])
    assert torch.allclose(flat[-1], torch.full_like(flat[-1], 7.0))
    image = sets(3, (50, 70), 1)[0].float()
    fine, coarse = swd.laplacian_pyramid(image)
    spread = torch.zeros_like(image)
    spread[..., ::2, ::2] = coarse
    assert torch.allclose(fine + 4 * swd._blur(spread), image, atol=1e-3)


def test_distance_of_shifted_sets_has_a_closed_form():
    """Moving a set by v moves its projection on u by u.v: the distance is the mean |u.v| over the directions."""
    patches = torch.from_numpy(np.random.default_rng(4).normal(size=(500, 147))).float()
    shift = torch.linspace(-1, 2, 147)
    generator = torch.Generator().manual_seed(9)
    directions = torch.cat([torch.randn(147, 128, generator=generator, dtype=torch.float64) for _ in range(4)], dim=1)
    expected = ((directions / directions.norm(dim=0)).T @ shift.double()).abs().mean().item()
    found = swd.sliced_distance([patches], [patches + shift], 500, torch.Generator().manual_seed(9))
    assert found == pytest.approx(expected, rel=1e-5)
    assert swd.sliced_distance([patches], [patches], 500, torch.Generator().manual_seed(9)) == 0


def test_brightness_and_contrast_of_a_set_do_not_count():
    """Sets are normalised a channel: an affine change of all pixels leaves the pattern, so it reads as the floor."""
    outputs, _ = sets(5, (64, 64), 8)
    changed = (outputs // 2 + 60).to(torch.uint8)
    assert measure(changed, outputs)["value"] < 1.3 * measure(outputs, outputs)["value"]


def test_value_is_reproducible_and_independent_of_order_and_batching():
    outputs, targets = sets(6, (40, 40), 5)
    turned = get_metric("swd", seed=3)
    for index in (4, 1, 0, 3, 2):
        turned.update(outputs[index : index + 1], targets[index : index + 1])
    straight = measure(outputs, targets, seed=3)
    assert turned.compute()["value"] == pytest.approx(straight["value"], rel=1e-6)
    assert measure(outputs, targets, seed=3) == straight
    assert measure(outputs, targets, seed=4)["value"] != straight["value"]


def test_same_photographs_read_near_the_floor_and_noisy_ones_far_above(shared):
    from cocosnet.data.images import load_rgb

    files = sorted((shared / "data/portraits512").glob("*.jpg"))[:12]
    photos = torch.stack([torch.from_numpy(np.array(load_rgb(f).resize((64, 64)))).permute(2, 0, 1) for f in files])
    noise = np.random.default_rng(0).normal(0, 25, photos.shape)
    noisy = torch.from_numpy(np.clip(photos.numpy() + noise, 0, 255).astype(np.uint8))
    same, other = measure(photos, photos)["levels"], measure(noisy, photos)["levels"]
    assert other["64"] > 3 * same["64"]


def test_the_value_stays_when_patches_wait_in_files_and_are_read_in_pieces(monkeypatch):
    """Everything in files, pieces that end inside a picture, 30 directions at once."""
    outputs, targets = sets(7, (40, 40), 5)
    plain = measure(outputs, targets, seed=1)
    monkeypatch.setattr(spill, "IN_MEMORY", 1000)
    monkeypatch.setattr(spill, "CHUNK", 100 * swd.D * 4)
    monkeypatch.setattr(swd, "PROJECTED", 30 * 4 * 5 * swd.PATCHES)
    spilled = measure(outputs, targets, seed=1)
    assert spilled["value"] == pytest.approx(plain["value"], rel=1e-6)
    assert spilled["levels"] == pytest.approx(plain["levels"], rel=1e-6)


GROWTH = """
import resource, torch
from cocosnet.metrics import get_metric
metric, peaks, random = get_metric("swd"), [], torch.Generator().manual_seed(0)
for count in (100, 300):
    while metric.count < count:
        metric.update(*torch.randint(256, (2, 5, 3, 64, 64), generator=random, dtype=torch.uint8))
    metric.compute()
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_pairs():
    """200 pairs more are 86 MB of patches at 64 px; the projections of a level grow by 26 MB up to a bound."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, timeout=200)
    assert float(done.stdout) < 60


PEAK = """
import resource, torch
from cocosnet.metrics import get_metric, swd
swd.REPEATS = 1
metric, random = get_metric("swd"), torch.Generator().manual_seed(0)
metric.update(*torch.randint(256, (2, 1000, 3, 16, 16), generator=random, dtype=torch.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
metric.compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
"""


def test_the_distance_needs_little_more_memory_than_the_projections_of_both_sides():
    """128,000 patches a side: 62.5 MiB a side."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=200)
    assert float(done.stdout) < 250


FULL = """
import resource
import numpy as np
from cocosnet.errors import DataError
from cocosnet.metrics.spill import Spill
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    Spill("uint8").add(np.zeros(20 << 20, np.uint8))
except DataError as error:
    print(error)
"""


def test_a_folder_that_takes_no_more_is_named(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL], capture_output=True, text=True, check=True, timeout=200, env=environment
    )
    assert str(tmp_path) in done.stdout and "free some space or name another folder in TMPDIR" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_flat_pictures_give_a_number():
    flat = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert measure(flat, flat)["value"] == 0
