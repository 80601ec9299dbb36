"""The account of one request: what it reserved, and at its end what it used."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from loray.errors import RequestError
from loray.serving.quotas import OPEN_ENDED_TOKENS, QuotaGate, Reservation
from loray.spec import Delta, GenerateRequest, Principal, UsageEvent, service_tier
from serve_apps.accounting.books import Books
from serve_apps.accounting.usage import UsageStatus

NOTED_TOKENS = 1024  # of a choice, after which what the request has used is noted again
_ABANDONED = "abandoned"  # the outcome where the gateway was killed


@dataclass(slots=True)
class Account:
    """Closed once, however the request ends. `event` is what it used, once it is closed. Until then the books have a
    note of what it is charged with where the gateway is killed.

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
    books: Books | None
    event: UsageEvent | None = None
    _num_output: list[int] = field(init=False)  # tokens of each choice
    _noted: list[int] = field(init=False)  # those of them that the books know

    def __post_init__(self) -> None:
        self._num_output, self._noted = [0] * len(self.requests), [0] * len(self.requests)
        self._note()

    @property
    def headers(self) -> Mapping[str, str]:
        return self.reservation.headers

    def may_go_on(self, choice: int, num_tokens: int) -> bool:
        """Whether the choice may have more tokens after its first `num_tokens`: what an answer without a limit reserves
        is renewed while there is room.
        """
        self._num_output[choice] = num_tokens
        if num_tokens - self._noted[choice] >= NOTED_TOKENS:
            self._noted = self._num_output.copy()
            self._note()
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
        num_cached = sum(delta.num_cached_tokens for delta in of_prompts)
        self.event = self._used(outcome, num_prompt, num_cached, num_output)
        self.reservation.settle(num_prompt + num_output, time.time())
        if self.books is not None:
            self.books.add(self.event)
        return self.event

    def _note(self) -> None:
        if self.books is not None:
            self.books.note_open(self._used(_ABANDONED, self.num_prompt_tokens, 0, sum(self._num_output)))

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
        return Account(
            answer_id,
            principal,
            base,
            requests,
            num_choices,
            received_at,
            reservation,
            granted,
            num_prompt,
            self._books,
        )


def _prompt_step(requests: Sequence[GenerateRequest], num_choices: int) -> int:
    """Between two requests whose prompts are computed: the choices of a prompt share it, unless they ask for its
    logprobs, which need all of it.
    """
    return num_choices if requests[0].params.prompt_logprobs is None else 1
