"""Arithmetic of image sizes, and choosing some of many."""

import math
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def level_size(size: Sequence[int], steps_down: int, scale_factor: float) -> tuple[int, ...]:
    """ceil(f^steps * size) of each side; sides in pixels, in whatever order they come."""
    return tuple(math.ceil(math.pow(scale_factor, steps_down) * side) for side in size)


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at even distances, the first one included; all of them where there are fewer.

    The item k of n chosen is that at position k * len(items) // n.
    """
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]
