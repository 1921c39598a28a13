"""A group of processes (`torchrun`): how they meet, agree and part; the trainer and the commands stand on it.

`launcher.place` says who is who. Without a launcher there is one process, and nothing here needs to be called.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from cocosnet.errors import CocosError, ConfigError, MissingDependency
from cocosnet.launcher import number, place

GRACE = 0.05  # s; the worker threads need microseconds


def join_group(backend: str = "gloo", timeout: datetime.timedelta | None = None) -> tuple[int, int]:
    """Meet the others, where there are any and this was not yet done; answers as `place`.

    Who does not come to `end_group`, say for an error, ends a group of gloo when the process does: its worker threads
    free what was exchanged, and one that wants the interpreter's lock for it while the interpreter ends aborts.

    Args:
        backend: gloo exchanges what lies in the CPU's memory, nccl what lies in the GPUs'.
        timeout: how long a process waits for another in an exchange; by default PyTorch's own.

    Raises:
        ConfigError: the environment names other processes, but not where they meet, or they do not meet there.
    """
    rank, size = place()
    if size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (ValueError, dist.DistError) as error:
            reason = str(error).partition("\n")[0].rstrip(". ")  # below it PyTorch lists addresses of its own code
            raise ConfigError(
                f"WORLD_SIZE={size}, but {reason}; start the processes by torchrun, or unset it"
            ) from error
        if backend == "gloo":
            atexit.register(end_group)
    return rank, size


def own_device(device: torch.device) -> torch.device:
    """`cuda` without a number becomes the GPU that LOCAL_RANK names; anything else stays what it is.

    Raises ConfigError where LOCAL_RANK names none.
    """
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", number("LOCAL_RANK", 0))
    return device


def check_own_gpu(device: torch.device) -> None:
    """Raises MissingDependency where this node has no GPU of that number."""
    count = torch.cuda.device_count()
    if device.type == "cuda" and device.index >= count:
        raise MissingDependency(
            f"process {device.index} of this node (LOCAL_RANK, from 0) has no GPU, there are {count}; "
            "start as many processes a node as it has GPUs, or use --device cpu"
        )


def everyone(item: Any) -> list[Any]:
    """Every process's item, in their order, in every process; all must come here."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def agree(work: Callable[[], Any], some: Callable[[bool], bool] = lambda failed: True) -> Any:
    """What `work` returns in this process, once it is done in all.

    some: whether some process says yes, where that can be asked for less than what was raised.

    Raises, in every process, the error of the first in which it failed, so that none waits for another in vain.
    """
    failure, answer = None, None
    try:
        answer = work()
    except CocosError as error:
        failure = error
    for error in everyone(failure) if some(failure is not None) else ():
        if error is not None:
            raise error
    return answer


@contextlib.contextmanager
def all_alive() -> Iterator[None]:
    """Around an exchange: say shortly that a process is gone, which has told itself why. Raises CocosError."""
    try:
        yield
    except RuntimeError as error:
        raise CocosError("another process of this run has ended; see what it said") from error


def end_group() -> None:
    """End this process's communication with the others; nothing where there is none.

    Until PyTorch 2.8 the end of a gloo group waits for its worker threads without letting go of the interpreter's lock.
    A worker that frees the last exchange's tensors needs that lock, and both wait for ever. So workers are given time.
    """
    if dist.is_initialized():
        time.sleep(GRACE)
        dist.destroy_process_group()
