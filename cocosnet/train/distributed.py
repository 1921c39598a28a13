"""Several processes that train one model: `torchrun` starts them, each takes its share of every batch.

Gradients are averaged before the step, so all ranks make the same step from the same weights. The launcher says who is
who by the environment (RANK, WORLD_SIZE); without it there is one process and nothing here communicates.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cocosnet.errors import ConfigError
from cocosnet.groups import agree, check_own_gpu, end_group, everyone, join_group, own_device
from cocosnet.launcher import place

PATIENCE = datetime.timedelta(hours=2)  # for rank 0 to validate and save; nccl's own ten minutes can be too few


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. `rank` counts from 0; rank 0 writes the files. By default it is alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls, device: torch.device, batch: int) -> Ranks:
        """Take the place that the launcher gives; of several GPUs, the one that is this process's on its node.

        Raises:
            ConfigError: `batch` cannot be shared evenly. MissingDependency: this node has fewer GPUs than processes.
        """
        rank, size = place()
        if batch % size:
            raise ConfigError(f"train.batch={batch} must be a multiple of the {size} processes")
        device = own_device(device)
        if device.type == "cuda":
            check_own_gpu(device)
            torch.cuda.set_device(device)
        join_group("nccl" if device.type == "cuda" else "gloo", PATIENCE)
        return cls(rank, size, device)

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def share(self, items: list[int]) -> list[int]:
        """This rank's part of a batch: every size-th item."""
        return items[self.rank :: self.size]

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank; all ranks must ask."""
        return self.largest(int(flag)) > 0

    def largest(self, value: int) -> int:
        """The largest of the ranks' values; all ranks must ask."""
        if self.size == 1:
            return value
        reduced = torch.tensor(value, device=self.device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return int(reduced.item())

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ranks' mean of each scalar, in one exchange; all ranks must ask, for the same names."""
        if self.size == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).float(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on every rank; all ranks must ask."""
        return [value] if self.size == 1 else everyone(value)

    def together(self, work: Callable[[], Any]) -> None:
        """Do `work`; all ranks must come here. A CocosError of some rank's is raised on every one, so none waits."""
        if self.size == 1:
            work()
        else:
            agree(work, self.any)

    def write(self, work: Callable[[], Any]) -> None:
        """Do `work` on the rank that writes; all must come here, and its CocosError is raised on every one."""
        self.together(work if self.writes else lambda: None)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks, in one exchange; where it is missing it counts as zero.

        One that is missing on every rank stays so. Given zeros, Adam would count steps in which the parameter took no
        part, and make its first own one up to 1 / sqrt(1 - beta2) times too long.
        """
        parameters = list(parameters)
        if self.size == 1:
            return
        given = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), given])
        dist.all_reduce(flat)
        flat /= self.size
        *means, shares = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, mean, share in zip(parameters, gradients, means, shares.tolist(), strict=True):
            if share:
                parameter.grad = gradient.copy_(mean.view_as(gradient))

    def leave(self) -> None:
        """End the communication, after every rank has come here."""
        if self.size > 1:
            dist.barrier()
            end_group()


ALONE = Ranks()  # one process
