"""Released weights: one safetensors file with the config inside. (Resume states are another thing: `train/state.py`.)

A file holds the tensors of the model's `state_dict()`, stored as bfloat16 or float32, and the metadata
`cocosctl.config` (the config tree as JSON). It is read without running any code, and a file that does not
fit is refused.
"""

from __future__ import annotations

import json
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
from cocosnet.weights import search_folders

CONFIG_KEY = "cocosctl.config"
ASSET_FOLDER = Path(__file__).parent / "assets"
SHIPPED = ("demo", "facades-small", "fashion-small")  # checkpoints inside the package, by name


def load_model(weights: str | Path, device: str = "auto") -> Model:
    """Load a model by a shipped name (`demo`) or a file, in evaluation mode, frozen.

    Raises:
        MissingWeights: there is no such name or file.
        CheckpointError: the file is damaged, is no CoCosNet checkpoint, or does not fit the config that it holds.
        MissingDependency: the device is not there.
    """
    target = resolve_device(device)
    path = find_checkpoint(weights)
    model = build_model(read_checkpoint(path)[0])
    load_tensors(model, path)
    model = model.to(target, memory_format=layout_of(model.config))
    return model.eval().requires_grad_(False)


def load_tensors(model: Model, path: Path) -> None:
    """Fill a model from a checkpoint, whose every tensor must fit. Raises CheckpointError listing what does not."""
    tensors = read_checkpoint(path)[1]
    _check_fit(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)


def save_model(
    path: str | Path, model: Model, metadata: dict[str, str] | None = None, *, compact: bool = False
) -> None:
    """Write a model atomically. `metadata`: further text, such as how it was trained. `compact` stores bfloat16.

    Raises:
        DataError: the file cannot be written.
    """
    dtype = torch.bfloat16 if compact else torch.float32
    tensors = {name: _stored(tensor, dtype) for name, tensor in model.state_dict().items()}
    texts = {**(metadata or {}), CONFIG_KEY: json.dumps(config_to_dict(model.config))}
    with atomic_path(path, (SafetensorError,)) as temporary:
        save_file(tensors, str(temporary), metadata=texts)


def find_checkpoint(weights: str | Path) -> Path:
    """The file behind a shipped name or a path. Raises MissingWeights with the names and the remedy."""
    shipped = ASSET_FOLDER / f"{weights}.safetensors"
    if str(weights) in SHIPPED and shipped.is_file():
        return shipped
    imported = imported_folder() / f"{weights}.safetensors"
    if str(weights) == Path(weights).name and not Path(weights).exists() and imported.is_file():
        return imported
    path = Path(weights)
    if path.is_dir() and (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if not path.is_file():
        raise MissingWeights(
            f"{str(weights)!r}: no such checkpoint; give a .safetensors file, a run folder of "
            f"`cocosctl train`, or a shipped name: {', '.join(SHIPPED)}"
        )
    return path


def imported_folder() -> Path:
    """Where `cocosctl weights import` puts checkpoints, which can then be called by name: the first weights folder."""
    return search_folders()[0] / "cocosctl"


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
    """`auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`. Raises MissingDependency where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
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


def _check_fit(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that does not fit, with what is wrong."""
    faults = fit_faults(wanted, found)
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path}: does not fit its config: {'; '.join(faults[:3])}{more}")
