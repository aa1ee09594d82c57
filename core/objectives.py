"""The terms of a step as they are computed with networks: what is evaluated on what, and when memory is given back.

The formulas themselves are in `core.losses` (specification section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from core.cascade import cascade, generated_pyramid
from core.config import LossConfig
from core.execution import Forward
from core.losses import content_loss, gradient_penalty, gram_matrix, style_loss, total_variation
from core.networks import Discriminator, Generator

# Image (B,3,h,w) in [-1,1] -> features by position in VGG16's `features`, holding at least the layers asked for.
PerceptualNet = Callable[[Tensor], Mapping[int, Tensor]]


class _AtOnce(torch.autograd.Function):
    """See `at_once`."""

    @staticmethod
    def forward(ctx: FunctionCtx, term: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        leaves = [x if x.is_leaf else x.detach().requires_grad_(True) for x in inputs]
        with torch.enable_grad():
            loss = term(*leaves)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves, allow_unused=True))
        return loss.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else upstream * gradient for gradient in ctx.saved_tensors)


def at_once(term: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`term(*inputs)`, a scalar, with its gradients to the inputs computed along with it.

    What it needs to keep for them is freed before the next term is computed, instead of waiting for the backward of the
    whole step: at full resolution the activations of discriminator, perceptual and segmentation net are most of the
    memory.

    Args:
        inputs: everything that takes gradients in it: an image, or the weights of a network.
    """
    return _AtOnce.apply(term, *inputs)


class _AtOnceBeforeGraph(torch.autograd.Function):
    """See `at_once_before_graph`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, term: Callable[[Tensor], Tensor], image: Tensor, again: Callable[[], Tensor], own: int,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        leaf = image.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = term(leaf)
            to_image, *to_others = torch.autograd.grad(loss, [leaf, *weights[own:]])
            to_own = torch.autograd.grad(again(), weights[:own], to_image)
        ctx.save_for_backward(*to_own, *to_others)
        return loss.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(upstream * gradient for gradient in ctx.saved_tensors)


def at_once_before_graph(
    term: Callable[[Tensor], Tensor],
    image: Tensor,
    again: Callable[[], Tensor],
    own: Sequence[Tensor],
    others: Sequence[Tensor],
) -> Tensor:
    """`term(image)`, as `at_once`, of an image without a graph: it is computed once more for its gradients, by `again`.

    That graph is made when what the term needs is freed, so that the two never take memory together.

    Args:
        own: the weights that the image depends on; each must have a gradient, as each of `others`.
        others: those that the term depends on.
    """
    return _AtOnceBeforeGraph.apply(term, image, again, len(own), *own, *others)


@dataclass(frozen=True)
class Piece:
    """Part of a batch, computed on its own to save memory.

    Attributes:
        samples: which.
        weight: their share of the batch, and so of every mean over it.
    """

    samples: slice
    weight: float


def pieces(batch: int, micro_batch: int | None) -> list[Piece]:
    """Cover a batch with pieces of at most `micro_batch` samples, as even as can be; None keeps it whole."""
    count = 1 if micro_batch is None else -(-batch // micro_batch)
    edges = [k * batch // count for k in range(count + 1)]
    return [Piece(slice(a, b), (b - a) / batch) for a, b in pairwise(edges)]


def weighted_sum(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Logged scalars of the whole batch from those of its pieces, each with its weight."""
    return {name: sum(weight * values[name] for weight, values in parts) for name in parts[0][1]}


def discriminator_loss(
    discriminator: Discriminator,
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    config: LossConfig,
    forward: Forward,
    micro_batch: int | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda_adversarial * (-mean D(real) + mean D(fake) + lambda_grad * penalty) and its logged parts, each weighted.

    All terms are means over samples, which a discriminator without batch norm treats one by one, so the batch may be
    taken in pieces of `micro_batch` samples.
    """
    found = [
        (
            piece.weight,
            _discriminator_parts(discriminator, real[piece.samples], fake[piece.samples], alpha, forward, weight),
        )
        for piece in pieces(len(real), micro_batch)
    ]
    parts = weighted_sum(found)
    penalty = config.lambda_grad * parts["penalty"]
    total = config.lambda_adversarial * (parts["real"] + parts["fake"] + penalty)
    logged = {"RealImagesLoss": parts["real"], "FakeImagesLoss": parts["fake"], "LossGP": penalty}
    return total, {f"Discriminator/{name}": value for name, value in {**logged, "LossAdversarial": total}.items()}


def _discriminator_parts(
    discriminator: Discriminator, real: Tensor, fake: Tensor, alpha: Tensor, forward: Forward, weight: float
) -> dict[str, Tensor]:
    """-mean D(real), mean D(fake) and the gradient penalty, each weighted and with its gradients."""
    score = partial(forward, discriminator)

    def twice(image: Tensor) -> Tensor:
        return forward(discriminator, image, True)  # with a double backward

    weights = tuple(discriminator.parameters())
    # One pass over both images would save launches, but the gradients of the score's bias nearly cancel between them:
    # taken apart, they are ten times as exact.
    return {
        "real": -at_once(lambda *_: weight * score(real).float().mean(), *weights),
        "fake": at_once(lambda *_: weight * score(fake).float().mean(), *weights),
        "penalty": at_once(lambda *_: weight * gradient_penalty(twice, real, fake, alpha), *weights),
    }


@dataclass(frozen=True)
class PerceptualTargets:
    """What the perceptual terms compare with: features at the content layers, Gram matrices at the style layers."""

    features: Mapping[int, Tensor]
    gram_matrices: Mapping[int, Tensor]

    def part(self, samples: slice) -> PerceptualTargets:
        """The targets of some samples of the batch."""
        return PerceptualTargets(
            {layer: features[samples] for layer, features in self.features.items()},
            {layer: gram[samples] for layer, gram in self.gram_matrices.items()},
        )


@torch.no_grad()
def perceptual_targets(
    source: Tensor, target: Tensor, perceptual: PerceptualNet, config: LossConfig, forward: Forward
) -> tuple[PerceptualTargets, PerceptualTargets]:
    """Look at both images (B,3,h,w) once, each as content of one direction and as style of the other."""
    features = forward(perceptual, torch.cat([source, target]))
    halves = {layer: features[layer].chunk(2) for layer in config.perceptual_layers}

    def targets(half: int) -> PerceptualTargets:
        return PerceptualTargets(
            {layer: halves[layer][half] for layer in config.content_layers},
            {layer: gram_matrix(halves[layer][half]) for layer in config.style_layers},
        )

    return targets(0), targets(1)


def adversarial_and_style_loss(
    fake: Tensor,
    discriminator: Discriminator,
    perceptual: PerceptualNet,
    own: PerceptualTargets,
    other: PerceptualTargets,
    config: LossConfig,
    forward: Forward,
    weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adversarial plus style terms of one direction and their logged parts, each weighted.

    `own` belongs to the image that was translated, `other` to the image of the other domain. The weights of the
    discriminator and the perceptual net must not take gradients.
    """
    parts: dict[str, Tensor] = {}

    def adversarial_term(image: Tensor) -> Tensor:
        return weight * config.lambda_adversarial * -forward(discriminator, image).float().mean()

    def perceptual_term(image: Tensor) -> Tensor:
        features = forward(perceptual, image)
        content = weight * content_loss(features, own.features, config.content_layers)
        style = weight * style_loss(features, other.gram_matrices, config.style_layers)
        parts.update(ContentLoss=content.detach(), StyleLoss=style.detach())
        return config.content_weight * content + config.style_weight * style

    adversarial = at_once(adversarial_term, fake)
    perceptual_loss = at_once(perceptual_term, fake)
    tv = weight * total_variation(fake)
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
