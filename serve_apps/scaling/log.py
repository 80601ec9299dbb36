"""The autoscaler's last decisions and their reasons: written by Serve's controller, read by gateways on any node.

They are in the cluster's key-value store (Ray's GCS), which every node can read and which needs no process or file.
Each deployment has one writer and one small record. The writer is created with the policy, at every deployment and
every restart of the controller, and begins without decisions, so those of an earlier deployment are not shown.
"""

from __future__ import annotations

from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client  # internal: Ray has no public key-value store

from loray.api.status import AutoscalingStatus, ScalingDecision
from loray.telemetry import get_logger

_log = get_logger(__name__)

KEPT = 20
_NAMESPACE = b"loray"
_TIMEOUT_S = 1.0  # Serve's controller is blocked meanwhile


class ScalingLog:
    """The decisions for one deployment of an application. A failure to read or write them is only logged."""

    def __init__(self, application: str, deployment: str) -> None:
        self._key = f"autoscaling/{application}/{deployment}".encode()
        self._decisions: tuple[ScalingDecision, ...] = ()

    def write(self, *, target: int, reason: str, now: float, decision: ScalingDecision | None = None) -> None:
        """`decision`: if the target has just changed. Blocks for a round trip to the GCS, at most a second."""
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
        """The last record; None if there is none, or if the GCS does not answer. Blocks for at most a second."""
        try:
            raw = internal_kv_get_gcs_client().internal_kv_get(self._key, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
            return None if raw is None else AutoscalingStatus.model_validate_json(raw)
        except (RayError, ValueError) as e:
            _log.warning("the scaling decisions cannot be read: %s", e)
            return None
