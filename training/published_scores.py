"""Scores as the published MaxSquare and SNR print them (docs/uda.md, section MaxSquare).

A class that is predicted and never labelled has the IoU 0 here; that of `training.metrics` is absent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("accuracy", "IoU", "precision", "share of labels", "share of predictions")


@dataclass(frozen=True)
class PublishedScores:
    """Scores of a confusion matrix over a subset of its classes.

    Attributes:
        pixel_accuracy: over all classes.
        mean_accuracy, mean_iou, mean_precision: means over the classes of the subset that have a value.
        frequency_weighted_iou: sum of the subset's IoU times its labelled pixels, over all labelled pixels.
        per_class: (K,5) of `COLUMNS` for every class of the matrix; NaN where there is no value.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    mean_precision: float
    frequency_weighted_iou: float
    per_class: Tensor


def published_scores(matrix: Tensor, subset: Sequence[int] | None = None) -> PublishedScores:
    """Scores of a matrix (K,K), rows are labels, over some of its classes (default: all)."""
    counts = matrix.cpu().double()
    right, labelled, predicted, total = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0), counts.sum()
    iou = right / (labelled + predicted - right)
    columns = (right / labelled, iou, right / predicted, labelled / total, predicted / total)
    per_class = torch.stack(columns, dim=1)
    kept = per_class if subset is None else per_class[list(subset)]
    accuracy, mean_iou, precision = kept[:, :3].nanmean(dim=0).tolist()
    return PublishedScores(
        pixel_accuracy=float(right.sum() / total), mean_accuracy=accuracy, mean_iou=mean_iou, mean_precision=precision,
        frequency_weighted_iou=float((kept[:, 1] * kept[:, 3]).nansum()), per_class=per_class,
    )  # fmt: skip
