"""From class probabilities and thresholds to pseudo-labels (docs/uda.md, section CBST)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_handlers.classes import IGNORE


def with_prior(confidences: Tensor, prior: Tensor | None) -> Tensor:
    """Class probabilities float32 (C,H,W) times the spatial prior of the same shape, not normalised; None: unchanged.

    Raises:
        ValueError: another shape.
    """
    if prior is None:
        return confidences
    if prior.shape != confidences.shape:
        raise ValueError(f"the prior is {tuple(prior.shape)}, the confidences are {tuple(confidences.shape)}")
    return prior.to(confidences) * confidences


def predicted(confidences: Tensor) -> Tensor:
    """The class of the largest value of (C,H,W), the lowest of equal ones; uint8 (H,W)."""
    return confidences.max(dim=0).indices.to(torch.uint8)


@dataclass(frozen=True)
class Selection:
    """Pseudo-labels of an image.

    Attributes:
        labels: trainIds uint8 (H,W), 255 where no class reaches its threshold.
        reweighted: trainIds uint8 (H,W), the class with the largest ratio of confidence and threshold everywhere.
    """

    labels: Tensor
    reweighted: Tensor


def select(confidences: Tensor, thresholds: Tensor) -> Selection:
    """Label the pixels of which a class reaches its threshold.

    The label is the class whose confidence is the largest multiple of its threshold, the lowest of equal ones. It need
    not be that of the largest confidence. The division is float32, in which a ratio of 1 or more is exactly a
    confidence at or above the threshold.

    Args:
        confidences: float32 (C,H,W).
        thresholds: float32 (C,). Infinity lets nothing through. 0 stands for a class without a threshold in the
            reference mode and becomes 1.
    """
    divisors = torch.where(thresholds == 0, 1.0, thresholds).to(confidences)
    ratio, label = (confidences / divisors[:, None, None]).max(dim=0)
    reweighted = label.to(torch.uint8)
    return Selection(labels=torch.where(ratio >= 1, reweighted, IGNORE), reweighted=reweighted)
