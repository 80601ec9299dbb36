"""Heat maps and line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from loray.spec import EXACT_MATCH, LOG_LIKELIHOOD, Evaluation

Floats = NDArray[np.float64]

MARGIN = 24
_FONT = "font-family='system-ui, Helvetica, Arial, sans-serif'"


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Returns a white picture of that size, in pixels, with `parts` on it."""
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' {_FONT}>"
    )
    return "\n".join([head, f"<rect width='{width}' height='{height}' fill='white'/>", *parts, "</svg>"]) + "\n"


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: int,
    anchor: Literal["start", "middle", "end"] = "start",
    weight: int = 400,
    fill: str = "#111",
) -> str:
    """Returns a line of text. `anchor`: the part of it that is at `x`."""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' "
        f"fill='{fill}'>{escape(content)}</text>"
    )


# -- heat maps ---------------------------------------------------------------------------------------------------------

_CELL_W, _CELL_H = 76, 38
_MAP_LEFT, _MAP_TOP, _MAP_GAP, _MAP_BOTTOM = 60, 76, 36, 62  # for depths, titles, between maps, lengths and legend
_MIN_MAP_W = 290  # for its title
# From bad to good; light enough for black text at one end, dark enough for white text at the other.
_COLOURS = ((247, 242, 228), (250, 206, 140), (238, 138, 92), (196, 72, 108), (110, 40, 120), (44, 22, 84))


class _HeatMap(NamedTuple):
    """`values` by (context length, depth); `low` and `high` are the values at the ends of the colour scale."""

    title: str
    values: Mapping[tuple[int, float], float]
    low: float
    high: float
    is_share: bool

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.is_share else f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def draw_heat_maps(title: str, evaluations: Sequence[Evaluation]) -> str:
    """Draws the evaluations of one retrieval task as SVG.

    Each model has a row of two maps: exact match (share of prompts) and the key's log-likelihood (nats).
    """
    lengths = sorted({e.context_length or 0 for e in evaluations})
    depths = sorted({e.depth or 0.0 for e in evaluations})
    subjects = list(dict.fromkeys(e.subject for e in evaluations))
    map_w, map_h = max(_MIN_MAP_W, len(lengths) * _CELL_W), len(depths) * _CELL_H
    # One scale for all models, from 0 (certainty) to the worst cell, and at least to -5, so that noise has no colour.
    worst = min([-5.0, *(e.value for e in evaluations if e.metric.endswith(LOG_LIKELIHOOD))])
    width = 2 * (_MAP_LEFT + map_w) + _MAP_GAP + 2 * MARGIN
    row_h = _MAP_TOP + map_h + _MAP_BOTTOM
    height = MARGIN + 26 + len(subjects) * row_h + MARGIN
    parts = [text(MARGIN, MARGIN + 16, title, size=19, weight=600)]
    for row, subject in enumerate(subjects):
        y = MARGIN + 26 + row * row_h
        name = subject.replace("_", " ")
        for column, heat_map in enumerate(_maps_of(name, [e for e in evaluations if e.subject == subject], worst)):
            x = MARGIN + column * (_MAP_LEFT + map_w + _MAP_GAP)
            parts += _heat_map(heat_map, lengths, depths, x, y)
    return document(width, height, parts)


def _maps_of(name: str, evaluations: Sequence[Evaluation], worst: float) -> list[_HeatMap]:
    exact, likelihood = (
        {(e.context_length or 0, e.depth or 0.0): e.value for e in evaluations if e.metric.endswith(metric)}
        for metric in (EXACT_MATCH, LOG_LIKELIHOOD)
    )
    return [
        _HeatMap(f"{name}: exact match", exact, 0.0, 1.0, is_share=True),
        _HeatMap(f"{name}: log-likelihood of the key", likelihood, worst, 0.0, is_share=False),
    ]


def _heat_map(heat_map: _HeatMap, lengths: Sequence[int], depths: Sequence[float], x: float, y: float) -> list[str]:
    left, top = x + _MAP_LEFT, y + _MAP_TOP
    right, bottom = left + len(lengths) * _CELL_W, top + len(depths) * _CELL_H
    parts = [
        text(left, y + 44, heat_map.title, size=15, weight=600),
        text(left, y + 64, "depth of the key ↓, tokens →", size=12, fill="#555"),
    ]
    for i, depth in enumerate(depths):
        middle = top + (i + 0.5) * _CELL_H
        parts.append(text(left - 10, middle + 5, f"{depth:.0%}", size=13, anchor="end"))
        for j, length in enumerate(lengths):
            value = heat_map.values.get((length, depth))
            if value is not None:
                parts += _cell(heat_map, value, left + j * _CELL_W, top + i * _CELL_H)
    for j, length in enumerate(lengths):
        parts.append(text(left + (j + 0.5) * _CELL_W, bottom + 18, f"{length:,}", size=13, anchor="middle"))
    return parts + _legend(heat_map, left, bottom + 32, min(160.0, right - left))


def _cell(heat_map: _HeatMap, value: float, x: float, y: float) -> list[str]:
    share = (value - heat_map.low) / (heat_map.high - heat_map.low)
    return [
        f"<rect x='{x}' y='{y}' width='{_CELL_W}' height='{_CELL_H}' fill='{_colour(share)}' stroke='white'/>",
        text(
            x + _CELL_W / 2,
            y + _CELL_H / 2 + 5,
            heat_map.text(value),
            size=14,
            fill="white" if share > 0.45 else "#111",
            anchor="middle",
        ),
    ]


def _legend(heat_map: _HeatMap, x: float, y: float, width: float) -> list[str]:
    steps = 32
    bars = [
        f"<rect x='{x + i * width / steps:.2f}' y='{y}' width='{width / steps + 0.5:.2f}' height='8' "
        f"fill='{_colour(i / (steps - 1))}'/>"
        for i in range(steps)
    ]
    low, high = heat_map.text(heat_map.low), heat_map.text(heat_map.high)
    return [
        *bars,
        text(x, y + 22, low, size=11),
        text(x + width, y + 22, high, size=11, anchor="end"),
    ]


def _colour(share: float) -> str:
    at = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    i = min(int(at), len(_COLOURS) - 2)
    mixed = (round(a + (at - i) * (b - a)) for a, b in zip(_COLOURS[i], _COLOURS[i + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


# -- line charts -------------------------------------------------------------------------------------------------------

_WIDTH, _CHART_H, _CHART_LEFT, _CHART_GAP, _CHART_TOP = 860, 150, 74, 46, 84
_LINE_COLOURS = ("#c44870", "#3567a8", "#999999", "#d98a29", "#4a9a63")
_NUM_TICKS = 3


class Chart(NamedTuple):
    """A line chart. `lines` have a value for each time; NaN: none. A line goes on to its next value, or with `has_gaps`
    ends there. `is_log`: a logarithmic scale, else one that begins at 0.
    """

    name: str
    lines: Sequence[Floats]
    is_log: bool = False
    has_gaps: bool = False


def draw_charts(title: str, legend: Sequence[str], minutes: Floats, charts: Sequence[Chart]) -> str:
    """Draws charts below each other as SVG. `legend`: names of the lines, which have the same colours in all charts.
    `minutes`: the time of each value.
    """
    parts = [text(MARGIN, MARGIN + 14, title, size=18, weight=600)]
    for i, name in enumerate(legend):
        x = _CHART_LEFT + 120 * i
        parts.append(
            f"<rect x='{x}' y='{MARGIN + 30}' width='18' height='4' fill='{_LINE_COLOURS[i % len(_LINE_COLOURS)]}'/>"
        )
        parts.append(text(x + 24, MARGIN + 36, name, size=13))
    top = _CHART_TOP
    for chart in charts:
        parts += _chart(chart, minutes, top)
        top += _CHART_H + _CHART_GAP
    parts.append(text(_WIDTH - MARGIN, top - _CHART_GAP + 34, "minutes", size=12, anchor="end", fill="#555"))
    return document(_WIDTH, top + MARGIN, parts)


def _chart(chart: Chart, minutes: Floats, top: float) -> list[str]:
    name, lines, is_log, has_gaps = chart
    known = np.concatenate([line[np.isfinite(line)] for line in lines])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if is_log:
        low = max(low, 1e-3)
        low, high = math.log10(low), math.log10(max(high, low))
    else:
        low = 0.0
    high = high if high > low else low + 1
    bottom, width = top + _CHART_H, _WIDTH - _CHART_LEFT - MARGIN

    def y(value: float) -> float:
        value = math.log10(max(value, 1e-3)) if is_log else value
        return bottom - _CHART_H * (value - low) / (high - low)

    parts = [text(_CHART_LEFT, top - 8, name, size=13, weight=600)]
    for i in range(_NUM_TICKS + 1):
        value = low + (high - low) * i / _NUM_TICKS
        value = 10**value if is_log else value
        at = y(value)
        parts.append(
            f"<line x1='{_CHART_LEFT}' x2='{_CHART_LEFT + width}' y1='{at:.1f}' y2='{at:.1f}' stroke='#e5e5e5'/>"
        )
        parts.append(
            text(_CHART_LEFT - 8, at + 4, f"{value:,.2g}" if value < 100 else f"{value:,.0f}", size=11, anchor="end")
        )
    for i in range(_NUM_TICKS + 1):
        at = minutes[-1] * i / _NUM_TICKS
        x = _CHART_LEFT + width * i / _NUM_TICKS
        parts.append(text(x, bottom + 16, f"{at:.3g}" if at < 999.5 else f"{at:,.0f}", size=11, anchor="middle"))
    for i, line in enumerate(lines):
        drawn = [
            f"{_CHART_LEFT + width * at / minutes[-1]:.1f},{y(value):.1f}" if math.isfinite(value) else ""
            for at, value in zip(minutes.tolist(), line.tolist(), strict=True)
        ]
        pieces = [list(piece) for known, piece in groupby(drawn, bool) if known]
        if not has_gaps:
            pieces = [[point for piece in pieces for point in piece]]
        for piece in pieces:
            parts.append(
                f"<polyline points='{' '.join(piece)}' fill='none' stroke='{_LINE_COLOURS[i % len(_LINE_COLOURS)]}' "
                "stroke-width='1.6'/>"
            )
    return parts
