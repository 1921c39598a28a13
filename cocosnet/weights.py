"""External weights: what they are, where they lie, and that they are what they claim to be.

A file is looked for in $COCOSCTL_WEIGHTS_DIR and then in $TORCH_HOME/hub/checkpoints; one that has a URL is fetched
into the first of these that is set and can be written, unless COCOSCTL_OFFLINE=1. Nothing here imports PyTorch until a
download starts.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from cocosnet.errors import CheckpointError, MissingWeights
from cocosnet.files import atomic_path

logger = logging.getLogger(__name__)

ASSET_FOLDER = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class WeightFile:
    """One external file. `size` is in bytes; `url` is empty where it has to be fetched by hand from `source`."""

    name: str
    filename: str
    url: str
    sha256: str
    licence: str
    size: int
    used_by: str
    source: str
    alternatives: tuple[str, ...] = ()  # other files that do as well; their hashes are not known to us
    otherwise: str = ""  # what to do without it, for what is hard to come by


REGISTRY = {
    weight.name: weight
    for weight in (
        WeightFile(
            name="vgg19",
            filename="vgg19-dcbb9e9d.pth",
            url="https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
            sha256="dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
            licence="BSD-3-Clause (torchvision)",
            size=574_673_361,
            used_by="train with loss.perceptual: vgg19, prepare with pairs: retrieval",
            source="torchvision, ImageNet",
        ),
        WeightFile(
            name="vgg16-caffe",
            filename="vgg16_caffe_imagenet_fp16.safetensors",
            url="",
            sha256="05e27821ad04403e9f63d21d7282a0e7767cd0b4c5b0ff3d549b2a75949364fc",
            licence="CC BY 4.0 (Oxford VGG)",
            size=29_431_664,
            used_by="train with loss.perceptual: vgg16-caffe, prepare with pairs: retrieval",
            source="convolutions of Oxford's Caffe VGG-16 as fp16 safetensors (keys conv{block}_{i}.{weight,bias})",
            otherwise="train with --set loss.perceptual=vgg19, whose weights can be downloaded",
        ),
        WeightFile(
            name="hed",
            filename="hed_bsds500_fp16.safetensors",
            url="",
            sha256="55a6ad7c326f3a880b585a72dae89207b8c24f1c6fce476e279eda73f885b33c",
            licence="MIT",
            size=29_435_710,
            used_by="prepare with data.edges: hed",
            source="the PyTorch port of HED (github.com/sniklaus/pytorch-hed) as fp16 safetensors",
            alternatives=("network-bsds500.pytorch",),
            otherwise="put the port's own network-bsds500.pytorch there, or take hed-small (for faces hed-small-face), "
            "which is shipped",
        ),
        WeightFile(
            name="fid-inception",
            filename="pt_inception-2015-12-05-6726825d.pth",
            url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            licence="Apache-2.0 (pytorch-fid)",
            size=95_628_359,
            used_by="eval with the metrics fid and kid",
            source="pytorch-fid",
        ),
        WeightFile(
            name="alexnet",
            filename="alexnet-owt-7be5be79.pth",
            url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            licence="BSD-3-Clause (torchvision)",
            size=244_408_911,
            used_by="eval with the metrics lpips and diversity",
            source="torchvision, ImageNet",
        ),
        WeightFile(
            name="vgg16",
            filename="vgg16-397923af.pth",
            url="https://download.pytorch.org/models/vgg16-397923af.pth",
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            licence="BSD-3-Clause (torchvision)",
            size=553_433_881,
            used_by="eval with the metric lpips:vgg",
            source="torchvision, ImageNet",
        ),
    )
}


def weight_file(name: str) -> WeightFile:
    """The registry's entry called `name`. Raises MissingWeights for a name that it does not hold."""
    try:
        return REGISTRY[name]
    except KeyError:
        raise MissingWeights(f"no external weights are called {name!r}; known are {', '.join(REGISTRY)}") from None


def search_folders() -> list[Path]:
    """Folders that are searched, first come first served."""
    own = os.environ.get("COCOSCTL_WEIGHTS_DIR")
    return ([Path(os.path.expanduser(own))] if own else []) + [_torch_home() / "hub" / "checkpoints"]


def store_folder() -> Path:
    """The search folder that files are put into: the first that can be written or made; where none can, the first."""
    folders = search_folders()
    return next((folder for folder in folders if _can_be_written(folder)), folders[0])


def _can_be_written(folder: Path) -> bool:
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def imported_folder() -> Path:
    """Where `cocosctl weights import` puts checkpoints, which can then be called by name: below `store_folder`."""
    return store_folder() / "cocosctl"


def imported_models() -> dict[str, Path]:
    """Imported checkpoints by name, in the order of the search folders; of two of a name the first counts."""
    found: dict[str, Path] = {}
    for folder in search_folders():
        for path in sorted((folder / imported_folder().name).glob("[!.]*.safetensors")):
            found.setdefault(path.stem, path)
    return found


def locate_weights(name: str) -> Path | None:
    """Where the file of `name` lies on this machine, None if nowhere. Opens neither a socket nor the file."""
    return _locate(weight_file(name))


def has_weights(name: str) -> bool:
    """Whether the file of `name` is on this machine. Opens neither a socket nor the file."""
    return locate_weights(name) is not None


def find_weights(name: str) -> Path:
    """Path of the file of `name`, its sha256 checked; fetched first where that is possible and allowed.

    Raises:
        MissingWeights: it is not here and cannot be fetched; the message says what to put where.
        CheckpointError: it is here, or was fetched, with another content.
    """
    weight = weight_file(name)
    path = _locate(weight)
    if path is None:
        path = _download(weight)
    if path.name == weight.filename:
        _verify(path, weight.sha256)
    return path


def fingerprint(name: str) -> dict[str, str]:
    """{"file": name on this machine, "sha256": its content's}: what a result says of the weights it depends on.

    Raises:
        MissingWeights, CheckpointError: as `find_weights`.
    """
    path = find_weights(name)
    return {"file": path.name, "sha256": _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)}


def packed_file(filename: str) -> Path:
    """Path of a file that travels inside the package, e.g. `demo.safetensors`. Raises MissingWeights if it is gone."""
    path = ASSET_FOLDER / filename
    if not path.is_file():
        raise MissingWeights(f"{path}: this file belongs to the package but is not there; reinstall cocosctl")
    return path


def _torch_home() -> Path:
    """The folder that `torch.hub` derives from the environment, found without importing PyTorch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.path.expanduser(os.environ.get("TORCH_HOME", Path(cache) / "torch")))  # as it is without a home


def _locate(weight: WeightFile) -> Path | None:
    names = (weight.filename, *weight.alternatives)
    candidates = (folder / name for folder in search_folders() for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _download(weight: WeightFile) -> Path:
    """Fetch into `store_folder`; nothing is kept unless the hash is right."""
    if not weight.url or os.environ.get("COCOSCTL_OFFLINE") == "1":
        raise MissingWeights(_how_to_get(weight))
    import torch

    path = store_folder() / weight.filename
    logger.warning("fetching %s (%.0f MB) from %s", path, weight.size / 1e6, weight.url)
    with atomic_path(path) as temporary:
        try:
            torch.hub.download_url_to_file(weight.url, str(temporary), progress=False)
        except OSError as error:
            raise MissingWeights(f"{_how_to_get(weight)} (the download failed: {error})") from error
        _verify(temporary, weight.sha256, shown=weight.url)
    return path


def _how_to_get(weight: WeightFile) -> str:
    where = weight.url or weight.source
    return (
        f"the weights {weight.name!r} are not on this machine; get {weight.filename} from {where}, "
        f"sha256 {weight.sha256}, and put it at {store_folder() / weight.filename}"
        + (f"; or {weight.otherwise}" if weight.otherwise else "")
    )


def _verify(path: Path, expected: str, shown: str | None = None) -> None:
    found = sha256_of(path)
    if found != expected:
        raise CheckpointError(
            f"{shown or path}: sha256 is {found}, expected {expected}; remove the file and get it again"
        )


def sha256_of(path: Path) -> str:
    """Hash of a file's content, read once a process as long as the file does not change."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash of a file's content; size and time of change are part of the cache's key, so new content is read anew."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
