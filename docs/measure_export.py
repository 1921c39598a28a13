"""Exported files of the demo model against the model, on the shipped pairs: the table of docs/export.md.

python docs/measure_export.py demo.pt2 demo.onnx

Files of open sizes, at 128x128 and at 160x112, to which the pairs are cut at the top left. For comparison: the model on
its reference engine, and the model as it is with an exemplar that noise of 1e-6 was added to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from cocosnet.data.records import read_manifest
from cocosnet.export import Exportable, Tensors, compare, load_exported, load_plain
from cocosnet.inference import Translator
from cocosnet.weights import packed_file

SIZES = ((128, 128), (160, 112))


def main(files: list[str]) -> None:
    """Print a row for each file and size."""
    translator = Translator("demo", device="cpu", raw=True, size=max(map(max, SIZES)))
    pairs = [translator.load_pair(record) for record in read_manifest(str(packed_file("demo/manifest.jsonl")))]
    model = Exportable(translator.model)
    runs = {file: load_exported(file) for file in files}
    runs |= {"reference engine": Exportable(load_plain("demo")), "exemplar + 1e-6": noisy(model)}
    for size in SIZES:
        inputs = [{"condition": cut(p.condition, size), "exemplar": cut(p.exemplar, size)} for p in pairs]
        for name, run in runs.items():
            print(row(f"| {name} | {size[0]}x{size[1]} |", run, inputs, model), flush=True)


def cut(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The top left part."""
    return image[..., : size[0], : size[1]].contiguous()


def noisy(model: Exportable) -> Callable[..., Tensors]:
    """The model on an exemplar with a little noise."""
    generator = torch.Generator().manual_seed(0)

    def run(condition: torch.Tensor, exemplar: torch.Tensor) -> Tensors:
        return model(condition, exemplar + 1e-6 * torch.randn(exemplar.shape, generator=generator))

    return run


@torch.inference_mode()
def row(head: str, run: Callable[..., Tensors], inputs: list[Tensors], model: Exportable) -> str:
    """Means over the pairs: pixels within 1e-3 and mean error, of the image and the last warp; the median time."""
    checks, seconds = [], []
    for pair in inputs:
        wanted, start = model(**pair), time.perf_counter()
        found = run(**pair)
        seconds.append(time.perf_counter() - start)
        checks.append(compare(found, wanted))

    def mean(name: str, key: str) -> float:
        return sum(check[name][key] for check in checks) / len(checks)

    parts = [f"{100 * mean(n, 'within'):.0f} %, {mean(n, 'mean_error'):.1e}" for n in ("image", "warp_2", "warp_3")]
    return " ".join((head, " | ".join([*parts, f"{sorted(seconds)[len(seconds) // 2]:.2f} s"]), "|"))


if __name__ == "__main__":
    main(sys.argv[1:])
