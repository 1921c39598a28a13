"""The path on a GPU: what it would be asked to do, traced with tensors that have shapes and devices but no numbers.

Where there is a GPU, also the kernels and a training step on it, against the reference and the CPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from test_matching import field, unit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_tools import tiny

from cocosnet.model.build import build_model
from cocosnet.model.discriminator import Discriminator
from cocosnet.model.layers import SpadeBlock
from cocosnet.model.mapping import Mapping
from cocosnet.model.patchmatch import select_engine
from cocosnet.train.batches import Batch
from cocosnet.train.networks import Networks, build_networks
from cocosnet.train.steps import generator_losses

SIZE, BATCH = 32, 2
BFLOAT16, GPU = torch.bfloat16, torch.device("cuda")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Trace(TorchDispatchMode):
    """Counts the operations that see or make a CPU tensor, or wait for a number."""

    def __init__(self):
        super().__init__()
        self.strays: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        seen = [t for t in tree_leaves((arguments, named, result)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in seen) or "_local_scalar_dense" in str(function):
            self.strays[str(function)] += 1
        return result


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """CUDA tensors without numbers, under CUDA's own autocast rules."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=False):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", BFLOAT16)
        yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def batch(channels: int) -> Batch:
    """One pseudo exemplar and one real one, on the current default device."""
    pictures = [torch.rand(BATCH, count, SIZE, SIZE) for count in (channels, 3, 3, channels)]
    return Batch(*pictures, torch.tensor([1.0, 0.0]), SIZE * torch.rand(BATCH, 2, SIZE, SIZE))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.kind=spade",),
        ("model.kind=cocosnet",),
        ("model.kind=cocosnet-v2",),
        ("model.matching.start=wide",),
        ("model.matching.backend=exact",),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_neither_leaves_the_gpu_nor_waits_for_it(overrides, training, fake_gpu):
    config = tiny("model.matching.backend=reference", *overrides)
    with GPU:
        model, given = build_model(config).train(training), batch(config.data.condition_channels)
    with Trace() as trace, torch.set_grad_enabled(training):
        out = model(given.condition, given.exemplar)
    assert out.image.is_cuda and not trace.strays


def test_the_losses_neither_leave_the_gpu_nor_wait_for_it_and_are_float32(fake_gpu):
    config = tiny("model.matching.backend=reference", "loss.match=1", "loss.perceptual=none")
    channels = config.data.condition_channels
    with GPU:
        discriminator = Discriminator(channels, config.model.discriminator)
        mapping = Mapping(config.model.encoder.out_widths)
        networks, given = Networks(build_model(config), mapping, discriminator, None, BFLOAT16), batch(channels)
    with Trace() as trace:
        parts, out = generator_losses(networks, given, config.loss, adversarial_on=True)
    assert {"align", "corr", "match", "map", "adv"} <= parts.keys() and not trace.strays
    for value in (*parts.values(), *out.features_x, *out.warps, out.image):
        assert value.is_cuda and value.dtype == torch.float32


def test_what_the_backward_pass_keeps_of_a_spade_block_is_bfloat16(fake_gpu):
    with GPU:
        block, x, guide = SpadeBlock(8, 4, 3, 8), torch.rand(1, 8, 16, 16, dtype=BFLOAT16), torch.rand(1, 3, 16, 16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert block(x, guide).dtype == BFLOAT16
    maps = [t for t in kept if t.dim() == 4 and t.shape[-2:] == (16, 16) and t.shape[1] > 3]
    assert maps and all(t.dtype == BFLOAT16 for t in maps)


@on_a_gpu
@pytest.mark.parametrize("device", [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cuda:0"])
def test_the_kernels_give_the_references_matches_and_gradients(device):
    assert "TRITON_INTERPRET" not in os.environ
    x, y = unit(0, 2, 32, 48, 40).to(device), unit(1, 2, 32, 33, 64).to(device)
    coarse, positions = field(2, 2, 8, 24, 20, (17, 32)).to(device), field(3, 2, 8, 48, 40, (33, 64)).to(device)
    results = []
    for name in ("triton", "reference"):
        engine = select_engine(name, x, 8)
        leaves = [t.clone().requires_grad_() for t in (positions, x, y)]
        scored = engine.evaluate(*leaves)
        scored.scores.clamp(min=-1).square().sum().backward()
        found = [engine.propagate(positions, x, y).scores, engine.descend(coarse, x, y).scores]
        results.append([*found, scored.scores, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results):
        assert (ours - expected).detach().nan_to_num(0, 1, 1).abs().quantile(0.999) < 1e-3  # both empty: no difference


@on_a_gpu
def test_a_training_step_in_bfloat16_has_the_cpus_losses():
    config, losses = tiny("loss.match=1", "loss.perceptual=none"), []
    for device, precision in ((torch.device("cpu"), torch.float32), (GPU, BFLOAT16)):
        torch.manual_seed(0)
        given = batch(config.data.condition_channels).to(device)
        networks = build_networks(config, device, precision)
        with networks.autocast():
            parts, _ = generator_losses(networks, given, config.loss, adversarial_on=True)
        sum(parts.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in networks.generator_parameters())
        losses.append({name: value.item() for name, value in parts.items()})
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
