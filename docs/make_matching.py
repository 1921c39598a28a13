"""The pictures of docs/matching.md, from a photograph that travels with the package: `python docs/make_matching.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cocosnet.bench.quality import endpoint_error
from cocosnet.bench.sources import open_source
from cocosnet.bench.truth import Pair, make_pair, read_square
from cocosnet.config import DistortionConfig, MatchingConfig
from cocosnet.files import atomic_path
from cocosnet.model.hierarchy import Level
from cocosnet.model.patchmatch import select_engine
from cocosnet.model.warp import downsample, pixel_grid
from cocosnet.viz.canvas import as_image, fit_height, side_by_side, stacked, titled
from cocosnet.viz.flow import flow_colors, score_colors
from cocosnet.viz.matches import draw_matches

DOCS = Path(__file__).resolve().parent
PHOTO = DOCS.parent / "cocosnet" / "assets" / "demo" / "hopper.jpg"
SIZE, LEVELS, TILE = 256, 4, 176
FAR = 8.0  # px of the level, shown as fully wrong


def main() -> None:
    """Match the photograph with a warp of itself and draw the task, the levels and the iterations."""
    pair = make_pair(read_square(PHOTO, SIZE), DistortionConfig(), torch.Generator().manual_seed(1))
    save(task(pair), "matching-task.jpg")
    save(levels(pair), "matching-levels.jpg")
    save(iterations(pair), "matching-iterations.jpg")


def save(picture: Image.Image, name: str) -> None:
    """A JPEG small enough for a page."""
    with atomic_path(DOCS / name) as path:
        picture.save(path, quality=80)


def task(pair: Pair) -> Image.Image:
    """Query, exemplar and the true matches."""
    truth, valid = pair.truth(1)
    offset = (truth - pixel_grid(SIZE, SIZE)) * valid.unsqueeze(1)
    return stacked(
        [
            side_by_side(
                [
                    tile(pair.query[0], "query", "what is to be put together"),
                    tile(pair.exemplar[0], "exemplar", "where the pixels come from"),
                    tile(flow_colors(offset, 60.0)[0], "true offsets", "hue: direction; white: none"),
                    titled(draw_matches(pair.query[0], pair.exemplar[0], truth[0], height=TILE), "true matches", " "),
                ]
            )
        ]
    )


def levels(pair: Pair) -> Image.Image:
    """A row a level: warp, offsets, how far each pixel is from the truth, cosine of the best match."""
    found = run(pair, 5)
    return stacked([row(level, pair, LEVELS - 1 - index) for index, level in enumerate(found)])


def iterations(pair: Pair) -> Image.Image:
    """Propagation alone on the finest level: a random start in which a few pixels are right, and what it grows into."""
    source = open_source("colour", MatchingConfig(), LEVELS, torch.device("cpu"))
    x, y = (pyramid[-1] for pyramid in source.pyramids(pair.query, pair.exemplar))
    engine, (truth, _) = select_engine("auto", x), pair.truth(1)
    positions = torch.rand(1, 16, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * (SIZE - 1)
    right = (slice(None), 0, slice(None), slice(16, None, 32), slice(16, None, 32))
    positions[right] = truth[:, :, 16::32, 16::32]
    tiles = [error_tile(positions[:, 0], truth, "random, 64 pixels right")]
    for step in range(1, 17):
        positions = engine.propagate(positions, x, y).positions
        if step in (1, 4, 16):
            tiles.append(error_tile(positions[:, 0], truth, f"iterations: {step}"))
    return stacked([side_by_side(tiles)])


@torch.inference_mode()
def run(pair: Pair, count: int) -> list[Level]:
    """The matcher on colour features."""
    source = open_source("colour", MatchingConfig(iterations=count), LEVELS, torch.device("cpu"))
    x, y = source.pyramids(pair.query, pair.exemplar)
    found: list[Level] = []
    for index, level in enumerate(source.levels):
        picture = downsample(pair.exemplar, 2 ** (LEVELS - 1 - index))
        given = (x[index], y[index], picture)
        found.append(level(found[-1].matches, *given) if index else level(*given))
    return found


def row(level: Level, pair: Pair, halvings: int) -> Image.Image:
    """One level's tiles."""
    truth, valid = pair.truth(2**halvings)
    field, side = level.matches.positions[:, 0], truth.shape[-1]
    offsets = flow_colors(field - pixel_grid(side, side), 60.0 / 2**halvings)[0]
    good = (endpoint_error(field, truth)[valid] <= 1).float().mean()
    return side_by_side(
        [
            tile(level.warps[-1][0], f"level {side}x{side}", "warp"),
            tile(offsets, "offsets", "of the best match"),
            error_tile(field, truth, f"{good:.0%} within 1 px", valid),
            tile(score_colors(level.matches.scores[0, 0], 0.5), "cosine", "violet 0.5 to yellow 1"),
        ]
    )


def error_tile(field: Tensor, truth: Tensor, title: str, valid: Tensor | None = None) -> Image.Image:
    """Distance to the truth: yellow right, violet FAR or more; grey where there is no truth."""
    closeness = 1 - (endpoint_error(field, truth) / FAR).clamp(max=1)
    if valid is not None:
        closeness = torch.where(valid, closeness, torch.nan)
    return tile(score_colors(closeness[0]), title, f"yellow right, violet {FAR:.0f} px off")


def tile(picture: object, title: str, note: str) -> Image.Image:
    """A picture of one height under its title."""
    return titled(fit_height(as_image(picture), TILE), title, note)


if __name__ == "__main__":
    main()
