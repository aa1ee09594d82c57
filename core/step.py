"""One training step at one scale, in the three phases of the method (docs/method.md, section 3).

Every loss term has its own `.backward()`, so that its graph is freed before the next term is computed: at full
resolution the activations of discriminators, perceptual net and segmentation nets are most of the memory. Where a term
is a function of a generated image, it is computed on a detached leaf of that image; the gradients of all terms add up in
the leaf's `.grad`, with which the generator's graph is then walked back once. Nothing in here reads a value of the
device back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from core.cascade import cascade, generated_pyramid
from core.config import LossConfig
from core.losses import content_loss, gradient_penalty, gram_matrix, mean_score, style_loss, total_variation
from core.networks import Discriminator, Generator, without_gradients
from data_handlers.label_maps import IGNORE
from models.losses import cross_entropy
from training.local_batch import WHOLE, LocalBatch, all_reduce_and_step, backward_and_step, zero_gradients
from utils.batch_norms import bn_momentum, frozen_bn_stats

# Image (B,3,h,w) in [-1,1] -> feature maps by position in VGG16's `features`; collects no gradients itself.
PerceptualNet = Callable[[Tensor], Mapping[int, Tensor]]

# (network, *inputs) -> the network's output
Run = Callable[..., Any]

BN_MOMENTUM = 0.1  # of every batch norm in a generator, PyTorch's default


def run_network(network: nn.Module, *inputs: Any) -> Any:
    """Call a network as it is."""
    return network(*inputs)


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
    """Segmentation nets of the last scale; both map (B,3,h,w) in [-1,1] to logits (B,classes,h,w).

    Attributes:
        seg_source: P, trained on the source before, frozen and in eval mode.
        seg_sit: Q, trained here on translated source images, in train mode.
        optimizer: of `seg_sit`.
    """

    seg_source: nn.Module
    seg_sit: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True)
class Batch:
    """Input of one step: pyramid levels 0..s of both domains, (B,3,h_i,w_i) in [-1,1].

    Attributes:
        source, target: the pyramids.
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
class _Direction:
    """The networks and inputs of one direction of translation.

    Attributes:
        name: `ST` or `TS`, the prefix of logged losses.
        image, coarser: inputs of the generator: the finest level, and the output of the cascade below or None.
        real: image of the domain that is translated to.
        alpha: interpolation factor of the gradient penalty.
        back, lower_back: generators of the other direction.
        momentum, back_momentum: of batch norms in `generator` when it translates and in `back` when it translates back.
    """

    name: str
    image: Tensor
    coarser: Tensor | None
    real: Tensor
    alpha: Tensor
    generator: Generator
    discriminator: Discriminator
    discriminator_optimizer: Optimizer
    back: Generator
    lower_back: Sequence[Generator]
    momentum: float
    back_momentum: float


@dataclass(frozen=True, kw_only=True)
class _How:
    """How a step is computed; see `training_step`."""

    run: Run
    recompute: bool
    micro_batch: int | None
    local: LocalBatch


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
    run: Run = run_network,
    recompute: bool = False,
    micro_batch: int | None = None,
    local: LocalBatch = WHOLE,
) -> StepResult:
    """Update the four networks of a scale once; with segmentation nets, update Q and Gst again.

    Args:
        perceptual: frozen feature network.
        loss: weights and layers of the loss terms.
        scale_factor: f, the ratio of the sides of neighbouring pyramid levels.
        segmentation: the segmentation nets at the last scale; None at other scales and without label losses.
        warmup: leave out the label loss and do not step Gst in the segmentation phase.
        run: calls a network, `run(network, *inputs)`; a `training.precision.Runner`.
        recompute: save memory: translate once more where a generator's graph is needed, instead of keeping the graphs
            of both translations. The result is the same.
        micro_batch: save memory: the most samples whose losses are computed at once, None for the whole batch. The
            result is the same. Networks with batch norm need the whole batch, and Q always gets it.
        local: the part of a global batch that `batch` is. Where it is not the whole, batch norms must be synchronised.

    Returns:
        Losses `ST|TS/Discriminator|Generator/...`, `Cyclic/...` and `Semseg/...`, which are to be summed over the
        processes, and images `source`, `sit` (source in target), `sitis` (and back), `target`, `tis`, `tisit`.
    """
    how = _How(run=run, recompute=recompute, micro_batch=micro_batch, local=local)
    directions = _directions(nets, optimizers, batch, scale_factor, run)
    losses: dict[str, Tensor] = {}
    fakes = []
    for direction in directions:
        with torch.set_grad_enabled(not recompute), bn_momentum(direction.generator, direction.momentum):
            fakes.append(run(direction.generator, direction.image, direction.coarser))

    # (1) The discriminators.
    for direction, fake in zip(directions, fakes, strict=True):
        losses |= _update_discriminator(direction, fake.detach(), loss, how)

    # (2) The generators, against the updated discriminators.
    labelled = 1.0 if segmentation is None else local.labelled_fraction(batch.label)
    label_loss = None
    if segmentation is not None and not warmup:
        label_loss = _LabelLoss(segmentation.seg_source, batch.label, loss.lambda_labels * labelled)
    with without_gradients(nets.Dst, nets.Dts):
        generator_losses, returned = _update_generators(
            directions, fakes, optimizers, perceptual, loss, scale_factor, label_loss, how
        )
    losses |= generator_losses

    # (3) The segmentation net Q on the images of the updated Gst, and Gst again on Q's loss.
    if segmentation is not None:
        optimizer = None if warmup else optimizers.Gst
        losses["Semseg/SemsegLoss"] = _update_segmentation(
            directions[0], segmentation, optimizer, batch.label, labelled, how
        )

    sit, tis = (fake.detach() for fake in fakes)
    images = {"source": batch.source[-1], "sit": sit, "sitis": returned[0]}
    images |= {"target": batch.target[-1], "tis": tis, "tisit": returned[1]}
    return StepResult(losses, images)


def _directions(
    nets: ScaleNetworks, optimizers: ScaleOptimizers, batch: Batch, scale_factor: float, run: Run
) -> tuple[_Direction, _Direction]:
    momentum_st, back_momentum_ts = reference_momenta(own_before=3, own_after=0)
    momentum_ts, back_momentum_st = reference_momenta(own_before=2, own_after=1)
    source_to_target = _Direction(
        name="ST", image=batch.source[-1], coarser=cascade(nets.lower_Gst, batch.source, scale_factor, run),
        real=batch.target[-1], alpha=batch.alphas[0], generator=nets.Gst, discriminator=nets.Dst,
        discriminator_optimizer=optimizers.Dst, back=nets.Gts, lower_back=nets.lower_Gts,
        momentum=momentum_st, back_momentum=back_momentum_st,
    )  # fmt: skip
    target_to_source = _Direction(
        name="TS", image=batch.target[-1], coarser=cascade(nets.lower_Gts, batch.target, scale_factor, run),
        real=batch.source[-1], alpha=batch.alphas[1], generator=nets.Gts, discriminator=nets.Dts,
        discriminator_optimizer=optimizers.Dts, back=nets.Gst, lower_back=nets.lower_Gst,
        momentum=momentum_ts, back_momentum=back_momentum_ts,
    )  # fmt: skip
    return source_to_target, target_to_source


def reference_momenta(own_before: int, own_after: int) -> tuple[float, float]:
    """Momenta of two updates of running statistics that together equal the reference's four.

    In the reference a generator sees the images of its own domain three times a step and the images to be translated
    back once, `own_before` and `own_after` say in which order. Here it sees both once, its own first. With m the
    batch norm's momentum, the reference's statistics are

        (1-m)^n r + (1 - (1-m)^n - b) own + b back,  n = own_before + 1 + own_after,  b = m (1-m)^own_after.

    Returns:
        The momentum of the own images, 1 - (1-m)^own_before where they all come first, and b.
    """
    keep = 1.0 - BN_MOMENTUM
    back = BN_MOMENTUM * keep**own_after
    return 1.0 - keep ** (own_before + 1 + own_after) / (1.0 - back), back


def micro_batches(size: int, micro_batch: int | None) -> list[slice]:
    """Slices that cover a batch of `size` samples, as even as possible, each of at most `micro_batch` samples."""
    count = 1 if micro_batch is None else -(-size // micro_batch)
    edges = [k * size // count for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _log(logged: dict[str, Tensor], prefix: str, **values: Tensor) -> None:
    """Add the losses of a micro-batch to those of the batch."""
    for name, value in values.items():
        key = f"{prefix}/{name}"
        logged[key] = logged[key] + value.detach() if key in logged else value.detach()


# --- phase 1 ---------------------------------------------------------------------------------------------------------


def _update_discriminator(direction: _Direction, fake: Tensor, loss: LossConfig, how: _How) -> dict[str, Tensor]:
    """Step on lambda_adversarial * (-mean D(real) + mean D(fake) + lambda_grad * penalty); returns its terms."""
    discriminator = direction.discriminator

    def differentiable_twice(image: Tensor) -> Tensor:
        return how.run(discriminator, image, True)

    logged: dict[str, Tensor] = {}
    weights = list(discriminator.parameters())
    zero_gradients(direction.discriminator_optimizer)
    for samples in micro_batches(len(fake), how.micro_batch):
        real_part, fake_part = direction.real[samples], fake[samples]
        weight = how.local.fraction * len(real_part) / len(fake)
        # The scores of real and fake images are not taken in one pass: the gradients of the score's bias nearly cancel
        # between them, and are ten times as exact when they are computed apart.
        real_term = -weight * mean_score(how.run(discriminator, real_part))
        (loss.lambda_adversarial * real_term).backward()
        fake_term = weight * mean_score(how.run(discriminator, fake_part))
        (loss.lambda_adversarial * fake_term).backward()
        penalty = gradient_penalty(differentiable_twice, real_part, fake_part, direction.alpha)
        penalty_term = weight * loss.lambda_grad * penalty
        (loss.lambda_adversarial * penalty_term).backward(inputs=weights)
        total = loss.lambda_adversarial * (real_term + fake_term + penalty_term).detach()
        _log(
            logged, f"{direction.name}/Discriminator",
            RealImagesLoss=real_term, FakeImagesLoss=fake_term, LossGP=penalty_term, LossAdversarial=total,
        )  # fmt: skip
        del penalty, real_term, fake_term, penalty_term
    all_reduce_and_step(how.local, direction.discriminator_optimizer)
    return logged


# --- phase 2 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LabelLoss:
    """The cyclic label loss: cross-entropy of P on the source that came back, against its label (B,h,w).

    `weight` multiplies the mean over the labelled pixels of `label`.
    """

    seg_source: nn.Module
    label: Tensor
    weight: Tensor | float

    def part(self, samples: slice) -> _LabelLoss:
        """The same for a micro-batch, whose share of the labelled pixels is not that of the samples."""
        labelled = self.label != IGNORE
        share = labelled[samples].sum().double() / labelled.sum().clamp(min=1)
        return _LabelLoss(self.seg_source, self.label[samples], self.weight * share)


def _update_generators(
    directions: Sequence[_Direction],
    fakes: Sequence[Tensor],
    optimizers: ScaleOptimizers,
    perceptual: PerceptualNet,
    loss: LossConfig,
    scale_factor: float,
    label_loss: _LabelLoss | None,
    how: _How,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Step both generators on the adversarial, style, cycle and label terms.

    Returns:
        The logged terms, and the images (B,3,h,w) that came back in each direction.
    """
    logged: dict[str, Tensor] = {}
    all_returned = []
    targets = _perceptual_targets(*(direction.image for direction in directions), perceptual, loss, how.run)
    zero_gradients(optimizers.Gst, optimizers.Gts)
    for direction, fake, (content_target, style_target) in zip(directions, fakes, targets, strict=True):
        label_loss_here = label_loss if direction.name == "ST" else None
        gradients, returned = [], []
        for samples in micro_batches(len(fake), how.micro_batch):
            part = _samples_of(direction, samples)
            weight = how.local.fraction * len(part.image) / len(fake)
            leaf = fake[samples].detach().requires_grad_(True)

            adversarial = -weight * loss.lambda_adversarial * mean_score(how.run(part.discriminator, leaf))
            adversarial.backward()
            _log(logged, f"{part.name}/Generator", LossAdversarial=adversarial)
            del adversarial

            content_part = {layer: features[samples] for layer, features in content_target.items()}
            style_part = {layer: gram[samples] for layer, gram in style_target.items()}
            style_terms = _backward_of_style(leaf, perceptual, content_part, style_part, loss, weight, how.run)
            _log(logged, f"{part.name}/Generator", **style_terms)

            label_part = None if label_loss_here is None else label_loss_here.part(samples)
            back, cycle_terms = _backward_of_cycle(leaf, part, label_part, loss, scale_factor, weight, how.run)
            _log(logged, "Cyclic", **cycle_terms)
            returned.append(back)

            if how.recompute:
                _recompute_translation(part, how.run).backward(leaf.grad)
            else:
                gradients.append(leaf.grad)
        if not how.recompute:
            fake.backward(torch.cat(gradients))
        all_returned.append(torch.cat(returned))
    all_reduce_and_step(how.local, optimizers.Gst, optimizers.Gts)
    return logged, all_returned


def _samples_of(direction: _Direction, samples: slice) -> _Direction:
    coarser = None if direction.coarser is None else direction.coarser[samples]
    return replace(direction, image=direction.image[samples], coarser=coarser, real=direction.real[samples])


def _recompute_translation(direction: _Direction, run: Run) -> Tensor:
    """Translate once more, for the graph; batch norms have seen the images before."""
    with frozen_bn_stats(direction.generator):
        return run(direction.generator, direction.image, direction.coarser)


@torch.no_grad()
def _perceptual_targets(
    source: Tensor, target: Tensor, perceptual: PerceptualNet, loss: LossConfig, run: Run
) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """(content_target, style_target) of ST and of TS.

    The content target is the features of the image that is translated, the style target the Gram matrices of the image
    of the other domain.
    """
    features = run(perceptual, torch.cat([source, target]))
    contents = [{i: features[i].chunk(2)[half] for i in loss.content_layers} for half in (0, 1)]
    styles = [{i: gram_matrix(features[i].chunk(2)[half]) for i in loss.style_layers} for half in (0, 1)]
    return [(contents[0], styles[1]), (contents[1], styles[0])]


def _backward_of_style(
    leaf: Tensor,
    perceptual: PerceptualNet,
    content_target: Mapping[int, Tensor],
    style_target: Mapping[int, Tensor],
    loss: LossConfig,
    weight: float,
    run: Run,
) -> dict[str, Tensor]:
    """Add the gradient of the content, style and total variation terms to `leaf.grad`; returns the terms."""
    features = run(perceptual, leaf)
    content = weight * content_loss(features, content_target, loss.content_layers)
    style = weight * style_loss(features, style_target, loss.style_layers)
    tv = weight * total_variation(leaf)
    total = loss.content_weight * content + loss.style_weight * style + loss.tv_weight * tv
    (loss.lambda_style * total).backward()
    return {"ContentLoss": content, "StyleLoss": style, "TVLoss": tv, "TotalStyleLoss": total}


def _backward_of_cycle(
    leaf: Tensor,
    direction: _Direction,
    label_loss: _LabelLoss | None,
    loss: LossConfig,
    scale_factor: float,
    weight: float,
    run: Run,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Translate `leaf` back; add the gradients of cycle and label loss to `leaf.grad` and to `direction.back`.

    The cascade below `direction.back` sees the pyramid of the generated image and carries no gradient.

    Returns:
        The image that came back (B,3,h,w), detached, and the terms.
    """
    levels = generated_pyramid(leaf.detach(), direction.back.shape.scale, scale_factor)
    coarser = cascade(direction.lower_back, levels, scale_factor, run)
    with bn_momentum(direction.back, direction.back_momentum):
        returned = run(direction.back, leaf, coarser)
    returned_leaf = returned.detach().requires_grad_(True)
    cycle = weight * loss.lambda_cyclic * F.l1_loss(returned_leaf, direction.image)
    cycle.backward()
    terms = {f"Loss{direction.name}{direction.name[0]}": cycle}
    if label_loss is not None:
        mean = cross_entropy(run(label_loss.seg_source, returned_leaf), label_loss.label)
        terms["SourceLabelLoss"] = _weighted(label_loss.weight, mean)
        terms["SourceLabelLoss"].backward()
    returned.backward(returned_leaf.grad)
    return returned.detach(), terms


def _weighted(weight: Tensor | float, mean: Tensor) -> Tensor:
    """The product in the type of `mean`; weights of labelled pixels are float64."""
    return (weight.to(mean.dtype) if isinstance(weight, Tensor) else weight) * mean


# --- phase 3 ---------------------------------------------------------------------------------------------------------


def _update_segmentation(
    direction: _Direction,
    segmentation: SegmentationNets,
    generator_optimizer: Optimizer | None,
    label: Tensor,
    labelled_fraction: Tensor | float,
    how: _How,
) -> Tensor:
    """Step Q on the source translated anew; step Gst on the same gradient unless its optimiser is None.

    Returns:
        Q's cross-entropy, detached.
    """
    trains_generator = generator_optimizer is not None
    with torch.set_grad_enabled(trains_generator and not how.recompute):
        sit = how.run(direction.generator, direction.image, direction.coarser)
    leaf = sit.detach().requires_grad_(trains_generator)
    loss = _weighted(labelled_fraction, cross_entropy(how.run(segmentation.seg_sit, leaf), label))
    if not trains_generator:
        backward_and_step(loss, how.local, segmentation.optimizer)
        return loss.detach()
    zero_gradients(segmentation.optimizer, generator_optimizer)
    loss.backward()
    if how.recompute:
        sit = _recompute_translation(direction, how.run)
    sit.backward(leaf.grad)
    all_reduce_and_step(how.local, segmentation.optimizer, generator_optimizer)
    return loss.detach()
