"""Several processes that share an evaluation: `torchrun` starts them, each measures every n-th pair, the first sums up.

The launcher says who is who by the environment (RANK, WORLD_SIZE); without it there is one process and nothing here
communicates. What is exchanged lies in the CPU's memory, so that gloo serves every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from cocosnet.groups import agree, all_alive, end_group, join_group


@dataclass(frozen=True)
class Shards:
    """This process among those of the evaluation. `rank` counts from 0; by default it is alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Shards:
        """Take the place that the launcher gives."""
        return cls(*join_group())

    def agree(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in this process, once it is done in all. Raises, in all, what is wrong in one."""
        return agree(work) if self.size > 1 else work()

    def share(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """This process's items with their numbers in the whole: every size-th one."""
        return islice(enumerate(items), self.rank, None, self.size)

    def gather(self, item: Any) -> list[Any] | None:
        """Everyone's items in the order of the ranks, for rank 0; None for the others. All ranks must come here.

        Raises:
            CocosError: another process has failed.
        """
        if self.size == 1:
            return [item]
        items = [None] * self.size if self.rank == 0 else None
        with all_alive():
            dist.gather_object(item, items)
        return items

    def stream(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """The other ranks' pieces (none of them None) for rank 0, one a rank at a time; nothing for the others.

        All ranks must come here and go through it to its end; rank 0's own pieces are not asked for.
        """
        own = iter(pieces) if self.rank else iter(())
        while self.size > 1:
            piece = next(own, None)
            more = torch.tensor(piece is not None, dtype=torch.int32)
            with all_alive():
                dist.all_reduce(more, dist.ReduceOp.MAX)
            if not more:
                return
            yield from (found for found in self.gather(piece) or [] if found is not None)

    def abandon(self) -> None:
        """End the communication at once: this rank has failed, and the others shall fail rather than wait for it."""
        if self.size > 1:
            end_group()

    def leave(self) -> None:
        """End the communication, after every rank has come here."""
        if self.size > 1 and dist.is_initialized():
            with all_alive():
                dist.barrier()
            end_group()


ALONE = Shards()  # one process
