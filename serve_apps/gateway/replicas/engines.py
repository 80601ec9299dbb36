"""The engines of a base behind a Serve handle: calls of its replicas, and answers that survive a replica.

`ServeEngineClient` makes attempts of a request (`Call`) until its answer is whole (`ResumableAnswer`). Beside that it
moves the streams of replicas that are leaving (`DrainingReplicas`), reports demand for replicas that start
(`DemandReporter`), and asks all replicas at once (`Broadcast`).
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from ssl import SSLContext
from typing import Any

from prometheus_client.core import Metric as Family
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loray.catalog import Catalog
from loray.encryption import server_context
from loray.errors import (
    BaseStarting,
    EngineError,
    EngineStopped,
    LorayError,
    Overloaded,
    ReplicaLeaving,
    ReplicaLost,
    ReplicaUnavailable,
)
from loray.policy.warm_start import AdapterDemand, DemandMemory, DemandRecord
from loray.schemas.status import AutoscalingStatus, ReplicaStatus
from loray.spec import AdapterRef, GenerateRequest, ServeSpec, TokenDelta, engine_of
from loray.telemetry import get_logger
from serve_apps.channel.inbox import Inbox, reading
from serve_apps.channel.listener import Listener, RecentLeast
from serve_apps.gateway.replicas import router
from serve_apps.gateway.replicas.quarantine import SharedQuarantine
from serve_apps.scaling import DemandRecords, ScalingLog

ATTEMPTS = 3  # in a row that bring no token
_BACKOFF_S = 0.2
_STATS_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 1.0  # the timeout of Kubernetes' probes
_NO_REPLICA_S = 30.0  # usually longer than Serve needs to replace a replica
_STARTING_S = 10.0  # after which a client tries again while a replica starts
_MOST_TOGETHER = 8  # requests of one call: a router chooses one replica for all
_REAP_S = 10.0  # for a call whose stream has ended
_ASK_S = 1.0  # between looks for replicas that do not report yet
_DRAIN_LOOK_S = 0.5  # between looks for replicas that are leaving
_DEMAND_LOOK_S = 1.0
_DEMAND_WRITE_S = 5.0  # between two records, unless the replicas change or a request waits for the first one
_REPLICA_LOST = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)

_log = get_logger(__name__)


class Broadcast:
    """Asks every replica of a deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="broadcast")

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """Call `method` of every replica. Returns each result or exception; nothing if there are no replicas.

        It runs in a thread: if one replica does not answer, only Serve's blocking call returns the others' results.
        """
        call = partial(
            self._handle.broadcast(method, *args).results, timeout_s=_STATS_TIMEOUT_S, return_exceptions=True
        )
        try:
            return list(await asyncio.get_running_loop().run_in_executor(self._threads, call))
        except (TimeoutError, DeploymentUnavailableError):
            return []

    async def metrics(self) -> list[list[Family] | None]:
        return [a if isinstance(a, list) else None for a in await self.ask("metrics")]

    async def healthy(self) -> bool:
        """Return at the first replica that is healthy."""
        checks: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                # Private: Serve's public `results` waits for every replica.
                answers = await self._handle.broadcast("check_health")._fetch_replica_results_async()
                checks = [asyncio.ensure_future(answer.get_async()) for answer in answers]
                for checked in asyncio.as_completed(checks):
                    with suppress(Exception):
                        await checked
                        return True
        except (TimeoutError, DeploymentUnavailableError):
            pass
        finally:
            for future in checks:
                future.cancel()
            await asyncio.gather(*checks, return_exceptions=True)
        return False

    async def autoscaling(self) -> AutoscalingStatus | None:
        log = ScalingLog(self._handle.deployment_id.app_name, self._handle.deployment_id.name)
        return await asyncio.get_running_loop().run_in_executor(self._threads, log.read)


class Call:
    """Follows a call of a replica, whose error becomes that of its inboxes. Used from one event loop.

    The requests that join in one pass of the loop have one call, which the next pass sends if nobody does before.

    send          makes the call for requests, each with its stream
    cold_start_s  how long it waits for a replica to be started; None: replicas run, and one will take it soon. It is
                  asked at the beginning and, since the last replica may stop in between, when none has taken the call
                  in time
    """

    def __init__(
        self,
        send: Callable[[Sequence[tuple[GenerateRequest, int]]], DeploymentResponseGenerator[Any]],
        listener: Listener,
        cold_start_s: Callable[[], float | None],
    ) -> None:
        self._send, self._listener, self._cold_start_s = send, listener, cold_start_s
        self._requests: dict[Inbox, GenerateRequest] = {}  # those that are read
        self._response: DeploymentResponseGenerator[Any] | None = None
        self._all_told = True  # that have left
        self._task = asyncio.create_task(self._follow())

    def takes(self, request: GenerateRequest) -> bool:
        """Tell whether the request may join those that are here, which are not sent yet. They are samples of one
        `SampleCall`, which an error of any of them ends: their prompt is one object.
        """
        is_sent = self._response is not None or self._task.done()
        if is_sent or not 0 < len(self._requests) < _MOST_TOGETHER:
            return False
        one = next(iter(self._requests.values()))
        return request.prompt_ids is one.prompt_ids and request.adapter == one.adapter

    def join(self, request: GenerateRequest, inbox: Inbox) -> None:
        self._requests[inbox] = request

    def send(self) -> None:
        """Send the requests now."""
        self._response = self._send([(request, inbox.stream) for inbox, request in self._requests.items()])

    def leave(self, inbox: Inbox, reason: str) -> None:
        """Say that nobody reads the stream any more. A request of which tokens come still ends: "stop" or "abort"."""
        del self._requests[inbox]
        self._all_told &= self._listener.forget(inbox, reason)
        if self._requests or self._task.done():
            return
        if self._all_told:
            timer = asyncio.get_running_loop().call_later(_REAP_S, self._cancel)
            self._task.add_done_callback(lambda _: timer.cancel())
        else:
            self._cancel()

    def _cancel(self) -> None:
        self._give_back()
        self._task.cancel()

    def _give_back(self) -> None:
        """Serve keeps a call until its end has been read or it has been cancelled.

        `_replica_result_future` is private: what is accepted in this turn of the loop, Serve's own `cancel` leaves out.
        """
        if self._response is None:
            return
        accepted = self._response._replica_result_future
        if not accepted.done():
            self._response.cancel()
        elif not accepted.cancelled() and accepted.exception() is None:
            accepted.result().cancel()

    async def _follow(self) -> None:
        try:
            if self._response is None:
                self.send()
            assert self._response is not None
            await _accepted(self._response, self._cold_start_s)
            connection = None
            async for name in self._response:
                connection = str(name)
            for inbox in self._requests:
                self._listener.returned(inbox, connection or "")
        except (asyncio.CancelledError, RequestCancelledError):
            self._fail(EngineError("the request was cancelled"))
            raise
        except Exception as e:  # noqa: BLE001 - the inboxes' readers get it
            self._fail(_translated(e))

    def _fail(self, error: Exception) -> None:
        for inbox in self._requests:
            inbox.fail(error)
        self._give_back()


async def _accepted(response: DeploymentResponseGenerator[Any], cold_start_s: Callable[[], float | None]) -> None:
    """Wait until a replica accepts the request. EngineError after a time, without which Serve would wait for ever."""
    began, limit_s = asyncio.get_running_loop().time(), cold_start_s()

    def look_again() -> None:
        nonlocal limit_s
        limit_s = cold_start_s()
        limit.reschedule(began + (limit_s or 0.0))

    limit = asyncio.timeout(limit_s)
    timer = None if limit_s is not None else asyncio.get_running_loop().call_later(_NO_REPLICA_S, look_again)
    try:
        async with limit:
            await response._fetch_future_result_async()  # private: no public call returns when a request is accepted
    except TimeoutError as e:
        if limit_s is not None:
            raise BaseStarting(
                f"the base had no replica, and the one that is being started was not ready after {limit_s:g} s; "
                "send the request again",
                retry_after_s=_STARTING_S,
            ) from e
        raise EngineError("no replica takes requests; `loray status` says why") from e
    finally:
        if timer is not None:
            timer.cancel()


def _translated(error: Exception) -> Exception:
    """Ray wraps what the replica raised into an exception of both classes."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LorayError):
            return cause
        return cause if isinstance(cause, Exception) else error
    translated: Exception = error
    if isinstance(error, _REPLICA_LOST):
        translated = ReplicaLost("the replica that served this request was lost; send it again")
    elif isinstance(error, DeploymentUnavailableError):
        translated = ReplicaUnavailable("no replica is running; `loray status` says why")
    elif isinstance(error, BackPressureError):
        translated = Overloaded("too many requests wait for a replica; try again later", retry_after_s=1.0)
    if translated is not error:
        translated.__cause__ = error
    return translated


class DemandReporter:
    """Reports the demand for a base's adapters at the gateway `name`. Used from one event loop."""

    def __init__(self, records: DemandRecords, name: str, deployment: str) -> None:
        self._records, self._name, self._deployment = records, name, deployment
        self._memory = DemandMemory()
        self._has_news = False
        self._written_at = float("-inf")
        self._replicas: frozenset[str] = frozenset()  # as written last

    def came(self, ref: AdapterRef) -> None:
        """Count a request for an adapter."""
        self._memory.came(ref, time.time())
        self._has_news = True

    async def run(self) -> None:
        """Write until it is cancelled."""
        while True:
            await asyncio.sleep(_DEMAND_LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Write if there is something to be written now."""
        now, replicas = time.monotonic(), router.replicas(self._deployment)
        is_due = self._has_news and (now - self._written_at >= _DEMAND_WRITE_S or not replicas)
        if not is_due and replicas == self._replicas:
            return
        self._has_news, self._written_at, self._replicas = False, now, replicas
        if most := self._memory.most(time.time()):
            await asyncio.to_thread(self._write, most, replicas)

    def _write(self, most: Sequence[AdapterDemand], replicas: frozenset[str]) -> None:
        self._records.write(self._name, DemandRecord(time.time(), tuple(sorted(replicas)), tuple(most)))


class DrainingReplicas:
    """Serve tells routers at once that a replica is removed, by an update or by scaling, and the replica nothing: it
    takes no new requests and ends when it has none.
    """

    def __init__(self, grace_s: float) -> None:
        """`grace_s`: seconds for its requests to end by themselves."""
        self._grace_s = grace_s
        self._since: dict[str, float] = {}

    def due(self, busy: Collection[str | None], running: Collection[str], now: float) -> frozenset[str]:
        """Choose those of `busy`, which have requests, whose requests go elsewhere now; none while none is `running`.

        `now`: seconds of one clock.
        """
        gone = {name for name in busy if name is not None and name not in running}
        self._since = {name: self._since.get(name, now) for name in gone}
        if not running:
            return frozenset()
        return frozenset(name for name, since in self._since.items() if now - since >= self._grace_s)


class ResumableAnswer:
    """The attempts of one request. Each goes on after the tokens that the earlier ones have brought.

    An answer that has begun survives `max_resumes` replicas, so that a request that kills replicas stops there. A
    replica counts once: routers may send the next attempt to it before they know that it is gone. One that is leaving
    does not count.
    """

    def __init__(self, request: GenerateRequest, max_resumes: int) -> None:
        self._request = request
        self._num_resumes_left = max_resumes
        self._output_ids: list[int] = []
        self._num_cached_tokens: int | None = None
        self._lost: set[str] = set()
        self._num_attempts = 0
        self._has_brought = False  # the attempt under way, a token
        self.num_failed = 0  # attempts in a row that brought no token

    @property
    def num_tokens(self) -> int:
        """The tokens of the answer so far."""
        return len(self._output_ids)

    def attempt(self) -> GenerateRequest:
        """Return the request of the next attempt. Its id is its own, since a replica may still have the last one's."""
        n, request = self._num_attempts, self._request
        self._num_attempts, self._has_brought = n + 1, False
        if n == 0:
            return request
        return replace(request, request_id=f"{request.request_id}-{n}", output_ids=tuple(self._output_ids))

    def took(self, delta: TokenDelta) -> TokenDelta:
        """Return what came as the caller gets it. The prompt's cached tokens are those that the first replica found."""
        self._output_ids += delta.token_ids
        self._has_brought, self.num_failed = True, 0
        if self._num_cached_tokens is None:
            self._num_cached_tokens = delta.num_cached_tokens
        return delta._replace(num_cached_tokens=self._num_cached_tokens)

    def failed(self, error: ReplicaUnavailable, replica: str | None) -> None:
        """Count an attempt that ended with `error` at `replica`, if it came to one. Raises it where it was the last."""
        is_leaving = isinstance(error, ReplicaLeaving)
        is_another = isinstance(error, ReplicaLost) and replica is not None and replica not in self._lost
        if replica is not None:
            self._lost.add(replica)
        if is_leaving:
            return
        if self._has_brought or (self._output_ids and is_another):
            if self._num_resumes_left == 0:
                raise error
            self._num_resumes_left -= 1
            return
        self.num_failed += 1
        if self.num_failed == ATTEMPTS:
            raise error


class ServeEngineClient:
    """Implements `serve_apps.gateway.bases.EngineClient` with the replicas of one base. Used from one event loop.

    handle        handle of the base's deployment
    node, host    Ray's id and the address of this process' node
    open_catalog  see `SharedQuarantine`
    demand        is told of each request for an adapter
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        spec: ServeSpec,
        node: str,
        host: str,
        open_catalog: Callable[[], Catalog] | None = None,
        demand: DemandReporter | None = None,
    ) -> None:
        self._calls = handle.options(stream=True)
        self._replicas = Broadcast(handle)
        self._spec, self._deployment, self._place = spec, engine_of(spec.base), (node, host)
        self._tls = server_context(os.environ)  # here, so that a wrong setting fails the gateway and no request
        self._listener: asyncio.Task[Listener] | None = None
        self._tell_late: Callable[[float], None] = lambda _: None
        self._shortest = RecentLeast()  # time to a first token
        self._quarantine = SharedQuarantine(open_catalog)
        self._draining = DrainingReplicas(spec.drain_grace_s)
        self._demand = demand
        self._reading: dict[str, Inbox] = {}  # by request
        self._together: Call | None = None  # the last one of requests along which nobody reads
        self._cold: set[str] = set()  # requests that wait, and no replica runs
        self._start_failed = False  # and no replica has run since
        self._resumes = {"lost": 0, "moved": 0}

    @asynccontextmanager
    async def running(self, late: Callable[[float], None]) -> AsyncIterator[None]:
        """Have the replicas report meanwhile which adapters they hold, also those that this gateway sends nothing, and
        the requests of replicas that are leaving go elsewhere.
        """
        self._tell_late = late
        works = [self._ask_for_reports(), self._watch_draining()]
        if self._demand is not None:
            works.append(self._demand.run())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_for_reports(self) -> None:
        is_first = True
        while True:
            try:
                listener = await self._listening()
                if is_first or router.replicas(self._deployment) - listener.replicas():
                    is_first = False
                    await self._replicas.ask("report_to", listener.address)
            except Exception as e:  # noqa: BLE001 - without reports requests are routed by hash
                _log.warning("the replicas could not be asked to report: %s", e)
            await asyncio.sleep(_ASK_S)

    def _late(self, seconds: float) -> None:
        if self._shortest.value < math.inf:
            self._tell_late(seconds / (self._spec.max_token_lateness * self._shortest.value))

    async def _watch_draining(self) -> None:
        while True:
            self._move_streams(time.monotonic())
            self._start_failed = self.start_failed()
            await asyncio.sleep(_DRAIN_LOOK_S)

    def _move_streams(self, now: float) -> None:
        """End the streams of replicas that are leaving; `generate` goes on elsewhere."""
        places = {name: router.own.replica_of(name) for name in self._reading}
        due = self._draining.due(places.values(), router.replicas(self._deployment), now)
        for name, replica in places.items():
            if replica in due:
                self._reading[name].fail(ReplicaLeaving("the replica is leaving; send the request again", replica))

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """Generate, as `EngineClient.generate`. If its replica is lost or is leaving, another one goes on after the
        tokens that have come, see `ResumableAnswer`.

        Any other error would be the same on every replica. Raises AdapterQuarantined where the adapter seems to kill
        replicas.
        """
        if self._demand is not None and request.adapter is not None and not request.adapter.is_ephemeral:
            self._demand.came(request.adapter)
        progress = ResumableAnswer(request, self._spec.max_resumes)
        while True:
            attempt = progress.attempt()
            try:
                async with aclosing(self._attempt(attempt, fit)) as deltas:
                    async for delta in deltas:
                        yield progress.took(delta)
                return
            except ReplicaUnavailable as e:
                self._failed(progress, attempt, e)
                if not isinstance(e, ReplicaLeaving):
                    await asyncio.sleep(_BACKOFF_S * 2 ** max(0, progress.num_failed - 1))

    def _failed(self, progress: ResumableAnswer, attempt: GenerateRequest, error: ReplicaUnavailable) -> None:
        """Raise `error` unless another attempt follows."""
        if error.replica is not None:
            router.suspect(error.replica)
        progress.failed(error, error.replica)
        if progress.num_tokens > len(attempt.output_ids):
            self._resumes["moved" if isinstance(error, ReplicaLeaving) else "lost"] += 1
        request_id, so_far = attempt.request_id, progress.num_tokens
        _log.warning("request %s goes on elsewhere after %d tokens: %s", request_id, so_far, error)

    async def _attempt(self, request: GenerateRequest, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        ref, has_begun = request.adapter, False
        digest = None if ref is None else ref.digest
        began_at = time.monotonic()
        if ref is not None:
            await self._quarantine.enter(request.request_id, ref.digest, is_ephemeral=ref.is_ephemeral)
        try:
            listener = await self._listening()
            inbox = self._reading[request.request_id] = listener.open()
            router.own.begin(request.request_id)
            call = self._call(request, fit, listener, inbox)
            with reading(request, partial(call.leave, inbox)):
                async for delta in inbox:
                    if not has_begun:
                        has_begun, now = True, time.monotonic()
                        self._shortest.add(now - began_at, now)
                        router.own.answered(request.request_id)
                    if digest is not None:
                        self._quarantine.answered(digest)
                        digest = None
                    yield delta
        except BaseStarting:
            self._start_failed = True
            raise
        except ReplicaLost as e:
            e.replica = e.replica or router.own.replica_of(request.request_id)
            await self._died(request, e.replica)
            raise
        except EngineStopped as e:  # another replica's might stop of this request as well
            await self._died(request, router.own.replica_of(request.request_id), e.adapters)
            raise
        finally:
            self._reading.pop(request.request_id, None)
            self._cold.discard(request.request_id)
            self._quarantine.leave(request.request_id)
            router.own.end(request.request_id)

    def _call(self, request: GenerateRequest, fit: bool, listener: Listener, inbox: Inbox) -> Call:
        """Send the request; where nobody reads along, with other samples of its call that begin in this pass."""
        is_alone = fit or request.output_kind == "delta" or bool(request.output_ids)
        call = None if is_alone else self._together
        if call is None or not call.takes(request):
            send, cold_start_s = partial(self._send, fit, listener), partial(self._cold_start_s, request.request_id)
            call = Call(send, listener, cold_start_s)
        call.join(request, inbox)
        if is_alone:
            call.send()
        else:
            self._together = call
        return call

    def _send(
        self, fit: bool, listener: Listener, requests: Sequence[tuple[GenerateRequest, int]]
    ) -> DeploymentResponseGenerator[Any]:
        (request, stream), *others = requests
        return self._calls.generate_to.remote(request, fit, listener.address, stream, others)

    async def _died(self, request: GenerateRequest, replica: str | None, among: Collection[str] | None = None) -> None:
        if replica is not None and not (request.adapter is not None and request.adapter.is_ephemeral):
            is_held = partial(router.is_held, self._deployment, replica)
            await self._quarantine.died(request.request_id, replica, router.own.replica_of, is_held, among)

    def _cold_start_s(self, request_id: str) -> float | None:
        """Say how long this request, which waits now, waits for a replica to be started; None: one runs."""
        if not self.is_cold():
            return None
        self._cold.add(request_id)
        return self._spec.cold_start_timeout_s

    async def _listening(self) -> Listener:
        if self._listener is None or (self._listener.done() and self._listener.exception() is not None):
            self._listener = asyncio.create_task(_started(*self._place, self._tls, self._late))
        return await asyncio.shield(self._listener)

    async def close(self) -> None:
        """End all streams."""
        if self._listener is not None:
            await (await self._listening()).close()
        await self._quarantine.close()

    async def healthy(self) -> bool:
        return await self._replicas.healthy()

    def is_cold(self) -> bool:
        return not self._spec.min_replicas and not router.replicas(self._deployment)

    def start_failed(self) -> bool:
        return self._start_failed and self.is_cold()

    async def stats(self) -> list[ReplicaStatus]:
        return [a for a in await self._replicas.ask("stats") if isinstance(a, ReplicaStatus)]

    async def retire(self, digests: Collection[str]) -> None:
        await self._replicas.ask("retire", tuple(digests))

    async def metrics(self) -> list[list[Family] | None]:
        return await self._replicas.metrics()

    async def autoscaling(self) -> AutoscalingStatus | None:
        found = await self._replicas.autoscaling()
        if found is None or found.target or not (self._cold and self.is_cold()):
            return found
        # Serve starts a replica by itself, and asks its policy again when it runs.
        return found.model_copy(update={"target": 1, "reason": "a request waits and a replica starts"})

    def routing_decisions(self) -> Mapping[str, int]:
        return router.decisions(self._deployment)

    def resumes(self) -> Mapping[str, int]:
        return self._resumes


async def _started(node: str, host: str, tls: SSLContext | None, late: Callable[[float], None]) -> Listener:
    listener = Listener(router.reports, late)
    await listener.start(node, host, tls)
    return listener


class ServeGateways(Broadcast):
    """Implements `serve_apps.gateway.bases.Gateways`. `handle` is that of the gateways' own deployment."""

    def __init__(self, handle: DeploymentHandle[Any], name: str) -> None:
        super().__init__(handle)
        self.name = name
