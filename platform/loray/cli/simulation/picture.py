"""Courses over time as SVG, one panel below the other; those of a simulated run have a line a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from loray.cli.svg import MARGIN, document, text
from loray.simulation.summary import Course
from loray.simulation.workload.requests import Floats

_WIDTH, _PANEL_H, _LEFT, _GAP, _TOP = 860, 150, 74, 46, 84
_COLOURS = ("#c44870", "#3567a8", "#999999", "#d98a29", "#4a9a63")
_NUM_TICKS = 3


class Panel(NamedTuple):
    """`lines` have a value for each time; NaN: none. A line goes on to its next value, or with `has_gaps` ends there.
    `is_log`: a logarithmic scale, else one that begins at 0.
    """

    name: str
    lines: Sequence[Floats]
    is_log: bool = False
    has_gaps: bool = False


def draw(title: str, courses: Sequence[Course]) -> str:
    """Times have a logarithmic scale."""
    panels = [
        Panel("p50 of the first token, s", [c.p50_B for c in courses], is_log=True),
        Panel("p99 of the first token, s", [c.p99_B for c in courses], is_log=True),
        Panel("cold loads, all so far", [np.cumsum(c.loads_B) for c in courses]),
        Panel("replicas", [c.replicas_B for c in courses]),
    ]
    return page(title, [c.policy for c in courses], courses[0].at_B / 60, panels)


def page(title: str, legend: Sequence[str], minutes: Floats, panels: Sequence[Panel]) -> str:
    """`legend`: names of the lines, which have the same colours in all panels. `minutes`: the time of each value."""
    parts = [text(MARGIN, MARGIN + 14, title, size=18, weight=600)]
    for i, name in enumerate(legend):
        x = _LEFT + 120 * i
        parts.append(f"<rect x='{x}' y='{MARGIN + 30}' width='18' height='4' fill='{_COLOURS[i % len(_COLOURS)]}'/>")
        parts.append(text(x + 24, MARGIN + 36, name, size=13))
    top = _TOP
    for panel in panels:
        parts += _panel(panel, minutes, top)
        top += _PANEL_H + _GAP
    parts.append(text(_WIDTH - MARGIN, top - _GAP + 34, "minutes", size=12, anchor="end", fill="#555"))
    return document(_WIDTH, top + MARGIN, parts)


def _panel(panel: Panel, minutes: Floats, top: float) -> list[str]:
    name, lines, is_log, has_gaps = panel
    known = np.concatenate([line[np.isfinite(line)] for line in lines])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if is_log:
        low = max(low, 1e-3)
        low, high = math.log10(low), math.log10(max(high, low))
    else:
        low = 0.0
    high = high if high > low else low + 1
    bottom, width = top + _PANEL_H, _WIDTH - _LEFT - MARGIN

    def y(value: float) -> float:
        value = math.log10(max(value, 1e-3)) if is_log else value
        return bottom - _PANEL_H * (value - low) / (high - low)

    parts = [text(_LEFT, top - 8, name, size=13, weight=600)]
    for i in range(_NUM_TICKS + 1):
        value = low + (high - low) * i / _NUM_TICKS
        value = 10**value if is_log else value
        at = y(value)
        parts.append(f"<line x1='{_LEFT}' x2='{_LEFT + width}' y1='{at:.1f}' y2='{at:.1f}' stroke='#e5e5e5'/>")
        parts.append(
            text(_LEFT - 8, at + 4, f"{value:,.2g}" if value < 100 else f"{value:,.0f}", size=11, anchor="end")
        )
    for i in range(_NUM_TICKS + 1):
        at = minutes[-1] * i / _NUM_TICKS
        x = _LEFT + width * i / _NUM_TICKS
        parts.append(text(x, bottom + 16, f"{at:.3g}" if at < 999.5 else f"{at:,.0f}", size=11, anchor="middle"))
    for i, line in enumerate(lines):
        drawn = [
            f"{_LEFT + width * at / minutes[-1]:.1f},{y(value):.1f}" if math.isfinite(value) else ""
            for at, value in zip(minutes.tolist(), line.tolist(), strict=True)
        ]
        pieces = [list(piece) for known, piece in groupby(drawn, bool) if known]
        if not has_gaps:
            pieces = [[point for piece in pieces for point in piece]]
        for piece in pieces:
            parts.append(
                f"<polyline points='{' '.join(piece)}' fill='none' stroke='{_COLOURS[i % len(_COLOURS)]}' "
                "stroke-width='1.6'/>"
            )
    return parts
