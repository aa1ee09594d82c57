"""Choosing some of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at even distances, the first one included; all of them where there are fewer.

    The item k of n chosen is that at position k * len(items) // n.
    """
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]
