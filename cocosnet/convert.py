"""The authors' release to a checkpoint of ours: names, spectral norms and shapes.

The release saves one state dict a network: `latest_net_Corr.pth`, `latest_net_G.pth` and `latest_net_D.pth`. Widths and
channel counts are read off the tensors' shapes. What does not fit is listed, all of it, by the files' own names.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cocosnet.checkpoint import fit_faults
from cocosnet.config import Config, config_from_dict
from cocosnet.errors import CheckpointError
from cocosnet.model.release import ReleaseCoCosNet

CORR, G, D = "", "translator.", "discriminator."  # the networks, by how their tensors' names begin in ours
_SIGNS = (  # how names begin that only one of the networks has
    (CORR, ("adaptive_model_seg.", "theta_0.", "patch_match.")),
    (G, ("conv_img.",)),
    (D, ("discriminator_",)),
)
_SIGNS_V1 = ("theta.", "phi.")  # CoCosNet v1 matches one level, so these have no number
_RENAMED = (  # beginnings in ours and in the release's correspondence network
    ("condition_encoder.", "adaptive_model_seg."),
    ("image_encoder.", "adaptive_model_img."),
    ("hierarchy.theta.", "theta_"),
    ("hierarchy.phi.", "phi_"),
    ("hierarchy.patch_match.", "patch_match."),
)
_SAVED_BY_PYTORCH = (b"PK", b"\x80")  # how a .pth starts: as a zip archive, or, until 1.6, as a pickle
_UNUSED = re.compile(r"^discriminator_\d+\.dec\.")  # a decoder that the release builds and never calls
_SHORTCUT = re.compile(r"\.(conv|norm)_s\.")  # of a block whose widths differ


@dataclass(frozen=True)
class _File:
    """One network's file: its tensors, spectral norms folded, and the names of those that were folded."""

    path: Path
    state: dict[str, Tensor]
    folded: frozenset[str]
    faults: tuple[str, ...]  # of its spectral norms

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by the names that the file has for them."""
        return {f"{name}_orig" if name in self.folded else name: value for name, value in tensors.items()}


def convert_release(
    files: Iterable[str | Path], compat: str = "release", on_note: Callable[[str], None] = lambda text: None
) -> ReleaseCoCosNet:
    """The model that the release's files describe: Corr and G, and D where it is given. Evaluation mode, float32.

    compat: `release`, or `release-fixed`, which mends three defects of its matching (docs/release.md).
    on_note: is told what a user may want to know of files that fit.

    Raises:
        CheckpointError: a file cannot be read, holds more than tensors, or is none of the three networks; Corr or G is
            missing; or keys or shapes do not fit, all of which the message lists.
    """
    networks: dict[str, _File] = {}
    for path in map(Path, files):
        state = read_state(path)
        network = _network(state, path)
        if network in networks:
            raise CheckpointError(f"{path}: this network was given twice; give Corr, G and, at will, D")
        networks[network] = _folded({name: x for name, x in state.items() if not _UNUSED.match(name)}, path)
    if not {CORR, G} <= networks.keys():
        raise CheckpointError("the release's Corr and G are both needed (latest_net_Corr.pth, latest_net_G.pth)")
    return _filled(networks, compat, on_note)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, float32, names without `module.`; no code in it is ever run.

    Raises:
        CheckpointError: it cannot be read, or is not a flat dictionary of tensors of plain numbers.
    """
    if not os.path.isfile(path):
        what = "a folder, no file" if os.path.isdir(path) else "no such file"
        raise CheckpointError(f"{path}: {what}; give the release's .pth files, or .safetensors of them")
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            with warnings.catch_warnings(action="ignore"):  # of pickles that it then refuses
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # two foreign readers, which fail in many ways
        raise CheckpointError(f"{path}: {_why_unread(path, error)}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: not a state dict: expected names of tensors and nothing else")
    unfit = [f"{name} is {tuple(x.shape)}, {x.dtype}, {x.layout}" for name, x in state.items() if not _plain(x)]
    if unfit:
        raise CheckpointError(f"{path}: tensors that are empty, or not of plain numbers: {'; '.join(unfit)}")
    return {name.removeprefix("module."): value.float() for name, value in state.items()}


def _plain(tensor: Tensor) -> bool:
    odd = tensor.is_quantized or tensor.is_complex() or tensor.is_meta or tensor.layout != torch.strided
    return tensor.numel() > 0 and not odd


def _why_unread(path: Path, error: Exception) -> str:
    """What to say of a file that its reader refuses."""
    if type(error).__name__ != "UnpicklingError":  # how the loader refuses anything but tensors
        return f"not a readable checkpoint ({' '.join(str(error).split())[:160]}); fetch it again"
    with path.open("rb") as file:
        start = file.read(2)
    if start.startswith(_SAVED_BY_PYTORCH):
        return "holds more than plain tensors, and what else is in it is not run"
    return "not a checkpoint; give a .pth that PyTorch saved, or .safetensors"


def _network(state: dict[str, Tensor], path: Path) -> str:
    """Which of the networks a file holds. Raises CheckpointError where it is none of them."""
    if any(name.startswith(_SIGNS_V1) for name in state):
        raise CheckpointError(f"{path}: looks like CoCosNet v1's matching; only CoCosNet v2's files can be imported")
    for network, signs in _SIGNS:
        if any(name.startswith(signs) for name in state):
            return network
    first = next(iter(state), "(none)")
    raise CheckpointError(f"{path}: none of the release's networks Corr, G or D; its first key is {first!r}")


def _folded(state: dict[str, Tensor], path: Path) -> _File:
    """`weight_orig`, `weight_u`, `weight_v` become the `weight` of evaluation mode, weight_orig / (u W v)."""
    found, faults = {}, []
    folded = frozenset(name.removesuffix("_orig") for name in state if name.endswith("weight_orig"))
    for name, value in state.items():
        if name.endswith("weight_orig"):
            base = name.removesuffix("_orig")
            divisor = _singular_value(value, state.get(f"{base}_u"), state.get(f"{base}_v"))
            found[base] = value if divisor is None else value / divisor
            if divisor is None:
                faults.append(f"{name} lacks its vectors {base}_u and {base}_v, or they do not fit it")
        elif not (name.endswith(("weight_u", "weight_v")) and name[:-2] in folded):
            found[name] = value
    return _File(path, _twice(found), folded, tuple(faults))


def _singular_value(weight: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor | None:
    """u W v, or None where the three do not fit each other.

    Of copies in memory of PyTorch's own: the math library adds in another order where a vector does not begin at a
    multiple of 64 bytes, as in a file that was read whole, and matching turns on the last bits.
    """
    if u is None or v is None or weight.dim() < 2:
        return None
    matrix = weight.flatten(1)
    fits = u.shape == matrix.shape[:1] and v.shape == matrix.shape[1:]
    return torch.dot(u.clone(), torch.mv(matrix.clone(), v.clone())) if fits else None


def _twice(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With both names of every PReLU; safetensors' own `save_model` keeps one of two names of a tensor."""
    pairs = [(name, other) for pair in _prelu_names(state) for name, other in (pair, pair[::-1])]
    return state | {name: state[other] for name, other in pairs if name not in state}


def _prelu_names(state: Iterable[str]) -> list[tuple[str, str]]:
    """The two names of each residual block's PReLU, either of which is there."""
    first, second = ".1.relu.weight", ".1.model.3.weight"
    blocks = dict.fromkeys(n.removesuffix(end) for n in state for end in (first, second) if n.endswith(end))
    return [(block + first, block + second) for block in blocks]


class _Sizes:
    """Reads sizes off shapes. What is not there is noted in `unread`, and stands in as 1."""

    def __init__(self, state: dict[str, Tensor]):
        self.state, self.unread = state, []

    def __call__(self, name: str, axis: int = 0) -> int:
        shape = self.state[name].shape if name in self.state else ()
        if axis < len(shape):
            return shape[axis]
        self.unread.append(name)
        return 1

    def outputs(self, *names: str) -> list[int]:
        return [self(name) for name in names]


def _config(networks: dict[str, _File], compat: str) -> tuple[Config, set[str]]:
    """The config of the networks' shapes, and the files' names off which a size could not be read."""
    sizes = {network: _Sizes(file.state) for network, file in networks.items()}
    corr, g = sizes[CORR], sizes[G]
    encoder, blocks = "adaptive_model_seg.", ("head_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3")
    channels = corr(f"{encoder}layer1.0.weight", 1)
    model = {
        "encoder": {
            "stem_width": corr(f"{encoder}layer1.0.weight"),
            "widths": corr.outputs(*(f"{encoder}layer{i}.0.0.weight" for i in range(2, 6))),
            "spade_hidden": corr(f"{encoder}head_0.norm_0.mlp_shared.1.weight"),
            "exemplar_condition": True,
        },
        "matching": {
            "compat": compat,
            "channels": corr("theta_0.weight"),
            "candidates": corr("patch_match.refine_net.encoder.convc1.weight", 1),
            "hidden": corr("patch_match.initial_layer.0.weight"),
        },
        "translator": {
            "widths": g.outputs(*(f"{name}.conv_1.weight" for name in blocks)),
            "spade_hidden": g("head_0.norm_0.mlp_shared.1.weight"),
            "use_condition": True,
        },
        "discriminator": _judges(sizes[D]) if D in sizes else {"scales": 0},
    }
    config = config_from_dict({"data": _data(channels), "model": model})
    return config, {name for read in sizes.values() for name in read.unread}


def _judges(d: _Sizes) -> dict[str, int]:
    """The discriminator's section: as many scales as there are numbered parts."""
    scales = {name.partition(".")[0] for name in d.state if name.startswith("discriminator_")}
    return {"scales": len(scales), "width": d("discriminator_0.model0.0.weight")}


def _data(channels: int) -> dict[str, object]:
    """Conditions of that many channels: 20 are the release's poses, 1 is edges, others are one-hot labels."""
    task = {20: "pose", 1: "edge"}.get(channels, "mask")
    return {"task": task, "size": 512, "classes": channels - 1 if task == "mask" else 0}


def _filled(networks: dict[str, _File], compat: str, on_note: Callable[[str], None]) -> ReleaseCoCosNet:
    config, unread = _config(networks, compat)
    with torch.device("meta"):
        model = ReleaseCoCosNet(config)
    wanted, places = model.state_dict(), {name: _place(name) for name in model.state_dict()}
    faults = []
    for network, file in networks.items():
        own = {name: wanted[ours] for ours, (owner, name) in places.items() if owner == network}
        found = _faults(file, own, unread)
        faults += [f"{file.path}: {found[0]}", *found[1:]] if found else []
    if faults:
        raise CheckpointError("; ".join([_head(len(faults), unread), *faults]))
    _settle_prelus(networks[CORR].state, on_note)
    model.load_state_dict({ours: networks[owner].state[name] for ours, (owner, name) in places.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _place(name: str) -> tuple[str, str]:
    """The network of a tensor of ours, and what the release calls it there."""
    network = next((network for network in (G, D) if name.startswith(network)), CORR)
    own = name.removeprefix(network)
    for ours, theirs in _RENAMED if network == CORR else ():
        if own.startswith(ours):
            return network, theirs + own.removeprefix(ours)
    return network, own


def _faults(file: _File, wanted: dict[str, Tensor], unread: set[str]) -> list[str]:
    """All that is wrong with one network's file, by its own names.

    Where sizes are `unread`, shapes cannot be compared, and which blocks have a shortcut is not known.
    """
    found, faults = file.state, list(file.faults)
    if unread:
        odd = file.named({name: found[name] for name in sorted(unread & found.keys())})
        faults += [f"{name} is {tuple(value.shape)}" for name, value in odd.items()]
        wanted = {name: found.get(name, value) for name, value in wanted.items() if not _SHORTCUT.search(name)}
        found = {name: value for name, value in found.items() if not _SHORTCUT.search(name)}
    return faults + fit_faults(file.named(wanted), file.named(found))


def _head(count: int, unread: set[str]) -> str:
    """What a list of so many faults begins with."""
    text = f"the release's files do not fit each other or its networks: {count} fault{'s' * (count > 1)}"
    return text + (", other shapes not compared for want of sizes" if unread else "")


def _settle_prelus(state: dict[str, Tensor], on_note: Callable[[str], None]) -> None:
    """The release saves each PReLU twice. Where the two differ, which is said, the one that PyTorch would load last
    counts, as in the release's own code."""
    pairs = _prelu_names(state)
    differing = [first for first, second in pairs if not torch.equal(state[first], state[second])]
    if differing:
        on_note(f"{differing[0]} and {len(differing) - 1} others were saved twice and differ; the second counts")
    state |= {first: state[second] for first, second in pairs}
