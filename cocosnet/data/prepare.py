"""A folder of photographs becomes a prepared folder: pictures, conditions, pairs.

    output/images/ID.png       the photograph, cropped, its shorter side of data.size px
    output/conditions/ID.png   its edges or labels, same size (ID.json: its pose)
    output/manifest.jsonl      one pair a picture: its condition, and another picture of the set as exemplar
    output/errors.jsonl        the records of photographs that could not be used, where there are any
    output/dataset.json        what was done: task, size, classes, extractor, options
    output/.stamps/ID.json     what an item was made of; what still holds is not made again
    output/.features/ID.npy    feature vectors, for retrieval

Every file is written whole or not at all, and a stamp only after its item, so the work may be killed at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from cocosnet.config import Config
from cocosnet.data.extractors import READY_MADE, resolve_name
from cocosnet.data.images import picture_size, shown
from cocosnet.data.labels import find_palette, read_palette
from cocosnet.data.making import CONDITIONS, FEATURES, IMAGES, STAMPS, Made, Maker, load_vector, without_status
from cocosnet.data.pairs import Choice, check_pairs, choose, random_round
from cocosnet.data.records import DATASET_NAME, MANIFEST_NAME, Record, is_prepared, write_manifest
from cocosnet.data.sources import Item, check_crop, find_items, photo_root
from cocosnet.errors import CocosError, ConfigError, DataError, HelperKilled
from cocosnet.files import atomic_write, only_one
from cocosnet.groups import agree, end_group, everyone, join_group
from cocosnet.launcher import place, usable_cores

logger = logging.getLogger(__name__)
SCHEMA = "cocosctl.dataset/1"
ERRORS_NAME = "errors.jsonl"
BYTES_A_PIXEL = {"image": 1.7, "edge": 0.45, "mask": 0.05}  # of the PNGs that we write, measured on photographs
BYTES_A_POSE, BYTES_A_VECTOR, BYTES_A_STAMP = 900, 2200, 300
PATIENCE = datetime.timedelta(days=1)  # how long a process waits for one that has more to do; of a dead one it hears


def prepare(source: Path, output: Path, config: Config, **options: Any) -> Iterator[Record]:
    """Prepare the photographs below `source` into `output`: `plan(...)` and its `run()` in one. Raises as they do."""
    return plan(source, output, config, **options).run()


def plan(
    source: Path,
    output: Path,
    config: Config,
    *,
    limit: int | None = None,
    overwrite: bool = False,
    labels: Path | None = None,
    extractor: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
) -> Preparation:
    """What is to be done; nothing is written yet. Started by torchrun, what is wrong in one process is raised in all.

    Args:
        source: folder of photographs, laid out as config.prepare says.
        limit: take only the first so many photographs.
        overwrite: make everything again.
        labels: folder of conditions (label maps, edge pictures, pose files) with the photographs' names, instead of
            config.prepare.labels.
        extractor: of edges or poses; `auto` defers to config.data.edges or config.data.poses, and where that is auto,
            too, and there are `labels`, to these.
        seed: of the random round of exemplars.
        workers: further processes that make items; 0: this one does.

    Raises:
        DataError: no photographs, no labels where they are needed, an unreadable list or palette.
        ConfigError: an unknown extractor or way of pairing, an extractor beside ready-made conditions, face crops
            without landmarks, an output among the sources, or a source that is a prepared folder.
        MissingWeights, MissingDependency: what the chosen extractor needs is not here.
    """
    source, output = Path(source).absolute(), Path(output).absolute()
    labels = None if labels is None else Path(labels).absolute()
    maker = functools.partial(_maker, source, output, config, labels, extractor, device, overwrite, limit)
    _, ranks = join_group(timeout=PATIENCE)
    return Preparation(source, maker() if ranks == 1 else agree(maker), seed, workers)


def _maker(
    source: Path,
    output: Path,
    config: Config,
    labels: Path | None,
    extractor: str,
    device: str,
    overwrite: bool,
    limit: int | None,
) -> Maker:
    """What makes the items, after a look whether all that it takes is here."""
    check_pairs(config.prepare)
    check_crop(config)
    maker = Maker([], output, config, _extractor_name(config, extractor, labels), device, overwrite)
    for task in maker.tasks():
        maker.network(task)  # what is missing is said before anything is written
    root = photo_root(source, config.prepare)
    if is_prepared(root):
        raise ConfigError(f"{shown(root)}: a prepared folder; give the photographs, or look at it with --check")
    maker.sought = f"as {' or '.join(config.prepare.labels)}" if labels is None else f"in {shown(labels)}"
    items = find_items(source, output, config, labels, maker.ready_made)
    _check_output(root, output, items)
    maker.items = items[:limit]
    if config.data.task == "mask" and config.prepare.kind == "colours":
        given = config.prepare.palette
        maker.palette = (
            read_palette(given) if given else find_palette([path for item in maker.items for path in item.labels])
        )
    return maker


def _check_output(root: Path, output: Path, items: Sequence[Item]) -> None:
    """Raises ConfigError where the run would write over what it reads, or later take what it wrote for photographs."""
    own, *written = (Path(os.path.realpath(output / name)) for name in (".", IMAGES, CONDITIONS))
    for folder in {root, *(path.parent for item in items for path in (item.photo, *item.labels))}:
        real = Path(os.path.realpath(folder))
        if real == own or any(real.is_relative_to(place) for place in written):
            raise ConfigError(
                f"{shown(output)}: the prepared dataset would lie among the files that it is made of, those of "
                f"{shown(folder)}; give it a folder of its own"
            )


def _extractor_name(config: Config, name: str, labels: Path | None) -> str | None:
    """The extractor's name; None where conditions are label maps. Raises ConfigError where `labels` would be unused."""
    task = config.data.task
    if task == "mask":
        return None
    if name == "auto":
        name = config.data.poses if task == "pose" else config.data.edges
    if name == "auto" and labels is not None:
        name = READY_MADE[task]
    if labels is not None and name != READY_MADE[task]:
        raise ConfigError(
            f"{name} finds conditions in the photographs, and {shown(labels)} would not be looked at; leave the "
            f"labels folder away, or take the extractor {READY_MADE[task]}, which reads it"
        )
    return resolve_name(name, task)


class Preparation:
    """One run over the items; what is made is remembered, because an item is its own target and another's exemplar."""

    def __init__(self, source: Path, maker: Maker, seed: int, workers: int) -> None:
        self.source, self.maker, self.seed, self.workers = source, maker, seed, workers
        self.items, self.output, self.config = maker.items, maker.output, maker.config
        self.made: dict[int, Made] = {}
        self.splits = [item.split for item in self.items]
        self.round = random_round(self.splits, seed)

    def __len__(self) -> int:
        """Number of photographs."""
        return len(self.items)

    def run(self, made: Callable[[], None] = lambda: None) -> Iterator[Record]:
        """Make what is not up to date, yielding a record a photograph in order of their names.

        A record has absolute paths: condition, exemplar and exemplar_condition (another picture, already prepared;
        absent where there is no other) and target (the photograph itself). Extra keys: source, split, condition_source,
        crop (of a cut-out face) and exemplars (ids and cosine distances of the choices, best first). Status is ok,
        skipped (was up to date) or error; an error stops nothing. Where pairs are random, a record comes as soon as it
        is made; otherwise when all are. The manifest and dataset.json are written when the last record was taken.

        Started by torchrun, each process makes its share and the first one yields the records; what is wrong in one is
        raised in all.

        Args:
            made: called for each photograph that is made, or found to be; long before its record, where that waits.

        Raises:
            OutputError: the folder cannot be written, or another run is at work on it. HelperKilled: one of the
                processes was.
        """
        rank, ranks = place()
        if ranks > 1:
            yield from self._run_shared(rank, ranks, made)
            return
        with helpers_may_be_killed(), only_one(self.output, "prepare"):
            self._clear()
            yield from self._finish(self._make(self._order(), made))

    def todo(self) -> Iterator[tuple[Record, int]]:
        """A record a photograph (status ok: would be made; skipped: up to date; error) and the bytes that it takes."""
        for item in self.items:
            record = Record(item.id, target=str(item.photo), extra={"source": shown(item.relative)})
            try:
                _, _, parts = self.maker.stale(item)
                yield dataclasses.replace(record, status="ok" if parts else "skipped"), self._bytes(item.photo, parts)
            except DataError as error:
                yield record.failure(str(error)), 0

    def _bytes(self, photo: Path, parts: list[str]) -> int:
        size = picture_size(photo)
        size = size if self.config.data.crop == "none" else (1, 1)
        pixels = self.config.data.size**2 * max(size) / min(size)
        task = self.config.data.task
        condition = BYTES_A_POSE if task == "pose" else BYTES_A_PIXEL[task] * pixels
        sizes = {"image": BYTES_A_PIXEL["image"] * pixels, "condition": condition, "feature": BYTES_A_VECTOR}
        return round(sum(sizes[part] for part in parts) + (BYTES_A_STAMP if parts else 0))

    def _run_shared(self, rank: int, ranks: int, made: Callable[[], None]) -> Iterator[Record]:
        """As one of several processes: rank 0 holds the folder, all make, rank 0 pairs and yields."""
        with contextlib.ExitStack() as held:

            def take_folder() -> None:
                if rank == 0:
                    held.enter_context(only_one(self.output, "prepare"))
                    self._clear()

            agree(take_folder)
            step = lambda: [made() for _ in range(ranks)]  # noqa: E731  the others are about as far as this one
            shares = everyone(agree(lambda: self._share(range(len(self.items))[rank::ranks], step)))
            end_group()
            if rank == 0:
                yield from self._finish(iter([one for share in shares for one in share]))

    def _share(self, order: Sequence[int], made: Callable[[], None]) -> list[Made]:
        with helpers_may_be_killed():
            return list(self._make(order, made))

    def _clear(self) -> None:
        """Take away what a killed run left, and a manifest of pictures that this run makes in another way.

        Kept, it would tell of a whole dataset where a run that is killed has made half of them anew.
        """
        _remove_leftovers(self.output)
        try:
            old = json.loads((self.output / DATASET_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if not isinstance(old, dict) or any(old.get(key) != value for key, value in self._made_as().items()):
            for name in (MANIFEST_NAME, DATASET_NAME):
                (self.output / name).unlink(missing_ok=True)

    def _made_as(self) -> dict[str, Any]:
        """What dataset.json says of how pictures and conditions are made."""
        data = self.config.data
        facts = {"schema": SCHEMA, "task": data.task, "size": data.size, "crop": data.crop}
        return facts | {"condition_source": self.maker.provenance, "recipe": self.maker.recipe}

    def _order(self) -> list[int]:
        """Positions in the order in which they are needed: each picture and then its exemplar."""
        return list(dict.fromkeys(index for first in range(len(self.items)) for index in (first, self.round[first])))

    def _make(self, order: Sequence[int], made: Callable[[], None]) -> Iterator[Made]:
        """Make the items at these positions, in this order."""
        size = self.maker.batch
        parts = [list(order[start : start + size]) for start in range(0, len(order), size)]
        for answer in self._answers(parts):
            if isinstance(answer, CocosError):
                raise answer
            for one in answer:
                made()
                yield one

    def _answers(self, parts: list[list[int]]) -> Iterator[list[Made] | CocosError]:
        """What is made of each part, here or in processes of their own."""
        if self.workers == 0 or len(parts) < 2:
            return (self.maker[part] for part in parts)
        loader = DataLoader(
            _Elsewhere(self.maker),
            batch_size=None,
            sampler=parts,
            num_workers=min(self.workers, len(parts), usable_cores()),  # PyTorch warns of more
            collate_fn=_as_it_is,
            multiprocessing_context="spawn",  # a copy of a process with threads and networks may hang
        )
        with children_never_hear_ctrl_c():
            return iter(loader)

    def _finish(self, making: Iterator[Made]) -> Iterator[Record]:
        records = []
        choices = self._choices(making)
        for index in range(len(self.items)):
            records.append(self._pair(index, choices[index], making))
            yield records[-1]
        self._write_summary(records)
        enlarged = sum(made.enlarged for made in self.made.values())
        if enlarged:
            logger.warning(
                "enlarged to data.size=%d px on the shorter side: %d of %d pictures; a smaller --size adds no blur",
                self.config.data.size,
                enlarged,
                len(self.items),
            )

    def _choices(self, making: Iterator[Made]) -> list[Sequence[Choice]]:
        """Who may be whose exemplar. Retrieval needs everything made first."""

        def features() -> dict[int, np.ndarray]:
            self._take(making, None)
            good = [index for index, made in self.made.items() if not made.record.failed]
            return {index: load_vector(self.output / FEATURES / f"{self.items[index].id}.npy") for index in good}

        return choose(self.items, self.config.prepare, self.source, features)

    def _take(self, making: Iterator[Made], wanted: int | None) -> None:
        """Take what is made until `wanted` is (None: all)."""
        while wanted is None or wanted not in self.made:
            made = next(making, None)
            if made is None:
                return
            self.made[made.index] = made

    def _item(self, index: int, making: Iterator[Made]) -> Record:
        self._take(making, index)
        return self.made[index].record

    def _pair(self, index: int, choices: Sequence[Choice], making: Iterator[Made]) -> Record:
        """The item's record, with the first good choice as exemplar, else the next good picture of the round."""
        record = self._item(index, making)
        if record.failed:
            return record
        usable = (choice for choice in choices if not self._item(choice.index, making).failed)
        good = list(itertools.islice(usable, self.config.prepare.exemplars))
        if good:
            listed = [{"id": self.items[c.index].id, "distance": c.distance} for c in good]
            record = dataclasses.replace(record, extra=record.extra | {"exemplars": listed})
            return _with_exemplar(record, self._item(good[0].index, making))
        other = self.round[index]
        seen = {index}
        while other not in seen:
            if not self._item(other, making).failed:
                return _with_exemplar(record, self._item(other, making))
            seen.add(other)
            other = self.round[other]
        return record

    def _write_summary(self, records: list[Record]) -> None:
        """dataset.json, the failures, and last the manifest: they tell of the folder, not of this run."""
        data, good = self.config.data, [record for record in records if not record.failed]
        failed = [dataclasses.replace(record, seconds=None) for record in records if record.failed]
        classes = data.classes
        if data.task == "mask" and not classes:
            palette = self.maker.palette
            tops = [made.top for made in self.made.values()]
            classes = max(tops, default=-1) + 1 if palette is None else len(palette)
        summary = self._made_as() | {
            "classes": classes,
            "pictures": len(good),
            "failed": len(failed),
            "held_out": sum(record.extra.get("split") == "val" for record in good),
            "val_fraction": data.val_fraction,
            "pairs": Path(self.config.prepare.pairs).name,
            "seed": self.seed,
        }
        if data.task == "pose":
            summary["pose_maps"] = data.pose_maps
        if self.maker.palette is not None:
            summary["palette_rgb"] = self.maker.palette.tolist()
        atomic_write(self.output / DATASET_NAME, json.dumps(summary, indent=1) + "\n")
        if failed:
            write_manifest(self.output / ERRORS_NAME, failed)
        else:
            (self.output / ERRORS_NAME).unlink(missing_ok=True)
        write_manifest(self.output / MANIFEST_NAME, [without_status(record) for record in good])


@dataclasses.dataclass
class _Elsewhere:
    """A `Maker` in another process. Its errors come back as they are, without that process's traceback."""

    maker: Maker

    def __len__(self) -> int:
        return len(self.maker)

    def __getitem__(self, part: list[int]) -> list[Made] | CocosError:
        try:
            return self.maker[part]
        except CocosError as error:
            return error


@contextlib.contextmanager
def children_never_hear_ctrl_c() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C does not reach: this one hears it and ends them.

    They would hear it before they can say what to do about it, while they import, and end in a traceback each.
    They inherit that it is blocked; here it waits until they are started.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else starting it, on the way, would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def helpers_may_be_killed() -> Iterator[None]:
    """Around work with further processes. Raises HelperKilled where one was, as the system does for want of memory.

    PyTorch hears of that by a signal, and raises wherever its process is just then.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # a defect in a process comes as "Caught .. in DataLoader"
            raise
        raise HelperKilled(
            "a process that makes pictures was killed, perhaps for want of memory; run again with fewer --workers: "
            'what is made stays (in a script of yours, the call belongs below if __name__ == "__main__")'
        ) from error


def _as_it_is(answer: list[Made] | CocosError) -> list[Made] | CocosError:
    return answer


def _with_exemplar(record: Record, exemplar: Record) -> Record:
    return dataclasses.replace(record, exemplar=exemplar.target, exemplar_condition=exemplar.condition)


def _remove_leftovers(output: Path) -> None:
    """Temporary files of a run that was killed."""
    for folder in (output, *(output / name for name in (IMAGES, CONDITIONS, STAMPS, FEATURES))):
        for path in folder.glob(".tmp-*"):
            path.unlink(missing_ok=True)
