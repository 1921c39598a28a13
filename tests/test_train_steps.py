"""One step: every parameter learns, numbers that are not finite change nothing, a batch is a function of its number."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from train_tools import prepared_folder, small_vgg, steps_by, tiny

from cocosnet.config import load_config
from cocosnet.data.dataset import PairDataset
from cocosnet.data.distortion import apply_grid
from cocosnet.errors import DataError
from cocosnet.losses.appearance import FEATURE_WEIGHTS, contextual_loss
from cocosnet.losses.perceptual import load_perceptual
from cocosnet.losses.total import loss_weights, total_loss
from cocosnet.precision import pick_precision
from cocosnet.train.batches import StepBatches, make_sample, stack, step_generator
from cocosnet.train.ema import Ema
from cocosnet.train.networks import build_networks, power_iteration
from cocosnet.train.steps import Stepping, discriminator_step, generator_losses, generator_step, psnr, warp_error

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return PairDataset(prepared_folder(tmp_path_factory.mktemp("prepared")), tiny(), split="train")


def perceptual(kind, request, monkeypatch):
    """A small random network, or a real one with the shared weights."""
    if kind == "random":
        return small_vgg()
    monkeypatch.setenv("COCOSCTL_WEIGHTS_DIR", str(request.getfixturevalue("shared") / "weights"))
    return load_perceptual(kind)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.999))


@pytest.mark.parametrize("kind", ["random", "vgg16-caffe"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_whole_objective_reaches_every_parameter(pairs, request, monkeypatch, kind, precision):
    """Eq. 19 with pseudo and other exemplars in the batch: finite, non-zero gradients in M, N (and ConvGRU), G, R."""
    config = load_config("tiny-cpu", ["train.batch=4", "train.real_exemplars=0.5", "loss.perceptual=vgg16-caffe"])
    networks = build_networks(tiny(), CPU, precision)
    networks.perceptual = perceptual(kind, request, monkeypatch).to(precision)
    batch = next(b for b in map(StepBatches(pairs, config).__getitem__, range(9)) if 0 < b.pseudo.sum() < 4).to(CPU)
    with networks.autocast():
        parts, _ = generator_losses(networks, batch, config.loss, adversarial_on=True)
    assert set(parts) == {"align", "corr", "map", "sem", "feature", "contextual", "adv"}
    total_loss(parts, loss_weights(config.loss)).backward()
    for part in (networks.model, networks.mapping):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def mixed_batch(pairs):
    """Networks of the tiny preset with a perceptual one, and a batch with pseudo and other exemplars."""
    config = load_config("tiny-cpu", ["train.batch=4", "train.real_exemplars=0.5", "loss.perceptual=vgg16-caffe"])
    networks = build_networks(tiny(), CPU, torch.float32)
    networks.perceptual = small_vgg()
    batch = next(b for b in map(StepBatches(pairs, config).__getitem__, range(9)) if 0 < b.pseudo.sum() < 4)
    return networks, batch.to(CPU), config


def apart_by(a, b):
    """|a - b|_1 as a mean, in float64: a number a sample."""
    return (a.double() - b.double()).abs().mean((1, 2, 3))


@torch.no_grad()
def test_each_loss_compares_what_its_equation_names(pairs):
    """Eq. 11 to 18 written out from the paper: x_A condition, x_B its picture, y_B exemplar, x its translation."""
    networks, batch, config = mixed_batch(pairs)
    model, phi, r, d = networks.model, networks.perceptual, networks.mapping, networks.discriminator
    parts, out = generator_losses(networks, batch, config.loss, adversarial_on=True)
    x_a, x_b, y_b, x, pseudo = batch.condition, batch.image, batch.exemplar, out.image, batch.pseudo.double()
    ours, truth, theirs = (phi(picture, FEATURE_WEIGHTS) for picture in (x, x_b, y_b))
    of_x_a, of_x_b, of_y_b = model.encode_condition(x_a), model.encode_image(x_b), model.encode_image(y_b)
    weighted = [(0.8 * apart_by(a, small) + apart_by(b, small)) / 1.8 for a, b, small in warps_and_targets(out, x_b)]
    first = [apart_by(out.warps[0], F.avg_pool2d(x_b, 4))]
    matched = sum(weight * apart_by(ours[name], truth[name]) for name, weight in FEATURE_WEIGHTS.items())
    expected = {
        "align": sum(apart_by(a, b).mean() for a, b in zip(of_x_a, of_x_b, strict=True)),  # Eq. 11
        "corr": (pseudo * sum(first + weighted)).sum() / pseudo.sum(),  # Eq. 12
        "map": (apart_by(r(of_x_a), x_b) + apart_by(r(of_y_b), y_b)).mean(),  # Eq. 13-14
        "sem": apart_by(ours["relu4_2"], truth["relu4_2"]).mean(),  # Eq. 15
        "contextual": ((1 - pseudo) * contextual_loss(ours, theirs)).mean(),  # Eq. 16, first term
        "feature": (pseudo * matched).mean(),  # Eq. 16, second term
        "adv": -sum(scale[-1].double().mean() for scale in d(x_a, x)) / 2,  # Eq. 18
    }
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name


def warps_and_targets(out, picture):
    """Of each finer level: the warps of both iterations, and the picture at that size."""
    finer = out.iteration_warps[1:]
    return [(*warps, F.avg_pool2d(picture, 2 ** (len(finer) - 1 - i))) for i, warps in enumerate(finer)]


def test_the_discriminator_tells_a_condition_with_its_picture_from_one_with_a_translation(pairs):
    """Eq. 17: -E[h(D(x_A, x_B))] - E[h(-D(x_A, x))], h(t) = min(0, -1 + t)."""
    networks, batch, _ = mixed_batch(pairs)
    d, fake = networks.discriminator, 0.5 * batch.exemplar
    still = torch.optim.SGD(d.parameters(), lr=0.0)
    value = discriminator_step(networks, still, batch, fake).parts["disc"].item()
    real, made = (d(batch.condition, picture) for picture in (batch.image, fake))
    hinges = [(1 - a[-1]).clamp(min=0).mean() + (1 + b[-1]).clamp(min=0).mean() for a, b in zip(real, made)]
    assert value == pytest.approx(sum(h.item() for h in hinges) / len(hinges), rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def at_once(folder):
    return steps_by(folder)


def agrees(made, wanted, tolerance):
    """Losses to `tolerance`; gradients less closely, since of two matches that tie within rounding either may win."""
    for ours, theirs in zip(made["parts"], wanted["parts"], strict=True):
        for name in theirs:
            bound = 1e-2 if name.endswith("grad_norm") else tolerance
            assert ours[name] == pytest.approx(theirs[name], rel=bound, abs=bound), name
    assert max((made["weights"][n] - w).abs().max() for n, w in wanted["weights"].items()) < 3e-4


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_makes_the_same_steps_as_at_once(folder, at_once, parts):
    agrees(steps_by(folder, accumulate=parts), at_once, 1e-5)


def test_computing_activations_again_changes_no_number(folder, at_once):
    agrees(steps_by(folder, checkpointing=True), at_once, 1e-6)


def test_bfloat16_stays_near_float32_and_keeps_matching_and_losses_in_float32(pairs, folder, at_once):
    made = steps_by(folder, precision=torch.bfloat16, count=1)["parts"][0]
    # All but the contextual loss, which divides by almost 0 where features are random.
    for name in ("align", "corr", "match", "map", "sem", "feature"):
        assert made[name] == pytest.approx(at_once["parts"][0][name], rel=0.05), name
    networks = build_networks(tiny(), CPU, torch.bfloat16)
    batch = StepBatches(pairs, tiny())[0].to(CPU)
    with networks.autocast():
        parts, out = generator_losses(networks, batch, tiny().loss, adversarial_on=True)
        assert networks.model.translator.to_rgb(torch.zeros(1, 8, 4, 4)).dtype == torch.bfloat16
    held = [value for match in out.matches for value in (match.positions, match.scores)]
    for value in (*parts.values(), *held, *out.features_x, *out.warps, out.image):
        assert value.dtype == torch.float32


def test_clipping_bounds_the_step(pairs):
    config = tiny()
    batch, moved = StepBatches(pairs, config)[0].to(CPU), []
    for clip in (0.0, 0.1):
        networks = build_networks(config, CPU, torch.float32)
        before = [p.detach().clone() for p in networks.generator_parameters()]
        optimizer = torch.optim.SGD(networks.generator_parameters(), lr=1.0)
        stepping = Stepping(clip=clip)
        result = generator_step(networks, optimizer, batch, config.loss, adversarial_on=False, stepping=stepping)
        steps = [(a - b).flatten() for a, b in zip(before, networks.generator_parameters(), strict=True)]
        moved.append((torch.cat(steps).norm().item(), result.parts["grad_norm"].item()))
    (free, norm), (bound, same) = moved
    assert free == pytest.approx(norm, rel=1e-4) and norm == pytest.approx(same)
    assert norm > 0.2 and bound == pytest.approx(0.1, rel=1e-3)


def test_levels_enter_one_after_the_other(pairs):
    """Before its turn a level has its coarser one's matches, enlarged; warps keep their sizes; a step can be made."""
    networks, batch = build_networks(tiny(), CPU, torch.float32), StepBatches(pairs, tiny())[0].to(CPU)
    networks.model.hierarchy.depth = 1
    result = generator_step(networks, adam(networks.generator_parameters()), batch, tiny().loss, adversarial_on=False)
    assert result.applied
    out = networks.model(batch.condition, batch.exemplar)
    assert [warp.shape[-1] for warp in out.warps] == [8, 16, 32]
    assert torch.equal(out.matches[2].positions[..., ::4, ::4], 4 * out.matches[0].positions)


def test_the_first_step_of_a_level_that_enters_late_is_no_longer_than_others(pairs):
    """Had Adam counted the steps without it, it would be sqrt(9) times as long."""
    networks, batch = build_networks(tiny(), CPU, torch.float32), StepBatches(pairs, tiny())[0].to(CPU)
    optimizer, late = adam(networks.generator_parameters()), networks.model.hierarchy.fine[0].refinement
    networks.model.hierarchy.depth = 1
    for _ in range(8):
        generator_step(networks, optimizer, batch, tiny().loss, adversarial_on=False)
    before = copy.deepcopy(list(late.parameters()))
    networks.model.hierarchy.depth = 3
    assert generator_step(networks, optimizer, batch, tiny().loss, adversarial_on=False).applied
    moved = max((a - b).abs().max().item() for a, b in zip(before, late.parameters(), strict=True))
    assert moved == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("seen", ["true", "false"])
def test_a_size_that_the_networks_pad_can_be_trained(pairs, seen):
    """36 px, which a network with a coarsest scale of 1/8 fills up to 40."""
    config = tiny(
        "data.size=36",
        "model.encoder.widths=[8,8,8,8]",
        "loss.match=1",
        f"model.encoder.exemplar_condition={seen}",
    )
    networks, batch = build_networks(config, CPU, torch.float32), StepBatches(pairs, config)[0].to(CPU)
    result = generator_step(networks, adam(networks.generator_parameters()), batch, config.loss, adversarial_on=True)
    assert result.applied and result.image.shape == (2, 3, 36, 36)
    encoded = networks.model.encode_image(batch.image, batch.inputs[2])
    assert (
        [f.shape[-1] for f in encoded] == [f.shape[-1] for f in networks.model(*batch.inputs).features_y] == [9, 18, 36]
    )


def test_the_discriminator_learns_and_the_generator_step_leaves_it_alone(pairs):
    config = tiny()
    networks, batch = build_networks(config, CPU, torch.float32), StepBatches(pairs, config)[0].to(CPU)
    before = copy.deepcopy(dict(networks.discriminator.named_parameters()))
    result = generator_step(networks, adam(networks.generator_parameters()), batch, config.loss, adversarial_on=True)
    assert all(torch.equal(before[name], p) for name, p in networks.discriminator.named_parameters())
    optimizer = adam(networks.discriminator.parameters())
    values = [discriminator_step(networks, optimizer, batch, result.image).parts["disc"].item() for _ in range(12)]
    assert values[-1] < values[0] - 0.05
    assert not any(torch.equal(before[name], p) for name, p in networks.discriminator.named_parameters())


def test_a_few_steps_on_one_batch_bring_the_losses_down(pairs):
    config = tiny("loss.adv=0")
    networks, batch = build_networks(config, CPU, torch.float32), StepBatches(pairs, config)[0].to(CPU)
    optimizer = adam(networks.generator_parameters())
    results = [generator_step(networks, optimizer, batch, config.loss, adversarial_on=False) for _ in range(25)]
    first, last = (results[i].parts for i in (0, -1))
    assert all(result.applied for result in results)
    for name in ("total", "align", "map"):
        assert last[name] < first[name], name
    assert last["warp_psnr"] > first["warp_psnr"]


def test_numbers_that_are_not_finite_change_nothing(pairs):
    config = tiny()
    networks, batch = build_networks(config, CPU, torch.float32), StepBatches(pairs, config)[0].to(CPU)
    before = copy.deepcopy(networks.mapping.state_dict())
    with torch.no_grad():
        networks.model.translator.contrast.fill_(float("nan"))
    result = generator_step(networks, adam(networks.generator_parameters()), batch, config.loss, adversarial_on=True)
    assert not result.applied
    assert all(torch.equal(before[name], value) for name, value in networks.mapping.state_dict().items())


def test_warp_psnr_counts_pseudo_samples_only(pairs):
    batch = StepBatches(pairs, tiny("train.real_exemplars=0"))[0]
    batch.pseudo[1] = 0
    warp = batch.image.clone().clamp(-0.9, 0.9)
    batch.image = warp + 0.1
    warp[1] = -1
    error = warp_error(warp, batch, batch.pseudo.mean())
    assert psnr(error).item() == pytest.approx(10 * torch.log10(torch.tensor(400.0)).item(), abs=1e-3)
    batch.pseudo.zero_()
    assert psnr(warp_error(warp, batch, batch.pseudo.mean())).isnan()


def test_a_batch_is_a_function_of_seed_and_step(pairs):
    one, two, other = (StepBatches(pairs, tiny(f"train.seed={seed}")) for seed in (1, 1, 2))
    for name, value in vars(one[3]).items():
        assert torch.equal(value, vars(two[3])[name])
    assert not torch.equal(one[3].image, one[4].image) and not torch.equal(one[3].image, other[3].image)


def test_every_epoch_takes_every_picture_once_in_another_order(pairs):
    batches, count = StepBatches(pairs, tiny()), len(pairs)
    epochs = [batches.order(epoch * count, count) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batches.order(3, count) == (epochs[0] + epochs[1])[3 : 3 + count]


def test_shapes_ranges_and_the_share_of_pseudo_exemplars(pairs):
    config = tiny("train.batch=5", "train.real_exemplars=0.3", "model.encoder.exemplar_condition=true")
    batches = [StepBatches(pairs, config)[step] for step in range(40)]
    share = torch.cat([batch.pseudo for batch in batches]).mean()
    assert 0.6 < share < 0.8
    batch = batches[0]
    assert batch.condition.shape == batch.exemplar_condition.shape == (5, 1, 32, 32)
    assert batch.image.shape == batch.exemplar.shape == (5, 3, 32, 32)
    assert batch.image.min() >= -1 and batch.image.max() <= 1
    assert batch.condition.min() >= 0 and batch.condition.max() <= 1


def test_a_pseudo_exemplar_is_the_picture_distorted_together_with_its_condition(pairs):
    item = dict(pairs[0])
    item["condition"] = item["image"][:1]  # so that the two can be compared afterwards
    config = tiny("model.encoder.exemplar_condition=true")
    sample = make_sample(item, config, pseudo=True, generator=step_generator(0, 0, 0))
    torch.testing.assert_close(sample.exemplar[:, :1], sample.exemplar_condition)
    assert sample.pseudo == 1 and (sample.exemplar - sample.image).abs().mean() > 0.01


@pytest.mark.parametrize("pseudo", [True, False])
def test_a_model_that_does_not_see_the_exemplars_condition_is_not_sent_it_and_all_else_stays_the_same(pairs, pseudo):
    sent, unsent = (
        make_sample(pairs[0], tiny(*overrides), pseudo=pseudo, generator=step_generator(0, 0, 0))
        for overrides in (("model.encoder.exemplar_condition=true",), ())
    )
    assert sent.inputs[2].shape[1] == 1 and unsent.inputs[2] is None and unsent.exemplar_condition.numel() == 0
    for name in ("condition", "image", "exemplar", "pseudo", "field"):
        assert torch.equal(getattr(sent, name), getattr(unsent, name)), name


def test_a_pseudo_exemplar_takes_one_picture_alone(tmp_path):
    """Nothing else is read or decoded: the exemplars that the manifest names may be gone."""
    folder = prepared_folder(tmp_path, count=3, held_out=2)
    for index in (1, 2):
        (folder / "images" / f"{index}.png").unlink()
    only = StepBatches(PairDataset(folder, tiny(), split="train"), tiny("train.real_exemplars=0"))
    assert only[0].pseudo.tolist() == [1, 1]


def test_a_pseudo_exemplar_says_where_it_shows_the_picture(pairs):
    batch = stack([make_sample(pairs[i], tiny(), pseudo=i < 2, generator=step_generator(0, 1, i)) for i in range(3)])
    assert torch.allclose(apply_grid(batch.image, batch.field)[:2], batch.exemplar[:2], atol=1e-5)
    assert batch.field[2].abs().sum() == 0


def test_another_exemplar_is_never_the_picture_itself(pairs):
    batches = StepBatches(pairs, tiny("train.real_exemplars=1", "train.batch=8"))
    for step in range(5):
        batch = batches[step]
        assert batch.pseudo.sum() == 0 and ((batch.image - batch.exemplar).abs().mean((1, 2, 3)) > 0.01).all()


def test_a_picture_below_the_training_size_is_named(pairs):
    with pytest.raises(DataError, match="40x44 is smaller than data.size=64"):
        make_sample(pairs[0], tiny("data.size=64"), pseudo=True, generator=step_generator(0, 0, 0))


def test_the_average_has_the_half_life_that_it_is_given():
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(0.0)
        ema = Ema(network, half_life=100)
        network.weight.fill_(1.0)
    for _ in range(10):
        ema.update(network, images=1_000_000, batch=10)
    assert ema.network.weight.item() == pytest.approx(0.5)
    ema.update(network, images=200, batch=10)  # early in a run the half-life is 5 % of the images seen
    assert ema.network.weight.item() == pytest.approx(0.75)


def test_the_settled_average_agrees_with_training_mode_once_it_has_converged(pairs):
    """Spectral norms of averaged weights must be those weights' own; without settling they belong to the start.

    Training refines them once a step: after many, the network that the average was made of has the same weights.
    """
    networks = build_networks(tiny(), CPU, torch.float32)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in networks.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    ema = Ema(networks.model, half_life=1)
    settled = ema.settled()
    weight = settled.translator.to_rgb.weight.flatten(1)
    assert torch.linalg.matrix_norm(weight, ord=2).item() == pytest.approx(1, abs=0.02)
    assert not settled.training
    for _ in range(200):
        power_iteration(networks.model)
    trained, ours, unsettled = (normalised(model) for model in (networks.model, settled, ema.network))
    assert max(apart(value, wanted) for value, wanted in zip(ours, trained, strict=True)) < 0.1
    assert max(apart(value, wanted) for value, wanted in zip(unsettled, trained, strict=True)) > 10


def normalised(network):
    """The weights that a network divides by their largest singular value, divided."""
    return [module.weight.detach() for module in network.modules() if parametrize.is_parametrized(module, "weight")]


def apart(value, wanted):
    return ((value - wanted).norm() / wanted.norm()).item()


def test_precision_by_name():
    assert pick_precision("fp32", CPU) == torch.float32 and pick_precision("bf16", CPU) == torch.bfloat16
    assert pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)
