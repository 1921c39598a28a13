"""What the tests of metrics share: random weights in the right files, and small pairs."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cocosnet import weights
from cocosnet.losses.perceptual import SHAPES, Vgg


def accept(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """Make the registry take the file at `path`, which has the right name, for the real weights `name`."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.REGISTRY, name, dataclasses.replace(weights.REGISTRY[name], sha256=digest))
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(path.parent))
    monkeypatch.setenv("COCOSCTL_OFFLINE", "1")


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep the size of what passes through, whatever was in the network."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        values = torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5
        parameter.data = values if parameter.ndim > 1 else values.abs() * 0.1
    return network


def write_random_vgg(folder: Path) -> Path:
    """A Caffe VGG-16 of random weights under its file name."""
    network = randomise(Vgg(SHAPES["vgg16-caffe"]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.REGISTRY["vgg16-caffe"].filename
    save_file({key: value.half().contiguous() for key, value in network.convs.state_dict().items()}, path)
    return path


def smooth_picture(index: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture with large and small structures; (width, height) = `size`."""
    random = np.random.default_rng(index)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = random.normal(0, 8, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def picture_tensor(index: int, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    """`smooth_picture` as 1,3,H,W uint8."""
    return torch.from_numpy(np.array(smooth_picture(index, size))).permute(2, 0, 1)[None]
