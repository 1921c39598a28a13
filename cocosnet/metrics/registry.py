"""Names of metrics: the built-in ones and those of installed packages (entry points, group "cocosctl.metrics").

Both go the same way: a name leads to "module:attribute", which is imported when the metric is asked for, called as
`attribute(device=..., seed=...)` and returns a `cocosnet.metrics.base.Metric`. `name:network` asks for another network
than the metric's own, e.g. `semantic:vgg19`; the attribute is then called with `network=...` as well.
"""

from __future__ import annotations

import difflib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from cocosnet.errors import CocosError, ConfigError, MissingDependency

if TYPE_CHECKING:
    from cocosnet.metrics.base import Metric

GROUP = "cocosctl.metrics"
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
    return sorted(_doors())


def get_metric(name: str, *, device: str = "cpu", seed: int = 0) -> Metric:
    """A fresh metric.

    Raises:
        ConfigError: no metric has this name, or it has no such network.
        MissingWeights, MissingDependency: what the metric needs is not here, or a plug-in cannot be imported.
    """
    doors = _doors()
    name, colon, network = name.partition(":")
    if name not in doors:
        close = difflib.get_close_matches(name, doors, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no metric is called {name!r}{guess}; the metrics are {', '.join(sorted(doors))}")
    try:
        kind = doors[name].load()
    except CocosError:
        raise
    except Exception as error:  # a plug-in's import may fail in any way; ours do not
        raise MissingDependency(
            f"metric {name!r}: cannot import {doors[name].value} ({error}); mend or remove the package that offers it"
        ) from error
    if not colon:
        return kind(device=device, seed=seed)
    if "network" not in inspect.signature(kind).parameters:
        raise ConfigError(f"the metric {name} has no choice of networks; write {name} instead of {name}:{network}")
    return kind(device=device, seed=seed, network=network)


def _doors() -> dict[str, EntryPoint]:
    """Entry points by name; a built-in name cannot be taken over by another package."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    return found | {name: EntryPoint(name, target, GROUP) for name, target in BUILT_IN.items()}
