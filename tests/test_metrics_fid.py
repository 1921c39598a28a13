"""FID: the distance against closed forms and SciPy's matrix square root, the network against pytorch-fid itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from cli_tools import clean_environment
from metric_tools import START, accept, smooth_picture, write_random_inception
from PIL import Image

from cocosctl.app import run
from cocosnet import weights
from cocosnet.errors import CheckpointError, MissingWeights
from cocosnet.metrics import get_metric
from cocosnet.metrics.fid import FEATURES, GaussianFit, frechet_distance

torch.set_num_threads(1)


def fit(features: np.ndarray, chunk: int = 7) -> GaussianFit:
    """Fit of N,D features, fed in small pieces."""
    gaussian = GaussianFit(features.shape[1])
    for start in range(0, len(features), chunk):
        gaussian.add(torch.from_numpy(features[start : start + chunk]))
    return gaussian


def reference_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The textbook formula with SciPy's matrix square root in float64."""
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
    gap = first.mean(axis=0) - second.mean(axis=0)
    return float(gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize("counts", [(200, 300), (13, 100), (100, 31)])
def test_distance_equals_scipy(counts):
    random = np.random.default_rng(0)
    mix = random.normal(size=(30, 30))
    first, second = random.normal(size=(counts[0], 30)), random.normal(size=(counts[1], 30)) @ mix * 0.3 + 0.5
    assert frechet_distance(fit(first), fit(second)) == pytest.approx(reference_distance(first, second), rel=1e-6)


def test_fewer_pictures_than_features_against_the_trace_of_the_small_product():
    """tr (S1 S2)^(1/2) by the eigenvalues of the N,N matrix A B^T B A^T; SciPy's root of a singular matrix wavers.

    Centring leaves 9 pictures rank 8. The other eigenvalues are 0 but for rounding, whose root (about 1e-7, another on
    every machine) must not enter the expected value.
    """
    random = np.random.default_rng(1)
    first, second = random.normal(size=(12, 60)), random.normal(size=(9, 60)) * 2 + 1
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (first, second))
    roots = np.sqrt(np.linalg.eigvalsh(a @ b.T @ b @ a.T)[-8:]).sum()
    gap = first.mean(axis=0) - second.mean(axis=0)
    expected = gap @ gap + (a**2).sum() + (b**2).sum() - 2 * roots
    assert frechet_distance(fit(first), fit(second)) == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_scaled_and_shifted_sets():
    """The same features times s and moved by v: |v + (s-1) m|^2 + (s-1)^2 tr S, whatever the count."""
    for count in (10, 500):
        features = np.random.default_rng(2).normal(size=(count, 20))
        shift = np.linspace(-1, 1, 20)
        gap = shift + 2 * features.mean(axis=0)
        expected = gap @ gap + 4 * np.cov(features, rowvar=False).trace()
        assert frechet_distance(fit(features), fit(3 * features + shift)) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(fit(features), fit(features)) == pytest.approx(0, abs=1e-9)


def test_sampled_gaussians_approach_the_closed_form():
    """N(0, I) against N(m, diag(d)): |m|^2 + sum (1 - sqrt d)^2."""
    random = np.random.default_rng(3)
    mean, deviation = np.linspace(0, 1, 8), np.linspace(0.5, 2, 8)
    first, second = random.normal(size=(20_000, 8)), random.normal(size=(20_000, 8)) * deviation + mean
    expected = (mean**2).sum() + ((1 - deviation) ** 2).sum()
    assert frechet_distance(fit(first, 1000), fit(second, 1000)) == pytest.approx(expected, rel=0.03)


def test_streaming_equals_all_at_once_in_any_order():
    features = np.random.default_rng(4).normal(loc=100, size=(57, 16))  # a large mean would show cancellation
    for rows in (features, features[::-1].copy()):
        gaussian = fit(rows, chunk=5)
        assert gaussian.count == 57
        np.testing.assert_allclose(gaussian.mean(), features.mean(axis=0), rtol=1e-12)
        factor = gaussian.factor().numpy()
        np.testing.assert_allclose(factor.T @ factor, np.cov(features, rowvar=False), atol=1e-12)
        assert len(gaussian._rows) == 0 and factor.shape == (16, 16)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A TORCH_HOME that holds random weights under pytorch-fid's file name."""
    home = tmp_path_factory.mktemp("torch-home")
    write_random_inception(home / "hub/checkpoints")
    return home


@pytest.fixture
def inception_home(random_inception, monkeypatch):
    """Random weights that the registry takes for the real ones."""
    accept(
        monkeypatch,
        "fid-inception",
        random_inception / "hub/checkpoints" / weights.REGISTRY["fid-inception"].filename,
    )
    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    monkeypatch.delenv("COCOSCTL_WEIGHTS_DIR", raising=False)
    return random_inception


def test_network_and_statistics_equal_pytorch_fid(inception_home, tmp_path):
    from pytorch_fid import fid_score, inception

    random = np.random.default_rng(6)
    files = []
    for index, size in enumerate([(64, 64)] * 3 + [(300, 310)]):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{index}.png")
        files.append(str(tmp_path / f"{index}.png"))
    reference = inception.InceptionV3([3]).eval()
    mean, covariance = fid_score.calculate_activation_statistics(files, reference, 1, FEATURES, num_workers=0)
    metric = get_metric("fid")
    for name in files:
        picture = torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1)[None]
        metric.update(picture, picture)
    gaussian = metric.sides["output"]
    scale = np.abs(mean).mean()
    assert scale > 1e-3
    np.testing.assert_allclose(gaussian.mean(), mean, rtol=1e-4, atol=1e-4 * scale)
    factor = gaussian.factor().numpy()
    np.testing.assert_allclose(factor.T @ factor, covariance, atol=1e-4 * covariance.diagonal().mean())
    result = metric.compute()
    assert result["value"] == pytest.approx(0, abs=1e-6 * scale**2) and result["count"] == 4
    assert "biased" in result["note"]


def test_one_picture_has_no_value(inception_home):
    metric = get_metric("fid")
    metric.update(*[torch.zeros(1, 3, 32, 32, dtype=torch.uint8)] * 2)
    assert metric.compute()["value"] is None


def test_missing_and_wrong_weights_are_named(tmp_path, monkeypatch):
    entry = weights.REGISTRY["fid-inception"]
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")
    with pytest.raises(MissingWeights, match=entry.filename):
        get_metric("fid")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / entry.filename)
    content = (tmp_path / entry.filename).read_bytes()
    monkeypatch.setitem(
        weights.REGISTRY, "fid-inception", dataclasses.replace(entry, sha256=hashlib.sha256(content).hexdigest())
    )
    with pytest.raises(CheckpointError, match="not pytorch-fid's Inception weights"):
        get_metric("fid")


# SciPy 1.18 no longer knows the option `disp` that pytorch-fid 0.3.0 gives; without it, it returns the root alone.
THEIRS = """
import inspect, runpy, scipy.linalg
if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
    root = scipy.linalg.sqrtm
    scipy.linalg.sqrtm = lambda matrix, disp: (root(matrix), None)
runpy.run_module("pytorch_fid", run_name="__main__")
"""


def command(script, home, *arguments):
    """Run a script that stands for a command; what it printed, and the seconds of a core that it took."""
    environment = clean_environment(TORCH_HOME=str(home), COCOSCTL_WEIGHTS_DIR="", PYTHONWARNINGS="ignore")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


@pytest.mark.timeout(1800)  # several processes that load PyTorch; their square root alone takes 15 seconds of a core
def test_equals_the_command_of_pytorch_fid_in_less_time(inception_home, tmp_path, capsys):
    """The same folders and weights; and statistics written by either command are read by the other."""
    from pytorch_fid import fid_score

    for side in ("a", "b"):
        (tmp_path / side).mkdir()
    for index in range(12):
        smooth_picture(index).save(tmp_path / f"a/{index}.png")
        smooth_picture(index + 20, (80, 56)).point(lambda value: value // 4).save(tmp_path / f"b/{index}.png")
    a, b, ours_b, theirs_b = (tmp_path / name for name in ("a", "b", "ours-b.npz", "theirs-b.npz"))
    theirs = (inception_home, "--device", "cpu", "--num-workers", "0", "--batch-size", "4")
    ours = (inception_home, "eval", "--metrics", "fid", "--device", "cpu", "--json")

    said, their_seconds = command(THEIRS, *theirs, a, b)
    expected = float(said.split()[-1])
    said, our_seconds = command(START, *ours, "--outputs", a, "--targets", b)
    result = json.loads(said)["metrics"]["fid"]
    assert result["value"] == pytest.approx(expected, rel=1e-6) and result["value"] > 0.1
    assert result["count"] == 12 and "only 12 pictures" in result["note"]
    assert our_seconds < their_seconds

    def here(*arguments):
        assert run(["eval", *map(str, ours[2:]), *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)["metrics"]["fid"]["value"]

    here("--outputs", b, "--save-stats", ours_b)
    command(THEIRS, *theirs, "--save-stats", b, theirs_b)
    for statistics in (ours_b, theirs_b):
        assert here("--outputs", a, "--targets", statistics) == pytest.approx(expected, rel=1e-6)
    read = [fid_score.compute_statistics_of_path(str(path), None, 1, FEATURES, "cpu") for path in (ours_b, theirs_b)]
    for mine, other in zip(*read):
        np.testing.assert_allclose(mine, other, atol=1e-6 * np.abs(other).max())
