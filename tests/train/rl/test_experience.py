"""Groups as a trainer's data: what is trained, with which weights, and how far trainer and engine are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loray.spec import RewardSpec, RlSpec
from loray.train.rl.experience import Episode, Group, experience, mismatch, with_values

REWARD = RewardSpec(builtin="number", field="answer")


def episode(reward: float, num_answer: int, *, is_cut: bool = False) -> Episode:
    ids = np.arange(3 + num_answer, dtype=np.int32)
    is_answer = ids >= 3
    return Episode(ids, is_answer, np.where(is_answer, -0.5 * ids, 0).astype(np.float32), reward, is_cut, "")


def group(*episodes: Episode, index: int = 0, version: int = 0) -> Group:
    return Group(index, index, version, "d", episodes)


GROUPS = (
    group(episode(1.0, 2), episode(0.0, 4)),
    group(episode(1.0, 2), episode(1.0, 3), index=1),  # without spread
    group(episode(0.0, 1), episode(1.0, 3, is_cut=True), index=2, version=1),
)


def spec(**fields: Any) -> RlSpec:
    return RlSpec(reward=REWARD, max_tokens=8, **fields)


def test_tokens_after_the_prompt_are_learned_from_what_is_before_them() -> None:
    found = experience("m", GROUPS, spec())
    assert found is not None
    assert [len(d) for d in found.op.datums] == [4, 6, 3, 5]
    first = found.op.datums[0]
    assert first.weights is not None
    assert first.advantages is not None
    assert first.logprobs is not None
    assert first.token_ids.tolist() == [0, 1, 2, 3]
    assert first.target_ids.tolist() == [1, 2, 3, 4]
    assert first.weights.tolist() == [0, 0, 1, 1]
    assert first.advantages.tolist() == [0, 0, 0.5, 0.5]
    assert first.logprobs.tolist() == [0, 0, -1.5, -2.0]
    assert found.versions == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("divisor", "expected", "weights"),
    [
        ("tokens", 10, [1] * 4),
        ("sequences", 4, [1 / 2, 1 / 4, 1, 1 / 3]),
        ("constant", 32, [1] * 4),
        ("none", 1, [1] * 4),
    ],
)
def test_divisors(divisor: str, expected: float, weights: list[float]) -> None:
    found = experience("m", GROUPS, spec(divisor=divisor))
    assert found is not None
    assert found.op.loss.divisor == expected
    assert [float(np.max(d.weights)) for d in found.op.datums] == pytest.approx(weights)


def test_cut_answers_may_be_masked_and_still_count_in_their_group() -> None:
    found = experience("m", GROUPS, spec(mask_truncated=True))
    assert found is not None
    assert len(found.op.datums) == 3
    assert found.op.loss.divisor == 7
    last = found.op.datums[-1].advantages
    assert last is not None
    assert last[-1] == -0.5


def test_nothing_is_learned_without_spread() -> None:
    assert experience("m", GROUPS[1:2], spec()) is None


def test_mismatch_is_of_answer_tokens() -> None:
    answers = [e.is_answer for e in GROUPS[0].episodes]
    sampled = [e.logprobs for e in GROUPS[0].episodes]
    trained = [values + np.float32(7) * ~is_answer for values, is_answer in zip(sampled, answers, strict=True)]
    assert mismatch(trained, sampled, answers) == (0, 0, 0, 0)
    trained[1] = trained[1].copy()
    trained[1][-1] += np.float32(0.5)
    found = mismatch(trained, sampled, answers)
    assert found == pytest.approx((0.5 / 6, 0.5, (math.exp(0.5) - 1.5) / 6, 1 / 6))


def test_values_of_the_engine_stand_beside_the_sampled_ones() -> None:
    found = experience("m", GROUPS[:1], spec())
    assert found is not None
    scored = [e.logprobs + np.float32(0.25) for e in found.episodes]
    datum = with_values(found, scored).op.datums[0]
    assert datum.values is not None
    assert datum.logprobs is not None
    assert (datum.values - datum.logprobs).tolist() == [0.25] * 4
