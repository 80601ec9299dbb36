"""Heat maps and line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from loray.spec import EXACT_MATCH, LOG_LIKELIHOOD, Evaluation

Floats = NDArray[np.float64]

MARGIN = 24
_GREY = "#555"


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Returns a white picture of that size, in pixels, with `parts` on it."""
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' font-family='system-ui, Helvetica, Arial, sans-serif'>"
    )
    return "\n".join([head, _rectangle(0, 0, width, height, "white"), *parts, "</svg>"]) + "\n"


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


def _rectangle(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f"<rect x='{x}' y='{y}' width='{width}' height='{height}' fill='{fill}'{more}/>"


# -- heat maps ---------------------------------------------------------------------------------------------------------

_CELL_W, _CELL_H = 76, 38
_MAP_LEFT, _MAP_TOP, _MAP_GAP, _MAP_BOTTOM = 60, 76, 36, 62  # for depths, titles, between maps, lengths and legend
_MIN_MAP_W = 290  # for its title
# From bad to good; light enough for black text at one end, dark enough for white text at the other.
_COLOURS = ((247, 242, 228), (250, 206, 140), (238, 138, 92), (196, 72, 108), (110, 40, 120), (44, 22, 84))
_STOPS = "".join(
    f"<stop offset='{i / (len(_COLOURS) - 1):.0%}' stop-color='rgb{colour}'/>" for i, colour in enumerate(_COLOURS)
)
_SCALE = f"<defs><linearGradient id='scale'>{_STOPS}</linearGradient></defs>"


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
    maps = (
        (EXACT_MATCH, "exact match", (0.0, 1.0), "{:.0%}".format),
        (LOG_LIKELIHOOD, "log-likelihood of the key", (worst, 0.0), _nats),
    )
    parts = [_SCALE, text(MARGIN, MARGIN + 16, title, size=19, weight=600)]
    top = MARGIN + 26
    for subject in subjects:
        left = MARGIN + _MAP_LEFT
        for metric, what, ends, written in maps:
            values = {
                (e.context_length or 0, e.depth or 0.0): e.value
                for e in evaluations
                if e.subject == subject and e.metric.endswith(metric)
            }
            parts.append(text(left, top + 44, f"{subject.replace('_', ' ')}: {what}", size=15, weight=600))
            parts.append(text(left, top + 64, "depth of the key ↓, tokens →", size=12, fill=_GREY))
            parts += _heat_map(values, lengths, depths, ends, written, left, top + _MAP_TOP)
            left += map_w + _MAP_GAP + _MAP_LEFT
        top += _MAP_TOP + map_h + _MAP_BOTTOM
    return document(2 * (_MAP_LEFT + map_w) + _MAP_GAP + 2 * MARGIN, top + MARGIN, parts)


def _nats(value: float) -> str:
    return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def _heat_map(
    values: Mapping[tuple[int, float], float],
    lengths: Sequence[int],
    depths: Sequence[float],
    ends: tuple[float, float],
    written: Callable[[float], str],
    left: float,
    top: float,
) -> list[str]:
    """Draws values by (context length, depth), and a legend. `ends`: the values at the ends of the colour scale."""
    parts: list[str] = []
    bottom, width = top + len(depths) * _CELL_H, len(lengths) * _CELL_W
    for i, depth in enumerate(depths):
        y = top + i * _CELL_H
        parts.append(text(left - 10, y + _CELL_H / 2 + 5, f"{depth:.0%}", size=13, anchor="end"))
        for j, length in enumerate(lengths):
            value = values.get((length, depth))
            if value is not None:
                x, share = left + j * _CELL_W, (value - ends[0]) / (ends[1] - ends[0])
                ink = "white" if share > 0.45 else "#111"
                parts.append(_rectangle(x, y, _CELL_W, _CELL_H, _colour(share), " stroke='white'"))
                parts.append(
                    text(x + _CELL_W / 2, y + _CELL_H / 2 + 5, written(value), size=14, fill=ink, anchor="middle")
                )
    for j, length in enumerate(lengths):
        parts.append(text(left + (j + 0.5) * _CELL_W, bottom + 18, f"{length:,}", size=13, anchor="middle"))
    parts.append(_rectangle(left, bottom + 32, min(160, width), 8, "url(#scale)"))
    parts.append(text(left, bottom + 54, written(ends[0]), size=11))
    parts.append(text(left + min(160, width), bottom + 54, written(ends[1]), size=11, anchor="end"))
    return parts


def _colour(share: float) -> str:
    at = np.clip(share, 0.0, 1.0) * (len(_COLOURS) - 1)
    channels = (round(float(np.interp(at, range(len(_COLOURS)), channel))) for channel in zip(*_COLOURS, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


# -- line charts -------------------------------------------------------------------------------------------------------

_WIDTH, _CHART_H, _CHART_LEFT, _CHART_GAP, _CHART_TOP = 860, 150, 74, 46, 84
_LINE_COLOURS = ("#c44870", "#3567a8", "#999999", "#d98a29", "#4a9a63")
_NUM_TICKS = 3
_LEAST = 1e-3  # of a logarithmic scale


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
        parts.append(_rectangle(x, MARGIN + 30, 18, 4, _LINE_COLOURS[i % len(_LINE_COLOURS)]))
        parts.append(text(x + 24, MARGIN + 36, name, size=13))
    top = _CHART_TOP
    for chart in charts:
        parts += _chart(chart, minutes, top)
        top += _CHART_H + _CHART_GAP
    parts.append(text(_WIDTH - MARGIN, top - _CHART_GAP + 34, "minutes", size=12, anchor="end", fill=_GREY))
    return document(_WIDTH, top + MARGIN, parts)


def _chart(chart: Chart, minutes: Floats, top: float) -> list[str]:
    lines = [np.log10(np.maximum(line, _LEAST)) if chart.is_log else line for line in chart.lines]
    known = np.concatenate([line[np.isfinite(line)] for line in lines])
    low = float(known.min()) if chart.is_log and len(known) else 0.0
    high = max(known.tolist(), default=1.0)
    high = high if high > low else low + 1
    bottom, width = top + _CHART_H, _WIDTH - _CHART_LEFT - MARGIN
    parts = [text(_CHART_LEFT, top - 8, chart.name, size=13, weight=600)]
    for i in range(_NUM_TICKS + 1):
        share = i / _NUM_TICKS
        value, y = low + (high - low) * share, bottom - _CHART_H * share
        value = 10**value if chart.is_log else value
        parts.append(_rectangle(_CHART_LEFT, y, width, 1, "#e5e5e5"))
        parts.append(
            text(_CHART_LEFT - 8, y + 4, f"{value:,.2g}" if value < 100 else f"{value:,.0f}", size=11, anchor="end")
        )
        at = minutes[-1] * share
        written = f"{at:.3g}" if at < 999.5 else f"{at:,.0f}"
        parts.append(text(_CHART_LEFT + width * share, bottom + 16, written, size=11, anchor="middle"))
    for i, line in enumerate(lines):
        points = [
            f"{_CHART_LEFT + width * at / minutes[-1]:.1f},{bottom - _CHART_H * (value - low) / (high - low):.1f}"
            if math.isfinite(value)
            else ""
            for at, value in zip(minutes.tolist(), line.tolist(), strict=True)
        ]
        pieces = [list(piece) for is_known, piece in groupby(points, bool) if is_known]
        if not chart.has_gaps:
            pieces = [[point for piece in pieces for point in piece]]
        for piece in pieces:
            colour = _LINE_COLOURS[i % len(_LINE_COLOURS)]
            parts.append(f"<polyline points='{' '.join(piece)}' fill='none' stroke='{colour}' stroke-width='1.6'/>")
    return parts
