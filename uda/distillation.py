"""Distillation of two teachers into one student (docs/uda.md, section DDB): pure functions of tensors.

A teacher's prediction is its logits (B,C,h,w) and, where it is rectified, how near each pixel is to the prototype of
each class, (B,C,h,w) in [0,1], else None.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import at_least_float32

Prediction = tuple[Tensor, Tensor | None]


def weighted_logits(logits: Tensor, near: Tensor | None, reference: bool) -> Tensor:
    """Logits whose softmax is in proportion to probability times nearness; as published they are multiplied."""
    logits = at_least_float32(logits)
    if near is None:
        return logits
    return near * logits if reference else logits + near.log()


def ensemble(teachers: Sequence[Prediction], on_logits: bool, reference: bool) -> Tensor:
    """Mean probabilities (B,C,h,w) of rectified teachers.

    Args:
        on_logits: rectify the logits; otherwise the probabilities, which then do not sum to 1: a teacher whose feature
            is near another class than it predicts counts for less.
    """
    found = []
    for logits, near in teachers:
        if near is None or on_logits:
            found.append(weighted_logits(logits, near, reference).softmax(dim=1))
        else:
            found.append(near * at_least_float32(logits).softmax(dim=1))
    return torch.stack(found).mean(dim=0)


def hard_labels(probability: Tensor, reference: bool) -> tuple[Tensor, Tensor]:
    """The most probable classes (B,h,w) of (B,C,h,w), and their shares; as published, values that do not sum to 1."""
    value, label = probability.max(dim=1)
    return label, value if reference else value / probability.sum(dim=1)


def soft_loss(student: Tensor, teachers: Sequence[Prediction], temperature: float, reference: bool) -> Tensor:
    """Mean over the pixels of T^2 KL(teachers || student), a scalar.

    Args:
        student: logits (B,C,h,w).
        temperature: T, that the student's and the teachers' mean logits are divided by.
    """
    wanted = torch.stack([weighted_logits(*teacher, reference) for teacher in teachers]).mean(dim=0) / temperature
    found = (at_least_float32(student) / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(found, wanted.softmax(dim=1), reduction="none").sum(dim=1).mean()
