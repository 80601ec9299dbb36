"""What a worker holds of the rows of an epoch, however many there are.

    python -m benchmarks.training.rows                          10⁸ rows, shuffled and packed: 1.6 GB of disk
    python -m benchmarks.training.rows --rows 1e9 --orders shuffled     16 GB

Columns of rows of random lengths are written as `loray train` keeps them. A process then plans an epoch of them and
takes steps from places all over it, as a worker does, without reading tokens. Memory is the largest resident set
(VmHWM) above what interpreter and libraries hold, with pages of mapped files. Counting micro-batches of packed rows is
shared among a run's workers: here one of `--workers` counts its part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import machine_line, write_json
from benchmarks.world import describe_machine, load_average, peak_bytes, reset_peak, resident_bytes, run_modules
from loray.spec import BatchSpec
from loray.train.data.batches import BatchStream, Cursor, ShareOut
from loray.train.data.corpus import ShardTokens
from loray.train.data.rows import StreamRows
from loray.train.data.shards import TOKENS, FolderCache

_MAX_LENGTH = 2048
_AT_ONCE = 1 << 22
_PLACES, _STEPS = 8, 50
STARTS, LENGTHS = "5" * 64, "1" * 64


class WithoutTokens(StreamRows):
    """Rows whose tokens are all 0, which are found as others are."""

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        assert int(self.starts[i]) >= 0
        length = int(self.lengths[i])
        self.let_go()  # as is done in its place
        return np.zeros(length, np.int32), np.ones(length, np.bool_)


def write_columns(cache: FolderCache, num_rows: int) -> None:
    """Write lengths of 2 to 600 tokens, and where rows begin."""
    rng, at = np.random.default_rng(0), 0
    for key in (STARTS, LENGTHS):
        cache.path(key, TOKENS).parent.mkdir(parents=True)
    starts, lengths = (
        np.lib.format.open_memmap(cache.path(key, TOKENS), "w+", np.int64, (num_rows,)) for key in (STARTS, LENGTHS)
    )
    for first in range(0, num_rows, _AT_ONCE):
        part = slice(first, min(first + _AT_ONCE, num_rows))
        lengths[part] = rng.integers(2, 600, part.stop - part.start)
        ends = at + np.cumsum(lengths[part])
        starts[part], at = ends - lengths[part], int(ends[-1])


def counted_by_one_of(num_workers: int) -> ShareOut:
    """Count every `num_workers`-th block, and take the others to have no fewer."""

    def share_out(function: Callable[[int], int], num: int) -> Sequence[int]:
        mine = [function(k) for k in range(0, num, num_workers)]
        return [mine[k // num_workers] if k % num_workers == 0 else int(0.99 * mine[0]) for k in range(num)]

    return share_out


def measure(folder: str, order: str, num_workers: int) -> dict[str, Any]:
    """Take steps as a worker does."""
    cache = FolderCache(Path(folder))
    before = resident_bytes()
    reset_peak()
    columns = map(cache.column, (STARTS, LENGTHS))
    rows = WithoutTokens.of(ShardTokens(cache, (), np.zeros(0, np.int64)), *columns)
    spec = BatchSpec.model_validate({"rows": 8, "order": order})
    opened = partial(BatchStream, rows, spec, max_length=_MAX_LENGTH, seed=0, per_step=8)
    began = time.perf_counter()
    stream = opened(share_out=counted_by_one_of(num_workers))
    num_batches = 8 * stream.num_steps(1.0)
    counting_s = time.perf_counter() - began
    waits = []
    for place in range(_PLACES):
        stream.cursor = Cursor(0, place * (num_batches // _PLACES - 8))
        for _ in range(_STEPS):
            began = time.perf_counter()
            stream.next_step()
            waits.append(time.perf_counter() - began)
    held = peak_bytes() - before
    return {"held_bytes": held, "count_s": counting_s, "block_s": max(waits), "step_s": float(np.median(waits))}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows as they are written to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e8)
    parser.add_argument("--orders", nargs="+", default=["shuffled", "packed"])
    parser.add_argument("--workers", type=int, default=64, help="of the run, which count together")
    parser.add_argument("--folder", type=Path, help="for the columns, 16 bytes a row (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    click.echo(machine_line(describe_machine(), load=f"{load_average():.1f}"))
    folder = Path(tempfile.mkdtemp(prefix="loray-rows-benchmark-", dir=args.folder))
    found = []
    try:
        write_columns(FolderCache(folder), int(args.rows))
        for order in args.orders:
            command = ["benchmarks.training.rows", "--measure", str(folder), order, str(args.workers)]
            (measured,) = run_modules([command], 1)
            found.append({"order": order, "rows": int(args.rows)} | measured)
            click.echo(
                f"{int(args.rows):,} rows, {order}: {measured['held_bytes'] / 1e6:.0f} MB held, counted in "
                f"{measured['count_s']:.1f} s, a block planned in {measured['block_s']:.1f} s, a step's batches in "
                f"{1e3 * measured['step_s']:.1f} ms"
            )
    finally:
        shutil.rmtree(folder)
    write_json(args.json, found)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        folder, order, workers = sys.argv[2:]
        sys.stdout.write(json.dumps(measure(folder, order, int(workers))) + "\n")
    else:
        main()
