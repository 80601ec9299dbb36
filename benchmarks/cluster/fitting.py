"""What a replica's work costs, from what clients saw: the profile for `loray simulate`.

Clients see steps as the time between tokens. What they wait for the first one is the prompt, the steps of those that
decode, and the time outside the replica, where no other prompt is computed there. So the costs hold for this machine
with all that runs beside the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.client import Seen
from benchmarks.cluster.world import CONTEXT, Figures
from loray.simulation.profile import Profile
from loray.spec import ServeSpec

Floats = NDArray[np.float64]
_NUM_OUTSIDE = 400  # values of the profile, quantiles of those measured
_FEWEST = 20
_RECENT = 300  # so many requests of a replica later, an adapter is still there
_PLACE_S = 2e-4  # assumed; 30 kB are copied in less than the noise of a step


class Costs(NamedTuple):
    """Seconds; see `Profile`."""

    step: float
    row: float
    prompt: float
    pair: float
    outside: Floats


def fit(parts: Sequence[Sequence[Seen]]) -> Costs:
    """From all requests of these runs. ValueError where they do not say what work costs."""
    kept = [[s for s in part if not s.error and s.replica] for part in parts]
    between, rows = (np.concatenate(c) for c in zip(*(decoding(part) for part in kept), strict=True))
    if len(between) < _FEWEST:
        raise ValueError(f"{len(between)} requests had two tokens or more, {_FEWEST} are needed: raise --seconds")
    step, row = nonnegative(between, rows)
    prompts, beside, waits = (np.concatenate(c) for c in zip(*(undisturbed(part) for part in kept), strict=True))
    if len(prompts) < _FEWEST:
        raise ValueError(
            f"{len(prompts)} requests were not beside another's prompt, {_FEWEST} are needed: lower --rate"
        )
    waits = waits - step - row * (beside + 1)
    pairs = prompts * (prompts + 1) / 2
    _, prompt, pair = nonnegative(waits, prompts, pairs)
    if not prompt and not pair:
        raise ValueError("long prompts did not take longer than short ones: other processes had the processors")
    outside = np.clip(waits - prompt * prompts - pair * pairs, 0.0, None)
    return Costs(step, row, prompt, pair, np.quantile(outside, (np.arange(_NUM_OUTSIDE) + 0.5) / _NUM_OUTSIDE))


def decoding(seen: Sequence[Seen]) -> tuple[Floats, Floats]:
    """Of each request with two tokens or more: the mean time between two, and how many requests its replica decoded
    meanwhile, in the mean, itself included.
    """
    between, rows = [], []
    for part in _by_replica(seen):
        first, last = np.array([s.first for s in part]), np.array([s.last for s in part])
        for s in part:
            if s.num_output > 1 and s.last > s.first:
                overlap = np.clip(np.minimum(last, s.last) - np.maximum(first, s.first), 0.0, None)
                between.append((s.last - s.first) / (s.num_output - 1))
                rows.append(overlap.sum() / (s.last - s.first))
    return np.array(between), np.array(rows)


def undisturbed(seen: Sequence[Seen]) -> tuple[Floats, Floats, Floats]:
    """Of each request whose adapter was there and beside which its replica computed no other prompt: the tokens of its
    prompt, how many requests decoded there when it was due, and seconds to the first token.
    """
    found = []
    for part in _by_replica(seen):
        routed, first = np.array([s.routed for s in part]), np.array([s.first for s in part])
        last = np.array([s.last for s in part])
        for index, s in enumerate(part):
            num_prompts = int(((routed < s.first) & (first > s.at)).sum())
            recent = {before.adapter for before in part[max(0, index - _RECENT) : index]}
            if num_prompts == 1 and s.adapter in recent:
                found.append((s.num_prompt, ((first <= s.at) & (last > s.at)).sum(), s.ttft))
    prompts, beside, waits = np.array(found, np.float64).reshape(-1, 3).T
    return prompts, beside, waits


def profile(costs: Costs, load_s: float, figures: Sequence[Figures], spec: ServeSpec, source: str) -> Profile:
    """`figures`: of replicas that hold adapters, all of one size. Sizes are those in the pool, to which the host's
    memory is scaled.
    """
    block_bytes = spec.pool_bytes / sum(figures[0].blocks.values())
    num_blocks = sum(f.blocks.get(kind, 0) for f in figures for kind in ("layered", "flat", "run"))
    in_pool = num_blocks * block_bytes / sum(len(f.adapters_in_pool) for f in figures)
    on_host = sum(f.num_loaded_bytes for f in figures) / sum(f.num_loads for f in figures)
    return Profile(
        name=f"{spec.base}, {spec.num_replicas} replicas on one machine",
        source=source,
        step_s=costs.step,
        decode_s=costs.row,
        adapter_s=0.0,
        prompt_s=max(costs.prompt, 1e-9),
        pair_s=costs.pair,
        load_s=load_s,
        load_byte_s=0.0,
        place_s=_PLACE_S,
        place_byte_s=0.0,
        outside_s=tuple(costs.outside.tolist()),
        start_s=20.0,
        kv_token_bytes=block_bytes / spec.block_tokens,
        adapter_bytes=(round(in_pool),),
        pool_bytes=spec.pool_bytes,
        host_bytes=spec.host_bytes * in_pool / on_host,
        context_length=CONTEXT,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_queued=spec.max_queued,
        itl_slo_s=spec.itl_slo_s,
    )


def _by_replica(seen: Sequence[Seen]) -> list[list[Seen]]:
    found: dict[str, list[Seen]] = {}
    for s in sorted(seen, key=lambda s: s.routed):
        found.setdefault(s.replica, []).append(s)
    return list(found.values())


def nonnegative(y: Floats, *columns: Floats) -> tuple[float, ...]:
    """Intercept and a coefficient for each column: the least squares of which none is negative."""
    matrix = np.stack([np.ones_like(y), *columns], axis=1)
    used = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, used] / (scale := matrix[:, used].max(axis=0)), y, rcond=None)[0] / scale
        if found.min() >= 0:
            break
        del used[int((found * scale).argmin())]
    coefficients = np.zeros(matrix.shape[1])
    coefficients[used] = found
    return tuple(coefficients.tolist())
