"""Seeds for the independent uses of one run's seed."""

from __future__ import annotations

import numpy as np


def seed_for(*parts: int) -> int:
    """One seed from the run's seed, the number of a use, and further numbers of that use.

    Uses: 3 weights of a scale's networks, 4 dropout of a step, 5 weights of a segmentation net. (Streams and
    interpolation factors seed NumPy generators with other lists.)
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
