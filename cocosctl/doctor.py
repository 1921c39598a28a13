"""`cocosctl doctor`: what this machine has and what is missing."""

from __future__ import annotations

import importlib
import math
import os
import platform
import re
import shutil
import time
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from cocosctl import options
from cocosctl.output import Output
from cocosnet import __version__
from cocosnet.errors import CheckpointError

BROKEN = "does not load"
OPTIONAL = re.compile(r"""([\w.-]+).*extra == "(\w+)"\)?""")  # a requirement of an extra: package and extra


def doctor(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Report Python, PyTorch, devices, the speed of bf16, optional packages, weights and free disk space.

    One `name value` a line. What is broken is said in its line.
    """
    out = Output(as_json, quiet)
    report: dict[str, Any] = {
        "cocosctl": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **_torch_facts(),
        **_package_facts(),
        **_weight_facts(),
    }
    report["disk_free_gb"] = round(shutil.disk_usage(os.getcwd()).free / 1e9, 1)
    out.result(report)


def _torch_facts() -> dict[str, Any]:
    """Versions and devices, and how much quicker bf16 is on the device that `auto` means."""
    facts = {name: _loaded_version(name) for name in ("torch", "torchvision")}
    if facts["torch"].startswith(BROKEN):
        return facts
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts |= {
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    if device == "cuda":
        facts["cuda_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return facts | {"bf16_speedup": _bf16_speedup(device)}


def _loaded_version(name: str) -> str:
    """The version of a package that loads, else why it does not: a torchvision made for another PyTorch is common."""
    try:
        return importlib.import_module(name).__version__
    except Exception as error:  # a broken package raises anything
        return f"{BROKEN} ({' '.join(str(error).split())}); install torch and torchvision from one index in one command"


def _package_facts() -> dict[str, str]:
    """The version of each optional package, or the extra that brings it; nothing where cocosctl is not installed."""
    try:
        needed = [OPTIONAL.fullmatch(text) for text in requires("cocosctl") or ()]
    except PackageNotFoundError:
        return {}
    return {f"package.{found[1]}": _installed(*found.groups()) for found in needed if found and found[2] != "dev"}


def _installed(package: str, extra: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"absent; pip install 'cocosctl[{extra}]'"


def _bf16_speedup(device: str) -> float:
    """How many times quicker bf16 is than fp32 at a 3x3 convolution of 64 channels on 256x256, channels last."""
    import torch

    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(device, memory_format=torch.channels_last)
    inputs = torch.zeros(1, 64, 256, 256, device=device).to(memory_format=torch.channels_last)
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    with torch.inference_mode():
        for dtype in [*best] * 3:  # in turn, so that other load on the machine meets both
            start = time.perf_counter()
            layer.to(dtype)(inputs.to(dtype)).sum().item()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return round(best[torch.float32] / best[torch.bfloat16], 2)


def _weight_facts() -> dict[str, Any]:
    """Whether each file of weights is here, and as it should be."""
    from cocosnet import weights

    shipped = {path.stem: "shipped" for path in sorted(weights.ASSET_FOLDER.glob("*.safetensors"))}
    external = {name: _weight_state(name) for name in weights.REGISTRY}
    return {f"weights.{name}": state for name, state in (shipped | external).items()}


def _weight_state(name: str) -> str:
    from cocosnet import weights

    if not weights.has_weights(name):
        return "absent"
    try:
        weights.find_weights(name)
    except (CheckpointError, OSError) as error:
        return f"damaged ({error})"
    return "found"
