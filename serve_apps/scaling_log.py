"""What the autoscaler decided last, and why: written in Serve's controller, read by gateways on any node.

It lies in the cluster's key-value store (Ray's GCS), where Serve's controller keeps its own state: it can be read from
every node, takes no process or file of its own, and outlives the controller. One writer, one small record for each
deployment.
"""

from __future__ import annotations

from ray.exceptions import RaySystemError, RpcError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from loray.serving.status import AutoscalingStatus, ScalingDecision
from loray.telemetry import get_logger

_log = get_logger(__name__)

KEPT = 20
_NAMESPACE = "loray"


class ScalingLog:
    """Of one deployment of an application. Losing it is told in the log and stops nobody."""

    def __init__(self, application: str, deployment: str) -> None:
        self._key = f"autoscaling/{application}/{deployment}"

    def write(self, *, target: int, reason: str, now: float, decision: ScalingDecision | None = None) -> None:
        """`decision`: where the target has just changed. Blocks for a round trip to the GCS."""
        last = self.read()
        decisions = (() if last is None else last.decisions) + (() if decision is None else (decision,))
        status = AutoscalingStatus(target=target, reason=reason, time=now, decisions=decisions[-KEPT:])
        try:
            _internal_kv_put(self._key, status.model_dump_json(), overwrite=True, namespace=_NAMESPACE)
        except (RpcError, RaySystemError) as e:
            _log.warning("a scaling decision could not be kept for /status: %s", e)

    def read(self) -> AutoscalingStatus | None:
        """None before the first decision, and where the GCS does not answer. Blocks."""
        try:
            raw = _internal_kv_get(self._key, namespace=_NAMESPACE)
            return None if raw is None else AutoscalingStatus.model_validate_json(raw)
        except (RpcError, RaySystemError, ValueError) as e:
            _log.warning("the scaling decisions cannot be read: %s", e)
            return None
