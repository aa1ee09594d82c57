"""The loss terms of ProCST as pure functions of tensors (docs/method.md, section 3). All return scalars."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import LossConfig
from models.losses import at_least_float32

# Feature maps (B,C,h,w) by position in VGG16's `features`, holding at least the layers asked for.
Features = Mapping[int, Tensor]


def mean_score(score: Tensor) -> Tensor:
    """Mean of a discriminator's score map (B,1,h,w)."""
    return at_least_float32(score).mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Mean over pixels of (||dD(x)/dx||_2 over channels - 1)^2 at x = alpha * real + (1 - alpha) * fake.

    Args:
        discriminator: image (B,3,h,w) -> score map.
        real, fake: (B,3,h,w) in [-1,1], at least float32, without gradient.
        alpha: one interpolation factor in [0,1] for the whole batch, a scalar tensor.

    Returns:
        The penalty, differentiable (through a double backward) with respect to the discriminator's weights.
    """
    x = (alpha * real + (1.0 - alpha) * fake).requires_grad_(True)
    score = discriminator(x)
    (gradient,) = torch.autograd.grad(at_least_float32(score).sum(), x, create_graph=True)
    return ((gradient.norm(2, dim=1) - 1.0) ** 2).mean()


def gram_matrix(features: Tensor) -> Tensor:
    """F F^T / (h w) of each image: (B,C,h,w) -> (B,C,C), at least float32 for sums over half a million positions."""
    flat = at_least_float32(features).permute(0, 2, 3, 1).flatten(1, 2)
    # With beta = 0 the first argument is ignored, and the division is part of the product.
    return torch.baddbmm(flat.new_empty(()), flat.transpose(1, 2), flat, beta=0, alpha=1 / flat.shape[1])


def perceptual_targets(features: Features, loss: LossConfig) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """(content_target, style_target) of source to target and of target to source.

    These are features of the images that are translated, and Gram matrices of the images of the other domain.

    Args:
        features: of the source images and then as many target images, as one batch.
    """
    source, target = ({layer: maps.chunk(2)[half] for layer, maps in features.items()} for half in (0, 1))
    return [
        (
            {layer: own[layer] for layer in loss.content_layers},
            {layer: gram_matrix(other[layer]) for layer in loss.style_layers},
        )
        for own, other in ((source, target), (target, source))
    ]


def style_terms(
    features: Features,
    image: Tensor,
    *,
    content_target: Features,
    style_target: Mapping[int, Tensor],
    loss: LossConfig,
    weight: float,
) -> dict[str, Tensor]:
    """Content, style and total variation loss of a generated image, each times `weight`, and their weighted total.

    Content and style are means over their layers of the squared difference to `content_target` and, of Gram matrices,
    to `style_target`.

    Args:
        features: of `image` (B,3,h,w).
        content_target, style_target: see `perceptual_targets`.
    """
    apart = [at_least_float32(features[i]) - at_least_float32(content_target[i]) for i in loss.content_layers]
    content = weight * torch.stack([difference.square().mean() for difference in apart]).mean()
    grams = [F.mse_loss(gram_matrix(features[i]), style_target[i]) for i in loss.style_layers]
    style = weight * torch.stack(grams).mean()
    tv = weight * total_variation(image)
    total = loss.content_weight * content + loss.style_weight * style + loss.tv_weight * tv
    return {"ContentLoss": content, "StyleLoss": style, "TVLoss": tv, "TotalStyleLoss": total}


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute horizontal plus mean absolute vertical neighbour difference of (B,C,h,w)."""
    horizontal = (x[..., :, 1:] - x[..., :, :-1]).abs().mean()
    vertical = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    return horizontal + vertical
