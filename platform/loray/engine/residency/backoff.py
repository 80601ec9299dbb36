"""Adapters whose load has failed are not loaded again at once, however many requests come for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from loray.errors import IntegrityError, StoreError, UnsupportedError

_FIRST_S, _LAST_S = 1.0, 60.0
_FIRST_LASTING_S, _LAST_LASTING_S = 60.0, 600.0  # bytes under a digest do not change; a cache's or a store's copy may
_LASTING = (IntegrityError, UnsupportedError)
_NUM_KEPT = 10_000


class _Failure(NamedTuple):
    error: Exception
    num_failures: int
    until: float


class Backoff:
    """By digest: the last error, and until when it stands. The time doubles with every failure that follows.

    A load that fails because the store does is tried again after 1 s, at last after 60 s; one whose bytes are damaged
    or cannot be served after 60 s, at last after 600 s. An adapter that nobody asked for until ten minutes after that
    begins anew. `clock`: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def failed(self, digest: str, error: Exception) -> Exception:
        """The load has failed; returns the error of the requests that wait for it, see `error`."""
        now, last = self._clock(), self._failures.pop(digest, None)
        num_failures = 1 if last is None or now > last.until + _LAST_LASTING_S else last.num_failures + 1
        first, most = (_FIRST_LASTING_S, _LAST_LASTING_S) if isinstance(error, _LASTING) else (_FIRST_S, _LAST_S)
        seconds = min(most, first * 2.0 ** min(num_failures - 1, 16))
        self._failures[digest] = _Failure(error, num_failures, now + seconds)
        if len(self._failures) > _NUM_KEPT:
            self._failures.popitem(last=False)
        return self.error(digest) or error

    def succeeded(self, digest: str) -> None:
        self._failures.pop(digest, None)

    def error(self, digest: str) -> Exception | None:
        """The error of a request that comes now; None if the adapter may be loaded. A StoreError says when to try
        again.
        """
        failure = self._failures.get(digest)
        left = 0.0 if failure is None else failure.until - self._clock()
        if failure is None or left <= 0:
            return None
        if isinstance(failure.error, StoreError):
            error = StoreError(f"{failure.error}; it is tried again in {left:.1f} s", left)
            error.__cause__ = failure.error
            return error
        return failure.error
