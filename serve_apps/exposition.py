"""Families of metrics in Prometheus' exposition: made, joined and encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from loray.telemetry import METRICS

if TYPE_CHECKING:
    from loray.telemetry import HistogramCounts


def merge(groups: Iterable[Iterable[Family]]) -> list[Family]:
    """Join each family with the samples of all groups. Samples `_created` are dropped: replicas expose their start."""
    merged: dict[str, Family] = {}
    for group in groups:
        for family in group:
            known = merged.setdefault(family.name, Family(family.name, family.documentation, family.type))
            known.samples += [s for s in family.samples if not s.name.endswith("_created")]
    return list(merged.values())


class EncodedMetrics(NamedTuple):
    body: bytes
    content_type: str


def encode(families: Sequence[Family], accept: str) -> EncodedMetrics:
    """Encode families in Prometheus' text format, or OpenMetrics if the Accept header requests it."""
    encoder, content_type = choose_encoder(accept)
    return EncodedMetrics(encoder(_Families(families)), content_type)


class _Families(Collector):
    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        return iter(self._families)


Labels = tuple[str, ...]


def gauge(name: str, values: Mapping[Labels, float]) -> Family:
    """Make a family of the metric `name` of `loray.telemetry`; `values` maps the values of its labels to its own."""
    family = GaugeMetricFamily(METRICS[name].name, METRICS[name].help, labels=METRICS[name].labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def counter(name: str, values: Mapping[Labels, float]) -> Family:
    """Make a family of counters as `gauge` does."""
    family = CounterMetricFamily(METRICS[name].name, METRICS[name].help, labels=METRICS[name].labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def histogram(name: str, values: Mapping[Labels, HistogramCounts]) -> Family:
    family = HistogramMetricFamily(METRICS[name].name, METRICS[name].help, labels=METRICS[name].labels)
    for labels, counts in values.items():
        bounds = [*map(floatToGoString, counts.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(counts.counts), strict=True)), counts.sum)
    return family


def labelled(families: Iterable[Family], **labels: str) -> list[Family]:
    """Give the families' samples these labels too."""
    found = list(families)
    for family in found:
        family.samples = [s._replace(labels={**labels, **s.labels}) for s in family.samples]
    return found
