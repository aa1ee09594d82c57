"""Metrics of dense predictions: confusion matrix, IoU and accuracy, and statistics that need no labels.

Everything is counted on the device, and memory does not grow with the number of images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE_BINS = 20


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count label-prediction pairs; rows are labels, columns are predictions. Nothing is read back to the host.

    Args:
        prediction: integers in [0, classes), any shape.
        label: integers of the same shape; values of `classes` or more are not counted.

    Returns:
        int64 (classes, classes).
    """
    counted = label < classes
    # The last bin takes the pixels that do not count, so no pixel has to be selected.
    pair = torch.where(counted, label.long() * classes + prediction.long(), classes * classes)
    return _bincount(pair, classes * classes + 1)[:-1].reshape(classes, classes)


def _bincount(values: Tensor, bins: int) -> Tensor:
    """As `torch.bincount`, which reads the largest value back to the host first."""
    flat = values.flatten()
    counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix over a subset of classes (docs/method.md, section 4).

    Pixels labelled with a class that is not counted are ignored. Predictions of such a class count as errors of the
    labelled class. A class without a labelled pixel is absent: it has no IoU.

    Attributes:
        iou: intersection over union of each of `classes`, None where absent.
        mean_iou: mean over the classes present; None if there is none.
        mean_iou_with_absent: mean in which the classes of `absent` that were predicted count as 0.
        pixel_accuracy: fraction of counted pixels predicted right; None if no pixel was counted.
    """

    classes: tuple[int, ...]
    iou: tuple[float | None, ...]
    mean_iou: float | None
    mean_iou_with_absent: float | None
    pixel_accuracy: float | None
    absent: tuple[int, ...]


def scores_of(matrix: Tensor, classes: Sequence[int], counted: Sequence[int] = ()) -> Scores:
    """Scores of a matrix (K,K) over the given classes, all below K.

    Args:
        counted: the classes whose labelled pixels count; `classes` and maybe others. Default: `classes`.
    """
    rows = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    kept = list(counted or classes)
    rows[kept] = matrix.cpu().double()[kept]
    labelled, right = rows.sum(dim=1), rows.diagonal()
    union = labelled + rows.sum(dim=0) - right
    iou = tuple(float(right[c] / union[c]) if labelled[c] else None for c in classes)
    present = [value for value in iou if value is not None]
    predicted = sum(1 for c, value in zip(classes, iou, strict=True) if value is not None or union[c])
    return Scores(
        classes=tuple(classes),
        iou=iou,
        mean_iou=sum(present) / len(present) if present else None,
        mean_iou_with_absent=sum(present) / predicted if present else None,
        pixel_accuracy=float(right[kept].sum() / labelled.sum()) if labelled.sum() else None,
        absent=tuple(c for c, value in zip(classes, iou, strict=True) if value is None),
    )


@dataclass(frozen=True)
class AllClassScores:
    """Scores in which an absent class counts as 0, as the published self-training has them (docs/uda.md, section CBST).

    Attributes:
        iou, accuracy: of each class, 0 for a class without a labelled pixel.
        mean_iou, mean_accuracy: over all classes, absent ones included.
        pixel_accuracy: fraction of counted pixels predicted right, 0 if no pixel was counted.
    """

    iou: tuple[float, ...]
    accuracy: tuple[float, ...]
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float

    def mean_iou_over(self, classes: Sequence[int]) -> float:
        """Mean over some classes of their IoU among all: predictions of the other classes still count as errors."""
        return sum(self.iou[c] for c in classes) / len(classes)


def scores_of_all(matrix: Tensor) -> AllClassScores:
    """Scores of a matrix (K,K) over all K classes; of the sum of matrices so far, the running value of a log."""
    counts = matrix.cpu().double()
    right, labelled = counts.diagonal(), counts.sum(dim=1).clamp(min=1)
    iou = right / (labelled + counts.sum(dim=0) - right)
    accuracy = right / labelled
    return AllClassScores(
        iou=tuple(iou.tolist()),
        accuracy=tuple(accuracy.tolist()),
        mean_iou=float(iou.mean()),
        mean_accuracy=float(accuracy.mean()),
        pixel_accuracy=float(right.sum() / counts.sum().clamp(min=1)),
    )


def merged(matrix: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """A matrix (K,K) with the rows and columns of each group of classes added up, (G,G); other classes are dropped."""
    member = torch.zeros(len(groups), len(matrix), dtype=matrix.dtype)
    for row, classes in zip(member, groups, strict=True):
        row[[c for c in classes if c < len(matrix)]] = 1
    return member @ matrix.cpu() @ member.T


class PredictionStatistics:
    """Sums over the pixels of a net's predictions that need no labels."""

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
        self.entropy_sum += _entropy(probability).sum()
        self.confidence_sum += confidence.sum()
        # A net that diverged predicts NaN, which the means show.
        bins = (confidence.nan_to_num(0.0) * CONFIDENCE_BINS).long().clamp_(max=CONFIDENCE_BINS - 1)
        self.confidence_histogram += _bincount(bins, CONFIDENCE_BINS)

    def all_reduce(self, all_reduce: Callable[[Sequence[Tensor]], None]) -> None:
        """Sum over the images of all processes; `all_reduce` sums tensors in place over them."""
        pixels = self.entropy_sum.new_tensor(self.pixels)
        all_reduce([
            pixels, self.probability_sum, self.entropy_sum, self.confidence_sum, self.confidence_histogram,
        ])  # fmt: skip
        self.pixels = int(pixels)

    def mean_confidence(self) -> float:
        """Mean probability of the predicted class."""
        return float(self.confidence_sum) / self.pixels

    def mutual_information(self) -> float:
        """Entropy of the mean prediction minus mean entropy of the predictions, divided by log(C): 0 to 1.

        It is high where predictions are confident and all classes are used: a net that predicts road everywhere is
        confident, but gets 0.
        """
        mean = self.probability_sum / self.pixels
        information = _entropy(mean) - self.entropy_sum / self.pixels
        return float(information) / math.log(len(mean))


def _entropy(probability: Tensor) -> Tensor:
    """Over the first dimension."""
    return -torch.special.xlogy(probability, probability).sum(dim=0)
