"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, weights and golden cases; skips where it is absent."""
    folder = Path(os.environ.get("COCOSCTL_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}; point COCOSCTL_SHARED at it")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Training tests compare bits, which depend on the number of threads; the others run as they are."""
    import torch

    before = torch.get_num_threads()
    if "train" in request.module.__name__:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, for a test that takes several; afterwards there are as many as before."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
