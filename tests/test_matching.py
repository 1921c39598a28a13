"""Matching: the exact level, propagation, distinct candidates, engines that agree, gradients of the offsets."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cocosnet.config import MatchingConfig, load_config
from cocosnet.errors import MissingDependency
from cocosnet.model import patchmatch
from cocosnet.model.convgru import ConvGRU, Refinement, relative_motion
from cocosnet.model.exact import exact_top_k, exact_warp, top_k_of_rows
from cocosnet.model.hierarchy import Hierarchy
from cocosnet.model.matches import Matches
from cocosnet.model.patchmatch import REFERENCE, select_engine
from cocosnet.model.warp import child_positions, pixel_grid, soft_warp


def unit(seed, *shape, dtype=torch.float32):
    """Random unit vectors over dimension 1."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def field(seed, batch, candidates, height, width, target):
    """Random fractional positions, some outside the map of (rows, columns)."""
    scale = torch.tensor([target[0] + 2.0, target[1] + 2.0]).view(1, 1, 2, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, candidates, 2, height, width, generator=generator) * scale - 1.5


def test_the_exact_level_equals_brute_force():
    x, y, picture = unit(0, 2, 8, 5, 7), unit(1, 2, 8, 6, 4), torch.randn(2, 3, 6, 4)
    similarity = np.einsum("bchw,bcn->bhwn", x.double(), y.double().flatten(2))
    matches = exact_top_k(x, y, 3)
    order = np.argsort(-similarity, axis=-1)[..., :3]
    pixels = (matches.positions[:, :, 0] * 4 + matches.positions[:, :, 1]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, order)
    weights = np.exp((similarity - similarity.max(-1, keepdims=True)) / 0.01)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhwn,bcn->bchw", weights, picture.double().flatten(2))
    np.testing.assert_allclose(exact_warp(x, y, picture, 0.01).numpy(), expected, atol=2e-4)


def test_the_exact_level_leaves_slots_empty_where_the_map_is_smaller_than_k():
    matches = exact_top_k(unit(0, 1, 4, 3, 3), unit(1, 1, 4, 1, 2), 5)
    assert torch.isinf(matches.scores[:, 2:]).all() and torch.isfinite(matches.scores[:, :2]).all()


@pytest.mark.parametrize("length", [64 * 9, 64 * 9 + 1, 64 * 3])
def test_the_top_k_of_long_rows_is_that_of_torch(length):
    rows = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(0))
    (values, indices), expected = top_k_of_rows(rows, 5), torch.topk(rows, 5)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)


def test_the_exact_backend_searches_every_level_without_patchmatch():
    x = [unit(s, 1, 8, size, size) for s, size in ((0, 8), (1, 16), (2, 32))]
    y = [unit(s, 1, 8, size, size) for s, size in ((3, 8), (4, 16), (5, 32))]
    config = load_config("tiny-cpu", ["model.matching.backend=exact"]).model.matching
    hierarchy = Hierarchy((8, 8, 8), config)
    levels = hierarchy(x, y, torch.rand(1, 3, 32, 32))
    for project, level, a, b in zip(hierarchy.projections, levels, x, y):
        similarity = torch.einsum("bchw,bcn->bnhw", project(a), project(b).flatten(2))
        torch.testing.assert_close(level.matches.scores[:, 0], similarity.amax(1))
        level.warps[-1].sum().backward(retain_graph=True)
        assert project.conv.weight.grad.abs().sum() > 0
    patchmatch_only = Hierarchy((8, 8, 8), MatchingConfig(channels=8, candidates=4, iterations=2, hidden=8))
    assert hierarchy.state_dict().keys() == patchmatch_only.state_dict().keys()


def brute_force_pass(positions, x, y, axis):
    """One propagation pass of one picture, pixel by pixel, in float64. Returns sorted lists of (score, row, column)."""
    candidates, _, height, width = positions.shape
    bottom, right = y.shape[1] - 1, y.shape[2] - 1
    result = {}
    for i in range(height):
        for j in range(width):
            best = {}
            for shift in (0, -1, 1):
                ni, nj = (i + shift, j) if axis == -2 else (i, j + shift)
                if not (0 <= ni < height and 0 <= nj < width):
                    continue
                for k in range(candidates):
                    row, column = positions[k, :, ni, nj].tolist()
                    row, column = (row - shift, column) if axis == -2 else (row, column - shift)
                    row, column = min(max(row, 0), bottom), min(max(column, 0), right)
                    r0, c0 = min(int(row), max(bottom - 1, 0)), min(int(column), max(right - 1, 0))
                    r1, c1, v, u = min(r0 + 1, bottom), min(c0 + 1, right), row - r0, column - c0
                    f = (
                        (1 - v) * (1 - u) * y[:, r0, c0]
                        + (1 - v) * u * y[:, r0, c1]
                        + v * (1 - u) * y[:, r1, c0]
                        + v * u * y[:, r1, c1]
                    )
                    score = float(x[:, i, j] @ f / f.norm().clamp(min=patchmatch.SHORTEST))
                    pixel = (round(row), round(column))
                    if pixel not in best or score > best[pixel][0]:
                        best[pixel] = (score, row, column)
            result[i, j] = sorted(best.values(), reverse=True)[:candidates]
    return result


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_propagation_pass_equals_its_description_pixel_by_pixel(axis):
    x, y = unit(2, 1, 6, 5, 4), unit(3, 1, 6, 4, 7)
    positions = patchmatch.clamp_positions(field(4, 1, 3, 5, 4, (4, 7)), 4, 7)
    matches = patchmatch.best_distinct(patchmatch.neighbour_candidates(positions, axis), x, y, 3)
    expected = brute_force_pass(positions[0].double(), x[0].double(), y[0].double(), axis)
    for (i, j), best in expected.items():
        for k, (score, row, column) in enumerate(best):
            assert matches.scores[0, k, i, j].item() == pytest.approx(score, abs=1e-5)
            assert matches.positions[0, k, :, i, j].tolist() == pytest.approx([row, column], abs=1e-5)
        assert torch.isinf(matches.scores[0, len(best) :, i, j]).all()


def test_one_good_match_spreads_along_its_row_and_column():
    """Exemplar = condition shifted by (2, 3); one pixel knows it, everyone finds it."""
    x = unit(5, 1, 16, 12, 12)
    y = torch.roll(x, (2, 3), (2, 3))
    truth = (pixel_grid(12, 12) + torch.tensor([2.0, 3.0]).view(2, 1, 1))[:, :10, :9]
    positions = torch.zeros(1, 1, 2, 12, 12)
    positions[0, 0, :, 4, 4] = torch.tensor([6.0, 7.0])
    for _ in range(12):
        positions = patchmatch.propagate(positions, x, y).positions
    assert torch.equal(positions[0, 0, :, :10, :9], truth)


shapes = st.tuples(
    st.integers(1, 2),
    st.integers(2, 9),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
)


@given(shapes, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_compiled_engine_agrees_with_the_reference(shape, seed):
    pytest.importorskip("numba")
    from cocosnet.model import compiled

    batch, channels, candidates, height, width, rows, columns = shape
    x, y = unit(seed, batch, channels, height, width), unit(seed + 1, batch, channels, rows, columns)
    positions = field(seed + 2, batch, candidates, height, width, (rows, columns))
    ours, reference = compiled.propagate(positions, x, y), patchmatch.propagate(positions, x, y)
    torch.testing.assert_close(ours.scores, reference.scores, atol=2e-6, rtol=1e-5)
    positions = patchmatch.clamp_positions(positions, rows, columns)
    again = compiled.propagate(positions, x, y, compiled.evaluate(positions, x, y).scores)
    torch.testing.assert_close(again.scores, reference.scores, atol=2e-6, rtol=1e-5)
    assume(rows * columns > 1)  # two candidates at the very same place tie, and rounding decides which one is kept
    inside = torch.rand(positions.shape, generator=torch.Generator().manual_seed(seed))
    inside = inside * torch.tensor([rows - 1.0, columns - 1.0]).view(1, 1, 2, 1, 1)
    results = []
    for engine in (compiled, patchmatch):
        inputs = [t.clone().requires_grad_() for t in (inside, x, y)]
        scores = engine.evaluate(*inputs).scores
        scores.clamp(min=-2).square().sum().backward()
        results.append([scores.detach(), *(t.grad for t in inputs)])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@given(
    sizes=st.tuples(st.integers(1, 2), *[st.integers(1, 7)] * 4),
    channels=st.sampled_from([3, 16, 20, 32]),
    candidates=st.sampled_from([1, 5, 16, 18]),
    iterations=st.integers(1, 3),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_iterations_at_once_the_order_and_the_warp_agree_with_the_reference(
    sizes, channels, candidates, iterations, whole, seed
):
    """Maps of one pixel, more candidates than a map has pixels or a vector has lanes, places on and between pixels."""
    pytest.importorskip("numba")
    from cocosnet.model import compiled

    batch, height, width, rows, columns = sizes
    x, y = unit(seed, batch, channels, height, width), unit(seed + 1, batch, channels, rows, columns)
    positions = field(seed + 2, batch, candidates, height, width, (rows, columns))
    positions = positions.round() if whole else positions
    ours = compiled.propagate(positions, x, y, iterations=iterations)
    expected = patchmatch.propagate(positions, x, y, iterations=iterations)
    torch.testing.assert_close(ours.scores, expected.scores, atol=2e-6, rtol=1e-5)
    filled = torch.isfinite(ours.scores)
    found = patchmatch.cosine(x, y, ours.positions)[filled]
    torch.testing.assert_close(found, ours.scores[filled], atol=2e-6, rtol=1e-5)
    coarse = field(seed + 4, batch, candidates, -(-height // 2), -(-width // 2), (-(-rows // 2), -(-columns // 2)))
    coarse = coarse.round() if whole else coarse
    ours, started = compiled.descend(coarse, x, y), patchmatch.descend(coarse, x, y)
    torch.testing.assert_close(ours.scores, started.scores, atol=2e-6, rtol=1e-5)
    found = patchmatch.cosine(x, y, ours.positions)[torch.isfinite(ours.scores)]
    torch.testing.assert_close(found, ours.scores[torch.isfinite(ours.scores)], atol=2e-6, rtol=1e-5)
    shuffled = torch.randperm(candidates, generator=torch.Generator().manual_seed(seed))
    mixed = Matches(expected.positions[:, shuffled], expected.scores[:, shuffled])
    picture = unit(seed + 3, batch, 3, rows, columns)
    with torch.no_grad():
        sorted_ones, known = compiled.best_first(mixed), patchmatch.best_first(mixed)
        warps = [warp(picture, mixed.positions, mixed.scores, 0.01) for warp in (compiled.soft_warp, soft_warp)]
    torch.testing.assert_close(sorted_ones.scores, known.scores)
    torch.testing.assert_close(sorted_ones.positions, known.positions)
    torch.testing.assert_close(*warps, atol=1e-5, rtol=1e-5)


def test_the_compiled_gradients_are_those_of_the_reference_in_float64():
    pytest.importorskip("numba")
    from cocosnet.model import compiled

    x, y = unit(1, 2, 20, 5, 6, dtype=torch.float64), unit(2, 2, 20, 7, 4, dtype=torch.float64)
    positions = torch.rand(2, 3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2.9
    gradients = []
    for engine, dtype in ((compiled, torch.float32), (patchmatch, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (positions, x, y)]
        engine.evaluate(*inputs).scores.clamp(min=-2).pow(3).sum().backward()
        gradients.append([t.grad.double() for t in inputs])
    for mine, exact in zip(*gradients):
        torch.testing.assert_close(mine, exact, atol=2e-5, rtol=1e-4)


def test_positions_that_are_no_numbers_read_nothing_outside_the_maps():
    pytest.importorskip("numba")
    from cocosnet.model import compiled

    x, y = unit(1, 1, 4, 3, 3), unit(2, 1, 4, 3, 3)
    positions = torch.full((1, 2, 2, 3, 3), torch.nan)
    positions[:, 1] = torch.inf
    matches = compiled.propagate(positions, x, y)
    assert torch.isfinite(matches.positions).all() and matches.positions.min() >= 0 and matches.positions.max() <= 2


def test_the_compiled_engine_leaves_the_number_of_threads_alone():
    """numba and PyTorch share one OpenMP; a changed number changes the order, and so the last bits, of sums."""
    pytest.importorskip("numba")
    program = """if True:
        import torch
        from cocosnet.model import compiled
        torch.set_num_threads(1)
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        field = torch.rand(1, 2, 2, 8, 8) * 7
        compiled.propagate(field, x, x)
        compiled.evaluate(field, x, x).scores[:, :1].sum().backward()
        print(torch.get_num_threads())"""
    assert_one_thread(program)


def test_the_releases_compiled_scores_leave_the_number_of_threads_alone():
    pytest.importorskip("numba")
    program = """if True:
        import torch
        from cocosnet.model import release_compiled
        from cocosnet.model.warp import pixel_grid
        torch.set_num_threads(1)
        x = torch.randn(1, 16, 8, 8)
        release_compiled.score(torch.zeros(1, 4, 8, 8), -1, x, x, pixel_grid(8, 8))
        print(torch.get_num_threads())"""
    assert_one_thread(program)


def assert_one_thread(program: str):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_without_numba_the_reference_runs_and_says_so_once():
    program = """if True:
        import sys
        sys.modules["numba"] = None  # what an import finds where numba is not installed
        import torch
        from cocosnet.model.patchmatch import select_engine
        print([select_engine("auto", torch.zeros(1)).name for _ in range(2)])"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['reference', 'reference']\n"
    assert len(done.stderr.splitlines()) == 1 and "reference engine" in done.stderr


@pytest.mark.parametrize("setting", ["NUMBA_DISABLE_JIT=1", "NUMBA_THREADING_LAYER=none", "NUMBA_NUM_THREADS=0"])
def test_where_numba_is_set_not_to_work_the_reference_runs_and_says_so_once(setting):
    pytest.importorskip("numba")
    program = """if True:
        import torch
        from cocosnet.model.patchmatch import select_engine
        print([select_engine("auto", torch.zeros(1)).name for _ in range(2)])"""
    environment = os.environ | dict([setting.split("=")])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "['reference', 'reference']\n", done.stderr
    assert len(done.stderr.splitlines()) == 1 and "reference engine" in done.stderr


def test_where_nothing_compiled_can_be_kept_the_remedy_is_named(tmp_path):
    """An installed package is often read-only, and so is the home folder of a container's user."""
    pytest.importorskip("numba")
    program = """if True:
        import sys
        import numba.core.caching as caching
        caching.CacheImpl._locator_classes = []  # what is left where no folder can be written
        import torch
        from cocosnet.model.patchmatch import select_engine
        print(select_engine("auto", torch.zeros(1)).name)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "reference\n" and "NUMBA_CACHE_DIR" in done.stderr, done.stderr


def test_where_what_was_compiled_cannot_be_written_the_remedy_is_named(tmp_path):
    """As where the home folder's quota is used up."""
    pytest.importorskip("numba")
    program = """if True:
        import resource
        import torch
        from cocosnet.errors import OutputError
        from cocosnet.model import release_compiled
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        numbers = torch.zeros(1, 4, 2, dtype=torch.int64)
        try:
            release_compiled.to_offsets(numbers, numbers, torch.zeros(2, 2, 2), 2)
        except OutputError as error:
            print(error)"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "NUMBA_CACHE_DIR" in done.stdout and len(done.stdout.splitlines()) == 1, done.stderr


def test_without_triton_the_engine_is_refused_by_name():
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from cocosnet.errors import MissingDependency
        from cocosnet.model.patchmatch import select_engine
        for _ in range(2):
            try:
                select_engine("triton", torch.zeros(1))
            except MissingDependency as error:
                print(error)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("working triton") == 2 and done.stderr.count("Triton does not load") == 1


def test_where_triton_cannot_start_the_reference_runs_and_says_so_once(tmp_path):
    """Neither a compiler nor a driver: whichever Triton asks for first at a GPU, it is not there."""
    program = """if True:
        import torch
        from cocosnet.model import patchmatch
        torch.cuda.is_available = lambda: True
        assert patchmatch._triton(torch.zeros(1), 4) is patchmatch._triton(torch.zeros(1), 4) is None"""
    environment = os.environ | {"CC": str(tmp_path / "no-such-cc"), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr.count("Triton does not load") == 1, done.stderr


@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize("broken", ["refinement", "features"])
def test_numbers_that_blew_up_end_in_gradients_that_say_so(backend, broken):
    """The trainer sees them and skips the step, where a crash would end the run."""
    program = """if True:
        import sys, torch
        from cocosnet.config import MatchingConfig
        from cocosnet.model.hierarchy import Hierarchy
        backend, broken = sys.argv[1:]
        matcher = Hierarchy((4, 4), MatchingConfig(channels=4, candidates=3, iterations=2, hidden=8, backend=backend))
        for start in ("best", "wide"):
            matcher.fine[0].start = start
            x, y = ([torch.randn(1, 4, 3 * n, 4 * n) for n in (1, 2)] for _ in range(2))
            if broken == "features":
                x[1], y[1][..., 0] = x[1] * torch.nan, torch.nan
            else:
                torch.nn.init.constant_(matcher.fine[0].refinement.head[-1].bias, torch.nan)
            exemplar = torch.rand(1, 3, 6, 8)
            matcher.zero_grad()
            sum(warp.sum() for level in matcher.train()(x, y, exemplar) for warp in level.warps).backward()
            assert any(p.grad is not None and p.grad.isnan().any() for p in matcher.parameters())
            with torch.no_grad():
                matcher.eval()(x, y, exemplar)"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, backend, broken], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


PEAK = """
import resource, sys, torch
from cocosnet.config import MatchingConfig
from cocosnet.model.hierarchy import Hierarchy

def match(*sizes):
    x = [torch.randn(1, 32, size, size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    with torch.no_grad():
        hierarchy(x, [f.roll((1, 2), (2, 3)) for f in x], torch.rand(1, 3, sizes[-1], sizes[-1]))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.manual_seed(0)
hierarchy = Hierarchy((32, 32, 32, 32), MatchingConfig()).eval()
match(8, 16, 32, 64)
before = peak()
match(64, 128, 256, 512)
print(peak() - before)
"""


def test_matching_at_512_adds_less_than_a_gibibyte():
    """Three PatchMatch levels of K = 16, C = 32 and T = 5, the GRU included."""
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1000


def test_an_engine_that_cannot_run_is_refused_by_name():
    with pytest.raises(MissingDependency, match="float32"):
        select_engine("compiled", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(MissingDependency, match="CUDA"):
        select_engine("triton", torch.zeros(1, dtype=torch.float64))
    assert select_engine("auto", torch.zeros(1, dtype=torch.float64)) is REFERENCE


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_candidates_of_a_pixel_stay_distinct_to_the_last_level(backend):
    """In the release, 16 final candidates are 1.05 distinct ones on average."""
    torch.manual_seed(0)
    hierarchy = Hierarchy((8, 8, 8), MatchingConfig(channels=8, candidates=6, iterations=3, hidden=8, backend=backend))
    for module in hierarchy.modules():
        if isinstance(module, Refinement):  # make it move matches by whole pixels
            torch.nn.init.normal_(module.head[-1].weight, std=3.0)
    x = [F.avg_pool2d(unit(7, 1, 8, 32, 32), factor) for factor in (4, 2, 1)]
    levels = hierarchy(x, [torch.roll(f, 1, 2) for f in x], torch.rand(1, 3, 32, 32))
    for level in levels:
        assert torch.isfinite(level.matches.scores[:, 0]).all()  # the best match is never an empty slot
        assert (level.matches.scores.diff(dim=1)[torch.isfinite(level.matches.scores[:, 1:])] <= 0).all()
        pixels = level.matches.positions.round()
        distinct = 0
        for i in range(pixels.shape[-2]):
            for j in range(pixels.shape[-1]):
                filled = torch.isfinite(level.matches.scores[0, :, i, j])
                found = {tuple(p) for p in pixels[0, filled, :, i, j].tolist()}
                assert len(found) == int(filled.sum())
                distinct += len(found)
        assert distinct / (pixels.shape[-2] * pixels.shape[-1]) > 5


def test_an_odd_shift_is_found_at_every_level_by_propagation_alone():
    """Offsets of a coarser level, doubled, are even; the levels must reach the odd ones as well."""
    torch.manual_seed(0)
    config = MatchingConfig(channels=16, candidates=4, iterations=2, refinement="none")
    hierarchy = Hierarchy((16, 16), config).eval()
    fine = F.normalize(F.avg_pool2d(unit(5, 1, 16, 24, 24), 5, 1, 2), dim=1)
    shift = (3, 5)
    shifted = fine.roll(shift, dims=(-2, -1))
    coarse = [F.normalize(F.avg_pool2d(features, 2), dim=1) for features in (fine, shifted)]
    levels = hierarchy([coarse[0], fine], [coarse[1], shifted], torch.zeros(1, 3, 24, 24))
    offsets = (levels[-1].matches.positions[0, 0] - pixel_grid(24, 24))[:, :-6, :-6]
    right = (offsets.round() == torch.tensor(shift).view(2, 1, 1)).all(0).float().mean()
    assert right > 0.9


def test_a_level_may_start_from_the_best_children_of_half_of_the_coarse_matches():
    """The right coarse match is the second of three; its child at the own corner comes first."""
    x = y = unit(5, 1, 8, 4, 6)
    identity = pixel_grid(2, 3).unsqueeze(0)
    coarse = torch.stack([(identity + 1).clamp(max=1), identity, torch.zeros_like(identity)], dim=1)
    found = patchmatch.descend(coarse, x, y)
    assert torch.equal(found.positions[0, 0], pixel_grid(4, 6))
    torch.testing.assert_close(found.scores[:, 0], torch.ones(1, 4, 6))
    assert (found.scores.diff(dim=1) <= 0).all()


def test_the_warp_teaches_the_refinement_where_to_look():
    """Features say "stay", the pictures say "one down, two right": the warp's error alone moves the matches there.

    In the release no gradient reaches the GRU, so it could never learn this.
    """
    torch.manual_seed(0)
    config = MatchingConfig(channels=8, candidates=1, iterations=2, hidden=16, propagation=False)
    hierarchy = Hierarchy((8, 8), config)
    smooth = F.interpolate(torch.randn(2, 3, 6, 6), size=24, mode="bicubic")
    moved = torch.roll(smooth, (1, 2), (2, 3))
    features = [unit(1, 2, 8, 12, 12), unit(2, 2, 8, 24, 24)]
    optimizer = torch.optim.Adam(hierarchy.fine.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        levels = hierarchy(features, features, moved)
        loss = sum((warp - smooth)[..., 2:-2, 2:-2].abs().mean() for warp in levels[-1].warps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    step = (levels[-1].matches.positions[:, 0] - pixel_grid(24, 24))[..., 4:-4, 4:-4].mean((0, 2, 3))
    assert step.tolist() == pytest.approx([1, 2], abs=0.4)


def test_the_gru_is_eq_6():
    torch.manual_seed(0)
    gru = ConvGRU(3, 4).double()
    before, x = torch.randn(2, 4, 5, 6).double(), torch.randn(2, 3, 5, 6).double()
    theta_z, theta_r = ((w, b) for w, b in zip(gru.gates.weight.chunk(2), gru.gates.bias.chunk(2), strict=True))
    theta_h = gru.proposal.weight, gru.proposal.bias

    def convolved(state, theta):
        return F.conv2d(torch.cat([state, x], 1), *theta, padding=1)

    z, r = torch.sigmoid(convolved(before, theta_z)), torch.sigmoid(convolved(before, theta_r))
    expected = (1 - z) * before + z * torch.tanh(convolved(r * before, theta_h))
    torch.testing.assert_close(gru(before, x), expected)


def test_a_level_alternates_propagation_and_refinement():
    """H'_t = propagation(H_t) and O_t, S_t of it enter the refinement; H_{t+1} = H'_t + dH_t is what comes next."""
    torch.manual_seed(0)
    matcher = Hierarchy((8, 8), MatchingConfig(channels=8, candidates=4, iterations=3, hidden=8, backend="reference"))
    refinement, seen = matcher.fine[0].refinement, []
    torch.nn.init.normal_(refinement.head[-1].bias)
    refinement.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, *output)))
    features = [unit(1, 1, 8, 6, 6), unit(2, 1, 8, 12, 12)]
    coarse, fine = matcher(features, [f.flip(-1) for f in features], unit(3, 1, 3, 12, 12))
    positions, state = child_positions(coarse.matches.positions, 12, 12), None
    for before, proposed, x, y, after, step in seen:
        wanted = patchmatch.propagate(positions, x, y)
        assert torch.equal(proposed.positions, wanted.positions) and torch.equal(proposed.scores, wanted.scores)
        assert before is state and 0.5 < step.abs().max() <= 3
        positions, state = patchmatch.clamp_positions(wanted.positions + step, 12, 12), after
    last = patchmatch.best_first(patchmatch.evaluate(positions, x, y))
    assert len(seen) == 3 and torch.equal(fine.matches.positions, last.positions)


@pytest.mark.parametrize(("refinement", "inputs"), [("gru", "absolute"), ("conv", "absolute"), ("gru", "relative")])
def test_refining_band_by_band_changes_nothing(refinement, inputs, monkeypatch):
    torch.manual_seed(0)
    refine = Refinement(MatchingConfig(channels=4, candidates=3, hidden=8, refinement=refinement, inputs=inputs))
    torch.nn.init.normal_(refine.head[-1].weight)
    matches = Matches(field(0, 2, 3, 37, 9, (20, 11)).clamp(0, 10), torch.rand(2, 3, 37, 9))
    inputs = torch.randn(2, 8, 37, 9), matches, unit(1, 2, 4, 37, 9), unit(2, 2, 4, 20, 11)
    monkeypatch.setattr("cocosnet.model.layers.BAND", 10)
    with torch.no_grad():
        bands = refine(*inputs)
    for band, whole in zip(bands, refine(*inputs)):
        torch.testing.assert_close(band, whole)


def test_relative_inputs_see_how_candidates_lie_to_each_other_and_nothing_else():
    offsets, scores = field(0, 1, 3, 6, 5, (9, 9)), torch.rand(1, 3, 6, 5)
    scores[:, 1, 2, 2] = -torch.inf
    motion = relative_motion(offsets, scores, (64, 64))
    moved = relative_motion(offsets + torch.tensor([20.0, -7.0]).view(1, 1, 2, 1, 1), scores, (128, 128))
    torch.testing.assert_close(motion, moved)
    assert motion.isfinite().all() and motion[0, 7, 2, 2] == -2
    motion = relative_motion(
        torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 2, 4, 4), scores[:, :2, :4, :4], (8, 8)
    )
    assert motion[0, :4, 0, 0].tolist() == [0, 0, 0.25, 0.25]


def test_the_refinement_is_given_the_best_match_first_also_without_propagation():
    """Of the four children of a match, any may be the best; the refinement reads f^y at the first one."""
    torch.manual_seed(0)
    matcher = Hierarchy((8, 8), MatchingConfig(channels=8, candidates=4, iterations=2, hidden=8, propagation=False))
    given = []
    matcher.fine[0].refinement.register_forward_hook(lambda module, inputs, output: given.append(inputs[1].scores))
    features = [unit(1, 1, 8, 6, 6), unit(2, 1, 8, 12, 12)]
    matcher(features, [f.flip(-1) for f in features], unit(3, 1, 3, 12, 12))
    assert len(given) == 2
    for scores in given:
        assert torch.equal(scores, scores.sort(dim=1, descending=True).values)


def test_a_compiled_hierarchy_finds_the_same_matches():
    """`torch.compile` cannot look into numba's loops, and must not try."""
    torch.manual_seed(0)
    config = MatchingConfig(channels=8, candidates=3, iterations=1, refinement="none", backend="compiled")
    matcher = Hierarchy((8, 8), config).eval()
    features, exemplar = [unit(1, 1, 8, 6, 6), unit(2, 1, 8, 12, 12)], unit(3, 1, 3, 12, 12)
    given = features, [f.flip(-1) for f in features], exemplar
    with torch.no_grad():
        plain, compiled = matcher(*given)[1], torch.compile(matcher, backend="eager", fullgraph=True)(*given)[1]
    torch.testing.assert_close(compiled.matches.positions, plain.matches.positions)
    torch.testing.assert_close(compiled.warps[0], plain.warps[0])


def test_a_match_between_two_pixels_is_as_good_as_one_on_a_pixel():
    """Query = exemplar half a pixel on: the right score of the right match is 1, and nothing whole comes near."""
    y = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).T.reshape(1, 2, 1, 2)
    between = F.normalize(y.sum(-1, keepdim=True), dim=1)
    positions = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 1.0]]).view(1, 3, 2, 1, 1)
    scores = patchmatch.cosine(between, y, positions).flatten().tolist()
    assert scores == pytest.approx([0.894427, 1.0, 0.894427], abs=1e-5)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).T.reshape(1, 2, 1, 2)
    assert abs(patchmatch.cosine(apart[..., :1], apart, positions)[0, 1].item()) < 1e-6


def test_checkpointing_leaves_the_gradients_as_they_are():
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        config = MatchingConfig(channels=8, candidates=3, iterations=2, hidden=8, checkpoint=checkpoint)
        hierarchy = Hierarchy((8, 8), config)
        features = [unit(1, 1, 8, 6, 6).requires_grad_(), unit(2, 1, 8, 12, 12).requires_grad_()]
        levels = hierarchy(features, [f.flip(-1) for f in features], unit(3, 1, 3, 12, 12))
        sum(warp.square().sum() for level in levels for warp in level.warps).backward()
        gradients.append([*(f.grad for f in features), *(p.grad for p in hierarchy.parameters())])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_scores_pass_numerical_gradient_checks():
    x, y = (unit(s, 1, 3, 3, 3, dtype=torch.float64).requires_grad_() for s in (1, 2))
    positions = torch.rand(1, 2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 0.3 + 0.1
    positions[:, 1] += 1  # another pixel, so that neither is a duplicate
    assert torch.autograd.gradcheck(
        lambda p, a, b: patchmatch.evaluate(p, a, b).scores, (positions.requires_grad_(), x, y)
    )
