"""loray's engine in a separate process. It reads a setup and then passes, and answers each line of JSON with one.

    python -m benchmarks.serving.systems.engine < lines of JSON

First line: fields of Setup. Then one line for each pass: {"requests": [...], "at_once": N or null}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.models import bench_base, random_tensors
from benchmarks.serving.replay import replay
from benchmarks.serving.workload import TimedRequest
from loray.settings import Settings
from loray.spec import AdapterRef, SamplingParams, ServeSpec

if TYPE_CHECKING:
    from loray.bases.registry import BaseModel
    from loray.engine.async_engine import AsyncEngine
    from loray.engine.engine import Engine


@dataclass(frozen=True)
class Setup:
    """`home`: an empty folder for the engine's node cache. `folder`: the benchmark's. `kv_share`: see `ablate`."""

    spec: ServeSpec
    refs: tuple[AdapterRef, ...]
    store: str
    catalog: str
    home: Path
    folder: Path
    ablation: str | None
    kv_share: float

    def to_json(self) -> str:
        paths = {"home": str(self.home), "folder": str(self.folder)}
        spec = self.spec.model_dump(mode="json")
        return json.dumps(asdict(self) | paths | {"spec": spec})

    @classmethod
    def from_json(cls, line: str) -> Setup:
        raw = json.loads(line)
        raw["spec"] = ServeSpec(**raw["spec"])
        raw["refs"] = tuple(AdapterRef(**ref) for ref in raw["refs"])
        return cls(**raw | {name: Path(raw[name]) for name in ("home", "folder")})


class EngineSession:
    """The engine of a setup, running in its thread. Passes run one after the other."""

    def __init__(self, setup: Setup) -> None:
        from benchmarks.serving.ablations import ablate
        from benchmarks.serving.recorder import EngineRecorder
        from loray.engine.async_engine import AsyncEngine
        from serve_apps.python_gc import freeze_garbage

        base = bench_base(setup.spec.base, setup.folder)
        self._refs, self._num = setup.refs, 0
        self._engine = build(setup, base)
        ablate(self._engine, setup.ablation, setup.kv_share)
        self._recorder = EngineRecorder(self._engine)
        self._stream: AsyncEngine = AsyncEngine(self._engine)
        self._stream.start()
        freeze_garbage()

    def run(self, requests: list[TimedRequest], at_once: int | None) -> dict[str, Any]:
        """Records and engine's work of one pass. AssertionError if the engine's integrity check fails afterwards."""
        from benchmarks.serving.figures.rows import engine_work

        self._recorder.steps, placed = [], self._recorder.placed_bytes
        before = self._stream.call(self._engine.stats).result()
        records = asyncio.run(replay(requests, at_once, self._submit))
        self._stream.check_health()
        after = self._stream.call(self._engine.stats).result()
        self._stream.call(self._engine.check_integrity).result()
        work = engine_work(self._recorder.steps, self._recorder.placed_bytes - placed, before, after)
        return {"records": [r.to_dict() for r in records], "work": asdict(work)}

    def close(self) -> None:
        self._stream.stop()

    async def _submit(self, index: int, request: TimedRequest) -> AsyncIterator[list[int]]:
        from loray.spec import GenerateRequest

        self._num += 1
        params = SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True)
        ref = None if request.adapter is None else self._refs[request.adapter]
        spec = GenerateRequest(str(self._num), request.prompt_ids, params, ref, tenant=request.tenant)
        stream = self._stream.generate(spec)
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                yield list(delta.token_ids)


def build(setup: Setup, base: BaseModel) -> Engine:
    """An engine that loads adapters as a replica does: from the store through the node's cache into host memory."""
    import torch

    from loray.engine.build import build_engine, with_dtype
    from serve_apps.replica.startup import adapter_loader

    spec = setup.spec
    settings = Settings(setup.home, setup.store, setup.catalog, address=None, log_level="WARNING")
    load = adapter_loader(base, settings)
    if base.source == "random":
        device = torch.device(spec.device)
        spec = with_dtype(spec, device)
        tensors = random_tensors(base.config, device, getattr(torch, spec.dtype))
        return build_engine(spec, base, load, tensors)
    return build_engine(spec, base, load)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # for answers alone: everything else that is printed goes to stderr
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    began = time.perf_counter()
    session = EngineSession(Setup.from_json(sys.stdin.readline()))
    answer({"start_s": time.perf_counter() - began})
    for line in sys.stdin:
        job = json.loads(line)
        requests = [TimedRequest(at, adapter, tuple(ids), *more) for at, adapter, ids, *more in job["requests"]]
        answer(session.run(requests, job["at_once"]))
    session.close()


if __name__ == "__main__":
    main()
