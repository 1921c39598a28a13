"""The Triton engine: run by its interpreter against the reference, and compiled to machine code for a GPU of today.

The interpreter must be chosen before the kernels are made, so both run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMMON = """
import torch
import torch.nn.functional as F
from cocosnet.model import patchmatch, triton_engine

def unit(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)

def case(batch, channels, candidates, height, width, rows, columns):
    x, y = unit(0, batch, channels, height, width), unit(1, batch, channels, rows, columns)
    random = torch.rand(batch, candidates, 2, height, width, generator=torch.Generator().manual_seed(2))
    return random * torch.tensor([rows + 2.0, columns + 2.0]).view(1, 1, 2, 1, 1) - 1.5, x, y

CASES = [(2, 5, 3, 4, 6, 5, 3), (1, 8, 6, 7, 3, 4, 9), (1, 3, 1, 2, 2, 1, 5), (1, 33, 17, 3, 3, 6, 6)]
"""

PROPAGATION = """
for sizes in CASES:
    field, x, y = case(*sizes)
    expected = patchmatch.propagate(field, x, y)
    ours = triton_engine.propagate(field, x, y)
    torch.testing.assert_close(ours.scores, expected.scores, atol=2e-6, rtol=1e-5)
    field = patchmatch.clamp_positions(field, *y.shape[-2:])
    again = triton_engine.propagate(field, x, y, triton_engine.evaluate(field, x, y).scores)
    torch.testing.assert_close(again.scores, expected.scores, atol=2e-6, rtol=1e-5)
    found = patchmatch.cosine(x, y, ours.positions)
    filled = torch.isfinite(ours.scores)
    torch.testing.assert_close(found[filled], ours.scores[filled], atol=2e-6, rtol=1e-5)
"""

GRADIENTS = """
for sizes in CASES:
    field, x, y = case(*sizes)
    field = patchmatch.clamp_positions(field * 0.7 + 0.2, y.shape[-2] - 0.99, y.shape[-1] - 0.99)
    if torch.__version__.startswith("2.6."):  # there the reference has no gradient on the border itself
        field = field.clamp(min=0.01)
    results = []
    for evaluate in (triton_engine.evaluate, patchmatch.evaluate):
        inputs = [t.clone().requires_grad_() for t in (field, x, y)]
        scores = evaluate(*inputs).scores
        scores.clamp(min=-2).square().sum().backward()
        results.append([scores.detach(), *(t.grad for t in inputs)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
"""

PROPERTIES = """
from hypothesis import given, settings, strategies as st

@given(
    st.tuples(*[st.integers(low, high) for low, high in [(1, 2), (2, 9), (1, 7), (1, 5), (1, 5), (1, 6), (1, 6)]]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
@settings(max_examples=12, deadline=None, database=None)
def agree(sizes, dtype, whole):
    field, x, y = case(*sizes)
    field, x, y = (field.round() if whole else field), x.to(dtype), y.to(dtype)
    ours = triton_engine.propagate(field, x, y, iterations=2)
    expected = patchmatch.propagate(field, x.float(), y.float(), iterations=2)
    torch.testing.assert_close(ours.scores, expected.scores, atol=2e-6, rtol=1e-5)
    assert ((ours.positions >= 0) & (ours.positions <= field.new_tensor(y.shape[-2:]).view(2, 1, 1) - 1)).all()

agree()
"""

DESCENT = """
for sizes, dtype in zip(CASES * 2, [torch.float32] * 4 + [torch.bfloat16] * 4):
    batch, channels, candidates, height, width, rows, columns = sizes
    x, y = (unit(n, batch, channels, *size).to(dtype) for n, size in enumerate(((height, width), (rows, columns))))
    coarse = case(batch, channels, candidates, -(-height // 2), -(-width // 2), -(-rows // 2), -(-columns // 2))[0]
    expected, ours = patchmatch.descend(coarse, x.float(), y.float()), triton_engine.descend(coarse, x, y)
    torch.testing.assert_close(ours.scores, expected.scores, atol=2e-6, rtol=1e-5)
    assert ours.positions.shape == expected.positions.shape == (batch, candidates, 2, height, width)
    filled = torch.isfinite(ours.scores)
    found = patchmatch.cosine(x.float(), y.float(), ours.positions)
    torch.testing.assert_close(found[filled], ours.scores[filled], atol=2e-6, rtol=1e-5)
"""

TOO_MANY = """
import logging
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("cocosnet").addHandler(handler)
names = [patchmatch._triton(torch.zeros(1), 33) for _ in range(2)]
assert names == [None, None] and len(messages) == 1 and "at most 32" in messages[0], messages
"""

BFLOAT16 = """
field, x, y = case(1, 16, 4, 6, 7, 3, 300)  # columns that bfloat16 cannot count
x, y = x.bfloat16(), y.bfloat16()
expected = patchmatch.propagate(field, x.float(), y.float())
# grid_sample, which the reference reads with, scales positions to [-1, 1]: at 300 columns that moves them by 2e-5 px.
torch.testing.assert_close(triton_engine.propagate(field, x, y).scores, expected.scores, atol=5e-5, rtol=0)
inputs = [field.clamp(min=0).requires_grad_(), x.requires_grad_(), y.requires_grad_()]
scores = triton_engine.evaluate(*inputs).scores
scores.clamp(min=-2).sum().backward()
assert [t.grad.dtype for t in inputs] == [torch.float32, torch.bfloat16, torch.bfloat16]
"""

DOOR = """
from cocosnet.config import MatchingConfig
from cocosnet.model.hierarchy import Hierarchy
warps = []
for backend in ("triton", "reference"):
    torch.manual_seed(0)
    hierarchy = Hierarchy((6, 6), MatchingConfig(channels=6, candidates=4, iterations=2, hidden=8, backend=backend))
    x, y = ([unit(seed, 1, 6, 4, 6), unit(seed + 1, 1, 6, 8, 12)] for seed in (1, 4))
    warps.append(hierarchy(x, y, unit(3, 1, 3, 8, 12))[-1].warps[-1])
torch.testing.assert_close(*warps, atol=1e-4, rtol=1e-4)
"""

COMPILATION = """
import pathlib, re, subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile as build
from cocosnet.model import triton_engine

def kernel(function, types, **constants):
    constants = {"K": K, **triton_engine.block_sizes(K, 32), **constants}
    signature = dict.fromkeys(function.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    try:
        source = ASTSource(function, signature, {(function.arg_names.index(n),): v for n, v in constants.items()})
    except TypeError:  # until Triton 3.2 constants went by name, and had no type
        source = ASTSource(function, {n: t for n, t in signature.items() if t != "constexpr"}, constants)
    built = build(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in built.asm["ptx"] and len(built.asm["cubin"]) > 1000
    pathlib.Path(folder, "kernel.ptx").write_text(built.asm["ptx"])
    command = [assembler, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True).stderr
    spilled = re.search(r"(\\d+) bytes spill stores", said)
    assert int(spilled[1]) <= 64, said  # a launch knows how pointers are aligned, and spills nothing

def pointers(features, *names):
    return {"fx": "*" + features, "fy": "*" + features, **{name: "*fp32" for name in names}}

folder = sys.argv[1]
assembler = str(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
for features, K in (("fp32", 16), ("bf16", 16), ("bf16", 32)):
    for vertical in (False, True):
        names = pointers(features, "field", "known", "best", "best_scores")
        kernel(triton_engine._pass_kernel, names, VERTICAL=vertical)
    steps = dict.fromkeys(("step_y", "step_x"), "i64")  # as a launch passes numbers beyond 2^31
    kernel(triton_engine._descend_kernel, pointers(features, "parents", "best", "best_scores") | steps)
    kernel(triton_engine._scores_kernel, pointers(features, "field", "result"))
    kernel(triton_engine._backward_kernel, pointers(features, "field", "gradient", "by_position", "by_x", "by_y"))
"""


def run(program: str, interpret: bool, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "program",
    [PROPAGATION, PROPERTIES, DESCENT, GRADIENTS, BFLOAT16, DOOR, TOO_MANY],
    ids=["passes", "properties", "descent", "gradients", "bf16", "door", "too-many"],
)
def test_the_kernels_agree_with_the_reference(program):
    done = run(COMMON + program, interpret=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_compile_for_a_gpu_and_keep_their_candidates_in_registers(tmp_path):
    done = run(COMPILATION, False, str(tmp_path))
    if "Cannot find ptxas" in done.stderr:
        pytest.skip("this triton comes without ptxas")
    assert done.returncode == 0, done.stderr
