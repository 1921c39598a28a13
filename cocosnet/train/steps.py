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
from cocosnet.losses.total import loss_weights, total_loss
from cocosnet.model.cocosnet import Output
from cocosnet.train.batches import Batch
from cocosnet.train.distributed import Ranks
from cocosnet.train.networks import Networks

PERCEPTUAL_LAYERS = tuple(appearance.FEATURE_WEIGHTS)  # holds those of Eq. 15 and of the contextual loss


@dataclass
class StepResult:
    """`image` B,3,S,S: the output, cut off from the graph; `parts`: losses and measures (detached scalars) by name;
    `applied`: False where a number was not finite and the weights were left as they were."""

    image: Tensor
    parts: dict[str, Tensor]
    applied: bool


def generator_step(
    networks: Networks, optimizer: torch.optim.Optimizer, batch: Batch, config: LossConfig, *, adversarial_on: bool
) -> StepResult:
    """Move M, N, G and R down Eq. 19. `parts`: the losses, their `total`, and `warp_psnr` where there is a warp."""
    networks.discriminator.requires_grad_(False)
    with networks.autocast():
        parts, output = generator_losses(networks, batch, config, adversarial_on=adversarial_on)
    total = total_loss(parts, loss_weights(config))
    applied = apply_step(total, networks.generator_parameters(), optimizer, networks.ranks)
    networks.discriminator.requires_grad_(True)
    measures = {"total": total, **parts}
    if output.warps:
        measures["warp_psnr"] = warp_psnr(output.warps[-1], batch)
    return StepResult(output.image.detach(), {name: value.detach() for name, value in measures.items()}, applied)


def discriminator_step(networks: Networks, optimizer: torch.optim.Optimizer, batch: Batch, fake: Tensor) -> StepResult:
    """Move D down Eq. 17. `fake` B,3,S,S is the generator's output for this batch. `parts` holds `disc`."""
    with networks.autocast():
        maps = networks.discriminator(batch.condition.repeat(2, 1, 1, 1), torch.cat([batch.image, fake.detach()]))
    real, fakes = zip(*(scale[-1].chunk(2) for scale in maps), strict=True)
    loss = adversarial.discriminator_loss(real, fakes)
    applied = apply_step(loss, list(networks.discriminator.parameters()), optimizer, networks.ranks)
    return StepResult(fake, {"disc": loss.detach()}, applied)


def generator_losses(
    networks: Networks, batch: Batch, config: LossConfig, *, adversarial_on: bool
) -> tuple[dict[str, Tensor], Output]:
    """The generator's losses of Eq. 19, unweighted scalars by name, and the forward pass that they come from.

    A model that matches nothing has neither Eq. 11 nor Eq. 12; R's Eq. 13-14 belong to CoCosNet v2 alone.
    """
    model = networks.model
    out = model(batch.condition, batch.exemplar, batch.exemplar_condition)
    parts = {}
    if out.warps:
        parts["align"] = align_loss(out.features_x, model.encode_image(batch.image, batch.condition))
        parts["corr"] = correspondence_loss(out.iteration_warps, batch.image, batch.pseudo, config.iteration_decay)
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
    if len(real):
        exemplars = {name: value[count:] for name, value in targets.items()}
        chosen = {name: value[real] for name, value in ours.items()}
        parts["contextual"] = appearance.contextual_loss(chosen, exemplars).sum() / count
    return parts


def apply_step(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks) -> bool:
    """Backward and one step of `optimizer`; False, and no step, where the loss or the gradient's norm is not finite.

    All ranks step together or not at all.
    """
    optimizer.zero_grad(set_to_none=True)
    if not ranks.all(bool(torch.isfinite(loss))):
        return False
    loss.backward()
    ranks.average_gradients(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(norm):
        return False
    optimizer.step()
    return True


def warp_psnr(warp: Tensor, batch: Batch) -> Tensor:
    """PSNR in dB (range 2) of the finest warp against x_B over the samples with a pseudo exemplar; NaN without any.

    A warp that is smaller than x_B (CoCosNet's) is enlarged bilinearly first, as the translator sees it.
    """
    warp = warp.detach().float().clamp(-1, 1)
    if warp.shape[-2:] != batch.image.shape[-2:]:
        warp = F.interpolate(warp, size=batch.image.shape[-2:], mode="bilinear", align_corners=False)
    error = (warp - batch.image).square().mean((1, 2, 3))
    mean = (batch.pseudo * error).sum() / batch.pseudo.sum()
    return 10 * torch.log10(4 / mean)
