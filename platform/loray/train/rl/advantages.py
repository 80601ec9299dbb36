"""Advantages: how much better an answer is than the other answers to its prompt.

Shapes: G answers of a group, which have one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Advantage = Literal["center", "std", "rloo", "none"]

_TINY = 1e-6  # beside a deviation, as GRPO is implemented


def advantages(kind: Advantage, rewards: Sequence[float]) -> NDArray[np.float64]:
    """Compute the advantages (G,) of a group's answers from their rewards.

    center  r − r̄ (Dr. GRPO: Liu et al., 2025)
    std     (r − r̄)/(σ + 1e-6), σ with n − 1 (GRPO: Shao et al., 2024)
    rloo    r less the mean of the others, n/(n − 1)·(r − r̄) (Ahmadian et al., 2024)
    none    r
    """
    rewards_G = np.asarray(rewards, dtype=np.float64)
    centered_G = rewards_G - rewards_G.mean()
    match kind:
        case "center":
            return centered_G
        case "std":
            return centered_G / (rewards_G.std(ddof=1) + _TINY)
        case "rloo":
            return centered_G * (len(rewards_G) / (len(rewards_G) - 1))
        case "none":
            return rewards_G


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: its answers have different rewards."""
    return len(rewards) > 1 and max(rewards) > min(rewards)
