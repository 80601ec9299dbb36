"""`AsyncEngine`: an engine in a thread of its own, with a stream of tokens for each request.

On a CPU the thread computes in the background (`loray.priority`): what takes requests and passes on tokens goes first.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from loray.engine.engine import Engine
from loray.engine.memory.adapter_manager import Placement, Prefetch, Prefetched
from loray.engine.metrics import EngineStats
from loray.engine.request import TokenOutput
from loray.errors import EngineError, EngineStopped, RankLost, RequestError
from loray.priority import compute_in_background
from loray.spec import AdapterBytes, AdapterRef, GenerateRequest, TokenDelta
from loray.telemetry import get_logger
from loray_kernels import release_threads, use_device

_log = get_logger(__name__)

_STATS_INTERVAL_S = 0.2
_PREFETCH_LOOK_S = 0.01

T = TypeVar("T")


class TokenSink(Protocol):
    """Takes the results of requests. Sinks that are equal get the results of one step together."""

    def deliver(self, outputs: Sequence[tuple[Any, TokenOutput]]) -> None:
        """Take one step's results, each with the `key` of its request. Called in the engine's thread, which waits for
        it, so it must neither block nor raise. A request's last result has a finish reason or an error.
        """


class _Subscriber(NamedTuple):
    sink: TokenSink
    key: Any


class AsyncEngine:
    """Owns the engine's thread. May be called from any thread and any event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: deque[Callable[[], None]] = deque()
        self._subscribers: dict[str, _Subscriber] = {}
        self._calls: set[Future[Any]] = set()  # that the engine's thread has not begun
        self._lock = threading.Lock()
        self._news = threading.Event()  # something has come since the last turn began
        self._stopping = self._ended = False
        self._stats_due = 0.0
        self._device = engine.pool.tensor.device
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._warm: Future[Any] = Future()  # has a result when the thread can step
        self._stats = engine.stats()
        self.failure: Exception | None = None
        engine.wake = self._news.set

    def start(self) -> None:
        """Start the thread, from the one that built the engine. That one's OpenMP threads end: with those of the
        engine's thread there would be more threads than cores. Raises what Engine.warm_up raises; then the engine is
        closed.
        """
        release_threads()
        self._thread.start()
        if (error := self._warm.exception()) is not None:
            self.stop()
            raise error

    def stop(self) -> None:
        """End the thread after the current step; running and waiting requests fail with EngineError."""
        self._stopping = True
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._ended:
            self._end(EngineError("the engine is shutting down"))
        self._engine.close()

    def check_health(self) -> None:
        """Raise EngineError if the engine's thread or another rank has ended."""
        self._check_not_ended()
        self._engine.check_health()

    def stats(self) -> EngineStats:
        """Give figures that are at most 0.2 s or one step old while the engine works, and exact when it is idle."""
        return self._stats

    async def adapters(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Ask `Engine.adapters`. EngineError if the engine has stopped."""
        return await asyncio.wrap_future(self.call(lambda: self._engine.adapters(digests)))

    async def retire(self, digests: Collection[str]) -> None:
        """Ask `Engine.retire`. EngineError if the engine has stopped."""
        await asyncio.wrap_future(self.call(lambda: self._engine.retire(digests)))

    def prefetch(self, refs: Iterable[AdapterRef], timeout_s: float) -> Prefetched:
        """Load adapters, in their order, before requests come: into the pool as long as half of it stays free, and else
        into host memory. Blocks until they are there, but no longer than `timeout_s` and a step.

        EngineError if the engine has stopped.
        """
        deadline, engine = time.monotonic() + timeout_s, self._engine
        prefetch = Prefetch(engine.adapter_manager, engine.spec.host_bytes, partial(_leaves_half_free, engine))
        is_done = self.call(lambda: prefetch.begin(refs)).result()
        while not is_done and time.monotonic() < deadline:
            time.sleep(_PREFETCH_LOOK_S)
            is_done = self.call(prefetch.look).result()
        return self.call(prefetch.end).result()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the engine's thread after its current step; the future has its result or error.

        EngineError, raised here or by the future, if the engine has stopped.
        """
        result: Future[T] = Future()
        with self._lock:
            self._check_not_ended()
            self._calls.add(result)
        self._post(lambda: self._run_call(result, function))
        return result

    def subscribe(self, request: GenerateRequest, sink: TokenSink, key: Any) -> None:
        """Submit the request; `sink` gets its results, with `key`.

        Raises RequestError, ContextLengthExceeded, BaseMismatch or EngineError. The result may be one of those, an
        Overloaded or an error of loading the adapter.
        """
        self._engine.check(request)
        with self._lock:  # before the request is posted, so that `_end` reaches it whenever the engine stops
            self._check_not_ended()
            if request.request_id in self._subscribers:
                raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
            self._subscribers[request.request_id] = _Subscriber(sink, key)
        self._post(lambda: self._add(request))

    def cancel(self, request_id: str) -> None:
        """End a request, if it has not ended, before the next step. Its sink gets nothing more after that step."""
        self._post(lambda: self._cancel(request_id))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Give the tokens as they come; the last delta has a finish reason. Closing the iterator cancels the request.

        Raises what `subscribe` raises and what its sink would get.
        """
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self.subscribe(request, _Queues(asyncio.get_running_loop()), queue)
        finished = False
        try:
            while not finished:
                out = await queue.get()
                finished = out.finish_reason is not None or out.error is not None
                if out.error is not None:
                    raise out.error
                yield out.delta
        finally:
            if not finished:
                self.cancel(request.request_id)

    def on_first_step(self, called: Callable[[str, float], None]) -> None:
        """Call `called` with the id of each traced request when its first step begins, and the time of
        `time.monotonic`. It runs in the engine's thread, so it neither blocks nor raises.
        """
        self._engine.counters.first_step = called

    @property
    def pool_bytes(self) -> int:
        """The bytes of the pool on all ranks. From any thread."""
        pool_bytes = self._engine.spec.pool_bytes
        assert pool_bytes is not None, "an engine's spec says it, see `sized`"
        return pool_bytes

    def max_model_len(self, adapter: AdapterRef | None) -> int:
        """Ask `Engine.max_model_len`."""
        return self._engine.max_model_len(adapter)

    def adapter_bytes(self, adapter: AdapterRef) -> AdapterBytes:
        """Ask `Engine.adapter_bytes`."""
        return self._engine.adapter_bytes(adapter)

    def _check_not_ended(self) -> None:
        if self.failure is not None:
            raise EngineStopped(f"the engine stopped: {self.failure!r}")
        if self._ended:
            raise EngineError("the engine is shut down")

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._news.set()

    def _run(self) -> None:
        if self._device.type == "cpu":
            compute_in_background()  # before it makes threads of its own
        use_device(self._device)  # the thread that built the engine has a current device of its own
        if self._engine.spec.num_threads is not None:
            torch.set_num_threads(self._engine.spec.num_threads)
        torch.get_num_threads()  # fixes the number: else this thread would use one that a loader thread sets for itself
        self._run_call(self._warm, self._engine.warm_up)
        while not self._stopping:
            self._news.clear()
            due = self._turn()
            if due is None:
                return
            if (seconds := due - time.monotonic()) > 0:
                self._news.wait(min(seconds, threading.TIMEOUT_MAX))

    def _turn(self) -> float | None:
        """Do what has come, and a step. Returns when the next one follows although nothing comes, in seconds of
        `time.monotonic`; None if the engine has stopped.
        """
        try:
            while self._inbox:
                self._inbox.popleft()()
            self._deliver(self._engine.step())
            now, is_idle = time.monotonic(), self._engine.idle
            if is_idle or now > self._stats_due:
                self._stats, self._stats_due = self._engine.stats(), now + _STATS_INTERVAL_S
        except Exception as e:  # noqa: BLE001 - the engine ends: all that wait get the error
            _log.exception("the engine stopped")
            self.failure = e
            stopped = EngineStopped(f"the engine stopped: {e!r}", self._engine.last_adapters)
            self._end(e if isinstance(e, RankLost) else stopped)
            return None
        return self._engine.next_deadline if is_idle else -math.inf  # a waiting request may become too late

    def _add(self, request: GenerateRequest) -> None:
        if request.request_id not in self._subscribers:
            return
        try:
            self._engine.add(request)
        except Exception as e:  # noqa: BLE001 - the error is this request's
            self._deliver([TokenOutput(request.request_id, None, error=e)])

    def _run_call(self, result: Future[T], function: Callable[[], T]) -> None:
        self._calls.discard(result)
        if result.set_running_or_notify_cancel():
            try:
                result.set_result(function())
            except Exception as e:  # noqa: BLE001 - the caller gets it
                result.set_exception(e)

    def _cancel(self, request_id: str) -> None:
        self._subscribers.pop(request_id, None)
        self._engine.cancel(request_id)

    def _deliver(self, outputs: Iterable[TokenOutput]) -> None:
        by_sink: dict[TokenSink, list[tuple[Any, TokenOutput]]] = {}
        for output in outputs:
            last = output.finish_reason is not None or output.error is not None
            subscriber = (self._subscribers.pop if last else self._subscribers.get)(output.request_id, None)
            if subscriber is not None:
                by_sink.setdefault(subscriber.sink, []).append((subscriber.key, output))
        for sink, items in by_sink.items():
            sink.deliver(items)

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._ended = True
        for result in self._calls:
            if result.set_running_or_notify_cancel():
                result.set_exception(error)
        self._deliver([TokenOutput(request_id, None, error=error) for request_id in self._subscribers])


@dataclass(frozen=True, slots=True)
class _Queues:
    """The sink of all streams of one event loop, which it wakes once a step. Keys are the streams' queues."""

    loop: asyncio.AbstractEventLoop

    def deliver(self, outputs: Sequence[tuple[asyncio.Queue[TokenOutput], TokenOutput]]) -> None:
        with suppress(RuntimeError):  # the caller's loop is closed: the output is not needed
            self.loop.call_soon_threadsafe(_put, outputs)


def _put(items: Sequence[tuple[asyncio.Queue[TokenOutput], TokenOutput]]) -> None:
    for queue, output in items:
        queue.put_nowait(output)


def _leaves_half_free(engine: Engine, ref: AdapterRef) -> bool:
    """Say whether half of the pool stays free when `ref`, which has been loaded, is placed there."""
    pool, (own, pair) = engine.pool, engine.adapter_bytes(ref)
    left = pool.allocator.num_free * pool.block_bytes - own - (pair[1] if pair else 0)
    return 2 * left >= pool.geometry.num_blocks * pool.block_bytes
