"""What the dtype of weights and KV cache costs on this CPU: tokens/s of 32 requests, and time a token of one.

    python -m benchmarks.engine.dtypes [--repeat 3] [--json FILE]

SmolLM2-135M; an engine in bfloat16 and one in float32 in this process, in turn, with prompts of 64 tokens and answers
of 32. It is why `dtype: auto` serves in bfloat16 also where the CPU does not multiply it (decision 4).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from benchmarks.serving.models import bench_base
from benchmarks.stepping import finish
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.machine import hardware
from loray.spec import AdapterRef, DType, GenerateRequest, SamplingParams, ServeSpec

_DTYPES: tuple[DType, ...] = ("bfloat16", "float32")
_PROMPT, _ANSWER, _REQUESTS = 64, 32, 32


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a base of this machine (default %(default)s)")
    parser.add_argument("--repeat", type=one_or_more, default=3, help="passes of each (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    described = describe_machine()
    click.echo(machine_line(described, load=f"{load_average():.2f}"))
    click.echo(hardware().describe())
    base = bench_base(args.model)

    def no_adapters(ref: AdapterRef) -> Any:
        raise AssertionError(ref)

    figures: dict[str, dict[str, float]] = {}
    for dtype in _DTYPES:
        spec = ServeSpec(base=base.name, dtype=dtype, pool_bytes=512 << 20, enable_prefix_caching=False)
        engine = build_engine(spec, base, no_adapters)
        vocabulary = base.config.vocab_size
        _seconds(engine, _REQUESTS, vocabulary)  # compiles kernels, starts threads
        many = statistics.median(_seconds(engine, _REQUESTS, vocabulary) for _ in range(args.repeat))
        one = statistics.median(_seconds(engine, 1, vocabulary) for _ in range(args.repeat))
        engine.close()
        figures[dtype] = {"tokens_per_s": _REQUESTS * _ANSWER / many, "token_ms": 1000 * one / _ANSWER}
        click.echo(
            f"{dtype:<10}{figures[dtype]['tokens_per_s']:>8.0f} tokens/s of {_REQUESTS} requests"
            f"{figures[dtype]['token_ms']:>8.1f} ms a token of one, its prompt included"
        )
    write_json(args.json, {"machine": described, "figures": figures})
    return figures


def _seconds(engine: Engine, num: int, vocabulary: int) -> float:
    params = SamplingParams(max_tokens=_ANSWER, temperature=0, ignore_eos=True)
    for i in range(num):
        prompt = tuple((i * 7919 + j * 104729) % vocabulary for j in range(_PROMPT))
        engine.add(GenerateRequest(f"{time.monotonic_ns()}-{i}", prompt, params))
    began = time.perf_counter()
    for _ in finish(engine):
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
