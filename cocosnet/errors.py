"""The errors that a user can cause and mend; the command line turns each into one line and an exit code.

What else is raised comes from the system or another package, is a ValueError for tensors that do not fit, or is a
defect of ours, which keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class CocosError(Exception):
    """Base of all errors with a remedy. The message is one line that names the thing at fault and what to do."""


class DataError(CocosError):
    """An input file, record or folder cannot be used (exit code 3, or an error record in a batch, which goes on)."""


class OutputError(DataError):
    """A file cannot be written: the disk is full or read-only. The next item would fare no better, so a batch ends."""


class ConfigError(CocosError):
    """A preset, a config file or a `--set` is wrong (exit code 3)."""


class CheckpointError(CocosError):
    """A checkpoint exists but is damaged, of another kind, or does not fit the network (exit code 3)."""


class MissingWeights(CocosError):
    """Weights that are needed are not on this machine (exit code 5)."""


class MissingDependency(CocosError):
    """An optional package or a device that is needed is absent (exit code 5)."""


class Stopped(CocosError):
    """A signal asked to stop; the state was saved and the work can be resumed (exit code 75). It is no mistake."""


class HelperKilled(CocosError):
    """A process that this one had started was killed; what is made stays and the work can be resumed (code 75)."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the GPU or of the machine did not suffice; PyTorch has a class for the former only.

    oneDNN, which computes on CPUs, says that it could not create a primitive where it has no memory for one; of one
    that it does not know it says that it could not create the primitive's descriptor.
    """
    import torch

    said = str(error).strip()
    no_room = "can't allocate memory" in said or said.endswith("could not create a primitive")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or no_room


@contextlib.contextmanager
def memory_named(named: Callable[[Exception], CocosError]) -> Iterator[None]:
    """Around work that may need more memory than there is: that becomes the error that `named` makes of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise named(error) from error
