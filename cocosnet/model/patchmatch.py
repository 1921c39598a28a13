"""Propagation and evaluation (Eq. 5): matches spread from neighbour to neighbour, the K best distinct ones survive.

One pass looks along one axis: every pixel considers its own K matches and those of its two neighbours there, shifted by
one so that they continue the neighbour's match. An iteration is a horizontal and a vertical pass, always in that order.
Selection is discrete and carries no gradient; `evaluate` scores the survivors differentiably.

This file is the definition, in plain PyTorch, and the door to the faster engines (`select_engine`).

Shapes: B batch, C channels, K candidates, h w the condition's map, H W the exemplar's map.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cocosnet.errors import MissingDependency
from cocosnet.model.matches import Matches
from cocosnet.model.quick import compiled_module
from cocosnet.model.warp import clamp_positions, is_open, of_axes, pixel_grid, sample, scattered_positions, soft_warp

logger = logging.getLogger(__name__)
AXES = (-1, -2)  # horizontal first, then vertical
SHORTEST = 0.5  # a mean of unit vectors that is shorter (they point apart) is stretched no more than this one
CHUNK = 2**25  # sampled feature values held at once: 128 MiB of float32
OPEN_GROUP = 8  # candidates sampled at once where the sizes are open


@torch.no_grad()
def propagate(
    positions: Tensor, features_x: Tensor, features_y: Tensor, scores: Tensor | None = None, iterations: int = 1
) -> Matches:
    """H' = propagation(H, f^x, f^y), Eq. 5, one horizontal and one vertical pass, `iterations` times.

    positions B,K,2,h,w (clamped here); features_x B,C,h,w and features_y B,C,H,W of unit length, float32.
    scores B,K,h,w: what `evaluate` gave for these positions and features, where it is at hand. It spares an engine from
    scoring a pixel's own matches again and changes nothing else; this one does without.
    Returns the K best distinct candidates of every pixel, best first.
    """
    positions = clamp_positions(positions, *features_y.shape[-2:])
    for axis in AXES * iterations:
        matches = best_distinct(neighbour_candidates(positions, axis), features_x, features_y, positions.shape[1])
        positions = matches.positions
    return matches


@torch.no_grad()
def descend(coarse_positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """Start a finer level widely: the K best of the children of K/2 coarse matches and of K scattered places.

    A match's children are the four fine pixels of its pixel; the best K/2 (rounded up) have theirs tried. The
    scattered places are what the coarse level could not know: a single pixel that hits a place much like its own hands
    it on to all around it by propagation. coarse_positions B,K,2,h/2,w/2 (rounded up); features as for `propagate`.
    Returns the K best distinct ones, best first; slots stay empty where there are fewer.
    """
    height, width = features_x.shape[-2:]
    count = coarse_positions.shape[1]
    scattered = scattered_positions(count, (height, width), features_y.shape[-2:], features_x.device)
    corners = pixel_grid(2, 2, coarse_positions.device).flatten(1).T.view(1, 1, 4, 2, 1, 1)
    children = (2 * coarse_positions[:, : -(-count // 2)].unsqueeze(2) + corners).flatten(1, 2)
    children = children.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., :height, :width]
    candidates = torch.cat([children, scattered.expand(len(children), -1, -1, -1, -1)], dim=1)
    return best_distinct(candidates, features_x, features_y, count)


def neighbour_candidates(positions: Tensor, axis: int) -> Tensor:
    """Own matches and those of the two neighbours along `axis` (-1 columns, -2 rows), continued by one pixel.

    If the left neighbour matches q, this pixel tries q + (0, 1). Pixels at the border repeat their own matches.
    B,K,2,h,w -> B,3K,2,h,w, own matches first, then the previous neighbour's, then the next one's.
    """
    size, step = positions.shape[axis], of_axes(positions, float(axis == -2), float(axis == -1))
    first, last = positions.narrow(axis, 0, 1), positions.narrow(axis, size - 1, 1)
    previous = torch.cat([first - step, positions.narrow(axis, 0, size - 1)], axis) + step
    following = torch.cat([positions.narrow(axis, 1, size - 1), last + step], axis) - step
    return torch.cat([positions, previous, following], dim=1)


@torch.no_grad()
def best_distinct(candidates: Tensor, features_x: Tensor, features_y: Tensor, count: int) -> Matches:
    """Score candidates (B,N,2,h,w) and keep the `count` best that lie in distinct pixels of the exemplar, best first.

    Empty slots repeat the best match's position.
    """
    candidates = clamp_positions(candidates, *features_y.shape[-2:])
    scores = drop_duplicates(candidates, cosine(features_x, features_y, candidates))
    best, order = torch.topk(scores, count, dim=1)
    kept = torch.gather(candidates, 1, order.unsqueeze(2).expand(-1, -1, 2, -1, -1))
    return Matches(torch.where(best.unsqueeze(2) == -torch.inf, kept[:, :1], kept), best)


def drop_duplicates(positions: Tensor, scores: Tensor) -> Tensor:
    """Scores with -inf for every candidate whose pixel (position rounded) a better or equal, earlier one already holds.

    positions B,N,2,h,w; scores B,N,h,w. Differentiable in the kept scores.
    """
    with torch.no_grad():
        # Rows and columns are rounded before they join, and they join as integers.
        rows, columns = positions.round().long().unbind(2)
        pixels = rows * (columns.max() + 1) + columns
        by_score = torch.sort(scores, dim=1, descending=True, stable=True).indices
        pixels, by_pixel = torch.sort(pixels.gather(1, by_score), dim=1, stable=True)
        order = by_score.gather(1, by_pixel)
        first = torch.zeros_like(pixels[:, :1], dtype=torch.bool)
        repeated = torch.cat([first, pixels[:, 1:] == pixels[:, :-1]], dim=1)
        duplicate = repeated.scatter(1, order, repeated)  # back in the order of the candidates
    return scores.masked_fill(duplicate, -torch.inf)


def cosine(features_x: Tensor, features_y: Tensor, positions: Tensor) -> Tensor:
    """S(p, k) = cos(f^x(p), f^y(H(p, k))) of Eq. 7, with f^y read bilinearly and stretched to unit length again.

    The mean of unit vectors is shorter than 1. Unstretched, a match between two pixels would score less than one of
    equal direction on a pixel: whole positions would win over the right ones, and a refinement by fractions never pay.
    Returns B,N,h,w; differentiable in all three. Candidates are sampled in groups, so that no more than CHUNK feature
    values are held without a gradient.
    """
    batch, channels, height, width = features_x.shape
    group = OPEN_GROUP if is_open(height * width) else max(1, CHUNK // (batch * channels * height * width))
    x = features_x.unsqueeze(2)
    read = (sample(features_y, part) for part in positions.split(group, dim=1))
    return torch.cat([(x * y).sum(1) / y.norm(dim=1).clamp(min=SHORTEST) for y in read], dim=1)


def evaluate(positions: Tensor, features_x: Tensor, features_y: Tensor) -> Matches:
    """Score a field as it stands: clamped to the map, duplicates emptied; the order of the candidates stays.

    Differentiable in positions and features. Returns Matches of the same K.
    """
    positions = clamp_positions(positions, *features_y.shape[-2:])
    return Matches(positions, drop_duplicates(positions, cosine(features_x, features_y, positions)))


def best_first(matches: Matches) -> Matches:
    """The candidates of every pixel in order of their scores, empty slots last. Differentiable."""
    order = torch.argsort(matches.scores, dim=1, descending=True, stable=True)
    positions = torch.gather(matches.positions, 1, order.unsqueeze(2).expand_as(matches.positions))
    return Matches(positions, torch.gather(matches.scores, 1, order))


@dataclass(frozen=True)
class Engine:
    """A way to compute these operations; every engine has the signatures and results of the functions named here."""

    name: str
    propagate: Callable[..., Matches]
    evaluate: Callable[[Tensor, Tensor, Tensor], Matches]
    descend: Callable[[Tensor, Tensor, Tensor], Matches] = descend
    best_first: Callable[[Matches], Matches] = best_first
    soft_warp: Callable[[Tensor, Tensor, Tensor, float], Tensor] = soft_warp


NEEDS = {
    "compiled": "a CPU, float32 features and a working numba: pip install numba",
    "triton": "a CUDA GPU (or TRITON_INTERPRET=1), features of float32, bfloat16 or float16, at most 32 candidates "
    "and a working triton",
}
REFERENCE = Engine("reference", propagate, evaluate)


def select_engine(backend: str, features: Tensor, candidates: int = 1) -> Engine:
    """The engine for features of this device and type and K candidates.

    `reference`; `compiled` (CPU, float32, numba); `triton` (CUDA, or anywhere under TRITON_INTERPRET=1; float32,
    bfloat16 or float16; K up to 32); or `auto`.

    `auto` takes the quickest that can handle the features, the reference where no other can. `exact` searches without
    PatchMatch (see `hierarchy.ExactLevel`); what is left to score of a field, it scores as `auto` does.

    While `torch.compile` traces for a CPU it is the reference whatever is asked: a graph cannot hold compiled loops.

    Raises:
        MissingDependency: an engine is asked for by name and cannot run here.
    """
    if torch.compiler.is_compiling() and not features.is_cuda:
        return REFERENCE
    engine = None
    if backend == "triton" or (backend in ("auto", "exact") and features.is_cuda):
        engine = _triton(features, candidates)
    elif backend != "reference" and features.device.type == "cpu" and features.dtype == torch.float32:
        engine = _compiled()
    if engine is None and backend in NEEDS:
        raise MissingDependency(
            f"model.matching.backend={backend} needs {NEEDS[backend]}, or set model.matching.backend=auto"
        )
    return engine or REFERENCE


@functools.cache
def _compiled() -> Engine | None:
    """The compiled engine, or None where it cannot be loaded, which is said once: the reference is much slower."""
    compiled, reason = compiled_module("compiled")
    if compiled is None:
        logger.warning("matching runs on its slow reference engine, since numba does not load (%s)", reason)
        return None
    names = ("propagate", "evaluate", "descend", "best_first", "soft_warp")
    return Engine("compiled", *(getattr(compiled, name) for name in names))


def _triton(features: Tensor, candidates: int) -> Engine | None:
    """The Triton engine, or None where it cannot be loaded or these features are not for it."""
    module = _triton_module()
    if module is None or not module.can_handle(features, candidates):
        if module is not None and candidates > module.MAX_CANDIDATES:
            _say_too_many(candidates, module.MAX_CANDIDATES)
        return None
    return Engine("triton", module.propagate, module.evaluate, module.descend)


@functools.cache
def _say_too_many(candidates: int, most: int) -> None:
    """Once: what makes matching on a GPU slow."""
    logger.warning(
        "matching runs on its slow reference engine, since Triton keeps at most %d candidates a pixel, not %d; "
        "set model.matching.candidates lower",
        most,
        candidates,
    )


@functools.cache
def _triton_module() -> ModuleType | None:
    """None where Triton cannot be loaded or cannot start, which is said once."""
    try:
        from cocosnet.model import triton_engine

        triton_engine.start()
    except Exception as error:  # its parts fail by errors of many kinds, down to assertions
        reason = " ".join(str(error).split())
        logger.warning("matching runs on its slow reference engine, since Triton does not load (%s)", reason)
        return None
    return triton_engine
