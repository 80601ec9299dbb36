"""Figures drawn by matplotlib as SVG; equal results give equal files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def panels(path: Path, rows: int, columns: int, *, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a grid of matplotlib's Axes, indexed [row][column], and write it to `path`; `size` in inches."""
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
