"""Losses of a net's predictions on unlabelled images (docs/uda.md, section MaxSquare): pure functions of logits.

p is the softmax of logits (N,C,H,W), in float32 at least. A batch's loss is the mean of those of its images, except
where pixels are chosen by their confidence: then it is the mean over these pixels.
"""

import torch
from torch import Tensor

from data_handlers.classes import IGNORE
from models.losses import at_least_float32


def maxsquare(logits: Tensor) -> Tensor:
    """Minus half of the mean of p^2 over pixels and classes; its gradient does not vanish where p is near 1/2."""
    return -0.5 * at_least_float32(logits).softmax(dim=1).square().mean()


def entropy(logits: Tensor) -> Tensor:
    """Mean of -p ln p over pixels and classes."""
    return -_p_log_p(logits).mean()


def image_wise_maxsquare(logits: Tensor, ratio: float, counted: Tensor | None = None) -> Tensor:
    """Minus the sum of p^2 with the weights of `image_weights`, over images and classes; twice `maxsquare` at 0."""
    squares = at_least_float32(logits).softmax(dim=1).square().sum(dim=1)
    return -_weighted(squares, logits, ratio, counted)


def image_wise_entropy(logits: Tensor, ratio: float, counted: Tensor | None = None) -> Tensor:
    """Sum of -p ln p with the weights of `image_weights`, over images and classes; `entropy` at 0."""
    return -_weighted(_p_log_p(logits).sum(dim=1), logits, ratio, counted)


def _p_log_p(logits: Tensor) -> Tensor:
    log = at_least_float32(logits).log_softmax(dim=1)
    return log.exp() * log


def _weighted(values: Tensor, logits: Tensor, ratio: float, counted: Tensor | None) -> Tensor:
    images, classes = logits.shape[:2]
    weights = image_weights(logits.argmax(dim=1), classes, ratio, counted)
    return (weights.to(values.dtype) * values).sum() / (images * classes)


def image_weights(prediction: Tensor, classes: int, ratio: float, counted: Tensor | None = None) -> Tensor:
    """Weight 1 / max(h^ratio T^(1-ratio), 1) of each pixel, where h of the T pixels of its image have its class.

    Args:
        prediction: classes (N,H,W).
        ratio: 0 for the same weight of all pixels of an image, 1 for the same of all classes.
        counted: classes (N,H,W) that are counted instead of the predictions; other values are left out of T as well.

    Returns:
        float64 (N,H,W), without gradient.
    """
    counted = (prediction if counted is None else counted).long().flatten(1)
    inside = (counted >= 0) & (counted < classes)
    sizes = torch.zeros(len(counted), classes, dtype=torch.int64, device=counted.device)
    sizes = sizes.scatter_add_(1, torch.where(inside, counted, 0), inside.long()).double()
    weights = 1.0 / (sizes**ratio * sizes.sum(dim=1, keepdim=True) ** (1.0 - ratio)).clamp(min=1.0)
    return weights.gather(1, prediction.flatten(1)).view(prediction.shape)


@torch.no_grad()
def confident_label(logits: Tensor, threshold: float) -> Tensor:
    """Predicted classes (N,H,W) where p is larger than the threshold, else 255; of one head."""
    p, label = at_least_float32(logits).softmax(dim=1).max(dim=1)
    return torch.where(p > threshold, label, IGNORE)


@torch.no_grad()
def ensemble_label(main: Tensor, aux: Tensor, threshold: float) -> Tensor:
    """Classes (N,H,W) of the mean of two heads' p where that of one is larger than the threshold, else 255."""
    one, other = (at_least_float32(logits).softmax(dim=1) for logits in (main, aux))
    kept = torch.maximum(one, other).amax(dim=1) > threshold
    return torch.where(kept, ((one + other) / 2).argmax(dim=1), IGNORE)
