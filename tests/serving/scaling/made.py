"""Made-up adapters and reports."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from loray.policy.demand import Observation
from loray.policy.routing import routing_key
from loray.spec import AdapterRef

MIB = 1 << 20


def adapter(number: int, nbytes: int = MIB) -> AdapterRef:
    return AdapterRef(
        digest=sha256(str(number).encode()).hexdigest(),
        name=f"a{number}",
        version=1,
        method="lora",
        base_fingerprint="0" * 64,
        context_length=512,
        nbytes=nbytes,
    )


def observation(numbers: Iterable[int] = (), **fields: Any) -> Observation:
    """The report of an old, idle replica with a pool of 10 MiB, and with adapters of 1 MiB by number."""
    known: dict[str, Any] = {
        "age_s": 1000.0,
        "tokens": 0.0,
        "capacity": None,
        "occupied_s": 0.0,
        "kv_byte_s": 0.0,
        "pool_bytes": 10.0 * MIB,
        "backlog": 0.0,
        "adapters": {routing_key(adapter(n).digest): float(MIB) for n in numbers},
    }
    return Observation(**known | fields)
