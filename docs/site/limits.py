"""The guide's tables of limits, written into its pages from `serve_apps.limits`: python -m docs.site.limits.

A table stands behind a comment that names it: <!-- limits: requests -->
"""

from __future__ import annotations

import re
from pathlib import Path

from docs.site.markdown import table
from serve_apps.limits import TABLES, Limit

GUIDE = Path(__file__).resolve().parents[1] / "guide"
_TABLE = re.compile(r"^(<!-- limits: (\S+) -->\n)(?:\|.*\n)*", re.MULTILINE)


def names(page: str) -> list[str]:
    """The tables that a page has."""
    return [match[2] for match in _TABLE.finditer(page)]


def with_limits(page: str) -> str:
    """The page with its tables as the code has them. Raises KeyError for a table that does not exist."""
    return _TABLE.sub(lambda match: match[1] + limits_table(TABLES[match[2]]), page)


def limits_table(limits: tuple[Limit, ...]) -> str:
    """The rows as Markdown."""
    rows = [(limit.what, limit.limit, limit.set_by, limit.beyond) for limit in limits]
    return table(("what", "limit", "set by", "beyond it"), rows)


def write() -> None:
    """Write the tables into the guide's pages."""
    for path in sorted(GUIDE.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if names(page):
            path.write_text(with_limits(page), encoding="utf-8")


if __name__ == "__main__":
    write()
