"""Seconds and peak memory of whole translations, on a CPU or a GPU:
`python docs/measure_translation.py PRESET|release [HEIGHT WIDTH] [--device cuda] [--repeats 5]`.

`release` stands for networks of the authors' release's sizes in compatibility mode. Weights and pictures are random. So
matches lie at random, which takes longer than those of a trained model. Runs that compile and warm up come before and
do not count. A line for each repeat on stdout: the whole, then what its stages took (the whole is more by resizing and
cropping), and the processor's time that the system took.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter

import torch
from torch import Tensor, nn

from cocosnet.config import Config, config_from_dict, load_config
from cocosnet.memory import keep_freed_memory
from cocosnet.model.build import build_model
from cocosnet.model.layers import fold_spectral_norms
from cocosnet.precision import autocast, full_float32, layout_of, precision_of

RELEASE = {
    "data": {"task": "pose", "size": 512},
    "model": {
        "encoder": {"exemplar_condition": True},
        "matching": {"compat": "release"},
        "translator": {"use_condition": True},
        "discriminator": {"scales": 0},
    },
}
SMALL = 64  # px: a size at which a CPU compiles what it compiles, quickly


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    given = _arguments()
    keep_freed_memory()
    config = config_from_dict(RELEASE) if given.name == "release" else load_config(given.name)
    height, width = given.size or (config.data.size, config.data.size)
    device = torch.device(given.device)
    model = prepared_model(config, device)
    # A GPU's libraries choose their algorithms by size, so it is warmed up at the size that counts.
    small = (SMALL, SMALL) if device.type == "cpu" else (height, width)
    translate(model, config, *inputs(config, device, *small))
    watch = Stopwatch(model, device)
    for _ in range(given.repeats):
        pair = inputs(config, device, height, width)
        watch.stages.clear()
        begin, system = watch.now(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
        translate(model, config, *pair)
        seconds, system = watch.now() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
        stages = ", ".join(f"{name} {took:.3f}" for name, took in watch.stages.items())
        print(
            f"{given.name} {height}x{width}: {seconds:.3f} s ({stages}), {system:.1f} s of the system's, "
            f"{peak(device):.0f} MiB, {place(device)}"
        )


def prepared_model(config: Config, device: torch.device) -> nn.Module:
    """The network with random weights as `cocosctl translate` would hold it."""
    torch.manual_seed(0)
    model = build_model(config).eval().to(device, memory_format=layout_of(config))
    fold_spectral_norms(model)
    return model


def inputs(config: Config, device: torch.device, height: int, width: int) -> list[Tensor]:
    """One random pair on the device: condition, exemplar, and the exemplar's condition where the model looks at it."""
    condition = torch.rand(1, config.data.condition_channels, height, width)
    exemplar, other = torch.rand(1, 3, height, width) * 2 - 1, torch.rand_like(condition)
    tensors = [condition, exemplar, *([other] if config.model.encoder.exemplar_condition else [])]
    return [x.to(device, memory_format=layout_of(config)) for x in tensors]


def translate(model: nn.Module, config: Config, *pair: Tensor) -> None:
    """The pair through the model, in the type that `cocosctl translate` takes."""
    device = pair[0].device
    with autocast(precision_of(config, device), device), full_float32():
        model(*pair)


class Stopwatch:
    """Seconds that each of a model's parts takes, in the order of their first call; it waits for a GPU's work."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.device, self.stages, self._begun = device, Counter(), 0.0
        for name, part in model.named_children():
            part.register_forward_pre_hook(self._start)
            part.register_forward_hook(lambda *_, name=name: self._stop(name))

    def now(self) -> float:
        """The time, when all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _start(self, *_: object) -> None:
        self._begun = self.now()

    def _stop(self, name: str) -> None:
        self.stages[name] += self.now() - self._begun


def peak(device: torch.device) -> float:
    """MiB: the process's on a CPU, PyTorch's tensors' on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def place(device: torch.device) -> str:
    """What did the work."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and peak memory of whole translations.")
    parser.add_argument("name", help="a preset, or release")
    parser.add_argument("size", nargs="*", type=int, help="HEIGHT WIDTH, px; the preset's own by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
