"""Who waits for a first token that what others have in the engine should not delay."""

from __future__ import annotations

import threading
from collections import Counter


class FirstTokens:
    """Requests without a token whose tenant has no more than its equal part of what is in the engine, while others have
    something there as well. From any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: dict[str, str] = {}  # by request
        self._num: Counter[str] = Counter()  # requests, by tenant
        self._waiting: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def came(self, request_id: str, tenant: str) -> None:
        with self._lock:
            self._tenants[request_id] = tenant
            self._num[tenant] += 1
            if len(self._num) > 1 and self._num[tenant] * len(self._num) <= len(self._tenants):
                self._waiting.add(request_id)

    def has_token(self, request_id: str) -> None:
        self._waiting.discard(request_id)

    def ended(self, request_id: str) -> None:
        """Does nothing for one that is not known."""
        with self._lock:
            self._waiting.discard(request_id)
            tenant = self._tenants.pop(request_id, None)
            if tenant is not None:
                self._num[tenant] -= 1
                if not self._num[tenant]:
                    del self._num[tenant]
