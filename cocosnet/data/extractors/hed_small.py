"""hed-small: a little U-Net taught to imitate HED's fused output, small enough to ship (under 1 MB).

Five scales from full resolution to 1/16, skips by addition. How it was taught: `train_hed_small.py` and docs/data.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from cocosnet.data.extractors.hed import MEAN_BGR, bgr_tensor
from cocosnet.errors import CheckpointError
from cocosnet.weights import packed_file

WIDTHS = (16, 32, 48, 64, 96)  # channels at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution
FILENAME = "hed-small.safetensors"  # in the package's assets


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class HedSmall(nn.Module):
    """The network. Any H and W: the picture is padded inside to a multiple of 16 and the answer cropped back."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = _block(3, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(_block(fine, coarse, stride=2), _block(coarse, coarse)) for fine, coarse in pairwise(widths)
        )
        self.context = _block(widths[-1], widths[-1])
        self.lateral = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(widths))
        self.up = nn.ModuleList(_block(fine, fine) for fine in widths[:-1])
        self.score = nn.Conv2d(widths[0], 1, 1)

    def logits(self, bgr: Tensor) -> Tensor:
        """B,3,H,W float32 BGR in 0..255 -> edge logits B,1,H,W."""
        height, width = bgr.shape[2:]
        bgr = F.pad(bgr, (0, -width % 16, 0, -height % 16), mode="replicate")
        mean = torch.tensor(MEAN_BGR, device=bgr.device, dtype=bgr.dtype).view(1, 3, 1, 1)
        pyramid = [self.stem((bgr - mean) / 64)]
        for down in self.down:
            pyramid.append(down(pyramid[-1]))
        features = self.context(pyramid.pop())
        for lateral, up in zip(reversed(self.lateral), reversed(self.up)):
            features = F.interpolate(lateral(features), scale_factor=2.0, mode="bilinear", align_corners=False)
            features = up(features + pyramid.pop())
        return self.score(features)[..., :height, :width]

    def forward(self, bgr: Tensor) -> Tensor:
        """B,3,H,W float32 BGR in 0..255 -> edge probability B,1,H,W in [0,1]."""
        return torch.sigmoid(self.logits(bgr))


def load_hed_small(path: str | Path | None = None) -> HedSmall:
    """The network in eval mode with the weights of `path`, by default the shipped file.

    Raises:
        MissingWeights: the shipped file is not there.
        CheckpointError: unreadable, or not exactly this network's tensors.
    """
    path = path or packed_file(FILENAME)
    network = HedSmall().eval().requires_grad_(False)
    try:
        network.load_state_dict(
            {key: value if value.dtype == torch.int64 else value.float() for key, value in load_file(path).items()}
        )
    except Exception as error:  # safetensors and shape errors share no base class
        raise CheckpointError(
            f"{path}: not the weights of hed-small ({' '.join(str(error).split())[:160]}); install cocosctl again"
        ) from error
    return network


def hed_small_edges(network: HedSmall, images: Sequence[Image.Image]) -> Tensor:
    """Edge probability of pictures of one size, B,H,W float32 in [0,1] on the CPU."""
    bgr = torch.cat([bgr_tensor(image) for image in images]).to(next(network.parameters()).device)
    with torch.inference_mode():
        return network(bgr)[:, 0].float().cpu()
