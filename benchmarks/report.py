"""Reports of benchmarks: JSON with machine, date, commit, arguments, columns and rows; tables of it, and pictures.

    python -m benchmarks.report            write the tables of docs/benchmarks/*.md anew
    python -m benchmarks.report --check    only say which pages differ; then the exit code is 1

A table of a page stands between `<!-- table NAME -->` and `<!-- end -->`, and is made of
docs/benchmarks/figures/NAME.json.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Cell = str | float | int | bool | None
PAGES = Path("docs/benchmarks")
_TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Report:
    """Of one run, or of one table of a page.

    machine    what `describe_machine` says, with date and commit
    columns    names, with the format of their numbers after a tab where three significant digits are not right: "p50,
               ms\\t.1f"
    rows       a text, a number or nothing for each column
    arguments  of the command
    more       further figures, which are in no table
    """

    machine: Mapping[str, str]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    arguments: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Report:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path | None) -> None:
        """Do nothing if `path` is None."""
        write_json(path, asdict(self))

    def text(self) -> str:
        """The table for a terminal: the first column on the left, the others on the right."""
        lines = [self._names(), *self._texts()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )

    def markdown(self) -> str:
        lines = [self._names(), ["---"] * len(self.columns), *self._texts()]
        return "".join(f"|{'|'.join(_padded(cell) for cell in line)}|\n" for line in lines)

    def _names(self) -> list[str]:
        return [column.partition("\t")[0] for column in self.columns]

    def _texts(self) -> Iterator[list[str]]:
        formats = [column.partition("\t")[2] for column in self.columns]
        for row in self.rows:
            yield [shown(cell, form) for cell, form in zip(row, formats, strict=True)]


class Verdict(NamedTuple):
    """A target and what was reached. `floor`: the figure at the machine's limits, None if no formula gives it.
    `recorded`: what it is compared with is not of this run but recorded earlier.
    """

    name: str
    sign: str
    target: float
    reached: float
    floor: float | None = None
    recorded: bool = False

    @property
    def is_met(self) -> bool:
        """NaN meets no target."""
        return self.reached >= self.target if self.sign == "≥" else self.reached <= self.target

    def line(self) -> str:
        floor = f" (floor {shown(self.floor)})" if self.floor is not None else ""
        note = ", recorded earlier" if self.recorded else ""
        met = "met" if self.is_met else "MISSED"
        return f"{met:<7}{self.name}: {shown(self.reached)} {self.sign} {shown(self.target)}{floor}{note}"

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"is_met": self.is_met}


def shown(value: Cell, form: str = "") -> str:
    """A number in this format, by default with three significant digits; a text as it is; empty for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str | bool) or (isinstance(value, int) and not form):
        return f"{value:,}" if type(value) is int else str(value)
    if form:
        return format(value, form)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between neighbours; NaN of an empty sequence."""
    if not values:
        return float("nan")
    ascending = sorted(values)
    position = q * (len(ascending) - 1)
    low = int(position)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (position - low) * (ascending[high] - ascending[low])


def machine_line(machine: Mapping[str, str], **more: str) -> str:
    """`describe_machine`'s names and values, and further ones, on one line."""
    return "  ".join(f"{name} {value}" for name, value in {**machine, **more}.items())


def write_json(path: Path | None, figures: object) -> None:
    """Write `figures` to `path` as indented JSON, with null for NaN; do nothing if `path` is None."""
    if path is not None:
        path.write_text(json.dumps(_without_nan(figures), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def panels(path: Path, rows: int, columns: int, *, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a grid of matplotlib's Axes, indexed [row][column], and write it to `path` as SVG; `size` in inches. Equal
    results give equal files.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "loray"}):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        try:
            yield axes
            figure.tight_layout()
            figure.savefig(path, format="svg", metadata={"Date": None})
        finally:
            plt.close(figure)


def renewed(page: str, figures: Path) -> str:
    """The page with each of its tables made anew."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{Report.read(figures / f'{found[2]}.json').markdown()}\n{found[3]}"

    return _TABLE.sub(table, page)


def main(argv: Sequence[str] | None = None) -> int:
    only_check = "--check" in (sys.argv[1:] if argv is None else argv)
    stale = []
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := renewed(page, PAGES / "figures")) != page:
            stale.append(path)
            if not only_check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        sys.stdout.write(f"{path} {'differs' if only_check else 'written'}\n")
    return int(only_check and bool(stale))


def _padded(cell: str) -> str:
    return "---" if cell == "---" else f" {cell} " if cell else " "


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
