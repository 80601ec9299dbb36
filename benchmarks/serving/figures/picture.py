"""The picture of the density benchmark: figures of each kind of adapter under the same pool and load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.pictures import panels
from benchmarks.serving.figures.results import Results
from benchmarks.serving.figures.rows import EngineWork, Row

ONCE, UNIFORM = ", each once", ", uniform"  # endings of the names of the preset's cases

_PANELS: tuple[tuple[str, str, Callable[[Row, EngineWork], float]], ...] = (
    ("adapters in the pool", UNIFORM, lambda row, work: work.num_residents),
    ("found in the pool, %", UNIFORM, lambda row, work: 100 * work.pool_hits),
    ("tokens/s", UNIFORM, lambda row, work: row.latencies.throughput),
    ("cold adapters served a second", ONCE, lambda row, work: row.latencies.throughput),
    ("fetched for 200 adapters, MB", ONCE, lambda row, work: work.loaded_bytes / 1e6),
)


def draw_density(results: Results, path: Path) -> None:
    """Write an SVG with a panel of bars for each figure. ValueError if `results` are not those of the preset."""
    names = [case.removesuffix(UNIFORM) for case, _ in results.rows if case.endswith(UNIFORM)]
    if not names:
        raise ValueError("the picture is of --preset density")
    with panels(path, 1, len(_PANELS), size=(2.9 * len(_PANELS), 3.0)) as axes:
        for axis, (title, suffix, value) in zip(axes[0], _PANELS, strict=True):
            rows = (results.get(name + suffix) for name in names)
            heights = [value(row, row.work) if row and row.work else 0.0 for row in rows]
            bars = axis.bar(names, heights, color=[f"C{i}" for i in range(len(names))])
            axis.bar_label(bars, fmt=lambda height: f"{height:,.0f}" if height >= 100 else f"{height:.3g}", fontsize=8)
            axis.set_title(title, fontsize=9)
            axis.margins(y=0.15)
            axis.tick_params(labelsize=7)
