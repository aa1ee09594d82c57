"""Confusion matrix of dense predictions, and what is read off it. Rows are labels, columns predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count label-prediction pairs in one pass on the tensors' device, without reading anything back.

    Args:
        prediction: integers in [0, classes), any shape.
        label: integers of the same shape; values of `classes` or more are not counted.

    Returns:
        int64 (classes, classes).
    """
    counted = label < classes
    # Pixels that do not count go into one bin behind the matrix, so no pixel has to be selected.
    pair = torch.where(counted, label.long() * classes + prediction.long(), classes * classes)
    return count_values(pair, classes * classes + 1)[:-1].reshape(classes, classes)


def count_values(values: Tensor, bins: int) -> Tensor:
    """How often 0, 1, ..., `bins` - 1 occur in int64 `values`, int64 (bins,), without reading anything back.

    `torch.bincount` has the GPU tell the host the largest value first.
    """
    flat = values.flatten()
    counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix over a subset of classes.

    Pixels labelled with a class outside the subset are ignored. Predictions outside the subset stay: they are errors of
    the labelled class. A class with no labelled pixel is absent: it has no IoU and is left out of the means, whether or
    not it was predicted.

    Attributes:
        classes: the subset, in order.
        iou: intersection over union of each class of `classes`, None where absent.
        mean_iou: mean over the classes present; None if there is none.
        pixel_accuracy: share of counted pixels predicted right; None if no pixel was counted.
        absent: classes of the subset without a labelled pixel.
    """

    classes: tuple[int, ...]
    iou: tuple[float | None, ...]
    mean_iou: float | None
    pixel_accuracy: float | None
    absent: tuple[int, ...]


def scores_of(matrix: Tensor, classes: Sequence[int]) -> Scores:
    """Scores of a matrix (K,K) over the given classes, all below K."""
    if not classes:
        return Scores((), (), None, None, ())
    rows = matrix.cpu().double()[list(classes)]
    labelled = rows.sum(dim=1)
    right = torch.stack([row[c] for row, c in zip(rows, classes, strict=True)])
    predicted = rows.sum(dim=0)[list(classes)]
    union = labelled + predicted - right
    iou = tuple(float(r / u) if n else None for r, u, n in zip(right, union, labelled, strict=True))
    present = [value for value in iou if value is not None]
    return Scores(
        classes=tuple(classes),
        iou=iou,
        mean_iou=sum(present) / len(present) if present else None,
        pixel_accuracy=float(right.sum() / labelled.sum()) if present else None,
        absent=tuple(c for c, value in zip(classes, iou, strict=True) if value is None),
    )
