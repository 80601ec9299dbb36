"""What a step's random numbers depend on."""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from these arguments alone, so that a resumed run draws the same numbers."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
