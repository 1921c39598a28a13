"""Who is whose exemplar: a random round, other views of the same item, nearest neighbours, or a list.

A picture is never its own exemplar. Pictures of the training split get exemplars of the training split only; those held
out get held-out ones, and training pictures only where there is no other choice.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from cocosnet.config import PrepareConfig
from cocosnet.data.sources import Item, read_list
from cocosnet.errors import ConfigError

logger = logging.getLogger(__name__)
CHUNK = 1024  # rows of the table of cosines that are held at once
SAME = 1e-6  # cosine distance below which two files hold the same picture


class Choice(NamedTuple):
    """One possible exemplar: its position in the list of items, and its cosine distance where that is known."""

    index: int
    distance: float | None = None


def random_round(splits: Sequence[str], seed: int) -> list[int]:
    """For each picture another one of its split, along one closed round through the split, drawn by `seed`.

    A picture that is alone held out gets a training picture, one that is alone in training itself.
    """
    rng, following = np.random.default_rng(seed), np.arange(len(splits))
    for name in ("train", "val"):
        members = np.flatnonzero(np.array(splits) == name)
        order = rng.permutation(members)
        following[order] = np.roll(order, -1)
        others = np.flatnonzero(np.array(splits) == "train")
        if name == "val" and len(members) == 1 and len(others):
            following[members[0]] = rng.choice(others)
    return following.tolist()


class Others(Sequence[Choice]):
    """The members of a group but one, from that one's successor on: no list of its own for each of thousands."""

    def __init__(self, members: Sequence[int], place: int) -> None:
        self.members, self.place = members, place

    def __len__(self) -> int:
        """Number of the others."""
        return len(self.members) - 1

    def __getitem__(self, number: int) -> Choice:
        """The other with that number, from 0."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Choice(self.members[(self.place + 1 + number) % len(self.members)])


def same_item(items: Sequence[Item], pattern: str) -> list[Sequence[Choice]]:
    """For each picture the others of the same item, in the order of their names, from its successor on.

    Args:
        pattern: regular expression searched for in the path; its first group (or all of it) names the item, and paths
            without a match are alone. Empty: pictures in one folder show one item.

    Raises:
        ConfigError: not a regular expression.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"prepare.item: {pattern!r} is no regular expression ({error})") from error
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.split, _item_of(item, expression) or f"\0{index}"].append(index)
    choices: list[Sequence[Choice]] = [[] for _ in items]
    for members in groups.values():
        for place, index in enumerate(members):
            choices[index] = Others(members, place)
    return choices


def _item_of(item: Item, expression: re.Pattern[str]) -> str | None:
    if not expression.pattern:
        parent = str(PurePosixPath(item.relative).parent)
        return parent if parent != "." else None
    found = expression.search(item.relative)
    return found and (found.group(1) if expression.groups else found.group(0))


def listed(items: Sequence[Item], lists: Sequence[Path]) -> list[list[Choice]]:
    """For each picture the exemplars that list files name, in their order.

    Unknown names, oneself, and what is held out from training are passed over.

    Raises:
        DataError: a list that cannot be read.
    """
    positions: dict[str, int] = {}
    for index, item in enumerate(items):
        for key in item.keys:
            positions.setdefault(key, index)
    choices: list[list[Choice]] = [[] for _ in items]
    for path in lists:
        for row in read_list(path):
            places = [positions[name] for name in row if name in positions]
            if row[0] in positions:
                choices[places[0]] += [Choice(other) for other in places[1:] if _may_show(items, places[0], other)]
    return choices


def _may_show(items: Sequence[Item], index: int, other: int) -> bool:
    return other != index and not (items[index].split == "train" and items[other].split == "val")


def nearest(features: Mapping[int, np.ndarray], splits: Sequence[str], count: int) -> list[list[Choice]]:
    """For each picture the `count` nearest ones by cosine distance, nearest first; files of one picture do not count.

    Args:
        features: unit vectors by position; pictures without one get and give no exemplars.
    """
    choices: list[list[Choice]] = [[] for _ in splits]
    for name in ("train", "val"):
        keys = [index for index in sorted(features) if splits[index] == name]
        pool = keys if name == "train" or len(keys) > 1 else [i for i in sorted(features) if splits[i] == "train"]
        if not keys or not pool:
            continue
        table = np.stack([features[index] for index in pool])
        for start in range(0, len(keys), CHUNK):
            rows = keys[start : start + CHUNK]
            distances = 1 - np.stack([features[index] for index in rows]) @ table.T
            for index, row in zip(rows, distances):
                choices[index] = _best(np.round(row.astype(np.float64), 5), np.array(pool), index, count)
    return choices


def _best(distances: np.ndarray, pool: np.ndarray, index: int, count: int) -> list[Choice]:
    usable = (pool != index) & (distances > SAME)
    pool, distances = pool[usable], distances[usable]
    some = np.argsort(distances, kind="stable")[:count]  # equal distances: by position
    return [Choice(int(pool[place]), float(distances[place])) for place in some]


def merged(first: Sequence[Sequence[Choice]], second: Sequence[Sequence[Choice]]) -> list[Sequence[Choice]]:
    """The first list of choices where it has any, else the second."""
    return [one or other for one, other in zip(first, second)]


def choose(
    items: Sequence[Item], settings: PrepareConfig, source: Path, features: Callable[[], Mapping[int, np.ndarray]]
) -> list[Sequence[Choice]]:
    """The choices that `settings` ask for; empty ones where the random round decides.

    Args:
        features: called for retrieval only.

    Raises:
        ConfigError: settings.pairs is neither a way nor a file. DataError: a list cannot be read.
    """
    lists = [source / name for name in settings.pair_lists if (source / name).is_file()]
    found = listed(items, lists)
    if settings.pairs == "same-item":
        return _told_of(merged(found, same_item(items, settings.item)), "prepare.pairs=same-item")
    if settings.pairs == "retrieval":
        return merged(found, nearest(features(), [item.split for item in items], settings.exemplars))
    if settings.pairs != "random":
        path = check_pairs(settings)
        return merged(_told_of(listed(items, [path]), str(path)), found)
    return found


def _told_of(choices: list[Sequence[Choice]], way: str) -> list[Sequence[Choice]]:
    """The choices of a way that was asked for by name: it is told for how many pictures it has none."""
    known = sum(map(bool, choices))
    if known < len(choices):
        logger.warning(
            "%s: has exemplars for %d of %d pictures; the others are paired without it", way, known, len(choices)
        )
    return choices


def check_pairs(settings: PrepareConfig) -> Path:
    """The list file that settings.pairs names. Raises ConfigError where it is neither a file nor a known way."""
    path = Path(settings.pairs)
    if settings.pairs not in ("random", "same-item", "retrieval") and not path.is_file():
        raise ConfigError(f"prepare.pairs={settings.pairs!r} is neither random, same-item, retrieval, nor a list file")
    return path
