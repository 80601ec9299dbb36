"""Heat maps of retrieval: how well a model finds a key, by its depth and the length of the text, as shaded tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from loray.spec import EXACT_MATCH, LOG_LIKELIHOOD, Evaluation

T = TypeVar("T")
NUM_SHADES = 6
_MOST_LENGTHS, _MOST_DEPTHS = 16, 32
_WORST = -5.0  # nats; at least, so that noise has no colour
_WHAT = {EXACT_MATCH: "exact match", LOG_LIKELIHOOD: "log-likelihood of the key"}


class HeatMapCell(NamedTuple):
    """`shade`: from 0, the worst, to NUM_SHADES - 1."""

    text: str
    shade: int


class HeatMap(NamedTuple):
    """`rows`: a depth, and its cells by `lengths`, None where nothing was measured."""

    title: str
    lengths: tuple[int, ...]
    rows: tuple[tuple[str, tuple[HeatMapCell | None, ...]], ...]


def heat_maps_of(evaluations: Iterable[Evaluation]) -> list[HeatMap]:
    """One for each task, dataset, metric and model that has depths.

    What was measured again counts as it was measured last.
    """
    found: dict[tuple[str, str, str, str], dict[tuple[int, float], float]] = {}
    for e in evaluations:
        if e.depth is not None and e.context_length is not None:
            for metric in _WHAT:
                if e.metric.endswith(f"_{metric}"):
                    task = e.metric.removesuffix(f"_{metric}")
                    found.setdefault((task, e.dataset, e.subject, metric), {})[e.context_length, e.depth] = e.value
    # One scale for all models, so that they can be compared.
    likelihoods = (cells.values() for (*_, metric), cells in found.items() if metric == LOG_LIKELIHOOD)
    worst = min([_WORST, *(value for values in likelihoods for value in values)])
    return [
        _drawn(
            f"{_named(task, dataset)}, {subject.replace('_', ' ')}: {_WHAT[metric]}",
            cells,
            metric == EXACT_MATCH,
            worst,
        )
        for (task, dataset, subject, metric), cells in found.items()
    ]


def _named(task: str, dataset: str) -> str:
    """Datasets of made-up texts are called after their task, as in "passkey, seed 0"."""
    return dataset if dataset.startswith(task) else f"{task} in {dataset}"


def _drawn(title: str, cells: dict[tuple[int, float], float], is_share: bool, worst: float) -> HeatMap:
    lengths = _cut(sorted({length for length, _ in cells}), _MOST_LENGTHS)
    depths = _cut(sorted({depth for _, depth in cells}), _MOST_DEPTHS)

    def cell(length: int, depth: float) -> HeatMapCell | None:
        value = cells.get((length, depth))
        if value is None:
            return None
        share = value if is_share else 1 - value / worst
        text = f"{value:.0%}" if is_share else f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")
        return HeatMapCell(text, min(max(int(share * NUM_SHADES), 0), NUM_SHADES - 1))

    rows = ((f"{depth:.0%}", tuple(cell(length, depth) for length in lengths)) for depth in depths)
    return HeatMap(title, tuple(lengths), tuple(rows))


def _cut(values: Sequence[T], most: int) -> Sequence[T]:
    """Evenly spread, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
