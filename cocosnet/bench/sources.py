"""What pairs are matched by: fixed features, or those (and the refinement) of a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cocosnet.bench.features import FIXED, Pyramid, fixed_features, reduced_pair
from cocosnet.checkpoint import load_model
from cocosnet.config import MatchingConfig
from cocosnet.data.conditions import condition_to_tensor
from cocosnet.data.extractors import condition_extractor
from cocosnet.data.images import to_image
from cocosnet.errors import ConfigError
from cocosnet.model.cocosnet import CoCosNet
from cocosnet.model.hierarchy import ExactLevel, PatchMatchLevel


@dataclass
class Source:
    """Unit vectors of a pair, B,C,h,w float32 a level, coarse to fine, and the levels that match them.

    pyramids: (query, exemplar), each B,3,H,W in [-1, 1], to two lists of maps.
    levels: an `ExactLevel`, then `PatchMatchLevel`s; with `backend: exact` the first kind alone.
    """

    config: MatchingConfig
    pyramids: Callable[[Tensor, Tensor], list[Pyramid]]
    levels: list[nn.Module]


def open_source(features: str, config: MatchingConfig, depth: int | None, device: torch.device) -> Source:
    """Features by name (`colour`, `vgg16`), or a checkpoint (a file or a shipped name), over `depth` levels.

    A checkpoint brings its own matching config, of which only backend and iterations give way to `config`'s, and its
    own number of levels, of which the `depth` finest are used (None: all).

    Raises:
        ConfigError: more levels than there are, another K than the checkpoint's refinement was made for, or a model
            of label maps, which are not found in photographs.
        MissingWeights, CheckpointError, MissingDependency: as the loaders say.
    """
    if features in FIXED:
        depth = depth or 4
        config = dataclasses.replace(config, refinement="none")
        raw = fixed_features(features, depth, device)
        refinements = [None] * (depth - 1)
        pyramids = lambda query, exemplar: reduced_pair(raw, query, exemplar, config.channels)  # noqa: E731
        return Source(config, pyramids, _levels(config, refinements, device))
    return _trained(load_model(features, str(device)), config, depth, device)


def _trained(model: CoCosNet, config: MatchingConfig, depth: int | None, device: torch.device) -> Source:
    own, available = model.config.model.matching, len(model.hierarchy.projections)
    depth = depth or available
    if depth > available:
        raise ConfigError(f"this checkpoint has {available} levels, {depth} were asked for; start at a finer level")
    config = dataclasses.replace(own, backend=config.backend, iterations=config.iterations)
    skipped = available - depth
    extractor = condition_extractor(model.config.data, device)

    def pyramids(query: Tensor, exemplar: Tensor) -> list[Pyramid]:
        conditions = [condition_to_tensor(extractor(to_image(q)), model.config.data) for q in query]
        found = (model.encode_condition(torch.stack(conditions).to(query)), model.encode_image(exemplar))
        project = model.hierarchy.projections
        return [[p(f) for p, f in zip(project, maps)][skipped:] for maps in found]

    refinements = [level.refinement for level in model.hierarchy.fine[skipped:]]
    return Source(config, pyramids, _levels(config, refinements, device))


def _levels(config: MatchingConfig, refinements: list[nn.Module | None], device: torch.device) -> list[nn.Module]:
    if config.backend == "exact":
        levels: list[nn.Module] = [ExactLevel(config) for _ in range(len(refinements) + 1)]
    else:
        levels = [ExactLevel(config), *(PatchMatchLevel(config, refinement) for refinement in refinements)]
    return [level.to(device).eval() for level in levels]
