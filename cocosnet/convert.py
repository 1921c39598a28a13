"""The authors' release to a checkpoint of ours: names, spectral norms and shapes.

The release saves one state dict a network: `latest_net_Corr.pth`, `latest_net_G.pth` and `latest_net_D.pth`. Widths and
channel counts are read off the tensors' shapes. What does not fit is listed, all of it.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cocosnet.checkpoint import fit_faults
from cocosnet.config import Config, config_from_dict
from cocosnet.errors import CheckpointError
from cocosnet.model.release import ReleaseCoCosNet

logger = logging.getLogger(__name__)
_SIGNS = (  # a key that only one of the networks has, and the prefix of that network's keys in ours
    ("adaptive_model_seg.layer1.0.weight", ""),
    ("conv_img.weight", "translator."),
    ("discriminator_0.model0.0.weight", "discriminator."),
)
_RENAMED = (  # the correspondence network's parts
    (re.compile(r"^adaptive_model_seg\."), "condition_encoder."),
    (re.compile(r"^adaptive_model_img\."), "image_encoder."),
    (re.compile(r"^(theta|phi)_(\d)\."), r"hierarchy.\1.\2."),
    (re.compile(r"^patch_match\."), "hierarchy.patch_match."),
)
_SAVED_BY_PYTORCH = (b"PK", b"\x80")  # how a .pth starts: as a zip archive, or, until 1.6, as a pickle
_UNUSED = re.compile(r"^discriminator_\d\.dec\.")  # a decoder that the release builds and never calls


def convert_release(files: Iterable[str | Path], compat: str = "release") -> ReleaseCoCosNet:
    """The model that the release's files describe: Corr and G, and D where it is given. Evaluation mode, float32.

    compat: `release`, or `release-fixed`, which mends three defects of its matching (docs/release.md).

    Raises:
        CheckpointError: a file cannot be read, holds more than tensors, or is none of the three networks; Corr or G is
            missing; or keys or shapes do not fit, all of which the message lists, a line each after the first.
    """
    tensors: dict[str, Tensor] = {}
    found: set[str] = set()
    for path in map(Path, files):
        state = fold_spectral_norms(read_state(path), path)
        prefix = _network(state, path)
        if prefix in found:
            raise CheckpointError(f"{path}: this network was given twice; give Corr, G and, at will, D")
        found.add(prefix)
        tensors |= {prefix + _renamed(name): value for name, value in state.items() if not _UNUSED.match(name)}
    if not {"", "translator."} <= found:
        raise CheckpointError("the release's Corr and G are both needed (latest_net_Corr.pth, latest_net_G.pth)")
    return _filled(tensors, compat)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, float32, names without `module.`; no code in it is ever run.

    Raises:
        CheckpointError: it cannot be read, or is not a flat dictionary of tensors.
    """
    if not path.is_file():
        what = "a folder, no file" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {what}; give the release's .pth files, or .safetensors of them")
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError, struct.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); fetch it again") from error
    except Exception as error:  # the loader refuses anything but tensors with a class of its own
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(f"{path}: {_why_refused(path)}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: not a state dict: expected names of tensors and nothing else")
    return {name.removeprefix("module."): value.float() for name, value in state.items()}


def _why_refused(path: Path) -> str:
    """What to say of a file that PyTorch's loader of plain tensors refuses: by its first bytes."""
    with path.open("rb") as file:
        start = file.read(2)
    if start.startswith(_SAVED_BY_PYTORCH):
        return "holds more than plain tensors, and what else is in it is not run"
    return "not a checkpoint; give a .pth that PyTorch saved, or .safetensors"


def fold_spectral_norms(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`weight_orig`, `weight_u`, `weight_v` become the `weight` of evaluation mode, weight_orig / (u W v).

    Raises CheckpointError where one of the three is missing or does not fit the others.
    """
    folded = {}
    for name, value in state.items():
        if name.endswith(("weight_u", "weight_v")) and f"{name[:-1]}orig" in state:
            continue
        if name.endswith("weight_orig"):
            base = name.removesuffix("_orig")
            u, v, matrix = state.get(f"{base}_u"), state.get(f"{base}_v"), value.flatten(1)
            if u is None or v is None or (*u.shape, *v.shape) != tuple(matrix.shape):
                raise CheckpointError(f"{path}: {base}: its spectral norm's vectors are missing or do not fit it")
            folded[base] = value / torch.dot(u, torch.mv(matrix, v))
        else:
            folded[name] = value
    return folded


def release_config(tensors: dict[str, Tensor], compat: str = "release") -> Config:
    """The config of renamed tensors, read off their shapes. Raises KeyError or IndexError where one is missing."""

    def outputs(*names: str) -> list[int]:
        return [tensors[name].shape[0] for name in names]

    encoder, blocks = "condition_encoder.", ("head_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3")
    channels = tensors[f"{encoder}layer1.0.weight"].shape[1]
    block = "hierarchy.patch_match."
    judged = "discriminator.discriminator_0.model0.0.weight"
    model = {
        "encoder": {
            "stem_width": outputs(f"{encoder}layer1.0.weight")[0],
            "widths": outputs(*(f"{encoder}layer{i}.0.0.weight" for i in range(2, 6))),
            "spade_hidden": outputs(f"{encoder}head_0.norm_0.mlp_shared.1.weight")[0],
            "exemplar_condition": True,
        },
        "matching": {
            "compat": compat,
            "channels": outputs("hierarchy.theta.0.weight")[0],
            "candidates": tensors[f"{block}refine_net.encoder.convc1.weight"].shape[1],
            "hidden": outputs(f"{block}initial_layer.0.weight")[0],
        },
        "translator": {
            "widths": outputs(*(f"translator.{name}.conv_1.weight" for name in blocks)),
            "spade_hidden": outputs("translator.head_0.norm_0.mlp_shared.1.weight")[0],
            "use_condition": True,
        },
        "discriminator": {"scales": 2, "width": outputs(judged)[0]} if judged in tensors else {"scales": 0},
    }
    return config_from_dict({"data": _data(channels), "model": model})


def _data(channels: int) -> dict[str, object]:
    """Conditions of that many channels: 20 are the release's poses, 1 is edges, others are one-hot labels."""
    task = {20: "pose", 1: "edge"}.get(channels, "mask")
    return {"task": task, "size": 512, "classes": channels - 1 if task == "mask" else 0}


def _filled(tensors: dict[str, Tensor], compat: str = "release") -> ReleaseCoCosNet:
    try:
        config = release_config(tensors, compat)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"not the release's networks: {error} is missing or has no such dimension") from error
    with torch.device("meta"):
        model = ReleaseCoCosNet(config)
    faults = fit_faults(model.state_dict(), tensors)
    if faults:
        raise CheckpointError(_listed("the release's files do not fit each other or its networks", faults))
    model.load_state_dict(tensors | _shared(tensors), assign=True)
    return model.eval().requires_grad_(False)


def _shared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release has one PReLU in each residual block and saves it twice. Where the two differ, which is said, the one
    that PyTorch would load last counts, as in the release's own code."""
    pairs = {name: name.replace(".relu.", ".model.3.") for name in tensors if name.endswith(".1.relu.weight")}
    differing = [name for name, other in pairs.items() if not torch.equal(tensors[name], tensors[other])]
    if differing:
        text = "%s and %d others were saved twice and differ; the second counts"
        logger.warning(text, differing[0], len(differing) - 1)
    return {name: tensors[other] for name, other in pairs.items()}


def _listed(head: str, faults: Sequence[str]) -> str:
    return "; ".join([f"{head}: {len(faults)} faults", *faults])


def _network(state: dict[str, Tensor], path: Path) -> str:
    for sign, prefix in _SIGNS:
        if sign in state:
            return prefix
    if any(name.startswith(("adaptive_model_seg.", "corr.", "phi.")) for name in state):
        raise CheckpointError(f"{path}: looks like CoCosNet v1 or another release; only CoCosNet v2's can be imported")
    raise CheckpointError(f"{path}: none of the release's networks Corr, G or D; its first key is {_first(state)!r}")


def _first(state: dict[str, Tensor]) -> str:
    return next(iter(state), "(none)")


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
