"""Accounts of requests: what one reserves and uses. `UsageMeter` opens a `RequestUsage` for each.

`AdmitRequests` is the middleware before it: limits are looked at before a body is read, and tenants' requests begin in
turn (`TenantTurns`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loray.catalog import Catalog
from loray.errors import LorayError, Overloaded, RequestError
from loray.policy.fair_admission import FairAdmission
from loray.policy.quotas import OPEN_ENDED_TOKENS, QuotaGate, Reservation
from loray.settings import DEFAULT_BATCH_FACTOR, Settings
from loray.spec import BATCH_PRIORITY, Delta, GenerateRequest, Principal, UsageEvent, service_tier
from serve_apps.accounting.quotas import QuotaExchange, SharedOwner, follow_owner
from serve_apps.accounting.usage import UsageStatus, UsageWriter
from serve_apps.http import path_of

_START_S = 2.0  # that a start waits to hear what was used before
NOTED_TOKENS = 1024  # of a choice, after which what the request has used is noted again
_ABANDONED = "abandoned"  # the outcome where the gateway was killed
LOOK_S = 0.02  # between two looks how late the event loop is
LONGEST_S = 30.0  # that a request waits for its turn
_LOOP_LATE_S = 0.003  # that the loop may be, in the mean
_RETRY_S = 5.0


@dataclass(slots=True)
class RequestUsage:
    """The account of one request, closed once, however it ends. `event` is what it used, once it is closed. Until then
    the writer has what it is charged with where the gateway is killed.

    requests     one for each choice; those of one prompt, `num_choices`, follow each other
    received_at  seconds of the monotonic clock
    granted      for how many tokens of each choice there is a reservation
    num_prompt_tokens  as often as they are computed
    """

    answer_id: str
    principal: Principal
    base: str
    requests: Sequence[GenerateRequest]
    num_choices: int
    received_at: float
    reservation: Reservation
    granted: list[int]
    num_prompt_tokens: int
    writer: UsageWriter | None
    event: UsageEvent | None = None
    _num_output: list[int] = field(init=False)  # tokens of each choice when it asked last
    _noted: list[int] = field(init=False)  # those of them that the writer knows

    def __post_init__(self) -> None:
        self._num_output, self._noted = [0] * len(self.requests), [0] * len(self.requests)
        self._note()

    @property
    def headers(self) -> Mapping[str, str]:
        return self.reservation.headers

    def asked_again_at(self, choice: int, num_tokens: int) -> int:
        """The number of tokens of the choice at which this is to be asked again; `num_tokens`, those that it has, where
        it may have no more. What an answer without a limit reserves is renewed while there is room.
        """
        self._num_output[choice] = num_tokens
        if num_tokens - self._noted[choice] >= NOTED_TOKENS:
            self._noted = self._num_output.copy()
            self._note()
        due = self._noted[choice] + NOTED_TOKENS
        while num_tokens >= (granted := self.granted[choice]):
            more = min(OPEN_ENDED_TOKENS, self.requests[choice].params.max_tokens - granted)
            if more <= 0:
                return due
            if not self.reservation.extend(more, time.time()):
                return num_tokens
            self.granted[choice] += more
        return min(due, self.granted[choice])

    def close(self, outcome: str, last: Sequence[Delta | None]) -> UsageEvent:
        """Close the account. `last`: the last delta of each choice; None: nothing came."""
        if self.event is not None:
            return self.event
        of_prompts = [delta for delta in last[:: _prompt_step(self.requests, self.num_choices)] if delta is not None]
        num_prompt = sum(delta.num_prompt_tokens for delta in of_prompts)
        num_output = sum(delta.num_output_tokens for delta in last if delta is not None)
        num_cached = sum(delta.num_cached_tokens for delta in of_prompts)
        self.event = self._used(outcome, num_prompt, num_cached, num_output)
        self.reservation.settle(num_prompt + num_output, time.time())
        if self.writer is not None:
            self.writer.add(self.event)
        return self.event

    def _note(self) -> None:
        if self.writer is not None:
            self.writer.note_open(self._used(_ABANDONED, self.num_prompt_tokens, 0, sum(self._num_output)))

    def _used(self, outcome: str, num_prompt: int, num_cached: int, num_output: int) -> UsageEvent:
        first = self.requests[0]
        return UsageEvent(
            request_id=self.answer_id,
            tenant=self.principal.tenant,
            key_id=self.principal.account,
            model=self.base if first.adapter is None else first.adapter.name,
            digest=None if first.adapter is None else first.adapter.digest,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            num_output_tokens=num_output,
            tier=service_tier(first.priority),
            seconds=round(time.monotonic() - self.received_at, 6),
            outcome=outcome,
            created_at=datetime.now(UTC),
        )


class UsageMeter:
    """Opens the accounts of a gateway's requests. While it runs, it records what they used, and shares limits with
    other gateways.

    settings    None: what requests use is recorded nowhere, and limits are this process's alone
    exchange    None: the gateway is the only one, and has the owner of its limits in its process
    is_limited  is set while a key or a tenant has a limit; None: it may always be so
    """

    def __init__(
        self,
        settings: Settings | None = None,
        num_gateways: int = 1,
        exchange: QuotaExchange | None = None,
        is_limited: asyncio.Event | None = None,
    ) -> None:
        self._settings, self._exchange, self._is_limited = settings, exchange, is_limited
        self._batch_factor = DEFAULT_BATCH_FACTOR if settings is None else settings.batch_factor
        self._gate = QuotaGate(num_gateways)
        self._writer: UsageWriter | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        if self._settings is None:
            yield
            return
        self._writer = UsageWriter.of(self._settings)
        async with self._with_owner(partial(Catalog, self._settings.catalog)) as exchange:
            task = asyncio.create_task(follow_owner(self._gate, exchange, self._is_limited))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await asyncio.to_thread(self._writer.close)

    @asynccontextmanager
    async def _with_owner(self, open_catalog: Callable[[], Catalog]) -> AsyncIterator[QuotaExchange]:
        """Open the exchange with the owner of the limits. One of this process begins with what was used before, and is
        told at the end what the gate has admitted since its last exchange.
        """
        if self._exchange is not None:
            yield self._exchange
            return
        owner = SharedOwner(secrets.token_hex(8), 1, open_catalog, batch_factor=self._batch_factor)
        gate = self._gate
        exchange = partial(owner.exchange, "gateway")
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                gate.apply(await exchange(()), time.time())
        try:
            yield exchange
        finally:
            await exchange(gate.reports(time.time()))
            await owner.close()

    @property
    def usage_status(self) -> UsageStatus | None:
        """The state of the writer; None where usage is not recorded."""
        return None if self._writer is None else self._writer.status

    def enter(self, principal: Principal) -> None:
        """Take a request of those of a minute before it is read. Raises RateLimited where none can begin now."""
        self._gate.enter(principal, time.time())

    def charge(self, principal: Principal, num_tokens: float) -> None:
        """Take tokens of those of a minute for what has been tokenised without generating."""
        self._gate.charge(principal, num_tokens, time.time())

    @contextmanager
    def charged_if_refused(self, principal: Principal, num_tokens: int) -> Iterator[None]:
        """Charge what was tokenised if a check in the block refuses it: a wrong request is not free."""
        try:
            yield
        except RequestError:
            self.charge(principal, num_tokens)
            raise

    def open(
        self,
        principal: Principal,
        requests: Sequence[GenerateRequest],
        *,
        answer_id: str,
        base: str,
        num_choices: int,
        received_at: float,
        open_ended: bool,
    ) -> RequestUsage:
        """Reserve prompts, as often as they are computed, and `max_tokens`, of an open-ended request first at most
        OPEN_ENDED_TOKENS. Embeddings that are asked for together count as one request. Raises RateLimited.
        """
        most = [request.params.max_tokens for request in requests]
        granted = [min(number, OPEN_ENDED_TOKENS) for number in most] if open_ended else most
        num_prompt = sum(len(request.prompt_ids) for request in requests[:: _prompt_step(requests, num_choices)])
        num_requests, num_sequences = len(requests) // num_choices, len(requests)
        if requests[0].pooling is not None:
            num_requests = num_sequences = 1
        reservation = self._gate.admit(
            principal,
            num_prompt + sum(granted),
            time.time(),
            num_requests=num_requests - 1,
            num_sequences=num_sequences,
            budget_factor=self._batch_factor if requests[0].priority == BATCH_PRIORITY else 1.0,
        )
        return RequestUsage(
            answer_id,
            principal,
            base,
            requests,
            num_choices,
            received_at,
            reservation,
            granted,
            num_prompt,
            self._writer,
        )


def _prompt_step(requests: Sequence[GenerateRequest], num_choices: int) -> int:
    """Return the distance of requests whose prompts are computed: the choices of a prompt share it, unless they ask for
    its logprobs, which need all of it.
    """
    return num_choices if requests[-1].params.prompt_logprobs is None else 1


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A request that waits."""

    tenant: str
    came: asyncio.Future[None]


class TenantTurns:
    """Lets requests of tenants begin in turn. Used from one event loop."""

    def __init__(self, fair: FairAdmission[Turn] | None = None) -> None:
        self._fair = fair or FairAdmission[Turn]()
        self._looking: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        return self._fair.num_waiting

    async def enter(self, tenant: str) -> None:
        """Return when the request may begin; `leave` follows once. Raises Overloaded if that takes too long."""
        loop = asyncio.get_running_loop()
        turn = Turn(tenant, loop.create_future())
        is_admitted = self._fair.ask(tenant, turn, loop.time())
        if self._fair.is_crowded and self._looking is None:
            self._look_later(loop)
        if is_admitted:
            return
        try:
            async with asyncio.timeout(LONGEST_S):
                await turn.came
        except BaseException as e:
            self._fair.withdraw(tenant, turn)
            if turn.came.done() and not turn.came.cancelled():
                self.leave(tenant)
            if not isinstance(e, TimeoutError):
                raise
            raise Overloaded(
                f"the gateway is busy, and tenant {tenant} has more requests there than others", _RETRY_S
            ) from e

    def tokens_are_late(self, lateness: float) -> None:
        """Take how late tokens are, by what they may be; see `EngineClient.running`."""
        if self._fair.is_crowded:
            self._begin(self._fair.observe(lateness, asyncio.get_running_loop().time()))

    def leave(self, tenant: str) -> None:
        self._begin(self._fair.ended(tenant, asyncio.get_running_loop().time()))

    def _begin(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            if turn.came.cancelled():
                self.leave(turn.tenant)
            else:
                turn.came.set_result(None)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking = loop.call_later(LOOK_S, self._look, loop, loop.time() + LOOK_S)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._begin(self._fair.observe((now - due) / _LOOP_LATE_S, now))
        self._looking = None
        if self._fair.is_crowded:
            self._look_later(loop)


class _Route(NamedTuple):
    path: str


class AdmitRequests:
    """ASGI middleware: a request over its limits gets its refusal, and another one waits for its turn, before its body
    is read. Behind the one that finds out who asks.

    paths    of the requests that generate or tokenise
    refused  the response to an error, in the application's form
    """

    def __init__(
        self,
        app: ASGIApp,
        accounts: UsageMeter,
        turns: TenantTurns,
        paths: Collection[str],
        refused: Callable[[Exception], Response],
    ) -> None:
        self._app, self._accounts, self._turns, self._refused = app, accounts, turns, refused
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] == "http" else None
        if path not in self._paths or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        principal = scope["state"]["principal"]
        assert isinstance(principal, Principal)
        scope["state"]["received_at"] = asyncio.get_running_loop().time()
        try:
            self._accounts.enter(principal)
            await self._turns.enter(principal.tenant)
        except LorayError as e:
            scope["route"] = _Route(path)  # which metrics name
            await self._refused(e)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._turns.leave(principal.tenant)
