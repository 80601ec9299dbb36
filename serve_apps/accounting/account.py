"""The account of one request: what it reserved, and at its end what it used."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from loray.errors import RequestError
from loray.serving.quotas import OPEN_ENDED_TOKENS, QuotaGate, Reservation
from loray.spec import Delta, GenerateRequest, Principal, UsageEvent, service_tier
from serve_apps.accounting.books import Books
from serve_apps.accounting.usage import UsageStatus

Sink = Callable[[UsageEvent], None]


@dataclass(slots=True)
class Account:
    """Closed once, however the request ends. `event` is what it used, once it is closed.

    requests     one for each choice; those of one prompt, `num_choices`, follow each other
    received_at  seconds of the monotonic clock
    granted      for how many tokens of each choice there is a reservation
    """

    answer_id: str
    principal: Principal
    base: str
    requests: Sequence[GenerateRequest]
    num_choices: int
    received_at: float
    reservation: Reservation
    granted: list[int]
    sink: Sink | None
    event: UsageEvent | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return self.reservation.headers

    def may_go_on(self, choice: int, num_tokens: int) -> bool:
        """Whether the choice may have more tokens after its first `num_tokens`: what an answer without a limit reserves
        is renewed while there is room.
        """
        while num_tokens >= (granted := self.granted[choice]):
            more = min(OPEN_ENDED_TOKENS, self.requests[choice].params.max_tokens - granted)
            if more <= 0:
                return True
            if not self.reservation.extend(more, time.time()):
                return False
            self.granted[choice] += more
        return True

    def close(self, outcome: str, last: Sequence[Delta | None]) -> UsageEvent:
        """`last`: the last delta of each choice; None: nothing came."""
        if self.event is not None:
            return self.event
        of_prompts = [delta for delta in last[:: _prompt_step(self.requests, self.num_choices)] if delta is not None]
        num_prompt = sum(delta.num_prompt_tokens for delta in of_prompts)
        num_output = sum(delta.num_output_tokens for delta in last if delta is not None)
        first = self.requests[0]
        self.event = UsageEvent(
            request_id=self.answer_id,
            tenant=self.principal.tenant,
            key_id=self.principal.account,
            model=self.base if first.adapter is None else first.adapter.name,
            digest=None if first.adapter is None else first.adapter.digest,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=sum(delta.num_cached_tokens for delta in of_prompts),
            num_output_tokens=num_output,
            tier=service_tier(first.priority),
            seconds=round(time.monotonic() - self.received_at, 6),
            outcome=outcome,
            created_at=datetime.now(UTC),
        )
        self.reservation.settle(num_prompt + num_output, time.time())
        if self.sink is not None:
            self.sink(self.event)
        return self.event


class Accounts:
    """Opens the accounts of a gateway's requests, and keeps its shares of all limits while it runs."""

    def __init__(self, gate: QuotaGate | None = None, books: Books | None = None) -> None:
        """`books` None: what requests use is recorded nowhere, and limits are this process's alone."""
        self._gate = gate or QuotaGate()
        self._books = books

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        if self._books is None:
            yield
            return
        async with self._books.opened(self._gate):
            yield

    @property
    def usage_status(self) -> UsageStatus | None:
        """None where usage is not recorded."""
        return None if self._books is None else self._books.status

    def enter(self, principal: Principal) -> None:
        """Take a request of those of a minute before it is read. Raises RateLimited where none can begin now."""
        self._gate.enter(principal, time.time())

    def charge(self, principal: Principal, num_tokens: float) -> None:
        """Take tokens of those of a minute for what has been tokenised without generating."""
        self._gate.charge(principal, num_tokens, time.time())

    @contextmanager
    def charged_if_refused(self, principal: Principal, num_tokens: int) -> Iterator[None]:
        """Around the checks of what was tokenised: what is tokenised for a wrong request is not free."""
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
    ) -> Account:
        """Reserve prompts, as often as they are computed, and `max_tokens`, of an open-ended request first at most
        OPEN_ENDED_TOKENS. Raises RateLimited.
        """
        most = [request.params.max_tokens for request in requests]
        granted = [min(number, OPEN_ENDED_TOKENS) for number in most] if open_ended else most
        num_prompt = sum(len(request.prompt_ids) for request in requests[:: _prompt_step(requests, num_choices)])
        reservation = self._gate.admit(
            principal,
            num_prompt + sum(granted),
            time.time(),
            num_requests=len(requests) // num_choices - 1,
            num_sequences=len(requests),
        )
        sink = None if self._books is None else self._books.add
        return Account(answer_id, principal, base, requests, num_choices, received_at, reservation, granted, sink)


def _prompt_step(requests: Sequence[GenerateRequest], num_choices: int) -> int:
    """Between two requests whose prompts are computed: the choices of a prompt share it, unless they ask for its
    logprobs, which need all of it.
    """
    return num_choices if requests[0].params.prompt_logprobs is None else 1
