"""Conversations with and without prefix cache: how much of each turn is found, and the time to its first token.

    python -m benchmarks.serving.conversations [--users 32] [--turns 8] [--adapters 4] [--think 4] [--pool BYTES]

SmolLM2-135M with LoRA adapters of rank 16 on q, k, v, o. Each user speaks with one of the adapters, all of whose users
have its system prompt, and thinks before each turn, exponentially distributed. A turn repeats what was said, answers
included, and adds a message of random tokens. The engine runs in this process. Without `--pool` it has the default
pool; `pool ÷ said` is how many times it holds what all have said at the end, system prompts once for each adapter.

The claims: prompts find ≥ 0.9 of the tokens that a cache without bound and without blocks would have, and the first
token comes in ≤ 0.3 of the time without a cache, in the median of all turns.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.options import one_or_more
from benchmarks.report import Cell, Report, Verdict, machine_line, quantile
from benchmarks.serving.adapters import made_adapter
from benchmarks.serving.models import bench_base
from benchmarks.world import describe_machine
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec

_SYSTEM, _MESSAGE, _ANSWER = 128, 32, 32  # tokens
_RANK, _FIRST_TOKEN = 16, 100
_LEAST_HITS, _MOST_TTFT = 0.9, 0.3
_COLUMNS = ("prefix cache", "found", "÷ without bound", "first token p50, ms\t.0f", "p90, ms\t.0f", "s\t.1f")


class Load(NamedTuple):
    users: int
    turns: int
    think_s: float


class Result(NamedTuple):
    """`num_tokens`: of all prompts; `num_known`: those that had been computed before for the same adapter."""

    num_tokens: int
    num_known: int
    num_hits: int
    ttft_s: list[float]
    seconds: float


def talk(engine: Engine, refs: Sequence[AdapterRef], load: Load) -> Result:
    """Let all users speak. The engine knows none of them."""
    rng = random.Random(0)
    words = range(_FIRST_TOKEN, engine.base.config.vocab_size)
    system = [rng.choices(words, k=_SYSTEM) for _ in refs]
    messages = [[rng.choices(words, k=_MESSAGE) for _ in range(load.turns)] for _ in range(load.users)]
    pauses = [[rng.expovariate(1) * load.think_s for _ in range(load.turns)] for _ in range(load.users)]
    said = [[*system[user % len(refs)]] for user in range(load.users)]
    due = [(pauses[user][0], user, 0) for user in range(load.users)]
    heapq.heapify(due)
    params = SamplingParams(max_tokens=_ANSWER, temperature=0, ignore_eos=True)
    asked: dict[str, tuple[float, int, int]] = {}
    ttft: list[float] = []
    hits, num_tokens, num_known = engine.stats().prefix_cache_hits, 0, 0
    began = time.perf_counter()
    while due or asked:
        now = time.perf_counter() - began
        if not asked and due[0][0] > now:
            time.sleep(due[0][0] - now)
            continue
        while due and due[0][0] <= now:
            at, user, turn = heapq.heappop(due)
            num_known += len(said[user]) - 1 if turn else _SYSTEM * (user >= len(refs))
            said[user] += messages[user][turn]
            num_tokens += len(said[user])
            asked[f"{user}.{turn}"] = (at, user, turn)
            engine.add(GenerateRequest(f"{user}.{turn}", tuple(said[user]), params, refs[user % len(refs)]))
        outputs, now = engine.step(), time.perf_counter() - began
        for output in outputs:
            if output.error is not None:
                raise output.error
            assert output.token_id is not None
            at, user, turn = asked[output.request_id]
            if len(said[user]) == _SYSTEM + (turn + 1) * _MESSAGE + turn * _ANSWER:
                ttft.append(now - at)
            said[user].append(output.token_id)
            if output.finish_reason is not None:
                del asked[output.request_id]
                if turn + 1 < load.turns:
                    heapq.heappush(due, (now + pauses[user][turn + 1], user, turn + 1))
    return Result(num_tokens, num_known, engine.stats().prefix_cache_hits - hits, ttft, time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a base on this machine (default %(default)s)")
    parser.add_argument("--users", type=one_or_more, default=32)
    parser.add_argument("--turns", type=one_or_more, default=8)
    parser.add_argument("--adapters", type=one_or_more, default=4)
    parser.add_argument(
        "--think", type=float, default=4.0, help="seconds before a turn, the mean (default %(default)s)"
    )
    parser.add_argument("--pool", type=int, help="bytes; without it, the default of `loray serve`")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    machine = describe_machine()
    click.echo(machine_line(machine))
    base = bench_base(args.model)
    adapters = dict(made_adapter(base, _RANK, i) for i in range(args.adapters))
    weights = {ref.digest: own for ref, own in adapters.items()}
    load, rows, results = Load(args.users, args.turns, args.think), list[list[Cell]](), list[Result]()
    held = 0.0
    for cached in (True, False):
        spec = ServeSpec(base=base.name, pool_bytes=args.pool, enable_prefix_caching=cached)
        engine = build_engine(spec, base, lambda ref, packer: packer.pack(weights[ref.digest]))
        engine.warm_up()
        num_said = args.adapters * _SYSTEM + args.users * args.turns * (_MESSAGE + _ANSWER)
        held = engine.pool.geometry.num_tokens / num_said
        for _ in range(2):  # starts threads, measures steps, loads the adapters
            talk(engine, [*adapters], Load(args.adapters, 1, 0.0))
        for ref in adapters:
            engine.scheduler.prefix_cache.forget(ref.digest)
        r = talk(engine, [*adapters], load)
        engine.check_integrity()
        engine.close()
        results.append(r)
        p50, p90 = (1e3 * quantile(r.ttft_s, q) for q in (0.5, 0.9))
        found = r.num_hits / r.num_tokens
        rows.append(["on" if cached else "off", found, r.num_hits / r.num_known, p50, p90, r.seconds])
    verdicts = [
        Verdict("prefix hits ÷ without bound", "≥", _LEAST_HITS, results[0].num_hits / results[0].num_known),
        Verdict("first token, with ÷ without", "≤", _MOST_TTFT, float(rows[0][3] or 0) / float(rows[1][3] or 1)),
    ]
    more = {"pool_over_said": held, "targets": [verdict.to_json() for verdict in verdicts]}
    report = Report(machine, _COLUMNS, rows, " ".join(sys.argv[1:] if argv is None else argv), more)
    click.echo("\n".join([report.text(), f"pool ÷ said: {held:.2f}", *(verdict.line() for verdict in verdicts)]))
    report.write(args.json)
    return report


if __name__ == "__main__":
    main()
