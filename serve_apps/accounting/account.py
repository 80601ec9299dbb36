"""The account of one request: what it reserved, and at its end what it used."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from loray.serving.quotas import OPEN_ENDED_TOKENS, QuotaGate, Reservation
from loray.spec import Delta, GenerateRequest, Principal, UsageEvent, service_tier

Sink = Callable[[UsageEvent], None]


@dataclass(slots=True)
class Account:
    """Closed once, however the request ends. `event` is what it used, once it is closed.

    requests     one for each choice; those of one prompt, `num_choices`, follow each other
    received_at  seconds of the monotonic clock
    """

    answer_id: str
    principal: Principal
    model: str
    requests: Sequence[GenerateRequest]
    num_choices: int
    received_at: float
    reservation: Reservation
    sink: Sink | None
    event: UsageEvent | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return self.reservation.headers

    def close(self, outcome: str, last: Sequence[Delta | None]) -> None:
        """`last`: the last delta of each choice; None: nothing came."""
        if self.event is not None:
            return
        of_prompts = [delta for delta in last[:: self.num_choices] if delta is not None]
        num_prompt = sum(delta.num_prompt_tokens for delta in of_prompts)
        num_output = sum(delta.num_output_tokens for delta in last if delta is not None)
        first = self.requests[0]
        self.event = UsageEvent(
            request_id=self.answer_id,
            tenant=self.principal.tenant,
            key_id=self.principal.key_id,
            model=self.model if first.adapter is None else first.adapter.name,
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


class Accounts:
    """Opens the accounts of a gateway's requests. `sink` takes the usage events; None: nobody wants them."""

    def __init__(self, gate: QuotaGate | None = None, sink: Sink | None = None) -> None:
        self.gate = gate or QuotaGate()
        self._sink = sink

    def check(self, principal: Principal) -> None:
        """Before a request is read. Raises RateLimited where none can begin now."""
        self.gate.check(principal, time.time())

    def open(
        self,
        principal: Principal,
        requests: Sequence[GenerateRequest],
        *,
        answer_id: str,
        model: str,
        num_choices: int,
        received_at: float,
        open_ended: bool,
    ) -> Account:
        """Reserves prompts and `max_tokens`, of an open-ended request at most OPEN_ENDED_TOKENS. Raises RateLimited."""
        num_tokens = sum(len(request.prompt_ids) for request in requests[::num_choices])
        for request in requests:
            most = request.params.max_tokens
            num_tokens += min(most, OPEN_ENDED_TOKENS) if open_ended else most
        reservation = self.gate.admit(principal, num_tokens, time.time())
        return Account(answer_id, principal, model, requests, num_choices, received_at, reservation, self._sink)
