"""Edge extractors: HED, its small imitation, Canny's detector, and grey pictures taken as edges."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from cocosnet.data.extractors import WORK_SIDE, EdgeExtractor, require, sha256_of
from cocosnet.weights import find_weights, packed_file

CANNY_SIGMA = 1.5  # px at the size at which edges are looked for


def hed(device: torch.device) -> EdgeExtractor:
    """HED with its BSDS500 weights. Raises MissingWeights and CheckpointError as `find_weights` and `load_hed` do."""
    from cocosnet.data.extractors.hed import BORDER, hed_edges, load_hed
    from cocosnet.train.networks import pick_precision

    path = find_weights("hed")
    network = load_hed(path).to(device, memory_format=torch.channels_last)
    precision = pick_precision("auto", device)  # bf16 halves the time and moves an edge by 0.001 on average

    def edges(image: Image.Image) -> torch.Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return hed_edges(network, image)

    made_by = {"network": "hed", "sha256": sha256_of(path), "work_side": WORK_SIDE, "border": BORDER}
    return EdgeExtractor("hed", edges, made_by | {"precision": str(precision).removeprefix("torch.")})


def hed_small(device: torch.device) -> EdgeExtractor:
    """The shipped imitation of HED."""
    from cocosnet.data.extractors.hed_small import FILENAME, hed_small_edges, load_hed_small

    path = packed_file(FILENAME)
    network = load_hed_small(path).to(device)
    return EdgeExtractor(
        "hed-small",
        lambda image: hed_small_edges(network, image),
        {"network": "hed-small", "sha256": sha256_of(path), "work_side": WORK_SIDE},
    )


def canny(device: torch.device) -> EdgeExtractor:
    """Canny's detector by scikit-image, thresholds at 10 and 20 % of the range. Raises MissingDependency."""
    require("skimage.feature", "cocosctl[canny]")
    from skimage.feature import canny as find

    def edges(image: Image.Image) -> torch.Tensor:
        grey = np.asarray(image.convert("L")).astype(np.float32) / 255
        return torch.from_numpy(find(grey, sigma=CANNY_SIGMA).astype(np.float32))

    return EdgeExtractor("canny", edges, {"network": "canny", "sigma": CANNY_SIGMA, "work_side": WORK_SIDE})


def image(device: torch.device) -> EdgeExtractor:
    """The picture's own grey values, for ready-made edges."""

    def edges(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture.convert("L"))).float() / 255

    return EdgeExtractor("image", edges, {"network": "image"})
