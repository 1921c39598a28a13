"""Every loss against a value known in closed form, or against a slow and plain computation of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cocosnet.config import LossConfig
from cocosnet.losses import adversarial, appearance, total
from cocosnet.losses.align import align_loss
from cocosnet.losses.correspondence import correspondence_loss
from cocosnet.losses.mapping import mapping_loss
from cocosnet.losses.match import match_loss
from cocosnet.losses.semantic import semantic_loss
from cocosnet.model.exact import exact_top_k
from cocosnet.model.warp import pixel_grid


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_the_mean_difference_summed_over_levels():
    a = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 8, 8)]
    b = [torch.full((2, 3, 4, 4), 0.5), torch.full((2, 2, 8, 8), -0.25)]
    assert align_loss(a, b).item() == pytest.approx(0.75)
    assert align_loss(b, b) == 0


def test_alignment_of_opposite_unit_vectors_is_its_upper_bound():
    vector = torch.full((1, 16, 2, 2), 0.25)  # unit length
    assert align_loss([vector], [-vector]).item() == pytest.approx(2 / math.sqrt(16))


def test_correspondence_weighs_iterations_and_takes_pseudo_samples_only():
    target = torch.zeros(2, 3, 8, 8)
    coarse = [torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 100.0)])]
    fine = [torch.stack([torch.full((3, 8, 8), value), torch.full((3, 8, 8), -50.0)]) for value in (0.9, 0.3)]
    value = correspondence_loss([coarse, fine], target, torch.tensor([1.0, 0.0]), decay=0.5)
    assert value.item() == pytest.approx(1.0 + (0.5 * 0.9 + 1.0 * 0.3) / 1.5)


def test_correspondence_compares_with_area_averages_at_coarse_levels():
    target = random(1, 3, 8, 12)
    averages = target.reshape(1, 3, 4, 2, 6, 2).mean((3, 5))
    assert correspondence_loss([[averages]], target, torch.ones(1), 0.8) < 1e-6


def test_correspondence_is_the_same_for_any_batch_size_and_zero_without_pseudo_samples():
    warp, target = random(1, 3, 8, 8), random(1, 3, 8, 8, seed=1)
    one = correspondence_loss([[warp]], target, torch.ones(1), 0.8)
    four = correspondence_loss([[warp.repeat(4, 1, 1, 1)]], target.repeat(4, 1, 1, 1), torch.ones(4), 0.8)
    assert four.item() == pytest.approx(one.item())
    assert correspondence_loss([[warp]], target, torch.zeros(1), 0.8) == 0


def test_mapping_adds_both_domains():
    image = torch.zeros(1, 3, 4, 4)
    assert mapping_loss(image + 0.25, image, image - 0.5, image).item() == pytest.approx(0.75)


def test_semantic_loss_looks_at_relu4_2():
    ours = {"relu4_2": torch.ones(1, 2, 3, 3), "relu1_2": torch.zeros(1, 2, 3, 3)}
    truth = {"relu4_2": torch.full((1, 2, 3, 3), 3.0), "relu1_2": torch.ones(1, 2, 3, 3)}
    assert semantic_loss(ours, truth).item() == pytest.approx(2.0)


def test_feature_matching_sums_the_layers_by_their_weights():
    names = ["relu1_2", "relu2_2", "relu3_2", "relu4_2", "relu5_2"]
    ours = {name: torch.zeros(2, 1, 2, 2) for name in names}
    truth = {name: torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2) for name in names}
    weight = 1 / 32 + 1 / 16 + 1 / 8 + 1 / 4 + 1
    assert appearance.feature_loss(ours, truth).tolist() == pytest.approx([weight, 2 * weight])


def test_half_precision_features_keep_the_sign_of_the_gradient():
    a = random(1, 4, 8, 8).bfloat16().requires_grad_()
    b = random(1, 4, 8, 8, seed=1).bfloat16()
    appearance.mean_difference(a, b).sum().backward()
    assert torch.equal(a.grad.sign(), (a.detach().float() - b.float()).sign().bfloat16())


def plain_contextual(x: np.ndarray, y: np.ndarray) -> float:
    """-log CX of C,N and C,M feature sets in numpy, one position at a time."""
    mean = y.mean(1, keepdims=True)
    x, y = x - mean, y - mean
    best = []
    for i in range(x.shape[1]):
        cosine = (x[:, i] @ y) / (np.linalg.norm(x[:, i]) * np.linalg.norm(y, axis=0))
        distance = 1 - cosine
        relative = distance / (distance.min() + 1e-3)
        weights = np.exp((1 - relative) / 0.1)
        best.append((weights / weights.sum()).max())
    return -math.log(np.mean(best))


def test_contextual_distance_agrees_with_a_plain_computation():
    x, y = random(2, 6, 5, 4), random(2, 6, 3, 7, seed=1)
    expected = [plain_contextual(x[b].flatten(1).double().numpy(), y[b].flatten(1).double().numpy()) for b in range(2)]
    assert appearance.contextual_distance(x, y).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_picture_is_at_distance_zero_from_itself_and_from_its_shuffled_self():
    x = random(1, 32, 8, 8)
    shuffled = x.flatten(2)[:, :, torch.randperm(64, generator=torch.Generator().manual_seed(1))].view(1, 32, 8, 8)
    assert abs(appearance.contextual_distance(x, x).item()) < 1e-3
    assert abs(appearance.contextual_distance(x, shuffled).item()) < 1e-3
    assert appearance.contextual_distance(x, random(1, 32, 8, 8, seed=2)).item() > 0.5


def test_contextual_distance_knows_no_positions():
    x, y = random(1, 8, 6, 6), random(1, 8, 6, 6, seed=1)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    moved_x = x.flatten(2)[:, :, order].view(1, 8, 6, 6)
    moved_y = y.flatten(2)[:, :, order].view(1, 8, 6, 6)
    value = appearance.contextual_distance(x, y).item()
    assert appearance.contextual_distance(moved_x, y).item() == pytest.approx(value, rel=1e-5)
    assert appearance.contextual_distance(x, moved_y).item() == pytest.approx(value, rel=1e-5)


def test_contextual_distance_is_not_rounded_where_convolutions_are():
    x, y = random(1, 8, 6, 6), random(1, 8, 6, 6, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = appearance.contextual_distance(x, y)
    assert torch.equal(rounded, appearance.contextual_distance(x, y))


def test_contextual_loss_bounds_the_number_of_positions_and_has_a_gradient():
    layers = {"relu3_2": 160, "relu4_2": 80, "relu5_2": 8}
    x = {name: random(1, 4, side, side).requires_grad_() for name, side in layers.items()}
    y = {name: random(1, 4, side, side, seed=1) for name, side in layers.items()}
    value = appearance.contextual_loss(x, y)
    weighted = [
        2
        * appearance.contextual_distance(
            torch.nn.functional.avg_pool2d(x["relu3_2"], 4), torch.nn.functional.avg_pool2d(y["relu3_2"], 4)
        ),
        4
        * appearance.contextual_distance(
            torch.nn.functional.avg_pool2d(x["relu4_2"], 2), torch.nn.functional.avg_pool2d(y["relu4_2"], 2)
        ),
        8 * appearance.contextual_distance(x["relu5_2"], y["relu5_2"]),
    ]
    assert value.item() == pytest.approx(sum(weighted).item(), rel=1e-5)
    value.sum().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in x.values())


def test_hinge_is_as_printed():
    assert adversarial.hinge(torch.tensor([-2.0, 0.0, 1.0, 5.0])).tolist() == [-3.0, -1.0, 0.0, 0.0]


def test_adversarial_losses_of_known_scores():
    real = [torch.tensor([2.0, 0.5]), torch.tensor([0.0])]
    fake = [torch.tensor([-2.0, 0.0]), torch.tensor([1.0])]
    first = (0 + 0.5) / 2 + (0 + 1) / 2
    second = 1.0 + 2.0
    assert adversarial.discriminator_loss(real, fake).item() == pytest.approx((first + second) / 2)
    assert adversarial.generator_loss(fake).item() == pytest.approx((1.0 - 1.0) / 2)


def test_total_is_the_weighted_sum_of_what_is_there():
    weights = total.loss_weights(LossConfig(align=10, corr=100, map=1, adv=0.5))
    parts = {"align": torch.tensor(0.1), "corr": torch.tensor(0.2), "map": torch.tensor(3.0), "adv": torch.tensor(-2.0)}
    assert total.total_loss(parts, weights).item() == pytest.approx(1 + 20 + 3 - 1)


def test_without_a_perceptual_network_its_losses_weigh_nothing():
    weights = total.loss_weights(LossConfig(perceptual="none"))
    assert weights["sem"] == weights["contextual"] == weights["feature"] == 0 and weights["align"] > 0


def plain_match_loss(x, y, field, temperature):
    """The surprise at the true places, pixel by pixel in float64; x, y: C,h,w arrays of unit length."""
    channels, height, width = y.shape
    surprises = []
    for row, column in np.ndindex(height, width):
        at = field[:, row, column]
        if not (0 <= at[0] <= height - 1 and 0 <= at[1] <= width - 1):
            continue
        top, left = (min(int(a), size - 2) for a, size in zip(at, (height, width)))
        down, right = at[0] - top, at[1] - left
        above = (1 - right) * x[:, top, left] + right * x[:, top, left + 1]
        below = (1 - right) * x[:, top + 1, left] + right * x[:, top + 1, left + 1]
        query = (1 - down) * above + down * below
        logits = np.einsum("c,chw->hw", query / np.linalg.norm(query), y) / temperature
        surprises.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[row, column])
    return np.mean(surprises)


def unit(features):
    return torch.nn.functional.normalize(features, dim=1)


def test_the_match_loss_is_the_surprise_at_the_true_place():
    x, y = unit(random(2, 4, 9, 11)), unit(random(2, 4, 9, 11, seed=1))
    field = pixel_grid(9, 11) + 3 * random(2, 2, 9, 11, seed=2)
    expected = [plain_match_loss(*(t[i].double().numpy() for t in (x, y, field)), 0.1) for i in range(2)]
    assert match_loss([x], [y], field, torch.ones(2), 0.1).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert match_loss([x], [y], field, torch.tensor([0.0, 1.0]), 0.1).item() == pytest.approx(expected[1], rel=1e-5)
    assert match_loss([x], [y], field, torch.zeros(2), 0.1) == 0


def test_the_match_loss_and_its_gradients_are_not_rounded_where_convolutions_are():
    maps = [unit(random(1, 8, 8, 8, seed=seed)).requires_grad_() for seed in (5, 6)]
    grid = pixel_grid(8, 8).unsqueeze(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = match_loss(maps[:1], maps[1:], grid, torch.ones(1), 0.01)
    value = match_loss(maps[:1], maps[1:], grid, torch.ones(1), 0.01)
    assert torch.equal(rounded, value)
    for a, b in zip(torch.autograd.grad(rounded, maps), torch.autograd.grad(value, maps)):
        assert torch.equal(a, b)


def test_the_match_loss_knows_nothing_of_flat_features_and_everything_of_distinct_ones():
    """Summed over levels: log of the number of places each where all look alike, 0 where each looks like its match."""
    grid = pixel_grid(16, 16).unsqueeze(0)
    flat = [torch.ones(1, 1, 8, 8), torch.ones(1, 1, 16, 16)]
    assert match_loss(flat, flat, grid, torch.ones(1), 0.01).item() == pytest.approx(math.log(64) + math.log(256))
    distinct = torch.eye(64).view(1, 64, 8, 8)
    moved = distinct.roll((1, 2), (2, 3))  # what the exemplar shows at p is x_B at p - (1, 2)
    field = (pixel_grid(8, 8) - torch.tensor([1.0, 2.0]).view(2, 1, 1)).unsqueeze(0)
    assert match_loss([distinct], [moved], field, torch.ones(1), 0.01) < 1e-6
    assert match_loss([distinct], [moved], grid[..., :8, :8], torch.ones(1), 0.01) > 90


def test_the_match_loss_of_large_levels_looks_at_a_part_of_them():
    """Every other row and column of 128x128 are compared: 64x64 places, all alike."""
    flat = torch.ones(1, 1, 128, 128)
    value = match_loss([flat], [flat], pixel_grid(128, 128).unsqueeze(0), torch.ones(1), 0.01)
    assert value.item() == pytest.approx(math.log(64 * 64))


def test_moving_down_the_match_loss_brings_the_places_together():
    x, y = (random(1, 16, 8, 8, seed=seed).requires_grad_() for seed in (3, 4))
    grid, optimiser = pixel_grid(8, 8).unsqueeze(0), torch.optim.Adam([x, y], lr=0.05)
    for _ in range(60):
        loss = match_loss([unit(x)], [unit(y)], grid, torch.ones(1), 0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = exact_top_k(unit(x.detach()), unit(y.detach()), 1).positions[:, 0]
    assert torch.equal(found, grid)
