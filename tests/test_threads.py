"""How the threads of a process wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cli_tools import clean_environment

WAITING = """
import sys, time
if sys.argv[1] == "sleep":
    from cocosnet.threads import sleep_when_waiting
    sleep_when_waiting()
import torch
torch.set_num_threads(2)
x = torch.ones(2**20)
x + 1
begin = time.process_time()
for _ in range(100):
    x + 1  # work for both threads, and then none
    time.sleep(0.01)
print(time.process_time() - begin)
"""


def seconds(mode: str, **environment: str) -> float:
    """Processor time that a process takes whose threads have nearly nothing to do."""
    command = [sys.executable, "-c", WAITING, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(**environment), check=True)
    return float(done.stdout)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread does not wait for another")
def test_threads_that_wait_leave_the_processor_to_others_unless_the_environment_says_otherwise():
    if seconds("leave") < 0.3:
        pytest.skip("this OpenMP lets threads sleep by itself")
    assert seconds("sleep") < 0.3
    assert seconds("sleep", OMP_WAIT_POLICY="active") > 0.3


def test_a_command_says_how_to_wait_before_pytorch_is_there():
    program = """if True:
        import sys
        from cocosctl import app
        app.run = lambda arguments: print(__import__("os").environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
        app.main()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean_environment())
    assert done.stdout == "10000 False\n", done.stderr
