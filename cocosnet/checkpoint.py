"""Released weights: one safetensors file with the config inside. (Resume states are another thing: `train/state.py`.)

A file holds the tensors of the model's `state_dict()`, stored as bfloat16 or float32, and the metadata
`cocosctl.config` (the config tree as JSON). It is read without running any code, and a file that does not
fit is refused.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cocosnet.config import Config, config_from_dict, config_to_dict
from cocosnet.errors import CheckpointError, ConfigError, MissingDependency, MissingWeights
from cocosnet.files import atomic_path
from cocosnet.model.build import Model, build_model
from cocosnet.precision import layout_of
from cocosnet.weights import ASSET_FOLDER, imported_models

DEVICES = ("cpu", "cuda", "mps")  # kinds of device that networks run on
CONFIG_KEY = "cocosctl.config"
MODEL_NAME = "model.safetensors"  # in a run folder
SHIPPED = ("demo", "facades-small", "fashion-small")  # checkpoints inside the package, by name


def load_model(weights: str | Path, device: str = "auto") -> Model:
    """Load a model by a name (`demo`) or a path, as `find_checkpoint` takes them, in evaluation mode, frozen.

    Raises:
        MissingWeights: there is no such name or file.
        CheckpointError: the file is damaged, is no CoCosNet checkpoint, or does not fit the config that it holds; or
            the name is also a path.
        MissingDependency: the device is not there.
    """
    target = resolve_device(device)
    path = find_checkpoint(weights)
    config, tensors = read_checkpoint(path)
    model = build_model(config)
    fill_model(model, tensors, path)
    model = model.to(target, memory_format=layout_of(model.config))
    return model.eval().requires_grad_(False)


def load_tensors(model: Model, path: Path) -> None:
    """Fill a model of any config from a checkpoint, whose every tensor must fit; its own config does not count.

    Raises CheckpointError listing what does not fit.
    """
    _fill(model, read_checkpoint(path)[1], path, "the config at hand")


def fill_model(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill a model of the config that `path` holds with the tensors that were read from it, as `load_tensors` does."""
    _fill(model, tensors, path, "its config")


def _fill(model: Model, tensors: dict[str, Tensor], path: Path, config: str) -> None:
    faults = fit_faults(model.state_dict(), tensors)
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path}: does not fit {config}: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(tensors)


def save_model(
    path: str | Path, model: Model, metadata: dict[str, str] | None = None, *, compact: bool = False
) -> None:
    """Write a model atomically. `metadata`: further text, such as how it was trained. `compact` stores bfloat16.

    The same model and texts give the same bytes: outputs are up to date by the hash of the file that they are made of.

    Raises:
        DataError: the file cannot be written.
    """
    dtype = torch.bfloat16 if compact else torch.float32
    tensors = {name: _stored(tensor, dtype) for name, tensor in model.state_dict().items()}
    texts = {**(metadata or {}), CONFIG_KEY: json.dumps(config_to_dict(model.config))}
    with atomic_path(path, (SafetensorError,)) as temporary:
        save_file(tensors, str(temporary), metadata=texts)
        _sort_texts(temporary)


def _sort_texts(path: Path) -> None:
    """Put the texts of a safetensors file in order, in their place; the library writes them in a random one."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # it is, unless the library escapes a character that Python does not need to
            file.seek(8)
            file.write(text.ljust(length))


def find_checkpoint(weights: str | Path) -> Path:
    """The file behind a name, shipped or imported, or behind a path: a file or a run folder. A `Path` is never a name.

    Raises:
        MissingWeights: there is no such name or file, or the run has no checkpoint yet; the message says the remedy.
        CheckpointError: a model's name is also a file or a run folder in the working folder.
    """
    path = Path(weights)
    named = None if isinstance(weights, Path) else named_models().get(weights)
    here = next((f for f in (path, path / MODEL_NAME) if os.path.isfile(f)), None)
    run = os.path.isfile(path / "config.yaml")
    if named and (here or run):
        raise CheckpointError(
            f"{weights!r} is the name of a model ({named}) and of what lies in this folder: write ./{weights} for the "
            "latter, or give the model's own path"
        )
    if run and not here:
        raise MissingWeights(f"{path}: this run has no checkpoint yet; train.save_images says when it writes one")
    if not (named or here) and path.suffix == ".safetensors" and os.path.isfile(path.parent / "config.yaml"):
        raise MissingWeights(
            f"{path}: the run has not written this file; give the folder {path.parent} for what it has, or wait for "
            "the first validation, which needs held-out pictures"
        )
    if not (named or here):
        raise MissingWeights(
            f"{str(weights)!r}: no such checkpoint; give a .safetensors file, a run folder of `cocosctl train`, or the "
            f"name of a shipped or imported model: {', '.join(named_models())}"
        )
    return named or here


def named_models() -> dict[str, Path]:
    """The checkpoints that have a name: the shipped ones, and those of `cocosctl weights import`."""
    shipped = {name: ASSET_FOLDER / f"{name}.safetensors" for name in SHIPPED}
    shipped = {name: path for name, path in shipped.items() if path.is_file()}
    return shipped | imported_models() | shipped


def read_checkpoint(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors (float32) of a checkpoint. Raises CheckpointError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); it may be half-written or of another "
            "kind, fetch or train it again"
        ) from error
    try:
        return config_from_dict(json.loads(metadata[CONFIG_KEY])), tensors
    except KeyError:
        raise CheckpointError(
            f"{path}: holds no config under {CONFIG_KEY!r}, so it is not a CoCosNet checkpoint"
        ) from None
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: its config cannot be used: {error}") from error


def read_metadata(weights: str | Path) -> dict[str, str]:
    """The texts that a checkpoint carries, without its tensors. Raises MissingWeights or CheckpointError."""
    path = find_checkpoint(weights)
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def resolve_device(device: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or `mps`. Raises MissingDependency if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type not in DEVICES:
            raise RuntimeError(f"{place.type} is none of {', '.join(DEVICES)}")
        torch.empty(0, device=place)
        return place
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MissingDependency(
            f"device {device!r} cannot be used here: {reason}; take --device cpu or auto"
        ) from error


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    return tensor.clone(
        memory_format=torch.contiguous_format
    )  # levels share a refinement; a file must not share memory


def fit_faults(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape, a text each."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    return faults + [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
