"""Random orders that are the same on every rank and after a resume."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_orders(num_tasks: int, seed: int, step: int) -> NDArray[np.intp]:
    """`[n, n]`, a random order of all tasks in each row, from a generator seeded by (seed, step) alone.

    Each of two tasks has one other: there is nothing to draw.
    """
    if num_tasks <= 2:
        return np.tile(np.arange(num_tasks), (num_tasks, 1))
    generator = np.random.default_rng((seed, step))
    return generator.permuted(np.tile(np.arange(num_tasks), (num_tasks, 1)), axis=1)
