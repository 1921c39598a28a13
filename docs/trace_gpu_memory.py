"""What a training step holds on a GPU when its backward pass begins: `python docs/trace_gpu_memory.py PRESET[=PX] ...`

No GPU is needed: the forward pass of all losses is traced with CUDA tensors that have no numbers, by the rules of
CUDA's autocast to bfloat16, and the Triton engine's kernels are not launched. One pair, whose exemplar is a pseudo
exemplar. A row a preset on stdout: GiB that are alive after the forward pass, as the preset has it, and with all that
can be computed again (`train.checkpointing`, `model.matching.checkpoint`); then GiB of weights, gradients, Adam's
means and the average. The backward pass adds the gradients of what it is at, and an allocator its gaps.
"""

from __future__ import annotations

import gc
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cocosnet.config import Config, load_config
from cocosnet.losses.perceptual import SHAPES, Vgg
from cocosnet.model import triton_engine
from cocosnet.model.build import build_model
from cocosnet.model.discriminator import Discriminator
from cocosnet.model.mapping import Mapping
from cocosnet.train.batches import Batch
from cocosnet.train.estimate import COPIES
from cocosnet.train.networks import Networks, speed_up
from cocosnet.train.steps import generator_losses

GPU, GIBI = torch.device("cuda"), 2**30
RECOMPUTED = ("train.checkpointing=true", "model.matching.checkpoint=true")


class Alive(TorchDispatchMode):
    """Knows the memory of every tensor that is made while it is on, as long as anything holds it."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        """The sum of what is held."""
        gc.collect()
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def main(names: list[str]) -> None:
    """Print the table."""
    triton_engine._launch = lambda *given, **more: None
    torch.nonzero = lambda mask: mask.new_empty((0, 1), dtype=torch.long)  # of real exemplars, of which there are none
    print("| preset | px | held, GiB | all recomputed, GiB | weights and optimiser, GiB |\n|---|---|---|---|---|")
    for name, _, size in (argument.partition("=") for argument in names):
        overrides = ["model.matching.backend=triton", *([f"data.size={size}"] if size else [])]
        as_is, recomputed = (held(load_config(name, [*overrides, *more])) for more in ((), RECOMPUTED))
        config = load_config(name, overrides)
        print(f"| `{name}` | {config.data.size} | {as_is[0]:.1f} | {recomputed[0]:.1f} | {as_is[1]:.1f} |", flush=True)


def held(config: Config) -> tuple[float, float]:
    """GiB after the forward pass of one pair, and of weights with all that is kept for each."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with GPU:
            networks, batch = random_networks(config), random_batch(config)
        with Alive() as alive:
            result = generator_losses(networks, batch, config.loss, adversarial_on=config.loss.adv > 0)
        learned = [*networks.generator_parameters(), *networks.discriminator.parameters()]
        found = alive.bytes() / GIBI, 4 * COPIES * sum(p.numel() for p in learned) / GIBI
        del result
    return found


def random_networks(config: Config) -> Networks:
    """All that takes part in training, on the default device."""
    widths = config.model.encoder.out_widths[: config.model.matched_levels]
    mapping = Mapping(widths) if config.model.kind == "cocosnet-v2" else None
    discriminator = Discriminator(config.data.condition_channels, config.model.discriminator)
    networks = Networks(build_model(config).train(), mapping, discriminator, None, torch.bfloat16)
    if config.loss.perceptual != "none":
        torch.set_default_dtype(torch.bfloat16)
        networks.perceptual = Vgg(SHAPES[config.loss.perceptual])
        torch.set_default_dtype(torch.float32)
    speed_up(networks, checkpointing=config.train.checkpointing)
    return networks


def random_batch(config: Config) -> Batch:
    """One pair with a pseudo exemplar, on the default device."""
    channels, size = config.data.condition_channels, config.data.size
    pictures = [torch.rand(1, count, size, size) for count in (channels, 3, 3, channels)]
    return Batch(*pictures, torch.ones(1), torch.rand(1, 2, size, size))


if __name__ == "__main__":
    main(sys.argv[1:])
