"""One training step at one scale (method: specification section 3).

Every optimiser step is preceded by exactly one backward, every graph is walked back once, and networks that are not
being updated take no gradients. Nothing in here reads a device value back to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from core.cascade import cascade
from core.config import LossConfig
from core.execution import Forward, run_plainly
from core.networks import Discriminator, Generator, without_gradients
from core.objectives import (
    PerceptualNet,
    PerceptualTargets,
    Piece,
    adversarial_and_style_loss,
    at_once,
    at_once_before_graph,
    cycle_back,
    discriminator_loss,
    perceptual_targets,
    pieces,
    weighted_sum,
)
from core.shares import WHOLE, BatchShare
from data_handlers.label_maps import IGNORE
from models.losses import cross_entropy
from utils.batch_norms import without_statistics


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


@dataclass(frozen=True)
class Direction:
    """One of the two ways images are translated in a step.

    Attributes:
        name: `ST` or `TS`, as losses are logged.
        image, coarser: inputs of `generator`: the finest level and the output of the cascade below, None at scale 0.
        real: image of the domain that is translated to.
        back, lower_back: the generators of the other direction, which bring images back.
        alpha: interpolation factor of the gradient penalty.
    """

    name: str
    image: Tensor
    coarser: Tensor | None
    real: Tensor
    generator: Generator
    discriminator: Discriminator
    discriminator_optimizer: Optimizer
    back: Generator
    lower_back: Sequence[Generator]
    alpha: Tensor

    def translate(self, forward: Forward) -> Tensor:
        """The translated image, (B,3,h,w)."""
        return forward(self.generator, self.image, self.coarser)

    def translate_again(self, forward: Forward) -> Tensor:
        """The same image once more, for its graph; batch norms have seen it already."""
        with without_statistics(self.generator):
            return self.translate(forward)

    def part(self, samples: slice) -> Direction:
        """The direction with some samples of its batch."""
        coarser = None if self.coarser is None else self.coarser[samples]
        return replace(self, image=self.image[samples], coarser=coarser, real=self.real[samples])


def _directions(
    nets: ScaleNetworks, optimizers: ScaleOptimizers, batch: Batch, scale_factor: float, forward: Forward
) -> tuple[Direction, Direction]:
    def direction(name: str, levels: Sequence[Tensor], real: Tensor, to: str, back: str, alpha: Tensor) -> Direction:
        lower = getattr(nets, f"lower_G{to}")
        return Direction(
            name=name,
            image=levels[-1],
            coarser=cascade(lower, levels, scale_factor, forward),
            real=real,
            generator=getattr(nets, f"G{to}"),
            discriminator=getattr(nets, f"D{to}"),
            discriminator_optimizer=getattr(optimizers, f"D{to}"),
            back=getattr(nets, f"G{back}"),
            lower_back=getattr(nets, f"lower_G{back}"),
            alpha=alpha,
        )

    return (
        direction("ST", batch.source, batch.target[-1], "st", "ts", batch.alphas[0]),
        direction("TS", batch.target, batch.source[-1], "ts", "st", batch.alphas[1]),
    )


class GeneratorTerms:
    """Everything the generators' update minimises in one direction: adversarial, style, cycle and label terms.

    After `total`, `logged` holds the terms by their logged names and `returned` the image that came back, all without
    gradient. The weights of discriminator, perceptual and segmentation net must not take gradients. All terms but the
    label loss, which has a weight of its own, are means over samples and multiplied by `weight`.
    """

    def __init__(
        self,
        direction: Direction,
        perceptual: PerceptualNet,
        own: PerceptualTargets,
        other: PerceptualTargets,
        config: LossConfig,
        scale_factor: float,
        forward: Forward,
        weight: float = 1.0,
    ) -> None:
        self.direction = direction
        self.perceptual = perceptual
        self.own = own
        self.other = other
        self.config = config
        self.scale_factor = scale_factor
        self.forward = forward
        self.weight = weight
        self.source_net: nn.Module | None = None
        self.label: Tensor | None = None
        self.label_weight: Tensor | float = 1.0
        self.logged: dict[str, Tensor] = {}
        self.returned: Tensor | None = None

    def watch_labels(self, source_net: nn.Module, label: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add the cyclic label loss: P on the image that came back, against the label (B,h,w) of the original."""
        self.source_net, self.label, self.label_weight = source_net, label, weight

    def part(self, piece: Piece) -> GeneratorTerms:
        """The terms of some samples, as means over these."""
        own, other = self.own.part(piece.samples), self.other.part(piece.samples)
        direction = self.direction.part(piece.samples)
        part = GeneratorTerms(
            direction, self.perceptual, own, other, self.config, self.scale_factor, self.forward, self.weight
        )
        if self.source_net is not None:
            # A mean over labelled pixels, of which every sample has another number.
            labelled = self.label != IGNORE
            share = labelled[piece.samples].sum() / labelled.sum().clamp(min=1)
            part.watch_labels(self.source_net, self.label[piece.samples], self.label_weight * share / piece.weight)
        return part

    def total(self, fake: Tensor, micro_batch: int | None = None) -> Tensor:
        """The sum, with gradients to both generators. A `fake` without a graph is translated again for them."""
        if micro_batch is not None:
            return self._in_pieces(fake, pieces(len(self.direction.image), micro_batch))
        if fake.requires_grad:
            return self._sum(fake)
        direction = self.direction
        translate = partial(direction.translate_again, self.forward)
        return at_once_before_graph(
            self._sum, fake, translate, [*direction.generator.parameters()], [*direction.back.parameters()]
        )

    def _in_pieces(self, fake: Tensor, found: Sequence[Piece]) -> Tensor:
        parts = [self.part(piece) for piece in found]
        total = sum(piece.weight * part.total(fake[piece.samples]) for piece, part in zip(found, parts, strict=True))
        self.logged = weighted_sum([(piece.weight, part.logged) for piece, part in zip(found, parts, strict=True)])
        self.returned = torch.cat([part.returned for part in parts])
        return total

    def _sum(self, fake: Tensor) -> Tensor:
        direction = self.direction
        total, logged = adversarial_and_style_loss(
            fake, direction.discriminator, self.perceptual, self.own, self.other, self.config, self.forward, self.weight
        )
        self._log(logged, direction.name)
        return total + at_once(self._cycle, fake, *direction.back.parameters())

    def _cycle(self, fake: Tensor, *_: Tensor) -> Tensor:
        direction = self.direction
        returned = cycle_back(fake, direction.back, direction.lower_back, self.scale_factor, self.forward)
        total = cycle = self.weight * self.config.lambda_cyclic * F.l1_loss(returned, direction.image)
        self._log({f"Loss{direction.name}{direction.name[0]}": cycle}, "Cyclic")
        if self.source_net is not None:
            label = at_once(self._label_loss, returned)
            self._log({"SourceLabelLoss": label}, "Cyclic")
            total = cycle + label
        self.returned = returned.detach()
        return total

    def _label_loss(self, image: Tensor) -> Tensor:
        loss = cross_entropy(self.forward(self.source_net, image), self.label)
        return self.config.lambda_labels * self.label_weight * loss

    def _log(self, losses: Mapping[str, Tensor], prefix: str) -> None:
        self.logged |= {name: value.detach() for name, value in _with_direction(prefix, losses).items()}


def _backward_and_step(loss: Tensor, share: BatchShare, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    share.sum_gradients(*optimizers)
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
    recompute: bool = False,
    micro_batch: int | None = None,
    share: BatchShare = WHOLE,
) -> StepResult:
    """Update the four networks of a scale once, and at the last scale Q and Gst again.

    Args:
        perceptual: features of an image; must pass gradients to its input and collect none itself.
        labels: the segmentation networks of the last scale, None elsewhere and with `no_semseg`.
        warmup: leave the label loss out and do not step Gst in the segmentation phase.
        forward: how networks are run.
        recompute: translate once more for the generators' update instead of keeping both translations' activations
            through the discriminators': three of some fifty forwards more, for the least memory. The sums are the same.
        micro_batch: samples whose losses are computed at once, None for the whole batch. The sums are the same;
            networks with batch norm need the whole batch, and Q always gets it.
        share: what part of the batch of all processes `batch` is. Networks with batch norm must be synchronised ones
            where it is not all of it.

    Returns:
        Losses under `ST|TS/Discriminator|Generator/...`, `Cyclic/...`, `Semseg/...` (those of a share are to be summed
        over the processes), and the images `source`, `sit`, `sitis`, `target`, `tis`, `tisit`.
    """
    directions = _directions(nets, optimizers, batch, scale_factor, forward)
    losses: dict[str, Tensor] = {}
    with torch.set_grad_enabled(not recompute):
        fakes = [direction.translate(forward) for direction in directions]

    # (1) Discriminators, one after the other: together they would need twice the memory.
    for direction, fake in zip(directions, fakes, strict=True):
        loss, logged = discriminator_loss(
            direction.discriminator, direction.real, fake.detach(), direction.alpha, config, forward, micro_batch,
            share.weight,
        )
        _backward_and_step(loss, share, direction.discriminator_optimizer)
        losses |= _with_direction(direction.name, logged)

    # (2) Generators, against the discriminators just updated.
    with without_gradients(nets.Dst, nets.Dts):
        looks = perceptual_targets(*(direction.image for direction in directions), perceptual, config, forward)
        terms = [
            GeneratorTerms(direction, perceptual, own, other, config, scale_factor, forward, share.weight)
            for direction, own, other in zip(directions, looks, reversed(looks), strict=True)
        ]
        if labels is not None and not warmup:
            terms[0].watch_labels(labels.source_net, batch.label, share.of_labelled(batch.label))
        total = sum(term.total(fake, micro_batch) for term, fake in zip(terms, fakes, strict=True))
        _backward_and_step(total, share, optimizers.Gst, optimizers.Gts)
    for term in terms:
        losses |= term.logged

    # (3) Segmentation of the images that the updated Gst makes.
    if labels is not None:
        losses["Semseg/SemsegLoss"] = _segmentation_phase(
            directions[0], optimizers.Gst, labels, batch.label, warmup, forward, recompute, share
        )
    images = {
        "source": directions[0].image, "sit": fakes[0], "sitis": terms[0].returned,
        "target": directions[1].image, "tis": fakes[1], "tisit": terms[1].returned,
    }  # fmt: skip
    return StepResult(
        losses={name: value.detach() for name, value in losses.items()},
        images={name: value.detach() for name, value in images.items()},
    )


def _segmentation_phase(
    direction: Direction,
    generator_optimizer: Optimizer,
    labels: LabelNetworks,
    label: Tensor,
    warmup: bool,
    forward: Forward,
    recompute: bool,
    share: BatchShare,
) -> Tensor:
    """Step Q on the freshly translated source and, after warm-up, Gst again on this gradient alone."""
    again = recompute and not warmup
    with torch.set_grad_enabled(not (warmup or recompute)):
        sit = direction.translate(forward)
    if again:
        sit.requires_grad_(True)
    loss = share.of_labelled(label) * cross_entropy(forward(labels.target_net, sit), label)
    optimizers = (labels.target_optimizer,) if warmup else (labels.target_optimizer, generator_optimizer)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if again:
        direction.translate_again(forward).backward(sit.grad)  # Q's graph is gone
    share.sum_gradients(*optimizers)
    for optimizer in optimizers:
        optimizer.step()
    return loss
