"""How the threads of a process wait for each other."""

from __future__ import annotations

import os

TURNS = "10000"  # of a waiting loop, some tens of microseconds; docs/performance.md compares


def sleep_when_waiting() -> None:
    """Have threads that wait for others go to sleep soon. Counts if called before PyTorch is imported.

    GNU's OpenMP, which PyTorch for Linux comes with, waits in a loop for milliseconds first. That is quickest on an
    idle machine. But where another process holds a core, the thread that is waited for does not run meanwhile: of two
    threads each of the thousands of waits in a translation lasts a turn of the scheduler's. Where the environment says
    how to wait (OMP_WAIT_POLICY, GOMP_SPINCOUNT), it stays so.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = TURNS
