"""What the tests of the command line share: real processes, and small pictures to feed them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COCOSCTL = [sys.executable, "-m", "cocosctl"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cocosctl"]
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `cocosctl ARGUMENTS` to its end in a process of its own."""
    return subprocess.run(
        [*COCOSCTL, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env=clean_environment(**environment),
    )


def clean_environment(**environment: str) -> dict[str, str]:
    """This process's environment: no downloads, one thread, and the sources on the path wherever the test runs."""
    paths = [str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])]
    return (
        os.environ
        | {"COCOSCTL_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        | environment
    )


def lines(text: str) -> list[dict]:
    """JSON lines as objects; anything else on the stream is an error here."""
    return [json.loads(line) for line in text.splitlines()]


def draw_pictures(folder: Path, count: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Write `count` different pictures p0.png, p1.png, .. (width, height = `size`) with a gradient and a shape each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
        picture = Image.fromarray(
            np.stack([np.tile(np.roll(ramp, 7 * index * (c + 1)), (size[1], 1)) for c in range(3)], 2)
        )
        x, y = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        ImageDraw.Draw(picture).ellipse(
            [x, y, x + size[0] // 3, y + size[1] // 3], fill=tuple(rng.integers(0, 255, 3).tolist())
        )
        picture.save(folder / f"p{index}.png")
    return folder


def broken_torchvision(folder: Path) -> None:
    """Put a torchvision into `folder` that fails as one that was made for another PyTorch."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
