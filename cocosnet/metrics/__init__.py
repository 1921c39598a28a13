"""Metrics: a name is a protocol (docs/metrics.md).

    from cocosnet.metrics import evaluate, records_from_folders
    evaluate(records_from_folders("out", "photos"), ["swd", "psnr"])

Importing this package does not import PyTorch, so that names can be listed quickly.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Evaluation", "Metric", "evaluate", "get_metric", "metric_names", "records_from", "records_from_folders"]

_HOMES = {
    "Evaluation": "cocosnet.metrics.evaluation",
    "Metric": "cocosnet.metrics.base",
    "evaluate": "cocosnet.metrics.evaluation",
    "records_from": "cocosnet.metrics.evaluation",
    "records_from_folders": "cocosnet.metrics.evaluation",
    "get_metric": "cocosnet.metrics.registry",
    "metric_names": "cocosnet.metrics.registry",
}


def __getattr__(name: str) -> Any:
    """Import a public name's home when it is first used."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'cocosnet.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
