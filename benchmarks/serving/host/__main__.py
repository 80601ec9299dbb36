"""The host's time for one decode step on a GPU, without a GPU.

    python -m benchmarks.serving.host --layers 32 --heads 32 --kv-heads 8 --rows 32 --adapters 32 [--json FILE]

The real engine runs a model of the given depth and heads whose widths are small, on the cuda backend with kernels that
do nothing (see `stand_in` for what is replaced). Row i uses adapter i modulo their number, of `--method` on q, k, v and
o; without adapters all rows use the base. A step of all rows is timed `--steps` times, then one is counted. A card
adds what launches, copies and waiting cost there. The figure to compare it with is the time that the card needs for the
same step: if the host takes longer, the card waits for it. Before, all decode steps are captured: `recording_s` is the
host's part of that, and standard error has how far it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch

from benchmarks.machine import describe_machine, load_average
from benchmarks.serving.host.adapters import METHODS, make_adapters, weights_bytes
from benchmarks.serving.host.stand_in import StandInOps, counting, python_cost
from benchmarks.serving.models import RANDOM, random_tensors
from loray.bases.registry import BaseModel
from loray.engine import build
from loray.engine.engine import Engine
from loray.engine.memory.adapter_manager import Stage
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec

_WARM = 8  # steps of all rows before the first that counts
_STEP_TOKENS = 16384  # of prompts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, _engine(args, Path(folder)) as (engine, ops):
        for request in _requests(args, engine.base):
            engine.add(request)
        _start(engine, args.rows)
        prompts = _prompts(args, engine.base)
        for _ in range(_WARM):
            _step(engine, args, prompts)
        gc.collect()
        gc.freeze()  # as a replica does, see serve_apps.python_gc
        seconds = []
        for _ in range(args.steps):
            num_tokens, took = _step(engine, args, prompts)
            seconds.append(took)
            if num_tokens != args.rows + bool(args.prompt):
                raise SystemExit(f"a step gave {num_tokens} tokens, not one for each of its requests")
        with counting(ops) as counts:
            _step(engine, args, prompts)
        python_cost(counts, *[lambda: _step(engine, args, prompts)] * 2)
        gc.unfreeze()
    figures = {
        "rows": args.rows,
        "adapters": args.adapters,
        "method": args.method,
        "context": args.context,
        "prompt": args.prompt,
        "host_ms": round(1e3 * statistics.median(seconds), 3),
        "host_ms_mean": round(1e3 * statistics.mean(seconds), 3),
        "host_ms_lowest": round(1e3 * min(seconds), 3),
        "host_ms_highest": round(1e3 * max(seconds), 3),
        "recorded_steps": ops.capturer.num_captured,
        "recording_s": round(ops.capturer.seconds, 2),
        **vars(counts),
    }
    machine = {**describe_machine(), "load": f"{load_average():.2f}"}
    click.echo(json.dumps(figures) if args.json else "\n".join(f"{name:<20}{value}" for name, value in figures.items()))
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n", encoding="utf-8")
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=32, help="of the model (default %(default)s)")
    add("--heads", type=int, default=32, help="for queries (default %(default)s)")
    add("--kv-heads", type=int, default=8, help="for keys and values (default %(default)s)")
    add("--rows", type=int, default=32, help="requests that decode (default %(default)s)")
    add("--adapters", type=int, default=32, help="of the rows; 0: all rows use the base (default %(default)s)")
    add("--method", choices=(*METHODS, "mixed"), default="lora", help="of the adapters; mixed: by turns (%(default)s)")
    add("--rank", type=int, default=16, help="of the adapters (default %(default)s)")
    add("--context", type=int, default=128, help="tokens of each prompt (default %(default)s)")
    add("--prompt", type=int, default=0, help="tokens of a prompt that each step has beside the rows (default: none)")
    add("--temperature", type=float, default=0.0, help="of all requests (default %(default)s, greedy)")
    add("--steps", type=int, default=50, help="that are timed (default %(default)s)")
    add("--json", nargs="?", const="-", help="print the figures as JSON; with a file, write them there too")
    return parser


@contextmanager
def _engine(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Engine, StandInOps]]:
    config = dataclasses.replace(
        RANDOM["tiny-random"],
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=8,
        max_position_embeddings=1 << 17,
    )
    base = BaseModel("host", folder, hashlib.sha256(repr(config).encode()).hexdigest(), config, source="random")
    tokens = args.context + _max_tokens(args)
    num_tokens = args.rows * (tokens + 32) + args.prompt + 32
    kv_bytes = 4 * config.num_layers * config.num_kv_heads * config.head_dim * num_tokens
    methods = METHODS if args.method == "mixed" else (args.method,)
    adapters = make_adapters(config, args.rank, methods, args.adapters)
    of_digest = {ref.digest: weights for ref, weights in zip(_refs(args, base), adapters, strict=True)}
    spec = ServeSpec(
        base=base.name,
        pool_bytes=kv_bytes + 2 * sum(map(weights_bytes, adapters)) + (8 << 20),
        host_bytes=2 << 30,
        max_model_len=max(tokens, args.prompt) + 16,
        max_num_seqs=args.rows + bool(args.prompt),
        max_num_batched_tokens=max(_STEP_TOKENS, args.rows + args.prompt),
        itl_slo_ms=1e6,  # steps are limited by tokens alone
        graph_record_s=1e6,  # all steps are captured before the start
        enable_prefix_caching=False,
    )
    ops = StandInOps()
    with patch.object(build, "backend", lambda name, device: ops):
        engine = build.build_engine(
            spec, base, lambda ref: of_digest[ref.digest], random_tensors(config, torch.device("cpu"), torch.bfloat16)
        )
    try:
        engine.warm_up()
        yield engine, ops
    finally:
        engine.close()


def _max_tokens(args: argparse.Namespace) -> int:
    """So many that no row ends: the first have decoded while other prompts were computed."""
    return int(args.steps + _WARM + 32 + 2 * args.rows * args.context // _STEP_TOKENS)


def _step(engine: Engine, args: argparse.Namespace, prompts: Iterator[GenerateRequest]) -> tuple[int, float]:
    """A step of all rows, and of a prompt beside them if that is asked: its tokens and seconds."""
    if args.prompt:
        engine.add(next(prompts))
    began = time.perf_counter()
    outputs = engine.step()
    return len(outputs), time.perf_counter() - began


def _prompts(args: argparse.Namespace, base: BaseModel) -> Iterator[GenerateRequest]:
    """Each for another adapter, and of one token of output."""
    refs, params = _refs(args, base), SamplingParams(max_tokens=1, temperature=0)
    for i in count():
        prompt = tuple((17 * k + 5 * i) % 400 + 100 for k in range(args.prompt))
        yield GenerateRequest(f"prompt {i}", prompt, params, refs[i % len(refs)] if refs else None)


def _requests(args: argparse.Namespace, base: BaseModel) -> Iterator[GenerateRequest]:
    params = SamplingParams(
        max_tokens=_max_tokens(args), temperature=args.temperature, seed=1, ignore_eos=True, min_tokens=0
    )
    refs = _refs(args, base)
    for row in range(args.rows):
        prompt = tuple((31 * k + 7 * row) % 400 + 100 for k in range(args.context))
        yield GenerateRequest(str(row), prompt, params, refs[row % len(refs)] if refs else None)


def _refs(args: argparse.Namespace, base: BaseModel) -> list[AdapterRef]:
    return [
        AdapterRef(
            digest=hashlib.sha256(str(i).encode()).hexdigest(),
            name=f"adapter-{i}",
            version=1,
            method="lora",
            base_fingerprint=base.fingerprint,
            context_length=base.config.max_position_embeddings,
            nbytes=1 << 16,
        )
        for i in range(args.adapters)
    ]


def _start(engine: Engine, rows: int) -> None:
    """Until every row decodes. All adapters are loaded first, so that prompts are computed together."""
    at = engine.adapter_manager.table.at
    while engine.adapter_manager.poll() or at[Stage.QUEUED] or at[Stage.LOADING]:
        time.sleep(0.001)
    while True:
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        if len(outputs) == rows and len(engine.scheduler.running) == rows:
            return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(sys.argv[1:])
