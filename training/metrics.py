"""Metrics of dense predictions: confusion matrix, IoU and accuracy, and statistics that need no labels.

Everything is counted on the device, and memory does not grow with the number of images.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_handlers.choices import AbsentClasses

CONFIDENCE_BINS = 20
# Of `Scores`: values of a class, and means.
COLUMNS = ("iou", "accuracy", "precision", "label_share", "predicted_share")
MEANS = ("miou", "mean_accuracy", "mean_precision", "frequency_weighted_iou", "pixel_accuracy")


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
    """Scores of a confusion matrix over some of its classes (docs/method.md, section 4): fractions, or None.

    Pixels labelled with a class that is not counted are ignored. Predictions of such a class count as errors of the
    labelled class.

    Attributes:
        by_class: for each of `COLUMNS` the values of `classes`: the pixels predicted right, over those labelled or
            predicted (IoU), those labelled (accuracy), those predicted (precision); its labelled and its predicted
            pixels over all counted ones.
        means: for each of `MEANS`: of IoU, accuracy and precision over those of `classes` that have one; of IoU
            weighted by `label_share`; the fraction of counted pixels predicted right.
        mean_iou_by_convention: the mean IoU for each of `ABSENT_CLASSES`.
        absent: those of `classes` without a labelled pixel.
    """

    classes: tuple[int, ...]
    by_class: Mapping[str, tuple[float | None, ...]]
    means: Mapping[str, float | None]
    mean_iou_by_convention: Mapping[str, float | None]
    absent: tuple[int, ...]


def scores_of(
    matrix: Tensor, classes: Sequence[int], counted: Sequence[int] = (), absent: AbsentClasses = "left_out"
) -> Scores:
    """Scores of a matrix (K,K) over the given classes, all below K.

    Args:
        counted: the classes whose labelled pixels count; `classes` and maybe others. Default: `classes`.
        absent: the IoU and precision of a class without a labelled pixel: none (`left_out`), 0 where it was predicted
            (`zero_if_predicted`), or 0 (`zero`, also its accuracy).
    """
    kept, wanted = list(counted or classes), list(classes)
    rows = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    rows[kept] = matrix.cpu().double()[kept]
    right, labelled, predicted, total = rows.diagonal(), rows.sum(dim=1), rows.sum(dim=0), rows.sum()
    values = torch.stack((right / (labelled + predicted - right), right / labelled, right / predicted))[:, wanted]
    by_convention = {
        "left_out": values.masked_fill(labelled[wanted] == 0, math.nan),
        "zero_if_predicted": values,
        "zero": values.nan_to_num(0.0),
    }
    averages = {name: found.nanmean(dim=1) for name, found in by_convention.items()}
    shares = torch.stack((labelled, predicted))[:, wanted] / total
    weighted = (by_convention["zero"][0] * shares[0]).sum()
    return Scores(
        classes=tuple(wanted),
        by_class=dict(zip(COLUMNS, map(_plain, (*by_convention[absent], *shares)), strict=True)),
        means=dict(zip(MEANS, _plain((*averages[absent], weighted, right.sum() / total)), strict=True)),
        mean_iou_by_convention=dict(zip(averages, _plain(found[0] for found in averages.values()), strict=True)),
        absent=tuple(c for c in wanted if not labelled[c]),
    )


def _plain(values: Iterable[Tensor]) -> tuple[float | None, ...]:
    """Scalars as numbers, NaN as None."""
    return tuple(None if value.isnan() else float(value) for value in values)


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
