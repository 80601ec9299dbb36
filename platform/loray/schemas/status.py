"""The body of GET /status."""

from __future__ import annotations

from typing import Literal

from pydantic import computed_field

from loray.schemas.resources import Resource
from loray.spec import EngineFigures, ServeSpec


class EngineStatus(EngineFigures):
    """The state of engines at one moment, and totals since their start. `blocks` are the pool's, by what they hold;
    hits and misses are requests for an adapter, by where it was when they came.
    """

    @computed_field  # type: ignore[prop-decorator]
    @property
    def hit_rate(self) -> float | None:
        """Share of the requests for an adapter that found it in the pool; None before the first."""
        asked = self.num_pool_hits + self.num_host_hits + self.num_misses
        return self.num_pool_hits / asked if asked else None


class ReplicaStatus(EngineStatus):
    """A replica, with adapters by `name@version`, or by digest where the catalog does not know them any more."""

    replica: str
    base: str = ""
    node: str
    pid: int
    uptime_s: float
    adapters_in_pool: tuple[str, ...] = ()
    adapters_on_host: tuple[str, ...] = ()
    adapters_loading: tuple[str, ...] = ()


class AdapterPlacement(Resource):
    """An adapter in one replica.

    tier          pool, host, loading, failed, or none if the replica no longer holds it
    nbytes        as published
    last_used_at  seconds since the epoch
    num_tokens    prompt and output tokens of the requests that have ended
    """

    replica: str
    node: str
    digest: str
    name: str
    version: int
    nbytes: int
    tier: str
    uses: int
    last_used_at: float
    num_tokens: int


class CatalogStatus(Resource):
    num_adapters: int
    failure: str | None = None


class ScalingDecision(Resource):
    """The number of replicas was changed. `time`: seconds since the epoch."""

    time: float
    from_replicas: int
    to_replicas: int
    reason: str


class AutoscalingStatus(Resource):
    """The number of replicas that the autoscaler wants, with its `reason`. The last decisions, oldest first."""

    target: int
    reason: str
    time: float
    decisions: tuple[ScalingDecision, ...] = ()


Health = Literal["ok", "degraded"]


class BaseStatus(Resource):
    """One base. `degraded`: fewer replicas answer than `target`, which the spec or the autoscaler wants. `asleep`: it
    wants none, since nobody asks; the next request starts one.
    """

    base: str
    status: Literal["ok", "degraded", "asleep"]
    num_replicas: int
    target: int
    num_adapters: int
    spec: ServeSpec
    autoscaling: AutoscalingStatus | None = None


class Status(Resource):
    """A deployment. `degraded`: one of the bases is, or the catalog cannot be read. `replicas` and `totals` are of all
    bases.
    """

    status: Health
    bases: tuple[BaseStatus, ...]
    catalog: CatalogStatus
    replicas: tuple[ReplicaStatus, ...]
    totals: EngineStatus

    @property
    def base_names(self) -> str:
        """The names of the bases, for people."""
        return ", ".join(base.base for base in self.bases)


def total(replicas: tuple[ReplicaStatus, ...]) -> EngineStatus:
    """The sums over all replicas; for `max_adapters_in_step` and `longest_wait_s`, the maximum."""
    sums = {
        name: sum(getattr(r, name) for r in replicas)
        for name, field in EngineStatus.model_fields.items()
        if field.annotation is int
    }
    sums["max_adapters_in_step"] = max((r.max_adapters_in_step for r in replicas), default=0)
    longest = max((r.longest_wait_s for r in replicas), default=0.0)
    states = sorted({state for r in replicas for state in r.blocks})
    return EngineStatus(
        **sums, longest_wait_s=longest, blocks={s: sum(r.blocks.get(s, 0) for r in replicas) for s in states}
    )
