"""Rewards that are built in, those of a recipe's own, and environments."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from loray.errors import DataError, SpecError
from loray.spec import RewardSpec, RlSpec
from loray.train.rl.rewards import check_rows, environments_of, finite, reward_of

SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("spec", "answer", "expected"),
    [
        ({"builtin": "exact", "field": "answer"}, " 83\n", 1),
        ({"builtin": "exact", "field": "answer"}, "83.", 0),
        ({"builtin": "contains", "field": "answer"}, "It is 83, I think", 1),
        ({"builtin": "contains", "field": "answer"}, "It is 47", 0),
        ({"builtin": "number", "field": "answer"}, "83", 1),
        ({"builtin": "number", "field": "answer"}, "The larger one is 83. ", 1),
        ({"builtin": "number", "field": "answer"}, "83.0", 1),
        ({"builtin": "number", "field": "answer"}, "83 is larger", 0),
        ({"builtin": "number", "field": "answer"}, "47 or 83", 0),
        ({"builtin": "number", "field": "answer"}, "none", 0),
        ({"builtin": "number", "field": "large"}, "1,234.5", 1),
        ({"builtin": "regex", "pattern": r"^\d+$"}, "83", 1),
        ({"builtin": "regex", "pattern": r"^\d+$"}, "83!", 0),
        ({"builtin": "regex", "pattern": r"#### (\d+)", "field": "answer"}, "#### 47, no: #### 83", 1),
        ({"builtin": "regex", "pattern": r"#### (\d+)", "field": "answer"}, "#### 83, no: #### 47", 0),
        ({"builtin": "json_schema", "json_schema": SCHEMA}, '{"city": "Bonn"}', 1),
        ({"builtin": "json_schema", "json_schema": SCHEMA}, '{"city": 3}', 0),
        ({"builtin": "json_schema", "json_schema": SCHEMA}, "Bonn", 0),
        ({"builtin": "json_schema", "field": "schema"}, "[1]", 1),
        ({"builtin": "json_schema", "field": "schema"}, "{}", 0),
    ],
)
def test_built_in(spec: dict[str, Any], answer: str, expected: int) -> None:
    row = {"answer": 83, "large": "1234.5", "schema": '{"type": "array"}'}
    assert reward_of(RewardSpec(**spec))(row, answer) == expected


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({}, "give builtin, or function"),
        ({"builtin": "number"}, "name it, as field: answer"),
        ({"builtin": "regex"}, "regex has a pattern"),
        ({"builtin": "json_schema"}, "needs the schema"),
        ({"builtin": "exact", "field": "a", "json_schema": {}}, "is for builtin: json_schema"),
        ({"function": "rewards.mine"}, "pattern"),
        ({"function": "rewards:mine", "field": "a"}, "leave field out"),
    ],
)
def test_what_a_reward_needs(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RewardSpec(**spec)


def test_patterns_and_schemas_are_checked_at_once() -> None:
    with pytest.raises(SpecError, match="no regular expression"):
        reward_of(RewardSpec(builtin="regex", pattern="("))
    with pytest.raises(SpecError, match="has no group"):
        reward_of(RewardSpec(builtin="regex", pattern="a", field="answer"))
    with pytest.raises(SpecError, match="the schema"):
        reward_of(RewardSpec(builtin="json_schema", json_schema={"type": "nothing"}))


def test_rows_without_the_field_are_refused() -> None:
    spec = RlSpec(reward=RewardSpec(builtin="number", field="answer"))
    check_rows(spec, [{"answer": 0}])
    with pytest.raises(SpecError, match="which row 2 has not: it has prompt, solution"):
        check_rows(spec, [{"answer": 1}, {"prompt": "", "solution": 2}])


def test_rewards_are_finite_numbers() -> None:
    assert finite(True) == 1.0
    for wrong in (math.nan, math.inf, "1", None):
        with pytest.raises(DataError, match="a finite number"):
            finite(wrong)


OWN = """
from loray.train.rl.rewards import Turn


async def length(row, answer):
    return len(answer) / row["most"]


class Counting:
    async def start(self, row):
        self.left = row["turns"]
        return "Count."

    async def step(self, answer):
        self.left -= 1
        return Turn(float(answer), done=self.left == 0, observation="Go on.")
"""


def test_a_recipes_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))

    async def play() -> None:
        make = environments_of(RlSpec(reward=RewardSpec(function="own_rewards:length")))
        rewarded = make()
        await rewarded.start({"most": 4})
        assert await rewarded.step("ab") == (0.5, True, "")
        counting = environments_of(RlSpec(environment="own_rewards:Counting"))()
        assert await counting.start({"turns": 2}) == "Count."
        assert await counting.step("1") == (1.0, False, "Go on.")
        assert (await counting.step("2")).done

    asyncio.run(play())
    with pytest.raises(SpecError, match="own_rewards:missing cannot be imported"):
        environments_of(RlSpec(environment="own_rewards:missing"))
    with pytest.raises(SpecError, match="no_such_module:f cannot be imported"):
        environments_of(RlSpec(reward=RewardSpec(function="no_such_module:f")))
