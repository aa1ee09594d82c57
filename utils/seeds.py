"""Seeds for the independent uses of one run's seed."""

import numpy as np

# The uses. A new one takes the next number; 0 to 2 are used where NumPy generators are seeded with lists.
SCALE_WEIGHTS, STEP, NET_WEIGHTS, MIXING = 3, 4, 5, 6


def seed_for(*parts: int) -> int:
    """One seed from the run's seed, the number of a use, and further numbers of that use."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
