"""A reader of a server's GET /metrics, which is Prometheus' text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

TTFT, ROUTED = "loray_time_to_first_token_seconds", "loray_routing_decisions_total"
STEPS = "loray_engine_step_seconds"
REQUESTS, UNDER_WAY = "loray_http_requests_total", "loray_http_requests_in_flight"

Buckets = Mapping[float, float]  # of a histogram: upper bound → observations up to it


class Metrics:
    """The samples of `text`, parsed once; of the metrics `names` where they are given, which is faster.

    Sums are over all labels but `by`; a sample that lacks it counts as "".
    """

    def __init__(self, text: str, names: tuple[str, ...] = ()) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        if names:
            text = "".join(line for line in text.splitlines(keepends=True) if line.startswith(names))
        self._samples: dict[str, list[Sample]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append(sample)

    def sums(self, name: str, by: str) -> dict[str, float]:
        """The values of a counter or a gauge, by the values of the label `by`."""
        found: dict[str, float] = defaultdict(float)
        for label, sample in self._labelled(name, by):
            found[label] += sample.value
        return dict(found)

    def buckets(self, name: str, by: str) -> dict[str, Buckets]:
        """The buckets of a histogram, by the values of the label `by`."""
        found: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        for label, sample in self._labelled(f"{name}_bucket", by):
            found[label][float(sample.labels["le"])] += sample.value
        return {label: dict(buckets) for label, buckets in found.items()}

    def _labelled(self, name: str, by: str) -> Iterator[tuple[str, Sample]]:
        return ((sample.labels.get(by, ""), sample) for sample in self._samples.get(name, ()))


def together(parts: Mapping[str, Buckets]) -> Buckets:
    """The sum of several histograms."""
    found: dict[float, float] = defaultdict(float)
    for buckets in parts.values():
        for bound, count in buckets.items():
            found[bound] += count
    return dict(found)


def percentile(buckets: Buckets, share: float) -> float | None:
    """The value below which `share` of them are, linear within a bucket as Prometheus' histogram_quantile; None where
    there are none. The last finite bound for what is above it.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    below, before = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= share * total:
            if math.isinf(bound):
                return below
            inside = buckets[bound] - before
            return below + (bound - below) * ((share * total - before) / inside if inside else 1.0)
        below, before = bound, buckets[bound]
    return below
