"""Times of every op of the CUDA backend, on Llama-3-8B's shapes in bf16, beside the floor.

    python -m benchmarks.kernels.gpu [--only SUBSTRING] [--json FILE]

A figure is the time of one layer's calls: the median of 50 by CUDA events, each on another part of the pool than the
one before, so that caches hold what they hold in the engine. `recorded` is the same as a CUDA graph, without the
launches. The floor is the larger of bytes ÷ read bandwidth and FLOPs ÷ rate of torch's bf16 matrix product, both
measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.options import check_only
from benchmarks.report import write_json
from benchmarks.world import rates_here
from loray_kernels import (
    AdapterSegments,
    AttentionMeta,
    BackendUnavailable,
    KvLayout,
    LoraTable,
    Ops,
    ProjectionMatrix,
    RowTables,
    Scoring,
    StepInputs,
    VeraTable,
    backend,
)

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 4096, 32, 8, 128, 14336
KV = KV_HEADS * HEAD_DIM
LAYERS = 8  # of the pool; consecutive calls use different ones
LAYOUT = KvLayout(LAYERS, 16, KV_HEADS, HEAD_DIM)
SHARE = LAYOUT.layer_share
BLOCK = LAYERS * SHARE
RANKS = (8, 16, 32, 64)


class Case(NamedTuple):
    """`call(layer)` is timed. It must read and write `bytes` and do `macs` multiply-adds."""

    name: str
    call: Callable[[int], object]
    bytes: float
    macs: float = 0


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def lora(ops: Ops, num_tokens: int, num_adapters: int) -> Case:
    """LoRA on q, k, v: one shrink, one expand. Every adapter has equally many tokens."""
    ranks = [RANKS[n % len(RANKS)] for n in range(num_adapters)]
    start = (0, *accumulate(ranks))
    total, each = start[-1], num_tokens // num_adapters
    widths = {"q": HIDDEN, "k": KV, "v": KV}
    wide = iter(range(0, 4 * total * HIDDEN, HIDDEN))  # offsets in one layer's parts, as many rows as fit
    narrow = iter(range(0, 2 * total * KV, KV))
    wide_blocks = -(-4 * total // (SHARE // HIDDEN))

    def rows(width: int) -> RowTables:
        first = 0 if width == HIDDEN else wide_blocks
        places = [next(wide if width == HIDDEN else narrow) for _ in range(total)]
        at = torch.tensor([(first + p // SHARE) * BLOCK + p % SHARE for p in places], device="cuda")
        return RowTables(((0, width, at),))

    tables = tuple(LoraTable(rows(HIDDEN), rows(o), start, (2.0,) * num_adapters) for o in widths.values())
    pool = randn(BLOCK).repeat(wide_blocks + -(-2 * total * KV // SHARE))
    first = tuple(range(0, num_tokens, each))
    segments = AdapterSegments(first, tuple(f + each for f in first))
    x_TI, outputs = randn(num_tokens, HIDDEN), torch.split(randn(num_tokens, HIDDEN + 2 * KV), [*widths.values()], 1)

    def call(layer: int) -> None:
        h = ops.lora_shrink(x_TI, pool, tables, segments, layer * SHARE)
        ops.lora_expand(outputs, h, pool, tables, segments, layer * SHARE)

    elements = sum(HIDDEN + o for o in widths.values())
    size = 2 * (total * elements + num_tokens * (HIDDEN + 2 * sum(widths.values())))
    return Case(f"lora {num_tokens} tokens, {num_adapters} adapters", call, size, elements * each * total)


def attention(ops: Ops, queries: int, context: int, num_sequences: int) -> Case:
    per_sequence = -(-context // 16)
    blocks = torch.randperm(per_sequence * num_sequences, device="cuda")
    tables = torch.split(blocks, per_sequence)
    pool = randn(BLOCK).repeat(per_sequence * num_sequences)
    num_tokens = queries * num_sequences
    starts = tuple(range(0, num_tokens + 1, queries))
    slot_mapping_T = torch.zeros(num_tokens, dtype=torch.int64, device="cuda")
    meta = AttentionMeta(starts, (context,) * num_sequences, tables, slot_mapping_T)
    q_THd = randn(num_tokens, HEADS, HEAD_DIM)
    size = 2 * (num_sequences * context * 2 * KV + 2 * num_tokens * HIDDEN)
    macs = num_sequences * HEADS * 2 * HEAD_DIM * (queries * context - queries * (queries - 1) / 2)
    name = f"attention {'prefill' if queries > 1 else 'decode'} {num_sequences} x {context}"
    return Case(name, lambda n: ops.paged_attention(q_THd, pool, LAYOUT, n, meta, Scoring(HEAD_DIM**-0.5)), size, macs)


def vera(ops: Ops, num_tokens: int, rank: int = 256) -> Case:
    a, b_matrix = ProjectionMatrix(randn(rank, HIDDEN)), ProjectionMatrix(randn(HIDDEN, rank))
    pool = randn(BLOCK).repeat(num_tokens)
    at = torch.arange(num_tokens, device="cuda") * BLOCK
    d, b = RowTables(((0, rank, at),)), RowTables(((0, HIDDEN, at + rank),))
    table = VeraTable(a, b_matrix, d, b, 0, num_tokens)
    x_TI, y_TO = randn(num_tokens, HIDDEN), randn(num_tokens, HIDDEN)
    size = 2 * (2 * rank * HIDDEN + num_tokens * (rank + 4 * HIDDEN))
    return Case(
        f"vera r{rank} {num_tokens} tokens",
        lambda n: ops.vera_expand(y_TO, ops.vera_shrink(x_TI, a), pool, table, n * SHARE),
        size,
        2 * num_tokens * rank * HIDDEN,
    )


def rows(ops: Ops, num_tokens: int) -> Iterator[Case]:
    x_TD, weight_D, gate_up_TM = randn(num_tokens, HIDDEN), randn(HIDDEN), randn(num_tokens, 2 * MLP)
    q_THd, k_TKd = x_TD.view(-1, HEADS, HEAD_DIM), randn(num_tokens, KV_HEADS, HEAD_DIM)
    cos_Td, sin_Td = randn(num_tokens, HEAD_DIM), randn(num_tokens, HEAD_DIM)
    pool = randn(BLOCK).repeat(-(-num_tokens // 16))
    slot_mapping_T = torch.randperm(num_tokens, device="cuda")
    meta = AttentionMeta((0, num_tokens), (num_tokens,), (slot_mapping_T[:1],), slot_mapping_T)
    step = StepInputs(pool, LAYOUT, meta, AdapterSegments((), ()), cos_Td, sin_Td)
    each = 2 * num_tokens
    yield Case(
        f"rms_norm {num_tokens} tokens", lambda n: ops.rms_norm(x_TD, weight_D, 1e-5, pool, None, 0), each * 2 * HIDDEN
    )
    yield Case(
        f"add_rms_norm {num_tokens} tokens",
        lambda n: ops.add_rms_norm(x_TD, x_TD, weight_D, 1e-5, pool, None, 0),
        each * 4 * HIDDEN,
    )
    yield Case(
        f"rope_kv {num_tokens} tokens",
        lambda n: ops.rope_kv(q_THd, k_TKd, k_TKd, step, n),
        each * (2 * HIDDEN + 4 * KV),
    )
    yield Case(f"silu_mul {num_tokens} tokens", lambda n: ops.silu_mul(gate_up_TM), each * 3 * MLP)


def cases(ops: Ops) -> Iterator[Callable[[], list[Case]]]:
    """Functions that make the cases. Only one pool exists at a time: it takes gigabytes."""
    for tokens, adapters in ((1, 1), (32, 1), (32, 8), (32, 32), (256, 256), (2048, 1), (2048, 32)):
        yield lambda t=tokens, n=adapters: [lora(ops, t, n)]  # type: ignore[misc]
    for queries, context, sequences in ((1, 512, 32), (1, 2048, 32), (1, 2048, 1), (1, 8192, 8), (2048, 2048, 1)):
        yield lambda q=queries, c=context, n=sequences: [attention(ops, q, c, n)]  # type: ignore[misc]
    for tokens in (32, 2048):
        yield lambda t=tokens: [vera(ops, t), *rows(ops, t)]  # type: ignore[misc]


def milliseconds(call: Callable[[int], object], repeats: int = 50) -> float:
    for n in range(LAYERS):
        call(n)
    times = []
    for n in range(repeats):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        call(n % LAYERS)
        ended.record()
        times.append((began, ended))
    torch.cuda.synchronize()
    return float(statistics.median(began.elapsed_time(ended) for began, ended in times))


def recorded_milliseconds(call: Callable[[int], object]) -> float:
    """Time of a graph of all layers, divided by their number."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(LAYERS):
            call(n)
    return milliseconds(lambda _: graph.replay()) / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    try:
        ops = backend("cuda", "cuda")
    except BackendUnavailable as e:
        raise SystemExit(str(e)) from e
    bandwidth, flops = rates_here("cuda")
    card = torch.cuda.get_device_name()
    click.echo(f"{card}  read {bandwidth / 1e9:.0f} GB/s  bf16 product {flops / 1e12:.0f} TFLOP/s")
    click.echo(f"{'microseconds a layer':<32}{'ours':>9}{'recorded':>10}{'floor':>9}{'of floor':>10}")
    found: dict[str, dict[str, float]] = {}
    names = []
    for make in cases(ops):
        for case in make():
            names.append(case.name)
            if args.only not in case.name:
                continue
            floor = 1e3 * max(case.bytes / bandwidth, 2 * case.macs / flops)
            ours, recorded = milliseconds(case.call), recorded_milliseconds(case.call)
            us = {"us": 1e3 * ours, "recorded_us": 1e3 * recorded, "floor_us": 1e3 * floor}
            found[case.name] = {name: round(x, 1) for name, x in us.items()} | {"of_floor": round(floor / recorded, 3)}
            click.echo(
                f"{case.name:<32}{1e3 * ours:>9.1f}{1e3 * recorded:>10.1f}{1e3 * floor:>9.1f}{floor / recorded:>10.2f}"
            )
    check_only(args.only, names)
    write_json(args.json, {"card": card, "bandwidth": bandwidth, "flops": flops, "rows": found})


if __name__ == "__main__":
    main()
