"""The demo's output: headings, answers of base and adapter, the table of adapters, the verdict, next steps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from estimate import Estimate
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loray.schemas.resources import VersionDetail
from loray.schemas.status import Status

PURPOSE = {
    "orders": "LoRA, spoken café orders to JSON",
    "dates": "VeRA, dates to ISO 8601",
    "codepages": "LongLoRA, code-page sources in windows of 2,048 instead of 1,024 tokens",
}
_STEPS = 6
_MIN_GAIN = 0.10


def heading(console: Console, step: int, title: str, seconds: float, expected: float | None) -> None:
    of = "" if expected is None else f" of about {_minutes(expected)}"
    console.print(
        f"\n[bold cyan]{step}/{_STEPS}[/] [bold]{title}[/] [dim]{seconds // 60:.0f}:{seconds % 60:02.0f}{of}[/]"
    )


def expected(console: Console, estimate: Estimate) -> None:
    """What this machine is, and how long the demo takes on it."""
    console.print(f"[bold]This machine[/]: {estimate.machine}")
    if estimate.seconds is None or estimate.tokens_per_s is None:
        return
    console.print(
        f"All takes about [bold]{_minutes(estimate.seconds)}[/] here: training in {estimate.dtype} at about "
        f"{estimate.tokens_per_s:.0f} tokens/s. Ctrl-C stops everything; the next `make demo` goes on with what is "
        "published."
    )


def stopped(console: Console) -> None:
    console.print("Nothing of the demo runs any more; what is published stays.")


def _minutes(seconds: float) -> str:
    return "a minute" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def answers(console: Console, questions: Sequence[Any], given: Mapping[tuple[str, str], str]) -> None:
    console.print("\n[bold]The same question to the base and to its adapter[/]")
    for q in questions:
        prompt = q.prompt if q.chat else "…\n" + "\n".join(q.prompt.splitlines()[-2:])
        answer = given[q.model, q.model].strip()
        right = q.expected is not None and answer == q.expected
        table = Table(show_header=False, box=box.SIMPLE, pad_edge=False, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("asked", Text(prompt))
        table.add_row("smollm2", Text(_short(given[q.model, "smollm2"])))
        table.add_row(q.model, Text(_short(answer) + (" ✓" if right else ""), style="green"))
        if q.expected is not None and not right:
            table.add_row("expected", Text(q.expected))
        console.print(table)


def served(console: Console, status: Status, tokens_per_s: float) -> None:
    replica = status.replicas[0]
    console.print(
        f"{status.totals.max_adapters_in_step} adapters and the base ran in one batch on one replica, "
        f"{tokens_per_s:.0f} output tokens/s over six requests; in the pool: {', '.join(replica.adapters_in_pool)}"
    )


def adapters(
    console: Console, published: Sequence[VersionDetail], rates: Mapping[str, float], base_parameters: int
) -> None:
    table = Table(title="Published adapters", title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1))
    for column in ("adapter", "method", "trained", "of base", "bytes", "loss before", "after", "change", "tokens/s"):
        table.add_column(column, justify="left" if column in ("adapter", "method") else "right", no_wrap=True)
    for p in published:
        m = p.manifest
        before, after = _loss(p, _before(p)), _loss(p, "adapter")
        table.add_row(
            p.label,
            m.method,
            f"{m.num_parameters:,}",
            f"{m.num_parameters / base_parameters:.2%}",
            f"{m.nbytes / 1e6:.2f} MB",
            f"{before:.3f}",
            f"{after:.3f}",
            f"{after / before - 1:+.0%}",
            f"{rates[p.name]:.0f}",
        )
    console.print(table)
    console.print("[dim]loss: held-out rows, dense attention; tokens/s: of training, median step[/]")


def verdict(console: Console, published: Sequence[VersionDetail]) -> bool:
    """Whether every held-out loss fell by a tenth, and LongLoRA's is below that of its base, scaled and unscaled."""
    ok = all(_loss(p, "adapter") < (1 - _MIN_GAIN) * _loss(p, _before(p)) for p in published)
    for p in published:
        if p.method != "longlora":
            continue
        base, scaled, adapter = (_loss(p, s) for s in ("base", "base_scaled", "adapter"))
        ok = ok and adapter < min(base, scaled)
        console.print(
            f"{p.name} at {p.context_length:,} tokens, perplexity: base as it is {exp(base):.2f}, "
            f"base with RoPE scaled {exp(scaled):.2f}, adapter [bold]{exp(adapter):.2f}[/]"
        )
    if not ok:
        console.print("[red]a held-out loss did not fall as it should[/]")
    return ok


def next_steps(console: Console, port: int, recipes: Path, *, keep: bool, seconds: float) -> None:
    url = f"http://127.0.0.1:{port}"
    console.print(f"\n[bold green]Done in {seconds / 60:.1f} minutes.[/]")
    if keep:
        console.print(f"The endpoint runs on at {url}; `.venv/bin/loray down` stops it.")
    else:
        console.print("The endpoint is stopped. `.venv/bin/loray up` starts it again, `make demo KEEP=1` leaves it on.")
    ask = f"""curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "dates", "messages": [{{"role": "user", "content": "5 May 1999 -> ISO"}}]}}'"""
    console.print("Try next:", style="bold")
    for line in (
        ask,
        ".venv/bin/loray adapters ls",
        ".venv/bin/loray adapters show codepages",
        f"edit {recipes}/dates.yaml and `.venv/bin/loray train` it: dates@2 answers from the next request on",
        ".venv/bin/loray adapters promote dates@1      # and back: names move, bytes stay",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def training_rate(runs: Path) -> float:
    """Median tokens/s over the steps of the latest run; of a job of several adapters, those of this one."""
    latest = max(p for p in runs.iterdir() if p.is_dir())
    events = [json.loads(line) for line in (latest / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(e["tokens_per_s"] for e in events if e["event"] == "step")


def _before(published: VersionDetail) -> str:
    return "base_scaled" if published.method == "longlora" else "base"


def _loss(published: VersionDetail, subject: str) -> float:
    return next(e.value for e in published.manifest.evaluations if e.subject == subject and e.metric == "loss")


def _short(text: str, limit: int = 240) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + " …"
