"""The bench: truth that is true, figures against closed forms and other code, commands as a user meets them."""

from __future__ import annotations

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_tools import ROOT, run
from scipy.ndimage import map_coordinates
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cocosnet.bench.ablation import AblationSettings, full_model_wins, rows_of, run_ablation, summarise
from cocosnet.bench.baseline import release_level
from cocosnet.bench.features import fit_reduction, fixed_features
from cocosnet.bench.machine import matching_floor, measured
from cocosnet.bench.matching import BenchSettings, bench_matching
from cocosnet.bench.quality import endpoint_error, error_summary, warp_quality
from cocosnet.bench.truth import make_pair, read_square
from cocosnet.checkpoint import load_model, save_model
from cocosnet.config import DistortionConfig, MatchingConfig, load_config
from cocosnet.errors import ConfigError, DataError
from cocosnet.model.build import build_model
from cocosnet.model.warp import pixel_grid

DEMO = ROOT / "cocosnet" / "assets" / "demo"
STILL = DistortionConfig(rotate=0, scale=0, translate=0, tps=0)
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=1)


def test_the_query_shows_the_exemplar_at_the_true_positions():
    """SciPy reads the photograph at the truth and finds the query, wherever the truth is called valid."""
    pair = make_pair(read_square(DEMO / "hopper.jpg", 64), DistortionConfig(), generator(3))
    truth, valid = pair.truth(1)
    read = map_coordinates(pair.exemplar[0, 1].double().numpy(), truth[0].double().numpy(), order=1, mode="nearest")
    assert 0.5 < valid.float().mean() < 1
    np.testing.assert_allclose(read[valid[0].numpy()], pair.query[0, 1][valid[0]].numpy(), atol=2e-4)


def test_a_coarser_level_is_true_to_the_finer_one():
    """Without distortion every pixel of every level matches itself; a shift by 8 px is one by 2 px at a quarter."""
    pair = make_pair(torch.zeros(1, 3, 32, 48), STILL, generator())
    for factor in (1, 2, 4):
        truth, valid = pair.truth(factor)
        torch.testing.assert_close(truth[0], pixel_grid(32 // factor, 48 // factor), atol=1e-4, rtol=0)
        pair.field += 8.0
        torch.testing.assert_close(pair.truth(factor)[0], truth + 8 / factor, atol=1e-4, rtol=0)
        pair.field -= 8.0


def test_error_summary_in_closed_form():
    found, truth = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    found[0, 0, 0], found[0, 1, 0] = torch.tensor([0.0, 3.0, 0.6, 30.0]), torch.tensor([0.0, 4.0, 0.8, 40.0])
    summary = error_summary(endpoint_error(found, truth).flatten())
    assert summary["epe"] == pytest.approx((0 + 5 + 1 + 50) / 4)
    assert (summary["within_1px"], summary["within_3px"]) == (0.5, 0.5)


def test_warp_quality_equals_scikit_image():
    first, second = (torch.rand(1, 3, 40, 30, generator=generator(seed)) * 2 - 1 for seed in (1, 2))
    quality = warp_quality(first, second, torch.ones(1, 40, 30, dtype=torch.bool))
    arrays = [((t[0].double().permute(1, 2, 0) + 1) * 127.5).numpy() for t in (first, second)]
    kwargs = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert quality["psnr"] == pytest.approx(peak_signal_noise_ratio(*arrays, data_range=255), abs=1e-4)
    assert quality["ssim"] == pytest.approx(structural_similarity(*arrays, channel_axis=2, **kwargs), abs=1e-6)


def test_only_valid_pixels_count():
    picture, spoilt = torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 20)
    spoilt[..., :, :4], valid = 1.0, torch.ones(1, 20, 20, dtype=torch.bool)
    valid[..., :4] = False
    assert warp_quality(spoilt, picture, valid)["l1"] == 0


def test_a_reduction_keeps_angles_where_nothing_has_to_go():
    features = torch.randn(2, 5, 6, 7, generator=generator())
    reduced = fit_reduction([features], 8)(features)
    centred = F.normalize(features - features.mean((0, 2, 3), keepdim=True), dim=1).flatten(2)
    flat = reduced.flatten(2)
    assert reduced.shape == (2, 8, 6, 7)
    torch.testing.assert_close(flat.transpose(1, 2) @ flat, centred.transpose(1, 2) @ centred, atol=1e-4, rtol=0)


def test_unknown_features_and_too_many_levels_are_refused():
    with pytest.raises(ConfigError, match="colour, vgg16"):
        fixed_features("sift", 3)
    with pytest.raises(ConfigError, match="5 scales"):
        fixed_features("vgg16", 6)


def test_the_baseline_is_the_release_s_arithmetic():
    """One pass and level, candidate by candidate in plain Python: the same offsets are kept."""
    x, y = unit(1, 1, 4, 4, 6), unit(2, 1, 4, 4, 6)
    best = pixel_grid(2, 3)[None] + torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    matches, _ = release_level(best, x, y, torch.zeros(1, 3, 4, 6), 4, 1, 0.01)
    offsets = {(i, j): [(a, 2 + b) for a in (-2, 0) for b in (-2, 0)] for i in range(4) for j in range(6)}
    for step in ((0, 1), (1, 0)):
        offsets = {p: _kept(p, step, offsets, x[0], y[0]) for p in offsets}
    for (i, j), kept in offsets.items():
        found = sorted(map(tuple, matches.positions[0, :, :, i, j].tolist()))
        assert found == sorted((min(max(i + a, 0), 3), min(max(j + b, 0), 5)) for a, b in kept)


def _kept(pixel, step, offsets, x, y):
    (i, j), sides = pixel, []
    for sign in (0, -1, 1):
        sides += offsets.get((i + sign * step[0], j + sign * step[1]), [(0, 0)] * 4)

    def score(offset):
        row, column = min(max(i + offset[0], 0), 3), min(max(j + offset[1], 0), 5)
        return float(x[:, i, j] @ y[:, row, column])

    return sorted(sides, key=score, reverse=True)[:4]


def test_the_floor_counts_products_and_bytes():
    floor = matching_floor(pixels=1000, channels=32, candidates=16, iterations=5)
    assert floor["flop"] == 1000 * 10 * 48 * 64
    assert floor["gathered_bytes"] - floor["bytes"] == 1000 * 10 * 4 * (48 * 32 - 32)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a piece of work is read from /proc")
def test_peak_memory_is_that_of_the_work():
    hundred = 100 * 2**20
    kept, cost = measured(lambda: torch.ones(hundred // 4).sum().item(), CPU)
    assert kept == hundred // 4 and 90 < cost.peak_mib < 180


def test_without_distortion_every_level_is_right_and_as_good_as_exact():
    settings = BenchSettings(size=64, coarse=16, distortion=STILL, matching=MatchingConfig(iterations=2))
    result = bench_matching([DEMO / "hopper.jpg"], settings, CPU)
    assert [level["side"] for level in result["levels"]] == [16, 32, 64]
    for level in result["levels"]:
        assert level["within_1px"] > 0.98 and level["nearest"] > 0.98
        assert level["similarity"] == pytest.approx(level["exact_similarity"], abs=1e-3)


def test_on_a_real_portrait_the_search_comes_near_the_exact_engine(shared):
    """Mean cosine within 1 % at every level, and at least as many pixels within 1 px of the truth (less 2 points)."""
    arguments = ("--features", "vgg16", "--limit", "1", "--no-baseline", "--json", "-q")
    weights = {"COCOSCTL_WEIGHTS_DIR": str(shared / "weights")}
    result = run("bench", "matching", shared / "data" / "portraits512", *arguments, **weights)
    levels = json.loads(result.stdout)["levels"]
    assert [level["side"] for level in levels] == [64, 128, 256, 512]
    for level in levels:
        assert level["similarity"] > 0.99 * level["exact_similarity"]
        assert level["sample_within_1px"] > level["exact_within_1px"] - 0.02


def test_where_memory_cannot_be_read_the_peak_is_not_a_number(monkeypatch):
    monkeypatch.setattr("cocosnet.bench.machine.STATUS", "/no/such/file")
    assert math.isnan(measured(lambda: None, CPU)[1].peak_mib)


def test_the_exact_engine_finds_every_nearest_neighbour():
    settings = BenchSettings(size=32, coarse=16, matching=MatchingConfig(backend="exact"))
    result = bench_matching([DEMO / "hopper.jpg"], settings, CPU)
    assert result["engine"] == "exact" and result["speedup"] is None
    assert all(level["nearest"] == 1 for level in result["levels"])


def test_a_bench_of_the_demo_model_uses_its_own_levels_and_refinement():
    settings = BenchSettings(size=64, features="demo", baseline=False)
    result = bench_matching([DEMO / "hopper.jpg"], settings, CPU)
    own = load_model("demo", device="cpu").config.model.matching
    assert result["matching"]["refinement"] == "gru" and result["matching"]["candidates"] == own.candidates
    assert own.candidates != BenchSettings(size=64).matching.candidates
    assert len(result["levels"]) == 3 and result["speedup"] is None
    with pytest.raises(ConfigError, match="3 levels"):
        bench_matching([DEMO / "hopper.jpg"], BenchSettings(size=128, coarse=16, features="demo"), CPU)
    assert result["matching"]["iterations"] == own.iterations and result["matching"]["start"] == own.start


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.kind=spade",), "is a spade"),
        (("model.kind=cocosnet",), "is a cocosnet"),
        (("model.matching.levels=1",), "matches 1 of its 3 levels"),
        ((), "made for 4 candidates"),
    ],
)
def test_a_model_that_the_bench_cannot_take_apart_is_refused_by_name(overrides, words, tmp_path):
    model = build_model(load_config("tiny-cpu", ["data.task=edge", "model.matching.candidates=4", *overrides]))
    save_model(tmp_path / "model.safetensors", model)
    done = run("bench", "matching", "--features", tmp_path / "model.safetensors", "--size", 32, "--candidates", 5)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


def test_bench_matching_from_the_shell(tmp_path):
    shutil.copy(DEMO / "hopper.jpg", tmp_path / "ein Bild.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    done = run("bench", "matching", tmp_path, "--size", 64, "--iterations", 2, "--json")
    assert done.returncode == 4 and "broken.png" in done.stderr and "<= 1 px" in done.stderr
    (result,) = (json.loads(line) for line in done.stdout.splitlines())
    assert result["pictures"] == 1 and result["failed"] == 1 and result["coarse"] == 8
    assert result["speedup"] == pytest.approx(result["baseline"]["seconds"] / result["ours"]["seconds"])
    assert {"epe", "within_1px", "psnr", "ssim", "nearest", "seconds", "peak_mib"} <= result["levels"][-1].keys()


def test_vgg16_without_its_weights_is_one_line_and_exit_5(tmp_path):
    nowhere = {"COCOSCTL_WEIGHTS_DIR": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = run("bench", "matching", "--features", "vgg16", "--quiet", **nowhere)
    assert (done.returncode, done.stdout) == (5, "")
    assert len(done.stderr.splitlines()) == 1 and "vgg16_caffe" in done.stderr


@pytest.mark.parametrize("size, coarse", [(100, 64), (64, 128)])
def test_sizes_that_do_not_fit_are_refused(size, coarse):
    with pytest.raises(ConfigError, match="power of two"):
        bench_matching([DEMO / "hopper.jpg"], BenchSettings(size=size, coarse=coarse), CPU)


@pytest.mark.parametrize(("size", "coarse"), [(16, 32), (96, 32)])
def test_an_ablations_sizes_and_features_are_checked(size, coarse, tmp_path):
    done = run("bench", "ablation", "--size", size, "--coarse", coarse, "-o", tmp_path)
    assert done.returncode == 3 and "power of two" in done.stderr and not list(tmp_path.iterdir())
    done = run("bench", "ablation", "--features", "demo", "-o", tmp_path)
    assert done.returncode == 3 and "colour, vgg16" in done.stderr


TINY = AblationSettings(size=32, coarse=16, channels=8, candidates=4, hidden=8, steps=2, train_pairs=4, test_pairs=2)


def test_an_ablation_goes_on_where_it_was_stopped(tmp_path):
    pictures = sorted(DEMO.glob("*.jpg"))[:3]
    first = [result for _, result in zip(range(2), run_ablation(pictures, TINY, [1], tmp_path))]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 2
    results = list(run_ablation(pictures, TINY, [1], tmp_path))
    assert results[:2] == first and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert [result["row"] for result in results] == [row.name for row in rows_of(TINY)]
    tables = summarise(results)
    assert [row["title"] for row in tables["table4"]] == ["16", "full: 16 + 32"]
    assert len(tables["table5"]) == 4 and tables["table4"][-1]["epe"] == tables["table5"][-1]["epe"]


def test_an_ablation_is_reproducible_and_other_settings_are_done_anew(tmp_path):
    pictures = sorted(DEMO.glob("*.jpg"))[:3]
    one, two = (next(run_ablation(pictures, TINY, [1], tmp_path / name)) for name in "ab")
    assert one == two
    assert next(run_ablation(pictures, TINY, [2], tmp_path / "a"))["seed"] == 2
    with pytest.raises(DataError, match="two pictures"):
        next(run_ablation(pictures[:1], TINY, [1], tmp_path))


def test_the_full_model_wins_only_with_every_seed():
    rows = [{"values": {"epe": [3.0, 2.0], "psnr": [20, 21]}}, {"values": {"epe": [2.0, 2.5], "psnr": [25, 26]}}]
    assert full_model_wins(rows, "psnr") and not full_model_wins(rows, "epe")
