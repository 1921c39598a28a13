"""L1, PSNR and SSIM against scikit-image and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cocosnet.errors import DataError
from cocosnet.metrics import get_metric

torch.set_num_threads(1)


def pictures(seed: int, size: tuple[int, int] = (37, 52), count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two B,H,W,3 uint8 arrays: noise, and the same noise partly replaced."""
    random = np.random.default_rng(seed)
    first = random.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    other = random.integers(0, 256, first.shape, dtype=np.uint8)
    return first, np.where(random.random((count, *size, 1)) < 0.5, first, other)


def reference_ssim(first: np.ndarray, second: np.ndarray) -> float:
    return structural_similarity(
        first, second, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1
    )


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def measure(name: str, first: np.ndarray, second: np.ndarray) -> dict:
    metric = get_metric(name)
    metric.update(tensor(first), tensor(second))
    return metric.compute()


@pytest.mark.parametrize("size", [(37, 52), (11, 11), (64, 13)])
def test_ssim_equals_scikit_image(size):
    first, second = pictures(1, size)
    expected = [reference_ssim(a, b) for a, b in zip(first, second, strict=True)]
    assert measure("ssim", first, second)["value"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_ssim_equals_scikit_image_on_a_photograph(shared):
    from cocosnet.data.images import load_rgb

    photo = np.array(load_rgb(sorted((shared / "data/portraits512").glob("*.jpg"))[0]).resize((256, 256)))
    noisy = np.clip(photo + np.random.default_rng(0).normal(0, 12, photo.shape), 0, 255).astype(np.uint8)
    ssim, psnr = reference_ssim(photo, noisy), peak_signal_noise_ratio(photo, noisy)
    assert measure("ssim", photo[None], noisy[None])["value"] == pytest.approx(ssim, abs=1e-9)
    assert measure("psnr", photo[None], noisy[None])["value"] == pytest.approx(psnr, abs=1e-9)


def test_psnr_equals_scikit_image():
    first, second = pictures(2)
    expected = np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(first, second, strict=True)])
    assert measure("psnr", first, second)["value"] == pytest.approx(expected, abs=1e-9)


def test_closed_forms():
    black = np.zeros((2, 16, 20, 3), np.uint8)
    assert measure("l1", black, black + 51)["value"] == pytest.approx(0.2)
    assert measure("l1", black, black + 255)["value"] == 1.0
    assert measure("psnr", black, black + 255)["value"] == pytest.approx(0.0)
    assert measure("psnr", black, black + 51)["value"] == pytest.approx(20 * np.log10(5))
    constant = (2 * 0 * 51 + 6.5025) / (51**2 + 6.5025)  # flat pictures: only the luminance term is left
    assert measure("ssim", black, black + 51)["value"] == pytest.approx(constant)


def test_identical_pictures():
    first, second = pictures(3)
    assert measure("l1", first, first)["value"] == 0
    assert measure("ssim", first, first)["value"] == pytest.approx(1)
    same = measure("psnr", first, first)
    assert (same["value"], same["count"], same["identical"]) == (None, 3, 3)
    mixed = np.concatenate([first[:1], second[1:]])
    result = measure("psnr", first, mixed)
    assert result["identical"] == 1 and result["count"] == 3
    assert result["value"] == pytest.approx(measure("psnr", first[1:], second[1:])["value"])


@pytest.mark.parametrize("name", ["l1", "psnr", "ssim"])
def test_value_does_not_depend_on_order_or_batching(name):
    first, second = pictures(4, count=6)
    one_by_one = get_metric(name)
    for index in (5, 0, 3, 1, 4, 2):
        one_by_one.update(tensor(first[index : index + 1]), tensor(second[index : index + 1]))
    assert one_by_one.compute() == measure(name, first, second)


@pytest.mark.parametrize("name", ["l1", "psnr", "ssim", "swd"])
def test_sizes_that_differ_are_refused_by_name(name):
    with pytest.raises(DataError, match="output is 52x37, the target is 37x52"):
        get_metric(name).update(*(torch.zeros(1, 3, *size, dtype=torch.uint8) for size in ((37, 52), (52, 37))))


def test_other_misfits_are_refused():
    with pytest.raises(DataError, match="at least 11 px"):
        get_metric("ssim").update(*[torch.zeros(1, 3, 10, 40, dtype=torch.uint8)] * 2)
    with pytest.raises(DataError, match="at least 16 px"):
        get_metric("swd").update(*[torch.zeros(1, 3, 40, 15, dtype=torch.uint8)] * 2)
    with pytest.raises(DataError, match="uint8"):
        get_metric("l1").update(*[torch.zeros(1, 3, 8, 8)] * 2)


def test_nothing_measured_has_no_value():
    result = get_metric("psnr").compute()
    assert result["value"] is None and result["count"] == 0 and result["protocol"].startswith("psnr:")
