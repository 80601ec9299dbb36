"""Warm starts: a replica loads the adapters that are going to be asked of it before Serve sends it requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from loray.serving.warm_start import expected
from loray.telemetry import get_logger
from serve_apps.replica.metrics import WarmStart
from serve_apps.scaling.demand_records import DemandRecords

if TYPE_CHECKING:
    from loray.engine.stream import EngineStream

_log = get_logger(__name__)

_ALONE = 0.2  # of the time, where no other replica takes requests, which wait meanwhile


def warm_up(
    stream: EngineStream,
    records: DemandRecords,
    own: str,
    fingerprint: str,
    timeout_s: float,
    told: Callable[[str, tuple[str, ...]], None] = lambda digest, holders: None,
) -> WarmStart:
    """Loads what is expected of the replica `own`, whose base has this fingerprint. Blocks for `timeout_s` at most, and
    a call of the cluster. Does not raise: a replica that could not load anything starts as well.

    `told` gets who has an adapter before it is loaded, see `ReplicaPeers`.
    """
    began = time.monotonic()
    try:
        record = records.read()
        if record is None:
            return WarmStart()
        wanted = [demand for demand in expected(record, own) if demand.ref.base_fingerprint == fingerprint]
        for demand in wanted:
            told(demand.ref.digest, demand.holders)
        left_s = timeout_s * (1.0 if record.replicas else _ALONE) - (time.monotonic() - began)
        loaded = stream.prefetch([demand.ref for demand in wanted], left_s)
    except Exception:  # noqa: BLE001 - it only makes the first requests faster
        _log.warning("the replica starts without adapters", exc_info=True)
        return WarmStart(seconds=time.monotonic() - began)
    seconds = time.monotonic() - began
    _log.info(
        "warm start: of %d adapters in demand, %d are expected here; after %.2f s %d are in the pool, %d on the host, "
        "%d failed, %d are late",
        len(record.adapters),
        len(wanted),
        seconds,
        *loaded,
    )
    return WarmStart(loaded, seconds)
