"""The figures of replicas together."""

from __future__ import annotations

from typing import Any

from loray.schemas.status import EngineStatus, ReplicaStatus, total


def test_totals() -> None:
    common: dict[str, Any] = {"replica": "r", "node": "n", "pid": 1, "uptime_s": 1.0}
    one = {"num_running": 1, "blocks": {"free": 2}, "max_adapters_in_step": 3, "num_pool_hits": 3, "num_host_hits": 1}
    two = {"num_running": 2, "blocks": {"free": 1, "kv": 4}, "max_adapters_in_step": 1, "num_misses": 2}
    replicas = tuple(
        ReplicaStatus.model_validate({"replica": str(figures)} | common | figures) for figures in (one, two)
    )
    sums = {"num_running": 3, "blocks": {"free": 3, "kv": 4}, "num_pool_hits": 3, "num_host_hits": 1, "num_misses": 2}
    assert total(replicas) == EngineStatus.model_validate(sums | {"max_adapters_in_step": 3})
    assert total(()) == EngineStatus()
    assert [r.hit_rate for r in replicas] == [0.75, 0.0]  # of requests for adapters
    assert total(replicas).model_dump()["hit_rate"] == 0.5
    assert EngineStatus().hit_rate is None
