"""Experience: groups of answers with their rewards, as a trainer's data, and what there is to tell of a step.

Shapes: T tokens of an episode, G answers of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.spec import RlSpec
from loray.spec.datums import Datum, ForwardBackward
from loray.train.rl.advantages import advantages, has_spread

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One sampled answer, or the several turns of an environment, with what it was worth.

    token_ids    (T,) all tokens that the model read and wrote
    is_answer    (T,) those that it wrote
    logprobs     (T,) of those, by the engine that sampled them; 0 elsewhere
    is_cut       an answer ended by its number of tokens
    text         the answers as a reward reads them
    """

    token_ids: NDArray[np.int32]
    is_answer: NDArray[np.bool_]
    logprobs: Floats
    reward: float
    is_cut: bool
    text: str

    @property
    def num_answer_tokens(self) -> int:
        return int(self.is_answer.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The answers to prompt `prompt`, all sampled by one version: the weights after `version` updates.

    num_failed  answers whose reward failed or took too long
    sample_s    from the group's beginning to its last reward
    """

    index: int
    prompt: int
    version: int
    digest: str
    episodes: tuple[Episode, ...]
    num_failed: int = 0
    sample_s: float = 0.0

    @property
    def rewards(self) -> list[float]:
        return [episode.reward for episode in self.episodes]


class Experience(NamedTuple):
    """What a step learns from. `episodes` and `versions` are in the order of the operation's data."""

    op: ForwardBackward
    episodes: tuple[Episode, ...]
    versions: tuple[int, ...]


def experience(model: str, groups: Sequence[Group], spec: RlSpec) -> Experience | None:
    """Make the operation that trains `model` on the groups; None where no group has different rewards.

    Weights are such that the sum of the losses by the divisor is the mean that the recipe names.
    """
    episodes: list[Episode] = []
    versions: list[int] = []
    gains: list[float] = []
    for group in groups:
        if not has_spread(group.rewards):
            continue
        for episode, gain in zip(group.episodes, advantages(spec.advantage, group.rewards), strict=True):
            if episode.num_answer_tokens and not (spec.mask_truncated and episode.is_cut):
                episodes.append(episode)
                versions.append(group.version)
                gains.append(float(gain))
    if not episodes:
        return None
    num_tokens = sum(episode.num_answer_tokens for episode in episodes)
    divisor = {
        "tokens": num_tokens,
        "sequences": len(episodes),
        "constant": spec.max_tokens * len(episodes),
        "none": 1,
    }[spec.divisor]
    datums = [
        _datum(episode, gain, 1 / episode.num_answer_tokens if spec.divisor == "sequences" else 1.0)
        for episode, gain in zip(episodes, gains, strict=True)
    ]
    op = ForwardBackward(model, tuple(datums), spec.token_loss(float(divisor)))
    return Experience(op, tuple(episodes), tuple(versions))


def _datum(episode: Episode, advantage: float, weight: float) -> Datum:
    """Every token is predicted from those before it; prompts and observations weigh nothing."""
    is_answer = episode.is_answer[1:]
    return Datum(
        token_ids=episode.token_ids[:-1],
        target_ids=episode.token_ids[1:].astype(np.int64),
        weights=is_answer.astype(np.float32) * np.float32(weight),
        logprobs=episode.logprobs[1:],
        advantages=is_answer.astype(np.float32) * np.float32(advantage),
    )


def with_values(found: Experience, scored: Sequence[Floats]) -> Experience:
    """Take what the engine scores, (T,) for each episode, as the values of the trainer's log-probabilities."""
    pairs = zip(found.op.datums, scored, strict=True)
    datums = tuple(replace(datum, values=values[1:]) for datum, values in pairs)
    return found._replace(op=replace(found.op, datums=datums))


class Mismatch(NamedTuple):
    """How far trainer and engine are apart on the same tokens of the same version: |lp − lq|."""

    mean: float
    max: float
    k3: float
    share: float  # of tokens further apart than 0.1


def mismatch(trained: Sequence[Floats], sampled: Sequence[Floats], answers: Sequence[NDArray[np.bool_]]) -> Mismatch:
    """Compare log-probabilities of answer tokens, in fp64. Each of the three has an array for each episode."""
    lp_N, lq_N = (
        np.concatenate([values[is_answer] for values, is_answer in zip(given, answers, strict=True)]).astype(np.float64)
        for given in (trained, sampled)
    )
    apart_N = np.abs(lp_N - lq_N)
    k3_N = np.expm1(lp_N - lq_N) - (lp_N - lq_N)
    return Mismatch(float(apart_N.mean()), float(apart_N.max()), float(k3_N.mean()), float((apart_N > 0.1).mean()))
