"""Feature vectors for retrieval: the last pooled map of a VGG, averaged over its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.data.extractors import in_batches, when_needed
from cocosnet.data.images import to_tensor
from cocosnet.losses.perceptual import SHAPES, load_perceptual
from cocosnet.weights import find_weights, sha256_of

SIDE = 224  # px; pictures are squeezed to this square, the size at which VGG was trained


@dataclass(frozen=True)
class FeatureExtractor:
    """A picture's place in a network's feature space: call it with a picture."""

    name: str
    network: Callable[[Sequence[Image.Image]], np.ndarray]  # RGB, of one size -> B,C float32
    provenance: dict[str, Any] = field(default_factory=dict)
    task = "features"

    def __call__(self, image: Image.Image, size: int | None = None) -> np.ndarray:
        """A float32 vector of length 1: the dot product of two is their cosine."""
        return self.many([image], size, 1)[0]

    def many(self, images: Sequence[Image.Image], size: int | None, batch: int) -> list[np.ndarray]:
        """The vectors of several pictures, `batch` of which go through the network at once."""
        squares = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
        return [_unit(vector) for vector in in_batches(self.network, squares, batch)]


def _unit(vector: np.ndarray) -> np.ndarray:
    vector = vector.astype(np.float64)
    return (vector / max(np.linalg.norm(vector), 1e-12)).astype(np.float32)


def vgg19(device: torch.device) -> FeatureExtractor:
    """torchvision's VGG-19. Raises MissingWeights and CheckpointError as `load_perceptual` does."""
    return _vgg("vgg19", device)


def vgg16_caffe(device: torch.device) -> FeatureExtractor:
    """Caffe's VGG-16. Raises MissingWeights and CheckpointError as `load_perceptual` does."""
    return _vgg("vgg16-caffe", device)


def _vgg(name: str, device: torch.device) -> FeatureExtractor:
    path, layer = find_weights(name), f"relu5_{SHAPES[name].counts[-1]}"

    def load() -> Callable:
        network = load_perceptual(name, device)

        def features(images: Sequence[Image.Image]) -> np.ndarray:
            batch = torch.stack([to_tensor(image) for image in images]).to(device)
            with torch.inference_mode():
                maps = network(batch, [layer])[layer]
                return torch.nn.functional.max_pool2d(maps, 2).mean(dim=(2, 3)).cpu().numpy()

        return features

    provenance = {"network": name, "sha256": sha256_of(path), "layer": f"{layer}, pooled", "side": SIDE}
    return FeatureExtractor(name, when_needed(load), provenance)
