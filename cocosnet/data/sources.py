"""Where a dataset's photographs and their conditions lie: recipes, items, splits."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from cocosnet.config import Config, PrepareConfig, config_from_dict, merge_overrides
from cocosnet.data.crop import load_landmarks
from cocosnet.data.extractors import extractor_names, names_detector
from cocosnet.data.images import SUFFIXES, find_files, find_images, shown
from cocosnet.data.labels import PARTS, read_labels, read_palette
from cocosnet.data.pose import POSE_SUFFIXES
from cocosnet.data.records import is_prepared
from cocosnet.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parent.parent
CARD_FOLDERS = (_PACKAGE / "dataset_cards", _PACKAGE.parent / "datasets")  # in the wheel; in the sources
LONGEST_ID = 80  # characters before the hash


@dataclass(frozen=True)
class Item:
    """One photograph to prepare."""

    id: str
    photo: Path
    relative: str  # to the photos folder, with /
    split: str  # train or val
    labels: tuple[Path, ...] = ()  # label map, ready-made edges, pose file; empty where there is none
    points: np.ndarray | None = None  # 68,2 landmarks

    @property
    def keys(self) -> tuple[str, ...]:
        """The names by which lists may call the photograph."""
        path, plain = PurePosixPath(self.relative), _plain(self.relative)
        return (self.relative, str(path.with_suffix("")), plain, _without_suffix(plain), path.name, path.stem, self.id)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for folder in CARD_FOLDERS for path in folder.glob("*/*.yaml"))


def load_recipe(name: str, overrides: list[str] = ()) -> Config:
    """The config of a shipped recipe or of a recipe's YAML file, with `section.key=value`s applied.

    A recipe is a config of the sections data and prepare, and a summary.

    Raises:
        ConfigError: no such recipe, or one with unknown keys or values.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        found = [path for folder in CARD_FOLDERS for path in folder.glob(f"*/{glob.escape(name)}.yaml")]
        if not found:
            raise ConfigError(f"no recipe is called {name!r}; the recipes are {', '.join(recipe_names())}")
        path = found[0]
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot read this recipe: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, found {type(tree).__name__}")
    tree.pop("summary", None)
    return build_config(tree, overrides)


def build_config(tree: dict[str, Any], overrides: list[str], task: str | None = None) -> Config:
    """A config for `prepare`, whose label classes may be left to be counted. Raises ConfigError."""
    tree = merge_overrides(tree, overrides)
    data = dict(tree.get("data") or {})
    wanted = task or data.pop("task", None)
    data.pop("task", None)
    config = config_from_dict({**tree, "data": data})
    if wanted is None:
        return config
    if wanted not in ("edge", "mask", "pose"):
        raise ConfigError(f"data.task is {wanted!r}; it is one of edge, mask, pose")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, task=wanted))


def find_items(source: Path, output: Path, config: Config, labels: Path | None, ready_made: bool) -> list[Item]:
    """The photographs below `source` with ids, conditions, splits and landmarks, sorted by name.

    Args:
        output: left out where it lies below `source`, as other prepared folders are.
        labels: folder of conditions with the photographs' names, instead of prepare.labels.
        ready_made: whether conditions come from files.

    Raises:
        DataError: no photographs, or none that lists and classes leave; unreadable lists, palette or landmarks; no
            folder of labels.
        ConfigError: an impossible pattern, or classes of colours without a palette.
    """
    root = photo_root(source, config.prepare)
    if ready_made and labels is None and config.prepare.labels == PrepareConfig().labels:
        labels = source / "labels"
    suffix = config.prepare.suffix.lower()
    beside = () if labels is None or labels.resolve() == root.resolve() else (labels,)
    found = [path for path in find_images(root, (output, *beside)) if path.name.lower().endswith(suffix)]
    photos = _without_made(found, root)
    if not photos:
        raise DataError(f"{shown(source)}: holds no pictures; give a folder of PNG, JPEG or WebP files")
    find = _finder(source, root, labels, config) if ready_made else lambda photo, relative: ()
    points, relatives = _landmarks(config), [photo.relative_to(root).as_posix() for photo in photos]
    items = [
        Item(name, photo, relative, "train", find(photo, relative), points.get(relative, points.get(photo.name)))
        for name, photo, relative in zip(make_ids(relatives), photos, relatives)
    ]
    left = _split(_chosen(items, source, config.prepare), source, config)
    if not left:
        raise DataError(f"{shown(source)}: lists and classes leave none of its {len(items)} pictures; mend them")
    return left


def _without_made(pictures: list[Path], root: Path) -> list[Path]:
    """The pictures that are not in a prepared folder below `root`, as an earlier output is; a warning counts those."""
    prepared = functools.cache(is_prepared)
    left = [path for path in pictures if path.parent == root or not prepared(path.parent.parent)]
    if len(left) < len(pictures):
        logger.warning("%s: passed over %d pictures of prepared folders in it", shown(root), len(pictures) - len(left))
    return left


def photo_root(source: Path, settings: PrepareConfig) -> Path:
    """The folder that holds the photographs. Raises DataError."""
    if not source.is_dir():
        found = "a file, no folder" if source.exists() else "no such folder"
        raise DataError(f"{shown(source)}: {found}; give the folder that holds the photographs")
    for name in settings.photos:
        if (source / name).is_dir():
            return source if name == "." else source / name
    raise DataError(f"{shown(source)}: has no folder {' or '.join(settings.photos)}, where the photographs should lie")


def check_crop(config: Config) -> None:
    """Raises ConfigError for crops around faces where nothing says where the faces are, and for poses in px of a padded
    square where nothing is padded."""
    if config.data.crop in ("face", "align") and not config.data.landmarks:
        raise ConfigError(
            f"data.crop={config.data.crop} needs data.landmarks: a JSON file of 68 points a picture, or a detector "
            f"({', '.join(extractor_names('landmarks'))})"
        )
    if config.prepare.pose_canvas and config.data.crop != "pad":
        raise ConfigError("prepare.pose_canvas counts in the square that data.crop=pad makes; set that, too")


def _landmarks(config: Config) -> dict[str, np.ndarray]:
    """Points by picture name, where the config names a file of them."""
    return {} if names_detector(config.data.landmarks) else load_landmarks(config.data.landmarks)


def _finder(source: Path, root: Path, labels: Path | None, config: Config) -> Any:
    """A function from a photograph to the files of its condition."""
    if labels is not None:
        if not labels.is_dir():
            raise DataError(
                f"{shown(labels)}: no such folder; give the one with a condition for each photograph (--labels)"
            )
        return functools.partial(_by_stem, root, _stems(labels, config.data.task))
    for pattern in config.prepare.labels:
        try:
            _fill(pattern, PurePosixPath("1.png"), "skin")
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"prepare.labels: cannot use the pattern {pattern!r} ({error})") from error
    return lambda photo, relative: _by_pattern(source, config.prepare.labels, PurePosixPath(relative))


def _stems(folder: Path, task: str) -> dict[str, Path]:
    if task != "pose":
        return {_stem(path, folder): path for path in find_images(folder)}
    found = sorted(path for path in find_files(folder)[0] if path.suffix in POSE_SUFFIXES and path.is_file())
    return {_pose_stem(_stem(path, folder)): path for path in found if not path.name.endswith("_subset.txt")}


def _stem(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _pose_stem(stem: str) -> str:
    """OpenPose adds _keypoints to its files' names, the release _candidate."""
    return stem.removesuffix("_keypoints").removesuffix("_candidate")


def _by_stem(root: Path, stems: dict[str, Path], photo: Path, relative: str) -> tuple[Path, ...]:
    found = stems.get(_stem(photo, root))
    return (found,) if found else ()


def _by_pattern(source: Path, patterns: tuple[str, ...], relative: PurePosixPath) -> tuple[Path, ...]:
    """The files of the first pattern that has any."""
    for pattern in patterns:
        parts = PARTS if "{part}" in pattern else ("",)
        if "{number" in pattern and not relative.stem.isdecimal():
            continue
        found = tuple(path for part in parts if (path := source / _fill(pattern, relative, part)).is_file())
        if found:
            return found
    return ()


def _fill(pattern: str, relative: PurePosixPath, part: str) -> str:
    number = int(relative.stem) if relative.stem.isdecimal() else 0
    return pattern.format(parent=relative.parent, stem=relative.stem, number=number, block=number // 2000, part=part)


def _chosen(items: list[Item], source: Path, settings: PrepareConfig) -> list[Item]:
    """The items that lists and label classes leave. A label map that cannot be read is left for `make` to report."""
    listed = _first_list(source, settings.only)
    if listed is not None:
        return [item for item in items if listed.intersection(item.keys)]
    wanted, barred = set(settings.any_class), set(settings.no_class)
    if not wanted and not barred:
        if settings.only:
            _warn_of_no_list(source, "only", settings.only, "all pictures are taken")
        return items
    palette = None
    if settings.kind == "colours":
        if not settings.palette:
            raise ConfigError("prepare.any_class and no_class count in prepare.palette; name that file, too")
        palette = read_palette(settings.palette)
    return [item for item in items if _fits(item, wanted, barred, settings.kind, palette)]


def _fits(item: Item, wanted: set[int], barred: set[int], kind: str, palette: np.ndarray | None) -> bool:
    try:
        present = set(np.unique(read_labels(item.labels, kind, palette)).tolist()) if item.labels else set()
    except DataError:
        return True
    return (not wanted or bool(wanted & present)) and not barred & present


def _split(items: list[Item], source: Path, config: Config) -> list[Item]:
    """The items with their splits: by lists, by folders, or by a stable hash of the id."""
    settings = config.prepare
    train, val = _first_list(source, settings.train_lists), _first_list(source, settings.val_lists)
    folders = settings.val_folders
    by_folder = any(set(folders).intersection(PurePosixPath(item.relative).parts) for item in items)
    if val is None:
        _warn_of_no_split(source, settings, train is not None, "val_folders" if by_folder else "val_fraction")
    elif not any(val.intersection(item.keys) for item in items):
        logger.warning("prepare.val_lists: names none of the pictures in %s; none is held out", shown(source))

    def place(item: Item) -> str | None:
        if val is not None:
            rest = "train" if train is None or train.intersection(item.keys) else None
            return "val" if val.intersection(item.keys) else rest
        if by_folder:
            return "val" if set(folders).intersection(PurePosixPath(item.relative).parts) else "train"
        return split_of(item.id, config.data.val_fraction)

    return [dataclasses.replace(item, split=split) for item in items if (split := place(item)) is not None]


def _warn_of_no_split(source: Path, settings: PrepareConfig, trains: bool, instead: str) -> None:
    """Tell of lists that change nothing. `trains`: whether there is a list of training pictures."""
    instead = f"{instead} decides which pictures are held out"
    if settings.val_lists:
        _warn_of_no_list(source, "val_lists", settings.val_lists, instead)
    elif trains:
        logger.warning("prepare.train_lists counts only beside a list of prepare.val_lists; %s", instead)


def _warn_of_no_list(source: Path, key: str, names: tuple[str, ...], instead: str) -> None:
    logger.warning("prepare.%s: there is no %s in %s; %s", key, " or ".join(names), shown(source), instead)


def split_of(name: str, val_fraction: float) -> str:
    """`val` for about `val_fraction` of all ids, else `train`; the id alone decides."""
    return "val" if int(digest(name)[:8], 16) / 2**32 < val_fraction else "train"


def _first_list(source: Path, names: tuple[str, ...]) -> set[str] | None:
    """Entries of the first list file that is there, in every way that items call themselves; None without one."""
    for name in names:
        if (source / name).is_file():
            return {key for row in read_list(source / name) for key in (row[0], _without_suffix(row[0]))}
    return None


def read_list(path: Path) -> list[list[str]]:
    """Rows of a list file: names separated by commas or tabs, in the authors' spelling (img\\WOMEN\\.., ./img/..) too.

    Raises:
        DataError: unreadable.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # names may hold other breaks
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)}: cannot read this list ({error}); write one picture's path a line") from error
    return [[_plain(word) for word in re.split(r"[,\t]", line) if word.strip()] for line in lines if line.strip(" ,\t")]


def _plain(word: str) -> str:
    """A listed path as items spell theirs: / between folders, below the photos folder."""
    path = word.strip().replace("\\", "/").removeprefix("./").lstrip("/")
    return path.removeprefix("img/").removeprefix("images/").removeprefix("CelebA-HQ-img/")


def _without_suffix(name: str) -> str:
    return name[: -len(PurePosixPath(name).suffix)] if name.lower().endswith(SUFFIXES) else name


def make_ids(names: list[str]) -> list[str]:
    """An id for each relative path: its stem, where that is plain and only one has it; else cleaned, plus a short hash.

    Ids are unique, also where upper and lower case are one, and are safe as file names.
    """
    stems = [name.rpartition(".")[0] or name for name in names]
    count = Counter(stem.lower() for stem in stems)
    return [
        stem if _is_plain_id(stem) and count[stem.lower()] == 1 else _hashed(stem, name)
        for stem, name in zip(stems, names)
    ]


def _is_plain_id(stem: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", stem) is not None and len(stem) <= LONGEST_ID


def _hashed(stem: str, name: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", stem).strip("-.")[:LONGEST_ID] or "picture"
    return f"{slug}-{digest(name)[:8]}"


def digest(value: Any) -> str:
    """Stable hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
