"""Rewards that are built in, those of a recipe's own, and environments."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import DataError, SpecError
from loray.spec import RewardSpec, RlSpec
from loray.train.rl.rewards import environments_of, finite, reward_of

SAME = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}
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
        ({}, "give builtin, or grader, or function"),
        ({"builtin": "exact", "field": "a", "grader": SAME}, "give builtin, or grader, or function"),
        ({"grader": SAME, "field": "a"}, "leave field out"),
        ({"grader": SAME | {"operation": None}}, "string_check has an operation"),
        ({"grader": SAME | {"evaluation_metric": "gleu"}}, "string_check has none"),
        ({"grader": SAME | {"type": "python"}}, "type 'python' is not supported: take string_check or text_similarity"),
        ({"grader": SAME | {"type": "text_similarity"}}, "text_similarity has none"),
        (
            {"grader": SAME | {"evaluation_metric": "bleu"}},
            "'bleu' is not supported: take fuzzy_match or gleu or rouge_1",
        ),
        ({"grader": SAME | {"reference": "{{ item.answer.city }}"}}, "'{{ item.answer.city }}' is not supported"),
        ({"grader": SAME | {"input": "{{sample.output_json.city}}"}}, "a template has {{item.FIELD}}"),
        ({"grader": SAME | {"input": "{{item.answer"}}, "'{{item.answer' is not supported"),
        ({"grader": SAME | {"input": "{% if item.answer %}"}}, "is not supported"),
        ({"builtin": "number"}, "name it, as field: answer"),
        ({"builtin": "regex"}, "regex has a pattern"),
        ({"builtin": "json_schema"}, "needs the schema"),
        ({"builtin": "exact", "field": "a", "json_schema": {}}, "is for builtin: json_schema"),
        ({"function": "rewards.mine"}, "pattern"),
        ({"function": "rewards:mine", "field": "a"}, "leave field out"),
    ],
)
def test_what_a_reward_needs(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        RewardSpec(**spec)


def test_patterns_and_schemas_are_checked_at_once() -> None:
    with pytest.raises(SpecError, match="no regular expression"):
        reward_of(RewardSpec(builtin="regex", pattern="("))
    with pytest.raises(SpecError, match="has no group"):
        reward_of(RewardSpec(builtin="regex", pattern="a", field="answer"))
    with pytest.raises(SpecError, match="the schema"):
        reward_of(RewardSpec(builtin="json_schema", json_schema={"type": "nothing"}))


ROW = {"answer": "Bonn", "year": 1999, "all": ["Bonn", 1], "empty": ""}


@pytest.mark.parametrize(
    ("grader", "answer", "expected"),
    [
        ({"operation": "eq"}, "Bonn", 1),
        ({"operation": "eq"}, "bonn", 0),
        ({"operation": "eq"}, "Bonn ", 0),
        ({"operation": "eq", "reference": "{{ item.year }}"}, "1999", 1),
        ({"operation": "eq", "reference": "{{item.all}}"}, '["Bonn", 1]', 1),
        ({"operation": "eq", "input": '{"a":{{sample.output_text}}}', "reference": '{"a":{{item.year}}}'}, "1999", 1),
        ({"operation": "ne"}, "Paris", 1),
        ({"operation": "ne"}, "Bonn", 0),
        ({"operation": "like"}, "It is Bonn.", 1),
        ({"operation": "like"}, "It is BONN.", 0),
        ({"operation": "like", "reference": "<b>{{ item.answer }}</b>"}, "It is <b>Bonn</b>", 1),
        ({"operation": "ilike"}, "It is BONN.", 1),
        ({"operation": "ilike"}, "It is Paris.", 0),
        ({"evaluation_metric": "fuzzy_match"}, "Bonn", 1),
        ({"evaluation_metric": "fuzzy_match"}, "Born", 0.75),
        ({"evaluation_metric": "fuzzy_match"}, "xyz", 0),
        ({"evaluation_metric": "fuzzy_match"}, "", 0),
        ({"evaluation_metric": "fuzzy_match", "reference": "{{item.empty}}"}, "", 1),
        # Five words against seven, of which four, two, one and none follow one another as there.
        ({"evaluation_metric": "rouge_1"}, "The cat sat still on", 2 * 4 / 12),
        ({"evaluation_metric": "rouge_2"}, "The cat sat still on", 2 * 2 / 10),
        ({"evaluation_metric": "rouge_3"}, "The cat sat still on", 2 * 1 / 8),
        ({"evaluation_metric": "rouge_4"}, "The cat sat still on", 0),
        ({"evaluation_metric": "rouge_5"}, "the cat sat on the mat today!", 1),
        ({"evaluation_metric": "rouge_5"}, "cat", 0),
        ({"evaluation_metric": "rouge_l"}, "The cat sat still on", 2 * 4 / 12),
        ({"evaluation_metric": "gleu"}, "the cat sat on the mat today", 1),
        ({"evaluation_metric": "gleu"}, "the cat sat still on", (4 + 2 + 1) / (7 + 6 + 5 + 4)),
        ({"evaluation_metric": "gleu"}, "", 0),
    ],
)
def test_graders(grader: dict[str, Any], answer: str, expected: float) -> None:
    fields = SAME | {"operation": None} | grader
    if "evaluation_metric" in grader:
        fields["type"] = "text_similarity"
    if grader.get("evaluation_metric", "fuzzy_match") != "fuzzy_match":
        fields["reference"] = "the cat sat on the mat today"
    assert reward_of(RewardSpec(grader=fields))(ROW, answer) == pytest.approx(expected)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_fuzzy_match_is_the_longest_common_subsequence(a: str, b: str) -> None:
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else max(longest[i][j + 1], longest[i + 1][j])
    fields = SAME | {"type": "text_similarity", "operation": None, "evaluation_metric": "fuzzy_match"}
    found = reward_of(RewardSpec(grader=fields))({"answer": b}, a)
    assert found == pytest.approx(2 * longest[-1][-1] / (len(a) + len(b)) if a or b else 1.0)


def test_a_template_does_not_multiply_a_long_field() -> None:
    reward = reward_of(RewardSpec(grader=SAME | {"reference": "{{item.answer}}" * 11}))
    with pytest.raises(ValueError, match="at most 100,000 characters"):
        reward({"answer": "a" * 10_000}, "a")
    assert reward({"answer": "a" * 9_000}, "a" * 99_000) == 1


def test_which_fields_a_reward_reads() -> None:
    grader = SAME | {"input": "{{ item.prefix }}{{sample.output_text}}", "reference": "{{item.answer}}{{item.prefix}}"}
    assert RlSpec(reward=RewardSpec(grader=grader)).reads == ("prefix", "answer")
    assert RlSpec(reward=RewardSpec(builtin="number", field="answer")).reads == ("answer",)
    assert RlSpec(environment="a:B").reads == ()


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
