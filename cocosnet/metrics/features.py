"""The networks that metrics look through, each loaded once and run once a picture however many metrics ask."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocosnet.doors import import_package
from cocosnet.errors import CheckpointError
from cocosnet.losses.perceptual import Vgg, load_perceptual
from cocosnet.weights import fingerprint

_shared: ContextVar[list[tuple[Remembering, Tensor, Any]] | None] = ContextVar("shared", default=None)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """The context in which each picture passes a network once, however many metrics ask; its pixels must not change."""
    token = _shared.set([])
    try:
        yield
    finally:
        _shared.reset(token)


class Remembering:
    """A function of batches of pictures that remembers its results by the batch's identity, within `sharing` only.

    Outside of it a caller may fill the same tensor with other pictures, which cannot be told.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function

    def __call__(self, batch: Tensor) -> Any:
        """The function's result for this very tensor."""
        known = _shared.get()
        for function, pictures, result in known or ():
            if function is self and pictures is batch:
                return result
        result = self._function(batch)
        if known is not None:
            known.append((self, batch, result))
        return result


class VggFeatures:
    """Rectified maps of a VGG for batches of pictures: B,3,H,W uint8 to `VggMaps`.

    Metrics name their layers when they are made, so that one pass serves all of them.
    """

    def __init__(self, network: str, device: torch.device) -> None:
        self._network = load_perceptual(network, device)
        self._layers: set[str] = set()
        self._maps = Remembering(lambda batch: VggMaps(self._network, batch, self._layers))
        self._resized: dict[int, Remembering] = {}

    def want(self, layers: Iterable[str]) -> None:
        """Layers that will be asked for."""
        self._layers |= set(layers)

    def __call__(self, batch_B3HW: Tensor) -> VggMaps:
        """Maps of the layers that are wanted."""
        return self._maps(batch_B3HW)

    def at(self, batch_B3HW: Tensor, side: int) -> VggMaps:
        """Maps of the pictures at side x side px (bilinear, antialiased, rounded)."""
        if batch_B3HW.shape[-2:] == (side, side):
            return self._maps(batch_B3HW)
        remembering = self._resized.setdefault(side, Remembering(lambda batch: resized(batch, side)))
        return self._maps(remembering(batch_B3HW))


class VggMaps:
    """{layer: B,C,h,w float32} of one batch, computed as deep as is asked for; what lies above is kept for the next."""

    def __init__(self, network: Vgg, batch_B3HW: Tensor, layers: Iterable[str]) -> None:
        self._layers = frozenset(layers)
        self._rest = network.maps(batch_B3HW.float() / 127.5 - 1)
        self._found: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __getitem__(self, layer: str) -> Tensor:
        while layer not in self._found:
            name, found = next(self._rest)
            if name in self._layers:
                self._found[name] = found
        return self._found[layer]


def vgg_features(network: str, device: torch.device, layers: Iterable[str]) -> VggFeatures:
    """The features of the VGG "vgg16-caffe" or "vgg19", shared by all that ask while the weight file is the same.

    Raises:
        MissingWeights, CheckpointError: as `load_perceptual`.
    """
    features = _shared_vgg(network, device, fingerprint(network)["sha256"])
    features.want(layers)
    return features


@functools.lru_cache(maxsize=2)
def _shared_vgg(network: str, device: torch.device, sha256: str) -> VggFeatures:
    return VggFeatures(network, device)


def resized(batch_B3HW: Tensor, side: int) -> Tensor:
    """uint8 pictures at side x side px (bilinear, antialiased, rounded)."""
    small = F.interpolate(batch_B3HW.float(), size=(side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).byte()


def load_lpips(network: str, path: Path) -> torch.nn.Module:
    """The package's LPIPS (version 0.1) with the trunk "alex" or "vgg" from torchvision's file at `path`.

    Raises:
        MissingDependency: the package does not load.
        CheckpointError: the file is damaged or of another network.
    """
    lpips = import_package("lpips", "lpips", "the package lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in an old way
        model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)  # "rand": it must not fetch the trunk itself
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {key: state[f"features.{key.split('.', 1)[1]}"] for key in model.net.state_dict()}
        model.net.load_state_dict(wanted)
    except Exception as error:  # a damaged file raises nearly anything, from KeyError to UnpicklingError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not torchvision's {network} weights ({reason}); fetch it again") from error
    return model.eval().requires_grad_(False)
