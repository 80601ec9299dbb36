"""`loray eval`: long-context perplexity and retrieval of bases, published adapters and PEFT folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table

from loray.cli import describe
from loray.cli.evaluation import heatmap
from loray.cli.evaluation.harness import tasks
from loray.cli.evaluation.options import Options, Where, measurement, retrieval_options
from loray.cli.evaluation.target import Target, opened
from loray.cli.output import console, emit, progress_bar, table
from loray.cli.services import open_services
from loray.errors import SpecError
from loray.machine import hardware, training_dtype
from loray.settings import Settings
from loray.spec import (
    EXACT_MATCH,
    LOG_LIKELIHOOD,
    DType,
    Evaluation,
    PerplexitySpec,
    RetrievalSpec,
    RetrievalTask,
    retrieval_metric,
)


@click.group()
def evaluate() -> None:
    """Measure long-context perplexity and retrieval, and tasks of lm-evaluation-harness.

    MODEL is a base model (scaled by --rope), a published adapter (`name`, `name@3`, `name@alias`), or a folder saved by
    PEFT, named by a path (`./folder`). Attention is dense; figures of a published adapter are recorded with it.
    """


evaluate.add_command(tasks)


@evaluate.command()
@click.option("--data", required=True, help="Documents: JSONL or Parquet with a column `text`, or a .txt file.")
@click.option("--where", type=Where(), multiple=True, help="Only rows with COLUMN=VALUE; may be given several times.")
@click.option("--stride", type=int, default=256, show_default=True, help="Tokens from one window to the next.")
@click.option(
    "--max-windows",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="For each length, evenly spread; 0: every window.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Only the first so many tokens of the data.")
@measurement
def perplexity(
    options: Options,
    data: str,
    where: tuple[tuple[str, str], ...],
    stride: int,
    max_windows: int,
    max_tokens: int | None,
) -> None:
    """Dense perplexity of MODEL by LongLoRA's rule.

    Windows of the context length, a new one every --stride tokens of a document, the mean loss over the whole window.
    With --compare: what the gate asks for before a LongLoRA adapter gets an alias.
    """
    with _target(options) as target:
        lengths = options.context_lengths or target.default_context_lengths
        spec = PerplexitySpec.parse(
            {"context_lengths": lengths, "stride": stride, "max_windows": max_windows or None}, source="the command"
        )
        from transformers import AutoTokenizer  # takes seconds

        from loray.train.evaluation.documents import read_documents

        tokenizer = AutoTokenizer.from_pretrained(target.base.path)
        documents = read_documents(data, tokenizer, where=dict(where), max_tokens=max_tokens)
        measured, took = _measure(target, options, documents=documents, perplexity=spec)
        if options.as_json:
            counts = {"num_documents": len(documents.ids_N), "num_tokens": documents.num_tokens}
            failures = _record(target, options, measured)
            emit(_as_json(target, options, measured, took) | counts | {"gate": failures})
            return
        out = console()
        out.print(
            f"perplexity of {target.label} on {documents.name}: {len(documents.ids_N)} documents, "
            f"{documents.num_tokens:,} tokens\nwindows of the context length, a new one every {stride} tokens, "
            "mean loss over the whole window, dense attention"
        )
        out.print(_perplexities(measured))
        failures = _record(target, options, measured)
        _print_end(target, options, took, "windows")
        if failures is not None:
            click.echo("gate: " + ("no alias, " + "; ".join(failures) if failures else "passed"))


@evaluate.command()
@retrieval_options
@measurement
def passkey(options: Options, **retrieval: Any) -> None:
    """Passkey retrieval of MODEL by depth and length (Mohtashami & Jaggi, 2023).

    A five-digit number in a text of filler. Exact match: greedy decoding writes it. Log-likelihood: of the number, in
    nats; one drawn at random from all has −11.4.
    """
    _retrieve("passkey", options, **retrieval)


@evaluate.command()
@retrieval_options
@measurement
def topics(options: Options, **retrieval: Any) -> None:
    """Topic retrieval of MODEL by depth and length (LongChat's LongEval).

    A record of conversations, and the question for the topic of one by its number. Exact match: greedy decoding writes
    the topic word for word. Log-likelihood: of the topic, in nats.
    """
    _retrieve("topics", options, **retrieval)


def _retrieve(
    task: RetrievalTask,
    options: Options,
    *,
    depths: tuple[float, ...],
    samples: int,
    seed: int,
    picture: Path | None,
) -> None:
    if picture is not None and picture.suffix != ".svg":
        raise click.UsageError(f"--heatmap draws SVG: {picture.with_suffix('.svg')}")
    if picture is not None and not picture.parent.is_dir():
        raise click.UsageError(f"--heatmap: {picture.parent} is not a folder")
    with _target(options) as target:
        lengths = options.context_lengths or target.default_context_lengths
        fields: dict[str, Any] = {"task": task, "context_lengths": lengths, "samples": samples, "seed": seed}
        spec = RetrievalSpec.parse(fields | ({"depths": depths} if depths else {}), source="the command")
        measured, took = _measure(target, options, retrieval=[spec])
        title = f"{task} retrieval of {target.label}"
        if picture is not None:
            picture.write_text(heatmap.draw(f"{title} ({samples} prompts a cell)", measured), encoding="utf-8")
        if options.as_json:
            _record(target, options, measured)
            emit(_as_json(target, options, measured, took) | {"heatmap": picture})
            return
        out = console()
        out.print(f"{title}, {samples} prompts a cell, seed {seed}: exact match, and log-likelihood of the key in nats")
        for subject in dict.fromkeys(e.subject for e in measured):
            out.print(_cells(task, subject, [e for e in measured if e.subject == subject]))
        if picture is not None:
            click.echo(f"heat map: {picture}")
        _record(target, options, measured)
        _print_end(target, options, took, "prompts")


def _target(options: Options) -> AbstractContextManager[Target]:
    return opened(
        options.model,
        base_name=options.base_name,
        scaling=options.scaling,
        original_context=options.original_context,
    )


class _Took(NamedTuple):
    """Seconds, including loading; windows or prompts that were computed, and those taken from earlier runs; the dtype,
    and why where nobody chose it.
    """

    seconds: float
    num_computed: int
    num_taken: int
    dtype: DType
    why: str


def _measure(target: Target, options: Options, **what: Any) -> tuple[tuple[Evaluation, ...], _Took]:
    import torch  # takes seconds
    from transformers.utils.logging import disable_progress_bar

    from loray.train.evaluation.kept import KeptFigures
    from loray.train.evaluation.measure import measure
    from loray.train.evaluation.subjects import subjects

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise SpecError(f"--device {options.device}: {str(e).splitlines()[0]}") from e
    if options.compare and target.rope is None and target.adapter is None:
        raise SpecError(f"there is nothing to compare {target.label} with: --compare is for adapters and for --rope")
    dtype, why = training_dtype(hardware(), use_gpu=device.type == "cuda")
    if options.dtype != "auto":
        dtype, why = options.dtype, ""
    disable_progress_bar()
    kept, started = KeptFigures(Settings.from_env().home, fresh=options.fresh), time.monotonic()
    with progress_bar() as tell:
        chosen = subjects(target.rope, target.adapter, compare=options.compare)
        measured = measure(target.base, chosen, dtype=dtype, device=device, progress=tell, kept=kept, **what)
    return measured, _Took(time.monotonic() - started, kept.num_computed, kept.num_taken, dtype, why)


def _record(target: Target, options: Options, measured: Sequence[Evaluation]) -> tuple[str, ...] | None:
    """Records the evaluations if asked to. Returns why the gate refuses an alias; None if the adapter is not gated."""
    version = target.version
    if version is None:
        return None
    known = version.evaluations + tuple(measured)
    with open_services() as services:
        if options.record:
            services.catalog.record_evaluations(version.digest, measured)
            known = services.catalog.version(version.name, version.version).evaluations
    return describe.objections(version.manifest, known, services.settings)


def _as_json(target: Target, options: Options, measured: Sequence[Evaluation], took: _Took) -> dict[str, Any]:
    return {
        "model": target.label,
        "digest": target.version and target.version.digest,
        "base": target.base.name,
        "rope_parameters": target.rope and target.rope.to_hf(),
        "dtype": took.dtype,
        "evaluations": [e.model_dump(mode="json", exclude_none=True) for e in measured],
        "recorded": target.version is not None and options.record,
        "seconds": round(took.seconds, 1),
        "num_computed": took.num_computed,
        "num_taken": took.num_taken,
    }


def _perplexities(measured: Sequence[Evaluation]) -> Table:
    """One row per context length, one column per model."""
    subjects = list(dict.fromkeys(e.subject for e in measured))
    by_length: dict[int, dict[str, Evaluation]] = {}
    for e in measured:
        by_length.setdefault(e.context_length or 0, {})[e.subject] = e
    names = [subject.replace("_", " ").upper() for subject in subjects]
    rows = [
        (f"{length:,}", next(iter(found.values())).count, *(f"{found[s].value:.4g}" for s in subjects))
        for length, found in by_length.items()
    ]
    return table(("CONTEXT", "WINDOWS", *names), rows, right=("CONTEXT", "WINDOWS", *names))


def _cells(task: str, subject: str, measured: Sequence[Evaluation]) -> Table:
    """One row per depth, one column per context length."""
    exact, likelihood = (
        {(e.depth, e.context_length): e.value for e in measured if e.metric == retrieval_metric(task, metric)}
        for metric in (EXACT_MATCH, LOG_LIKELIHOOD)
    )
    depths, lengths = dict.fromkeys(depth for depth, _ in exact), dict.fromkeys(length for _, length in exact)
    columns = [f"{length:,}" for length in lengths if length is not None]
    rows = [(f"{d:.0%}", *(f"{exact[d, n]:.0%}  {likelihood[d, n]:6.2f}" for n in lengths)) for d in depths]
    made = table(("DEPTH", *columns), rows, right=("DEPTH", *columns))
    made.title, made.title_justify = subject.replace("_", " "), "left"
    return made


def _print_end(target: Target, options: Options, took: _Took, what: str) -> None:
    if took.num_taken:
        total = took.num_computed + took.num_taken
        click.echo(f"{took.num_taken} of {total} {what} taken from earlier runs; --fresh computes all again")
    recorded = f"; recorded with {target.version.label}" if target.version and options.record else ""
    why = f" ({took.why})" if took.why else ""
    click.echo(f"{took.seconds:.1f} s, {took.dtype}{why}{recorded}")
