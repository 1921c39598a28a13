"""From a config to the network that it describes: the paper's method, or a system that the paper compares with."""

from __future__ import annotations

from cocosnet.config import Config
from cocosnet.model.baselines import Spade
from cocosnet.model.cocosnet import CoCosNet
from cocosnet.model.release import ReleaseCoCosNet

Model = CoCosNet | Spade | ReleaseCoCosNet  # called alike, and returning the same Output


def build_model(config: Config) -> Model:
    """A freshly initialised network of `model.kind`, or the release's where `model.matching.compat` asks for it."""
    if config.model.matching.compat != "none":
        return ReleaseCoCosNet(config)
    return Spade(config) if config.model.kind == "spade" else CoCosNet(config)
