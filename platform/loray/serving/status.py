"""What GET /status says: each replica's engine at this moment, and their sum."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from loray.spec import ServeSpec


class _Status(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class EngineStatus(_Status):
    """A moment's state, and totals since the replica's start. `blocks` are the pool's, by what they hold."""

    num_running: int = 0
    num_waiting: int = 0
    num_loading: int = 0
    blocks: dict[str, int] = {}
    host_bytes: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    max_adapters_in_step: int = 0


class ReplicaStatus(EngineStatus):
    """The adapters by `name@version`, or by digest where the catalog does not know them any more."""

    replica: str
    node: str
    pid: int
    uptime_s: float
    adapters_in_pool: tuple[str, ...] = ()
    adapters_on_host: tuple[str, ...] = ()


class CatalogStatus(_Status):
    num_adapters: int
    failure: str | None = None


class Status(_Status):
    """`degraded`: fewer replicas than asked for, or the catalog cannot be read."""

    status: Literal["ok", "degraded"]
    model: str
    spec: ServeSpec
    catalog: CatalogStatus
    replicas: tuple[ReplicaStatus, ...]
    totals: EngineStatus


def total(replicas: tuple[ReplicaStatus, ...]) -> EngineStatus:
    """Sums; of `max_adapters_in_step` the maximum."""
    sums = {
        name: sum(getattr(r, name) for r in replicas)
        for name, field in EngineStatus.model_fields.items()
        if field.annotation is int
    }
    sums["max_adapters_in_step"] = max((r.max_adapters_in_step for r in replicas), default=0)
    states = sorted({state for r in replicas for state in r.blocks})
    return EngineStatus(**sums, blocks={s: sum(r.blocks.get(s, 0) for r in replicas) for s in states})
