"""HED, holistically-nested edge detection (Xie and Tu, 2015): the edges that the paper's edge task starts from.

VGG-16's thirteen convolutions, a one-channel score from each of the five stages, and a learned fusion of the scores.
Module names are those of the public PyTorch port's weights, so that its file loads as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from cocosnet.errors import CheckpointError
from cocosnet.model.convolution import Conv2d

MEAN_BGR = (104.00699, 116.66877, 122.67892)  # subtracted from BGR values in 0..255 (Caffe's ImageNet mean)
BORDER = 16  # px
STAGES = {"One": (3, 64, 2), "Two": (64, 128, 2), "Thr": (128, 256, 3), "Fou": (256, 512, 3), "Fiv": (512, 512, 3)}


def _stage(inputs: int, outputs: int, convolutions: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2, 2)] if pool else []
    for index in range(convolutions):
        layers += [Conv2d(inputs if index == 0 else outputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class HED(nn.Module):
    """The network. Any H and W of at least 16 px."""

    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs, convolutions) in STAGES.items():
            setattr(self, f"netVgg{name}", _stage(inputs, outputs, convolutions, pool=name != "One"))
            setattr(self, f"netScore{name}", nn.Conv2d(outputs, 1, 1))
        self.netCombine = nn.Sequential(nn.Conv2d(len(STAGES), 1, 1), nn.Sigmoid())

    def forward(self, bgr: Tensor) -> Tensor:
        """B,3,H,W float32 BGR in 0..255 -> fused edge probability B,1,H,W in [0,1]."""
        mean = torch.tensor(MEAN_BGR, device=bgr.device, dtype=bgr.dtype).view(1, 3, 1, 1)
        features, scores = bgr - mean, []
        for name in STAGES:
            features = getattr(self, f"netVgg{name}")(features)
            score = getattr(self, f"netScore{name}")(features)
            scores.append(F.interpolate(score, size=bgr.shape[2:], mode="bilinear", align_corners=False))
        return self.netCombine(torch.cat(scores, 1))


def load_hed(path: str | Path) -> HED:
    """HED in eval mode with the weights of `path`: safetensors, or the port's .pytorch file (keys net* or module*).

    Raises:
        CheckpointError: unreadable, or not exactly HED's tensors.
    """
    network = HED().eval().requires_grad_(False)
    try:
        state = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, weights_only=True)
        network.load_state_dict({_own_name(key): value.float() for key, value in state.items()})
    except Exception as error:  # safetensors, unpickling and shape errors share no base class
        raise CheckpointError(
            f"{path}: not the weights of HED ({' '.join(str(error).split())[:160]}); remove the file and fetch it again"
        ) from error
    return network


def _own_name(key: str) -> str:
    return "net" + key.removeprefix("module") if key.startswith("module") else key


def bgr_tensor(image: Image.Image) -> Tensor:
    """A picture as 1,3,H,W float32 in 0..255, channels blue, green, red: the input of `HED` and of hed-small."""
    return torch.from_numpy(np.array(image.convert("RGB"))[..., ::-1].copy()).permute(2, 0, 1)[None].float()


def hed_edges(network: HED, images: Sequence[Image.Image]) -> Tensor:
    """Fused edge probability of pictures of one size, B,H,W float32 in [0,1] on the CPU.

    A picture is continued by BORDER px of its edge pixels, since HED's zero padding draws a frame of false edges.
    """
    bgr = torch.cat([bgr_tensor(image) for image in images]).to(next(network.parameters()).device)
    with torch.inference_mode():
        edges = network(F.pad(bgr, [BORDER] * 4, mode="replicate"))
    return edges[:, 0, BORDER:-BORDER, BORDER:-BORDER].float().cpu()
