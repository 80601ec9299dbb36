"""What the autoscaler decided last, and why: written in Serve's controller, read by gateways on any node.

It lies in the cluster's key-value store (Ray's GCS), where Serve's controller keeps its own state: it can be read from
every node, and takes no process or file of its own. One writer, one small record for each deployment. The writer is
made with the policy, so at every deployment and where the controller restarts, and begins without decisions: those of
a deployment that is gone are nobody's.
"""

from __future__ import annotations

from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from loray.api.status import AutoscalingStatus, ScalingDecision
from loray.telemetry import get_logger

_log = get_logger(__name__)

KEPT = 20
_NAMESPACE = b"loray"
_TIMEOUT_S = 1.0  # Serve's controller does nothing else meanwhile


class ScalingLog:
    """Of one deployment of an application. Losing it is told in the log and stops nobody."""

    def __init__(self, application: str, deployment: str) -> None:
        self._key = f"autoscaling/{application}/{deployment}".encode()
        self._decisions: tuple[ScalingDecision, ...] = ()

    def write(self, *, target: int, reason: str, now: float, decision: ScalingDecision | None = None) -> None:
        """`decision`: where the target has just changed. Blocks for a round trip to the GCS, a second at most."""
        if decision is not None:
            self._decisions = (*self._decisions, decision)[-KEPT:]
        status = AutoscalingStatus(target=target, reason=reason, time=now, decisions=self._decisions)
        try:
            internal_kv_get_gcs_client().internal_kv_put(
                self._key, status.model_dump_json().encode(), overwrite=True, namespace=_NAMESPACE, timeout=_TIMEOUT_S
            )
        except RayError as e:
            _log.warning("a scaling decision could not be kept for /status: %s", e)

    def read(self) -> AutoscalingStatus | None:
        """What was written last; None before, and where the GCS does not answer. Blocks, a second at most."""
        try:
            raw = internal_kv_get_gcs_client().internal_kv_get(self._key, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
            return None if raw is None else AutoscalingStatus.model_validate_json(raw)
        except (RayError, ValueError) as e:
            _log.warning("the scaling decisions cannot be read: %s", e)
            return None
