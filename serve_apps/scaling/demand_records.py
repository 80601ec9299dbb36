"""The demand for a base's adapters, as each gateway leaves it in the cluster for replicas that start.

It is in the cluster's key-value store (Ray's GCS), beside the autoscaler's decisions: so it outlives every process that
knows it, and a replica that starts needs nobody's answer. Each gateway writes a record of its own.
"""

from __future__ import annotations

import zlib

from pydantic import TypeAdapter
from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client  # internal: Ray has no public key-value store

from loray.serving.adapter_demand import DemandRecord, merged
from loray.telemetry import get_logger

_log = get_logger(__name__)

_NAMESPACE = b"loray"
_TIMEOUT_S = 1.0
_OLD_S = 3600.0  # older than the newest: its gateway is gone
_RECORD = TypeAdapter(DemandRecord)


class DemandRecords:
    """Of one deployment of an application. Each call blocks for a second or two at most."""

    def __init__(self, application: str, deployment: str) -> None:
        self._prefix = f"demand/{application}/{deployment}/".encode()
        self._fails = False

    def write(self, gateway: str, record: DemandRecord) -> None:
        """Replaces the gateway's record. A failure is logged once."""
        data = zlib.compress(_RECORD.dump_json(record), 1)
        try:
            internal_kv_get_gcs_client().internal_kv_put(
                self._prefix + gateway.encode(), data, overwrite=True, namespace=_NAMESPACE, timeout=_TIMEOUT_S
            )
            self._fails = False
        except RayError as e:
            if not self._fails:
                _log.warning("the demand for adapters could not be kept for replicas that start: %s", e)
            self._fails = True

    def read(self) -> DemandRecord | None:
        """The demand at all gateways; None if there was none. Removes what gateways have left that are long gone.

        Raises RayError where the GCS does not answer, ValueError where a record is not one.
        """
        gcs = internal_kv_get_gcs_client()
        keys = gcs.internal_kv_keys(self._prefix, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
        found = gcs.internal_kv_multi_get(keys, namespace=_NAMESPACE, timeout=_TIMEOUT_S) if keys else {}
        records = {key: _RECORD.validate_json(zlib.decompress(data)) for key, data in found.items()}
        if not records:
            return None
        newest = max(record.at for record in records.values())
        for key in [key for key, record in records.items() if record.at < newest - _OLD_S]:
            gcs.internal_kv_del(key, del_by_prefix=False, namespace=_NAMESPACE, timeout=_TIMEOUT_S)
        return merged(list(records.values()))
