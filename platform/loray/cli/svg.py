"""Pictures as SVG: the document around their parts, and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from xml.sax.saxutils import escape

MARGIN = 24
_FONT = "font-family='system-ui, Helvetica, Arial, sans-serif'"


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """A white picture of that size, in pixels, with `parts` on it."""
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
    """`anchor`: the part of the text that is at `x`."""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' "
        f"fill='{fill}'>{escape(content)}</text>"
    )
