"""The matcher on known warps: how right, how quick and how large it is, level by level, beside the exact answer.

Figures of a level are over its valid pixels (those whose true match lies inside the exemplar), averaged over the
pictures. The exact engine's are over a regular sample of them, for which every position of the exemplar is compared:
that stays affordable at 512x512 and more. What is compared with it is taken over the same sample.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocosnet.bench.baseline import release_level, suits
from cocosnet.bench.features import Pyramid
from cocosnet.bench.machine import copy_rate, matching_floor, measured, multiply_rate
from cocosnet.bench.quality import endpoint_error, error_summary, warp_quality
from cocosnet.bench.sources import Source, open_source
from cocosnet.bench.truth import Pair, levels_between, make_pair, read_square
from cocosnet.config import DistortionConfig, MatchingConfig
from cocosnet.errors import ConfigError, DataError
from cocosnet.model.exact import exact_top_k
from cocosnet.model.hierarchy import Level, PatchMatchLevel
from cocosnet.model.matches import Matches
from cocosnet.model.patchmatch import select_engine
from cocosnet.model.warp import downsample
from cocosnet.precision import autocast

SAMPLE = 4096  # pixels of a level for which the exact answer is found
CORNER = 8  # px, side of the part of the coarse level that engines warm up on


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often."""

    size: int = 512  # px, side of the pictures and of the finest level
    coarse: int | None = None  # px, side of the exact level; None: an eighth of the size, or the checkpoint's own
    features: str = "colour"  # colour, vgg16, or a checkpoint
    matching: MatchingConfig = field(default_factory=MatchingConfig)  # of fixed features; a checkpoint has its own
    asked: Mapping[str, Any] = field(default_factory=dict)  # values of MatchingConfig that both give way to
    distortion: DistortionConfig = field(default_factory=DistortionConfig)
    seed: int = 0
    repeats: int = 1  # of which the quickest counts
    baseline: bool = True  # also time the release's arithmetic, on the first picture


def bench_matching(
    pictures: Iterable[Path],
    settings: BenchSettings,
    device: torch.device,
    on_picture: Callable[[Path, DataError | None], None] = lambda path, error: None,
) -> dict[str, Any]:
    """Measure on known warps of `pictures`; `on_picture` is told of each that is done or could not be read.

    Raises:
        ConfigError: sizes that do not fit each other.
        DataError: no picture could be read.
        MissingWeights, CheckpointError, MissingDependency: as `open_source` and the engines say.
    """
    depth = None if settings.coarse is None else levels_between(settings.coarse, settings.size)
    source = open_source(settings.features, settings.matching, depth, device, settings.asked)
    if settings.size % 2 ** (len(source.levels) - 1):
        raise ConfigError(f"size {settings.size} cannot be halved {len(source.levels) - 1} times")
    generator = torch.Generator().manual_seed(settings.seed)
    found, rivalry, failed = [], None, 0
    for path in pictures:
        try:
            picture = read_square(path, settings.size)
        except DataError as error:
            failed += 1
            on_picture(path, error)
            continue
        pair = make_pair(picture.to(device), settings.distortion, generator)
        figures, rival = measure_pair(pair, source, settings, device, rivalry is None and settings.baseline)
        found.append(figures)
        rivalry = rivalry or rival
        on_picture(path, None)
    if not found:
        raise DataError("no picture could be measured; give a folder of photographs")
    return _report(found, rivalry, failed, source, settings, device)


@torch.inference_mode()
def measure_pair(
    pair: Pair, source: Source, settings: BenchSettings, device: torch.device, with_baseline: bool
) -> tuple[list[dict[str, float]], dict[str, Any] | None]:
    """Each level's figures, coarse to fine; and the comparison with the release's arithmetic where it is asked for."""
    with autocast(source.precision, device):
        x, y = source.pyramids(pair.query, pair.exemplar)
    factors = [2 ** (len(x) - 1 - index) for index in range(len(x))]
    pictures = [downsample(pair.exemplar, factor) for factor in factors]
    _warm_up(source, x, y, pictures)
    before: Matches | None = None
    levels, figures = [], []
    for index, factor in enumerate(factors):
        level, cost = measured(_work(source, index, before, x, y, pictures), device, settings.repeats)
        levels.append(level)
        before = level.matches
        figures.append(
            {"side": x[index].shape[-1]}
            | level_figures(level, x[index], y[index], pair, factor)
            | {"seconds": cost.seconds, "peak_mib": cost.peak_mib}
        )
    rival = _rivalry(levels[0].matches, source, x, y, pictures, pair, settings, device) if with_baseline else None
    return figures, rival


def level_figures(level: Level, x: Tensor, y: Tensor, pair: Pair, factor: int) -> dict[str, float]:
    """Quality of one level's result; x, y its features, `factor` how many times smaller it is than the pair."""
    truth, valid = pair.truth(factor)
    errors = endpoint_error(level.matches.positions[:, 0], truth)[valid]
    quality = warp_quality(level.warps[-1], downsample(pair.query, factor), valid)
    distinct = torch.isfinite(level.matches.scores).sum(1).float()[valid].mean().item()
    return (
        error_summary(errors)
        | {"psnr": quality["psnr"], "ssim": quality["ssim"]}
        | against_exact(level.matches, x, y, truth, valid)
        | {"candidates": distinct}
    )


def against_exact(matches: Matches, x: Tensor, y: Tensor, truth: Tensor, valid: Tensor) -> dict[str, float]:
    """The matches and the exact engine's on the same sample of pixels.

    similarity: mean cosine of the best match. nearest: share of pixels whose best match lies in the true nearest
    neighbour's pixel. sample_within_1px, exact_within_1px: shares of pixels within 1 px of the truth.
    """
    step = max(1, math.ceil(math.sqrt(x.shape[-1] * x.shape[-2] / SAMPLE)))
    pick = (..., slice(step // 2, None, step), slice(step // 2, None, step))
    exact = exact_top_k(x[pick], y, 1)
    chosen, positions, true = valid[pick], matches.positions[:, 0][pick], truth[pick]
    nearest = (positions.round() == exact.positions[:, 0]).all(1)
    return {
        "similarity": matches.scores[:, 0][pick][chosen].mean().item(),
        "exact_similarity": exact.scores[:, 0][chosen].mean().item(),
        "nearest": nearest[chosen].float().mean().item(),
        "sample_within_1px": _within(positions, true, chosen),
        "exact_within_1px": _within(exact.positions[:, 0], true, chosen),
        "exact_epe": endpoint_error(exact.positions[:, 0], true)[chosen].mean().item(),
    }


def _within(positions: Tensor, truth: Tensor, chosen: Tensor, radius: float = 1.0) -> float:
    return (endpoint_error(positions, truth)[chosen] <= radius).float().mean().item()


def _work(
    source: Source, index: int, before: Matches | None, x: Pyramid, y: Pyramid, pictures: list[Tensor]
) -> Callable[[], Level]:
    """One level's matching, ready to be run."""
    given = (x[index], y[index], pictures[index])
    level = source.levels[index]

    def work() -> Level:
        with autocast(source.precision, pictures[index].device):
            return level(before, *given) if isinstance(level, PatchMatchLevel) else level(*given)

    return work


def _warm_up(source: Source, x: Pyramid, y: Pyramid, pictures: list[Tensor]) -> None:
    """Every level on a corner of its maps: what engines compile on their first call is not the algorithm's time."""
    before: Matches | None = None
    for index in range(len(x)):
        corners = ([m[..., : CORNER << i, : CORNER << i] for i, m in enumerate(maps)] for maps in (x, y, pictures))
        before = _work(source, index, before, *corners)().matches


def _rivalry(
    coarse: Matches,
    source: Source,
    x: Pyramid,
    y: Pyramid,
    pictures: list[Tensor],
    pair: Pair,
    settings: BenchSettings,
    device: torch.device,
) -> dict[str, Any] | None:
    """All PatchMatch levels by our engine without refinement and by the release's arithmetic, in turn.

    None where there is no PatchMatch level, or the release's square grid cannot give K candidates.
    """
    config = dataclasses.replace(source.config, refinement="none")
    if len(x) < 2 or config.backend == "exact" or not suits(config.candidates):
        return None
    plain = [source.levels[0], *(type(level)(config, None).eval() for level in source.levels[1:])]
    contest = {"ours": _ours(plain, coarse, x, y, pictures), "baseline": _theirs(config, coarse, x, y, pictures)}
    contest["ours"]()  # the compiler's time is not the algorithm's
    best, results = dict.fromkeys(contest, math.inf), {}
    for name in ["ours", *["baseline", "ours"] * settings.repeats]:
        results[name], cost = measured(contest[name], device)
        best[name] = min(best[name], cost.seconds)
    figures = {name: _contest_figures(results[name], x, y, pair) for name in contest}
    for name, levels in figures.items():
        figures[name] = {"seconds": best[name], "levels": levels}
    return {"speedup": best["baseline"] / best["ours"], **figures}


def _ours(
    levels: Sequence[torch.nn.Module], coarse: Matches, x: Pyramid, y: Pyramid, pictures: list[Tensor]
) -> Callable[[], list[Level]]:
    def run() -> list[Level]:
        found = [Level(coarse, [pictures[0]])]
        for index in range(1, len(x)):
            found.append(levels[index](found[-1].matches, x[index], y[index], pictures[index]))
        return found[1:]

    return run


def _theirs(
    config: MatchingConfig, coarse: Matches, x: Pyramid, y: Pyramid, pictures: list[Tensor]
) -> Callable[[], list[Level]]:
    def run() -> list[Level]:
        best, found = coarse.positions[:, 0], []
        for given in zip(x[1:], y[1:], pictures[1:]):
            matches, warp = release_level(best, *given, config.candidates, config.iterations, config.temperature)
            best = matches.positions[:, 0]
            found.append(Level(matches, [warp]))
        return found

    return run


def _contest_figures(levels: list[Level], x: Pyramid, y: Pyramid, pair: Pair) -> list[dict[str, float]]:
    names = ("epe", "within_1px", "psnr", "similarity", "exact_similarity", "nearest", "candidates")
    figures = []
    for index, level in enumerate(levels, start=1):
        all_of_them = level_figures(level, x[index], y[index], pair, 2 ** (len(x) - 1 - index))
        all_of_them["candidates"] = distinct_candidates(level.matches)
        figures.append({"side": x[index].shape[-1]} | {name: all_of_them[name] for name in names})
    return figures


def distinct_candidates(matches: Matches) -> float:
    """Candidates in distinct pixels of the exemplar, the mean over all pixels; the release keeps copies."""
    rows, columns = matches.positions.round().long().unbind(2)
    pixels = torch.where(torch.isfinite(matches.scores), rows * (columns.max() + 1) + columns, -1).sort(1).values
    new = (pixels[:, 1:] != pixels[:, :-1]).sum(1) + 1 - (pixels[:, :1] == -1).sum(1)
    return new.float().mean().item()


def _report(
    found: list[list[dict[str, float]]],
    rivalry: dict[str, Any] | None,
    failed: int,
    source: Source,
    settings: BenchSettings,
    device: torch.device,
) -> dict[str, Any]:
    """One object of everything: settings, the levels' means over the pictures, totals, the contest and the floor."""
    levels = [
        {
            name: (max if name == "peak_mib" else statistics.fmean)(picture[i][name] for picture in found)
            for name in level
        }
        for i, level in enumerate(found[0])
    ]
    contest = rivalry or {"speedup": None, "ours": None, "baseline": None}
    return {
        **{name: getattr(settings, name) for name in ("size", "features", "seed", "repeats")},
        "coarse": int(levels[0]["side"]),
        "matching": dataclasses.asdict(source.config),
        "engine": _engine(source.config, device),
        "precision": str(source.precision).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "pictures": len(found),
        "failed": failed,
        "levels": levels,
        "seconds": sum(level["seconds"] for level in levels),
        "peak_mib": max(level["peak_mib"] for level in levels),
        **contest,
        "floor": _floor(levels[1:], source.config, device),
    }


def _engine(config: MatchingConfig, device: torch.device) -> str:
    """Which engine the backend means on this device, for that many candidates."""
    like = torch.zeros(1, device=device)
    return "exact" if config.backend == "exact" else select_engine(config.backend, like, config.candidates).name


def _floor(levels: list[dict[str, float]], config: MatchingConfig, device: torch.device) -> dict[str, float]:
    """The least seconds of the PatchMatch levels here, by arithmetic and by memory, and what they rest on."""
    pixels = sum(int(level["side"]) ** 2 for level in levels)
    floor = matching_floor(pixels, config.channels, config.candidates, config.iterations)
    rates = {"flop_per_second": multiply_rate(device), "bytes_per_second": copy_rate(device)}
    return {
        **floor,
        **rates,
        "arithmetic_seconds": floor["flop"] / rates["flop_per_second"],
        "memory_seconds": floor["bytes"] / rates["bytes_per_second"],
        "gathered_seconds": floor["gathered_bytes"] / rates["bytes_per_second"],
    }
