"""How near each stage comes to the truth: `python docs/measure_warps.py MODEL FOLDER`.

For every held-out picture of a prepared FOLDER the exemplar is the picture itself, distorted as in training, always
alike. Mean PSNR in dB against the picture, of the exemplar as it is, of the warp of every level (enlarged bilinearly)
and of the output of MODEL (a file, a run or a shipped name). A row of a table on stdout.
"""

from __future__ import annotations

import statistics
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.checkpoint import load_model
from cocosnet.config import Config
from cocosnet.data.dataset import PairDataset
from cocosnet.train.batches import Batch, make_sample, step_generator
from cocosnet.train.steps import psnr
from cocosnet.train.validation import STREAM


@torch.inference_mode()
def main(name: str, folder: str) -> None:
    """Print the table."""
    model = load_model(name, device="cpu")
    pairs = PairDataset(folder, model.config, split="val")
    rows = [measure(model, sample(pairs, index, model.config)) for index in range(len(pairs))]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    print("| " + " | ".join(f"{statistics.fmean(row[title] for row in rows):.2f}" for title in rows[0]) + " |")


def sample(pairs: PairDataset, index: int, config: Config) -> Batch:
    """Held-out picture number `index` with its pseudo exemplar."""
    return make_sample(pairs[index], config, pseudo=True, generator=step_generator(0, STREAM, index))


def measure(model: torch.nn.Module, batch: Batch) -> dict[str, float]:
    """PSNR of every stage by its title."""
    out = model(*batch.inputs)
    warps = {f"warp {warp.shape[-2]}x{warp.shape[-1]}": warp for warp in out.warps}
    stages = {"exemplar as it is": batch.exemplar, **warps, "output": out.image}
    return {title: against(picture.float(), batch.image) for title, picture in stages.items()}


def against(picture: Tensor, truth: Tensor) -> float:
    """PSNR in dB of a picture in [-1, 1], enlarged to the truth's size."""
    picture = F.interpolate(picture.clamp(-1, 1), size=truth.shape[-2:], mode="bilinear", align_corners=False)
    return psnr((picture - truth).square().mean()).item()


if __name__ == "__main__":
    main(*sys.argv[1:3])
