"""Time to the first token with an adapter that a replica has never had, beside a warm adapter and the raw transfer.

    python -m benchmarks.serving.cold_start [--ranks 8 64] [--stores file s3] [--repetitions 9] [--json FILE]

SmolLM2-135M in bf16, LoRA on q, k, v, o, prompts of 64 tokens. The engine runs in this process and has one request at a
time. Each repetition measures one adapter four times in turn:

    raw     the bytes of its weights are read from the store and dropped
    cold    the first token of a request for it: only the store has it, not the node's cache, host memory or the pool
    warm    the same again: the pool has it
    cached  the first token with the adapter of three repetitions before: only the node's cache has it, packed

The claim is cold ≤ 1.3 · warm + raw, of medians. The machine's load average is printed with them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, load_average
from benchmarks.output import machine_line, write_json
from benchmarks.serving.adapters import AdapterSet, open_library
from benchmarks.serving.models import bench_base
from benchmarks.stepping import finish
from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.settings import Settings
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.replica.startup import adapter_loader

PROMPT_TOKENS = 64
AGO = 3
COLUMNS = ("raw", "cold", "warm", "cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--stores", choices=["file", "s3"], nargs="+", default=["file", "s3"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="keeps the published adapters")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    base, machine = bench_base(), describe_machine()
    click.echo(machine_line(machine))
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
    write_json(args.json, {"machine": machine, "rows": rows})


def _measure(base: BaseModel, refs: Sequence[AdapterRef], store_url: str) -> Mapping[str, list[float]]:
    """Seconds of every repetition, by column."""
    times: dict[str, list[float]] = defaultdict(list)
    store = AdapterStore(open_store(store_url))
    with tempfile.TemporaryDirectory(prefix="cold-start-") as home:
        settings = Settings.from_env({"LORAY_HOME": home, "LORAY_STORE": store_url})
        # The pool has room for two adapters and host memory for one, so that both soon lose earlier adapters.
        spec = ServeSpec(
            base=base.name, pool_bytes=2 * refs[0].nbytes + (4 << 20), host_bytes=1, enable_prefix_caching=False
        )
        loader = adapter_loader(base, settings)
        engine = build_engine(spec, base, loader)
        for i in range(4):  # compiles kernels, starts threads, measures the time of a step
            _first_token_s(engine, None, -1 - i)
        for i, ref in enumerate(refs):
            times["raw"].append(_read_s(store, ref))
            times["cold"].append(_first_token_s(engine, ref, i))
            loader.cache_writer.flush()  # fills the node's cache now, so that it does not slow down what follows
            times["warm"].append(_first_token_s(engine, ref, i))
            if i >= AGO:
                times["cached"].append(_first_token_s(engine, refs[i - AGO], i))
        engine.close()
    return times


def _first_token_s(engine: Engine, adapter: AdapterRef | None, seed: int) -> float:
    """Seconds of one request for one token, whose prompt is a function of `seed`."""
    prompt = tuple((7919 * seed + 31 * k) % 40000 + 100 for k in range(PROMPT_TOKENS))
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    engine.add(GenerateRequest("r", prompt, params, adapter))
    for _ in finish(engine):
        pass
    seconds = time.perf_counter() - began
    engine.check_integrity()
    return seconds


def _read_s(store: AdapterStore, ref: AdapterRef) -> float:
    sha256 = store.manifest(ref.digest).files[WEIGHTS_FILE]
    began = time.perf_counter()
    store.read(ref.digest, WEIGHTS_FILE, sha256)
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
