"""Time to the first token of the k-th aLoRA adapter on a prompt that the base has read, beside the base's own warm hit.

    python -m benchmarks.serving.invocations [--adapters 32] [--prompt 8000] [--rounds 9] [--checked 2] [--json FILE]

SmolLM2-135M in bf16, aLoRA of rank 32 on q, k, v, o; the prompt is random tokens, and each request ends in the
invocation. The engine runs in this process and has one request at a time. The base reads the prompt; then in each round
every adapter is asked once, each after the base. An adapter's first request also has it copied into the pool, from host
memory; its further ones have not. `LoRA` is an adapter of the same weights that is active from the start.

The claims: each adapter takes ≤ 1.2 × the warm hit of the base right before it, in the median of the rounds; KV blocks
do not grow with the number of adapters, since the invocation fills no block. `--checked`: so many adapters answer as an
engine without prefix cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from operator import truediv
from pathlib import Path

import click
from transformers import AutoTokenizer

from benchmarks.options import one_or_more
from benchmarks.report import Cell, Report, machine_line
from benchmarks.serving.adapters import made_adapter
from benchmarks.serving.models import bench_base
from benchmarks.stepping import finish
from benchmarks.world import describe_machine, load_average
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.methods.weights import AdapterWeights
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec

_RANK, _MOST, _CHECKED_TOKENS = 32, 1.2, 8
_INVOCATION = "<|im_start|>assistant\n"
_COLUMNS = ("k", "first token, ms\t.1f", "÷ base\t.2f", "its first, ms\t.1f", "KV blocks", "load\t.2f")


class Bench:
    """The adapters of a run: aLoRA 0 to k − 1, and as the last one the first one's weights as plain LoRA."""

    def __init__(self, base: BaseModel, num: int, num_tokens: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        invocation = tuple(tokenizer(_INVOCATION, add_special_tokens=False).input_ids)
        most = base.config.vocab_size - 200
        self.prompt = tuple((7919 * k + 31 * k * k) % most + 100 for k in range(num_tokens))
        self.base, self.asked = base, (*self.prompt, *invocation)
        self._weights: dict[str, AdapterWeights] = {}
        self.refs = [self._adapter(i, invocation) for i in range(num)]
        self.lora = self._adapter(0, None)

    def _adapter(self, index: int, invocation: tuple[int, ...] | None) -> AdapterRef:
        ref, weights = made_adapter(self.base, _RANK, index)
        if invocation is not None:
            ref = replace(ref, digest=f"a{index:063x}", method="alora", invocation_tokens=invocation)
        self._weights[ref.digest] = replace(weights, invocation_tokens=invocation)
        return ref

    def engine(self, *, cached: bool) -> Engine:
        own = sum(ref.nbytes for ref in (*self.refs, self.lora))
        kv = 4 * self.base.config.num_layers * self.base.config.num_kv_heads * self.base.config.head_dim
        spec = ServeSpec(
            base=self.base.name,
            pool_bytes=int(1.1 * own) + 2 * kv * (len(self.asked) + 256) + (4 << 20),
            max_num_batched_tokens=512,
            enable_prefix_caching=cached,
        )
        return build_engine(spec, self.base, lambda ref, packer: packer.pack(self._weights[ref.digest]))


def ask(engine: Engine, prompt: tuple[int, ...], adapter: AdapterRef | None, num: int = 1) -> tuple[float, list[int]]:
    """Seconds of one request for `num` tokens, and these."""
    params = SamplingParams(max_tokens=num, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    engine.add(GenerateRequest("r", prompt, params, adapter))
    tokens = [out.token_id for out in finish(engine) if out.token_id is not None]
    seconds = time.perf_counter() - began
    engine.check_integrity()
    return seconds, tokens


def num_kv_blocks(engine: Engine) -> int:
    """The number of blocks that the prefix cache holds when nothing runs."""
    return int(engine.stats().blocks["cached"])


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a base on this machine (default %(default)s)")
    parser.add_argument("--adapters", type=one_or_more, default=32)
    parser.add_argument("--prompt", type=one_or_more, default=8000, help="tokens (default %(default)s)")
    parser.add_argument("--rounds", type=one_or_more, default=9)
    parser.add_argument("--checked", type=int, default=2, help="adapters whose answers are computed without the cache")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    machine = describe_machine()
    click.echo(machine_line(machine))
    bench = Bench(bench_base(args.model), args.adapters, args.prompt)
    engine = bench.engine(cached=True)
    for seed in range(4):  # starts threads, measures the time of a step
        ask(engine, bench.prompt[seed : seed + 64], None)
    engine.scheduler.prefix_cache.forget(None)
    cold, before = ask(engine, bench.prompt, None)[0], load_average()
    num_read = num_kv_blocks(engine)
    warm: list[list[float]] = [[] for _ in bench.refs]
    first: list[list[float]] = [[] for _ in bench.refs]
    blocks = [0] * len(bench.refs)
    for _ in range(args.rounds + 1):
        for k, ref in enumerate(bench.refs):
            warm[k].append(ask(engine, bench.asked, None)[0])
            first[k].append(ask(engine, bench.asked, ref)[0])
            blocks[k] = num_kv_blocks(engine)
    lora = ask(engine, bench.asked, bench.lora)[0]
    hit = statistics.median(seconds for times in warm for seconds in times)
    ratios = [statistics.median(map(truediv, first[k][1:], warm[k][1:])) for k in range(len(first))]
    rows: list[list[Cell]] = [
        [k + 1, 1e3 * statistics.median(first[k][1:]), ratios[k], 1e3 * first[k][0], blocks[k], before]
        for k in range(len(first))
    ]
    answers = _same_answers(bench, engine, args.checked)
    figures = {"cold_s": cold, "warm_s": hit, "lora_s": lora, "blocks": num_read, "same_answers": answers}
    report = Report(machine, _COLUMNS, rows, " ".join(sys.argv[1:] if argv is None else argv), figures)
    click.echo(report.text())
    click.echo(
        f"base: {1e3 * cold:.0f} ms for {args.prompt:,} tokens, {1e3 * hit:.1f} ms warm; the same weights as LoRA "
        f"{1e3 * lora:.0f} ms\nslowest adapter ÷ the base's warm hit: {max(ratios):.2f} (≤ {_MOST}); KV blocks "
        f"{num_read} after the base, {blocks[-1]} after {len(blocks)} adapters; {answers} of {args.checked} answers of "
        f"{_CHECKED_TOKENS} tokens are those without the cache"
    )
    report.write(args.json)
    return report


def _same_answers(bench: Bench, engine: Engine, num: int) -> int:
    """The number of the first adapters whose answers are equal with and without the prefix cache."""
    plain = bench.engine(cached=False)
    checked = [(ask(e, bench.asked, ref, _CHECKED_TOKENS)[1] for e in (engine, plain)) for ref in bench.refs[:num]]
    return sum(ours == theirs for ours, theirs in checked)


if __name__ == "__main__":
    main()
