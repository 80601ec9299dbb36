"""How often a key and a tenant may ask the catalog's API: token buckets in memory, full after a restart."""

from __future__ import annotations

from typing import NamedTuple

from loray.errors import RateLimited
from loray.spec import Principal

KEY_RATE, KEY_BURST = 20.0, 100.0  # requests a second, and at once
TENANT_RATE, TENANT_BURST = 200.0, 400.0
_KEPT = 4096  # buckets; above that, those that are full are forgotten


class _Bucket(NamedTuple):
    level: float
    at: float


class Rates:
    """Binds keys that are no administrator's. A rotated key keeps its bucket."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, principal: Principal, now: float) -> None:
        """Count a request at `now`, in seconds of any clock. Raises RateLimited, and then counts nothing."""
        if principal.account is None or principal.is_admin:
            return
        limits = {
            f"key {principal.account}": (KEY_RATE, KEY_BURST),
            f"tenant {principal.tenant}": (TENANT_RATE, TENANT_BURST),
        }
        levels = {of: self._level(of, *limit, now) for of, limit in limits.items()}
        for of, (rate, _) in limits.items():
            if levels[of] < 1:
                raise RateLimited(f"{of} may ask {rate:g} times a second: wait a moment", (1 - levels[of]) / rate)
        for of, level in levels.items():
            self._buckets[of] = _Bucket(level - 1, now)
        if len(self._buckets) > _KEPT:
            self._forget_full(now)

    def _level(self, of: str, rate: float, burst: float, now: float) -> float:
        bucket = self._buckets.get(of)
        return burst if bucket is None else min(burst, bucket.level + rate * (now - bucket.at))

    def _forget_full(self, now: float) -> None:
        longest_s = max(KEY_BURST / KEY_RATE, TENANT_BURST / TENANT_RATE)
        self._buckets = {of: bucket for of, bucket in self._buckets.items() if now - bucket.at < longest_s}
