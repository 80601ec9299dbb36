"""What a long prompt does to others, and they to it. In seconds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.serving.replay import Record
from benchmarks.serving.workload import OTHER, SAME, STREAM, TimedRequest

_NAN = float("nan")


class MixedFigures(NamedTuple):
    """NaN where the load has no such request.

    long        from the sending of the long prompt to its first token
    short_same  the largest time to the first token of a short prompt of the same tenant that came before the long one's
                first token; short_other: of another tenant; short_p50: the median of both
    gap         the longest time between two tokens of the stream from the sending of the long prompt on
    """

    long: float
    short_same: float = _NAN
    short_other: float = _NAN
    short_p50: float = _NAN
    gap: float = _NAN


def mixed_figures(requests: Sequence[TimedRequest], records: Sequence[Record]) -> MixedFigures | None:
    """None if a request failed: its figures would be those of another load."""
    if any(record.error is not None or not record.times for record in records):
        return None
    pairs = list(zip(requests, records, strict=True))
    longest = max(len(request.prompt_ids) for request in requests)
    long = next(record for request, record in pairs if len(request.prompt_ids) == longest)
    first: dict[str, list[float]] = {SAME: [], OTHER: []}
    gaps = []
    for request, record in pairs:
        if request.tenant == STREAM:
            gaps += [b - a for a, b in itertools.pairwise(record.times) if b > long.sent]
        elif record is not long and record.sent < long.times[0]:
            first[request.tenant].append(record.times[0] - record.sent)
    both = [*first[SAME], *first[OTHER]]
    return MixedFigures(
        long.times[0] - long.sent,
        max(first[SAME], default=_NAN),
        max(first[OTHER], default=_NAN),
        statistics.median(both) if both else _NAN,
        max(gaps, default=_NAN),
    )


def median_of(passes: Sequence[MixedFigures]) -> MixedFigures:
    return MixedFigures(*(statistics.median(values) for values in zip(*passes, strict=True)))
