"""What `compat: release-fixed` changes, where the truth is known: `python docs/measure_release.py [PHOTO ...]`.

The release's search and refinement on known warps of photographs (by default one of the package's), with fixed colour
features and the refinement as the release starts it: Xavier weights of gain 0.02, zero biases. A table on stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from cocosnet.bench.features import fixed_features, reduced_pair
from cocosnet.bench.matching import distinct_candidates, level_figures
from cocosnet.bench.truth import make_pair, read_square
from cocosnet.config import DistortionConfig, MatchingConfig
from cocosnet.model.exact import exact_top_k
from cocosnet.model.hierarchy import Level
from cocosnet.model.patchmatch import best_first
from cocosnet.model.release_matching import ReleasePatchMatch
from cocosnet.model.warp import downsample

PHOTO = Path(__file__).resolve().parent.parent / "cocosnet" / "assets" / "demo" / "hopper.jpg"
SIZE, LEVELS = 256, 4
COLUMNS = ("epe", "within_1px", "psnr", "similarity", "nearest", "distinct")


def main() -> None:
    """Print a row a level and mode, means over the photographs."""
    photos = [Path(name) for name in sys.argv[1:]] or [PHOTO]
    print("| mode | level | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    for compat in ("release", "release-fixed"):
        rows = [measure(photo, compat) for photo in photos]
        for level, figures in enumerate(zip(*rows)):
            mean = [sum(f[name] for f in figures) / len(figures) for name in COLUMNS]
            print(f"| {compat} | {SIZE >> (LEVELS - 2 - level)} | " + " | ".join(f"{x:.3f}" for x in mean) + " |")


@torch.inference_mode()
def measure(photo: Path, compat: str) -> list[dict[str, float]]:
    """Figures of every level but the coarsest, coarse to fine."""
    pair = make_pair(read_square(photo, SIZE), DistortionConfig(), torch.Generator().manual_seed(1))
    config = MatchingConfig(compat=compat)
    x, y = reduced_pair(fixed_features("colour", LEVELS), pair.query, pair.exemplar, config.channels)
    search, figures, matches = fresh_search(config), [], exact_top_k(x[0], y[0], 1)
    for index in range(1, LEVELS):
        factor = 2 ** (LEVELS - 1 - index)
        picture = downsample(pair.exemplar, factor)
        level = search(matches, x[index], y[index], picture, [(-1, -2)] * config.iterations)
        ranked = Level(best_first(level.matches), level.warps)
        matches = ranked.matches if search.fixed else level.matches
        found = level_figures(ranked, x[index], y[index], pair, factor)
        figures.append(found | {"distinct": distinct_candidates(level.matches)})
    return figures


def fresh_search(config: MatchingConfig) -> ReleasePatchMatch:
    """The release's search with the weights that it starts its training with, and which its GRU keeps."""
    torch.manual_seed(0)
    search = ReleasePatchMatch(config).eval()
    for module in search.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight, gain=0.02)
            nn.init.zeros_(module.bias)
    return search


if __name__ == "__main__":
    main()
