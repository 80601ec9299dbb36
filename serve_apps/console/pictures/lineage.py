"""Where versions come from and what points at them: data → run → version → alias, as a picture and as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loray.catalog import VersionSummary

_WIDTH, _HEIGHT, _GAP, _ROW = 150, 26, 50, 36  # units of the picture
_COLUMNS = ("Data", "Run", "Version", "Alias")
_LONGEST = 20  # characters that fit into a box


class Box(NamedTuple):
    x: int
    y: int
    kind: str
    text: str
    title: str


class Lineage(NamedTuple):
    """`rows`: (data, run, version, aliases) of each version. `lines`: (x1, y1, x2, y2)."""

    rows: tuple[tuple[str, str, str, str], ...]
    boxes: tuple[Box, ...]
    lines: tuple[tuple[int, int, int, int], ...]
    width: int
    height: int
    box: tuple[int, int] = (_WIDTH, _HEIGHT)


def lineage_of(versions: Sequence[VersionSummary]) -> Lineage:
    """A row for each version; what versions have in common is drawn once, beside the first of them."""
    boxes: dict[tuple[int, str], Box] = {}
    lines: list[tuple[int, int, int, int]] = []
    rows = []
    num_aliases = 0
    for row, version in enumerate(versions):
        parts = (version.data_fingerprint or "", version.run or "", f"version {version.version}")
        rows.append((parts[0] and parts[0][:12], *parts[1:], ", ".join(version.aliases)))
        before: Box | None = None
        for column, text in enumerate(parts):
            if text:
                shown = text[:12] if column == 0 else text
                before = _join(boxes, lines, before, column, row, shown, text)
        for alias in version.aliases:
            _join(boxes, lines, before, 3, num_aliases, alias, alias)
            num_aliases += 1
    height = max(len(versions), num_aliases, 1) * _ROW
    return Lineage(tuple(rows), tuple(boxes.values()), tuple(lines), 4 * _WIDTH + 3 * _GAP, height)


def _join(
    boxes: dict[tuple[int, str], Box],
    lines: list[tuple[int, int, int, int]],
    before: Box | None,
    column: int,
    row: int,
    text: str,
    title: str,
) -> Box:
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    kind = _COLUMNS[column]
    made = Box(column * (_WIDTH + _GAP), row * _ROW + 4, kind.lower(), short, f"{kind}: {title}")
    box = boxes.setdefault((column, title), made)
    if before is not None:
        line = (before.x + _WIDTH, before.y + _HEIGHT // 2, box.x, box.y + _HEIGHT // 2)
        if line not in lines:
            lines.append(line)
    return box
