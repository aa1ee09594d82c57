"""Losses and pseudo-labels of DDB (docs/uda.md, section DDB): pure functions of tensors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_handlers.classes import IGNORE
from models.losses import at_least_float32


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy, a mean over all pixels: ignored ones count as 0.

    Args:
        logits: (B,C,h,w); computed in float32 at least.
        label: trainIds (B,h,w), integer, 255 = ignore.
        weight: (B,h,w), by default 1.
    """
    found = F.cross_entropy(at_least_float32(logits), label.long(), ignore_index=IGNORE, reduction="none")
    return (found if weight is None else weight * found).mean()


@torch.no_grad()
def pseudo_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The classes (B,h,w) of the largest probabilities, and these, in float32 at least."""
    confidence, label = at_least_float32(logits).softmax(dim=1).max(dim=1)
    return label, confidence


def weight_map(share: Tensor, like: Tensor, ignore_top: int, ignore_bottom: int) -> Tensor:
    """The share of confident pixels as the weight of every pixel, 0 in some rows; (B,h,w) as `like`."""
    weight = share.to(like.dtype).expand(like.shape).clone()
    weight[:, :ignore_top] = 0.0
    weight[:, like.shape[1] - ignore_bottom :] = 0.0
    return weight


@torch.no_grad()
def correct(logits: Tensor, label: Tensor) -> Tensor:
    """Number of pixels whose class is predicted, a float64 scalar."""
    return (logits.argmax(dim=1) == label).sum().double()


def majority_label(label: Tensor, num_classes: int, scale: int, min_ratio: float) -> Tensor:
    """The most frequent class of each cell of `scale` x `scale` pixels.

    Args:
        label: trainIds (B,h,w), 255 = ignore, which counts as a class.
        min_ratio: a cell in which a class has a smaller share is ignored.

    Returns:
        trainIds int64 (B,h/scale,w/scale), 255 = ignore.
    """
    index = torch.where(label == IGNORE, num_classes, label.long())[:, None]
    planes = torch.zeros(len(label), num_classes + 1, *label.shape[1:], device=label.device)
    share, found = F.avg_pool2d(planes.scatter_(1, index, 1.0), scale).max(dim=1)
    return torch.where((share < min_ratio) | (found == num_classes), IGNORE, found)


def feature_distance(
    student: Tensor, imagenet: Tensor, label: Tensor, *, num_classes: int, classes: Sequence[int], min_ratio: float
) -> tuple[Tensor, Tensor]:
    """Distances between the features of two nets, and which of them count.

    Args:
        student, imagenet: (B,C,h,w).
        label: trainIds (B,H,W), 255 = ignore.
        classes: of the cells that count (`majority_label`); empty for all cells.

    Returns:
        The norm of the difference (B,h,w), and a mask of the same shape.
    """
    distance = (at_least_float32(student) - at_least_float32(imagenet)).norm(dim=1)
    if not classes:
        return distance, torch.ones_like(distance, dtype=torch.bool)
    cells = majority_label(label, num_classes, label.shape[2] // student.shape[3], min_ratio)
    counts = torch.zeros(IGNORE + 1, dtype=torch.bool, device=cells.device)
    counts[list(classes)] = True
    return distance, counts[cells]
