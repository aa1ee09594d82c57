"""Seeds for the independent uses of one run's seed."""

from __future__ import annotations

import numpy as np


def seed_for(*parts: int) -> int:
    """One seed from several numbers, so that the seeds of different uses never coincide."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
