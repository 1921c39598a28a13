"""What every metric is: a name, a protocol in words, and a stream of pictures in, one dict out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cocosnet.errors import ConfigError, DataError

PICTURES = ("output", "target", "exemplar", "warp")  # roles that are pictures


class Metric(ABC):
    """A number over a stream of pictures. Two numbers may be compared only if their `protocol` texts are equal.

    Class attributes:
        name: as given to `--metrics`.
        protocol: one line that fixes everything the value depends on except the pictures.
        needs: the roles (fields of a pair record) that `update` takes, in that order.
        smallest: shortest side in px that the metric can handle.
        side: px, the square that every picture is brought to, so that small ones cost as much; 0: their own size.
        same_size: True where the pictures of a pair must agree in size (they are never resized to fit).
        paired: False where outputs and targets are two sets, of which one may have more pictures.
        weights: names of the external weight files (`cocosnet.weights`) that the value depends on.
        from_statistics: True where a side can be a file of statistics instead of pictures (`use_statistics`).
    """

    name: str
    protocol: str
    needs: tuple[str, ...] = ("output", "target")
    smallest: int = 1
    side: int = 0
    same_size: bool = True
    paired: bool = True
    weights: tuple[str, ...] = ()
    from_statistics: bool = False

    def __init__(self, device: str | torch.device = "cpu", seed: int = 0) -> None:
        """`device` does the arithmetic; `seed` fixes what is sampled. Raises MissingWeights, MissingDependency."""
        self.device = torch.device(device)
        self.seed = seed
        self.count = 0

    def check(self, *pictures: Tensor) -> None:
        """Refuse pictures that `update` could not take, before any metric has counted the pair.

        Raises:
            DataError: a picture is not B,3,H,W uint8, is too small, or the pictures' sizes differ.
        """
        named = [(role, p) for role, p in zip(self.needs, pictures, strict=True) if role in PICTURES]
        for role, picture in named:
            if picture.ndim != 4 or picture.shape[1] != 3 or picture.dtype != torch.uint8:
                raise DataError(
                    f"{self.name}: the {role} must be B,3,H,W uint8, is {tuple(picture.shape)} {picture.dtype}"
                )
            if min(picture.shape[-2:]) < self.smallest:
                raise DataError(
                    f"{self.name}: the {role} is {size_text(picture)} px; it needs at least {self.smallest} px a side"
                )
        if self.same_size and len({picture.shape for _, picture in named}) > 1:
            sizes = ", ".join(f"the {role} is {size_text(picture)}" for role, picture in named)
            raise DataError(
                f"{self.name}: pictures of a pair must agree in size, {sizes} px; resize the one that is wrong"
            )

    def update(self, *pictures: Tensor) -> list[float | None] | None:
        """Add pairs: one tensor for each role in `needs`, B,3,H,W uint8 RGB (0..255) for a picture.

        The other roles are "labels" and "exemplar_labels" (B,1,H,W int32 class indices) and "condition_id" (B int64,
        equal where the condition file is).

        Returns:
            one score a pair (None: this pair has none), or None where the metric is one of whole sets.

        Raises:
            DataError: as `check`, or there are more of one role than of another.
        """
        counts = {role: len(picture) for role, picture in zip(self.needs, pictures, strict=True)}
        if self.paired and len(set(counts.values())) > 1:
            told = ", ".join(f"{count} of {role}" for role, count in counts.items())
            raise DataError(f"{self.name}: takes as many of every role, not {told}")
        self.check(*pictures)
        scores = self._add(*(picture.to(self.device) for picture in pictures))
        self.count += pictures[0].shape[0]
        return scores

    @abstractmethod
    def _add(self, *pictures: Tensor) -> list[float | None] | None:
        """Take the checked pictures, on the metric's device. Returns as `update`."""

    @abstractmethod
    def _result(self) -> dict[str, Any]:
        """At least {"value": float | None}; called only when there are pictures."""

    def state(self) -> Any:
        """What this process has gathered, for `absorb` in another one; can be pickled.

        Raises:
            ConfigError: the metric has no such thing and runs in one process only.
        """
        raise ConfigError(f"the metric {self.name} runs in one process only; start it without torchrun")

    def states(self) -> Iterator[Any]:
        """The same in pieces, each for `absorb`, where it is much: no process has to hold it all at once."""
        yield self.state()

    def absorb(self, state: Any) -> None:
        """Add what another process's `state` holds, as if its pairs had come here. The count is the caller's to add."""
        raise ConfigError(f"the metric {self.name} runs in one process only; start it without torchrun")

    def compute(self) -> dict[str, Any]:
        """{"value": float, or None where there is none, "protocol": str, "count": pairs, <details>}; JSON-able, no NaN.

        Can be called at any time; does not change the state.
        """
        result = self._result() if self.count else {"value": None, "note": "no pictures"}
        return {"value": result.pop("value"), "protocol": self.protocol, "count": self.count, **result}


def size_text(picture: Tensor) -> str:
    """WIDTHxHEIGHT of a B,C,H,W tensor, for messages."""
    return f"{picture.shape[-1]}x{picture.shape[-2]}"
