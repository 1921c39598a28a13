"""What the tests of training share: a small prepared folder, and the tiny preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cocosnet.config import Config, load_config
from cocosnet.data.dataset import PairDataset
from cocosnet.data.records import MANIFEST_NAME, Record, write_manifest
from cocosnet.losses.perceptual import Vgg, VggShape
from cocosnet.train.batches import StepBatches
from cocosnet.train.distributed import Ranks
from cocosnet.train.networks import Networks, build_networks, speed_up
from cocosnet.train.steps import Stepping, discriminator_step, generator_step

QUICK = ("train.images=8", "train.save_images=4", "train.sample_images=8", "train.log_images=2")


def tiny(*overrides: str) -> Config:
    """The preset tiny-cpu for a run of four steps, with `section.key=value` changes."""
    return load_config("tiny-cpu", [*QUICK, *overrides])


def small_vgg() -> Vgg:
    """A perceptual network of the right shape with random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Vgg(VggShape(counts=(2, 2, 2, 2, 2), widths=(8,) * 5, scale=(1.0,) * 3, shift=(0.0,) * 3))


def steps_by(
    folder: str | Path, accumulate: int = 1, count: int = 2, precision: torch.dtype = torch.float32, **speed: bool
) -> dict[str, Any]:
    """Steps of G and D on the whole objective, plain gradient descent, by as many processes as the launcher started.

    Plain, because Adam divides by the gradient's size, which blows the rounding of tiny gradients up.
    Returns each step's losses and measures, and the weights afterwards.
    """
    losses = ["loss.perceptual=vgg16-caffe", "loss.match=1"]
    config = load_config("tiny-cpu", ["train.batch=4", "train.real_exemplars=0.5", *losses])
    ranks = Ranks.join(torch.device("cpu"), 4)
    networks = build_networks(tiny(), torch.device("cpu"), precision, ranks=ranks)
    networks.perceptual = small_vgg().to(precision)
    speed_up(networks, **speed)
    batches = StepBatches(PairDataset(folder, config, split="train"), config, ranks.share)
    whole = StepBatches(batches.pairs, config)
    mixed = [step for step in range(20) if 0 < whole[step].pseudo.sum() < 4 and whole[step].pseudo.sum() % 2]
    parts = [_both(networks, batches[step], config, Stepping(accumulate)) for step in mixed[:count]]
    named = [("g", networks.model), ("r", networks.mapping), ("d", networks.discriminator)]
    weights = {f"{key}.{name}": p.detach() for key, network in named for name, p in network.named_parameters()}
    ranks.leave()
    return {"parts": parts, "weights": weights}


def _both(networks: Networks, batch: Any, config: Config, stepping: Stepping) -> dict[str, float]:
    optimizer = torch.optim.SGD(networks.generator_parameters(), lr=1e-4)
    result = generator_step(networks, optimizer, batch, config.loss, adversarial_on=True, stepping=stepping)
    optimizer = torch.optim.SGD(networks.discriminator.parameters(), lr=1e-4)
    judged = discriminator_step(networks, optimizer, batch, result.image, stepping)
    assert result.applied and judged.applied
    return {name: value.item() for name, value in {**result.parts, **judged.parts}.items()}


def prepared_folder(folder: Path, count: int = 7, held_out: int = 2) -> Path:
    """Pictures of one coloured disc each, 40x44 px, with its outline as condition; the exemplar is the next picture."""
    records = [_pair(folder, index, count) for index in range(count)]
    for record in records[count - held_out :]:
        record.extra["split"] = "val"
    write_manifest(folder / MANIFEST_NAME, records)
    return folder


def _pair(folder: Path, index: int, count: int) -> Record:
    random = np.random.default_rng(index)
    rows, columns = np.mgrid[0:44, 0:40]
    distance = np.hypot(rows - random.uniform(16, 28), columns - random.uniform(14, 26))
    radius, colour, ground = random.uniform(8, 13), random.integers(0, 255, 3), random.integers(0, 255, 3)
    image = np.where((distance < radius)[..., None], colour, ground) + random.normal(0, 6, (44, 40, 3))
    edges = np.clip(255 - 120 * np.abs(distance - radius), 0, 255)
    _write(folder / "images" / f"{index}.png", image)
    _write(folder / "conditions" / f"{index}.png", edges)
    own, other = f"{index}.png", f"{(index + 1) % count}.png"
    return Record(
        id=str(index),
        target=str(folder / "images" / own),
        condition=str(folder / "conditions" / own),
        exemplar=str(folder / "images" / other),
        exemplar_condition=str(folder / "conditions" / other),
    )


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
