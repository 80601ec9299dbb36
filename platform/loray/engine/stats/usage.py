"""What is counted of adapters: totals of hits and loads; and of each adapter how often, when last and for how many
tokens it was used. The usage of an adapter is kept for a while after the engine has dropped the adapter.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from loray.spec import AdapterRef

NUM_KEPT = 10_000  # dropped adapters whose usage is kept; some 15 MB


@dataclass(slots=True)
class AdapterUsage:
    """`last_used_at`: seconds since the epoch. `num_tokens`: of prompt and output, counted as requests end."""

    ref: AdapterRef
    last_used_at: float
    num_uses: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class ResidencyCounts:
    """Totals. Hits and misses are requests, by where their adapter was when they came; a preempted request counts
    once. A load counts when it starts, its bytes (in host memory) when it is complete.

    num_evictions       from the pool; most of these adapters stay on the host
    num_host_evictions  from host memory
    """

    num_pool_hits: int = 0
    num_host_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_loaded_bytes: int = 0
    num_evictions: int = 0
    num_host_evictions: int = 0


class UsageLog:
    """Usage of the adapters that the engine holds, and of the last `num_kept` that it has dropped. For one thread."""

    def __init__(
        self,
        *,
        num_kept: int = NUM_KEPT,
        now: Callable[[], float] = time.time,
        on_forget: Callable[[str], None] = lambda digest: None,
    ) -> None:
        """`on_forget` is called with the digest of each adapter whose usage is forgotten."""
        self._num_kept, self._now, self._on_forget = num_kept, now, on_forget
        self._held: dict[str, AdapterUsage] = {}
        self._dropped: OrderedDict[str, AdapterUsage] = OrderedDict()

    def expected(self, ref: AdapterRef) -> None:
        """The engine holds `ref` from now on, although no request came."""
        usage = self._hold(ref)
        if not usage.num_uses:
            usage.last_used_at = self._now()

    def request_came(self, ref: AdapterRef) -> None:
        """A request for `ref` came; the engine holds `ref` from now on."""
        usage = self._hold(ref)
        usage.ref = ref  # the same bytes may be published under two names: the last one that was requested
        usage.num_uses += 1
        usage.last_used_at = self._now()

    def request_ended(self, ref: AdapterRef, num_tokens: int) -> None:
        """A request for `ref` ended, with or without an error; the engine holds `ref`."""
        usage = self._held[ref.digest]
        usage.num_tokens += num_tokens
        usage.last_used_at = self._now()

    def dropped(self, ref: AdapterRef) -> None:
        """The engine does not hold `ref` any more."""
        self._dropped[ref.digest] = self._held.pop(ref.digest)
        if len(self._dropped) > self._num_kept:
            self._on_forget(self._dropped.popitem(last=False)[0])

    def get(self, digest: str) -> AdapterUsage | None:
        """None for an adapter that was never used, or is forgotten."""
        return self._held.get(digest) or self._dropped.get(digest)

    def all(self) -> list[AdapterUsage]:
        """Held adapters first, then dropped ones, the longest dropped first."""
        return [*self._held.values(), *self._dropped.values()]

    def _hold(self, ref: AdapterRef) -> AdapterUsage:
        usage = self._held.get(ref.digest)
        if usage is None:
            usage = self._dropped.pop(ref.digest, None) or AdapterUsage(ref, 0.0)
            self._held[ref.digest] = usage
        return usage
