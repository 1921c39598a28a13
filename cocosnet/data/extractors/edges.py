"""Edge extractors: HED, its small imitation, Canny's detector, and grey pictures taken as edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from cocosnet.data.extractors import WORK_SIDE, EdgeExtractor, when_needed
from cocosnet.data.extractors.packages import require
from cocosnet.precision import pick_precision
from cocosnet.weights import find_weights, packed_file, sha256_of

CANNY_SIGMA = 1.5  # px at the size at which edges are looked for


def hed(device: torch.device) -> EdgeExtractor:
    """HED with its BSDS500 weights. Raises MissingWeights and CheckpointError as `find_weights` and `load_hed` do."""
    from cocosnet.data.extractors.hed import BORDER, hed_edges, load_hed

    path = find_weights("hed")
    precision = pick_precision("auto", device)  # bf16 halves the time and moves an edge by 0.001 on average

    def load() -> Callable:
        network = load_hed(path).to(device, memory_format=torch.channels_last)

        def edges(images: Sequence[Image.Image]) -> torch.Tensor:
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                return hed_edges(network, images)

        return edges

    made_by = {"network": "hed", "sha256": sha256_of(path), "work_side": WORK_SIDE, "border": BORDER}
    return EdgeExtractor("hed", when_needed(load), made_by | {"precision": str(precision).removeprefix("torch.")})


def hed_small(device: torch.device) -> EdgeExtractor:
    """The shipped imitation of HED."""
    from cocosnet.data.extractors.hed_small import FILENAME, hed_small_edges, load_hed_small

    path = packed_file(FILENAME)

    def load() -> Callable:
        # channels last: the same edges in 2/3 of the time
        network = load_hed_small(path).to(device, memory_format=torch.channels_last)
        return lambda images: hed_small_edges(network, images)

    made_by = {"network": "hed-small", "sha256": sha256_of(path), "work_side": WORK_SIDE}
    return EdgeExtractor("hed-small", when_needed(load), made_by)


def canny(device: torch.device) -> EdgeExtractor:
    """Canny's detector by scikit-image, thresholds at 10 and 20 % of the range. Raises MissingDependency."""
    require("skimage.feature", "cocosctl[canny]")
    from skimage.feature import canny as find

    def edges(image: Image.Image) -> torch.Tensor:
        grey = np.asarray(image.convert("L")).astype(np.float32) / 255
        return torch.from_numpy(find(grey, sigma=CANNY_SIGMA).astype(np.float32))

    made_by = {"network": "canny", "sigma": CANNY_SIGMA, "work_side": WORK_SIDE}
    return EdgeExtractor("canny", lambda images: [edges(image) for image in images], made_by)


def image(device: torch.device) -> EdgeExtractor:
    """The picture's own grey values, for ready-made edges."""

    def edges(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture.convert("L"))).float() / 255

    return EdgeExtractor("image", lambda images: [edges(image) for image in images], {"network": "image"}, least=1)
