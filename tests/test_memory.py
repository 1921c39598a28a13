"""What a process does with the memory that it has freed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_tools import clean_environment

FAULTS = """
import resource, sys
import torch
from cocosnet.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24) + 1  # 64 MiB a map, 16,384 pages
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10

pages()  # finds room
print(pages())
"""


def faults(mode: str, **environment: str) -> int:
    """How many pages the system prepares for two maps, where some of their size were made and freed before."""
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(**environment), check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the option")
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise():
    if faults("leave") < 10_000:
        pytest.skip("this C library keeps freed memory by itself")
    assert faults("keep") < 3_300  # a tenth: now and then one more map finds no hole that it fits in
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="100000") > 10_000
