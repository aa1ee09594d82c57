"""Arithmetic of image sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence


def level_size(size: Sequence[int], steps_down: int, scale_factor: float) -> tuple[int, ...]:
    """ceil(f^steps * size) of each side; sides in pixels, in whatever order they come."""
    return tuple(math.ceil(math.pow(scale_factor, steps_down) * side) for side in size)
