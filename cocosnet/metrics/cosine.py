"""Semantic consistency and style relevance (Section 4.1): cosine similarity of VGG features.

The paper's text says no more than "cosine similarity between high-level features" and "with low-level features". Two
readings have names of their own: the plain ones compare whole pictures, the `_region` ones follow CoCosNet's (v1) own
evaluation, which compares what has the same label.

    semantic       output against target: cosine at every position, mean over the positions
    style_color    output against exemplar: cosine of the mean features (what lies where does not matter), relu1_2
    style_texture  the same at relu2_2
    *_region       pictures and labels at 256x256, maps enlarged to that (nearest); a region's feature is the mean over
                   its pixels, the cosines of a pair are averaged by the regions' areas

A score is a mean over layers; the value is the mean over pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.errors import ConfigError, DataError
from cocosnet.losses.perceptual import SHAPES
from cocosnet.metrics.base import Metric
from cocosnet.metrics.features import vgg_features
from cocosnet.metrics.pixels import mean

NETWORK = "vgg16-caffe"  # the default; `semantic:vgg19` asks for the other
SIDE = 256  # px, size of the evaluation by region
MANY = 160  # labels in one map: ADE20K has 151 in all; an edge map's greys are about 250
SEMANTIC = ("relu3_2", "relu4_2", "relu5_2")


class VggCosine(Metric):
    """What all of them share: one number a pair and layer, mean over layers, mean over pairs."""

    layers: tuple[str, ...] = SEMANTIC
    text: str  # the protocol without name and network
    same_size = False
    smallest = 16  # px, where relu5_2 still has a pixel

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0, network: str = NETWORK) -> None:
        super().__init__(device, seed)
        if network not in SHAPES:
            raise ConfigError(f"{self.name}: no network is called {network!r}; known are {', '.join(SHAPES)}")
        self.weights = (network,)
        self.protocol = f"{self.name}: {self.text}; {network}, mean of {', '.join(self.layers)}; mean over pairs"
        self._features = vgg_features(network, self.device, self.layers)
        self._values: list[list[float]] = []  # a pair's numbers by layer
        self._without = 0  # pairs that have no number

    @torch.inference_mode()
    def _add(self, *pictures: Tensor) -> list[float | None]:
        by_layer_LB = torch.stack(self._per_layer(*pictures)).double()
        scores = []
        for values in by_layer_LB.T.tolist():
            known = values[0] == values[0]
            scores.append(mean(values) if known else None)
            self._values.extend([values] if known else [])
            self._without += not known
        return scores

    @abstractmethod
    def _per_layer(self, *pictures: Tensor) -> list[Tensor]:
        """One number a pair, B, for each of `layers`; NaN for a pair that has none."""

    def state(self) -> tuple[list[list[float]], int]:
        """The numbers so far, and how many pairs had none."""
        return self._values, self._without

    def absorb(self, state: tuple[list[list[float]], int]) -> None:
        """Add another process's numbers."""
        self._values.extend(state[0])
        self._without += state[1]

    def _result(self) -> dict[str, Any]:
        if not self._values:
            return {"value": None, "note": "no pair has a region to compare"}
        means = [mean(list(values)) for values in zip(*self._values)]
        result = {"value": mean(means), "layers": dict(zip(self.layers, means))}
        return {**result, "without_region": self._without} if self._without else result


class Semantic(VggCosine):
    """Semantic consistency of the output with the target, position by position; 1 for equal pictures."""

    name = "semantic"
    text = "output against target, cosine over channels at every position, mean over positions"
    same_size = True

    def _per_layer(self, output: Tensor, target: Tensor) -> list[Tensor]:
        first, second = self._features(output), self._features(target)
        return [F.cosine_similarity(first[name], second[name], dim=1).mean(dim=(1, 2)) for name in self.layers]


class Style(VggCosine):
    """Style relevance of the output to the exemplar: cosine of the features' means over the picture."""

    needs = ("output", "exemplar")
    text = "output against exemplar, cosine of the mean feature vectors of the pictures"

    def _per_layer(self, output: Tensor, exemplar: Tensor) -> list[Tensor]:
        first, second = self._features(output), self._features(exemplar)
        return [
            F.cosine_similarity(first[name].mean(dim=(2, 3)), second[name].mean(dim=(2, 3)), dim=1)
            for name in self.layers
        ]


class StyleColor(Style):
    """Style relevance, color: relu1_2."""

    name, layers = "style_color", ("relu1_2",)


class StyleTexture(Style):
    """Style relevance, texture: relu2_2."""

    name, layers = "style_texture", ("relu2_2",)


class SemanticRegion(VggCosine):
    """Semantic consistency by region: what has one label in the condition is compared with the same pixels' target."""

    name = "semantic_region"
    needs = ("output", "target", "labels")
    side = SIDE
    text = (
        "output against target at 256x256, cosine of the mean features of each label's pixels (nearest), "
        "weighted by the label's area"
    )
    same_size = True
    _most = 0  # labels in one map

    def _per_layer(self, output: Tensor, target: Tensor, labels: Tensor) -> list[Tensor]:
        masks = [_masks(picture) for picture in labels]
        return self._compare(output, target, masks, masks)

    def _compare(self, first: Tensor, second: Tensor, masks: list[Masks], others: list[Masks]) -> list[Tensor]:
        """One number a pair and layer of pictures, each with its own masks of the same labels."""
        self._most = max(self._most, *map(len, masks), *map(len, others))
        left, right = self._features.at(first, SIDE), self._features.at(second, SIDE)
        return [
            torch.stack([_region_cosine(*pair) for pair in zip(left[name], right[name], masks, others)])
            for name in self.layers
        ]

    def state(self) -> tuple[Any, int]:
        """The numbers so far, and the largest number of labels in a map."""
        return super().state(), self._most

    def absorb(self, state: tuple[Any, int]) -> None:
        """Add another process's."""
        super().absorb(state[0])
        self._most = max(self._most, state[1])

    def _result(self) -> dict[str, Any]:
        if self._most <= MANY:
            return super()._result()
        note = (
            f"a map holds {self._most} labels: an edge map's greys are no regions; name maps of class indices (labels)"
        )
        return super()._result() | {"note": note}

    def check(self, *pictures: Tensor) -> None:
        """As `Metric.check`; label maps need the size of their picture."""
        super().check(*pictures)
        for role, picture, labels in zip(self.needs, self._labelled(pictures), pictures[2:]):
            if picture.shape[-2:] != labels.shape[-2:]:
                raise DataError(
                    f"{self.name}: the {role} is {picture.shape[-1]}x{picture.shape[-2]} px and its label map "
                    f"{labels.shape[-1]}x{labels.shape[-2]}; give the label map that belongs to it"
                )

    def _labelled(self, pictures: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return pictures[:1]


class StyleRegion(SemanticRegion):
    """Style relevance by region: labels above 0 that output and exemplar share, weighted by area in the output."""

    needs = ("output", "exemplar", "labels", "exemplar_labels")
    same_size = False
    text = (
        "output against exemplar at 256x256, cosine of the mean features of each label's pixels (nearest) for labels "
        "above 0 that both have, weighted by the label's area in the output"
    )

    def _per_layer(self, output: Tensor, exemplar: Tensor, labels: Tensor, others: Tensor) -> list[Tensor]:
        pairs = [_common(_masks(first), _masks(second)) for first, second in zip(labels, others)]
        return self._compare(output, exemplar, [pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def _labelled(self, pictures: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return pictures[:2]


class StyleColorRegion(StyleRegion):
    """Style relevance by region, color: relu1_2."""

    name, layers = "style_color_region", ("relu1_2",)


class StyleTextureRegion(StyleRegion):
    """Style relevance by region, texture: relu2_2."""

    name, layers = "style_texture_region", ("relu2_2",)


Masks = dict[int, Tensor]  # label -> 256,256 float32 of 0 and 1


def _masks(labels_1HW: Tensor) -> Masks:
    """The pixels of each label that occurs, at 256x256 (nearest)."""
    small = F.interpolate(labels_1HW[None].double(), size=(SIDE, SIDE), mode="nearest-exact")[0, 0].long()
    return {label: (small == label).float() for label in small.unique().tolist()}


def _common(first: Masks, second: Masks) -> tuple[Masks, Masks]:
    """Both without background (0) and without labels that only one has."""
    labels = [label for label in first if label > 0 and label in second]
    return {label: first[label] for label in labels}, {label: second[label] for label in labels}


def _region_cosine(first_Chw: Tensor, second_Chw: Tensor, masks: Masks, others: Masks) -> Tensor:
    """Cosines of the regions' mean features, weighted by area in the first picture; NaN where there is no region.

    A mean over the pixels of an enlarged map is a mean over the map's cells, weighted by how many of a cell's pixels
    are in the region; so nothing has to be enlarged.
    """
    if not masks:
        return first_Chw.new_full((), float("nan"))
    weights, other_weights = (torch.stack([m[label] for label in masks])[:, None] for m in (masks, others))
    means = []
    for features, regions in ((first_Chw, weights), (second_Chw, other_weights)):
        cells_R = F.adaptive_avg_pool2d(regions, features.shape[-2:]).flatten(1)
        means.append(cells_R @ features.flatten(1).T)  # of the direction only, which is all that a cosine sees
    areas = weights.sum(dim=(1, 2, 3))
    return (F.cosine_similarity(*means, dim=1, eps=1e-12) * areas).sum() / areas.sum()
