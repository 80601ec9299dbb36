"""What is counted of adapters: hits and loads in total; of each one how often, when last and for how many tokens it
was used, which is kept for a while after it has gone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

from loray.spec import AdapterRef

KEPT = 10_000  # adapters that have been let go and are still remembered; some 15 MB


@dataclass(slots=True)
class AdapterUsage:
    """`last_used_at`: seconds since the epoch. `num_tokens`: of prompt and output, counted as requests end."""

    ref: AdapterRef
    last_used_at: float
    num_uses: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class ResidencyCounts:
    """Totals. Hits and misses are requests, by where their adapter was when they asked for it; a preempted request
    asks once. Loads are counted as they start, their bytes (in host memory) as they land.

    evictions       from the pool; most of them stay on the host
    host_evictions  from the host's memory
    """

    pool_hits: int = 0
    host_hits: int = 0
    misses: int = 0
    loads: int = 0
    failed_loads: int = 0
    loaded_bytes: int = 0
    evictions: int = 0
    host_evictions: int = 0

    def stats(self) -> dict[str, int]:
        """Fields of EngineStats."""
        return {f"num_{name}": count for name, count in asdict(self).items()}


class UsageLog:
    """Adapters that the engine holds, and the last `kept` of those it has let go. One thread."""

    def __init__(
        self,
        *,
        kept: int = KEPT,
        now: Callable[[], float] = time.time,
        forgotten: Callable[[str], None] = lambda digest: None,
    ) -> None:
        """`forgotten` is called for each adapter that is not remembered any more."""
        self._kept, self._now, self._forgotten = kept, now, forgotten
        self._held: dict[str, AdapterUsage] = {}
        self._gone: OrderedDict[str, AdapterUsage] = OrderedDict()

    def asked(self, ref: AdapterRef) -> None:
        """A request asked for `ref`, which is held from now on."""
        usage = self._held.get(ref.digest)
        if usage is None:
            usage = self._gone.pop(ref.digest, None) or AdapterUsage(ref, 0.0)
            self._held[ref.digest] = usage
        usage.ref = ref  # the same bytes may be published under two names: the one that was asked for last
        usage.num_uses += 1
        usage.last_used_at = self._now()

    def ended(self, ref: AdapterRef, num_tokens: int) -> None:
        """A request that used `ref` ended, well or badly; `ref` is held."""
        usage = self._held[ref.digest]
        usage.num_tokens += num_tokens
        usage.last_used_at = self._now()

    def let_go(self, ref: AdapterRef) -> None:
        self._gone[ref.digest] = self._held.pop(ref.digest)
        if len(self._gone) > self._kept:
            self._forgotten(self._gone.popitem(last=False)[0])

    def get(self, digest: str) -> AdapterUsage | None:
        """None for an adapter never used, or forgotten."""
        return self._held.get(digest) or self._gone.get(digest)

    def all(self) -> list[AdapterUsage]:
        """Those held first, then those gone, the longest gone first."""
        return [*self._held.values(), *self._gone.values()]
