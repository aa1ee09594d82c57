"""Statistics of dense predictions: the confusion matrix, scores read off it, and scores that need no labels.

Everything is counted on the device, and memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE_BINS = 20


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count label-prediction pairs in one pass on the tensors' device, without reading anything back.

    Rows are labels, columns are predictions.

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


class PredictionStatistics:
    """What a net's predictions tell without labels, accumulated over pixels on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.pixels = 0
        self.probability_sum = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.entropy_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.confidence_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.confidence_histogram = torch.zeros(CONFIDENCE_BINS, dtype=torch.float64, device=device)

    def add(self, probability: Tensor) -> None:
        """Count an image's probabilities (C,H,W)."""
        confidence = probability.amax(dim=0)
        self.pixels += confidence.numel()
        self.probability_sum += probability.sum(dim=(1, 2))
        self.entropy_sum += _entropy(probability, dim=0).sum()
        self.confidence_sum += confidence.sum()
        # A net that diverged predicts NaN: that shows in the means, the bins only have to stay bins.
        bins = (confidence.nan_to_num(0.0) * CONFIDENCE_BINS).long().clamp_(max=CONFIDENCE_BINS - 1)
        self.confidence_histogram += count_values(bins, CONFIDENCE_BINS)

    def all_reduce(self, all_reduce: Callable[[Sequence[Tensor]], None]) -> None:
        """Make this the statistics of several processes' images; `all_reduce` sums tensors in place over them."""
        pixels = torch.tensor(float(self.pixels), dtype=torch.float64, device=self.entropy_sum.device)
        sums = (self.probability_sum, self.entropy_sum, self.confidence_sum, self.confidence_histogram)
        all_reduce([pixels, *sums])
        self.pixels = int(pixels)

    def mean_confidence(self) -> float:
        """Mean probability of the predicted class."""
        return float(self.confidence_sum) / self.pixels

    def mutual_information(self) -> float:
        """Entropy of the mean prediction minus mean entropy of the predictions, as a share of the largest possible.

        Between 0 and 1. High where single pixels are decided (confident) and all classes are used (balanced): a net
        that calls everything road is confident, but has no class balance and gets 0.
        """
        mean = self.probability_sum / self.pixels
        information = _entropy(mean, dim=0) - self.entropy_sum / self.pixels
        return float(information) / torch.log(torch.tensor(float(len(mean)))).item()


def _entropy(probability: Tensor, dim: int) -> Tensor:
    return -torch.special.xlogy(probability, probability).sum(dim=dim)
