"""Times of every op of a CPU backend, on SmolLM2-135M's shapes in bf16, beside the reference and the floor.

    python -m benchmarks.kernels.cpu [--backend auto] [--only SUBSTRING] [--repeats 5] [--json FILE]

A figure is the median time of one step's calls: 30 layers, each on another part of the pool, so that caches hold what
they hold in the engine. The floor is the larger of bytes ÷ read bandwidth and FLOPs ÷ rate of torch's matrix product in
bf16 or fp32, whichever is faster; all are measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
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
    KvLayout,
    LinearWeights,
    LoraTable,
    Ops,
    ProjectionMatrix,
    RowTables,
    Scoring,
    StepInputs,
    VeraTable,
    backend,
)
from loray_kernels.memory import huge_pages, keep_freed

LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
LAYOUT = KvLayout(LAYERS, 16, KV_HEADS, HEAD_DIM)
SHARE = LAYOUT.layer_share
MODULES = {"q": HIDDEN, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "o": HIDDEN}
RANKS = (8, 16, 32, 64)


class Case(NamedTuple):
    """`step` makes the calls of all layers on a backend. They must read `bytes` and do `macs` multiply-adds."""

    name: str
    step: Callable[[Ops], None]
    bytes: float
    macs: float = 0


def random_pool(num_blocks: int) -> Tensor:
    """In huge pages, as the engine's."""
    pool = huge_pages(num_blocks * LAYERS * SHARE, torch.bfloat16)
    pool.view(num_blocks, -1).copy_(torch.randn(LAYERS * SHARE).mul_(0.1))
    return pool


def lora(num_tokens: int, num_adapters: int) -> Case:
    """LoRA on q, k, v, o; q, k and v share one shrink. Every adapter has equally many tokens."""
    ranks = [RANKS[n % len(RANKS)] for n in range(num_adapters)]
    total = sum(ranks)
    wide = iter([b * LAYERS * SHARE + i * HIDDEN for b in range(total) for i in range(10)])
    narrow = iter([b * LAYERS * SHARE + 10 * HIDDEN + i * 192 for b in range(total) for i in range(2)])

    def rows(width: int) -> RowTables:
        places = wide if width == HIDDEN else narrow
        return RowTables(((0, width, torch.tensor([next(places) for _ in range(total)])),))

    each = num_tokens // num_adapters
    segments = AdapterSegments(
        tuple(n * each for n in range(num_adapters)), tuple((n + 1) * each for n in range(num_adapters))
    )
    start = tuple(sum(ranks[:n]) for n in range(num_adapters + 1))
    tables = {m: LoraTable(rows(HIDDEN), rows(o), start, (2.0,) * num_adapters) for m, o in MODULES.items()}
    pool = random_pool(total)
    x_TI = torch.randn(num_tokens, HIDDEN).to(torch.bfloat16)
    qkv = torch.randn(num_tokens, HIDDEN + 2 * 192).to(torch.bfloat16)
    outputs = dict(zip("qkv", torch.split(qkv, [HIDDEN, 192, 192], dim=1), strict=True))
    outputs["o"] = torch.randn(num_tokens, HIDDEN).to(torch.bfloat16)

    def step(ops: Ops) -> None:
        for layer in range(LAYERS):
            for group in ("qkv", "o"):
                own, offset = tuple(tables[m] for m in group), layer * SHARE
                h = ops.lora_shrink(x_TI, pool, own, segments, offset)
                ops.lora_expand(tuple(outputs[m] for m in group), h, pool, own, segments, offset)

    elements = LAYERS * sum(HIDDEN + o for o in MODULES.values())
    return Case(
        f"lora {num_tokens} tokens, {num_adapters} adapters",
        step,
        elements * total * 2,
        elements * sum(r * each for r in ranks),
    )


def attention(queries: int, context: int, num_sequences: int, *, is_int8: bool = False) -> Case:
    layout = LAYOUT._replace(int8_per_element=2) if is_int8 else LAYOUT
    per_sequence = -(-context // 16)
    order = torch.randperm(per_sequence * num_sequences, generator=torch.Generator().manual_seed(0))
    pool = random_pool(len(order))[: len(order) * LAYERS * layout.layer_share]
    tables = tuple(t.contiguous() for t in order.view(num_sequences, per_sequence))
    starts = tuple(n * queries for n in range(num_sequences + 1))
    meta = AttentionMeta(starts, (context,) * num_sequences, tables, torch.zeros(queries * num_sequences).long())
    q_THd = torch.randn(queries * num_sequences, HEADS, HEAD_DIM).to(torch.bfloat16)

    def step(ops: Ops) -> None:
        for layer in range(LAYERS):
            ops.paged_attention(q_THd, pool, layout, layer, meta, Scoring(HEAD_DIM**-0.5))

    seen = queries * context - queries * (queries - 1) / 2
    size = LAYERS * num_sequences * context * layout.layer_share * 2 / 16
    kind = ("prefill" if queries > 1 else "decode") + (" int8" if is_int8 else "")
    return Case(
        f"attention {kind} {num_sequences} x {context}", step, size, LAYERS * num_sequences * seen * HEADS * 2 * 64
    )


def vera(num_tokens: int, num_adapters: int, rank: int = 256) -> Case:
    """VeRA on q, k, v, o with one pair. Every adapter has equally many tokens."""
    a, b = (ProjectionMatrix(torch.randn(*s).to(torch.bfloat16)) for s in ((rank, HIDDEN), (HIDDEN, rank)))
    pool = random_pool(num_adapters)
    offsets = torch.arange(num_adapters).repeat_interleave(num_tokens // num_adapters) * LAYERS * SHARE
    d = RowTables(((0, rank, offsets),))
    tables = {m: VeraTable(a, b, d, RowTables(((0, o, offsets),)), 0, num_tokens) for m, o in MODULES.items()}
    x_TI = torch.randn(num_tokens, HIDDEN).to(torch.bfloat16)
    outputs = {m: torch.randn(num_tokens, o).to(torch.bfloat16) for m, o in MODULES.items()}

    def step(ops: Ops) -> None:
        for layer in range(LAYERS):
            for group in ("qkv", "o"):
                z_TR = ops.vera_shrink(x_TI, a)
                for m in group:
                    ops.vera_expand(outputs[m], z_TR, pool, tables[m], layer * SHARE)

    macs = LAYERS * num_tokens * rank * (2 * HIDDEN + sum(MODULES.values()))
    size = LAYERS * num_adapters * (4 * rank + sum(MODULES.values())) * 2
    return Case(f"vera r{rank} {num_tokens} tokens, {num_adapters} adapters", step, size, macs)


def linears(num_tokens: int) -> Case:
    """All linear layers of the model, as the backend packs them. The output head multiplies at most 32 tokens."""
    sizes = [(HIDDEN, HIDDEN + 2 * 192), (HIDDEN, HIDDEN), (HIDDEN, 2 * MIDDLE), (MIDDLE, HIDDEN)]
    weights = [torch.randn(o, i).mul_(0.02).to(torch.bfloat16) for i, o in sizes * LAYERS]
    head_VD = torch.randn(VOCABULARY, HIDDEN).mul_(0.02).to(torch.bfloat16)
    x = {i: torch.randn(num_tokens, i).to(torch.bfloat16) for i in (HIDDEN, MIDDLE)}
    last_TD = x[HIDDEN][:32]
    packed: dict[Ops, tuple[list[LinearWeights], LinearWeights]] = {}

    def step(ops: Ops) -> None:
        if ops not in packed:
            packed[ops] = [ops.pack_linear([w]) for w in weights], ops.pack_linear([head_VD])
        matrices, head = packed[ops]
        for matrix in matrices:
            ops.linear(x[matrix.in_features], matrix)
        ops.logits(last_TD, head)

    elements = sum(w.numel() for w in weights)
    macs = elements * num_tokens + head_VD.numel() * len(last_TD)
    return Case(f"linears {num_tokens} tokens", step, 2 * (elements + head_VD.numel()), macs)


def rows(num_tokens: int) -> Iterator[Case]:
    pool = random_pool(-(-num_tokens // 16))
    fused = torch.randn(num_tokens, HIDDEN + 2 * 192).to(torch.bfloat16)
    q, k, v = (t.view(num_tokens, -1, HEAD_DIM) for t in torch.split(fused, [HIDDEN, 192, 192], dim=1))
    cos_Td, sin_Td, weight_D = (torch.rand(*s).to(torch.bfloat16) for s in ((num_tokens, 64),) * 2 + ((HIDDEN,),))
    x_TD = q.reshape(num_tokens, HIDDEN).contiguous()
    meta = AttentionMeta((0, num_tokens), (num_tokens,), (torch.arange(1),), torch.randperm(num_tokens))
    step = StepInputs(pool, LAYOUT, meta, AdapterSegments((), ()), cos_Td, sin_Td)

    def norm(ops: Ops) -> None:
        for _ in range(2 * LAYERS):
            ops.rms_norm(x_TD, weight_D, 1e-5, pool, None, 0)

    def rope_kv(ops: Ops) -> None:
        for layer in range(LAYERS):
            ops.rope_kv(q, k, v, step, layer)

    size = LAYERS * num_tokens * 2
    yield Case(f"rms_norm {num_tokens} tokens", norm, 2 * size * 2 * HIDDEN)
    yield Case(f"rope_kv {num_tokens} tokens", rope_kv, size * 2 * (HIDDEN + 2 * 192))


def cases() -> Iterator[Callable[[], list[Case]]]:
    """Functions that make the cases. Only one pool exists at a time: it takes up to 1.5 GB."""
    for tokens, adapters in ((32, 1), (32, 8), (32, 32), (1, 1), (2048, 1), (2048, 32)):
        yield lambda t=tokens, n=adapters: [lora(t, n)]  # type: ignore[misc]
    for queries, context, sequences in (
        *((1, c, 32) for c in (64, 256, 512, 1024, 2048)),
        *((1, c, 1) for c in (512, 2048)),
        *((c, c, 1) for c in (512, 2048)),
        (64, 64, 32),
    ):
        yield lambda q=queries, c=context, n=sequences: [attention(q, c, n)]  # type: ignore[misc]
    for queries, context, sequences in ((1, 1024, 32), (1, 2048, 1), (2048, 2048, 1)):
        yield lambda q=queries, c=context, n=sequences: [attention(q, c, n, is_int8=True)]  # type: ignore[misc]
    for tokens, adapters in ((32, 32), (2048, 1), (2048, 2048)):
        yield lambda t=tokens, n=adapters: [vera(t, n)]  # type: ignore[misc]
    for tokens in (1, 32, 64, 2048):
        yield lambda t=tokens: [linears(t)]  # type: ignore[misc]
    for tokens in (1, 32, 2048):
        yield lambda t=tokens: list(rows(t))  # type: ignore[misc]


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
        if sum(times) > 5:
            break
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    keep_freed()  # as the engine does
    ops, reference = backend(args.backend), backend("reference")
    load, threads = os.getloadavg(), torch.get_num_threads()
    click.echo(f"load {load[0]:.2f} {load[1]:.2f} {load[2]:.2f}  threads {threads}  torch {torch.__version__}")
    bandwidth, flops = rates_here("cpu")
    name = f"{args.backend} {getattr(ops, 'isa', '')}".strip()
    click.echo(f"backend {name}  bandwidth {bandwidth / 1e9:.1f} GB/s  product {flops / 1e9:.0f} GFLOP/s")
    click.echo(f"{'ms a step of 30 layers':<32}{'ours':>9}{'reference':>11}{'floor':>9}{'gain':>8}{'x floor':>9}")
    results, names = [], []
    for make in cases():
        for case in make():
            names.append(case.name)
            if args.only not in case.name:
                continue
            ours, theirs = (median_seconds(lambda o=o: case.step(o), args.repeats) for o in (ops, reference))  # type: ignore[misc] # noqa: B023
            floor = max(case.bytes / bandwidth, 2 * case.macs / flops)
            figures = [1e3 * s for s in (ours, theirs, floor)]
            results.append(dict(zip(("ours", "reference", "floor"), figures, strict=True)) | {"case": case.name})
            click.echo(
                f"{case.name:<32}{figures[0]:>9.2f}{figures[1]:>11.2f}{figures[2]:>9.2f}"
                f"{theirs / ours:>8.1f}{ours / floor:>9.1f}"
            )
    check_only(args.only, names)
    machine = {"load": load, "threads": threads, "backend": name, "bandwidth": bandwidth, "product_rate": flops / 2}
    write_json(args.json, machine | {"cases": results})


if __name__ == "__main__":
    main()
