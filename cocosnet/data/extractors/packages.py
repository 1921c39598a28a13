"""Optional packages: imported on demand, named with their versions, and kept from talking."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from cocosnet.errors import MissingDependency


def require(module: str, extra: str) -> Any:
    """Import an optional package. Raises MissingDependency with the way to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between packages are no news to a user
            return importlib.import_module(module)
    except Exception as error:  # broken installations raise all sorts of things
        raise MissingDependency(f"{module} does not load ({error}); pip install '{extra}'") from error


def package_version(package: str) -> str:
    """Version of an installed package, `unknown` where it does not say."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def mediapipe_process(make: Callable[[], Any]) -> Callable[[np.ndarray], Any]:
    """`process` of the MediaPipe solution that `make` returns, a function of H,W,3 uint8 RGB.

    MediaPipe writes notes to stderr when it starts, and a warning with every picture; neither is let through.
    """
    with _quiet_stderr():
        network = make()
        network.process(np.zeros((64, 64, 3), np.uint8))

    def process(pixels: np.ndarray) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return network.process(np.ascontiguousarray(pixels))

    return process


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send what this process writes to stderr, compiled code included, to nowhere."""
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed: nothing to keep quiet
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
