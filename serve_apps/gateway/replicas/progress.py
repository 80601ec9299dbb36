"""How far a request has been answered, so that another replica can go on where one was lost or is leaving."""

from __future__ import annotations

from dataclasses import replace

from loray.errors import ReplicaLeaving, ReplicaLost, ReplicaUnavailable
from loray.spec import GenerateRequest, TokenDelta

ATTEMPTS = 3  # in a row that bring no token


class Progress:
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
        """Of the answer so far."""
        return len(self._output_ids)

    def attempt(self) -> GenerateRequest:
        """The request of the next attempt. Its id is its own, since a replica may still have the last one's."""
        n, request = self._num_attempts, self._request
        self._num_attempts, self._has_brought = n + 1, False
        if n == 0:
            return request
        return replace(request, request_id=f"{request.request_id}-{n}", output_ids=tuple(self._output_ids))

    def took(self, delta: TokenDelta) -> TokenDelta:
        """What came, as the caller gets it. The prompt's cached tokens are those that the first replica found."""
        self._output_ids += delta.token_ids
        self._has_brought, self.num_failed = True, 0
        if self._num_cached_tokens is None:
            self._num_cached_tokens = delta.num_cached_tokens
        return delta._replace(num_cached_tokens=self._num_cached_tokens)

    def failed(self, error: ReplicaUnavailable, replica: str | None) -> None:
        """The attempt has ended with `error` at `replica`, if it came to one. Raises it where that was the last one."""
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
