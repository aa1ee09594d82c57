"""One training step at one scale, in the three phases of the method (docs/method.md, section 3).

Every loss term has its own `.backward()`, so that its graph is freed before the next term is computed: at full
resolution the activations of discriminators, perceptual net and segmentation nets are most of the memory. A term of a
generated image is computed on a detached leaf of it; the gradients of all terms add up in the leaf's `.grad`, which one
backward pass then takes through the generator. Nothing in here reads a value of the device back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from core.cascade import Run, cascade, generated_pyramid
from core.config import LossConfig
from core.losses import gradient_penalty, mean_score, perceptual_targets, style_terms
from core.networks import Discriminator, Generator, without_gradients
from data_handlers.label_maps import IGNORE
from models.losses import cross_entropy
from training.distributed import WHOLE, LocalBatch, all_reduce_and_step, zero_gradients
from utils.batch_norms import bn_momentum, frozen_bn_stats

# Image (B,3,h,w) in [-1,1] -> feature maps by position in VGG16's `features`; collects no gradients itself.
PerceptualNet = Callable[[Tensor], Mapping[int, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ScaleNetworks:
    """The four networks in training at a scale, in train mode, and the frozen generators below them, coarse to fine."""

    Dst: Discriminator
    Gst: Generator
    Dts: Discriminator
    Gts: Generator
    lower_Gst: Sequence[Generator]
    lower_Gts: Sequence[Generator]


@dataclass(frozen=True, kw_only=True)
class ScaleOptimizers:
    """One optimiser for each network in training."""

    Dst: Optimizer
    Gst: Optimizer
    Dts: Optimizer
    Gts: Optimizer


@dataclass(frozen=True)
class SegmentationNets:
    """The nets of the label losses, (B,3,h,w) in [-1,1] to logits (B,classes,h,w).

    P, `seg_source`, is frozen and in eval mode; Q, `seg_sit`, is in train mode and `optimizer` is its own.
    """

    seg_source: nn.Module
    seg_sit: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True)
class Batch:
    """Input of one step.

    Attributes:
        source, target: pyramid levels 0..s, (B,3,h_i,w_i) in [-1,1].
        alphas: interpolation factors in [0,1] of the two gradient penalties, (2,), Dst's first.
        label: trainIds (B,h_s,w_s) of the source, 255 = ignore; None without segmentation nets.
    """

    source: Sequence[Tensor]
    target: Sequence[Tensor]
    alphas: Tensor
    label: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """Logged scalars (on the device) and the finest images (B,3,h_s,w_s) of the step, all detached."""

    losses: dict[str, Tensor]
    images: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Arguments of `training_step` that its phases share, and the losses they log."""

    loss: LossConfig
    scale_factor: float
    run: Run
    recompute: bool
    micro_batch: int | None
    local: LocalBatch
    losses: dict[str, Tensor] = field(default_factory=dict)

    def log(self, prefix: str, values: Mapping[str, Tensor]) -> None:
        """Add the losses of a micro-batch to those of the whole batch."""
        for name, value in values.items():
            key = f"{prefix}/{name}"
            self.losses[key] = self.losses[key] + value.detach() if key in self.losses else value.detach()


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """Networks and samples of one direction of translation, `ST` or `TS`.

    Attributes:
        image, coarser: inputs of `generator`: the finest level, and the output of the cascade below or None.
        real: images of the domain that is translated to.
        weight, label_weight: of a mean over these samples, or their labelled pixels, in that over the global batch.
        back, lower_back: the generators of the other direction.
        momentum, back_momentum: of the batch norms in `generator` and in `back`, see `reference_momenta`.
        label, seg_source: trainIds (B,h,w) of the images and P, where there are label losses.
    """

    name: str
    image: Tensor
    coarser: Tensor | None
    real: Tensor
    alpha: Tensor
    weight: float
    generator: Generator
    discriminator: Discriminator
    optimizer: Optimizer
    back: Generator
    lower_back: Sequence[Generator]
    momentum: float
    back_momentum: float
    label: Tensor | None = None
    label_weight: Tensor | float = 1.0
    seg_source: nn.Module | None = None


def training_step(
    *,
    nets: ScaleNetworks,
    optimizers: ScaleOptimizers,
    perceptual: PerceptualNet,
    batch: Batch,
    loss: LossConfig,
    scale_factor: float,
    segmentation: SegmentationNets | None = None,
    warmup: bool = False,
    run: Run = nn.Module.__call__,
    recompute: bool = False,
    micro_batch: int | None = None,
    local: LocalBatch = WHOLE,
) -> StepResult:
    """Update the four networks of a scale once; with segmentation nets, update Q and Gst again.

    Args:
        scale_factor: f, the ratio of the sides of neighbouring pyramid levels.
        segmentation: None at all scales but the last, and without label losses.
        warmup: skip the cyclic label loss, and do not step Gst in the segmentation phase.
        run: calls a network; a `training.precision.Runner`.
        recompute: save memory: translate once more where a generator's graph is needed, instead of keeping the graphs
            of both translations. The result is the same.
        micro_batch: save memory: the most samples whose losses are computed at once, None for the whole batch. The
            result is the same. Networks with batch norm need the whole batch, and Q always gets it.
        local: the part of a global batch that `batch` is. Where it is not the whole, batch norms must be synchronised.

    Returns:
        Losses `ST|TS/Discriminator|Generator/...`, `Cyclic/...` and `Semseg/...`, which are to be summed over the
        processes, and images `source`, `sit` (source in target), `sitis` (and back), `target`, `tis`, `tisit`.
    """
    step = _Step(
        loss=loss, scale_factor=scale_factor, run=run, recompute=recompute, micro_batch=micro_batch, local=local
    )
    st, ts = _directions(nets, optimizers, batch, step)
    sit, tis = fakes = [_translate(direction, step) for direction in (st, ts)]

    # (1) The discriminators.
    for direction, fake in ((st, sit), (ts, tis)):
        _update_discriminator(direction, fake.detach(), step)

    # (2) The generators, against the updated discriminators.
    if segmentation is not None:
        seg_source = None if warmup else segmentation.seg_source
        labelled = local.labelled_fraction(batch.label)
        st = replace(st, label=batch.label, label_weight=labelled, seg_source=seg_source)
    with without_gradients(nets.Dst, nets.Dts):
        sitis, tisit = _update_generators((st, ts), fakes, optimizers, perceptual, step)

    # (3) Q on the images of the updated Gst, and Gst once more on the loss of Q.
    if segmentation is not None:
        _update_segmentation(st, segmentation, None if warmup else optimizers.Gst, step)

    images = {"source": st.image, "sit": sit.detach(), "sitis": sitis}
    images |= {"target": ts.image, "tis": tis.detach(), "tisit": tisit}
    return StepResult(step.losses, images)


def _directions(
    nets: ScaleNetworks, optimizers: ScaleOptimizers, batch: Batch, step: _Step
) -> tuple[_Direction, _Direction]:
    momentum_st, back_momentum_st = reference_momenta(nets.Gst, own_before=3, own_after=0)
    momentum_ts, back_momentum_ts = reference_momenta(nets.Gts, own_before=2, own_after=1)
    source, target, weight = batch.source[-1], batch.target[-1], step.local.fraction
    coarser_st = cascade(nets.lower_Gst, batch.source, step.scale_factor, step.run)
    coarser_ts = cascade(nets.lower_Gts, batch.target, step.scale_factor, step.run)
    st = _Direction(
        name="ST", image=source, coarser=coarser_st, real=target, alpha=batch.alphas[0], weight=weight,
        generator=nets.Gst, discriminator=nets.Dst, optimizer=optimizers.Dst, back=nets.Gts, lower_back=nets.lower_Gts,
        momentum=momentum_st, back_momentum=back_momentum_ts,
    )  # fmt: skip
    ts = _Direction(
        name="TS", image=target, coarser=coarser_ts, real=source, alpha=batch.alphas[1], weight=weight,
        generator=nets.Gts, discriminator=nets.Dts, optimizer=optimizers.Dts, back=nets.Gst, lower_back=nets.lower_Gst,
        momentum=momentum_ts, back_momentum=back_momentum_st,
    )  # fmt: skip
    return st, ts


def reference_momenta(generator: Generator, own_before: int, own_after: int) -> tuple[float, float]:
    """Momenta of two updates of a generator's running statistics that together equal the reference's four.

    In a step of the authors' code, a generator sees images of its own domain `own_before` times, then once images to be
    translated back, then its own images `own_after` times. Here it sees its own once and then those to be translated
    back. With m the momentum of its batch norms, n = own_before + 1 + own_after and b = m (1-m)^own_after, both turn
    the statistics r into

        (1-m)^n r + (1 - (1-m)^n - b) own + b back.

    Returns:
        The momentum for its own images, which is 1 - (1-m)^own_before if these all come first, and b for the others.
    """
    keep = 1.0 - next((norm.momentum for norm in generator.modules() if isinstance(norm, nn.BatchNorm2d)), 0.1)
    back = (1.0 - keep) * keep**own_after
    return 1.0 - keep ** (own_before + 1 + own_after) / (1.0 - back), back


def _translate(direction: _Direction, step: _Step) -> Tensor:
    """The generated image (B,3,h,w), without its graph where that is to be recomputed."""
    with torch.set_grad_enabled(not step.recompute), bn_momentum(direction.generator, direction.momentum):
        return step.run(direction.generator, direction.image, direction.coarser)


def _translate_again(direction: _Direction, step: _Step) -> Tensor:
    """The same image with its graph; the running statistics of batch norms have seen the batch before."""
    with frozen_bn_stats(direction.generator):
        return step.run(direction.generator, direction.image, direction.coarser)


def micro_batches(size: int, micro_batch: int | None) -> list[slice]:
    """Slices that cover a batch of `size` samples, as even as possible, each of at most `micro_batch` samples."""
    count = 1 if micro_batch is None else -(-size // micro_batch)
    edges = [k * size // count for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _part(direction: _Direction, samples: slice) -> _Direction:
    """The direction with the samples of a micro-batch."""
    image, coarser = direction.image[samples], None if direction.coarser is None else direction.coarser[samples]
    weight = direction.weight * len(image) / len(direction.image)
    part = replace(direction, image=image, coarser=coarser, real=direction.real[samples], weight=weight)
    if direction.label is None:
        return part
    labelled = direction.label != IGNORE
    share = labelled[samples].sum().double() / labelled.sum().clamp(min=1)
    return replace(part, label=direction.label[samples], label_weight=direction.label_weight * share)


def _update_discriminator(direction: _Direction, fake: Tensor, step: _Step) -> None:
    """Phase 1: step on lambda_adversarial * (-mean D(real) + mean D(fake) + lambda_grad * gradient penalty)."""
    discriminator, loss = direction.discriminator, step.loss

    def differentiable_twice(image: Tensor) -> Tensor:
        return step.run(discriminator, image, True)

    zero_gradients(direction.optimizer)
    for samples in micro_batches(len(fake), step.micro_batch):
        part = _part(direction, samples)
        # One pass over real and fake images would be less exact: the gradients of the score's bias nearly cancel
        # between the two, and have a tenth of the rounding error when they are computed apart.
        real_term = -part.weight * mean_score(step.run(discriminator, part.real))
        (loss.lambda_adversarial * real_term).backward()
        fake_term = part.weight * mean_score(step.run(discriminator, fake[samples]))
        (loss.lambda_adversarial * fake_term).backward()
        penalty = gradient_penalty(differentiable_twice, part.real, fake[samples], part.alpha)
        penalty_term = part.weight * loss.lambda_grad * penalty
        (loss.lambda_adversarial * penalty_term).backward(inputs=list(discriminator.parameters()))
        terms = {"RealImagesLoss": real_term, "FakeImagesLoss": fake_term, "LossGP": penalty_term}
        terms["LossAdversarial"] = loss.lambda_adversarial * (real_term + fake_term + penalty_term)
        step.log(f"{direction.name}/Discriminator", terms)
    all_reduce_and_step(step.local, direction.optimizer)


def _update_generators(
    directions: Sequence[_Direction], fakes: Sequence[Tensor], optimizers: ScaleOptimizers, perceptual: PerceptualNet,
    step: _Step,
) -> list[Tensor]:  # fmt: skip
    """Phase 2: step both generators on all their terms; returns the images translated back, of each direction."""
    loss = step.loss
    with torch.no_grad():
        targets = perceptual_targets(step.run(perceptual, torch.cat([d.image for d in directions])), loss)
    returned_images = []
    zero_gradients(optimizers.Gst, optimizers.Gts)
    for direction, fake, (content_target, style_target) in zip(directions, fakes, targets, strict=True):
        gradients, returned = [], []
        for samples in micro_batches(len(fake), step.micro_batch):
            part = _part(direction, samples)
            leaf = fake[samples].detach().requires_grad_(True)

            adversarial = -part.weight * loss.lambda_adversarial * mean_score(step.run(part.discriminator, leaf))
            adversarial.backward()
            step.log(f"{part.name}/Generator", {"LossAdversarial": adversarial})

            style = style_terms(
                step.run(perceptual, leaf),
                leaf,
                content_target={layer: features[samples] for layer, features in content_target.items()},
                style_target={layer: gram[samples] for layer, gram in style_target.items()},
                loss=loss,
                weight=part.weight,
            )
            (loss.lambda_style * style["TotalStyleLoss"]).backward()
            step.log(f"{part.name}/Generator", style)

            returned.append(_backward_of_cycle(leaf, part, step))
            if step.recompute:
                _translate_again(part, step).backward(leaf.grad)
            else:
                gradients.append(leaf.grad)
        if not step.recompute:
            fake.backward(torch.cat(gradients))
        returned_images.append(torch.cat(returned))
    all_reduce_and_step(step.local, optimizers.Gst, optimizers.Gts)
    return returned_images


def _backward_of_cycle(leaf: Tensor, direction: _Direction, step: _Step) -> Tensor:
    """Translate `leaf` back; add the gradients of cycle and label loss to `leaf.grad` and the generator `back`.

    Returns:
        The image translated back (B,3,h,w).
    """
    levels = generated_pyramid(leaf.detach(), direction.back.shape.scale, step.scale_factor)
    coarser = cascade(direction.lower_back, levels, step.scale_factor, step.run)
    with bn_momentum(direction.back, direction.back_momentum):
        returned = step.run(direction.back, leaf, coarser)
    returned_leaf = returned.detach().requires_grad_(True)
    cycle = direction.weight * step.loss.lambda_cyclic * F.l1_loss(returned_leaf, direction.image)
    cycle.backward()
    step.log("Cyclic", {f"Loss{direction.name}{direction.name[0]}": cycle})
    if direction.seg_source is not None:
        mean = cross_entropy(step.run(direction.seg_source, returned_leaf), direction.label)
        label_loss = (step.loss.lambda_labels * direction.label_weight * mean).to(mean.dtype)
        label_loss.backward()
        step.log("Cyclic", {"SourceLabelLoss": label_loss})
    returned.backward(returned_leaf.grad)
    return returned.detach()


def _update_segmentation(
    direction: _Direction, segmentation: SegmentationNets, generator_optimizer: Optimizer | None, step: _Step
) -> None:
    """Phase 3: translate the source again; step Q and, after the warm-up, the generator on the loss of Q."""
    trains_generator = generator_optimizer is not None
    with torch.set_grad_enabled(trains_generator and not step.recompute):
        sit = step.run(direction.generator, direction.image, direction.coarser)
    leaf = sit.detach().requires_grad_(trains_generator)
    mean = cross_entropy(step.run(segmentation.seg_sit, leaf), direction.label)
    segmentation_loss = (direction.label_weight * mean).to(mean.dtype)
    optimizers = (segmentation.optimizer, generator_optimizer) if trains_generator else (segmentation.optimizer,)
    zero_gradients(*optimizers)
    segmentation_loss.backward()
    if trains_generator:
        (_translate_again(direction, step) if step.recompute else sit).backward(leaf.grad)
    all_reduce_and_step(step.local, *optimizers)
    step.losses["Semseg/SemsegLoss"] = segmentation_loss.detach()
