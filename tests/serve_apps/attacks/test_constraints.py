"""A tenant that sends constraints faster than they can be compiled: it fills its own part of the queue, and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.errors import Overloaded
from loray.spec import Constraint, GenerateRequest
from loray.text.grammar import GrammarCompiler
from tests.fixtures.engines import make_engine, request

SLOW = threading.Event()


@pytest.fixture
def engine(tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Constraints of the loud tenant are not compiled before SLOW is set."""

    def compile_(self: GrammarCompiler, constraint: Constraint) -> object:
        if constraint.text.startswith("loud"):
            assert SLOW.wait(60)
        return real(self, constraint)

    real = GrammarCompiler.compile
    monkeypatch.setattr(GrammarCompiler, "compile", compile_)
    SLOW.clear()
    engine = make_engine(tiny_base(), max_queued=6)
    yield engine
    SLOW.set()
    engine.close()


def asked(tenant: str, number: int) -> GenerateRequest:
    constraint = Constraint.from_regex(f"{tenant}{number}")
    return replace(request(f"{tenant}{number}", (1, 2), structured=constraint, max_tokens=20), tenant=tenant)


def outcomes(engine: Engine) -> dict[str, object]:
    found: dict[str, object] = {}
    while engine.has_work:
        for out in engine.step():
            if out.finish_reason or out.error:
                found[out.request_id] = out.finish_reason or out.error
        engine.check_integrity()
    return found


def test_distinct_constraints_are_counted_before_they_are_compiled(engine: Engine) -> None:
    for number in range(6):
        engine.add(asked("loud", number))
    for number in range(6, 200):
        with pytest.raises(Overloaded, match="6 requests are waiting already"):
            engine.add(asked("loud", number))
    engine.step()
    assert engine.stats().num_waiting == 6


def test_a_quiet_tenant_takes_the_place_of_the_loud_ones_last(engine: Engine) -> None:
    for number in range(6):
        engine.add(asked("loud", number))
    engine.add(asked("quiet", 0))
    (displaced,) = engine.step()
    assert displaced.request_id == "loud5"
    assert isinstance(displaced.error, Overloaded)
    SLOW.set()
    found = outcomes(engine)
    assert found == dict.fromkeys(["quiet0", *(f"loud{i}" for i in range(5))], "stop")


def test_cancelled_ones_leave_nothing(engine: Engine) -> None:
    for number in range(100):
        for n in range(6):
            engine.add(asked("loud", 6 * number + n))
        for n in range(6):
            engine.cancel(f"loud{6 * number + n}")
    assert not engine.has_work
    waiting = engine._grammars._compilations
    assert not waiting._queues
    assert len(waiting._known) <= 2  # which two threads have begun
