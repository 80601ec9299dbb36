"""The plan of many rows is a file beside the shards, which the workers of a machine map into memory.

First fit looks at one document after the other, in Python: half a minute for ten million. So plans of packed rows are
where all machines and further runs find them. Other plans are faster made than sent: each machine has its own, which
one of its workers makes while the others wait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from loray.spec import BatchSpec
from loray.train.data.plans import Indices, Plan, PlanArray, Share, pair_lengths, plan_epoch
from loray.train.data.shards import ShardCache

_FORM = 2  # of plans: another one where the same key gives another plan, or is written in another way
_LEAST = 10_000  # sequences; the plan of fewer takes less than a tenth of a second and 320 kB


def kept_plan(
    lengths_D: Indices,
    spec: BatchSpec,
    *,
    max_length: int,
    seed: int,
    epoch: int,
    shares: Sequence[Share] = (),
    paired: bool = False,
    cache: ShardCache | None,
) -> Plan:
    """As `plan_epoch`, from a file of `cache`, where there are many rows. `paired`: two lengths are a row."""

    def made() -> Plan:
        lengths_R = pair_lengths(lengths_D) if paired else lengths_D
        return plan_epoch(lengths_R, spec, max_length=max_length, seed=seed, epoch=epoch, shares=shares)

    if cache is None or len(lengths_D) < _LEAST:
        return made()
    asked = spec.model_dump(mode="json", exclude={"accumulation"})
    named = [_FORM, asked, max_length, seed, epoch, list(shares), paired]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(lengths_D, np.int64).data)
    key, here = digest.hexdigest(), spec.order != "packed"
    with cache.alone():
        kept = _plan_of(cache.array(key, here=here))
        if kept is not None:
            return kept
        plan = made()
        cache.keep_array(key, _parts_of(plan), here=here)
        return _plan_of(cache.array(key, here=here)) or plan


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
    if spec.order == "packed":
        for epoch in range(num_epochs):
            kept_plan(lengths_D, spec, max_length=max_length, seed=seed, epoch=epoch, shares=shares, cache=cache)


def _parts_of(plan: Plan) -> list[PlanArray]:
    """Three lengths, then the arrays; int32, or int64 where a number needs it."""
    arrays = [plan.documents_D, plan.ends_R, plan.starts_B, plan.stops_B]
    largest = max(int(array.max(initial=len(array))) for array in arrays)
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    lengths = np.array([len(array) for array in arrays[:3]])
    return [array.astype(dtype) for array in (lengths, *arrays)]


def _plan_of(kept: PlanArray | None) -> Plan | None:
    """None where it is not whole."""
    if kept is None or kept.ndim != 1 or len(kept) < 3:
        return None
    found = np.asarray(kept)  # slices of a memmap are slower
    num_documents, num_rows, num_batches = (int(n) for n in found[:3])
    if len(found) != 3 + num_documents + num_rows + 2 * num_batches:
        return None
    documents_D, ends_R, starts_B, stops_B = np.split(found[3:], np.cumsum([num_documents, num_rows, num_batches]))
    return Plan(documents_D, ends_R, starts_B, stops_B)
