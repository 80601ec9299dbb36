"""Rewards and environments: what an answer is worth, and what is said next.

A reward is a function of a row of the data and an answer. An environment has several turns; a reward is one with a
single turn. Both may be a recipe's own, named as module:function or module:Class, and run in processes of their own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, NamedTuple, Protocol

from loray.errors import DataError, SpecError
from loray.spec import GraderSpec, RewardSpec, RlSpec

Row = Mapping[str, Any]
Reward = Callable[[Row, str], float | Awaitable[float]]
Said = str | Sequence[int]  # text, which becomes a message of the user, or tokens as they are


class Turn(NamedTuple):
    """Says what follows an answer: what it is worth, whether the episode ends, and what is said next if not."""

    reward: float
    done: bool
    observation: Said = ""


class Environment(Protocol):
    """An episode; a new object is made for each, without arguments. Its reward is the sum of its turns'."""

    async def start(self, row: Row) -> Said:
        """Begin with a row of the data, and say the first prompt."""

    async def step(self, answer: str) -> Turn:
        """Take an answer."""


class RewardedAnswer:
    """The environment of a reward: the row's own prompt, and one answer."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._row: Row = {}

    async def start(self, row: Row) -> Said:
        self._row = row
        return ""

    async def step(self, answer: str) -> Turn:
        given = self._reward(self._row, answer)
        return Turn(finite(await given if inspect.isawaitable(given) else given), done=True)


def finite(reward: object) -> float:
    """Check what a reward returned. Raises DataError."""
    if isinstance(reward, bool | int | float) and math.isfinite(reward):
        return float(reward)
    raise DataError(f"a reward must be a finite number, not {reward!r}")


def environments_of(spec: RlSpec) -> Callable[[], Environment]:
    """Find what makes an episode. Raises SpecError where what the recipe names cannot be imported."""
    if spec.environment is not None:
        make: Callable[[], Environment] = _imported(spec.environment)
        return make
    assert spec.reward is not None
    reward = reward_of(spec.reward)
    return lambda: RewardedAnswer(reward)


def reward_of(spec: RewardSpec) -> Reward:
    """Make the reward that a recipe names. Raises SpecError."""
    if spec.function is not None:
        function: Reward = _imported(spec.function)
        return function
    if spec.grader is not None:
        return _graded(spec.grader)
    assert spec.builtin is not None
    return _BUILT_IN[spec.builtin](spec)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as e:
        raise SpecError(
            f"{name} cannot be imported ({type(e).__name__}: {e}); modules lie beside the recipe, or are installed"
        ) from e
    if not callable(found):
        raise SpecError(f"{name} is no function and no class")
    return found


# -- built in ---------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def _expected(spec: RewardSpec, row: Row) -> str:
    assert spec.field is not None
    return str(row[spec.field]).strip()


def _exact(spec: RewardSpec) -> Reward:
    """The answer is the expected text, but for spaces around both."""
    return lambda row, answer: float(answer.strip() == _expected(spec, row))


def _contains(spec: RewardSpec) -> Reward:
    return lambda row, answer: float(_expected(spec, row) in answer)


def _number(spec: RewardSpec) -> Reward:
    """The first number of the answer is the expected one, and after it come spaces and a full stop at most."""

    def reward(row: Row, answer: str) -> float:
        expected = _expected(spec, row)
        found = _NUMBER.search(answer)
        if found is None or answer[found.end() :].strip() not in ("", "."):
            return 0.0
        return float(_value(found[0]) == _value(expected))

    return reward


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        raise DataError(f"{text!r} is no number, which the reward `number` compares with") from None


def _regex(spec: RewardSpec) -> Reward:
    """The pattern is found; with a field, the last place where it is found has that in its first group."""
    assert spec.pattern is not None
    try:
        pattern = re.compile(spec.pattern)
    except re.error as e:
        raise SpecError(f"objective.reward.pattern {spec.pattern!r} is no regular expression: {e}") from e
    if spec.field is not None and not pattern.groups:
        raise SpecError(f"objective.reward.pattern {spec.pattern!r} has no group to compare with {spec.field!r}")

    def reward(row: Row, answer: str) -> float:
        found = list(pattern.finditer(answer))
        if spec.field is None or not found:
            return float(bool(found))
        return float((found[-1][1] or "").strip() == _expected(spec, row))

    return reward


def _json_schema(spec: RewardSpec) -> Reward:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    def checker(schema: Any) -> Any:
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            kind = validator_for(schema)
            kind.check_schema(schema)
        except (SchemaError, ValueError, TypeError) as e:
            raise SpecError(f"the schema of the reward json_schema is none: {e}") from e
        return kind(schema)

    fixed = None if spec.json_schema is None else checker(spec.json_schema)

    def reward(row: Row, answer: str) -> float:
        validator = checker(row[spec.field or ""]) if fixed is None else fixed
        try:
            return float(validator.is_valid(json.loads(answer)))
        except (ValueError, RecursionError):
            return 0.0

    return reward


_BUILT_IN: Mapping[str, Callable[[RewardSpec], Reward]] = {
    "exact": _exact,
    "contains": _contains,
    "number": _number,
    "regex": _regex,
    "json_schema": _json_schema,
}


# -- graders ----------------------------------------------------------------------------------------------------------


def _graded(spec: GraderSpec) -> Reward:
    score = _SCORES[spec.operation or spec.evaluation_metric or ""]
    return lambda row, answer: float(score(*spec.compared(row, answer)))


def _overlap(a: Sequence[str], b: Sequence[str], n: int) -> tuple[int, int, int]:
    """Count the n-grams of both, those of `a`, and those of `b`."""
    grams_a, grams_b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (a, b))
    return (grams_a & grams_b).total(), grams_a.total(), grams_b.total()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _rouge(n: int, text: str, reference: str) -> float:
    """ROUGE-N (Lin, 2004): the F1 score of n-grams of words."""
    common, *sizes = _overlap(_words(text), _words(reference), n)
    return 2 * common / max(sum(sizes), 1)


def _gleu(text: str, reference: str) -> float:
    """GLEU (Wu et al., 2016): precision or recall of all n-grams up to four, whichever is less."""
    a, b = (re.findall(r"\w+|[^\w\s]", given) for given in (text, reference))
    found = [_overlap(a, b, n) for n in range(1, 5)]
    common, of_a, of_b = (sum(counts[i] for counts in found) for i in range(3))
    return common / max(of_a, of_b, 1)


def _alike(a: Sequence[str], b: Sequence[str]) -> float:
    """The F1 score of the longest common subsequence: of characters that is rapidfuzz's `ratio`, of words ROUGE-L.

    Bit by bit for all of `a` at once (Hyyrö, 2004): a bit that is 0 in `left` is an element that has been matched.
    """
    if not a and not b:
        return 1.0
    places: dict[str, int] = {}
    for i, element in enumerate(a):
        places[element] = places.get(element, 0) | 1 << i
    left = every = (1 << len(a)) - 1
    for element in b:
        found = left & places.get(element, 0)
        left = ((left + found) | (left - found)) & every
    return 2 * (len(a) - left.bit_count()) / (len(a) + len(b))


_SCORES: Mapping[str, Callable[[str, str], float]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
    "fuzzy_match": _alike,
    "gleu": _gleu,
    **{f"rouge_{n}": partial(_rouge, n) for n in range(1, 6)},
    "rouge_l": lambda text, reference: _alike(_words(text), _words(reference)),
}
