"""The perceptual network phi of Eq. 15-16: a frozen VGG, cut open after its rectifiers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.errors import CheckpointError, MissingWeights
from cocosnet.model.convolution import Conv2d
from cocosnet.precision import without_autocast
from cocosnet.weights import find_weights


@dataclass(frozen=True)
class VggShape:
    """Convolutions and channels of each block, and how a picture in [-1, 1] enters: x * scale + shift, channelwise.

    A layer's output is counted in its unit (1 where none is given), so that losses weigh alike whatever the network.
    """

    counts: tuple[int, ...]
    widths: tuple[int, ...]
    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    bgr: bool = False  # channels are turned round first; scale and shift are in the network's order
    units: Mapping[str, float] = field(default_factory=dict)


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision, RGB in [0, 1]
_CAFFE_MEAN = (103.939, 116.779, 123.68)  # BGR in 0..255
# Mean activations over 13 portraits and paintings: the Caffe network lives on 0..255, torchvision's near 1.
_CAFFE_UNITS = {
    "relu1_1": 20.0,
    "relu1_2": 106.0,
    "relu2_1": 174.0,
    "relu2_2": 190.0,
    "relu3_1": 233.0,
    "relu3_2": 259.0,
    "relu3_3": 167.0,
    "relu4_1": 137.0,
    "relu4_2": 76.0,
    "relu4_3": 19.0,
    "relu5_1": 19.0,
    "relu5_2": 8.4,
    "relu5_3": 1.1,
}
VGG19 = VggShape(
    counts=(2, 2, 4, 4, 4),
    widths=(64, 128, 256, 512, 512),
    scale=tuple(0.5 / s for s in _STD),
    shift=tuple((0.5 - m) / s for m, s in zip(_MEAN, _STD, strict=True)),
)
VGG16_CAFFE = VggShape(
    counts=(2, 2, 3, 3, 3),
    widths=(64, 128, 256, 512, 512),
    scale=(127.5,) * 3,
    shift=tuple(127.5 - m for m in _CAFFE_MEAN),
    bgr=True,
    units=_CAFFE_UNITS,
)
SHAPES = {"vgg19": VGG19, "vgg16-caffe": VGG16_CAFFE}


class Vgg(nn.Module):
    """Blocks of 3x3 convolutions with rectifiers, 2x2 max pooling between them. Frozen; always in evaluation mode.

        features = vgg(image, ["relu1_2", "relu4_2"])

    image B,3,H,W in [-1, 1]; relu{b}_{i} is B,C_b,H/2^(b-1),W/2^(b-1), at least 0, in the type of the network's weights
    (float32, or bfloat16 after `.to(torch.bfloat16)`). Nothing deeper than what is asked for is computed.
    """

    def __init__(self, shape: VggShape):
        super().__init__()
        self.shape = shape
        inputs = (3, *shape.widths)
        self.convs = nn.ModuleDict(
            {
                f"conv{b}_{i}": Conv2d(inputs[b - 1] if i == 1 else width, width, 3, padding=1)
                for b, (width, count) in enumerate(zip(shape.widths, shape.counts, strict=True), start=1)
                for i in range(1, count + 1)
            }
        )
        self.register_buffer("scale", torch.tensor(shape.scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shape.shift).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Vgg:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def forward(self, image: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """See the class. Raises KeyError for a layer that the network does not have."""
        wanted, found = set(layers), {}
        for name, x in self.maps(image):
            if name in wanted:
                found[name] = x
            if len(found) == len(wanted):
                return found
        raise KeyError(f"no layer is called {', '.join(sorted(wanted - set(found)))}")

    def maps(self, image: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every layer's name and map in their order, each computed when it is asked for; image as for `forward`."""
        x = self._enter(image)
        for name, layer in self.convs.items():
            with without_autocast(image.device):
                x = F.max_pool2d(x, 2) if name.endswith("_1") and name != "conv1_1" else x
                x = F.relu(layer(x))
            yield name.replace("conv", "relu"), x

    def _enter(self, image: Tensor) -> Tensor:
        weight = self.convs["conv1_1"].weight
        x = image.flip(1) if self.shape.bgr else image
        x = (x.float() * self.scale.float() + self.shift.float()).to(weight.dtype)
        return x.contiguous(memory_format=torch.channels_last)


def load_perceptual(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vgg:
    """The network called `name` (vgg19 or vgg16-caffe) with its ImageNet weights, on `device`, computing in `dtype`.

    Raises:
        MissingWeights: no network is called so, or its file is not here and cannot be fetched.
        CheckpointError: the file is damaged or holds something else.
    """
    if name not in SHAPES:
        raise MissingWeights(f"no perceptual network is called {name!r}; known are {', '.join(SHAPES)}")
    network = Vgg(SHAPES[name])
    load_vgg(network, find_weights(name))
    return network.to(device=device, dtype=dtype, memory_format=torch.channels_last)


def load_vgg(network: Vgg, path: Path) -> None:
    """Fill `network` from a file with keys conv{b}_{i}.weight (.safetensors) or with torchvision's features.N (.pth).

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those of this network.
    """
    state = _read(path)
    if not any(key.startswith("conv") for key in state):
        state = _from_torchvision(state, list(network.convs))
    try:
        network.convs.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not the weights of this VGG: {' '.join(str(error).split())[:300]}") from error
    _fold_units(network)


@torch.no_grad()
def _fold_units(network: Vgg) -> None:
    """Divide every layer's output by its unit.

    Rectifiers and max pooling let a positive factor through, so the weights carry it and it costs nothing later.
    """
    before = 1.0
    for name, conv in network.convs.items():
        unit = network.shape.units.get(name.replace("conv", "relu"), 1.0)
        conv.weight.mul_(before / unit)
        conv.bias.div_(unit)
        before = unit


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of damaged files raise whatever their parser raises
        raise CheckpointError(f"{path}: cannot read these weights: {' '.join(str(error).split())[:200]}") from error


def _from_torchvision(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Rename features.0, features.2, ... in their order; the classifier of the file is of no use here."""
    positions = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
    renamed = {}
    for position, name in zip(positions, names, strict=False):  # what is missing or too much is found when loading
        for kind in ("weight", "bias"):
            renamed[f"{name}.{kind}"] = state[f"features.{position}.{kind}"]
    return renamed
