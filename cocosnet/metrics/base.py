"""What every metric is: a name, a protocol in words, and a stream of pictures in, one dict out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from cocosnet.errors import DataError


class Metric(ABC):
    """A number over a stream of pictures. Two numbers may be compared only if their `protocol` texts are equal.

    Class attributes:
        name: as given to `--metrics`.
        protocol: one line that fixes everything the value depends on except the pictures.
        needs: the roles (fields of a pair record) that `update` takes, in that order.
        smallest: shortest side in px that the metric can handle.
        same_size: True where the pictures of a pair must agree in size (they are never resized to fit).
    """

    name: str
    protocol: str
    needs: tuple[str, ...] = ("output", "target")
    smallest: int = 1
    same_size: bool = True

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
        for role, picture in zip(self.needs, pictures, strict=True):
            if picture.ndim != 4 or picture.shape[1] != 3 or picture.dtype != torch.uint8:
                raise DataError(
                    f"{self.name}: the {role} must be B,3,H,W uint8, is {tuple(picture.shape)} {picture.dtype}"
                )
            if min(picture.shape[-2:]) < self.smallest:
                raise DataError(
                    f"{self.name}: the {role} is {size_text(picture)} px; it needs at least {self.smallest} px a side"
                )
        if self.same_size and len({picture.shape for picture in pictures}) > 1:
            sizes = ", ".join(f"the {role} is {size_text(p)}" for role, p in zip(self.needs, pictures, strict=True))
            raise DataError(
                f"{self.name}: pictures of a pair must agree in size, {sizes} px; resize the one that is wrong"
            )

    def update(self, *pictures: Tensor) -> None:
        """Add pairs: one B,3,H,W uint8 RGB tensor (0..255) for each role in `needs`. Raises DataError as `check`."""
        self.check(*pictures)
        self._add(*(picture.to(self.device) for picture in pictures))
        self.count += pictures[0].shape[0]

    @abstractmethod
    def _add(self, *pictures: Tensor) -> None:
        """Take the checked pictures, on the metric's device."""

    @abstractmethod
    def _result(self) -> dict[str, Any]:
        """At least {"value": float | None}; called only when there are pictures."""

    def compute(self) -> dict[str, Any]:
        """{"value": float, or None where there is none, "protocol": str, "count": pairs, <details>}; JSON-able, no NaN.

        Can be called at any time; does not change the state.
        """
        result = self._result() if self.count else {"value": None, "note": "no pictures"}
        return {"value": result.pop("value"), "protocol": self.protocol, "count": self.count, **result}


def size_text(picture: Tensor) -> str:
    """WIDTHxHEIGHT of a B,C,H,W tensor, for messages."""
    return f"{picture.shape[-1]}x{picture.shape[-2]}"
