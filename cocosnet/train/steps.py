"""What is learned from one batch: the generator's step and the discriminator's (Section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocosnet.config import LossConfig
from cocosnet.losses import adversarial, appearance, semantic
from cocosnet.losses.align import align_loss
from cocosnet.losses.correspondence import correspondence_loss
from cocosnet.losses.mapping import mapping_loss
from cocosnet.losses.match import match_loss
from cocosnet.losses.total import loss_weights, total_loss
from cocosnet.model.cocosnet import Output
from cocosnet.train.batches import Batch
from cocosnet.train.distributed import Ranks
from cocosnet.train.networks import Networks, power_iteration

PERCEPTUAL_LAYERS = tuple(appearance.FEATURE_WEIGHTS)  # holds those of Eq. 15 and of the contextual loss


@dataclass
class StepResult:
    """`image` B,3,S,S: the output for this process's share, cut off from the graph; `parts`: losses and measures
    (detached scalars) of the whole batch by name, alike on every rank; `applied`: False where a number was not finite
    and the weights were left as they were."""

    image: Tensor
    parts: dict[str, Tensor]
    applied: bool


@dataclass(frozen=True)
class Stepping:
    """How a step is made. accumulate: parts that a process's share of the batch is worked off in, one after the other,
    which saves memory and changes no number. clip: the largest norm that a gradient may have; 0 is no bound."""

    accumulate: int = 1
    clip: float = 0.0


WHOLE = Stepping()  # the share at once, no clipping


def generator_step(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: LossConfig,
    *,
    adversarial_on: bool,
    stepping: Stepping = WHOLE,
) -> StepResult:
    """Move M, N, G and R down Eq. 19. `parts`: losses, `total`, `grad_norm`; `warp_psnr` where there is a warp."""
    optimizer.zero_grad(set_to_none=True)
    power_iteration(networks.model)
    networks.discriminator.requires_grad_(False)
    pseudo, sums, images = networks.ranks.mean({"": batch.pseudo.mean()})[""], {}, []
    for part, weight in batch.split(stepping.accumulate):
        values, image = _learn_part(networks, part, weight, pseudo, config, adversarial_on)
        _add(sums, values, weight)
        images.append(image)
    networks.discriminator.requires_grad_(True)
    means = networks.ranks.mean(sums)
    if "warp_error" in means:
        means["warp_psnr"] = psnr(means.pop("warp_error"))
    applied, means["grad_norm"] = apply_step(
        means["total"], networks.generator_parameters(), optimizer, networks.ranks, stepping.clip
    )
    return StepResult(torch.cat(images), means, applied)


def discriminator_step(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    fake: Tensor,
    stepping: Stepping = WHOLE,
) -> StepResult:
    """Move D down Eq. 17. `fake` B,3,S,S: the generator's output for this batch. `parts`: `disc`, `disc_grad_norm`."""
    optimizer.zero_grad(set_to_none=True)
    power_iteration(networks.discriminator)
    sums: dict[str, Tensor] = {}
    parts = batch.split(stepping.accumulate)
    for (part, weight), made in zip(parts, fake.detach().chunk(len(parts)), strict=True):
        with networks.autocast():
            maps = networks.discriminator(part.condition.repeat(2, 1, 1, 1), torch.cat([part.image, made]))
        real, fakes = zip(*(scale[-1].chunk(2) for scale in maps), strict=True)
        loss = adversarial.discriminator_loss(real, fakes)
        (weight * loss).backward()
        _add(sums, {"disc": loss.detach()}, weight)
    means = networks.ranks.mean(sums)
    parameters = list(networks.discriminator.parameters())
    applied, means["disc_grad_norm"] = apply_step(means["disc"], parameters, optimizer, networks.ranks, stepping.clip)
    return StepResult(fake, means, applied)


def _learn_part(
    networks: Networks, part: Batch, weight: float, pseudo: Tensor, config: LossConfig, adversarial_on: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Add the gradients of `weight` times a part's loss; returns its losses and measures, and the output.

    What it returns is cut off from the graph, and nothing else of the part is alive when the next one begins.
    """
    with networks.autocast():
        losses, output = generator_losses(
            networks, part, config, adversarial_on=adversarial_on, count=pseudo * len(part.pseudo)
        )
    total = total_loss(losses, loss_weights(config))
    (weight * total).backward()
    values = {name: value.detach() for name, value in {"total": total, **losses}.items()}
    if output.warps:
        values["warp_error"] = warp_error(output.warps[-1], part, pseudo)
    return values, output.image.detach()


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], weight: float) -> None:
    """Add `weight` times each of `values` to the sum of its name."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + weight * value


def generator_losses(
    networks: Networks, batch: Batch, config: LossConfig, *, adversarial_on: bool, count: Tensor | None = None
) -> tuple[dict[str, Tensor], Output]:
    """The generator's losses of Eq. 19, unweighted scalars by name, and the forward pass that they come from.

    A model that matches nothing has neither Eq. 11 nor Eq. 12; R's Eq. 13-14 belong to CoCosNet v2 alone.
    count: what Eq. 12 and the match loss are divided by; its default is the number of pseudo exemplars in `batch`.
    Where a batch is shared among processes or worked off in parts, it is the mean number for a part of this length.
    """
    model = networks.model
    out = model(*batch.inputs)
    parts = {}
    if out.warps:
        parts["align"] = align_loss(out.features_x, model.encode_image(batch.image, batch.condition))
        parts["corr"] = correspondence_loss(
            out.iteration_warps, batch.image, batch.pseudo, config.iteration_decay, count
        )
        if config.match:
            compared = model.compared(out)
            parts["match"] = match_loss(*compared, batch.field, batch.pseudo, model.hierarchy.temperature, count)
    if networks.mapping is not None:
        mapped = networks.mapping(out.features_x), networks.mapping(out.features_y)
        parts["map"] = mapping_loss(mapped[0], batch.image, mapped[1], batch.exemplar)
    if networks.perceptual is not None:
        parts |= perceptual_losses(networks.perceptual, out.image, batch)
    if adversarial_on:
        maps = networks.discriminator(batch.condition, out.image)
        parts["adv"] = adversarial.generator_loss([scale[-1] for scale in maps])
    return parts, out


def perceptual_losses(phi: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Eq. 15-16, unweighted scalars by name. output B,3,S,S in [-1, 1].

    Each sample takes the term of Eq. 16 that fits its exemplar; both terms are means over the whole batch, so each
    shrinks with the share of its samples.
    """
    real = torch.nonzero(batch.pseudo == 0).flatten()
    with torch.no_grad():
        targets = phi(torch.cat([batch.image, batch.exemplar[real]]), PERCEPTUAL_LAYERS)
    ours, count = phi(output, PERCEPTUAL_LAYERS), len(batch.pseudo)
    truth = {name: value[:count] for name, value in targets.items()}
    parts = {
        "sem": semantic.semantic_loss(ours, truth),
        "feature": (batch.pseudo * appearance.feature_loss(ours, truth)).mean(),
    }
    parts["contextual"] = parts["sem"].new_zeros(())
    if len(real):
        exemplars = {name: value[count:] for name, value in targets.items()}
        chosen = {name: value[real] for name, value in ours.items()}
        parts["contextual"] = appearance.contextual_loss(chosen, exemplars).sum() / count
    return parts


def apply_step(
    loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks, clip: float = 0.0
) -> tuple[bool, Tensor]:
    """One step of `optimizer` along the mean of the ranks' gradients; returns whether it was made, and their norm.

    No step is made where the loss (the same on every rank) or the norm is not finite: all ranks step together or not at
    all. A norm above `clip` is brought down to it; 0 is no bound.
    """
    ranks.average_gradients(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(loss + norm):
        optimizer.zero_grad(set_to_none=True)
        return False, norm
    if clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.step()
    return True, norm


def warp_error(warp: Tensor, batch: Batch, pseudo: Tensor) -> Tensor:
    """Mean squared difference (range 2) of the finest warp and x_B over the samples with a pseudo exemplar, scalar.

    pseudo: the share of such samples that the mean is over, which in a part of a batch is the whole batch's; NaN at 0.
    A warp that is smaller than x_B (CoCosNet's) is enlarged bilinearly first, as the translator sees it.
    """
    warp = warp.detach().float().clamp(-1, 1)
    if warp.shape[-2:] != batch.image.shape[-2:]:
        warp = F.interpolate(warp, size=batch.image.shape[-2:], mode="bilinear", align_corners=False)
    error = (warp - batch.image).square().mean((1, 2, 3))
    return (batch.pseudo * error).mean() / pseudo


def psnr(error: Tensor) -> Tensor:
    """Mean squared error of pictures in [-1, 1] to dB (range 2); NaN stays NaN."""
    return 10 * torch.log10(4 / error)
