"""Running an engine step by step: requests in, tokens and logits out; integrity is checked after every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.engine.memory.adapter_manager import Stage
from loray.engine.request import TokenOutput
from loray.spec import GenerateRequest, SamplingParams, ServeSpec
from tests.engine.adapters import TestAdapter

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def make_engine(base: BaseModel, adapters: Sequence[TestAdapter] = (), **spec: Any) -> Engine:
    by_digest = {a.ref.digest: a for a in adapters}
    # Steps are limited by tokens, so that they do not depend on how fast the machine is.
    fields: dict[str, Any] = {"base": base.name, "dtype": "float32", "pool_bytes": 8 << 20, "itl_slo_ms": 1e9}
    fields |= {"graph_record_s": 1e9} | spec
    engine = build_engine(ServeSpec(**fields), base, lambda ref: by_digest[ref.digest].load(base))
    engine.warm_up()
    return engine


def fill_up(engine: Engine) -> None:
    """From now on admission leaves no room for what running requests generate, so that preemption is frequent."""
    engine.scheduler._admission._lasts = lambda request, running: True  # type: ignore[method-assign]


def request(request_id: str, ids: Sequence[int], adapter: TestAdapter | None = None, **params: Any) -> GenerateRequest:
    return GenerateRequest(request_id, tuple(ids), GREEDY.model_copy(update=params), adapter.ref if adapter else None)


def submit(engine: Engine, requests: Sequence[GenerateRequest]) -> None:
    """Add all requests. When this returns their adapters have been loaded, as far as the host has room."""
    for r in requests:
        engine.add(r)
    engine.adapter_manager.poll()
    started = [(e, e.load) for e in engine.adapter_manager.table.at[Stage.LOADING].values() if e.load is not None]
    wait([load for _, load in started])
    while any(entry.load is load for entry, load in started):  # the threads tell after the load has ended
        engine.adapter_manager.poll()


def run(
    engine: Engine, requests: Sequence[GenerateRequest], *, together: bool = False, timeout_s: float = 120
) -> dict[str, list[int]]:
    """Submit all requests and step until none is left. `together`: wait for their adapters first. Raises the first
    error of a request.
    """
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    if together:
        submit(engine, requests)
    else:
        for r in requests:
            engine.add(r)
    deadline = time.monotonic() + timeout_s
    while engine.has_work:
        assert time.monotonic() < deadline, f"no progress: {engine.stats()}"
        for token in engine.step():
            if token.error is not None:
                raise token.error
            tokens = out.setdefault(token.request_id, [])
            tokens += [] if token.token_id is None else [token.token_id]  # None: a part of its prompt has been scored
        engine.check_integrity()
        if engine.idle:
            time.sleep(0.001)  # the threads that load need the interpreter
    return out


def hold(engine: Engine) -> tuple[threading.Event, threading.Event]:
    """After a step that leaves a request running, the engine's thread sets the first event and waits for the second: a
    tiny model generates whole answers before its next statistics.
    """
    stands, go_on = threading.Event(), threading.Event()
    step = engine.step

    def held() -> list[TokenOutput]:
        outputs = step()
        if engine.scheduler.running:
            stands.set()
            assert go_on.wait(60)
        return outputs

    engine.step = held  # type: ignore[method-assign]
    return stands, go_on


class Spy:
    """Keeps the logits of every sampled token, by request."""

    def __init__(self, engine: Engine) -> None:
        self.logits: dict[str, list[Tensor]] = {}
        sampler = engine._runner._sampler

        def spying(logits_SV: Tensor, requests: list[Any], *arguments: Any) -> Any:
            for row, r in zip(logits_SV, requests, strict=True):
                self.logits.setdefault(r.request_id, []).append(row.clone())
            return sampler(logits_SV, requests, *arguments)

        engine._runner._sampler = spying  # type: ignore[assignment]
