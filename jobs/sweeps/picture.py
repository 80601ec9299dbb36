"""A sweep's held-out losses by step as SVG: one line a trial, the best in colour, stopped ones dashed."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from jobs.sweeps.trials import TrialRecord, label, ranked
from loray.cli.svg import MARGIN, document, text

_WIDTH, _PLOT_H, _LEFT, _TOP = 860, 320, 70, 64
_LINE_H, _MAX_NAMED = 20, 20  # trials in the legend
_BEST, _OTHER, _GREY = "#c44870", "#5b7db1", "#999"
_NUM_TICKS = 5


def draw(title: str, records: Sequence[TrialRecord], best: int | None, *, keep_best: bool = True) -> str:
    """SVG. `best`: the trial to emphasise, None if there is none. `keep_best`: as of the recipe."""
    order = ranked(records, keep_best=keep_best)
    named = order[:_MAX_NAMED]
    top, bottom = _TOP, _TOP + _PLOT_H
    height = bottom + 56 + _LINE_H * (len(named) + (len(order) > len(named))) + MARGIN
    scale = _Scale(records, top, bottom)
    parts = [
        text(MARGIN, MARGIN + 14, title, size=18, weight=600),
        *scale.grid(),
    ]
    for record in reversed(order):  # the best on top
        if record.trial != best:
            parts += _line(record, scale, is_best=False)
    for record in order:
        if record.trial == best:
            parts += _line(record, scale, is_best=True)
    y = bottom + 56
    for record in named:
        parts += _legend(record, record.loss(keep_best=keep_best), y, is_best=record.trial == best)
        y += _LINE_H
    if len(order) > len(named):
        parts.append(text(_LEFT, y + 4, f"and {len(order) - len(named)} more", size=13, fill=_GREY))
    return document(_WIDTH, height, parts)


class _Scale:
    """Steps and losses as points of the picture."""

    def __init__(self, records: Sequence[TrialRecord], top: float, bottom: float) -> None:
        losses = [loss for record in records for _, loss in record.losses] or [0.0, 1.0]
        self.low, self.high = min(losses), max(losses)
        if self.high == self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.steps = max([record.num_steps or 1 for record in records], default=1)
        self._top, self._bottom = top, bottom

    def x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - MARGIN) * step / self.steps

    def y(self, loss: float) -> float:
        return self._bottom - (self._bottom - self._top) * (loss - self.low) / (self.high - self.low)

    def grid(self) -> list[str]:
        parts = []
        for i in range(_NUM_TICKS):
            share = i / (_NUM_TICKS - 1)
            loss, step = self.low + share * (self.high - self.low), round(share * self.steps)
            y = self.y(loss)
            parts.append(f"<path d='M{_LEFT} {y:.1f}H{_WIDTH - MARGIN}' stroke='#ddd'/>")
            parts.append(text(_LEFT - 8, y + 4, f"{loss:.4g}", size=12, anchor="end"))
            parts.append(text(self.x(step), self._bottom + 18, f"{step:,}", size=12, anchor="middle"))
        parts.append(text(self.x(self.steps), self._bottom + 36, "step", size=12, anchor="end", fill=_GREY))
        return parts


def _line(record: TrialRecord, scale: _Scale, *, is_best: bool) -> list[str]:
    points = [(scale.x(step), scale.y(loss)) for step, loss in record.losses]
    if not points:
        return []
    colour, width = (_BEST, 3) if is_best else (_OTHER, 1.5)
    dashes = " stroke-dasharray='5 4'" if record.status == "stopped" else ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return [
        f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='{width}'{dashes}>"
        f"<title>{escape(_name(record))}</title></path>",
        *(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{width + 0.5}' fill='{colour}'/>" for x, y in points),
    ]


def _legend(record: TrialRecord, loss: float | None, y: float, *, is_best: bool) -> list[str]:
    figure = "–" if loss is None else f"{loss:.4f}"
    return [
        f"<rect x='{_LEFT}' y='{y - 6}' width='14' height='8' fill='{_BEST if is_best else _OTHER}'/>",
        text(_LEFT + 22, y + 4, _name(record), size=13, weight=600 if is_best else 400),
        text(
            _WIDTH - MARGIN,
            y + 4,
            figure if record.status == "completed" else f"{record.status}, {figure}",
            size=13,
            anchor="end",
        ),
    ]


def _name(record: TrialRecord) -> str:
    return f"{record.trial}: {label(record.values)}"
