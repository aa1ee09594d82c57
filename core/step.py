"""One training step at one scale (method: specification section 3).

Each fake is computed once, every optimiser step is preceded by exactly one backward, and networks that are not being
updated take no gradients. Nothing in here reads a device value back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.optim import Optimizer

from core.config import LossConfig
from core.execution import Forward, run_plainly
from core.losses import content_loss, gradient_penalty, gram_matrix, label_loss, style_loss, total_variation
from core.networks import Discriminator, Generator
from core.pyramid import cascade, generated_pyramid

# Image (B,3,h,w) in [-1,1] -> features by position in VGG16's `features`, holding at least the layers asked for.
PerceptualNet = Callable[[Tensor], Mapping[int, Tensor]]


@dataclass(frozen=True)
class ScaleNetworks:
    """The four networks in training at a scale, in train mode, and the frozen generators below them."""

    Dst: Discriminator
    Gst: Generator
    Dts: Discriminator
    Gts: Generator
    lower_Gst: Sequence[Generator]
    lower_Gts: Sequence[Generator]


@dataclass(frozen=True)
class ScaleOptimizers:
    """One optimiser for each network in training."""

    Dst: Optimizer
    Gst: Optimizer
    Dts: Optimizer
    Gts: Optimizer


@dataclass(frozen=True)
class LabelNetworks:
    """Segmentation networks of the last scale; both map (B,3,h,w) in [-1,1] to logits (B,classes,h,w).

    Attributes:
        source_net: P, trained on source, frozen and in eval mode.
        target_net: Q, trained here on translated images, in train mode.
        target_optimizer: steps Q.
    """

    source_net: nn.Module
    target_net: nn.Module
    target_optimizer: Optimizer


@dataclass(frozen=True)
class Batch:
    """What one step sees: pyramid levels 0..s of both domains, (B,3,h_i,w_i) in [-1,1].

    Attributes:
        source, target: the pyramids.
        label: trainIds (B,h_s,w_s) of the source, 255 = ignore; None where no label loss is computed.
        alphas: the interpolation factors of the two gradient penalties, (2,), Dst's first.
    """

    source: Sequence[Tensor]
    target: Sequence[Tensor]
    alphas: Tensor
    label: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """Logged scalars (detached, on the device) and the finest images of the step, all without gradient."""

    losses: dict[str, Tensor]
    images: dict[str, Tensor]


@contextmanager
def without_gradients(*networks: nn.Module) -> Iterator[None]:
    """Inside the block the networks' weights take no gradients, though gradients pass through to their inputs."""
    for network in networks:
        network.requires_grad_(False)
    try:
        yield
    finally:
        for network in networks:
            network.requires_grad_(True)


def discriminator_loss(
    discriminator: Discriminator, real: Tensor, fake: Tensor, alpha: Tensor, config: LossConfig, forward: Forward
) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda_adversarial * (-mean D(real) + mean D(fake) + lambda_grad * penalty) and its logged parts."""
    discriminator = partial(forward, discriminator)
    real_loss = -discriminator(real).float().mean()
    fake_loss = discriminator(fake).float().mean()
    penalty = config.lambda_grad * gradient_penalty(discriminator, real, fake, alpha)
    total = config.lambda_adversarial * (real_loss + fake_loss + penalty)
    parts = {"RealImagesLoss": real_loss, "FakeImagesLoss": fake_loss, "LossGP": penalty, "LossAdversarial": total}
    return total, {f"Discriminator/{name}": value for name, value in parts.items()}


@dataclass(frozen=True)
class PerceptualTargets:
    """What the perceptual terms compare with: features at the content layers, Gram matrices at the style layers."""

    features: Mapping[int, Tensor]
    gram_matrices: Mapping[int, Tensor]


@torch.no_grad()
def perceptual_targets(
    image: Tensor, perceptual: PerceptualNet, config: LossConfig, forward: Forward
) -> PerceptualTargets:
    """Look at an image (B,3,h,w) once, as content of one direction and as style of the other."""
    features = forward(perceptual, image)
    return PerceptualTargets(
        {layer: features[layer] for layer in config.content_layers},
        {layer: gram_matrix(features[layer]) for layer in config.style_layers},
    )


class _ThroughFrozen(torch.autograd.Function):
    """See `through_frozen`."""

    @staticmethod
    def forward(ctx: FunctionCtx, image: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = image.detach().requires_grad_(True)
            loss = term(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


def through_frozen(term: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """`term(image)`, a scalar that depends on nothing else that takes gradients.

    Its gradient to the image is computed along with it, so the activations of the frozen networks inside are freed at
    once instead of being kept for the backward of the whole step: at full resolution they are most of the memory.
    """
    return _ThroughFrozen.apply(image, term)


def generator_loss(
    fake: Tensor,
    discriminator: Discriminator,
    perceptual: PerceptualNet,
    own: PerceptualTargets,
    other: PerceptualTargets,
    config: LossConfig,
    forward: Forward,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adversarial plus style terms of one direction and their logged parts.

    `own` belongs to the image that was translated, `other` to the image of the other domain. The weights of the
    discriminator and the perceptual net must not take gradients.
    """
    parts: dict[str, Tensor] = {}

    def adversarial_term(image: Tensor) -> Tensor:
        return config.lambda_adversarial * -forward(discriminator, image).float().mean()

    def perceptual_term(image: Tensor) -> Tensor:
        features = forward(perceptual, image)
        content = content_loss(features, own.features, config.content_layers)
        style = style_loss(features, other.gram_matrices, config.style_layers)
        parts.update(ContentLoss=content.detach(), StyleLoss=style.detach())
        return config.content_weight * content + config.style_weight * style

    adversarial = through_frozen(adversarial_term, fake)
    perceptual_loss = through_frozen(perceptual_term, fake)
    tv = total_variation(fake)
    total_style = perceptual_loss + config.tv_weight * tv
    parts |= {"LossAdversarial": adversarial, "TVLoss": tv, "TotalStyleLoss": total_style}
    total = adversarial + config.lambda_style * total_style
    return total, {f"Generator/{name}": value for name, value in parts.items()}


def cycle_back(
    fake: Tensor, back: Generator, lower_back: Sequence[Generator], scale_factor: float, forward: Forward
) -> Tensor:
    """Bring a translated image (B,3,h,w) back; the lower cascade of its own pyramid carries no gradient."""
    levels = generated_pyramid(fake.detach(), back.shape.scale, scale_factor)
    return forward(back, fake, cascade(lower_back, levels, scale_factor, forward))


def _backward_and_step(loss: Tensor, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _with_direction(direction: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{direction}/{name}": value for name, value in losses.items()}


def training_step(
    nets: ScaleNetworks,
    optimizers: ScaleOptimizers,
    perceptual: PerceptualNet,
    batch: Batch,
    config: LossConfig,
    scale_factor: float,
    labels: LabelNetworks | None = None,
    warmup: bool = False,
    forward: Forward = run_plainly,
) -> StepResult:
    """Update the four networks of a scale once, and at the last scale Q and Gst again.

    Args:
        perceptual: features of an image; must pass gradients to its input and collect none itself.
        labels: the segmentation networks of the last scale, None elsewhere and with `no_semseg`.
        warmup: leave the label loss out and do not step Gst in the segmentation phase.
        forward: how networks are run.

    Returns:
        Losses under `ST|TS/Discriminator|Generator/...`, `Cyclic/...`, `Semseg/...`, and the images `source`, `sit`,
        `sitis`, `target`, `tis`, `tisit`.
    """
    source, target = batch.source[-1], batch.target[-1]
    source_coarser = cascade(nets.lower_Gst, batch.source, scale_factor, forward)
    sit = forward(nets.Gst, source, source_coarser)
    tis = forward(nets.Gts, target, cascade(nets.lower_Gts, batch.target, scale_factor, forward))
    losses: dict[str, Tensor] = {}

    # (1) Discriminators, one after the other: together they would need twice the memory.
    loss, logged = discriminator_loss(nets.Dst, target, sit.detach(), batch.alphas[0], config, forward)
    _backward_and_step(loss, optimizers.Dst)
    losses |= _with_direction("ST", logged)
    loss, logged = discriminator_loss(nets.Dts, source, tis.detach(), batch.alphas[1], config, forward)
    _backward_and_step(loss, optimizers.Dts)
    losses |= _with_direction("TS", logged)

    # (2) Generators, against the discriminators just updated.
    with without_gradients(nets.Dst, nets.Dts):
        of_source = perceptual_targets(source, perceptual, config, forward)
        of_target = perceptual_targets(target, perceptual, config, forward)
        loss_st, logged_st = generator_loss(sit, nets.Dst, perceptual, of_source, of_target, config, forward)
        loss_ts, logged_ts = generator_loss(tis, nets.Dts, perceptual, of_target, of_source, config, forward)
        losses |= _with_direction("ST", logged_st) | _with_direction("TS", logged_ts)
        sitis = cycle_back(sit, nets.Gts, nets.lower_Gts, scale_factor, forward)
        tisit = cycle_back(tis, nets.Gst, nets.lower_Gst, scale_factor, forward)
        cycle_source = config.lambda_cyclic * F.l1_loss(sitis, source)
        cycle_target = config.lambda_cyclic * F.l1_loss(tisit, target)
        losses |= {"Cyclic/LossSTS": cycle_source, "Cyclic/LossTST": cycle_target}
        total = loss_st + loss_ts + cycle_source + cycle_target
        if labels is not None and not warmup:
            cyclic_label = config.lambda_labels * through_frozen(
                lambda image: label_loss(forward(labels.source_net, image), batch.label), sitis
            )
            losses["Cyclic/SourceLabelLoss"] = cyclic_label
            total = total + cyclic_label
        _backward_and_step(total, optimizers.Gst, optimizers.Gts)

    # (3) Segmentation of the images that the updated Gst makes.
    if labels is not None:
        losses["Semseg/SemsegLoss"] = _segmentation_phase(
            nets.Gst, optimizers.Gst, labels, source, source_coarser, batch.label, warmup, forward
        )

    images = {"source": source, "sit": sit, "sitis": sitis, "target": target, "tis": tis, "tisit": tisit}
    return StepResult(
        losses={name: value.detach() for name, value in losses.items()},
        images={name: value.detach() for name, value in images.items()},
    )


def _segmentation_phase(
    generator: Generator,
    generator_optimizer: Optimizer,
    labels: LabelNetworks,
    source: Tensor,
    source_coarser: Tensor | None,
    label: Tensor,
    warmup: bool,
    forward: Forward,
) -> Tensor:
    """Step Q on the freshly translated source and, after warm-up, Gst again on this gradient alone."""
    with torch.set_grad_enabled(not warmup):
        sit = forward(generator, source, source_coarser)
    loss = label_loss(forward(labels.target_net, sit), label)
    if warmup:
        _backward_and_step(loss, labels.target_optimizer)
    else:
        _backward_and_step(loss, labels.target_optimizer, generator_optimizer)
    return loss
