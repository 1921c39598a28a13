"""Feature vectors for retrieval: the last pooled map of a VGG, averaged over its positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.data.images import to_tensor
from cocosnet.losses.perceptual import SHAPES, load_perceptual
from cocosnet.weights import find_weights

SIDE = 224  # px; pictures are squeezed to this square, the size at which VGG was trained


@dataclass(frozen=True)
class FeatureExtractor:
    """A picture's place in a network's feature space: call it with a picture."""

    name: str
    network: Callable[[Image.Image], np.ndarray]
    provenance: dict[str, Any] = field(default_factory=dict)
    task = "features"

    def __call__(self, image: Image.Image, size: int | None = None) -> np.ndarray:
        """A float32 vector of length 1: the dot product of two is their cosine."""
        vector = self.network(image).astype(np.float64)
        return (vector / max(np.linalg.norm(vector), 1e-12)).astype(np.float32)


def vgg19(device: torch.device) -> FeatureExtractor:
    """torchvision's VGG-19. Raises MissingWeights and CheckpointError as `load_perceptual` does."""
    return _vgg("vgg19", device)


def vgg16_caffe(device: torch.device) -> FeatureExtractor:
    """Caffe's VGG-16. Raises MissingWeights and CheckpointError as `load_perceptual` does."""
    return _vgg("vgg16-caffe", device)


def _vgg(name: str, device: torch.device) -> FeatureExtractor:
    from cocosnet.data.extractors import sha256_of

    network = load_perceptual(name, device)
    layer = f"relu5_{SHAPES[name].counts[-1]}"

    def features(image: Image.Image) -> np.ndarray:
        square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        with torch.inference_mode():
            maps = network(to_tensor(square)[None].to(device), [layer])[layer]
            return torch.nn.functional.max_pool2d(maps, 2).mean(dim=(2, 3))[0].cpu().numpy()

    provenance = {"network": name, "sha256": sha256_of(find_weights(name)), "layer": f"{layer}, pooled", "side": SIDE}
    return FeatureExtractor(name, features, provenance)
