"""What changes from round to round of self-training: portions, rate, source images (docs/uda.md, section CBST)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

SamplePolicy = Literal["cumulative", "random"]
DIGITS = 12  # the published code hands numbers from process to process with so many


def rounded(value: float) -> float:
    """The value to 12 significant digits: 0.15 + 5 * 0.05 is 0.4 then, and floor(n * 0.4) has the expected value."""
    return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Portion:
    """A portion that grows from round to round.

    Attributes:
        first: in round 0.
        step: added after each round.
        largest: where it ends.
    """

    first: float
    step: float
    largest: float

    def of_round(self, number: int, reference: bool = False) -> float:
        """The portion in round `number`, from 0, to 12 digits.

        In the reference mode a step is added wherever the unrounded sum is below the maximum, which it may then exceed
        by up to a step: 0.15, 0.2, ... ends at 0.55 for a maximum of 0.5.
        """
        if not reference:
            return rounded(min(self.first + number * self.step, self.largest))
        value = self.first
        for _ in range(number):
            if value < self.largest:
                value += self.step
        return rounded(value)


def rate_of_round(base_rate: float, number: int) -> float:
    """Learning rate in round `number`, from 0: divided by the square root of 2 after each round."""
    return base_rate * 2.0 ** (-number / 2)


def last_epoch_of_round(epochs_per_round: int, number: int) -> int:
    """Epochs trained in all when round `number`, from 0, is over."""
    return epochs_per_round * (number + 1)


def source_seed(policy: SamplePolicy, seed: int, number: int) -> int:
    """Seed of the choice of source images in round `number`, from 0.

    Args:
        policy: `cumulative` takes `seed` in every round, so that a larger subset contains the smaller ones; `random`
            takes the number of the round.
    """
    return seed if policy == "cumulative" else number


def source_count(images: int, portion: float) -> int:
    """Number of source images in a round: the portion of all, rounded down."""
    return int(images * portion)


def source_subset(images: int, count: int, seed: int) -> np.ndarray:
    """Indices of `count` of `images` source images in random order, int64 (count,).

    They begin a permutation of all images by numpy's MT19937, so that with one seed smaller subsets begin larger ones.

    Raises:
        ValueError: `count` is larger than `images`.
    """
    return np.random.RandomState(seed).choice(images, count, replace=False)
