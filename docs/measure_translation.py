"""Seconds and peak memory of one whole translation: `python docs/measure_translation.py PRESET|release [HEIGHT WIDTH]`.

`release` stands for networks of the authors' release's sizes in compatibility mode. Weights and pictures are random: no
step's time depends on their values. A line on stdout; the first, smaller run, which compiles, does not count.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from cocosnet.config import Config, config_from_dict, load_config
from cocosnet.model.build import build_model
from cocosnet.precision import autocast, layout_of, precision_of

RELEASE = {
    "data": {"task": "pose", "size": 512},
    "model": {
        "encoder": {"exemplar_condition": True},
        "matching": {"compat": "release"},
        "translator": {"use_condition": True},
        "discriminator": {"scales": 0},
    },
}


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    name, *size = sys.argv[1:]
    config = config_from_dict(RELEASE) if name == "release" else load_config(name)
    height, width = map(int, size) if size else (config.data.size, config.data.size)
    torch.manual_seed(0)
    model = build_model(config).eval().to(memory_format=layout_of(config))
    translate(model, config, 64, 64)
    begin = time.perf_counter()
    translate(model, config, height, width)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name} {height}x{width}: {seconds:.1f} s, {peak:.0f} MiB, {torch.get_num_threads()} threads")


def translate(model: torch.nn.Module, config: Config, height: int, width: int) -> None:
    """One random pair through the model, in the type and layout that `cocosctl translate` takes."""
    condition = torch.rand(1, config.data.condition_channels, height, width)
    exemplar, other = torch.rand(1, 3, height, width) * 2 - 1, torch.rand_like(condition)
    inputs = [x.to(memory_format=layout_of(config)) for x in (condition, exemplar, other)]
    device = torch.device("cpu")
    with autocast(precision_of(config, device), device):
        model(*inputs[:2], inputs[2] if config.model.encoder.exemplar_condition else None)


if __name__ == "__main__":
    main()
