"""Plans that take long are kept beside the shards: workers and further runs find them there.

First fit looks at one document after the other, in Python: half a minute for ten million. Its plan has 8 bytes a
document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from loray.spec import BatchSpec
from loray.train.data.plans import Indices, Plan, Share, plan_epoch
from loray.train.data.shards import ShardCache

_FORM = 1  # of plans: another one where the same key gives another plan, or is written in another way
_LEAST = 10_000  # documents; fewer are planned in less than a tenth of a second


def kept_plan(
    lengths_D: Indices,
    spec: BatchSpec,
    *,
    max_length: int,
    seed: int,
    epoch: int,
    shares: Sequence[Share] = (),
    cache: ShardCache | None,
) -> Plan:
    """As `plan_epoch`, from `cache` or into it where that is faster."""

    def made() -> Plan:
        return plan_epoch(lengths_D, spec, max_length=max_length, seed=seed, epoch=epoch, shares=shares)

    if cache is None or not _is_slow(len(lengths_D), spec):
        return made()
    named = [_FORM, spec.model_dump(mode="json", exclude={"accumulation"}), max_length, seed, epoch, list(shares)]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(lengths_D, np.int64).data)
    key = digest.hexdigest()
    kept = cache.note(key)
    plan = None if kept is None else _plan_of(kept)
    if plan is None:
        plan = made()
        cache.keep(key, _bytes_of(plan))
    return plan


def plan_ahead(
    lengths_D: Indices,
    spec: BatchSpec,
    *,
    max_length: int,
    seed: int,
    num_epochs: int,
    shares: Sequence[Share] = (),
    cache: ShardCache | None,
) -> None:
    """Put into `cache` the plans of the first epochs that take long, so that no worker makes them."""
    if cache is not None and _is_slow(len(lengths_D), spec):
        for epoch in range(num_epochs):
            kept_plan(lengths_D, spec, max_length=max_length, seed=seed, epoch=epoch, shares=shares, cache=cache)


def _is_slow(num_documents: int, spec: BatchSpec) -> bool:
    return spec.order == "packed" and num_documents >= _LEAST


def _bytes_of(plan: Plan) -> bytes:
    """Three lengths, then the arrays; int64."""
    arrays = (plan.documents_D, plan.ends_R, plan.starts_B, plan.stops_B)
    return np.concatenate([[len(array) for array in arrays[:3]], *arrays]).astype(np.int64).tobytes()


def _plan_of(kept: bytes) -> Plan | None:
    """None where it is not whole."""
    if len(kept) < 24 or len(kept) % 8:
        return None
    found = np.frombuffer(kept, np.int64)
    num_documents, num_rows, num_batches = (int(n) for n in found[:3])
    if len(found) != 3 + num_documents + num_rows + 2 * num_batches:
        return None
    documents_D, ends_R, starts_B, stops_B = np.split(found[3:], np.cumsum([num_documents, num_rows, num_batches]))
    return Plan(documents_D, ends_R, starts_B, stops_B)
