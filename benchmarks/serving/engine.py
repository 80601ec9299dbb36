"""loray's engine in a separate process. It reads a setup and then passes, and answers each line of JSON with one.

    python -m benchmarks.serving.engine < lines of JSON

First line: fields of `Setup`. Then one line for each pass: {"requests": [...], "at_once": N or null}.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.client import replay
from benchmarks.serving.models import bench_base, random_tensors
from benchmarks.serving.rows import EngineWork, ratio
from benchmarks.serving.workload import TimedRequest
from loray.settings import Settings
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec

if TYPE_CHECKING:
    from loray.engine.engine import Engine
    from loray.engine.metrics import EngineStats
    from loray.engine.request import SchedulerOutput, TokenOutput


class Setup(NamedTuple):
    """`home`: an empty folder for the engine's node cache. `folder`: the benchmark's."""

    spec: dict[str, Any]
    refs: list[dict[str, Any]]
    store: str
    catalog: str
    home: str
    folder: str


class EngineSession:
    """The engine of a setup, running in its thread. Passes run one after the other."""

    def __init__(self, setup: Setup) -> None:
        from loray.engine.async_engine import AsyncEngine
        from serve_apps.python_gc import freeze_garbage

        self._refs, self._num = [AdapterRef(**ref) for ref in setup.refs], 0
        self._engine = _build(setup)
        self._steps = recorded(self._engine)
        self._stream: AsyncEngine = AsyncEngine(self._engine)
        self._stream.start()
        freeze_garbage()

    def run(self, requests: list[TimedRequest], at_once: int | None) -> dict[str, Any]:
        """Answers and engine's work of one pass. AssertionError if the engine's integrity check fails afterwards."""
        self._steps.clear()
        before = self._stream.call(self._engine.stats).result()
        dues = [request.at for request in requests]
        answers = asyncio.run(replay(dues, at_once, lambda i: self._submit(requests[i])))
        self._stream.check_health()
        after = self._stream.call(self._engine.stats).result()
        self._stream.call(self._engine.check_integrity).result()
        return {"answers": [asdict(answer) for answer in answers], "work": asdict(_work(self._steps, before, after))}

    def close(self) -> None:
        self._stream.stop()

    async def _submit(self, request: TimedRequest) -> AsyncIterator[list[int]]:
        self._num += 1
        params = SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True)
        ref = None if request.adapter is None else self._refs[request.adapter]
        spec = GenerateRequest(str(self._num), request.prompt_ids, params, ref, tenant=request.tenant)
        async with aclosing(self._stream.generate(spec)) as deltas:
            async for delta in deltas:
                yield list(delta.token_ids)


class EngineStep(NamedTuple):
    """One step of `num_rows` chunks with `num_tokens` tokens in all. `adapter_bytes`: published ones of its distinct
    adapters.
    """

    began: float
    seconds: float
    num_tokens: int
    num_rows: int
    adapter_bytes: int
    num_waiting: int


def recorded(engine: Engine) -> list[EngineStep]:
    """A list to which each step of the engine is added from now on; a step takes some microseconds longer."""
    steps: list[EngineStep] = []
    scheduler, plan_next, step = engine.scheduler, engine.scheduler.next, engine.step
    last: list[SchedulerOutput] = []

    def next_plan() -> SchedulerOutput:
        last[:] = [plan_next()]
        return last[0]

    def timed() -> list[TokenOutput]:
        began = time.perf_counter()
        outputs = step()
        seconds, chunks = time.perf_counter() - began, last[0].chunks
        refs = {c.request.adapter.digest: c.request.adapter for c in chunks if c.request.adapter is not None}
        num_tokens, nbytes = sum(c.num_tokens for c in chunks), sum(ref.nbytes for ref in refs.values())
        steps.append(EngineStep(began, seconds, num_tokens, len(chunks), nbytes, len(scheduler.waiting)))
        return outputs

    scheduler.next = next_plan  # type: ignore[method-assign]
    engine.step = timed  # type: ignore[method-assign]
    return steps


def _build(setup: Setup) -> Engine:
    """An engine that loads adapters as a replica does: from the store through the node's cache into host memory."""
    import torch

    from loray.engine.build import build_engine, with_dtype
    from serve_apps.replica.startup import adapter_loader

    spec = ServeSpec(**setup.spec)
    base = bench_base(spec.base, Path(setup.folder))
    settings = Settings(Path(setup.home), setup.store, setup.catalog, address=None, log_level="WARNING")
    load = adapter_loader(base, settings)
    if base.source != "random":
        return build_engine(spec, base, load)
    device = torch.device(spec.device)
    spec = with_dtype(spec, device)
    return build_engine(spec, base, load, random_tensors(base.config, device, getattr(torch, spec.dtype)))


def _work(steps: Sequence[EngineStep], before: EngineStats, after: EngineStats) -> EngineWork:
    """The work between the stats `before` and `after`."""
    decode = [s for s in steps if 0 < s.num_tokens == s.num_rows]
    rows = max((s.num_rows for s in decode), default=0)
    full = [s for s in decode if s.num_rows == rows]
    stalled = sum(b.began - a.began for a, b in itertools.pairwise(steps) if not a.num_tokens and a.num_waiting)
    elapsed = steps[-1].began + steps[-1].seconds - steps[0].began if steps else 0.0

    def more(field: str) -> int:
        return int(getattr(after, field) - getattr(before, field))

    load_s = after.load_seconds.sum - before.load_seconds.sum
    hits = [more(f) for f in ("num_pool_hits", "num_host_hits", "num_misses")]
    pool, host, miss = (ratio(n, sum(hits)) for n in hits)
    return EngineWork(
        decode_rows=rows,
        decode_s=statistics.median(s.seconds for s in full) if full else float("nan"),
        decode_lora_bytes=statistics.fmean(s.adapter_bytes for s in full) if full else 0.0,
        stalled=ratio(stalled, elapsed),
        pool_hits=pool,
        host_hits=host,
        misses=miss,
        loaded_bytes=more("num_loaded_bytes"),
        load_s=ratio(load_s, more("num_loads")),
        num_residents=len(after.adapters_in_pool),
    )


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # for answers alone: everything else that is printed goes to stderr
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    session = EngineSession(Setup(**json.loads(sys.stdin.readline())))
    answer({})
    for line in sys.stdin:
        job = json.loads(line)
        requests = [TimedRequest(at, adapter, tuple(ids), *more) for at, adapter, ids, *more in job["requests"]]
        answer(session.run(requests, job["at_once"]))
    session.close()


if __name__ == "__main__":
    main()
