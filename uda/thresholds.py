"""Confidence thresholds: the k-th largest confidence of each class or of all (docs/uda.md, section CBST).

The k-th largest of many float32 values is found exactly in two passes over the images, in memory that does not grow
with them. The bits of a float32, read so that they ascend with the value, are a number of 32 bits. The first pass
counts how often each upper half occurs in each class; that tells the half of the k-th largest value. The second pass
counts the lower halves of the values with this upper half. The counters are plain tensors, which several processes sum.

    upper = UpperCounts(classes)          # first pass: upper.add(P) for each image, all_reduce([upper.counters])
    plan = upper.plan(portion=..., policy=..., reference=...)
    lower = LowerCounts(plan)             # second pass: lower.add(P) for each image, all_reduce([lower.counters])
    thresholds = lower.thresholds()
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Policy = Literal["cb", "global"]

HALF = 1 << 16  # values of 16 bits
SIGN = 1 << 31
STRIDE = 4  # of a class's pixels in an image, every fourth counts


def ascending_keys(values: Tensor) -> Tensor:
    """Float32 values as int64 numbers in [0, 2^32) of the same order; the key of -0.0 is one below that of 0.0."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + SIGN)


def value_of_key(key: int) -> float:
    """The float32 value of a key of `ascending_keys`."""
    bits = key - SIGN if key >= SIGN else ~key
    return float(np.array(bits, dtype=np.int64).astype(np.int32).view(np.float32))


ZERO = int(ascending_keys(torch.zeros(1)))
FINITE = range(0x0080, 0xFF80)  # upper halves of the keys of finite values


def _sampled(confidences: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted class, key of its confidence, and 1 for each `stride`-th pixel of the class, all int64 (pixels,).

    Pixels come in an order in which those of a class follow each other, row by row; no size depends on their values.
    """
    largest, predicted = confidences.flatten(1).max(dim=0)
    classes, order = predicted.to(torch.uint8).sort(stable=True)  # in a third of the time of 64 bits
    classes = classes.long()
    counts = torch.zeros(len(confidences), dtype=torch.int64, device=classes.device)
    counts.scatter_add_(0, classes, torch.ones_like(classes))
    start = counts.cumsum(0) - counts
    position = torch.arange(len(classes), device=classes.device) - start[classes]
    return classes, ascending_keys(largest[order]), (position % stride == 0).long()


class _Counts:
    """Counters of confidences by class and half of the key.

    Attributes:
        counters: int64 (C,65536).
    """

    def __init__(self, classes: int, stride: int, device: torch.device | None) -> None:
        self.stride = stride
        self.counters = torch.zeros(classes, HALF, dtype=torch.int64, device=device)

    def _count(self, classes: Tensor, halves: Tensor, counted: Tensor) -> None:
        self.counters.view(-1).scatter_add_(0, classes * HALF + halves, counted)


class UpperCounts(_Counts):
    """First pass: how often each upper half of a key occurs among the confidences of each class.

    Args:
        classes: C.
        stride: of a class's pixels in an image, row by row, those numbered 0, `stride`, 2 `stride`, ... count.
        device: of the confidence maps.
    """

    def __init__(self, classes: int, stride: int = STRIDE, device: torch.device | None = None) -> None:
        super().__init__(classes, stride, device)

    def add(self, confidences: Tensor) -> None:
        """Count an image's confidences, float32 (C,H,W): of each pixel the largest, in the class that has it."""
        classes, keys, counted = _sampled(confidences, self.stride)
        self._count(classes, keys >> 16, counted)

    def plan(self, *, portion: float, policy: Policy, reference: bool = False) -> "Plan":
        """Which value of each class is its threshold, from the counters of all images of all processes.

        Args:
            portion: of the values that lie at or above the threshold. Outside the reference mode it is clamped to
                [0,1].
            policy: `cb` takes the portion of each class, `global` that of all values together.
            reference: as the published code counts, with its artificial zeros.

        Raises:
            ValueError: a confidence is not finite, or `portion` is outside [0,1] in the reference mode.
        """
        counters = self.counters.cpu().numpy()
        if counters[:, : FINITE.start].any() or counters[:, FINITE.stop :].any():
            raise ValueError("a confidence is infinite or not a number")
        if reference and not 0 <= portion <= 1:
            raise ValueError(f"portion is {portion}; it must lie in [0,1]")
        counts = counters.sum(axis=1)
        zeros = artificial_zeros(counts, policy) if reference else np.zeros_like(counts)
        padded = counters.copy()
        padded[:, ZERO >> 16] += zeros
        ranks = ranks_of(counts + zeros, portion=portion, policy=policy, reference=reference)
        found = [_locate(padded if policy == "global" else padded[c : c + 1], k) for c, k in enumerate(ranks)]
        return Plan(
            policy=policy,
            reference=reference,
            stride=self.stride,
            counts=counts,
            zeros=zeros,
            halves=torch.tensor([half for half, _ in found], device=self.counters.device),
            ranks=np.array([rank for _, rank in found]),
        )


def artificial_zeros(counts: np.ndarray, policy: Policy) -> np.ndarray:
    """Zeros that the published code adds to each class's values, int64 (C,).

    One to each class that occurs; with `global` one to every class, and another one, which is put to class 0.
    """
    if policy == "cb":
        return (counts > 0).astype(np.int64)
    zeros = np.ones_like(counts)
    zeros[0] += 1
    return zeros


def ranks_of(sizes: np.ndarray, *, portion: float, policy: Policy, reference: bool) -> list[int]:
    """Rank from 1 of each class's threshold among its values, or with `global` among all; 0 where it has none.

    Args:
        sizes: int64 (C,), number of values of each class.
    """
    portion = min(max(portion, 0.0), 1.0)
    if policy == "cb":
        return [math.floor(int(size) * portion) for size in sizes]
    total = int(sizes.sum())
    rank = math.floor(total * portion)
    # The published code takes the element before the first one of the descending list, which is the last one.
    return [total if rank == 0 and reference else rank] * len(sizes)


def _locate(counters: np.ndarray, rank: int) -> tuple[int, int]:
    """Half of the `rank`-th largest value of these classes, and its rank among the values with this half.

    Args:
        counters: int64 (classes,65536).
    """
    if rank == 0:
        return 0, 0
    at_or_above = counters.sum(axis=0)[::-1].cumsum()
    place = int(np.searchsorted(at_or_above, rank))
    above = int(at_or_above[place - 1]) if place else 0
    return HALF - 1 - place, rank - above


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the second pass looks for.

    Attributes:
        counts: int64 (C,), number of confidences of each class.
        zeros: int64 (C,), artificial zeros among its values.
        halves: int64 (C,), upper half of the key of each class's threshold.
        ranks: int64 (C,), rank from 1 of the threshold among the values with this half; 0 for a class without one.
    """

    policy: Policy
    reference: bool
    stride: int
    counts: np.ndarray
    zeros: np.ndarray
    halves: Tensor
    ranks: np.ndarray

    def sizes(self) -> np.ndarray:
        """Size of each class for the statistics of mining, int64 (C,).

        Outside the reference mode this is the number of its confidences. The published code counts its artificial
        zeros, and with `global` gives every class the number of all values.
        """
        values = self.counts + self.zeros
        if self.policy == "global" and self.reference:
            return np.full_like(values, values.sum())
        return values


class LowerCounts(_Counts):
    """Second pass: how often each lower half occurs among the confidences whose upper half the plan has chosen."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(len(plan.counts), plan.stride, plan.halves.device)
        self.plan = plan

    def add(self, confidences: Tensor) -> None:
        """Count an image's confidences, float32 (C,H,W), bit for bit those of the first pass."""
        classes, keys, counted = _sampled(confidences, self.stride)
        wanted = (keys >> 16) == self.plan.halves[classes]
        self._count(classes, keys & (HALF - 1), counted * wanted)

    def thresholds(self) -> Tensor:
        """The threshold of each class, float32 (C,) on the CPU, from the counters of all images of all processes.

        A class without a threshold gets infinity, so that no pixel reaches it: an absent class, one of whose pixels
        none is asked for, or one whose threshold would not be positive. In the reference mode such a class gets 0,
        which `select` takes for 1, or the threshold that is not positive.

        Raises:
            ValueError: the maps were not those of the first pass.
        """
        plan, counters = self.plan, self.counters.cpu().numpy().copy()
        chosen = plan.halves.cpu().numpy()
        counters[chosen == ZERO >> 16, ZERO & (HALF - 1)] += plan.zeros[chosen == ZERO >> 16]
        values = [self._value(counters, c) for c in range(len(counters))]
        if not plan.reference:
            values = [value if value > 0 else math.inf for value in values]
        return torch.tensor(values, dtype=torch.float32)

    def _value(self, counters: np.ndarray, c: int) -> float:
        """The value of the class's rank, 0 if it has none."""
        rank = int(self.plan.ranks[c])
        if rank == 0:
            return 0.0
        own = counters if self.plan.policy == "global" else counters[c : c + 1]
        if own.sum() < rank:
            raise ValueError("the confidence maps of the second pass are not those of the first")
        half, _ = _locate(own, rank)
        return value_of_key((int(self.plan.halves[c]) << 16) | half)
