"""`loray recommend`: which method fits what is to be built."""

from __future__ import annotations

from pathlib import Path

import click

from loray.cli.output import console, count, emit, table
from loray.cli.plan import config_option, device_of, device_option, shape_of_recipe
from loray.recommend import Answers, Estimate, Quote, Recommendation, recommend
from loray.settings import Settings
from loray.spec import format_seconds, format_size


@click.command("recommend")
@click.option("--context-length", type=click.IntRange(min=1), required=True, help="Tokens of the longest row.")
@click.option("--num-tasks", type=click.IntRange(min=1), required=True, help="Adapters that there will be.")
@click.option("--base", default="smollm2", show_default=True, help="A base on this machine, or a well-known one.")
@device_option("Default: a100-80gb.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(
    context_length: int,
    num_tasks: int,
    base: str,
    device_name: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Compare adapter methods for what is to be built: quality as it was measured, and costs on a base and a device."""
    home = Settings.from_env().home
    device = device_of(device_name or "a100-80gb", home, num_workers=1)
    shape = shape_of_recipe(base, config, home)
    found = recommend(Answers(context_length, num_tasks), base, shape, device)
    if as_json:
        emit(found.to_dict())
    else:
        _show(found)


def _show(found: Recommendation) -> None:
    to = console()
    to.print("[bold]Quality, as measured[/bold]")
    quotes = [(q.source, q.task, q.settings, count(q.trained_parameters), _score(q)) for q in found.quotes]
    to.print(table(("BY", "TASK", "METHOD", "TRAINED", "SCORE"), quotes, right=("TRAINED", "SCORE")))
    to.print(
        f"\n[bold]Estimates for {found.base} on {found.device}[/bold] (rows of {found.answers.context_length:,} tokens)"
    )
    columns = ("METHOD", "SETTINGS", "TRAINED", "BYTES", "TRAINING", "STEP", "PER GIB", "1,000 SERVED", "SPEED")
    to.print(table(columns, [_row(e) for e in found.estimates], right=columns[2:]))
    to.print("SPEED: of the base's, decoding 32 requests on 32 adapters, at most. 1,000 SERVED: pool, and devices.")
    for estimate in found.estimates:
        if estimate.problem:
            to.print(f"[yellow]{estimate.method}[/yellow]: {estimate.problem}", soft_wrap=True)
    for remark in found.remarks:
        to.print(f"- {remark}", soft_wrap=True, markup=False)


def _score(quote: Quote) -> str:
    return f"{quote.score:.1f}" if quote.spread is None else f"{quote.score:.1f} ± {quote.spread:.1f}"


def _row(e: Estimate) -> tuple[str, ...]:
    training = "–" if e.training_bytes is None else format_size(e.training_bytes) + " (checkpointing)" * e.checkpointing
    return (
        e.method,
        e.settings,
        count(e.trained_parameters),
        format_size(e.adapter_bytes),
        training,
        "–" if e.step_s is None else format_seconds(e.step_s),
        f"{e.adapters_per_gib:,.0f}",
        f"{format_size(e.served_pool_bytes)}, {e.served_devices}",
        f"{e.throughput:.0%}",
    )
