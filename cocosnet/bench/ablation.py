"""The paper's ablations (Tables 4 and 5) at a size that a CPU trains: every row learns and is measured alike.

Features are fixed (`cocosnet.bench.features`) and computed once; what learns is the product's own matcher
(`cocosnet.model.hierarchy.Hierarchy`: a projection a level, and the refinement) by its own loss (Eq. 12, a weighted
warp loss after every iteration) on known warps of photographs. Held-out photographs, warped as well, are the test.

Table 4 varies the finest level. Table 5 takes the operator apart; its last row is Table 4's last one.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cocosnet.bench.features import FIXED, Pyramid, Reduction, fit_reduction, fixed_features
from cocosnet.bench.quality import endpoint_error, error_summary, warp_quality
from cocosnet.bench.truth import Pair, levels_between, make_pair, read_square
from cocosnet.config import DistortionConfig, LossConfig, MatchingConfig
from cocosnet.errors import ConfigError, DataError
from cocosnet.files import atomic_write
from cocosnet.losses.correspondence import correspondence_loss
from cocosnet.model.hierarchy import Hierarchy, Level
from cocosnet.model.warp import upsample_positions

MEASURES = ("epe", "epe_median", "within_1px", "within_3px", "l1", "psnr", "ssim")
LOWER_IS_BETTER = ("epe", "epe_median", "l1")
DECAY = LossConfig.iteration_decay  # of the loss's weights over the iterations
MATCHING = MatchingConfig(inputs="relative")  # what all rows have in common, but for what settings and row say
TEST_SEED = 0  # the test warps are the same for every row and seed
TEST_BATCH = 8


@dataclass(frozen=True)
class AblationSettings:
    """Everything that a row's figures depend on, besides the pictures themselves."""

    size: int = 128  # px, full resolution: the finest level
    coarse: int = 32  # px, the exact level
    features: str = "colour"  # colour or vgg16
    channels: int = 32  # C, numbers that are compared
    candidates: int = 8  # K
    iterations: int = 3  # T
    hidden: int = 16  # channels of the refinement's state
    steps: int = 150  # training steps of a row
    batch: int = 2
    rate: float = 3e-3  # Adam's learning rate
    train_pairs: int = 96  # warped pictures to train on, drawn anew for each seed
    test_pairs: int = 24

    @property
    def levels(self) -> int:
        """Levels of the full model."""
        return levels_between(self.coarse, self.size)


@dataclass(frozen=True)
class Row:
    """One variant: its number of levels, what its operator is made of, and (table, title) for each of its places."""

    name: str
    levels: int
    propagation: bool = True
    refinement: str = "gru"
    tables: tuple[tuple[str, str], ...] = ()


def rows_of(settings: AblationSettings) -> list[Row]:
    """The rows of both tables; the full model, last, stands in both."""
    sides = [settings.coarse * 2**i for i in range(settings.levels)]
    titles = [" + ".join(map(str, sides[: i + 1])) for i in range(settings.levels)]
    partial = [Row(f"levels-{i + 1}", i + 1, tables=(("table4", titles[i]),)) for i in range(settings.levels - 1)]
    whole = settings.levels
    operators = [
        Row("propagation", whole, True, "none", (("table5", "propagation only"),)),
        Row("gru", whole, False, "gru", (("table5", "GRU only"),)),
        Row("propagation-conv", whole, True, "conv", (("table5", "propagation + convolution"),)),
    ]
    full = (("table4", f"full: {titles[-1]}"), ("table5", "full: propagation + GRU"))
    return [*partial, *operators, Row("full", whole, True, "gru", full)]


@dataclass
class Sample:
    """Pairs with the fixed features of both pictures, coarse to fine."""

    pair: Pair
    query: Pyramid
    exemplar: Pyramid

    def picked(self, chosen: Tensor) -> Sample:
        """Some of the pairs, by their indices."""
        pair = Pair(*(getattr(self.pair, field.name)[chosen] for field in dataclasses.fields(Pair)))
        return Sample(pair, [f[chosen] for f in self.query], [f[chosen] for f in self.exemplar])


def run_ablation(
    pictures: Sequence[Path], settings: AblationSettings, seeds: Sequence[int], folder: Path
) -> Iterator[dict[str, Any]]:
    """Train and measure every row with every seed, a JSON file each in `folder`; what is there is not done again.

    Yields each row's result when it is there. Every fifth picture (at least one) is held out for the test.

    Raises:
        ConfigError: a size that is not a power of two times the coarse side; features that are not fixed ones.
        DataError: fewer than two pictures, one that cannot be read, or `folder` cannot be written.
    """
    levels_between(settings.coarse, settings.size)
    if settings.features not in FIXED:
        raise ConfigError(f"an ablation trains on fixed features ({', '.join(FIXED)}), not on {settings.features}")
    if len(pictures) < 2:
        raise DataError(f"an ablation needs at least two pictures, found {len(pictures)}; give a folder with more")
    raw = fixed_features(settings.features, settings.levels)
    for seed in seeds:
        samples: list[Sample] = []
        for row in rows_of(settings):
            path = folder / f"{row.name}-seed{seed}.json"
            done = _finished(path, settings, pictures)
            if done is None:
                samples = samples or _samples(pictures, settings, seed, raw)
                done = _result(row, settings, seed, pictures, *samples)
                atomic_write(path, json.dumps(done, indent=1) + "\n")
            yield done


def train_row(row: Row, settings: AblationSettings, seed: int, sample: Sample) -> tuple[Hierarchy, list[float]]:
    """A row's matcher, trained; and its loss at every step. All randomness is `seed`'s."""
    hierarchy = _untrained(row, settings, seed)
    optimiser = torch.optim.Adam(hierarchy.parameters(), lr=settings.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, settings.steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    count = len(sample.pair.query)
    for _ in range(settings.steps):
        batch = sample.picked(torch.randint(count, (settings.batch,), generator=generator))
        pair = batch.pair.shrunk(2 ** (settings.levels - row.levels))
        with torch.autocast("cpu", torch.bfloat16):  # convolutions only: matching stays in float32 by itself
            levels = hierarchy(batch.query[: row.levels], batch.exemplar[: row.levels], pair.exemplar)
        loss = correspondence_loss([level.warps for level in levels], pair.query, torch.ones(settings.batch), DECAY)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(hierarchy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return hierarchy.eval(), losses


@torch.no_grad()
def measure_row(hierarchy: Hierarchy, row: Row, settings: AblationSettings, sample: Sample) -> dict[str, float]:
    """Figures on the test pairs, all at full resolution, to which coarser results are enlarged; the mean over pairs."""
    factor, found = 2 ** (settings.levels - row.levels), []
    for chosen in torch.arange(len(sample.pair.query)).split(1):
        one = sample.picked(chosen)
        exemplar = one.pair.shrunk(factor).exemplar
        level = hierarchy(one.query[: row.levels], one.exemplar[: row.levels], exemplar)[-1]
        found.append(_measure(level, factor, one.pair))
    return {name: statistics.fmean(values[name] for values in found) for name in MEASURES}


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Both tables: for each row its title, seeds, and for each measure the mean over seeds and the seeds' values."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(result["row"] for result in results):
        same = [result for result in results if result["row"] == name]
        for table, title in same[0]["tables"].items():
            values = {measure: [result[measure] for result in same] for measure in MEASURES}
            entry = {"title": title, "seeds": [result["seed"] for result in same], "values": values}
            tables.setdefault(table, []).append(entry | {m: statistics.fmean(v) for m, v in values.items()})
    return tables


def full_model_wins(rows: Sequence[dict[str, Any]], measure: str) -> bool:
    """Whether a table's last row beats each other one in `measure` with every seed."""
    sign = -1 if measure in LOWER_IS_BETTER else 1
    *others, full = rows
    return all(
        sign * ours > sign * theirs
        for other in others
        for ours, theirs in zip(full["values"][measure], other["values"][measure], strict=True)
    )


def tables_as_markdown(tables: dict[str, list[dict[str, Any]]], settings: AblationSettings) -> str:
    """The tables, mean and range over the seeds, and whether the full model wins with every seed."""
    titles = {"table4": "Table 4: the finest level", "table5": "Table 5: the refinement"}
    parts = [f"settings: {json.dumps(dataclasses.asdict(settings))}"]
    for table, rows in sorted(tables.items()):
        parts.append(f"**{titles[table]}** (seeds {', '.join(map(str, rows[-1]['seeds']))})\n\n" + _markdown(rows))
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    shown = {"epe": "EPE", "epe_median": "median", "within_1px": "<= 1 px", "within_3px": "<= 3 px"}
    lines = [
        "| | " + " | ".join(shown.get(name, name.upper()) for name in MEASURES) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(name, row["values"][name]) for name in MEASURES]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    wins = ["yes" if full_model_wins(rows, name) else "no" for name in MEASURES]
    return "\n".join([*lines, "| full model best with every seed | " + " | ".join(wins) + " |"])


def _cell(measure: str, values: Sequence[float]) -> str:
    """Mean and half the range over the seeds."""
    scale, digits = (100, 1) if measure.startswith("within") else (1, 3 if measure == "ssim" else 2)
    spread = (max(values) - min(values)) / 2 * scale
    return f"{statistics.fmean(values) * scale:.{digits}f} ± {spread:.{digits}f}"


def _untrained(row: Row, settings: AblationSettings, seed: int) -> Hierarchy:
    """A matcher whose projections change nothing yet, in training mode."""
    config = dataclasses.replace(
        MATCHING,
        channels=settings.channels,
        candidates=settings.candidates,
        iterations=settings.iterations,
        hidden=settings.hidden,
        propagation=row.propagation,
        refinement=row.refinement,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hierarchy = Hierarchy((settings.channels,) * row.levels, config)
    for projection in hierarchy.projections:
        nn.init.dirac_(projection.conv.weight)
        nn.init.zeros_(projection.conv.bias)
    return hierarchy.train()


def _measure(level: Level, factor: int, pair: Pair) -> dict[str, float]:
    """One pair's figures, at full resolution."""
    truth, valid = pair.truth(1)
    field, warp = level.matches.positions[:, :1], level.warps[-1]
    while factor > 1:
        field = upsample_positions(field, *(2 * side for side in field.shape[-2:]))
        factor //= 2
    warp = nn.functional.interpolate(warp, size=pair.query.shape[-2:], mode="bilinear", align_corners=False)
    errors = endpoint_error(field[:, 0], truth)[valid]
    return error_summary(errors) | warp_quality(warp, pair.query, valid)


def _samples(
    pictures: Sequence[Path], settings: AblationSettings, seed: int, raw: Callable[[Tensor], Pyramid]
) -> list[Sample]:
    """Train and test pairs with their features; the principal components are those of the training pictures."""
    test = list(pictures[::5])
    train = [path for path in pictures if path not in test]
    drawn = _pairs(train, settings.train_pairs, settings.size, 1000 + seed)
    held_out = _pairs(test, settings.test_pairs, settings.size, TEST_SEED)
    some = raw(drawn.exemplar[:TEST_BATCH])
    reductions = [fit_reduction([features], settings.channels) for features in some]
    return [
        Sample(p, _reduced(raw, reductions, p.query), _reduced(raw, reductions, p.exemplar)) for p in (drawn, held_out)
    ]


def _pairs(paths: Sequence[Path], count: int, size: int, seed: int) -> Pair:
    """`count` warps; pictures are drawn without repetition as long as there are enough."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(paths), generator=generator) for _ in range(-(-count // len(paths)))])
    pictures = torch.cat([read_square(paths[index], size) for index in order[:count].tolist()])
    return make_pair(pictures, DistortionConfig(), generator)


@torch.no_grad()
def _reduced(raw: Callable[[Tensor], Pyramid], reductions: list[Reduction], pictures: Tensor) -> Pyramid:
    """Reduced features of many pictures, in small batches."""
    batches = [[r(f) for r, f in zip(reductions, raw(part))] for part in pictures.split(TEST_BATCH)]
    return [torch.cat(level) for level in zip(*batches)]


def _result(
    row: Row, settings: AblationSettings, seed: int, pictures: Sequence[Path], train: Sample, test: Sample
) -> dict[str, Any]:
    hierarchy, losses = train_row(row, settings, seed, train)
    return {
        "row": row.name,
        "tables": dict(row.tables),
        "seed": seed,
        "pictures": [path.name for path in pictures],
        "settings": dataclasses.asdict(settings),
        "loss_first": statistics.fmean(losses[:10]) if losses else None,
        "loss_last": statistics.fmean(losses[-10:]) if losses else None,
        **measure_row(hierarchy, row, settings, test),
    }


def _finished(path: Path, settings: AblationSettings, pictures: Sequence[Path]) -> dict[str, Any] | None:
    """The result in a file, if it was made with these settings and pictures."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    wanted = {"settings": dataclasses.asdict(settings), "pictures": [picture.name for picture in pictures]}
    return found if isinstance(found, dict) and wanted.items() <= found.items() else None
