"""Hierarchical matching (Eq. 3): the coarse level exactly, then GRU-assisted PatchMatch level by level.

Each level takes the matches of the one before, and gives its own and the exemplar warped by them (Eq. 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cocosnet.config import MatchingConfig
from cocosnet.model.convgru import Refinement
from cocosnet.model.exact import exact_top_k, exact_warp
from cocosnet.model.layers import cut
from cocosnet.model.matches import Matches
from cocosnet.model.patchmatch import Engine, select_engine
from cocosnet.model.warp import child_positions, downsample, upsample_positions


@dataclass
class Level:
    """Result of one level: H_l and S_l, and the warp after every iteration (only the last one in evaluation mode)."""

    matches: Matches
    warps: list[Tensor]  # B,3,h,w each


class Projection(nn.Module):
    """Features of one level to unit vectors of `channels` numbers whose mean is taken off (release).

    One projection serves both domains: they share a space (Eq. 11), so what brings them together is kept.
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """B,C_l,h,w -> B,channels,h,w float32, unit length over the channels."""
        x = self.conv(features).float()
        return F.normalize(x - x.mean(1, keepdim=True), dim=1)


class ExactLevel(nn.Module):
    """N_1, and every level of `backend: exact`: every position against every other.

    All positions enter the soft warp, so the gradient reaches all features.
    """

    def __init__(self, config: MatchingConfig):
        super().__init__()
        self.candidates, self.temperature = config.candidates, config.temperature

    def forward(self, features_x: Tensor, features_y: Tensor, exemplar: Tensor) -> Level:
        """features B,C,h,w and B,C,H,W of unit length; exemplar B,3,H,W."""
        warp = exact_warp(features_x, features_y, exemplar, self.temperature)
        return Level(exact_top_k(features_x.detach(), features_y.detach(), self.candidates), [warp])


class PatchMatchLevel(nn.Module):
    """N_l, l > 1: T iterations of propagation (Eq. 5) and refinement (Eq. 6), H_{t+1} = H'_t + dH_t.

    Positions are cut off between iterations, as in RAFT: each iteration's warp teaches its own step.
    """

    def __init__(self, config: MatchingConfig, refinement: Refinement | None):
        super().__init__()
        self.iterations, self.temperature = config.iterations, config.temperature
        self.backend, self.propagation = config.backend, config.propagation
        self.start = config.start
        self.refinement, self.checkpoint = refinement, config.checkpoint

    def forward(self, coarse: Matches, features_x: Tensor, features_y: Tensor, exemplar: Tensor) -> Level:
        """coarse: H_{l-1}; features B,C,h,w and B,C,H,W of unit length; exemplar B,3,H,W."""
        engine = select_engine(self.backend, features_x, coarse.positions.shape[1])
        # Channels last is how engines and convolutions read them: once a level instead of once an iteration.
        x, y = (f.contiguous(memory_format=torch.channels_last) for f in (features_x, features_y))
        positions, scores = self._first(engine, coarse.positions.detach(), x.detach(), y.detach())
        if self.refinement is None and self.propagation and not torch.is_grad_enabled() and not self.training:
            matches = engine.propagate(positions, x, y, scores, self.iterations)
            return Level(matches, [engine.soft_warp(exemplar, matches.positions, matches.scores, self.temperature)])
        state, warps = None, []
        for iteration in range(self.iterations):
            state, matches = self.iterate(engine, state, positions.detach(), x, y, scores)
            scores = matches.scores.detach()
            if self.training or iteration == self.iterations - 1:
                warps.append(engine.soft_warp(exemplar, matches.positions, matches.scores, self.temperature))
            positions = matches.positions
        return Level(engine.best_first(matches), warps)

    def _first(self, engine: Engine, coarse: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """H_0 of the level from the coarser one's matches, and its scores where they are known by then."""
        if self.start == "wide":
            matches = engine.descend(coarse, x, y)
            return matches.positions, matches.scores
        return child_positions(coarse, *x.shape[-2:]), None

    def iterate(
        self,
        engine: Engine,
        state: Tensor | None,
        positions: Tensor,
        features_x: Tensor,
        features_y: Tensor,
        scores: Tensor | None = None,
    ) -> tuple[Tensor | None, Matches]:
        """One iteration from H_t and, where known, its scores. Returns the GRU's state and the scored H_{t+1}."""
        with torch.no_grad():
            x, y = features_x.detach(), features_y.detach()
            if self.propagation:
                proposed = engine.propagate(positions, x, y, scores)
            else:  # the refinement takes the first candidate for the best one
                proposed = engine.best_first(engine.evaluate(positions, x, y))
        if self.refinement is None:
            return None, engine.evaluate(proposed.positions, features_x, features_y)
        state, step = self._refine(state, proposed.detach(), features_x, features_y)
        return state, engine.evaluate(proposed.positions + step, features_x, features_y)

    def _refine(self, *inputs: Tensor | Matches | None) -> tuple[Tensor, Tensor]:
        """The refinement, its inner activations computed again for the gradient instead of kept, if asked for."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.refinement, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.refinement(*inputs)


class Hierarchy(nn.Module):
    """N_1 .. N_L. `widths`: channels of the features, coarse to fine."""

    def __init__(self, widths: tuple[int, ...], config: MatchingConfig):
        super().__init__()
        self.projections = nn.ModuleList(Projection(width, config.channels) for width in widths)
        self.exact_everywhere, self.temperature = config.backend == "exact", config.temperature
        self.coarse = ExactLevel(config)
        self.fine = nn.ModuleList(_fine_levels(len(widths) - 1, config))
        self.depth = len(widths)  # levels that are matched; a finer one has its coarser one's matches, enlarged

    def forward(self, features_x: list[Tensor], features_y: list[Tensor], exemplar: Tensor) -> list[Level]:
        """Eq. 3. features_x, features_y: L maps each, coarse to fine; exemplar B,3,H,W at full resolution.

        H, W are multiples of 2^(L-1). What the exemplar has beyond its features (padding) is never looked at.
        """
        levels: list[Level] = []
        for index, (project, x, y) in enumerate(zip(self.projections, features_x, features_y)):
            if index >= self.depth:
                levels.append(_enlarged(levels[-1], x.shape[-2:]))
                continue
            x, y = project(x), project(y)
            picture = cut(downsample(exemplar, 2 ** (len(self.projections) - 1 - index)), y.shape[-2:])
            if index == 0 or self.exact_everywhere:
                levels.append(self.coarse(x, y, picture))
            else:
                levels.append(self.fine[index - 1](levels[-1].matches, x, y, picture))
        return levels

    def project(self, features: list[Tensor]) -> list[Tensor]:
        """What every level compares of one side's features: L maps B,channels,h,w float32, unit length."""
        return [project(x) for project, x in zip(self.projections, features, strict=True)]


def _enlarged(level: Level, size: torch.Size) -> Level:
    """A level as a finer one of h,w = `size` would have it without a search of its own."""
    positions = upsample_positions(level.matches.positions.detach(), *size)
    scores = F.interpolate(level.matches.scores, size=size, mode="nearest")
    warp = F.interpolate(level.warps[-1], size=size, mode="bilinear", align_corners=False)
    return Level(Matches(positions, scores), [warp])


def _fine_levels(count: int, config: MatchingConfig) -> list[PatchMatchLevel]:
    def refinement() -> Refinement | None:
        return None if config.refinement == "none" else Refinement(config)

    shared = refinement() if config.share_levels else None
    return [PatchMatchLevel(config, shared if config.share_levels else refinement()) for _ in range(count)]
