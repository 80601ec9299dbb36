"""Time to the first token of an adapter that the replica has never had, beside a warm one and the bare transfer.

    python -m benchmarks.serving.cold_start [--ranks 8 64] [--stores file s3] [--repetitions 9] [--json FILE]

SmolLM2-135M in bf16, LoRA on q, k, v, o, prompts of 64 tokens, in-process; nothing else runs in the engine. Each
repetition takes an adapter of its own through four measurements, one after the other:

    raw     its weights' bytes are read from the store, and nothing is done with them
    cold    first token of a request on it: the store has it, neither the node's cache, nor the host, nor the pool
    warm    the same once more: it is in the pool
    cached  first token on an adapter of three repetitions ago: the node's cache has it packed, host and pool no more

The claim is cold ≤ 1.3 · warm + raw. Medians are compared; the machine's load stands beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, load_average
from benchmarks.serving.adapters import AdapterSet, open_library
from benchmarks.serving.models import bench_base
from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.settings import Settings
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.replica.replica import adapter_loader

PROMPT_TOKENS = 64
AGO = 3
COLUMNS = ("raw", "cold", "warm", "cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--stores", choices=["file", "s3"], nargs="+", default=["file", "s3"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="of the adapters that are published")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    base, machine = bench_base(), describe_machine()
    click.echo("  ".join(f"{k} {v}" for k, v in machine.items()))
    click.echo(f"milliseconds, medians of {args.repetitions} (smallest); the claim is cold ≤ 1.3 · warm + raw")
    click.echo(
        f"{'store':>5}  {'rank':>4}  {'MB':>5}" + "".join(f"  {c:>16}" for c in COLUMNS) + "  allowed  ratio  load"
    )
    rows: list[dict[str, Any]] = []
    for store in args.stores:
        with open_library(store, args.folder.absolute(), base) as library:
            for rank in args.ranks:
                refs = library.publish(AdapterSet(args.repetitions, ranks=(rank,)))
                before = load_average()
                times = _measure(base, refs, library.url)
                rows.append({"store": store, "rank": rank, "load_before": before} | _row(times))
                _print(rows[-1], refs[0].nbytes)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def _measure(base: BaseModel, refs: Sequence[AdapterRef], store_url: str) -> Mapping[str, list[float]]:
    """Seconds by column."""
    times: dict[str, list[float]] = defaultdict(list)
    store = AdapterStore(open_store(store_url))
    with tempfile.TemporaryDirectory(prefix="cold-start-") as home:
        settings = Settings.from_env({"LORAY_HOME": home, "LORAY_STORE": store_url})
        # Room for two adapters in the pool and for one on the host, so that earlier ones are soon in neither.
        spec = ServeSpec(
            base=base.name, pool_bytes=2 * refs[0].nbytes + (4 << 20), host_bytes=1, enable_prefix_caching=False
        )
        loader = adapter_loader(base, settings)
        driver = Driver(build_engine(spec, base, loader))
        for i in range(4):  # kernels are compiled, threads started, the pace of a step known
            driver.first_token_s(None, -1 - i)
        for i, ref in enumerate(refs):
            times["raw"].append(_read_s(store, ref))
            times["cold"].append(driver.first_token_s(ref, i))
            loader.keeper.flush()  # the node's cache is filled after the first token; what follows is undisturbed
            times["warm"].append(driver.first_token_s(ref, i))
            if i >= AGO:
                times["cached"].append(driver.first_token_s(refs[i - AGO], i))
        driver.close()
    return times


class Driver:
    """An engine and who waits for it, as the thread of a replica does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bell = threading.Event()
        engine.wake = self._bell.set

    def first_token_s(self, adapter: AdapterRef | None, seed: int) -> float:
        """Of one request, alone; `seed` makes the prompt."""
        prompt = tuple((7919 * seed + 31 * k) % 40000 + 100 for k in range(PROMPT_TOKENS))
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        began = time.perf_counter()
        self._engine.add(GenerateRequest("r", prompt, params, adapter))
        while self._engine.has_work:
            self._bell.clear()
            for out in self._engine.step():
                if out.error is not None:
                    raise out.error
            if self._engine.idle:
                self._bell.wait()
        seconds = time.perf_counter() - began
        self._engine.check_integrity()
        return seconds

    def close(self) -> None:
        self._engine.close()


def _read_s(store: AdapterStore, ref: AdapterRef) -> float:
    sha256 = store.manifest(ref.digest).files[WEIGHTS_FILE]
    began = time.perf_counter()
    store.objects.get(f"blobs/{sha256[:2]}/{sha256}")
    return time.perf_counter() - began


def _row(times: Mapping[str, list[float]]) -> dict[str, Any]:
    medians = {column: statistics.median(times[column]) for column in COLUMNS}
    allowed = 1.3 * medians["warm"] + medians["raw"]
    return {"seconds": dict(times), "medians": medians, "allowed": allowed, "ratio": medians["cold"] / allowed}


def _print(row: Mapping[str, Any], nbytes: int) -> None:
    columns = [f"{1e3 * row['medians'][c]:.1f} ({1e3 * min(row['seconds'][c]):.1f})" for c in COLUMNS]
    click.echo(
        f"{row['store']:>5}  {row['rank']:>4}  {nbytes / 1e6:>5.1f}"
        + "".join(f"  {c:>16}" for c in columns)
        + f"  {1e3 * row['allowed']:>7.1f}  {row['ratio']:>5.2f}  {row['load_before']:.2f}"
    )


if __name__ == "__main__":
    main()
