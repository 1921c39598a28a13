"""Names of metrics: the built-in ones and those of installed packages (entry points, group "cocosctl.metrics").

Both go the same way: a name leads to "module:attribute", which is imported when the metric is asked for, called as
`attribute(device=..., seed=...)` and returns a `cocosnet.metrics.base.Metric`. `name:network` asks for another network
than the metric's own, e.g. `semantic:vgg19`; the attribute is then called with `network=...` as well.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from cocosnet.doors import GROUPS, doors, open_door
from cocosnet.errors import ConfigError

if TYPE_CHECKING:
    from cocosnet.metrics.base import Metric

GROUP = GROUPS["metric"]
BUILT_IN = {
    "diversity": "cocosnet.metrics.perceptual:Diversity",
    "fd_vgg16": "cocosnet.metrics.fid:FDVgg16",
    "fid": "cocosnet.metrics.fid:FID",
    "kid": "cocosnet.metrics.fid:KID",
    "l1": "cocosnet.metrics.pixels:L1",
    "lpips": "cocosnet.metrics.perceptual:LPIPS",
    "psnr": "cocosnet.metrics.pixels:PSNR",
    "semantic": "cocosnet.metrics.cosine:Semantic",
    "semantic_region": "cocosnet.metrics.cosine:SemanticRegion",
    "ssim": "cocosnet.metrics.pixels:SSIM",
    "style_color": "cocosnet.metrics.cosine:StyleColor",
    "style_color_region": "cocosnet.metrics.cosine:StyleColorRegion",
    "style_texture": "cocosnet.metrics.cosine:StyleTexture",
    "style_texture_region": "cocosnet.metrics.cosine:StyleTextureRegion",
    "swd": "cocosnet.metrics.swd:SWD",
    "warp_l1": "cocosnet.metrics.pixels:WarpL1",
    "warp_psnr": "cocosnet.metrics.pixels:WarpPSNR",
    "warp_ssim": "cocosnet.metrics.pixels:WarpSSIM",
}


def metric_names() -> list[str]:
    """Names that `get_metric` knows, sorted; imports none of them."""
    return sorted(doors(GROUP, BUILT_IN))


def get_metric(name: str, *, device: str = "cpu", seed: int = 0) -> Metric:
    """A fresh metric, whose arithmetic is done on `device`: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: no metric has this name, or it has no such network.
        MissingWeights, MissingDependency: what the metric needs is not here, or a plug-in cannot be imported.
    """
    from cocosnet.checkpoint import resolve_device  # listing the names loads no PyTorch

    name, colon, network = name.partition(":")
    kind = open_door(name, "metric", doors(GROUP, BUILT_IN))
    device = str(resolve_device(device))
    if not colon:
        return kind(device=device, seed=seed)
    if "network" not in inspect.signature(kind).parameters:
        raise ConfigError(f"the metric {name} has no choice of networks; write {name} instead of {name}:{network}")
    return kind(device=device, seed=seed, network=network)
