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
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from cocosnet import weights
from cocosnet.losses.perceptual import SHAPES, Vgg

# The registry's hashes are those of the real files; a process of its own takes random ones after this.
START = """
import dataclasses, hashlib, sys
from cocosnet import weights
for name, entry in list(weights.REGISTRY.items()):
    path = weights.locate_weights(name)
    if path is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        weights.REGISTRY[name] = dataclasses.replace(entry, sha256=digest)
from cocosctl.app import main
sys.exit(main())
"""


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


def write_random_inception(folder: Path) -> Path:
    """pytorch-fid's Inception of random weights under its file name; features are about 0.2, as real ones."""
    from cocosnet.metrics.fid import _build_inception

    network, generator = _build_inception(), torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * (2 / parameter[0].numel()) ** 0.5
        else:
            parameter.data = 0.1 * noise + name.endswith("bn.weight")
    return _save(folder, "fid-inception", network.state_dict())


def write_random_trunk(folder: Path, name: str) -> Path:
    """torchvision's "alexnet", "vgg16" or "vgg19" of random weights under its file name, without the classifier."""
    features = alexnet().features if name == "alexnet" else make_layers(cfgs["D" if name == "vgg16" else "E"])
    return _save(folder, name, {f"features.{key}": value for key, value in randomise(features).state_dict().items()})


def _save(folder: Path, name: str, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.REGISTRY[name].filename
    torch.save(state, path)
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
