"""A canary: a version that gets a share of an alias's requests, and what is counted of it beside the stable version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from loray.spec.fields import Frozen

Percent = Annotated[int, Field(ge=1, le=99)]
CanaryOutcome = Literal["promoted", "moved", "ended", "rolled_back"]


class CanaryBounds(Frozen):
    """Bounds outside of which a canary is ended. Times are compared as ratios of geometric means, which a few requests
    that waited for a load do not move.
    """

    max_error_rate: float | None = Field(default=0.05, ge=0, lt=1, description="failed requests ÷ requests; null: any")
    max_ttft_ratio: float | None = Field(default=2.0, gt=0, description="time to first token ÷ the stable version's")
    max_itl_ratio: float | None = Field(default=2.0, gt=0, description="time between tokens ÷ the stable version's")
    min_requests: int = Field(
        default=50,
        ge=1,
        le=1_000_000,
        description="requests before which times are not compared; the error rate is of so many at least",
    )


class LogMoments(NamedTuple):
    """Number, sum and sum of squares of the logarithms of positive values. Those of several processes add up."""

    num: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, value: float) -> LogMoments:
        log = math.log(value)
        return LogMoments(self.num + 1, self.total + log, self.squares + log * log)

    def __add__(self, other: LogMoments) -> LogMoments:  # type: ignore[override]
        return LogMoments(self.num + other.num, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """The geometric mean of the values. Needs one at least."""
        return math.exp(self.total / self.num)

    @property
    def variance(self) -> float:
        """The squared standard error of the logarithms' mean; infinite for fewer than two values."""
        if self.num < 2:
            return math.inf
        spread = max(0.0, self.squares - self.total * self.total / self.num)
        return spread / (self.num - 1) / self.num


class VersionCounts(NamedTuple):
    """Of one version: requests that were answered or failed, and those that failed; seconds to the first token, and
    between two tokens. What a client did wrong or cancelled is not counted.
    """

    num_requests: int = 0
    num_errors: int = 0
    ttft: LogMoments = LogMoments()
    itl: LogMoments = LogMoments()

    def __add__(self, other: VersionCounts) -> VersionCounts:  # type: ignore[override]
        return VersionCounts(
            self.num_requests + other.num_requests,
            self.num_errors + other.num_errors,
            self.ttft + other.ttft,
            self.itl + other.itl,
        )

    @classmethod
    def of_json(cls, fields: list[Any]) -> VersionCounts:
        num_requests, num_errors, ttft, itl = fields
        return cls(num_requests, num_errors, LogMoments(*ttft), LogMoments(*itl))


class CanaryCounts(NamedTuple):
    """Of the requests that an alias divided: those of its stable version, and of the canary."""

    stable: VersionCounts = VersionCounts()
    canary: VersionCounts = VersionCounts()

    def __add__(self, other: CanaryCounts) -> CanaryCounts:  # type: ignore[override]
        return CanaryCounts(self.stable + other.stable, self.canary + other.canary)

    @classmethod
    def of_json(cls, fields: list[Any]) -> CanaryCounts:
        return cls(*map(VersionCounts.of_json, fields))


@dataclass(frozen=True, slots=True)
class CanaryState:
    """A canary of `alias` beside its version `stable`. `outcome` None: it runs; `reason` is why its bounds ended it."""

    id: int
    alias: str
    stable: int
    version: int
    percent: int
    bounds: CanaryBounds
    counts: CanaryCounts
    created_at: datetime
    ended_at: datetime | None = None
    outcome: CanaryOutcome | None = None
    reason: str | None = None
