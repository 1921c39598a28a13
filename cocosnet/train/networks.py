"""The networks that take part in training, made from a config and a seed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from cocosnet.checkpoint import find_checkpoint, load_tensors
from cocosnet.config import Config
from cocosnet.errors import ConfigError
from cocosnet.losses.perceptual import Vgg, load_perceptual
from cocosnet.model.build import Model, build_model
from cocosnet.model.discriminator import Discriminator
from cocosnet.model.layers import SpadeBlock
from cocosnet.model.mapping import Mapping
from cocosnet.precision import autocast
from cocosnet.train.distributed import ALONE, Ranks


@dataclass
class Networks:
    """M, N and G in `model`; R (None for the systems that have no mapping loss); D; and phi (None where the config
    names no perceptual network).

    precision: the type that convolutions compute in, those of phi too; matching, the contextual and match losses and
    all sums are float32 whatever it is.
    ranks: the processes that hold copies of these networks and step together.
    """

    model: Model
    mapping: Mapping | None
    discriminator: Discriminator
    perceptual: Vgg | None
    precision: torch.dtype
    ranks: Ranks = ALONE

    def generator_parameters(self) -> list[nn.Parameter]:
        """What the generator's optimiser moves: encoders, matcher, translator and R."""
        return [*self.model.parameters(), *(self.mapping.parameters() if self.mapping is not None else ())]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that networks run in."""
        return autocast(self.precision, next(self.model.parameters()).device)


def build_networks(
    config: Config, device: torch.device, precision: torch.dtype, init: str = "", ranks: Ranks = ALONE
) -> Networks:
    """Fresh networks on `device`. The same config and seed give the same numbers; the global generator is left alone.
    `init`: a checkpoint that the model starts from.

    Raises:
        MissingWeights, CheckpointError: the perceptual network's weights, or `init`, are not here, or damaged.
    """
    name = config.loss.perceptual
    perceptual = None if name == "none" else load_perceptual(name, device, precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = initial_model(config, init)
        widths = config.model.encoder.out_widths[: config.model.matched_levels]
        mapping = Mapping(widths) if config.model.kind == "cocosnet-v2" else None
        discriminator = Discriminator(config.data.condition_channels, config.model.discriminator)
    model, discriminator = _placed(model, device), _placed(discriminator, device)
    mapping = mapping if mapping is None else _placed(mapping, device)
    return Networks(model, mapping, discriminator, perceptual, precision, ranks)


def initial_model(config: Config, init: str = "") -> Model:
    """A fresh model, or one with the weights of the checkpoint `init` (a file or a shipped name) of the same shapes.

    Raises:
        ConfigError: the config asks for the release's networks, whose spectral norms are folded in.
        MissingWeights, CheckpointError: there is no such checkpoint, or it does not fit this config.
    """
    if config.model.matching.compat != "none":
        raise ConfigError("model.matching.compat: the release's networks are for use only; train with compat none")
    model = build_model(config)
    if init:
        load_tensors(model, find_checkpoint(init))
    return model


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    network = network.to(device=device, memory_format=torch.channels_last).train()
    for norm in spectral_norms(network):
        norm.eval()  # see power_iteration
    return network


def spectral_norms(network: nn.Module) -> list[nn.Module]:
    """The modules that divide a weight by its largest singular value, each with its estimate of that."""
    found = [module.parametrizations["weight"] for module in network.modules() if parametrize.is_parametrized(module)]
    return list(dict.fromkeys(found))


@torch.no_grad()
def power_iteration(network: nn.Module) -> None:
    """Refine the estimates of the spectral norms once, as each step does before anything else.

    Forward passes use them as they are. So a batch has the same gradient at once, in parts, or shared among processes,
    and a pass that is made again for its gradient gives the same numbers.
    """
    for norm in spectral_norms(network):
        norm.train()
        norm()
        norm.eval()


def speed_up(networks: Networks, *, checkpointing: bool = False, compiled: bool = False) -> None:
    """Trade memory for time, or the time of the first steps for that of all others; no number changes but for rounding.

    checkpointing: SPADE blocks of encoders and translator, which hold most activations, are computed again in the
    backward pass. compiled: `torch.compile` of encoders, translator and discriminator; matching has compiled engines.
    """
    for module in networks.model.modules():
        if isinstance(module, SpadeBlock):
            module.recompute = checkpointing
    if compiled:
        parts = {name: part for name, part in networks.model.named_children() if name != "hierarchy"}
        for part in [*parts.values(), networks.discriminator]:
            # Both encoders share their code: with sizes left open, the second one would be compiled for any channels.
            part.compile(dynamic=False)
