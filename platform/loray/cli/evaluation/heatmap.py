"""Heat maps of retrieval by depth and length, as SVG. Every cell also contains its number.

Each model has a row of two panels: exact match (share of prompts) and the key's log-likelihood (nats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loray.cli.svg import MARGIN, document, text
from loray.spec import EXACT_MATCH, LOG_LIKELIHOOD, Evaluation

_CELL_W, _CELL_H = 76, 38
_LEFT, _TOP, _GAP, _BOTTOM = 60, 76, 36, 62  # of a panel: depths, titles, between panels, lengths and legend
_MIN_PANEL_W = 290  # for its title
# From bad to good; light enough for black text at one end, dark enough for white text at the other.
_COLOURS = ((247, 242, 228), (250, 206, 140), (238, 138, 92), (196, 72, 108), (110, 40, 120), (44, 22, 84))


class _Panel(NamedTuple):
    """`values` by (context length, depth); `low` and `high` are the values at the ends of the colour scale."""

    title: str
    values: Mapping[tuple[int, float], float]
    low: float
    high: float
    is_share: bool

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.is_share else f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def draw(title: str, evaluations: Sequence[Evaluation]) -> str:
    """SVG of the evaluations of one retrieval task."""
    lengths = sorted({e.context_length or 0 for e in evaluations})
    depths = sorted({e.depth or 0.0 for e in evaluations})
    subjects = list(dict.fromkeys(e.subject for e in evaluations))
    panel_w, panel_h = max(_MIN_PANEL_W, len(lengths) * _CELL_W), len(depths) * _CELL_H
    # One scale for all models, from 0 (certainty) to the worst cell, and at least to -5, so that noise has no colour.
    worst = min([-5.0, *(e.value for e in evaluations if e.metric.endswith(LOG_LIKELIHOOD))])
    width = 2 * (_LEFT + panel_w) + _GAP + 2 * MARGIN
    row_h = _TOP + panel_h + _BOTTOM
    height = MARGIN + 26 + len(subjects) * row_h + MARGIN
    parts = [
        text(MARGIN, MARGIN + 16, title, size=19, weight=600),
    ]
    for row, subject in enumerate(subjects):
        y = MARGIN + 26 + row * row_h
        name = subject.replace("_", " ")
        for column, panel in enumerate(_panels(name, [e for e in evaluations if e.subject == subject], worst)):
            x = MARGIN + column * (_LEFT + panel_w + _GAP)
            parts += _panel(panel, lengths, depths, x, y)
    return document(width, height, parts)


def _panels(name: str, evaluations: Sequence[Evaluation], worst: float) -> list[_Panel]:
    exact, likelihood = (
        {(e.context_length or 0, e.depth or 0.0): e.value for e in evaluations if e.metric.endswith(metric)}
        for metric in (EXACT_MATCH, LOG_LIKELIHOOD)
    )
    return [
        _Panel(f"{name}: exact match", exact, 0.0, 1.0, is_share=True),
        _Panel(f"{name}: log-likelihood of the key", likelihood, worst, 0.0, is_share=False),
    ]


def _panel(panel: _Panel, lengths: Sequence[int], depths: Sequence[float], x: float, y: float) -> list[str]:
    left, top = x + _LEFT, y + _TOP
    right, bottom = left + len(lengths) * _CELL_W, top + len(depths) * _CELL_H
    parts = [
        text(left, y + 44, panel.title, size=15, weight=600),
        text(left, y + 64, "depth of the key ↓, tokens →", size=12, fill="#555"),
    ]
    for i, depth in enumerate(depths):
        middle = top + (i + 0.5) * _CELL_H
        parts.append(text(left - 10, middle + 5, f"{depth:.0%}", size=13, anchor="end"))
        for j, length in enumerate(lengths):
            value = panel.values.get((length, depth))
            if value is not None:
                parts += _cell(panel, value, left + j * _CELL_W, top + i * _CELL_H)
    for j, length in enumerate(lengths):
        parts.append(text(left + (j + 0.5) * _CELL_W, bottom + 18, f"{length:,}", size=13, anchor="middle"))
    return parts + _legend(panel, left, bottom + 32, min(160.0, right - left))


def _cell(panel: _Panel, value: float, x: float, y: float) -> list[str]:
    share = (value - panel.low) / (panel.high - panel.low)
    return [
        f"<rect x='{x}' y='{y}' width='{_CELL_W}' height='{_CELL_H}' fill='{_colour(share)}' stroke='white'/>",
        text(
            x + _CELL_W / 2,
            y + _CELL_H / 2 + 5,
            panel.text(value),
            size=14,
            fill="white" if share > 0.45 else "#111",
            anchor="middle",
        ),
    ]


def _legend(panel: _Panel, x: float, y: float, width: float) -> list[str]:
    steps = 32
    bars = [
        f"<rect x='{x + i * width / steps:.2f}' y='{y}' width='{width / steps + 0.5:.2f}' height='8' "
        f"fill='{_colour(i / (steps - 1))}'/>"
        for i in range(steps)
    ]
    low, high = panel.text(panel.low), panel.text(panel.high)
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
