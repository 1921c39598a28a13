"""The end of a group of processes (`torchrun`), as the trainer, `prepare` and the metrics all need it."""

from __future__ import annotations

import time

import torch.distributed as dist

GRACE = 0.05  # s; the worker threads need microseconds


def end_group() -> None:
    """End this process's communication with the others; nothing where there is none.

    Until PyTorch 2.8 the end of a gloo group waits for its worker threads without letting go of the interpreter's lock.
    A worker that frees the last exchange's tensors needs that lock, and both wait for ever. So workers are given time.
    """
    if dist.is_initialized():
        time.sleep(GRACE)
        dist.destroy_process_group()
