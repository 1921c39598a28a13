"""CoCosNet v2: full-resolution correspondence learning for image translation.

    model = cocosnet.load_model("demo")
    out = model(condition, exemplar)

`cocosnet.model.cocosnet` is the place to start reading. Importing this package does not import PyTorch.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["CoCosNet", "Config", "build_model", "load_config", "load_model"]

_HOMES = {
    "CoCosNet": "cocosnet.model.cocosnet",
    "Config": "cocosnet.config",
    "build_model": "cocosnet.model.build",
    "load_config": "cocosnet.config",
    "load_model": "cocosnet.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name's home when it is first used."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'cocosnet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
