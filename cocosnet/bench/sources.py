"""What pairs are matched by: fixed features, or those (and the refinement) of a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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
from cocosnet.precision import precision_of


@dataclass
class Source:
    """Unit vectors of a pair, B,C,h,w float32 a level, coarse to fine, and the levels that match them.

    pyramids: (query, exemplar), each B,3,H,W in [-1, 1], to two lists of maps.
    levels: an `ExactLevel`, then `PatchMatchLevel`s; with `backend: exact` the first kind alone.
    """

    config: MatchingConfig
    pyramids: Callable[[Tensor, Tensor], list[Pyramid]]
    levels: list[nn.Module]
    precision: torch.dtype = torch.float32  # of convolutions, as `translate` computes them


def open_source(
    features: str,
    config: MatchingConfig,
    depth: int | None,
    device: torch.device,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> Source:
    """Features by name (`colour`, `vgg16`), or a checkpoint (a file or a shipped name), over `depth` levels.

    config is for fixed features alone: a checkpoint brings its own, and its own number of levels, of which the `depth`
    finest are used (None: all). asked: values of `MatchingConfig` by name that either gives way to.

    Raises:
        ConfigError: more levels than there are, another K than the checkpoint's refinement was made for, a model
            of label maps, which are not found in photographs, or none that is a CoCosNet v2 and matches every level.
        MissingWeights, CheckpointError, MissingDependency: as the loaders say.
    """
    if features in FIXED:
        depth = depth or 4
        config = dataclasses.replace(config, **{**asked, "refinement": "none"})
        raw = fixed_features(features, depth, device)
        refinements = [None] * (depth - 1)
        pyramids = lambda query, exemplar: reduced_pair(raw, query, exemplar, config.channels)  # noqa: E731
        return Source(config, pyramids, _levels(config, refinements, device))
    model = load_model(features, str(device))
    _check_measurable(features, model, asked)
    return _trained(model, asked, depth, device)


def _check_measurable(name: str, model: nn.Module, asked: Mapping[str, Any]) -> None:
    """Whether the bench can take the model's matcher apart."""
    shape = model.config.model
    if shape.kind != "cocosnet-v2" or shape.matching.compat != "none":
        kind = shape.kind if shape.matching.compat == "none" else f"model of compat: {shape.matching.compat}"
        raise ConfigError(f"{name} is a {kind}: bench matching measures CoCosNet v2 models of our own")
    if shape.matching.levels not in (0, shape.encoder.levels):
        raise ConfigError(f"{name} matches {shape.matching.levels} of its {shape.encoder.levels} levels, not all")
    if asked.get("candidates", shape.matching.candidates) != shape.matching.candidates:
        raise ConfigError(
            f"the refinement of {name} is made for {shape.matching.candidates} candidates; ask for no others"
        )


def _trained(model: CoCosNet, asked: Mapping[str, Any], depth: int | None, device: torch.device) -> Source:
    own, available = model.config.model.matching, len(model.hierarchy.projections)
    depth = depth or available
    if depth > available:
        raise ConfigError(f"this checkpoint has {available} levels, {depth} were asked for; start at a finer level")
    config, skipped = dataclasses.replace(own, **asked), available - depth
    extractor = condition_extractor(model.config.data, device)

    def condition(pictures: Tensor) -> Tensor:
        found = [condition_to_tensor(extractor(to_image(picture)), model.config.data) for picture in pictures]
        return torch.stack(found).to(pictures)

    def pyramids(query: Tensor, exemplar: Tensor) -> list[Pyramid]:
        other = condition(exemplar) if model.config.model.encoder.exemplar_condition else None
        found = (model.encode_condition(condition(query)), model.encode_image(exemplar, other))
        project = model.hierarchy.projections
        return [[p(f) for p, f in zip(project, maps)][skipped:] for maps in found]

    refinements = [level.refinement for level in model.hierarchy.fine[skipped:]]
    return Source(config, pyramids, _levels(config, refinements, device), precision_of(model.config, device))


def _levels(config: MatchingConfig, refinements: list[nn.Module | None], device: torch.device) -> list[nn.Module]:
    if config.backend == "exact":
        levels: list[nn.Module] = [ExactLevel(config) for _ in range(len(refinements) + 1)]
    else:
        levels = [ExactLevel(config), *(PatchMatchLevel(config, refinement) for refinement in refinements)]
    return [level.to(device).eval() for level in levels]
