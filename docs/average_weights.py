"""The mean of the weights of several models of one shape: `python docs/average_weights.py OUT MODEL MODEL..`.

For checkpoints of one training, as in Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization" (2018). A MODEL is a file, a run or a name; OUT gets the config of the last one.

All tensors are averaged, also the two vectors that spectral norm keeps of each layer. A mean of unit vectors is a
little shorter (0.97 to 1 in `demo`), and so is the largest singular value that they give: such a layer weighs a few
percent more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from cocosnet.checkpoint import fill_model, find_checkpoint, read_checkpoint, save_model
from cocosnet.model.build import build_model


def main(out: str, *names: str) -> None:
    """Read, average and write."""
    paths = [find_checkpoint(name) for name in names]
    checkpoints = [read_checkpoint(path) for path in paths]
    model = build_model(checkpoints[-1][0])
    for path, (_, tensors) in zip(paths, checkpoints):
        fill_model(model, tensors, path)  # refuses what does not fit, before anything is added up
    fill_model(model, mean([tensors for _, tensors in checkpoints]), Path(out))
    save_model(out, model)


def mean(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of every tensor, in float64."""
    return {name: torch.stack([tensors[name].double() for tensors in models]).mean(0).float() for name in models[0]}


if __name__ == "__main__":
    main(*sys.argv[1:])
