"""The benchmark of the catalog at its size.

    python -m benchmarks.catalog                      100,000 adapters of 100 tenants, on SQLite and on PostgreSQL
    python -m benchmarks.catalog --adapters 10000
    python -m benchmarks.catalog --database postgresql://…    an empty database of another server

The gateway's directory of models runs in an event loop while another process changes the catalog; pages are those that
the catalog API reads. docs/benchmarks/catalog.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import workers
from benchmarks.catalog.fill import fill
from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from tests.fixtures.postgres import start_postgres


class _Row(NamedTuple):
    """A figure, in words, and what is wanted of it: at most `wanted`, or at least."""

    name: str
    text: str
    unit: str
    wanted: float | None = None
    at_least: bool = False

    def line(self, value: float) -> tuple[str, str, str]:
        wanted = "" if self.wanted is None else f"{'≥' if self.at_least else '≤'} {self.wanted:,g}"
        return f"{self.text}, {self.unit}", f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", wanted

    def is_met(self, value: float) -> bool:
        return self.wanted is None or (value >= self.wanted if self.at_least else value <= self.wanted)


_ROWS = (
    _Row("change_s", "a change is served after at most", "s", 1.0),
    _Row("change_hold_ms", "a change holds the event loop for at most", "ms", 20.0),
    _Row("idle_hold_ms", "  (the loop's longest hold without a change)", "ms"),
    _Row("resolve_per_s", "known names resolved", "1/s", 200_000, at_least=True),
    _Row("unknown_ms", "an unknown name, of the snapshot (p95)", "ms", 2.0),
    _Row("unknown_database_ms", "an unknown name, of the database (p95)", "ms"),
    _Row("list_ms", "a page of a list (the slowest kind)", "ms", 50.0),
    _Row("search_ms", "a page of a search (the slowest kind)", "ms", 50.0),
    _Row("filter_ms", "a page of a filter (the slowest kind)", "ms", 50.0),
    _Row("console_ms", "a page of the console (the slowest)", "ms", 300.0),  # docs/benchmarks/catalog.md says why
    _Row("memory_mb", "memory more than with no adapter", "MB", 200.0),
    _Row("first_s", "the first snapshot", "s"),
    _Row("first_hold_ms", "the first snapshot holds the event loop for", "ms"),
    _Row("models_s", "/v1/models, whole", "s"),
    _Row("models_mb", "/v1/models, whole", "MB"),
    _Row("models_hold_ms", "/v1/models, whole, holds the event loop for", "ms"),
    _Row("models_page_ms", "/v1/models, a page of 100", "ms"),
    _Row("disk_write_s", "the snapshot is written to disk", "s"),
    _Row("disk_hold_ms", "  and holds the event loop for", "ms"),
    _Row("disk_read_s", "the snapshot is read from disk", "s"),
    _Row("disk_mb", "the snapshot on disk", "MB"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. The exit code is 1 if a wanted figure is not reached."""
    args = _arguments(argv)
    machine = describe_machine() | {"load": f"{load_average():.2f}"}
    click.echo(machine_line(machine))
    figures: dict[str, Mapping[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.database:
            with _database(kind, Path(folder)) as url:
                began = time.perf_counter()
                fill(url, args.adapters, args.tenants)
                click.echo(f"{_shown(kind)}: {args.adapters:,} adapters in {time.perf_counter() - began:.0f} s")
                setup = {"url": url, "num_adapters": args.adapters, "num_tenants": args.tenants}
                (figures[_shown(kind)],) = workers.run([["benchmarks.catalog.measure", json.dumps(setup)]], 1)
    click.echo("\n" + _table(figures))
    write_json(args.json, {"machine": machine, "figures": figures})
    return 0 if all(row.is_met(found[row.name]) for row in _ROWS for found in figures.values()) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catalog", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=one_or_more, default=100_000)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--database", action="append", help="sqlite, postgresql or a URL (default: the first two)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    args.database = args.database or ["sqlite", "postgresql"]
    if args.adapters < 1000 or args.tenants < 4:
        parser.error("fill it with 1,000 adapters of 4 tenants at least")
    return args


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/catalog.db"
    elif kind == "postgresql":
        with start_postgres(["shared_buffers=128MB"]) as server:
            yield server.new_database()
    else:
        yield kind


def _shown(kind: str) -> str:
    return kind.partition(":")[0]


def _table(figures: Mapping[str, Mapping[str, float]]) -> str:
    width = max(len(row.line(0.0)[0]) for row in _ROWS)
    lines = ["  ".join((f"{'':<{width}}", *(f"{name:>12}" for name in figures), f"{'wanted':>12}"))]
    for row in _ROWS:
        cells = [row.line(found[row.name]) for found in figures.values()]
        marks = ["" if row.is_met(found[row.name]) else "*" for found in figures.values()]
        values = (f"{value + mark:>12}" for (_, value, _), mark in zip(cells, marks, strict=True))
        lines.append("  ".join((f"{cells[0][0]:<{width}}", *values, f"{cells[0][2]:>12}")))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
