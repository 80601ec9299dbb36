"""The runs of one method on one task in one system, in a separate process; printed as JSON.

    python -m examples.quality.worker SETTING_JSON

A setting with `rates` trains each of them with each seed. Without `rates`, the first seed searches the rate with the
lowest held-out loss in steps of a factor √10, until the best rate has a worse one on both sides; the other seeds use
that rate.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.world import peak_bytes, reset_peak, resident_bytes
from examples.quality.setting import FACTOR, METHODS, Run, Setting, best_of
from examples.quality.training import read_data, train_ours, train_peft
from loray.bases.registry import get_base
from loray.errors import TrainingError


def main(setting: Setting) -> dict[str, Any]:
    """The runs, and `peak_bytes`: the peak of the resident set above what interpreter and libraries hold."""
    base = get_base(Path(setting.home), setting.base)
    before = resident_bytes()
    reset_peak()
    train = {"loray": train_ours, "peft": train_peft}[setting.system]
    first, *others = setting.seeds
    start = METHODS[setting.method][1]
    data = read_data(base, setting.recipe(start, first))  # the same for all rates and seeds

    def run(rate: float, seed: int) -> Run:
        spec = setting.recipe(rate, seed)
        name = f"{setting.system}-{setting.method}-{setting.modules}-{rate:.1e}-{seed}".replace(" ", "-")
        folder = Path(setting.folder) / name
        shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was killed
        try:
            return train(spec, base, data, folder)
        except TrainingError:  # the rate is too high and the run diverged, which a sweep must find out
            return Run(rate, seed, (), math.nan, (), 0, 0, "")

    if setting.rates:
        runs = [run(rate, seed) for rate in setting.rates for seed in setting.seeds]
    else:
        runs = sweep(start, lambda rate: run(rate, first), setting.max_rates)
        best = best_of(runs).rate
        runs += [run(best, seed) for seed in others]
    return {"runs": [asdict(r) for r in runs], "peak_bytes": peak_bytes() - before}


def sweep(start: float, run: Callable[[float], Run], max_rates: int) -> list[Run]:
    """Three rates around `start`, then further ones beyond the best while it is at an end; at most `max_rates`."""
    runs = [run(start * FACTOR**k) for k in (-1, 0, 1)]
    while len(runs) < max_rates:
        runs.sort(key=lambda r: r.rate)
        best = runs.index(best_of(runs))
        if best not in (0, len(runs) - 1):
            break
        runs.append(run(runs[best].rate * (FACTOR if best else 1 / FACTOR)))
    return runs


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Setting.from_dict(json.loads(sys.argv[1])))) + "\n")
