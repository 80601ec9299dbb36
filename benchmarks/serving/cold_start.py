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
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks.report import Cell, Report, machine_line
from benchmarks.serving.adapters import AdapterSet, open_library
from benchmarks.serving.models import bench_base
from benchmarks.stepping import finish
from benchmarks.world import describe_machine, load_average
from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.settings import Settings
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec
from loray.store import AdapterStore, open_store
from serve_apps.replica.startup import adapter_loader

_PROMPT_TOKENS = 64
_AGO = 3
_KINDS = ("raw", "cold", "warm", "cached")
_COLUMNS = ("store", "rank", "MB", *(f"{kind}, ms\t.1f" for kind in _KINDS), "allowed\t.1f", "ratio\t.2f", "load\t.2f")


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a base on this machine (default %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--stores", choices=["file", "s3"], nargs="+", default=["file", "s3"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"), help="keeps the published adapters")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    base, machine = bench_base(args.model, args.folder), describe_machine()
    click.echo(machine_line(machine))
    click.echo(f"medians of {args.repetitions}; the claim is cold ≤ 1.3 · warm + raw")
    rows: list[list[Cell]] = []
    every: list[dict[str, list[float]]] = []
    for store in args.stores:
        with open_library(store, args.folder.absolute(), base) as library:
            for rank in args.ranks:
                refs = library.publish(AdapterSet(args.repetitions, ranks=(rank,)))
                before, times = load_average(), _measure(base, refs, library.url)
                ms = {kind: 1e3 * statistics.median(times[kind]) for kind in _KINDS if times[kind]}
                allowed = 1.3 * ms["warm"] + ms["raw"]
                shown = [ms.get(kind) for kind in _KINDS]
                rows.append([store, rank, refs[0].nbytes / 1e6, *shown, allowed, ms["cold"] / allowed, before])
                every.append(dict(times))
    report = Report(machine, _COLUMNS, rows, " ".join(sys.argv[1:] if argv is None else argv), {"seconds": every})
    click.echo(report.text())
    report.write(args.json)
    return report


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
            if i >= _AGO:
                times["cached"].append(_first_token_s(engine, refs[i - _AGO], i))
        engine.close()
    return times


def _first_token_s(engine: Engine, adapter: AdapterRef | None, seed: int) -> float:
    """Seconds of one request for one token, whose prompt is a function of `seed`."""
    most = min(40000, engine.base.config.vocab_size - 100)
    prompt = tuple((7919 * seed + 31 * k) % most + 100 for k in range(_PROMPT_TOKENS))
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


if __name__ == "__main__":
    main()
