"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
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
