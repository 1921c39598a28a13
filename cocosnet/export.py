"""A model as a file that runs without this package: a `torch.export` program (.pt2) or ONNX (.onnx).

The graph holds the whole of `model(condition, exemplar)`. Its matching is the reference engine's, plain PyTorch; the
weights are in the file, with the spectral norms folded in. Sizes are fixed, or open within limits. What was written is
run before it is kept, by PyTorch or by onnxruntime, and compared with the model itself.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet import __version__
from cocosnet.checkpoint import CONFIG_KEY, fill_model, find_checkpoint, load_model, read_checkpoint
from cocosnet.config import Config, config_to_dict
from cocosnet.data.images import load_rgb, shown, to_tensor
from cocosnet.errors import CocosError, ConfigError, DataError, MissingDependency
from cocosnet.files import atomic_path
from cocosnet.inference import MIN_SIDE
from cocosnet.model.build import Model, build_model
from cocosnet.model.layers import fold_spectral_norms
from cocosnet.weights import packed_file

FORMATS = {".pt2": "torch.export", ".onnx": "onnx"}
EXPORT_KEY = "cocosctl.export"  # where a file says what it is, as JSON
OPSET = 18  # of ONNX: what PyTorch's exporter writes without converting
LARGEST = 4096  # px a side of a fixed size
OPEN_LARGEST = 1024  # px a side of an open size: all similarities of the coarse level are held at once
ONNX_LIMIT = 1_900_000_000  # bytes of weights that fit one ONNX file, whose format ends at 2 GiB
CLOSE = 1e-3  # a pixel agrees where no channel is further off
WRONG = 0.05  # mean error of the picture, whose values span 2, at which a file is another model and is not kept
PICTURES = ("demo/mona-lisa.jpg", "demo/elizabeth.jpg")  # what is compared: the condition's and the exemplar
RANGES = {"condition": (0, 1), "exemplar": (-1, 1), "exemplar_condition": (0, 1)}  # outputs are in [-1, 1]

_AXES = {
    "condition": ("height", "width"),
    "exemplar": ("exemplar_height", "exemplar_width"),
    "exemplar_condition": ("exemplar_height", "exemplar_width"),
}

Size = tuple[int, int]  # rows, columns in px
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written. `check` compares the file's results with the model's on two of the shipped pictures."""

    path: str
    format: str  # torch.export or onnx
    bytes: int
    opset: int | None  # of ONNX
    sizes: dict[str, Any]  # height, width, exemplar_height, exemplar_width: px, or limits where open
    inputs: dict[str, list[int | str]]  # shapes; a name stands for an open size
    outputs: dict[str, list[int | str]]
    check: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Open:
    """Sizes that a file leaves open: multiples of `multiple` px, from `smallest` to `largest`."""

    multiple: int
    smallest: int
    largest: int


class Exportable(nn.Module):
    """A model whose results have names: `image` and, coarse to fine, `warp_1` .. `warp_L`."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, condition: Tensor, exemplar: Tensor, exemplar_condition: Tensor | None = None) -> Tensors:
        """Inputs as the model's. image B,3,H,W and warp_l B,3,h,w, all in [-1, 1]."""
        out = self.model(condition, exemplar, exemplar_condition)
        return {"image": out.image} | {f"warp_{level}": warp for level, warp in enumerate(out.warps, 1)}


def export_model(
    weights: str | Path,
    path: str | Path,
    size: Size | None = None,
    exemplar_size: Size | None = None,
    *,
    dynamic: bool = False,
) -> Exported:
    """Write a model to `path`, whose suffix chooses the format: .pt2 or .onnx. On the CPU, for one pair at a time.

    Args:
        weights: as for `load_model`.
        size: rows and columns of the condition in px; by default the square that the model was trained at.
        exemplar_size: the exemplar's; by default `size`.
        dynamic: leave both sizes open, within limits that the result states. `size` is then what is compared.

    Raises:
        ConfigError: another suffix, a size that cannot be, or weights too large for the format.
        MissingDependency: ONNX is asked for, and onnx, onnxscript or onnxruntime is not there.
        MissingWeights, CheckpointError: as `load_model`.
        DataError: the file cannot be written.
        CocosError: what was written gives other pictures than the model, or this PyTorch cannot write the graph as
            ONNX. Nothing is kept then.
    """
    start, form = time.perf_counter(), format_of(path)
    program = Exportable(load_plain(weights))
    if form == "onnx" and 4 * sum(value.numel() for value in program.state_dict().values()) > ONNX_LIMIT:
        raise ConfigError(f"{shown(path)}: these weights are more than one ONNX file holds (2 GiB); export to .pt2")
    config, limits = program.model.config, open_sizes(program.model) if dynamic else None
    inputs = example_inputs(config, *_checked_sizes(program.model, size, exemplar_size, limits))
    with atomic_path(path) as temporary, torch.no_grad():
        wanted = Exportable(load_model(weights, "cpu"))(**inputs)
        facts = _facts(inputs, wanted, limits)
        texts = {
            CONFIG_KEY: json.dumps(config_to_dict(config)),
            EXPORT_KEY: json.dumps({"cocosctl": __version__, **facts, "ranges": RANGES}),
        }
        _WRITERS[form](_trace(program, inputs, limits), temporary, texts, list(wanted))
        check = compare(load_exported(temporary)(**inputs), wanted)
        if not check["image"]["mean_error"] < WRONG:
            raise CocosError(f"{shown(path)}: not written, for it gives other pictures than the model: {check}")
        written = temporary.stat().st_size
    seconds = round(time.perf_counter() - start, 1)
    return Exported(str(path), form, written, OPSET if form == "onnx" else None, **facts, check=check, seconds=seconds)


def load_plain(weights: str | Path) -> Model:
    """A model that a graph can be made of: on the CPU, the reference engine, spectral norms folded. Frozen.

    Raises as `load_model`.
    """
    path = find_checkpoint(weights)
    config, tensors = read_checkpoint(path)
    if config.model.matching.backend != "exact":  # which is plain PyTorch too, and another result
        matching = dataclasses.replace(config.model.matching, backend="reference")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, matching=matching))
    model = build_model(config)
    fill_model(model, tensors, path)
    fold_spectral_norms(model.eval().requires_grad_(False))
    return model


def load_exported(path: str | Path) -> Callable[..., Tensors]:
    """What runs a file: called with the inputs by name, it returns the outputs by name.

    Raises:
        ConfigError: another suffix than .pt2 or .onnx.
        MissingDependency: onnxruntime is not there.
    """
    if format_of(path) == "torch.export":
        return torch.export.load(path).module()
    runtime = _onnx_packages()["onnxruntime"]
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(**inputs: Tensor) -> Tensors:
        results = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, results)}

    return run


def read_exported(path: str | Path) -> dict[str, Any]:
    """What a file says of itself: `cocosctl`, `sizes`, `inputs`, `outputs`, `ranges`, and its `config`.

    Raises:
        ConfigError: another suffix than .pt2 or .onnx.
        DataError: the file cannot be read or was not written by `export_model`.
        MissingDependency: onnx is not there.
    """
    texts = dict.fromkeys((EXPORT_KEY, CONFIG_KEY), "")
    try:
        if format_of(path) == "torch.export":
            torch.export.load(path, extra_files=texts)
        else:
            model = _onnx_packages()["onnx"].load(str(path), load_external_data=False)
            texts = {entry.key: entry.value for entry in model.metadata_props}
        return json.loads(texts[EXPORT_KEY]) | {"config": json.loads(texts[CONFIG_KEY])}
    except CocosError:
        raise
    except Exception as error:  # two foreign readers, which fail in many ways
        raise DataError(f"{shown(path)}: not a file of cocosctl export ({type(error).__name__})") from error


def open_sizes(model: Model) -> Open:
    """What sizes a dynamic export of a model takes: those that need no padding and fill the coarse level's K slots."""
    shape, multiple = model.config.model, model.multiple
    coarse, units = 2 ** (shape.encoder.levels - 1), 2
    while (units * multiple // coarse) ** 2 < shape.matching.candidates or units * multiple < MIN_SIDE:
        units += 1
    return Open(multiple, units * multiple, max(OPEN_LARGEST // multiple, units + 4) * multiple)


def example_inputs(config: Config, size: Size, exemplar_size: Size) -> Tensors:
    """Inputs of a model made of two shipped paintings, by name: 1,C,H,W as the model wants them.

    The condition of one channel is the painting's edges (its gradient's size), one of more channels its tones, one-hot.
    """
    photo, exemplar = (to_tensor(load_rgb(packed_file(name)))[None] for name in PICTURES)
    inputs = {"condition": _condition_of(_resized(photo, size), config), "exemplar": _resized(exemplar, exemplar_size)}
    if config.model.encoder.exemplar_condition:
        inputs["exemplar_condition"] = _condition_of(inputs["exemplar"], config)
    return inputs


def _condition_of(photo: Tensor, config: Config) -> Tensor:
    channels, grey = config.data.condition_channels, (photo.mean(1) + 1) / 2
    if channels > 1:
        tones = (grey * channels).long().clamp(0, channels - 1)
        return F.one_hot(tones, channels).permute(0, 3, 1, 2).float()
    rows, columns = torch.gradient(grey, dim=(1, 2))
    return (4 * torch.hypot(rows, columns)).clamp(0, 1).unsqueeze(1)


def _resized(image: Tensor, size: Size) -> Tensor:
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True).clamp(-1, 1)


def format_of(path: str | Path) -> str:
    """The format that a file's suffix chooses. Raises ConfigError or MissingDependency as `export_model`."""
    suffix = Path(path).suffix
    form = FORMATS.get(suffix if suffix.lower() == ".pt2" else suffix.lower())  # PyTorch knows no .PT2
    if form is None:
        raise ConfigError(
            f"{shown(path)}: the suffix chooses the format; give a name that ends in .pt2 or .onnx, in small letters"
        )
    if form == "onnx":
        _onnx_packages()
    return form


def _onnx_packages() -> dict[str, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise MissingDependency(
            f"ONNX needs {error.name or 'onnx'}, which does not load ({error}): "
            "pip install 'cocosctl[onnx]', or export to .pt2"
        ) from error
    return {"onnx": onnx, "onnxruntime": onnxruntime, "onnxscript": onnxscript}


def compare(found: Tensors, wanted: Tensors) -> dict[str, dict[str, float]]:
    """For each output: `mean_error` in its own values, and the share of its pixels `within` CLOSE in every channel."""
    errors = {name: (found[name] - value).abs() for name, value in wanted.items()}
    return {
        name: {"mean_error": error.mean().item(), "within": (error.amax(1) < CLOSE).float().mean().item()}
        for name, error in errors.items()
    }


def _checked_sizes(
    model: Model, size: Size | None, exemplar_size: Size | None, limits: Open | None
) -> tuple[Size, Size]:
    """Both sizes, their defaults filled in. Raises ConfigError for one that cannot be."""
    limits = limits or Open(1, MIN_SIDE, LARGEST)
    step = limits.multiple
    usual = min(max(-(-model.config.data.size // step) * step, limits.smallest), limits.largest)
    size = size or (usual, usual)
    exemplar_size = exemplar_size or size
    for side in (*size, *exemplar_size):
        if side % step or not limits.smallest <= side <= limits.largest:
            must = f"a multiple of {step} px " if step > 1 else ""
            raise ConfigError(
                f"a side of {side} px cannot be exported: take {must}from {limits.smallest} to {limits.largest} px"
            )
    return size, exemplar_size


def _facts(inputs: Tensors, outputs: Tensors, limits: Open | None) -> dict[str, Any]:
    """The sizes, and the shapes of inputs and outputs; where sizes are open, their names stand in the shapes."""
    whole = inputs["condition"].shape[-2:]

    def named(owner: str, shape: torch.Size) -> list[int | str]:
        if limits is None:
            return list(shape)
        sides = inputs[owner].shape[-2:]
        factors = (side // part for side, part in zip(sides, shape[-2:]))
        names = (name if factor == 1 else f"{name}/{factor}" for name, factor in zip(_AXES[owner], factors))
        return [*shape[:2], *names]

    sides = zip((*_AXES["condition"], *_AXES["exemplar"]), (*whole, *inputs["exemplar"].shape[-2:]))
    return {
        "sizes": {name: dataclasses.asdict(limits) if limits else side for name, side in sides},
        "inputs": {name: named(name, value.shape) for name, value in inputs.items()},
        "outputs": {name: named("condition", value.shape) for name, value in outputs.items()},
    }


def _trace(program: Exportable, inputs: Tensors, limits: Open | None) -> torch.export.ExportedProgram:
    """The graph at the inputs' sizes; or with open ones, for which it is traced where all four are small and differ."""
    with _hushed():
        if limits is None:
            return torch.export.export(program, (), inputs, strict=False)
        step, first = limits.multiple, limits.smallest // limits.multiple
        units = {
            name: torch.export.Dim(f"{name}_units", min=first, max=limits.largest // step)
            for owner in ("condition", "exemplar")
            for name in _AXES[owner]
        }
        small = {name: step * (first + more) for more, name in enumerate(units, 1)}
        blank = {name: x.new_zeros(1, x.shape[1], *(small[axis] for axis in _AXES[name])) for name, x in inputs.items()}
        shapes = {name: {2 + i: step * units[axis] for i, axis in enumerate(_AXES[name])} for name in inputs}
        return torch.export.export(program, (), blank, dynamic_shapes=shapes, strict=False)


def _save_program(traced: torch.export.ExportedProgram, path: Path, texts: dict[str, str], outputs: list[str]) -> None:
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    packed = io.BytesIO()  # PyTorch's own writer ends the process where the disk is full
    torch.export.save(traced, packed, extra_files=texts)
    path.write_bytes(packed.getbuffer())


def _save_onnx(traced: torch.export.ExportedProgram, path: Path, texts: dict[str, str], outputs: list[str]) -> None:
    own = {torch.ops.aten.sort.stable: _stable_sort}
    try:
        with _hushed():
            program = torch.onnx.export(traced, dynamo=True, opset_version=OPSET, output_names=outputs, verbose=False,
                                        custom_translation_table=own)  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise CocosError(
            f"PyTorch {torch.__version__} cannot write this graph as ONNX: "
            "take a newer PyTorch, fixed sizes (without --dynamic), or .pt2"
        ) from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine, a third of the file
    program.model.metadata_props.update(texts)
    program.save(str(path), external_data=False)


def _stable_sort(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort for ONNX, which has none: TopK of all, where the lower index goes first among equals."""
    from onnxscript import opset18

    count = opset18.Shape(x, start=dim) if dim == -1 else opset18.Shape(x, start=dim, end=dim + 1)
    return opset18.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


@contextmanager
def _hushed() -> Iterator[None]:
    """PyTorch's exporters tell what they do and what they have deprecated; a user can mend none of it."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


_WRITERS = {"torch.export": _save_program, "onnx": _save_onnx}
