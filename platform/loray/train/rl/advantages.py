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
    if kind == "none":
        return rewards_G
    scale = {"center": 1.0, "std": 1 / (rewards_G.std(ddof=1) + _TINY), "rloo": len(rewards) / (len(rewards) - 1)}
    advantages_G: NDArray[np.float64] = (rewards_G - rewards_G.mean()) * scale[kind]
    return advantages_G


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: its answers have different rewards."""
    return len(rewards) > 1 and max(rewards) > min(rewards)
