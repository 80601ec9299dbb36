"""One replica: an engine with its base, and adapters by digest from the store through the node's cache.

Nothing heavy is imported here: torch must come after the number of threads is set, and the driver that deploys
needs only the class.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from loray.bases.registry import BaseModel, get_base
from loray.errors import BaseMismatch
from loray.settings import Settings
from loray.spec import AdapterRef, ServeSpec
from loray.telemetry import configure_logging, get_logger

if TYPE_CHECKING:
    from loray.adapters.weights import AdapterWeights
    from loray.engine.request import GenerateRequest
    from loray.engine.stream import Delta, EngineStream

_log = get_logger(__name__)

_NODE_CACHE_BYTES = 16 << 30  # of disk


class EngineReplica:
    """Ray Serve deployment. Its methods run on one event loop, the engine in its own thread."""

    def __init__(self, spec: ServeSpec) -> None:
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        set_num_threads(spec)
        self._spec = spec
        self._started_at = time.time()
        self._stream = start_engine(spec, get_base(settings.home, spec.base), settings)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Deltas as they come; what has come while the last one was sent goes as one. Closing it cancels."""
        async with aclosing(_coalesced(cast("AsyncGenerator[Delta, None]", self._stream.generate(request)))) as deltas:
            async for delta in deltas:
                yield delta

    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return sum(self._stream.stats().blocks.values()) * self._spec.block_tokens

    def stats(self) -> dict[str, Any]:
        """Fields of `loray.serving.status.ReplicaStatus`; adapters by digest."""
        return self._stream.stats().to_dict() | {
            "replica": _replica_id(),
            "node": socket.gethostname(),
            "pid": os.getpid(),
            "uptime_s": time.time() - self._started_at,
        }

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has stopped."""
        self._stream.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.stop()


def set_num_threads(spec: ServeSpec) -> None:
    """Before torch is imported: Ray tells its workers to use one thread, and OpenMP reads that once."""
    cores = len(os.sched_getaffinity(0))
    num_threads = spec.num_threads or max(1, cores * _num_nodes() // max(spec.num_replicas, _num_nodes()))
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)
    _log.info("%d of %d cores", num_threads, cores)


def start_engine(spec: ServeSpec, base: BaseModel, settings: Settings) -> EngineStream:
    """Load the base, cut the pool, start the engine's thread."""
    from transformers import AutoTokenizer

    from loray.engine.engine import build_engine
    from loray.engine.stream import EngineStream

    started = time.monotonic()
    stream = EngineStream(
        build_engine(spec, base, adapter_loader(base, settings)), AutoTokenizer.from_pretrained(str(base.path))
    )
    stream.start()
    _log.info("base %s is ready after %.1f s", base.name, time.monotonic() - started)
    return stream


def adapter_loader(base: BaseModel, settings: Settings) -> Callable[[AdapterRef], AdapterWeights]:
    """From a reference to weights; called in the engine's loader threads.

    It raises NotFoundError and IntegrityError (store), BaseMismatch, UnsupportedError (what the engine cannot hold).
    """
    from loray.adapters.manifest import read_manifest
    from loray.adapters.peft_format import read_adapter
    from loray.store import AdapterCache, AdapterStore, open_store

    cache = AdapterCache(AdapterStore(open_store(settings.store)), settings.home / "cache", _NODE_CACHE_BYTES)

    def load(ref: AdapterRef) -> AdapterWeights:
        with cache.pinned(ref.digest) as folder:
            manifest = read_manifest(folder)
            if manifest.base_fingerprint != base.fingerprint:
                raise BaseMismatch(f"adapter {ref.label} was trained on another base than {base.name!r}")
            weights = read_adapter(folder, base.config)
        return replace(weights, rope=manifest.rope_parameters, context_length=manifest.context_length)

    return load


async def _coalesced(deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """The same stream in fewer pieces when the reader is slower than the engine."""
    ready: list[Delta] = []
    bell = asyncio.Event()

    async def pump() -> None:
        try:
            async with aclosing(deltas) as stream:
                async for delta in stream:
                    ready.append(delta)
                    bell.set()
        finally:
            bell.set()

    task = asyncio.create_task(pump())
    try:
        while not task.done() or ready:
            await bell.wait()
            bell.clear()
            if ready:
                batch, ready[:] = ready[:], []
                yield merge_deltas(batch)
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])


def merge_deltas(deltas: list[Delta]) -> Delta:
    """Consecutive deltas of one request as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    logprobs = None if last.logprobs is None else tuple(lp for d in deltas for lp in d.logprobs or ())
    return last._replace(
        text="".join(d.text for d in deltas),
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        logprobs=logprobs,
    )


def _replica_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _num_nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
