"""Advantages of a group's answers."""

from __future__ import annotations

import numpy as np
import pytest

from loray.train.rl.advantages import Advantage, advantages, has_spread

REWARDS = (1.0, 0.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", REWARDS),
        ("center", (0.625, -0.375, 0.125, -0.375)),
        ("rloo", (1 - 0.5 / 3, 0 - 1.5 / 3, 0.5 - 1 / 3, 0 - 1.5 / 3)),  # each less the mean of the others
        ("std", tuple(np.array([0.625, -0.375, 0.125, -0.375]) / (np.std(REWARDS, ddof=1) + 1e-6))),
    ],
)
def test_advantages(kind: Advantage, expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(advantages(kind, REWARDS), expected, rtol=1e-14)


def test_a_group_teaches_where_rewards_differ() -> None:
    assert has_spread(REWARDS)
    assert not has_spread((1.0, 1.0))
    assert not has_spread((1.0,))
    assert not has_spread(())
