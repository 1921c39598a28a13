"""`cocosctl doctor`: what this machine has and what is missing."""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from typing import Any

from cocosctl import options
from cocosctl.output import Output
from cocosnet import __version__


def doctor(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Report Python, PyTorch, devices, the speed of bf16, weights and free disk space, one `name value` a line."""
    out = Output(as_json, quiet)
    report: dict[str, Any] = {
        "cocosctl": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **_torch_facts(),
        **_weight_facts(),
    }
    report["disk_free_gb"] = round(shutil.disk_usage(os.getcwd()).free / 1e9, 1)
    out.result(report)


def _torch_facts() -> dict[str, Any]:
    """Versions and devices, and how much quicker bf16 is on the device that `auto` means."""
    import torch
    import torchvision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    if device == "cuda":
        facts["cuda_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return facts | {"bf16_speedup": _bf16_speedup(device)}


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
    """Whether each file of weights is here."""
    from cocosnet import weights

    shipped = {path.stem: "shipped" for path in sorted(weights.ASSET_FOLDER.glob("*.safetensors"))}
    external = {name: "found" if weights.has_weights(name) else "absent" for name in weights.REGISTRY}
    return {f"weights.{name}": state for name, state in (shipped | external).items()}
