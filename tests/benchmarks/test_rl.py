"""The benchmark of reinforcement learning: its pairs, its recipe, and what it says of runs."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality import rl
from loray.recipes.load import load_recipe
from loray.spec import RlSpec


def test_no_pair_is_held_out_and_trained() -> None:
    train, held_out = rl.pairs(2, 400, 200)
    assert (len(train), len(held_out)) == (400, 200)
    assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in held_out}
    assert all(10 <= number < 100 for pair in train for number in pair)
    row = rl.Pair(47, 83).row([rl.Pair(31, 12)])
    assert [(message["role"], message["content"]) for message in row["messages"]] == [
        ("user", "Which number is larger, 31 or 12? Answer with the number only."),
        ("assistant", "31"),
        ("user", "Which number is larger, 47 or 83? Answer with the number only."),
    ]
    assert row["answer"] == 83


@pytest.mark.parametrize("is_control", [False, True])
def test_recipes_are_valid(is_control: bool) -> None:
    args = rl._parser().parse_args(["--steps", "3"])
    spec = load_recipe(json.dumps(rl.recipe(args, 1, is_control=is_control))).spec
    assert isinstance(spec.objective, RlSpec)
    assert (spec.max_steps, spec.objective.runs_code) == (3, "coin:reward" if is_control else None)


def test_what_is_said_of_runs() -> None:
    events = [
        {
            "event": "rollout",
            "metrics": {
                "reward_mean": reward,
                "groups_kept": 3,
                "groups_dropped": 1,
                "sample_s": 1.0,
                "train_s": 2.0,
                "publish_s": 0.5,
                "mismatch_mean": 0.01,
                "mismatch_max": 0.1,
            },
        }
        for reward in (0.25, 0.5)
    ]
    made = rl.row(rl.Run("larger-0", "larger-0@1", events), 0.4, 0.7)
    assert len(made) == len(rl.COLUMNS)
    assert made[:6] == ["larger-0", 40.0, 70.0, pytest.approx(30.0), 0.25, 0.5]
    assert rl.verdicts({"larger-0": 30.0, "larger-1": 12.0, "larger-coin": -8.0}) == [
        "mean gain +21.0 points, at least +20: yes",
        "least gain of a seed +12.0, at least +10: yes",
        "control -8.0, within ± 7: NO",
    ]
    assert rl.verdicts({"larger-0": 30.0, "larger-coin-0": -8.0, "larger-coin-1": 3.0})[2:] == [
        "control -8.0, within ± 7: NO",
        "control +3.0, within ± 7: yes",
        "mean of the controls -2.5, within ± 7: yes",
    ]
