"""Prepares a run as the driver of `loray train` does, and reads its first step; prints times and memory as JSON.

python -m benchmarks.training.workers.data FOLDER ORDER ROW_LENGTH CPUS STARTED [--random-ids]

STARTED is when the process was started, in seconds since the epoch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.world import peak_bytes, reset_peak, resident_bytes
from jobs.driver.prepare import prepare
from jobs.driver.tokenising import RayTasks
from jobs.events import SILENT
from loray.recipes.load import load_recipe
from loray.settings import Settings
from loray.train.data.batches import BatchStream
from loray.train.data.corpus import Task
from loray.train.data.shards import FolderCache, ShardIndex, TokenShard
from loray.train.data.tokenize import Tokenisation

_BYTES_PER_TOKEN = 3.1  # of the benchmark's words


def main() -> None:
    folder, order, row_length, cpus, started = sys.argv[1:6]
    imported = resident_bytes()
    fields: dict[str, Any] = {
        "name": "data-benchmark",
        "data": {"train": f"{folder}/data", "max_length": int(row_length)},
        "batch": {"rows": 4, "order": order},
        "gradient_checkpointing": True,  # without it the plan of such a step fits few machines; no step is trained
        "max_steps": 1,
        "num_epochs": None,
    }
    recipe = load_recipe(over=fields)
    settings = Settings.from_env({"LORAY_HOME": f"{folder}/home", "LORAY_LOG_LEVEL": "ERROR"})
    runner = WithoutTokenizer if "--random-ids" in sys.argv else RayTasks
    prepared = prepare(recipe, settings, run=runner(recipe.spec, None, lambda: _connect(int(cpus)), SILENT))
    prepared_s, driver_bytes = time.time() - float(started), peak_bytes()
    if ray.is_initialized():
        ray.shutdown()
    reset_peak()
    spec = prepared.spec
    stream = BatchStream(
        prepared.data.train, spec.batch, max_length=prepared.data.max_length, seed=spec.seed, per_step=4
    )
    stream.next_step()
    print(  # noqa: T201 - the result
        json.dumps(
            {
                "num_tokens": prepared.data.report.num_tokens,
                "num_rows": prepared.data.report.num_rows,
                "prepared_s": prepared_s,
                "step_s": time.time() - float(started) - prepared_s,
                "driver_bytes": driver_bytes,
                "imported_bytes": imported,
                "worker_bytes": peak_bytes(),
                "shard_bytes": sum(path.stat().st_size for path in Path(folder, "home", "tokens").rglob("*.*")),
            }
        )
    )


def _connect(cpus: int) -> None:
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


class WithoutTokenizer(RayTasks):
    """Puts shards of random ids, here."""

    def __call__(self, tokenisation: Tokenisation, cache: FolderCache, tasks: Iterator[Task], num_tasks: int) -> None:
        rng = np.random.default_rng(0)
        for task in tasks:
            sizes = [int(len(line) / _BYTES_PER_TOKEN) for line in task.content.data.split(b"\n") if line]
            lengths, none = np.array(sizes, np.int32), np.zeros(len(sizes), np.int32)
            documents = np.arange(len(sizes), dtype=np.int32)
            desirable = np.ones(len(sizes), np.bool_)
            index = ShardIndex(lengths, documents, np.empty((0, 2), np.int32), none, True, len(sizes), desirable)
            cache.put(task.key, TokenShard(rng.integers(0, 49152, sum(sizes), np.uint16), index))


if __name__ == "__main__":
    main()
