"""Pictures of results as SVG, by matplotlib; the same results give the same file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def panels(path: Path, rows: int, columns: int, *, size: tuple[float, float]) -> Iterator[Any]:
    """A grid of matplotlib's Axes, indexed [row][column], written to `path` at the end; `size` in inches."""
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
