"""Resources of canaries: their share, their bounds, and what was counted of each version."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from loray.api.resources import NoGate, Resource, VersionNumber
from loray.spec import CanaryBounds, CanaryOutcome, CanaryState, LogMoments, Percent, VersionCounts


class CanaryTarget(BaseModel):
    """The version that gets a share of the alias's requests, and `percent` of them."""

    model_config = ConfigDict(extra="forbid")

    version: VersionNumber
    percent: Percent
    bounds: CanaryBounds | None = Field(default=None, description="null: those of the running canary, else defaults")
    no_gate: NoGate = None


class CountsResource(Resource):
    """Of one version. Times are geometric means in seconds; null where none was measured."""

    num_requests: int = Field(description="answered and failed ones, without what a client did wrong or cancelled")
    num_errors: int
    ttft_s: float | None
    itl_s: float | None

    @classmethod
    def of(cls, counts: VersionCounts) -> CountsResource:
        return cls(
            num_requests=counts.num_requests,
            num_errors=counts.num_errors,
            ttft_s=_mean(counts.ttft),
            itl_s=_mean(counts.itl),
        )


class CanaryResource(Resource):
    """A canary. `stable` is the version that the alias points at; `outcome` null: it runs.

    `promoted`: the alias was moved to it; `moved`: to another version; `ended`: by somebody; `rolled_back`: it left its
    bounds, and `reason` says which.
    """

    alias: str
    stable: int
    version: int
    percent: int
    bounds: CanaryBounds
    counts: dict[str, CountsResource] = Field(description="of `stable` and `canary`")
    created_at: datetime
    ended_at: datetime | None
    outcome: CanaryOutcome | None
    reason: str | None

    @classmethod
    def of(cls, state: CanaryState) -> CanaryResource:
        return cls(
            alias=state.alias,
            stable=state.stable,
            version=state.version,
            percent=state.percent,
            bounds=state.bounds,
            counts={arm: CountsResource.of(counts) for arm, counts in state.counts._asdict().items()},
            created_at=state.created_at,
            ended_at=state.ended_at,
            outcome=state.outcome,
            reason=state.reason,
        )


def _mean(moments: LogMoments) -> float | None:
    return round(moments.mean, 6) if moments.num else None
