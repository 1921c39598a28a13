"""What a run will need, from one picture: memory and time."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from cocosnet.config import Config
from cocosnet.launcher import place
from cocosnet.losses.perceptual import SHAPES, Vgg
from cocosnet.model.warp import pixel_grid
from cocosnet.precision import pick_precision
from cocosnet.train.batches import Batch
from cocosnet.train.networks import Networks, build_networks, speed_up
from cocosnet.train.steps import discriminator_step, generator_step

CPU_SIZE = 128  # px, side of the picture that is tried on a CPU; a GPU tries the config's own size
TRIED = 2  # steps; the last one is timed
COPIES = 5  # of a learned number: itself, its gradient, Adam's two means, and the average (D and R have none)


def estimate(config: Config, device: torch.device) -> dict[str, Any]:
    """Make two steps of one picture, with random weights, and scale by pixels and by the pictures of a part of a batch.

    Returns memory_mib and seconds_per_1000_images of one process, and on what they rest: probe_size (px), device,
    images_at_once. On a GPU memory is the peak of its allocator; on a CPU it is what is kept for the backward pass and
    for the weights, without the interpreter and without scratch memory, so a lower bound. Matching at the coarsest
    level grows with the square of the pixels, the rest in proportion; the scaling is in proportion.
    """
    processes = place()[1]
    at_once = config.train.at_once(processes)
    size = config.data.size if device.type == "cuda" else min(config.data.size, CPU_SIZE)
    networks = _networks(config, device)
    fixed = _fixed_bytes(networks)
    seconds, kept = _try(networks, config, size, device)
    pixels = (config.data.size / size) ** 2
    return {
        "memory_mib": (fixed + kept * pixels * at_once) / 2**20,
        "seconds_per_1000_images": 1000 * seconds * pixels,
        "images_at_once": at_once,
        "probe_size": size,
        "device": str(device),
    }


def _networks(config: Config, device: torch.device) -> Networks:
    """The run's networks, the perceptual one with random weights so that no file is needed."""
    precision = pick_precision(config.train.precision, device)
    without = dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual="none"))
    networks = build_networks(without, device, precision)
    if config.loss.perceptual != "none":
        vgg = Vgg(SHAPES[config.loss.perceptual])
        networks.perceptual = vgg.to(device=device, dtype=precision, memory_format=torch.channels_last)
    speed_up(networks, checkpointing=config.train.checkpointing)
    return networks


def _try(networks: Networks, config: Config, size: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a step of one picture, and the bytes that it holds at once beyond the weights."""
    batch = _random_batch(config, size).to(device)
    learned = networks.generator_parameters(), list(networks.discriminator.parameters())
    optimizers = [torch.optim.Adam(parameters, fused=True) for parameters in learned]
    known = {tensor.data_ptr() for network in _all(networks) for tensor in network.state_dict().values()}
    for _ in range(TRIED):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        if device.type == "cuda":
            optimizers[0].zero_grad(set_to_none=True)  # as the step does: their place counts as free
            torch.cuda.reset_peak_memory_stats(device)
        held, since = _allocated(device), time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = generator_step(networks, optimizers[0], batch, config.loss, adversarial_on=config.loss.adv > 0)
        discriminator_step(networks, optimizers[1], batch, result.image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - since
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else sum(kept.values())
    return seconds, float(peak)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _random_batch(config: Config, size: int) -> Batch:
    """One picture of noise with a pseudo exemplar."""
    generator, channels = torch.Generator().manual_seed(0), config.data.condition_channels
    condition, other = (torch.rand(1, channels, size, size, generator=generator) for _ in range(2))
    image, exemplar = (torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))
    field = pixel_grid(size, size).unsqueeze(0)
    return Batch(condition, image, exemplar, other, torch.ones(1), field)


def _all(networks: Networks) -> list[nn.Module]:
    parts = (networks.model, networks.mapping, networks.discriminator, networks.perceptual)
    return [part for part in parts if part is not None]


def _fixed_bytes(networks: Networks) -> int:
    """Weights, gradients, both moments of Adam and the average; the perceptual network has only its weights."""
    learned = sum(p.numel() for p in [*networks.generator_parameters(), *networks.discriminator.parameters()])
    frozen = networks.perceptual.parameters() if networks.perceptual is not None else ()
    return 4 * COPIES * learned + sum(p.numel() * p.element_size() for p in frozen)
