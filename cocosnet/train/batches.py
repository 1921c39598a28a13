"""What a step learns from.

A batch is a function of (seed, step) alone, so a run can be stopped and resumed anywhere, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from cocosnet.config import Config
from cocosnet.data.dataset import PairDataset
from cocosnet.data.distortion import distort
from cocosnet.errors import CocosError, DataError

_ORDER, _DRAW = 0, 1  # which stream of random numbers: the order of an epoch, or the draws for one sample


@dataclass
class Batch:
    """One step's pictures, S x S each: condition x_A B,C,S,S in [0, 1]; image x_B and exemplar B,3,S,S in [-1, 1];
    exemplar_condition B,C,S,S, or B,0,S,S for a model that does not look at it; pseudo B, 1 where the exemplar is a
    distorted x_B and 0 where it is another picture; field B,2,S,S: a pseudo exemplar's pixel p shows x_B at field(p),
    (y, x) in px; 0 for another picture."""

    condition: Tensor
    image: Tensor
    exemplar: Tensor
    exemplar_condition: Tensor
    pseudo: Tensor
    field: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a model is called with."""
        return self.condition, self.exemplar, self.exemplar_condition if self.exemplar_condition.shape[1] else None

    def to(self, device: torch.device) -> Batch:
        """The same on `device`, pictures channels-last, which convolutions are quickest at."""
        return Batch(**{name: _place(value, device) for name, value in vars(self).items()})

    def split(self, count: int) -> list[tuple[Batch, float]]:
        """At most `count` parts, one after the other, each with its share of the samples."""
        pieces = zip(*(value.chunk(count) for value in vars(self).values()), strict=True)
        parts = [Batch(**dict(zip(vars(self), piece))) for piece in pieces]
        return [(part, len(part.pseudo) / len(self.pseudo)) for part in parts]

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU can fetch from on its own; the loader calls this."""
        return Batch(**{name: value.pin_memory() for name, value in vars(self).items()})


def _place(value: Tensor, device: torch.device) -> Tensor:
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.to(device, non_blocking=True, memory_format=layout)


class StepBatches(Dataset):
    """Batches by the number of the step, made of prepared pairs. `share` picks this process's part of a batch."""

    def __init__(self, pairs: PairDataset, config: Config, share: Callable[[list[int]], list[int]] = list):
        self.pairs, self.config, self.share = pairs, config, share
        if len(pairs) == 0:
            raise DataError("there is no pair to train on; prepare more pictures or lower data.val_fraction")

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0. Raises DataError where a picture cannot be used."""
        size = self.config.train.batch
        positions = self.share(list(range(step * size, (step + 1) * size)))
        return stack([self._sample(position) for position in positions])

    def order(self, start: int, count: int) -> list[int]:
        """Indices of `count` pictures from the run's `start`-th on. Every epoch takes all, in an order of its own."""
        return [self._index(position) for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        return int(self._epoch(position // len(self.pairs))[position % len(self.pairs)])

    def _epoch(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.pairs), generator=step_generator(self.config.train.seed, _ORDER, epoch))

    def _sample(self, position: int) -> Batch:
        index, generator = self._index(position), step_generator(self.config.train.seed, _DRAW, position)
        real = bool(torch.rand((), generator=generator) < self.config.train.real_exemplars)
        if not real:
            item = self.pairs.alone(index)
        else:
            item = self._with_another(index, generator) if self.config.train.draw_exemplars else self.pairs[index]
        return make_sample(item, self.config, pseudo=not real, generator=generator)

    def _with_another(self, index: int, generator: torch.Generator) -> Mapping[str, Any]:
        """The pair with an exemplar drawn anew from all others: a run sees many more pairs than the folder lists."""
        if len(self.pairs) < 2:
            return self.pairs[index]
        step = int(torch.randint(1, len(self.pairs), (), generator=generator))
        return self.pairs.with_exemplar(index, (index + step) % len(self.pairs))


class Answers(Dataset):
    """`batches`, with a CocosError in the place of one that cannot be made: so it comes back from a loading process as
    it is, without that process's traceback."""

    def __init__(self, batches: StepBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | CocosError:
        """The batch of step `step`, or why there is none."""
        try:
            return _handed_over(self.batches[step])
        except CocosError as error:
            return error


def _handed_over(batch: Batch) -> Batch:
    """In a loading process, the batch in memory that the trainer can read: PyTorch would move it there on its way out,
    and where there is no room lose it without a word, and the trainer would wait for ever. Raises DataError then."""
    if get_worker_info() is None:
        return batch
    try:
        return Batch(**{name: value.share_memory_() for name, value in vars(batch).items()})
    except RuntimeError as error:
        raise DataError(
            "no room in shared memory (/dev/shm) for a batch; set train.workers=0, or give it more (--shm-size of "
            "`docker run`)"
        ) from error


def make_sample(item: Mapping[str, Any], config: Config, *, pseudo: bool, generator: torch.Generator) -> Batch:
    """A batch of one. `item`: a pair of `PairDataset`; one that is alone in its set gets a pseudo exemplar.

    A pseudo exemplar is x_B distorted, and its condition likewise. Raises DataError where a picture is too small.
    """
    channels = item["condition"].shape[0]
    seen = channels if config.model.encoder.exemplar_condition else 0  # up to 152 channels are not moved for nothing
    own = _crop(torch.cat([item["condition"], item["image"]]), config.data.size, item["id"], generator)
    if pseudo or item.get("exemplar") is None:
        (other,), field = distort(own[None, channels - seen :], config.distortion, generator)
        pseudo = True
    else:
        other = torch.cat([item["exemplar_condition"][:seen], item["exemplar"]])
        other = _crop(other, config.data.size, item["id"], generator)
        field = own.new_zeros(1, 2, *own.shape[-2:])
    return Batch(
        condition=own[None, :channels],
        image=own[None, channels:],
        exemplar=other[None, seen:],
        exemplar_condition=other[None, :seen],
        pseudo=torch.tensor([float(pseudo)]),
        field=field,
    )


def stack(samples: Sequence[Batch]) -> Batch:
    """Samples as one batch."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: torch.cat([getattr(sample, name) for sample in samples]) for name in names})


def step_generator(seed: int, stream: int, number: int) -> torch.Generator:
    """Random numbers for one purpose: streams and numbers are mixed, not added, so that none repeats another."""
    state = np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def _crop(picture: Tensor, size: int, name: str, generator: torch.Generator) -> Tensor:
    """A square of side `size` somewhere in C,H,W."""
    height, width = picture.shape[-2:]
    if min(height, width) < size:
        raise DataError(f"{name}: {width}x{height} is smaller than data.size={size}; prepare the data at that size")
    top = int(torch.randint(height - size + 1, (), generator=generator))
    left = int(torch.randint(width - size + 1, (), generator=generator))
    return picture[:, top : top + size, left : left + size]
