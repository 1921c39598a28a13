"""Networks that turn a photograph into a condition, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.data.images import resize_shorter
from cocosnet.errors import ConfigError
from cocosnet.weights import find_weights, has_weights, packed_file

NAMES = ("auto", "hed", "hed-small", "image")
WORK_SIDE = 256  # px; edges of smaller pictures are found at this shorter side: below it HED sees faces as blobs


@dataclass(frozen=True)
class Extractor:
    """An edge extractor: call it with a picture."""

    name: str
    network: Callable[[Image.Image], torch.Tensor]  # RGB picture -> edges H,W float32 in [0,1]
    provenance: dict[str, Any] = field(default_factory=dict)  # what goes into records: network, sha256, parameters

    def __call__(self, image: Image.Image, size: int | None = None) -> Image.Image:
        """Edges of an RGB picture as mode L, white on black, of the picture's proportions.

        Args:
            size: shorter side of the answer in px, by default the picture's own. The network sees the picture with a
                shorter side of max(size, WORK_SIDE), so give the big picture rather than one already reduced.
        """
        wanted = image.size if size is None else resize_shorter(image, size).size
        seen = resize_shorter(image, max(min(wanted), WORK_SIDE))
        edges = Image.fromarray((self.network(seen) * 255).round().byte().numpy())
        return edges if edges.size == wanted else edges.resize(wanted, Image.Resampling.BILINEAR)


def resolve_name(name: str) -> str:
    """`auto` as the extractor that it stands for here: hed where its weights are on this machine, else hed-small.

    Raises:
        ConfigError: no extractor of that name.
    """
    if name not in NAMES:
        raise ConfigError(f"no edge extractor is called {name!r}; it is one of {', '.join(NAMES)}")
    if name == "auto":
        return "hed" if has_weights("hed") else "hed-small"
    return name


def get_extractor(name: str = "auto", device: str | torch.device = "cpu") -> Extractor:
    """The edge extractor `name`: hed, hed-small, auto, or image (grey values taken as edges).

    Raises:
        ConfigError: no such extractor.
        MissingWeights: hed's weights are not on this machine and may not or cannot be fetched.
        CheckpointError: the weights are damaged.
    """
    return {"hed": _hed, "hed-small": _hed_small, "image": _image}[resolve_name(name)](torch.device(device))


def _hed(device: torch.device) -> Extractor:
    from cocosnet.data.extractors.hed import BORDER, hed_edges, load_hed

    path = find_weights("hed")
    network = load_hed(path).to(device)
    return Extractor(
        "hed",
        lambda image: hed_edges(network, image),
        {"network": "hed", "sha256": _sha256(path), "work_side": WORK_SIDE, "border": BORDER},
    )


def _hed_small(device: torch.device) -> Extractor:
    from cocosnet.data.extractors.hed_small import FILENAME, hed_small_edges, load_hed_small

    path = packed_file(FILENAME)
    network = load_hed_small(path).to(device)
    return Extractor(
        "hed-small",
        lambda image: hed_small_edges(network, image),
        {"network": "hed-small", "sha256": _sha256(path), "work_side": WORK_SIDE},
    )


def _image(device: torch.device) -> Extractor:
    def edges(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("L"))).float() / 255

    return Extractor("image", edges, {"network": "image"})


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
