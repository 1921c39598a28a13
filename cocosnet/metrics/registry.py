"""Names of metrics: the built-in ones and those of installed packages (entry points, group "cocosctl.metrics").

Both go the same way: a name leads to "module:attribute", which is imported when the metric is asked for. The attribute
is called as `attribute(device=..., seed=...)` and returns a `cocosnet.metrics.base.Metric`.
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from cocosnet.errors import CocosError, ConfigError, MissingDependency

if TYPE_CHECKING:
    from cocosnet.metrics.base import Metric

GROUP = "cocosctl.metrics"
BUILT_IN = {
    "fid": "cocosnet.metrics.fid:FID",
    "l1": "cocosnet.metrics.pixels:L1",
    "psnr": "cocosnet.metrics.pixels:PSNR",
    "ssim": "cocosnet.metrics.pixels:SSIM",
    "swd": "cocosnet.metrics.swd:SWD",
}


def metric_names() -> list[str]:
    """Names that `get_metric` knows, sorted; imports none of them."""
    return sorted(_doors())


def get_metric(name: str, *, device: str = "cpu", seed: int = 0) -> Metric:
    """A fresh metric.

    Raises:
        ConfigError: no metric has this name.
        MissingWeights, MissingDependency: what the metric needs is not here, or a plug-in cannot be imported.
    """
    doors = _doors()
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
    return kind(device=device, seed=seed)


def _doors() -> dict[str, EntryPoint]:
    """Entry points by name; a built-in name cannot be taken over by another package."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    return found | {name: EntryPoint(name, target, GROUP) for name, target in BUILT_IN.items()}
