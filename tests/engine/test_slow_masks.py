"""Requests whose masks take long, in virtual time, beside others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.errors import GrammarTooExpensive, RequestError
from loray.spec import Constraint, GenerateRequest
from loray.text.grammar import MASK_BUDGET_S, MIN_MASKS
from tests.engine.harness import make_engine, request
from tests.engine.sampling.constraints import answers
from tests.engine.sampling.slow import EOS, SlowMasks, constraint, slow

SLOW_S = 0.015
_LENGTH = 12
PLAIN = request("plain", range(5, 12), max_tokens=400)


def held(tenant: str, number: int, seconds: float = SLOW_S, length: int = _LENGTH) -> GenerateRequest:
    asked = request(
        f"{tenant}{number}",
        range(3 + number, 9 + 2 * number),
        structured=constraint(seconds, length),
        max_tokens=length + 1,
        temperature=1.0,
        seed=number,
    )
    return replace(asked, tenant=tenant)


def masked(base: BaseModel, **spec: Any) -> tuple[Engine, SlowMasks]:
    engine = make_engine(base, max_num_seqs=16, **spec)
    return engine, slow(engine)


def asked(seconds: float) -> list[GenerateRequest]:
    return [*(held("loud", i, seconds) for i in range(5)), held("quiet", 5, seconds)]


def test_a_plain_request_has_a_token_in_each_step_and_the_others_in_turn(base: BaseModel) -> None:
    engine, masks = masked(base)
    expected = answers(masked(base)[0], [*asked(0.0), PLAIN])
    requests = [*asked(SLOW_S), PLAIN]
    for r in requests:
        engine.add(r)
    got: dict[str, list[int]] = {r.request_id: [] for r in requests}
    last, longest, spent = Counter[str](), Counter[str](), list[float]()
    while engine.has_work:
        before, goes_on = masks.seconds, 0 < len(got["plain"]) < PLAIN.params.max_tokens
        num = collect(engine, got)
        spent.append(masks.seconds - before)
        assert num["plain"] == goes_on or not got["plain"][1:]
        for name in num:
            longest[name] = max(longest[name], len(spent) - last[name])
            last[name] = len(spent)
    assert got == {name: ids for name, (ids, _) in expected.items()}
    assert all(got[r.request_id][-1] == EOS for r in requests[:-1])
    together = 6 * SLOW_S  # the first ones, of which nobody knows yet that they are slow
    assert spent[0] <= together + SLOW_S + 1e-9
    assert max(spent[1:]) == pytest.approx(SLOW_S)
    assert sum(spent) <= len(spent) * MASK_BUDGET_S + together + 3 * SLOW_S
    num_steps, first = SLOW_S / MASK_BUDGET_S, together / MASK_BUDGET_S
    assert longest["quiet5"] <= first + 2 * num_steps + 2
    assert all(longest[f"loud{i}"] <= first + 2 * 5 * num_steps + 2 for i in range(5))


def test_a_grammar_that_is_too_expensive_ends_its_request_alone(base: BaseModel) -> None:
    engine, _ = masked(base, enable_prefix_caching=False)
    free = engine.pool.allocator.num_free
    others = [held("loud", 1, 1e-5), PLAIN]
    expected = answers(masked(base)[0], others)
    got: dict[str, list[int]] = {}
    errors: dict[str, Exception] = {}
    for r in [held("loud", 0, length=100), *others]:
        engine.add(r)
        got[r.request_id] = []
    while engine.has_work:
        for output in engine.step():
            if output.token_id is not None:
                got[output.request_id].append(output.token_id)
            elif output.error is not None:
                errors[output.request_id] = output.error
        engine.check_integrity()
    assert errors.keys() == {"loud0"}
    assert isinstance(errors["loud0"], GrammarTooExpensive)
    assert "ms a token" in str(errors["loud0"])
    assert len(got.pop("loud0")) == MIN_MASKS - 1
    assert got == {name: ids for name, (ids, _) in expected.items()}
    assert engine.pool.allocator.num_free == free
    assert not engine._grammars._answers
    assert not engine._grammars.has_due


def test_slow_masks_alone_are_computed_one_after_another(base: BaseModel) -> None:
    """Steps without requests pay for them; the engine does not fall asleep."""
    engine, masks = masked(base)
    engine.add(held("a", 0))
    num_steps = num_tokens = 0
    while engine.has_work:
        num_tokens += len(engine.step())
        num_steps += 1
        assert not engine.idle or not engine.has_work
        assert num_steps < 100
    assert num_tokens == _LENGTH + 1
    assert masks.seconds == pytest.approx((_LENGTH + 1) * SLOW_S)


def names(engine: Engine) -> set[str]:
    """Of the requests in the last step."""
    return {chunk.request.request_id for chunk in engine._runner.last_chunks}


def run_until(engine: Engine, masks: SlowMasks, name: str, num_tokens: int) -> dict[str, list[int]]:
    """Steps until that request has so many tokens; then its next mask, which is begun by that step, is held."""
    got: dict[str, list[int]] = {}
    while len(got.get(name, [])) < num_tokens:
        masks.is_held = len(got.get(name, [])) == num_tokens - 1
        collect(engine, got)
    return got


def collect(engine: Engine, got: dict[str, list[int]]) -> Counter[str]:
    """One step; returns the number of tokens that each request got."""
    num = Counter[str]()
    for output in engine.step():
        assert output.error is None
        assert output.token_id is not None
        got.setdefault(output.request_id, []).append(output.token_id)
        num[output.request_id] += 1
    engine.check_integrity()
    return num


def finished(engine: Engine, got: dict[str, list[int]]) -> dict[str, list[int]]:
    while engine.has_work:
        collect(engine, got)
    return got


def with_a_mask_held(base: BaseModel) -> tuple[Engine, SlowMasks, dict[str, list[int]], dict[str, list[int]]]:
    """An engine with "a0", whose sixth mask is held, and a plain request; what they got, and what they will get."""
    requests = [held("a", 0, 1e-5), replace(PLAIN, params=PLAIN.params.model_copy(update={"max_tokens": 60}))]
    expected = {name: ids for name, (ids, _) in answers(masked(base)[0], requests).items()}
    engine, masks = masked(base)
    for r in requests:
        engine.add(r)
    return engine, masks, run_until(engine, masks, "a0", 5), expected


def test_a_mask_that_is_not_there_in_time_is_not_waited_for(base: BaseModel) -> None:
    engine, masks, got, expected = with_a_mask_held(base)
    for _ in range(6):
        num = len(got["plain"])
        collect(engine, got)
        assert names(engine) == {"plain"}
        assert len(got["plain"]) == num + 1
    masks.go_on()
    collect(engine, got)
    assert names(engine) == {"a0", "plain"}
    assert finished(engine, got) == expected


def test_a_request_that_is_preempted_without_its_mask_comes_back_with_it(base: BaseModel) -> None:
    engine, masks, got, expected = with_a_mask_held(base)
    engine.scheduler.preempt(engine._requests["a0"])
    for _ in range(3):
        collect(engine, got)
        assert names(engine) == {"plain"}
    masks.go_on()
    assert finished(engine, got) == expected
    assert engine.stats().num_preemptions == 1


def test_a_request_that_is_cancelled_in_the_thread_leaves_nothing(base: BaseModel) -> None:
    engine, masks, got, expected = with_a_mask_held(base)
    engine.cancel("a0")
    collect(engine, got)
    masks.go_on()
    assert finished(engine, got) == {"a0": expected["a0"][:5], "plain": expected["plain"]}
    assert not engine._grammars._turns._costs


def test_an_error_that_is_found_at_the_end_of_a_step_is_told_by_the_next(base: BaseModel) -> None:
    engine, _ = masked(base)

    def refuse(constraint: Constraint) -> None:
        raise RequestError("no")

    engine._grammars._compilations._compile = refuse  # type: ignore[assignment]
    engine.step()
    engine.add(held("a", 0))
    engine._grammars.end_step()
    assert engine._grammars.has_due
    (output,) = engine.step()
    assert isinstance(output.error, RequestError)
    assert not engine.has_work
