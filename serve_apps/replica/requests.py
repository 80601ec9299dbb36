"""Requests of an engine: submitted, measured and ended, for a gateway elsewhere or in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Protocol

from loray.errors import ContextLengthExceeded, LorayError, Overloaded, ReplicaUnavailable
from loray.policy.autoscaling import burst_s
from loray.policy.demand import DemandMeter, EngineLoad, TrackedRequest
from loray.spec import AutoscalingSpec, ServeSpec
from serve_apps.channel.inbox import Inbox, Wakes, reading
from serve_apps.replica.metrics import ReplicaMetrics, RequestTimes
from serve_apps.tracing import ReplicaTrace, Tracing

if TYPE_CHECKING:
    from loray.engine.async_engine import AsyncEngine
    from loray.engine.request import TokenOutput
    from loray.spec import GenerateRequest, OutputKind, TokenDelta

MOST_HELD = 31  # tokens of a request that nobody reads along: they are lost, and computed again, where a replica dies


class ReplicaDemand:
    """Measures the demand on a replica that Serve scales."""

    def __init__(self, spec: ServeSpec, autoscaling: AutoscalingSpec, stream: AsyncEngine) -> None:
        self._stream, self._pool_bytes = stream, float(stream.pool_bytes)
        self._meter = DemandMeter(
            window_s=autoscaling.window_s,
            max_num_seqs=spec.max_num_seqs,
            pool_bytes=self._pool_bytes,
            adapter_bytes=stream.adapter_bytes,
            now=time.monotonic(),
            burst_s=burst_s(autoscaling),
        )

    def arrived(self, request: GenerateRequest) -> TrackedRequest:
        """Track a request, whose output tokens the caller counts. What another replica has generated is prompt here."""
        prompt, left = len(request.prompt_ids), request.params.max_tokens
        if request.output_ids:
            prompt, left = prompt + len(request.output_ids), left - len(request.output_ids)
        return self._meter.arrived(prompt, left, request.adapter, time.monotonic())

    def ended(self, tracked: TrackedRequest, error: Exception | None) -> None:
        if isinstance(error, Overloaded):
            self._meter.refused(tracked, time.monotonic())
        elif isinstance(error, LorayError):
            self._meter.rejected(tracked)
        else:
            self._meter.finished(tracked, time.monotonic())

    def stats(self) -> dict[str, float]:
        """Report to the autoscaler, which asks for it at its intervals."""
        now, engine = time.monotonic(), self._stream.stats()
        load = EngineLoad(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_loading=engine.num_loading,
            num_tokens=engine.num_prompt_tokens + engine.num_output_tokens,
            kv_bytes=self._pool_bytes * engine.blocks["kv"] / sum(engine.blocks.values()),
        )
        self._meter.sample(load, now)
        loaded = frozenset((*engine.adapters_in_pool, *engine.adapters_on_host))
        return self._meter.observe(now, loaded).to_stats()


class RequestOutlet(Protocol):
    """Takes the results of streams: a connection to a gateway, or the streams of this process."""

    def send(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        """Send results, each with its stream, of which there may be several in their order. Called in the engine's
        thread; neither blocks nor raises.
        """

    def watch(self, stream: int, left: Callable[[str], None]) -> None:
        """Have `left` called in the event loop when the reader wants no more: "stop", "abort", or "lost" if it is gone.

        "stop": what it has got ends the text, as a finish reason does.
        """

    def unwatch(self, stream: int) -> None: ...


@dataclass(slots=True, eq=False)
class _Ongoing:
    """`ended`: the finish reason or what the reader said when it left, or the request's error. `held`: what the reader
    has not got yet, of which there may be `most_held`.
    """

    stream: int
    outlet: RequestOutlet
    output_kind: OutputKind
    times: RequestTimes
    tracked: TrackedRequest | None
    ended: asyncio.Future[str]
    held: list[TokenOutput] = field(default_factory=list)
    most_held: int = 0  # before the first token

    def ready(self, out: TokenOutput) -> list[TokenOutput]:
        """Take what the reader gets after the step that gave `out`. A prompt's log-probabilities are not held."""
        ends = out.finish_reason is not None or out.error is not None
        if not ends and out.prompt_logprobs is None and len(self.held) <= self.most_held:
            return []
        if self.output_kind == "final":
            self.most_held = MOST_HELD
        ready, self.held = self.held, []
        return ready

    def end(self, how: str | Exception) -> None:
        if self.ended.done():
            return
        if isinstance(how, Exception):
            self.ended.set_exception(how)
        else:
            self.ended.set_result(how)


class ReplicaRequests:
    """Runs requests in one event loop, and takes the engine's results."""

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: ReplicaMetrics,
        demand: ReplicaDemand | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._engine, self._metrics, self._demand, self._tracing = engine, metrics, demand, tracing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._traces: dict[str, ReplicaTrace] = {}  # by request
        if tracing is not None:
            engine.on_first_step(self._scheduled)

    async def run(self, request: GenerateRequest, fit: bool, outlet: RequestOutlet, stream: int) -> None:
        """Return when the request has ended; its tokens go to `outlet`. Cancelling it cancels the request.

        `fit`: max_tokens is lowered to what fits into the pool. Until an adapter has been loaded, the engine estimates
        its size there; a request that turns out to be too long is submitted once more, with the limit that is known by
        then. Raises the errors of `AsyncEngine.subscribe`, and ReplicaUnavailable if the outlet was lost.
        """
        self._loop = asyncio.get_running_loop()
        tracked = self._demand.arrived(request) if self._demand else None
        trace = None if self._tracing is None else self._tracing.replica(request)
        if trace is not None:
            self._traces[request.request_id] = trace
        times, ended = self._metrics.arrived(request), self._loop.create_future()
        ongoing = _Ongoing(stream, outlet, request.output_kind, times, tracked, ended)
        outlet.watch(stream, ongoing.end)
        how: str | Exception = "abort"
        try:
            how = await self._attempts(request, fit, ongoing)
        except Exception as e:
            how = e
            raise
        finally:
            outlet.unwatch(stream)
            self._metrics.ended(ongoing.times, "abort" if how == "lost" else how)
            if self._demand and tracked:
                self._demand.ended(tracked, how if isinstance(how, Exception) else None)
            if trace is not None:
                del self._traces[request.request_id]
                trace.end(ongoing.times, how)
        if how == "lost":
            raise ReplicaUnavailable("the connection to the gateway was lost; send the request again")

    async def run_all(self, requests: Sequence[tuple[GenerateRequest, int]], fit: bool, outlet: RequestOutlet) -> None:
        """Run several requests as `run` does one, each with its stream. The first error ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                for request, stream in requests:
                    group.create_task(self.run(request, fit, outlet, stream))
        except ExceptionGroup as e:
            raise e.exceptions[0] from None

    async def _attempts(self, request: GenerateRequest, fit: bool, ongoing: _Ongoing) -> str:
        asked = self._fitted(request) if fit else request
        try:
            return await self._attempt(asked, ongoing)
        except ContextLengthExceeded:
            again = self._fitted(request) if fit else asked
            if ongoing.times.started or again.params.max_tokens >= asked.params.max_tokens:
                raise
        assert self._loop is not None
        ongoing.ended = self._loop.create_future()
        return await self._attempt(again, ongoing)

    async def _attempt(self, request: GenerateRequest, ongoing: _Ongoing) -> str:
        finished = False
        if not ongoing.ended.done():
            self._engine.subscribe(request, self, ongoing)
        try:
            how = await ongoing.ended
            finished = ongoing.times.finished
            return how
        except Exception:
            finished = True
            raise
        finally:
            if not finished:
                self._engine.cancel(request.request_id)

    def _fitted(self, request: GenerateRequest) -> GenerateRequest:
        """Lower max_tokens to the limit, but not below one more than there are already. If even that is too much, the
        engine refuses the request.
        """
        left = max(self._engine.max_model_len(request.adapter) - len(request.prompt_ids), len(request.output_ids) + 1)
        if request.params.max_tokens <= left:
            return request
        return replace(request, params=request.params.model_copy(update={"max_tokens": left}))

    def _scheduled(self, request_id: str, at: float) -> None:
        """Note when a request was scheduled, in the engine's thread."""
        trace = self._traces.get(request_id)
        if trace is not None:
            trace.scheduled_at = at

    def deliver(self, outputs: Sequence[tuple[_Ongoing, TokenOutput]]) -> None:
        """Take one step's results, in the engine's thread."""
        self._metrics.stepped([(ongoing.times, out) for ongoing, out in outputs if out.error is None])
        by_outlet: dict[RequestOutlet, list[tuple[int, TokenOutput]]] = {}
        ended: list[tuple[_Ongoing, str | Exception]] = []
        for ongoing, out in outputs:
            if out.error is not None:
                ended.append((ongoing, out.error))
                continue
            ongoing.held.append(out)
            if ongoing.tracked is not None and out.token_id is not None:
                ongoing.tracked.num_output_tokens += 1
            if out.finish_reason is not None:
                ended.append((ongoing, out.finish_reason))
        for ongoing, out in outputs:  # now, as the tokens of a request that one step has given stay together
            if ready := ongoing.ready(out):
                by_outlet.setdefault(ongoing.outlet, []).extend((ongoing.stream, one) for one in ready)
        for outlet, items in by_outlet.items():
            outlet.send(items)
        if ended:
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_end, ended)


def _end(ended: Sequence[tuple[_Ongoing, str | Exception]]) -> None:
    for ongoing, how in ended:
        ongoing.end(how)


class LocalStreams:
    """Streams of this process. Used from one event loop, which is woken once a step for all streams."""

    def __init__(self, requests: ReplicaRequests) -> None:
        self._requests = requests
        self._ids, self._wakes = count(), Wakes()
        self._inboxes: dict[int, Inbox] = {}
        self._left: dict[int, Callable[[str], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """Generate, as `EngineClient.generate` of the gateway."""
        self._loop = asyncio.get_running_loop()
        stream = next(self._ids)
        inbox = self._inboxes[stream] = Inbox(stream, self._wakes)
        call = asyncio.create_task(self._requests.run(request, fit, self, stream))
        call.add_done_callback(lambda done: _pass_on(done, inbox))

        def left(reason: str) -> None:
            del self._inboxes[stream]
            if inbox.has_ended:
                return
            tell = self._left.get(stream)
            if tell is not None:
                tell(reason)
            else:
                call.cancel()  # it has not begun, or is over

        with reading(request, left):
            async for delta in inbox:
                yield delta

    def send(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._put, outputs)

    def watch(self, stream: int, left: Callable[[str], None]) -> None:
        self._left[stream] = left

    def unwatch(self, stream: int) -> None:
        self._left.pop(stream, None)

    def _put(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        for stream, out in outputs:
            inbox = self._inboxes.get(stream)
            if inbox is None:
                continue
            if out.prompt_logprobs is not None:
                inbox.push_prompt(out.prompt_logprobs)
            if out.embedding is not None:
                inbox.push_embedding(out.embedding)
            inbox.push(out.token_id, out.finish_reason, out.num_cached_tokens, out.logprobs)


def _pass_on(call: asyncio.Task[None], inbox: Inbox) -> None:
    error = None if call.cancelled() else call.exception()
    if isinstance(error, Exception):
        inbox.fail(error)
