"""One training step at one scale, in the three phases of the method (docs/method.md, section 3).

Every loss term has its own `.backward()`, so that its graph is freed before the next term is computed: at full
resolution the activations of discriminators, perceptual net and segmentation nets are most of the memory. A term of a
generated image is computed on a detached leaf of it; the gradients of all terms add up in the leaf's `.grad`, which one
backward pass then takes through the generator. Nothing in here reads a value of the device back to the host.
"""

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
from core.networks import Discriminator, Generator
from data_handlers.classes import IGNORE
from data_handlers.images import PROCST_INPUT
from models.losses import cross_entropy
from training.distributed import ALONE, Rank, all_reduce_and_step, zero_gradients
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
    """Logged scalars on the device and the finest images (B,3,h_s,w_s) of the step, all detached.

    Losses are `ST|TS/Discriminator|Generator/...`, `Cyclic/...` and `Semseg/...`, to be summed over the processes;
    images are `source`, `SiT` (source in target), `SiTiS` (and back), `target`, `TiS`, `TiSiT`.
    """

    losses: dict[str, Tensor]
    images: dict[str, Tensor]


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

    def part(self, samples: slice) -> "_Direction":
        """The direction with the samples of a micro-batch."""
        image, coarser = self.image[samples], None if self.coarser is None else self.coarser[samples]
        weight = self.weight * len(image) / len(self.image)
        part = replace(self, image=image, coarser=coarser, real=self.real[samples], weight=weight)
        if self.label is None:
            return part
        labelled = self.label != IGNORE
        share = labelled[samples].sum().double() / labelled.sum().clamp(min=1)
        return replace(part, label=self.label[samples], label_weight=self.label_weight * share)


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One update of the four networks of a scale; with segmentation nets, also of Q and of Gst again.

    Attributes:
        optimizers: by the name of the network, such as `Dst`.
        scale_factor: f, the ratio of the sides of neighbouring pyramid levels.
        segmentation: None at all scales but the last, and without label losses.
        warmup: skip the cyclic label loss, and do not step Gst in the segmentation phase.
        run: calls a network; a `training.precision.Runner`.
        recompute: save memory: translate once more where a generator's graph is needed, instead of keeping the graphs
            of both translations. The result is the same.
        micro_batch: save memory: the most samples whose losses are computed at once, None for the whole batch. The
            result is the same. Networks with batch norm need the whole batch, and Q always gets it.
        rank: this process; where it is one of several, batch norms must be synchronised.
        fraction: of the global batch that `batch` is, see `Rank.fraction`.
    """

    nets: ScaleNetworks
    optimizers: Mapping[str, Optimizer]
    perceptual: PerceptualNet
    batch: Batch
    loss: LossConfig
    scale_factor: float
    segmentation: SegmentationNets | None = None
    warmup: bool = False
    run: Run = nn.Module.__call__
    recompute: bool = False
    micro_batch: int | None = None
    rank: Rank = ALONE
    fraction: float = 1.0
    losses: dict[str, Tensor] = field(default_factory=dict, init=False)

    def take(self) -> StepResult:
        """Take the step, once."""
        st, ts = self._directions()
        sit, tis = fakes = [self._translate(direction) for direction in (st, ts)]

        # (1) The discriminators.
        for direction, fake in ((st, sit), (ts, tis)):
            self._update_discriminator(direction, fake.detach())

        # (2) The generators, against the updated discriminators.
        if self.segmentation is not None:
            seg_source = None if self.warmup else self.segmentation.seg_source
            labelled = self.rank.labelled_fraction(self.batch.label)
            st = replace(st, label=self.batch.label, label_weight=labelled, seg_source=seg_source)
        discriminators = nn.ModuleList([self.nets.Dst, self.nets.Dts])
        discriminators.requires_grad_(False)  # gradients pass through to the images
        sitis, tisit = self._update_generators((st, ts), fakes)
        discriminators.requires_grad_(True)

        # (3) Q on the images of the updated Gst, and Gst once more on the loss of Q.
        if self.segmentation is not None:
            self._update_segmentation(st, self.segmentation)

        images = {"source": st.image, "SiT": sit.detach(), "SiTiS": sitis}
        images |= {"target": ts.image, "TiS": tis.detach(), "TiSiT": tisit}
        return StepResult(self.losses, images)

    def _log(self, prefix: str, values: Mapping[str, Tensor]) -> None:
        """Add the losses of a micro-batch to those of the whole batch."""
        for name, value in values.items():
            key = f"{prefix}/{name}"
            self.losses[key] = self.losses[key] + value.detach() if key in self.losses else value.detach()

    def _directions(self) -> tuple[_Direction, _Direction]:
        nets, optimizers, batch, weight = self.nets, self.optimizers, self.batch, self.fraction
        momentum_st, back_momentum_st = reference_momenta(nets.Gst, own_before=3, own_after=0)
        momentum_ts, back_momentum_ts = reference_momenta(nets.Gts, own_before=2, own_after=1)
        source, target = batch.source[-1], batch.target[-1]
        coarser_st = cascade(nets.lower_Gst, batch.source, self.scale_factor, self.run)
        coarser_ts = cascade(nets.lower_Gts, batch.target, self.scale_factor, self.run)
        st = _Direction(
            name="ST", image=source, coarser=coarser_st, real=target, alpha=batch.alphas[0], weight=weight,
            generator=nets.Gst, discriminator=nets.Dst, optimizer=optimizers["Dst"], back=nets.Gts,
            lower_back=nets.lower_Gts, momentum=momentum_st, back_momentum=back_momentum_ts,
        )  # fmt: skip
        ts = _Direction(
            name="TS", image=target, coarser=coarser_ts, real=source, alpha=batch.alphas[1], weight=weight,
            generator=nets.Gts, discriminator=nets.Dts, optimizer=optimizers["Dts"], back=nets.Gst,
            lower_back=nets.lower_Gst, momentum=momentum_ts, back_momentum=back_momentum_st,
        )  # fmt: skip
        return st, ts

    def _translate(self, direction: _Direction) -> Tensor:
        """The generated image (B,3,h,w), without its graph where that is to be recomputed."""
        with torch.set_grad_enabled(not self.recompute), bn_momentum(direction.generator, direction.momentum):
            return self.run(direction.generator, direction.image, direction.coarser)

    def _translate_again(self, direction: _Direction) -> Tensor:
        """The same image with its graph; the running statistics of batch norms have seen the batch before."""
        with frozen_bn_stats(direction.generator):
            return self.run(direction.generator, direction.image, direction.coarser)

    def _update_discriminator(self, direction: _Direction, fake: Tensor) -> None:
        """Phase 1: step on lambda_adversarial * (-mean D(real) + mean D(fake) + lambda_grad * gradient penalty)."""
        discriminator, loss = direction.discriminator, self.loss

        def differentiable_twice(image: Tensor) -> Tensor:
            return self.run(discriminator, image, True)

        zero_gradients(direction.optimizer)
        for samples in micro_batches(len(fake), self.micro_batch):
            part = direction.part(samples)
            # One pass over real and fake images would be less exact: the gradients of the score's bias nearly cancel
            # between the two, and have a tenth of the rounding error when they are computed apart.
            real_term = -part.weight * mean_score(self.run(discriminator, part.real))
            (loss.lambda_adversarial * real_term).backward()
            fake_term = part.weight * mean_score(self.run(discriminator, fake[samples]))
            (loss.lambda_adversarial * fake_term).backward()
            penalty = gradient_penalty(differentiable_twice, part.real, fake[samples], part.alpha)
            penalty_term = part.weight * loss.lambda_grad * penalty
            (loss.lambda_adversarial * penalty_term).backward(inputs=list(discriminator.parameters()))
            terms = {"RealImagesLoss": real_term, "FakeImagesLoss": fake_term, "LossGP": penalty_term}
            terms["LossAdversarial"] = loss.lambda_adversarial * (real_term + fake_term + penalty_term)
            self._log(f"{direction.name}/Discriminator", terms)
        all_reduce_and_step(self.rank, direction.optimizer)

    def _update_generators(self, directions: Sequence[_Direction], fakes: Sequence[Tensor]) -> list[Tensor]:
        """Phase 2: step both generators on all their terms; returns the images translated back, of each direction."""
        loss, optimizers = self.loss, (self.optimizers["Gst"], self.optimizers["Gts"])
        with torch.no_grad():
            targets = perceptual_targets(self.run(self.perceptual, torch.cat([d.image for d in directions])), loss)
        returned_images = []
        zero_gradients(*optimizers)
        for direction, fake, (content_target, style_target) in zip(directions, fakes, targets, strict=True):
            gradients, returned = [], []
            for samples in micro_batches(len(fake), self.micro_batch):
                part = direction.part(samples)
                leaf = fake[samples].detach().requires_grad_(True)

                score = mean_score(self.run(part.discriminator, leaf))
                adversarial = -part.weight * loss.lambda_adversarial * score
                adversarial.backward()
                self._log(f"{part.name}/Generator", {"LossAdversarial": adversarial})

                style = style_terms(
                    self.run(self.perceptual, leaf),
                    leaf,
                    content_target={layer: features[samples] for layer, features in content_target.items()},
                    style_target={layer: gram[samples] for layer, gram in style_target.items()},
                    loss=loss,
                    weight=part.weight,
                )
                (loss.lambda_style * style["TotalStyleLoss"]).backward()
                self._log(f"{part.name}/Generator", style)

                returned.append(self._backward_of_cycle(leaf, part))
                if self.recompute:
                    self._translate_again(part).backward(leaf.grad)
                else:
                    gradients.append(leaf.grad)
            if not self.recompute:
                fake.backward(torch.cat(gradients))
            returned_images.append(torch.cat(returned))
        all_reduce_and_step(self.rank, *optimizers)
        return returned_images

    def _backward_of_cycle(self, leaf: Tensor, direction: _Direction) -> Tensor:
        """Translate `leaf` back, and return that image, (B,3,h,w).

        The gradients of cycle and label loss are added to `leaf.grad` and the generator `back`.
        """
        levels = generated_pyramid(leaf.detach(), direction.back.shape.scale, self.scale_factor)
        coarser = cascade(direction.lower_back, levels, self.scale_factor, self.run)
        with bn_momentum(direction.back, direction.back_momentum):
            returned = self.run(direction.back, leaf, coarser)
        returned_leaf = returned.detach().requires_grad_(True)
        cycle = direction.weight * self.loss.lambda_cyclic * F.l1_loss(returned_leaf, direction.image)
        cycle.backward()
        self._log("Cyclic", {f"Loss{direction.name}{direction.name[0]}": cycle})
        if direction.seg_source is not None:
            mean = cross_entropy(self._predict(direction.seg_source, returned_leaf), direction.label)
            label_loss = (self.loss.lambda_labels * direction.label_weight * mean).to(mean.dtype)
            label_loss.backward()
            self._log("Cyclic", {"SourceLabelLoss": label_loss})
        returned.backward(returned_leaf.grad)
        return returned.detach()

    def _predict(self, net: nn.Module, image: Tensor) -> Tensor:
        """Logits (B,C,h,w) of a segmentation net on an image (B,3,h,w) in [-1,1]."""
        return self.run(net, net.network_input.converted(image, PROCST_INPUT))

    def _update_segmentation(self, direction: _Direction, nets: SegmentationNets) -> None:
        """Phase 3: translate the source again; step Q and, after the warm-up, the generator on the loss of Q."""
        with torch.set_grad_enabled(not self.warmup and not self.recompute):
            sit = self.run(direction.generator, direction.image, direction.coarser)
        leaf = sit.detach().requires_grad_(not self.warmup)
        mean = cross_entropy(self._predict(nets.seg_sit, leaf), direction.label)
        segmentation_loss = (direction.label_weight * mean).to(mean.dtype)
        optimizers = [nets.optimizer] if self.warmup else [nets.optimizer, self.optimizers["Gst"]]
        zero_gradients(*optimizers)
        segmentation_loss.backward()
        if not self.warmup:
            (self._translate_again(direction) if self.recompute else sit).backward(leaf.grad)
        all_reduce_and_step(self.rank, *optimizers)
        self._log("Semseg", {"SemsegLoss": segmentation_loss})


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


def micro_batches(size: int, micro_batch: int | None) -> list[slice]:
    """Slices that cover a batch of `size` samples, as even as possible, each of at most `micro_batch` samples."""
    count = 1 if micro_batch is None else -(-size // micro_batch)
    edges = [k * size // count for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
