"""LPIPS (Zhang et al. 2018) through the package `lpips`, and the diversity of outputs that is measured with it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cocosnet import weights
from cocosnet.errors import ConfigError
from cocosnet.metrics.base import Metric
from cocosnet.metrics.features import load_lpips
from cocosnet.metrics.pixels import mean
from cocosnet.metrics.spill import Spill

TRUNKS = {"alex": "alexnet", "vgg": "vgg16"}  # trunk -> the entry of cocosnet.weights
Place = tuple[int, tuple[int, ...]]  # where in a spill a picture starts, and its shape
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

    The outputs (0.2 MB each at 256x256) wait for the end in a temporary file where they are many.
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
        self._pixels = Spill("uint8")
        self._places: dict[int, list[Place]] = {}  # by condition

    def _add(self, output: Tensor, condition_id: Tensor) -> None:
        for picture, condition in zip(output.cpu().numpy(), condition_id.tolist(), strict=True):
            self.absorb((condition, picture))

    def states(self) -> Iterator[tuple[int, np.ndarray]]:
        """The outputs so far with their conditions, one at a time."""
        for condition, places in self._places.items():
            for place in places:
                yield condition, self._pixels.read(*place)

    def absorb(self, state: tuple[int, np.ndarray]) -> None:
        """Add an output, 3,H,W uint8, of a condition."""
        condition, picture = state
        self._places.setdefault(condition, []).append((self._pixels.add(picture), picture.shape))

    @torch.inference_mode()
    def _result(self) -> dict[str, Any]:
        values, unequal = [], 0
        for places in self._places.values():
            pairs = list(combinations(places, 2))
            equal = [(first, second) for first, second in pairs if first[1] == second[1]]
            unequal += len(pairs) - len(equal)
            values += [mean([self._distance(*pair) for pair in equal])] if equal else []
        note = {"note": f"{unequal} pairs of outputs differ in size and are left out"} if unequal else {}
        if not values:
            return {"value": None, "note": "no condition has more than one output", **note}
        return {"value": mean(values), "conditions": len(values), **note}

    def _distance(self, first: Place, second: Place) -> float:
        pictures = (torch.from_numpy(self._pixels.read(*place))[None].to(self.device) for place in (first, second))
        return distances(self._network, *pictures)[0]


def distances(network: nn.Module, first_B3HW: Tensor, second_B3HW: Tensor) -> list[float]:
    """LPIPS of each pair of uint8 pictures."""
    return network(*(p.float() / 127.5 - 1 for p in (first_B3HW, second_B3HW))).flatten().double().tolist()


def shared_lpips(network: str, device: torch.device) -> nn.Module:
    """The network with the trunk "alex" or "vgg", loaded once while the weight file is the same.

    Raises:
        ConfigError: another name. MissingWeights, MissingDependency, CheckpointError: as `find_weights`, `load_lpips`.
    """
    if network not in TRUNKS:
        raise ConfigError(f"lpips: no trunk is called {network!r}; known are {', '.join(TRUNKS)}")
    return _shared(network, device, weights.fingerprint(TRUNKS[network])["sha256"])


@functools.lru_cache(maxsize=2)
def _shared(network: str, device: torch.device, sha256: str) -> nn.Module:
    return load_lpips(network, weights.find_weights(TRUNKS[network])).to(device)
