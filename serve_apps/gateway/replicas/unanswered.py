"""Prompts that this gateway has sent to replicas and whose first tokens have not come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

_FORGOTTEN_S = 300.0  # after which a prompt does not count: its call was cancelled at a moment at which nobody said so


class _Sent(NamedTuple):
    replica: str
    num_tokens: int
    at: float


class UnansweredPrompts:
    """Of all replicas. Routers and the gateway use it, in threads of their own. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._sent: dict[str, _Sent] = {}  # by request, the oldest first
        self._tokens: Counter[str] = Counter()  # by replica; none is zero

    def of(self, replica: str) -> int:
        """Tokens."""
        return self._tokens.get(replica, 0)

    def sent(self, request_id: str, replica: str, num_tokens: int) -> None:
        now = self._clock()
        with self._lock:
            self._drop(request_id)
            while self._sent and (oldest := next(iter(self._sent.items())))[1].at <= now - _FORGOTTEN_S:
                self._drop(oldest[0])
            self._sent[request_id] = _Sent(replica, num_tokens, now)
            self._tokens[replica] += num_tokens

    def answered(self, request_id: str) -> None:
        """Its first token has come, or it has ended. Nothing happens if it was not sent."""
        with self._lock:
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._tokens[sent.replica] -= sent.num_tokens
            if not self._tokens[sent.replica]:
                del self._tokens[sent.replica]
