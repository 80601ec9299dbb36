"""How often a key and a tenant may ask the catalog's API: token buckets in memory, full after a restart."""

from __future__ import annotations

from typing import NamedTuple

from loray.errors import RateLimited
from loray.spec import Principal

KEY_RATE, KEY_BURST = 20.0, 100.0  # requests a second, and at once
TENANT_RATE, TENANT_BURST = 200.0, 400.0
ADVICE_RATE, ADVICE_BURST = 0.5, 30.0  # plans and recommendations of a key
_KEPT = 4096  # buckets; above that, those that are full are forgotten


class _Bucket(NamedTuple):
    level: float
    at: float
    full_at: float


class Rates:
    """Binds keys that are no administrator's. A rotated key keeps its bucket."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, principal: Principal, now: float) -> None:
        """Count a request at `now`, in seconds of any clock. Raises RateLimited, and then counts nothing."""
        if principal.account is None or principal.is_admin:
            return
        key, tenant = (KEY_RATE, KEY_BURST), (TENANT_RATE, TENANT_BURST)
        self._take({f"key {principal.account}": key, f"tenant {principal.tenant}": tenant}, now)

    def take_advice(self, principal: Principal, now: float) -> None:
        """Count a plan or a recommendation. As `take`, which has counted its request."""
        if principal.account is not None and not principal.is_admin:
            self._take({f"for advice, key {principal.account}": (ADVICE_RATE, ADVICE_BURST)}, now)

    def _take(self, limits: dict[str, tuple[float, float]], now: float) -> None:
        levels = {of: self._level(of, *limit, now) for of, limit in limits.items()}
        for of, (rate, _) in limits.items():
            if levels[of] < 1:
                often = f"{rate:g} times a second" if rate >= 1 else f"{60 * rate:g} times a minute"
                raise RateLimited(f"{of} may ask {often}: wait a moment", (1 - levels[of]) / rate)
        for of, (rate, burst) in limits.items():
            level = levels[of] - 1
            self._buckets[of] = _Bucket(level, now, now + (burst - level) / rate)
        if len(self._buckets) > _KEPT:
            self._forget_full(now)

    def _level(self, of: str, rate: float, burst: float, now: float) -> float:
        bucket = self._buckets.get(of)
        return burst if bucket is None else min(burst, bucket.level + rate * (now - bucket.at))

    def _forget_full(self, now: float) -> None:
        self._buckets = {of: bucket for of, bucket in self._buckets.items() if now < bucket.full_at}
