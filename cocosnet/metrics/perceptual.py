"""LPIPS (Zhang et al. 2018) through the package `lpips`, and the diversity of outputs that is measured with it."""

from __future__ import annotations

import functools
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from cocosnet import weights
from cocosnet.errors import ConfigError
from cocosnet.metrics.base import Metric
from cocosnet.metrics.features import load_lpips
from cocosnet.metrics.pixels import mean

TRUNKS = {"alex": "alexnet", "vgg": "vgg16"}  # trunk -> the entry of cocosnet.weights
SMALLEST = 32  # px, where the trunks still have a pixel at their last layer


class LPIPS(Metric):
    """Learned perceptual distance of output and target: 0 for identical pictures. `lpips:vgg` has the other trunk."""

    name = "lpips"
    smallest = SMALLEST

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0, network: str = "alex") -> None:
        super().__init__(device, seed)
        self._network = shared_lpips(network, self.device)
        self.weights = (TRUNKS[network],)
        self.protocol = (
            f"lpips: package lpips, version 0.1, trunk {network}, pictures in [-1,1] at their own size, mean over pairs"
        )
        self._values: list[float] = []

    @torch.inference_mode()
    def _add(self, output: Tensor, target: Tensor) -> list[float | None]:
        values = distances(self._network, output, target)
        self._values.extend(values)
        return values

    def state(self) -> list[float]:
        """The distances so far."""
        return self._values

    def absorb(self, state: list[float]) -> None:
        """Add another process's distances."""
        self._values.extend(state)

    def _result(self) -> dict[str, Any]:
        return {"value": mean(self._values)}


class Diversity(Metric):
    """How much the outputs of one condition differ from exemplar to exemplar: higher is more diverse.

    Memory: every output as uint8 (0.2 MB at 256x256).
    """

    name = "diversity"
    needs = ("output", "condition_id")
    smallest = SMALLEST

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0, network: str = "alex") -> None:
        super().__init__(device, seed)
        self._network = shared_lpips(network, self.device)
        self.weights = (TRUNKS[network],)
        self.protocol = (
            "diversity: LPIPS (package lpips, version 0.1, trunk "
            f"{network}) between all pairs of outputs of one condition, mean over pairs, mean over conditions"
        )
        self._outputs: dict[int, list[Tensor]] = {}

    def _add(self, output: Tensor, condition_id: Tensor) -> None:
        for picture, condition in zip(output.cpu(), condition_id.tolist(), strict=True):
            self._outputs.setdefault(condition, []).append(picture)

    def state(self) -> dict[int, list[Tensor]]:
        """The outputs so far, by condition."""
        return self._outputs

    def absorb(self, state: dict[int, list[Tensor]]) -> None:
        """Add another process's outputs."""
        for condition, pictures in state.items():
            self._outputs.setdefault(condition, []).extend(pictures)

    @torch.inference_mode()
    def _result(self) -> dict[str, Any]:
        several = [pictures for pictures in self._outputs.values() if len(pictures) > 1]
        if not several:
            return {"value": None, "note": "no condition has more than one output"}
        values = [mean([self._distance(*pair) for pair in combinations(pictures, 2)]) for pictures in several]
        return {"value": mean(values), "conditions": len(several)}

    def _distance(self, first_3HW: Tensor, second_3HW: Tensor) -> float:
        return distances(self._network, first_3HW[None].to(self.device), second_3HW[None].to(self.device))[0]


def distances(network: nn.Module, first_B3HW: Tensor, second_B3HW: Tensor) -> list[float]:
    """LPIPS of each pair of uint8 pictures."""
    return network(*(p.float() / 127.5 - 1 for p in (first_B3HW, second_B3HW))).flatten().double().tolist()


def shared_lpips(network: str, device: torch.device) -> nn.Module:
    """The network with the trunk "alex" or "vgg", loaded once while the weight file is the same.

    Raises:
        ConfigError: another name. MissingWeights, CheckpointError: as `load_lpips`.
    """
    if network not in TRUNKS:
        raise ConfigError(f"lpips: no trunk is called {network!r}; known are {', '.join(TRUNKS)}")
    return _shared(network, device, weights.fingerprint(TRUNKS[network])["sha256"])


@functools.lru_cache(maxsize=2)
def _shared(network: str, device: torch.device, sha256: str) -> nn.Module:
    return load_lpips(network, weights.find_weights(TRUNKS[network])).to(device)
