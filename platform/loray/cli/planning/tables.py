"""A plan as tables: a worker's memory, traffic and computation, and what to change."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loray.cli.output import count, pairs, table
from loray.planning.host import HOST_MOMENTS, HostPlan
from loray.planning.memory import MOMENTS, WHAT
from loray.planning.plan import Plan
from loray.planning.traffic import Exchange
from loray.spec import TrainSpec, format_seconds, format_size


def show(plan: Plan, spec: TrainSpec, to: Console) -> None:
    to.print(_run(plan, spec))
    to.print(f"\n[bold]Memory of a worker[/bold] ({plan.device.name}: {format_size(plan.device.usable_bytes)} to use)")
    to.print(_memory(plan))
    to.print(_peak(plan))
    if plan.host is not None:
        to.print(f"\n[bold]Memory of a node[/bold] (its own, with {plan.host.num_workers} workers and the driver)")
        to.print(_host(plan.host))
    if rows := plan.exchanges:
        to.print("\n[bold]Sent by a worker for one layer, forward[/bold] (×: under Ulysses; backward: as much again)")
        to.print(_exchanges(rows))
    to.print("\n[bold]A step of a worker[/bold] (estimates; shares of the peak are assumed)")
    to.print(_step(plan))
    for problem in plan.problems:
        style = "red" if problem.severity == "refusal" else "yellow"
        to.print(f"\n[{style}]{problem.severity}[/{style}]: {problem.message}", soft_wrap=True)
        to.print(f"  {problem.remedy}", soft_wrap=True, markup=False)


def _run(plan: Plan, spec: TrainSpec) -> Table:
    run = plan.run
    share = run.trained.total / run.base.total
    rows = f"{run.num_rows} pairs × 2" if run.has_reference else f"{run.num_rows}"
    attention = "dense" if run.group_size is None else f"S2-Attn, G = {run.group_size}"
    if (shared := run.shared_dense) is not None:
        attention += f", {shared.exchange} over {run.sequence} workers"
    keeps = "layer inputs (checkpointing)" if run.checkpointing else "all activations"
    layout = f"{run.num_workers} workers: {run.num_data_groups} data × {run.sequence} sequence, {run.strategy}"
    return pairs(
        [
            ("recipe", f"{spec.name}: {spec.adapter.method} on {spec.base}"),
            ("parameters", f"{count(run.base.total)}, {count(run.trained.total)} trained ({share:.2%}), {run.dtype}"),
            ("rows", f"{rows} × {run.padded_length} tokens × {run.accumulation} micro-batches; {attention}"),
            ("workers", f"{layout}; {run.tokens_per_worker} tokens each; keep {keeps}"),
        ]
    )


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    rows = []
    for item in memory.items:
        share = f"{item.nbytes / memory.peak_bytes:.1%}" if memory.peak_moment in item.moments else "–"
        when = "throughout" if item.moments == MOMENTS else ", ".join(item.moments)
        rows.append((item.name, format_size(item.nbytes), share, when))
    return table(("ITEM", "SIZE", "OF PEAK", "WHEN"), rows, right=("SIZE", "OF PEAK"))


def _peak(plan: Plan) -> Table:
    memory = plan.memory
    fits, usable = {True: "fits", False: "does not fit"}, plan.device.usable_bytes
    measuring = [("measuring", f"{format_size(plan.measuring)}, before publishing: {fits[plan.measuring <= usable]}")]
    moments = [f"{format_size(memory.at(moment))} {moment} ({WHAT[moment]})" for moment in MOMENTS]
    return pairs(
        [
            ("peak", f"{format_size(memory.peak_bytes)}, at {memory.peak_moment}: {fits[memory.peak_bytes <= usable]}"),
            ("dominant", f"{memory.dominant.name}, {format_size(memory.dominant.nbytes)}"),
            ("moments", ", ".join(moments)),
            *(measuring if plan.measuring else []),
        ]
    )


def _host(host: HostPlan) -> Table:
    usable = "" if host.usable_bytes is None else f" of {format_size(host.usable_bytes)}"
    fits = "fits" if host.fits else "does not fit"
    rows = []
    for item in host.items:
        when = "throughout" if item.moments == HOST_MOMENTS else ", ".join(item.moments)
        rows.append((item.name, f"{format_size(item.nbytes)}, {when}"))
    return pairs([*rows, ("peak", f"{format_size(host.peak_bytes)}{usable}, while {host.peak_moment}: {fits}")])


def _exchanges(rows: list[list[Exchange]]) -> Table:
    groups = [exchange.group_size for exchange in rows[0]]
    columns = ["P", "TOKENS"]
    for group in groups:
        columns += [f"HALO, G = {group}", "HOPS"]
    columns += ["ULYSSES", "RING"]
    cells = []
    for row in rows:
        first = row[0]
        line: list[object] = [first.sequence, first.num_tokens // first.sequence]
        for exchange in row:
            line += [_halo(exchange), exchange.num_hops]
        cells.append([*line, format_size(first.ulysses_bytes), format_size(first.ring_bytes)])
    return table(columns, cells, right=columns)


def _halo(exchange: Exchange) -> str:
    """Bytes of the halo, and the factor by which Ulysses sends more."""
    times = exchange.ulysses_bytes / exchange.halo_bytes if exchange.halo_bytes else float("inf")
    return f"{format_size(exchange.halo_bytes)} ({times:.1f}×)"


def _step(plan: Plan) -> Table:
    flops, time, traffic, device = plan.flops, plan.time, plan.traffic, plan.device
    sent = [
        (f"{format_size(traffic.halo_bytes)} halo", traffic.halo_bytes),
        (f"{format_size(traffic.dense_bytes)} of dense attention", traffic.dense_bytes),
        (f"{format_size(traffic.gradient_bytes)} gradients", traffic.gradient_bytes),
        (f"{format_size(traffic.gather_bytes)} gathered weights", traffic.gather_bytes),
    ]
    return pairs(
        [
            (
                "FLOPs",
                f"{flops.forward:.3g} forward, {flops.backward:.3g} backward, {flops.recompute:.3g} recomputed, "
                f"{flops.reference:.3g} reference; "
                f"attention forward {flops.attention:.2g}, dense {flops.dense_attention:.2g}",
            ),
            ("sends", ", ".join(text for text, nbytes in sent if nbytes) or "nothing"),
            (
                "time",
                f"{format_seconds(time.step_s)}: products {format_seconds(time.matmul_s)}, attention "
                f"{format_seconds(time.attention_s)}, elementwise {format_seconds(time.memory_s)}, AdamW "
                f"{format_seconds(time.optimizer_s)}, communication not hidden {format_seconds(time.communication_s)}",
            ),
            ("tokens/s", f"{time.tokens_per_s:.0f} over all workers; MFU {time.mfu:.1%}"),
            (
                "assumes",
                f"{device.flops / 1e12:.3g} TFLOP/s, of which products reach {device.matmul_share:.0%} and attention "
                f"{device.attention_share:.0%}; {device.bandwidth / 1e9:.0f} GB/s memory, "
                f"{device.link_bandwidth / 1e9:.0f} GB/s between workers; "
                f"{format_size(device.framework_bytes)} framework, {device.fragmentation:.0%} fragmentation of what "
                "comes and goes",
            ),
        ]
    )
