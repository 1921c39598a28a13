"""In which type, and in which layout, a model computes."""

from __future__ import annotations

import contextlib

import torch

from cocosnet.config import Config


def precision_of(config: Config, device: torch.device) -> torch.dtype:
    """The type that a model of this config was trained in (`train.precision`); the release's arithmetic is float32."""
    return pick_precision(config.train.precision if config.model.matching.compat == "none" else "fp32", device)


def layout_of(config: Config) -> torch.memory_format:
    """Channels last, which convolutions are quickest in; but the release's sums run in the plain layout's order."""
    return torch.channels_last if config.model.matching.compat == "none" else torch.contiguous_format


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto`, `fp32` or `bf16` as a type: auto is bfloat16 where the device multiplies it natively, else float32."""
    if precision == "auto":
        return torch.bfloat16 if _quick_bf16(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def _quick_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and absent from some versions
    return device.type == "cpu" and supported is not None and bool(supported())


def full_float32() -> contextlib.AbstractContextManager:
    """The context in which float32 convolutions on a GPU have all of their bits; by PyTorch's default they round to the
    ten of TF32, which the release's arithmetic, and `fp32`, do not mean."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def autocast(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which convolutions compute in that type; matching, softmax and the sums of norms are float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which autocast changes no type. None is opened where it is off: an exported graph would hold a
    region that does nothing, and that PyTorch 2.6 cannot read back."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
