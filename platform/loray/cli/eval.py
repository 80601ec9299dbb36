"""`loray eval`: perplexity and retrieval of a base, a published adapter or a folder."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
from pydantic import ValidationError
from rich.table import Table

from loray.adapters.manifest import verify_folder
from loray.bases.config import scaled
from loray.bases.registry import BaseModel, base_names, find_base, get_base
from loray.catalog import AdapterVersion
from loray.cli import describe
from loray.cli.connect import open_services
from loray.cli.eval_tasks import tasks
from loray.cli.output import console, emit, json_option, progress_bar, table
from loray.cli.pictures import draw_heat_maps
from loray.errors import AdapterNotFound, DataError, SpecError, UnsupportedError
from loray.machine import hardware, training_dtype
from loray.publishing import base_of
from loray.settings import Settings
from loray.spec import (
    EXACT_MATCH,
    LOG_LIKELIHOOD,
    AdapterManifest,
    AnyDType,
    DType,
    Evaluation,
    PerplexitySpec,
    RetrievalSpec,
    RetrievalTask,
    RopeParameters,
    RopeScaling,
    retrieval_metric,
)
from loray.telemetry import Progress


def numbers(kind: type[int] | type[float]) -> Callable[..., tuple[float, ...]]:
    """Makes the callback of an option that is given several times, each time with several values: `2048,4096`."""

    def parsed(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[float, ...]:
        try:
            return tuple(kind(part) for value in values for part in value.split(","))
        except ValueError:
            given = ",".join(values)
            raise click.BadParameter(f"{given!r} is not a list of numbers; separate them by commas") from None

    return parsed


def rope(value: str) -> RopeScaling:
    kind, _, factor = value.partition(":")
    try:
        return RopeScaling.model_validate({"type": kind, "factor": factor})
    except ValidationError:
        raise click.BadParameter(f"{value!r} is not TYPE:FACTOR, such as linear:2, ntk:2 or yarn:4") from None


def where(value: str) -> tuple[str, str]:
    column, separator, wanted = value.partition("=")
    if not separator or not column:
        raise click.BadParameter(f"{value!r} is not COLUMN=VALUE, such as split=test")
    return column, wanted


class Options(NamedTuple):
    """The options that every measurement has."""

    model: str
    base_name: str | None
    scaling: RopeScaling | None
    original_context: int | None
    context_lengths: tuple[int, ...]
    compare: bool
    dtype: AnyDType
    device: str | None
    record: bool
    fresh: bool
    as_json: bool


_MEASUREMENT = (
    click.argument("model"),
    click.option(
        "-c",
        "--context-length",
        "context_lengths",
        multiple=True,
        callback=numbers(int),
        metavar="TOKENS",
        help="Several: 4096,8192 (default: the model's own context, and the one that it was extended from).",
    ),
    click.option("--rope", "scaling", type=rope, help="Scale RoPE: linear:2, ntk:2 or yarn:4."),
    click.option("--original-context", type=int, help="What --rope extends (default: the base's window)."),
    click.option("--base", "base_name", help="The base of a folder, or a quantised form of an adapter's base."),
    click.option(
        "--compare",
        is_flag=True,
        help="Also the base as it is, under the adapter's RoPE, and, of a quantised form, all on the 16-bit base.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *get_args(DType)]),
        default="auto",
        show_default=True,
        help="Of weights; auto: what the device multiplies fast.",
    ),
    click.option("--device", help="A torch device (default: cuda where there is one, else cpu)."),
    click.option("--record/--no-record", default=True, help="Record the figures of a published adapter (default)."),
    click.option("--fresh", is_flag=True, help="Compute all, also what an earlier run has computed."),
    json_option,
)

_RETRIEVAL = (
    click.option(
        "--depths",
        multiple=True,
        callback=numbers(float),
        metavar="SHARES",
        help="Where the key lies, from 0 to 1 (default: 0,0.25,0.5,0.75,1).",
    ),
    click.option("--samples", type=int, default=4, show_default=True, help="Prompts for a depth and length."),
    click.option("--seed", type=int, default=0, show_default=True, help="Keys are drawn from it."),
    click.option("--heatmap", "picture", type=click.Path(path_type=Path), help="Draw depth × length, as SVG."),
)


def measures(*others: Callable[..., Any]) -> Callable[[Callable[..., None]], Any]:
    """Adds `others`, and the argument and options of `Options`, which the command gets as its first argument."""

    def decorate(command: Callable[..., None]) -> Any:
        @wraps(command)
        def gathered(**options: Any) -> None:
            ours = {name: options.pop(name) for name in Options._fields}
            command(Options(**ours), **options)

        decorated: Any = gathered
        for option in reversed((*others, *_MEASUREMENT)):
            decorated = option(decorated)
        return decorated

    return decorate


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """The model to measure. With `rope` None, RoPE and `context_length` are the base's. `version`: if published.
    `whole`: the 16-bit base whose quantised form the base is, if this machine has it.
    """

    label: str
    base: BaseModel
    context_length: int
    original_context_length: int | None = None
    rope: RopeParameters | None = None
    adapter: Path | None = None
    version: AdapterVersion | None = None
    whole: BaseModel | None = None

    @property
    def is_recorded(self) -> bool:
        """The figures are those of a published adapter on the base that it was trained on."""
        return self.version is not None and self.version.manifest.base_fingerprint == self.base.fingerprint

    @property
    def default_context_lengths(self) -> tuple[int, ...]:
        """The lengths that the gate compares: the original context, and the extended one."""
        original = () if self.original_context_length is None else (self.original_context_length,)
        return (*original, self.context_length)

    def described(self, manifest: AdapterManifest) -> EvaluatedModel:
        """Adds context lengths and RoPE of the adapter's manifest."""
        return replace(
            self,
            context_length=manifest.context_length,
            original_context_length=manifest.original_context_length,
            rope=manifest.rope_parameters,
        )


@contextmanager
def opened(options: Options) -> Iterator[EvaluatedModel]:
    """Opens the model to measure. A published adapter's files are fetched, verified, and removed when the block ends.

    A model with a slash is a path (`./folder`); otherwise it is the name of a base or, if there is none, of an
    adapter. Raises BaseNotFound, AdapterNotFound, DataError, SpecError and what reading raises.
    """
    settings, model = Settings.from_env(), options.model
    with tempfile.TemporaryDirectory(prefix="loray-eval-") as scratch:
        if os.sep in model:
            found = _folder(Path(model).expanduser(), settings, options.base_name)
        elif model in base_names(settings.home):
            if options.base_name is not None:
                raise SpecError(
                    f"--base is for folders and published adapters; leave it out, since {model} is a base itself"
                )
            base = get_base(settings.home, model)
            found = EvaluatedModel(model, base, base.config.max_position_embeddings)
        else:
            found = _published(model, Path(scratch) / "adapter", options.base_name)
        whole = None if found.base.of is None else find_base(settings.home, found.base.of)
        yield _scaled(replace(found, whole=whole), options.scaling, options.original_context)


def _folder(folder: Path, settings: Settings, base_name: str | None) -> EvaluatedModel:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one with the adapter's adapter_config.json")
    base = get_base(settings.home, base_name) if base_name else base_of(folder, settings.home)
    target = EvaluatedModel(folder.name, base, base.config.max_position_embeddings, adapter=folder)
    return target.described(verify_folder(folder)) if (folder / AdapterManifest.FILE).is_file() else target


def _published(model: str, folder: Path, base_name: str | None) -> EvaluatedModel:
    """Fetches the adapter into `folder`. Raises BaseMismatch where `base_name` is not its base, nor a form of that."""
    with open_services() as services:
        try:
            ref = services.catalog.adapters.resolve(model)
        except AdapterNotFound as e:
            raise AdapterNotFound(
                f"{e}; `loray base ls` lists bases, and a folder is named by a path: ./{model}"
            ) from e
        version = services.catalog.adapters.version(ref.name, ref.version)
        services.store.fetch(ref.digest, folder)
        home = services.settings.home
        base = base_of(folder, home) if base_name is None else get_base(home, base_name)
        ref.check_base(base.name, base.fingerprint, base.of)
    target = EvaluatedModel(version.label, base, base.config.max_position_embeddings, adapter=folder, version=version)
    return target.described(version.manifest)


def _scaled(target: EvaluatedModel, scaling: RopeScaling | None, original_context: int | None) -> EvaluatedModel:
    if scaling is None:
        if original_context is not None:
            raise SpecError("--original-context says what --rope extends; give that too")
        return target
    if target.rope is not None or target.version is not None:
        raise SpecError(f"{target.label} is published with its RoPE; leave out --rope, which is for bases and folders")
    original = original_context or target.base.config.max_position_embeddings
    try:
        rope = scaled(target.base.config.rope, scaling, original_context=original, head_dim=target.base.config.head_dim)
    except ValueError as e:
        raise UnsupportedError(f"--rope on {target.base.name}: {e}") from e
    return replace(
        target,
        label=f"{target.label} ({scaling.type} × {scaling.factor:g})",
        context_length=int(original * scaling.factor),
        original_context_length=original,
        rope=rope,
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
@click.option("--where", type=where, multiple=True, help="Only rows with COLUMN=VALUE; may be given several times.")
@click.option("--stride", type=int, default=256, show_default=True, help="Tokens from one window to the next.")
@click.option(
    "--max-windows",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="For each length, evenly spread; 0: every window.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Only the first so many tokens of the data.")
@measures()
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
    with opened(options) as target:
        lengths = options.context_lengths or target.default_context_lengths
        spec = PerplexitySpec.parse(
            {"context_lengths": lengths, "stride": stride, "max_windows": max_windows or None}, source="the command"
        )
        from transformers import AutoTokenizer  # takes seconds

        from loray.train.evaluation.documents import read_documents

        tokenizer = AutoTokenizer.from_pretrained(target.base.path)
        documents = read_documents(data, tokenizer, where=dict(where), max_tokens=max_tokens)
        measured, on_whole, took = _measure(target, options, documents=documents, perplexity=spec)
        if options.as_json:
            counts = {"num_documents": len(documents.ids_N), "num_tokens": documents.num_tokens}
            failures = _record(target, options, measured)
            emit(_as_json(target, options, measured, on_whole, took) | counts | {"gate": failures})
            return
        out = console()
        out.print(
            f"perplexity of {target.label} on {documents.name}: {len(documents.ids_N)} documents, "
            f"{documents.num_tokens:,} tokens\nwindows of the context length, a new one every {stride} tokens, "
            "mean loss over the whole window, dense attention"
        )
        out.print(_perplexities(_columns(target, measured, on_whole)))
        failures = _record(target, options, measured)
        _print_end(target, options, took, "windows")
        if failures is not None:
            click.echo("gate: " + ("no alias, " + "; ".join(failures) if failures else "passed"))


@evaluate.command()
@measures(*_RETRIEVAL)
def passkey(options: Options, **retrieval: Any) -> None:
    """Passkey retrieval of MODEL by depth and length (Mohtashami & Jaggi, 2023).

    A five-digit number in a text of filler. Exact match: greedy decoding writes it. Log-likelihood: of the number, in
    nats; one drawn at random from all has −11.4.
    """
    _retrieve("passkey", options, **retrieval)


@evaluate.command()
@measures(*_RETRIEVAL)
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
        raise click.UsageError(f"--heatmap: {picture.parent} is not a folder; make it, or name another file")
    with opened(options) as target:
        lengths = options.context_lengths or target.default_context_lengths
        fields: dict[str, Any] = {"task": task, "context_lengths": lengths, "samples": samples, "seed": seed}
        spec = RetrievalSpec.parse(fields | ({"depths": depths} if depths else {}), source="the command")
        measured, on_whole, took = _measure(target, options, retrieval=[spec])
        title = f"{task} retrieval of {target.label}"
        if picture is not None:
            picture.write_text(draw_heat_maps(f"{title} ({samples} prompts a cell)", measured), encoding="utf-8")
        if options.as_json:
            _record(target, options, measured)
            emit(_as_json(target, options, measured, on_whole, took) | {"heatmap": picture})
            return
        out = console()
        out.print(f"{title}, {samples} prompts a cell, seed {seed}: exact match, and log-likelihood of the key in nats")
        for name, column in _columns(target, measured, on_whole).items():
            out.print(_cells(task, name, column))
        if picture is not None:
            click.echo(f"heat map: {picture}")
        _record(target, options, measured)
        _print_end(target, options, took, "prompts")


class _Took(NamedTuple):
    """Seconds, including loading; windows or prompts that were computed, and those taken from earlier runs; the dtype,
    and why where nobody chose it.
    """

    seconds: float
    num_computed: int
    num_taken: int
    dtype: DType
    why: str


_Evaluations = tuple[Evaluation, ...]


def _measure(target: EvaluatedModel, options: Options, **what: Any) -> tuple[_Evaluations, _Evaluations, _Took]:
    """Measures the target, and where it is compared the same on the 16-bit base, if it is on a quantised form."""
    import torch  # takes seconds
    from transformers.utils.logging import disable_progress_bar

    from loray.train.evaluation.measure import measure, subjects
    from loray.train.evaluation.perplexity import KeptFigures

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise SpecError(f"--device {options.device}: {str(e).splitlines()[0]}") from e
    if options.compare and target.rope is None and target.adapter is None and target.whole is None:
        raise SpecError(
            f"there is nothing to compare {target.label} with; leave out --compare, which is for adapters, --rope and "
            "quantised forms"
        )
    dtype, why = training_dtype(hardware(), use_gpu=device.type == "cuda")
    if options.dtype != "auto":
        dtype, why = options.dtype, ""
    disable_progress_bar()
    kept, started = KeptFigures(Settings.from_env().home, fresh=options.fresh), time.monotonic()
    with progress_bar() as tell:
        chosen = subjects(target.rope, target.adapter, compare=options.compare)
        measured = measure(target.base, chosen, dtype=dtype, device=device, progress=tell, kept=kept, **what)
        on_whole: _Evaluations = ()
        if options.compare and (whole := target.whole) is not None:
            also: Progress = lambda stage, share: tell(f"{whole.name}: {stage}", share)  # noqa: E731
            on_whole = measure(whole, chosen, dtype=dtype, device=device, progress=also, kept=kept, **what)
    return measured, on_whole, _Took(time.monotonic() - started, kept.num_computed, kept.num_taken, dtype, why)


def _record(target: EvaluatedModel, options: Options, measured: Sequence[Evaluation]) -> tuple[str, ...] | None:
    """Records the evaluations if asked to. Returns why the gate refuses an alias; None if the adapter is not gated, or
    is not on the base that it was trained on.
    """
    version = target.version
    if version is None or not target.is_recorded:
        return None
    known = version.evaluations + tuple(measured)
    with open_services() as services:
        if options.record:
            services.catalog.evaluations.record(version.digest, measured)
            known = services.catalog.adapters.version(version.name, version.version).evaluations
    return describe.objections(version.manifest, known, services.settings)


def _as_json(
    target: EvaluatedModel, options: Options, measured: _Evaluations, on_whole: _Evaluations, took: _Took
) -> dict[str, Any]:
    compared: dict[str, Any] = {}
    if target.whole is not None and on_whole:
        compared = {"of": {"base": target.whole.name, "evaluations": _dumped(on_whole)}}
    return {
        "model": target.label,
        "digest": target.version and target.version.digest,
        "base": target.base.name,
        "rope_parameters": target.rope and target.rope.to_hf(),
        "dtype": took.dtype,
        "evaluations": _dumped(measured),
        **compared,
        "recorded": target.is_recorded and options.record,
        "seconds": round(took.seconds, 1),
        "num_computed": took.num_computed,
        "num_taken": took.num_taken,
    }


def _dumped(measured: _Evaluations) -> list[dict[str, Any]]:
    return [e.model_dump(mode="json", exclude_none=True) for e in measured]


def _columns(target: EvaluatedModel, measured: _Evaluations, on_whole: _Evaluations) -> dict[str, list[Evaluation]]:
    """Sorts the figures by model: its subject, and the base's name where there are two."""
    columns: dict[str, list[Evaluation]] = {}
    for base, figures in ((target.base, measured), (target.whole, on_whole)):
        for e in figures:
            on = f" on {base.name}" if on_whole and base is not None else ""
            columns.setdefault(e.subject.replace("_", " ") + on, []).append(e)
    return columns


def _perplexities(columns: dict[str, list[Evaluation]]) -> Table:
    """Shows one row per context length, one column per model."""
    by_length: dict[int, dict[str, Evaluation]] = {}
    for name, column in columns.items():
        for e in column:
            by_length.setdefault(e.context_length or 0, {})[name] = e
    names = [name.upper() for name in columns]
    rows = [
        (f"{length:,}", next(iter(found.values())).count, *(f"{found[name].value:.4g}" for name in columns))
        for length, found in by_length.items()
    ]
    return table(("CONTEXT", "WINDOWS", *names), rows, right=("CONTEXT", "WINDOWS", *names))


def _cells(task: str, name: str, measured: Sequence[Evaluation]) -> Table:
    """Shows one row per depth, one column per context length."""
    exact, likelihood = (
        {(e.depth, e.context_length): e.value for e in measured if e.metric == retrieval_metric(task, metric)}
        for metric in (EXACT_MATCH, LOG_LIKELIHOOD)
    )
    depths, lengths = dict.fromkeys(depth for depth, _ in exact), dict.fromkeys(length for _, length in exact)
    columns = [f"{length:,}" for length in lengths if length is not None]
    rows = [(f"{d:.0%}", *(f"{exact[d, n]:.0%}  {likelihood[d, n]:6.2f}" for n in lengths)) for d in depths]
    made = table(("DEPTH", *columns), rows, right=("DEPTH", *columns))
    made.title, made.title_justify = name, "left"
    return made


def _print_end(target: EvaluatedModel, options: Options, took: _Took, what: str) -> None:
    if took.num_taken:
        total = took.num_computed + took.num_taken
        click.echo(f"{took.num_taken} of {total} {what} taken from earlier runs; --fresh computes all again")
    recorded = f"; recorded with {target.label}" if target.is_recorded and options.record else ""
    why = f" ({took.why})" if took.why else ""
    click.echo(f"{took.seconds:.1f} s, {took.dtype}{why}{recorded}")
