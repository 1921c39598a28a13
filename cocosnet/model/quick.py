"""The door to what numba compiles for CPUs: when it may be taken, and what there is where numba is not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

LANES = 16  # numbers that compiled code works on at once, see `lanes.py`


def is_plain(*tensors: Tensor) -> bool:
    """Whether compiled code that knows no gradient may work on these: `is_compilable`, and none is recorded."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not recorded and is_compilable(*tensors)


def is_compilable(*tensors: Tensor) -> bool:
    """Whether compiled code may work on these: on a CPU, and no graph is traced.

    Where PyTorch 2.6 traces a layer it does not say so; but then its tensors are of a type of their own.
    """
    real = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
    return real and not torch.compiler.is_compiling()


@functools.cache
def compiled_module(name: str) -> tuple[ModuleType | None, str]:
    """`cocosnet.model.NAME`, which numba compiles; or None, and why it does not load."""
    try:
        return importlib.import_module(f"cocosnet.model.{name}"), ""
    except (ImportError, RuntimeError, ValueError) as error:  # absent, too old for this NumPy, or ill set up
        return None, str(error)
