"""What a replica's work costs, from what clients saw of probes: the profile for `loray simulate`.

A probe that has its replica's prompts to itself waits for its first token

    slowdown · (outside + its prompt + a step with those that decode there + its adapter's load, if cold)

where the slowdown follows from the contention and from those that work meanwhile (`Crowd`). The same factor is in the
time between tokens. So all costs are those of a machine that does nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.measured import Figures, Seen
from loray.simulation.cluster import Slowdown
from loray.simulation.profile import Overhead, Profile
from loray.spec import ServeSpec

Floats = NDArray[np.float64]
_CONTEXT = 4096  # of the tiny model
_NUM_OUTSIDE, _NUM_FACTORS = 400, 100  # of the profile, quantiles of those measured
_LEAST = 0.1  # of a factor
_LONG = 2.0  # prompts that take so many times what is outside say how much computing varies
_FEWEST = 20
_CONTENTIONS = np.arange(0.0, 2.0, 0.01)  # that are tried
_SHORTEST_S = 1.0  # that a rate is taken over
_MOST = 10.0  # that one probe stands for
_PLACE_S = 2e-4  # assumed; 30 kB are copied in less than the noise of a step


class Crowd:
    """Requests are on their way until a replica has accepted them; a replica works while it has one or more."""

    def __init__(self, seen: Sequence[Seen], processors: float) -> None:
        spans = [(s.at, s.routed) for s in seen]
        for part in by_replica(seen):
            spans += _union([(s.routed, s.last) for s in part])
        starts, ends = np.array(spans, np.float64).reshape(-1, 2).T
        changes = np.concatenate([np.ones(len(spans), np.int64), -np.ones(len(spans), np.int64)])
        order = np.argsort(times := np.concatenate([starts, ends]), kind="stable")
        self._times = times[order]
        slowdowns = np.array([Slowdown.of(num, processors) for num in np.cumsum(changes[order])[:-1].tolist()])
        passed = np.diff(self._times)[:, None] * slowdowns.reshape(-1, 2)
        self._sums = np.concatenate([np.zeros((1, 2)), np.cumsum(passed, axis=0)])  # until each of the times

    def slowdown(self, start: float, end: float) -> Slowdown:
        """The mean from `start` to `end` of what a request was slowed by that was at work, on its way or on its
        replica.
        """
        until = [[np.interp(at, self._times, column) for column in self._sums.T] for at in (start, end)]
        return Slowdown(*(float(b - a) / (end - start) for a, b in zip(*until, strict=True)))


def by_replica(seen: Sequence[Seen]) -> list[list[Seen]]:
    """In the order in which each accepted them."""
    found: dict[str, list[Seen]] = {}
    for s in sorted(seen, key=lambda s: s.routed):
        found.setdefault(s.replica, []).append(s)
    return list(found.values())


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that do not overlap and cover the same."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


class Costs(NamedTuple):
    """Seconds; see `Profile`. `load` contains the copy into the pool; NaN where too few requests waited for one.
    `factors` are its `prompt_factors`, `outside` has the columns of its `Overhead`.
    """

    step: float
    row: float
    prompt: float
    pair: float
    load: float
    contention: float
    factors: Floats
    outside: Floats
    end_known: float


class Waits(NamedTuple):
    """Columns: tokens of the prompt, requests that decoded there when it was due, 1 where it waited for a load, its
    `Slowdown`, seconds until a replica had it and to the first token, and for how many requests it stands: the longer
    one waits, the rarer no other prompt comes meanwhile.
    """

    prompt: Floats
    decoding: Floats
    cold: Floats
    shared: Floats
    beside: Floats
    routed: Floats
    seconds: Floats
    weight: Floats

    def slowdown(self, contention: float) -> Floats:
        return self.shared + contention * self.beside


def fit(seen: Sequence[Seen], before: Sequence[Seen], most_tokens: int, processors: float) -> Costs:
    """Of others than probes only their replicas and the time that they were there are used. `before`: what the replicas
    had answered by then; `most_tokens`: of a step; `processors`: of the machine. ValueError where probes do not say
    what work costs.
    """
    good = [s for s in seen if not s.error and s.replica]
    crowd = Crowd(good, processors)
    between, rows, slowed = decoding(good, crowd)
    waits = undisturbed(good, crowd, before)
    if len(between) < _FEWEST or len(waits.seconds) < _FEWEST:
        raise ValueError(
            f"{len(between)} probes decoded, and {len(waits.seconds)} had their first token, without another's prompt "
            f"on their replica, {_FEWEST} are needed of both: raise --probe-rate or --seconds"
        )
    if not (has_loads := waits.cold.sum() >= _FEWEST):
        waits = Waits(*(column[waits.cold == 0] for column in waits))
    columns = [waits.prompt, waits.prompt * (waits.prompt + 1) / 2, *([waits.cold] if has_loads else [])]
    more_steps = np.maximum(0.0, waits.prompt / most_tokens - 1)
    contention, step, row = 0.0, 0.0, 0.0
    for _ in range(3):  # a long prompt has several steps, whose fixed cost follows from the contention
        y = waits.seconds - waits.slowdown(contention) * step * more_steps
        contention, costs = contended(y, waits, *columns)
        step, row = nonnegative(between / (slowed[:, 0] + contention * slowed[:, 1]), rows)
    fixed, prompt, pair, *loads = costs
    if not prompt and not pair:
        raise ValueError("long prompts did not take longer than short ones: other processes had the processors")
    computed = columns[0] * prompt + columns[1] * pair + step * more_steps
    outside = waits.seconds / waits.slowdown(contention) - computed - step - row * (waits.decoding + 1)
    outside -= sum(load * waits.cold for load in loads)
    is_short, is_long = computed <= fixed, computed > _LONG * fixed  # long prompts vary by more than all that
    weight, mean = waits.weight, np.average(outside[is_short], weights=waits.weight[is_short])
    factors = spread(1 + (outside - mean)[is_long] / computed[is_long], weight[is_long])
    parts = outside_parts(outside[is_short], (waits.routed / waits.slowdown(contention))[is_short])
    parts = parts[equally_likely(parts.sum(axis=1), weight[is_short], _NUM_OUTSIDE)]
    load = loads[0] if has_loads else float("nan")
    return Costs(step, row, prompt, pair, load, contention, factors, parts, end_known_s(good))


def spread(factors: Floats, weights: Floats) -> Floats:
    """`prompt_factors`, whose mean is 1."""
    if len(factors) < _FEWEST:
        return np.ones(1)
    factors = np.clip(factors, _LEAST, None)
    factors = factors[equally_likely(factors, weights, _NUM_FACTORS)]
    by_mean: Floats = factors / factors.mean()
    return by_mean


def outside_parts(outside: Floats, routed: Floats) -> Floats:
    """See `Overhead`, of requests that took so long outside, and until a replica had them. What one takes after that is
    its way up to the median of all; a replica that takes longer has stood still, and not for this request alone.
    """
    outside = np.clip(outside, 0.0, None)
    before = np.minimum(outside, routed)
    after = outside - before
    way = np.minimum(after, np.median(after))
    return np.stack([before, way, after - way], axis=1)


def equally_likely(values: Floats, weights: Floats, num: int) -> NDArray[np.int64]:
    """Where so many quantiles are, which stand for all values."""
    order = np.argsort(values)
    until = np.cumsum(weights[order]) / weights.sum()
    return order[np.searchsorted(until, (np.arange(num) + 0.5) / num)]


def end_known_s(seen: Sequence[Seen]) -> float:
    """From a request's last token until its router knew, by Little's law: how many more requests the router knew than
    there were, by how many come. 0 where the router wrote down none.
    """
    told = [s for s in seen if s.loads]
    if len(told) < _FEWEST:
        return 0.0
    routed, last = (np.array([getattr(s, name) for s in seen]) for name in ("routed", "last"))
    too_many = [sum(s.loads) - 1 - ((routed < s.routed) & (last > s.routed)).sum() for s in told]
    return max(0.0, float(np.mean(too_many)) * float(np.ptp(routed)) / len(seen))


def decoding(seen: Sequence[Seen], crowd: Crowd) -> tuple[Floats, Floats, Floats]:
    """Of each probe with two tokens or more beside which its replica computed no prompt: the mean time between two,
    how many requests its replica decoded meanwhile, in the mean, itself included, and its `Slowdown` (N, 2).
    """
    found = []
    for part in by_replica(seen):
        routed, first, last = (np.array([getattr(s, name) for s in part]) for name in ("routed", "first", "last"))
        for s in part:
            if s.probe and s.num_output > 1 and s.last > s.first and not ((routed < s.last) & (first > s.first)).any():
                overlap = np.clip(np.minimum(last, s.last) - np.maximum(first, s.first), 0.0, None)
                seconds = s.last - s.first
                between = seconds / (s.num_output - 1)
                found.append((between, overlap.sum() / seconds, *crowd.slowdown(s.first, s.last)))
    columns = np.array(found, np.float64).reshape(-1, 4)
    return columns[:, 0], columns[:, 1], columns[:, 2:]


def undisturbed(seen: Sequence[Seen], crowd: Crowd, before: Sequence[Seen] = ()) -> Waits:
    """Of each probe beside which its replica computed no other prompt. It waits for a load if the replica has not had
    its adapter, also `before`; so this is for replicas that have not had more adapters than they hold.
    """
    found = []
    had = {(s.replica, s.adapter) for s in before}
    for part in by_replica(seen):
        routed, first, last = (np.array([getattr(s, name) for s in part]) for name in ("routed", "first", "last"))
        rate = len(part) / max(_SHORTEST_S, np.ptp(routed))
        for s in part:
            if s.probe and ((routed < s.first) & (first > s.at)).sum() == 1:
                slowdown = crowd.slowdown(s.at, s.first)
                num_decoding = ((first <= s.at) & (last > s.at)).sum()
                is_cold = (s.replica, s.adapter) not in had
                weight = min(_MOST, math.exp(rate * s.ttft))  # the others come at random (Poisson)
                found.append((s.num_prompt, num_decoding, is_cold, *slowdown, s.routed - s.at, s.ttft, weight))
            had.add((s.replica, s.adapter))
    return Waits(*np.array(found, np.float64).reshape(-1, len(Waits._fields)).T)


def contended(y: Floats, waits: Waits, *columns: Floats) -> tuple[float, tuple[float, ...]]:
    """The contention with which slowdown · (intercept + coefficients · columns) is nearest to `y`, and intercept and
    coefficients. Errors count as shares of what is expected.
    """
    expected = y.mean() + 0 * y
    for _ in range(3):  # the weights follow from the fit before
        found = []
        for contention in _CONTENTIONS.tolist():
            scale = waits.slowdown(contention) / expected
            coefficients = nonnegative(y / expected, *(column * scale for column in columns), intercept=scale)
            errors = y / expected - scale * _sum(coefficients, columns)
            found.append((float(errors @ errors), contention, coefficients))
        _, contention, coefficients = min(found)
        expected = waits.slowdown(contention) * _sum(coefficients, columns)
    return contention, coefficients


def profile(
    costs: Costs, load_s: float, figures: Sequence[Figures], spec: ServeSpec, source: str, processors: int
) -> Profile:
    """`figures`: of replicas that hold adapters, all of one size. Sizes are those in the pool, to which the host's
    memory is scaled. `processors`: of the machine.
    """
    pool_bytes = spec.fixed_pool_bytes
    assert pool_bytes is not None
    block_bytes = pool_bytes / sum(figures[0].blocks.values())
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
        load_s=max(0.0, load_s - _PLACE_S),
        load_byte_s=0.0,
        place_s=_PLACE_S,
        place_byte_s=0.0,
        prompt_factors=tuple(costs.factors.tolist()),
        outside_s=tuple(Overhead(*row) for row in costs.outside.tolist()),
        end_known_s=costs.end_known,
        contention=costs.contention,
        processors=processors,
        start_s=20.0,
        kv_token_bytes=block_bytes / spec.block_tokens,
        adapter_bytes=(round(in_pool),),
        pool_bytes=pool_bytes,
        host_bytes=spec.host_bytes * in_pool / on_host,
        context_length=_CONTEXT,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_queued=spec.max_queued,
        itl_slo_s=spec.itl_slo_s,
    )


def nonnegative(y: Floats, *columns: Floats, intercept: Floats | None = None) -> tuple[float, ...]:
    """Intercept and a coefficient for each column: the least squares of which none is negative. `intercept`: its
    column, ones by default.
    """
    matrix = np.stack([np.ones_like(y) if intercept is None else intercept, *columns], axis=1)
    used = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, used] / (scale := matrix[:, used].max(axis=0)), y, rcond=None)[0] / scale
        if found.min() >= 0:
            break
        del used[int((found * scale).argmin())]
    coefficients = np.zeros(matrix.shape[1])
    coefficients[used] = found
    return tuple(coefficients.tolist())


def _sum(coefficients: Sequence[float], columns: Sequence[Floats]) -> Floats:
    """Of intercept and columns."""
    total = np.full_like(columns[0], coefficients[0])
    for coefficient, column in zip(coefficients[1:], columns, strict=True):
        total += coefficient * column
    return total
