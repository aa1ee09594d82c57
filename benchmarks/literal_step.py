"""The yardstick: one training step transcribed from the text, in eager float32, with nothing shared or left out.

Every term computes the translated images it speaks of anew, has a backward of its own, and its gradients reach every
network on the way, the perceptual net and the frozen segmentation net included. It passes the same golden tests as
`core.step.TrainingStep` and takes the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from core.cascade import cascade, generated_pyramid
from core.config import LossConfig
from core.losses import gradient_penalty, total_variation
from core.networks import Generator
from core.step import Batch, PerceptualNet, ScaleNetworks, SegmentationNets, StepResult
from models.losses import cross_entropy

Fake = Callable[[], Tensor]  # translates anew at every call


def literal_step(
    *,
    nets: ScaleNetworks,
    optimizers: Mapping[str, Optimizer],
    perceptual: PerceptualNet,
    batch: Batch,
    loss: LossConfig,
    scale_factor: float,
    segmentation: SegmentationNets | None = None,
    warmup: bool = False,
) -> StepResult:
    """See `core.step.TrainingStep`. `lambda_adversarial` must be 1, as published: the logged parts contain it here."""
    source, target = batch.source[-1], batch.target[-1]

    def translate(generator: Generator, lower: Sequence[Generator], levels: Sequence[Tensor]) -> Tensor:
        return generator(levels[-1], cascade(lower, levels, scale_factor))

    def to_target() -> Tensor:
        return translate(nets.Gst, nets.lower_Gst, batch.source)

    def to_source() -> Tensor:
        return translate(nets.Gts, nets.lower_Gts, batch.target)

    losses = _discriminators(nets, optimizers, batch, loss, to_target, to_source)
    optimizers["Gst"].zero_grad()
    optimizers["Gts"].zero_grad()
    losses |= _adversarial_and_style(nets, perceptual, source, target, loss, to_target, to_source)
    sit = to_target()
    sitis = _back(sit, nets.Gts, nets.lower_Gts, scale_factor)
    cycle_source = loss.lambda_cyclic * F.l1_loss(sitis, source)
    losses["Cyclic/LossSTS"] = total = cycle_source
    if segmentation is not None and not warmup:
        cyclic_label = loss.lambda_labels * cross_entropy(segmentation.seg_source(sitis), batch.label)
        losses["Cyclic/SourceLabelLoss"] = cyclic_label
        total = cycle_source + cyclic_label  # both look at the same image that came back, so they go back together
    total.backward()
    tis = to_source()
    tisit = _back(tis, nets.Gst, nets.lower_Gst, scale_factor)
    cycle_target = loss.lambda_cyclic * F.l1_loss(tisit, target)
    cycle_target.backward()
    losses["Cyclic/LossTST"] = cycle_target
    optimizers["Gst"].step()
    optimizers["Gts"].step()

    # (3) segmentation
    if segmentation is not None:
        segmentation.optimizer.zero_grad()
        optimizers["Gst"].zero_grad()
        cross_entropy_of_q = cross_entropy(segmentation.seg_sit(to_target()), batch.label)
        cross_entropy_of_q.backward()
        segmentation.optimizer.step()
        if not warmup:
            optimizers["Gst"].step()
        losses["Semseg/SemsegLoss"] = cross_entropy_of_q

    images = {"source": source, "SiT": sit, "SiTiS": sitis, "target": target, "TiS": tis, "TiSiT": tisit}
    return StepResult(
        losses={name: value.detach() for name, value in losses.items()},
        images={name: value.detach() for name, value in images.items()},
    )


def _discriminators(
    nets: ScaleNetworks,
    optimizers: Mapping[str, Optimizer],
    batch: Batch,
    config: LossConfig,
    to_target: Fake,
    to_source: Fake,
) -> dict[str, Tensor]:
    """Phase 1: one discriminator after the other, three backwards each."""
    losses: dict[str, Tensor] = {}
    directions = (
        ("ST", nets.Dst, optimizers["Dst"], batch.target[-1], to_target, batch.alphas[0]),
        ("TS", nets.Dts, optimizers["Dts"], batch.source[-1], to_source, batch.alphas[1]),
    )
    for name, discriminator, optimizer, real, fake_of, alpha in directions:
        optimizer.zero_grad()
        fake = fake_of().detach()
        real_loss = config.lambda_adversarial * -discriminator(real).mean()
        real_loss.backward()
        fake_loss = config.lambda_adversarial * discriminator(fake).mean()
        fake_loss.backward()
        penalty = config.lambda_adversarial * config.lambda_grad * gradient_penalty(discriminator, real, fake, alpha)
        penalty.backward()
        optimizer.step()
        parts = {"RealImagesLoss": real_loss, "FakeImagesLoss": fake_loss, "LossGP": penalty}
        parts["LossAdversarial"] = real_loss + fake_loss + penalty
        losses |= {f"{name}/Discriminator/{key}": value for key, value in parts.items()}
    return losses


def _adversarial_and_style(
    nets: ScaleNetworks,
    perceptual: PerceptualNet,
    source: Tensor,
    target: Tensor,
    config: LossConfig,
    to_target: Fake,
    to_source: Fake,
) -> dict[str, Tensor]:
    """First half of phase 2: two backwards for each direction, each through the same translation."""
    losses: dict[str, Tensor] = {}
    pairs = (
        ("ST", nets.Dst, to_target, source, target),
        ("TS", nets.Dts, to_source, target, source),
    )
    for name, discriminator, fake_of, own, other in pairs:
        fake = fake_of()
        adversarial = config.lambda_adversarial * -discriminator(fake).mean()
        adversarial.backward(retain_graph=True)  # the style terms look at the same image
        adversarial = adversarial.detach()  # which frees the discriminator's part of the graph
        features, own_features, other_features = perceptual(fake), perceptual(own), perceptual(other)
        content = sum(F.mse_loss(features[i], own_features[i]) for i in config.content_layers)
        style = sum(F.mse_loss(_gram(features[i]), _gram(other_features[i])) for i in config.style_layers)
        content, style = content / len(config.content_layers), style / len(config.style_layers)
        tv = total_variation(fake)
        total_style = config.content_weight * content + config.style_weight * style + config.tv_weight * tv
        (config.lambda_style * total_style).backward()
        parts = {
            "LossAdversarial": adversarial, "ContentLoss": content, "StyleLoss": style, "TVLoss": tv,
            "TotalStyleLoss": total_style,
        }  # fmt: skip
        losses |= {f"{name}/Generator/{key}": value for key, value in parts.items()}
    return losses


def _gram(features: Tensor) -> Tensor:
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def _back(fake: Tensor, back: Generator, lower: Sequence[Generator], scale_factor: float) -> Tensor:
    return back(fake, cascade(lower, generated_pyramid(fake.detach(), back.shape.scale, scale_factor), scale_factor))


def collect_gradients(*networks: nn.Module) -> None:
    """Let frozen networks collect gradients that nobody uses, as the text does not forbid."""
    for network in networks:
        network.requires_grad_(True)
