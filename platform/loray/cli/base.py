"""`loray base`: the base models of this machine."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast, get_args

import click

from loray.bases.checkpoint import expected_shapes, stored_dtype, tensor_infos
from loray.bases.quantization import RoundedTo
from loray.bases.registry import BaseModel, add_base, base_names, get_base, list_bases, verify_base
from loray.cli.output import Verification, console, count, emit, json_option, pairs, progress_bar, report, table, tell
from loray.errors import DataError, IntegrityError
from loray.files import scratch_folder
from loray.machine import hardware, training_dtype
from loray.settings import Settings
from loray.spec import Evaluation, PerplexitySpec, QuantizationSpec, format_size
from loray.telemetry import Progress

FORMS = (*get_args(RoundedTo), "nf4")  # that --quantise makes


@click.group()
def base() -> None:
    """Base models: add, list and verify them."""


@base.command()
@click.argument("source")
@click.option("--name", help="What to call it (default: smollm2, the folder's or the model's name, or NAME-int8).")
@click.option(
    "--quantise",
    "rounded_to",
    type=click.Choice(FORMS),
    help="Add the form of SOURCE that is rounded so: by rows, int4 in groups; nf4: as QLoRA rounds it.",
)
@click.option("--data", metavar="FILE", help="--quantise: what perplexity is measured on (default: Python's manual).")
@click.option("--of", metavar="NAME", help="The 16-bit base whose quantised form it is, and whose adapters it serves.")
@json_option
def add(source: str, name: str | None, rounded_to: str | None, data: str | None, of: str | None, as_json: bool) -> None:
    """Add SOURCE: `smollm2`, a folder with a Hugging Face checkpoint, or a Hugging Face id (OWNER/NAME).

    Checkpoints of Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3 and Phi-4, Mixtral, Qwen3-MoE and gpt-oss in
    safetensors are covered, in 16 bits or quantised (compressed-tensors, AWQ, GPTQ, bitsandbytes' 4 bits, MXFP4, float8
    in blocks).
    Adding the same one again verifies it. With --quantise SOURCE may also be a base of this machine; the weights'
    errors are printed by layer, and perplexity before and after.
    """
    home = Settings.from_env().home
    if rounded_to is None:
        if data is not None:
            raise click.UsageError("--data is for --quantise, which measures perplexity on it")
        with progress_bar() as progress:
            whole = None if of is None else get_base(home, of)
            added = add_base(source, home=home, name=name, of=whole, progress=progress)
        tell(_shown(added), _as_json(added), as_json)
        return
    if of is not None:
        raise click.UsageError("--quantise adds a form of SOURCE: leave out --of")
    from loray.bases.rounding import QloraBase, add_rounded, rounding_errors  # imports torch, which takes a second

    with progress_bar() as progress:
        known = source in base_names(home)
        whole = get_base(home, source) if known else add_base(source, home=home, progress=progress)
        to = QloraBase(QuantizationSpec(), stored_dtype(whole.path)) if rounded_to == "nf4" else rounded_to
        added = add_rounded(whole, cast("RoundedTo", to), home=home, name=name, progress=progress)
        errors = rounding_errors(whole, added)
        before, after = _perplexities(whole, added, data, progress)
    cost = {"errors": [e._asdict() for e in errors], "perplexity": {"before": before.value, "after": after.value}}
    if as_json:
        emit(_as_json(added) | cost)
        return
    rows = [(e.layer, f"{e.error:.2%}", f"{e.worst:.2%}", e.worst_module) for e in errors]
    console().print(_shown(added))
    console().print(table(("LAYER", "ERROR", "LARGEST", "OF"), rows, right=("LAYER", "ERROR", "LARGEST")))
    change = after.value / before.value - 1
    click.echo(
        f"perplexity on {before.dataset}: {before.value:.4g} before, {after.value:.4g} after ({change:+.2%}), over "
        f"{before.count} windows of {before.context_length} tokens"
    )


_WINDOW, _WINDOWS = 512, 8
_CHARACTERS = 1 << 18  # of the manual: its windows are spread over them


def _perplexities(whole: BaseModel, form: BaseModel, data: str | None, progress: Progress) -> tuple[Evaluation, ...]:
    """Measures the 16-bit base and its quantised form, whose activations are rounded as they are in an engine."""
    import torch  # takes seconds, as what follows
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from loray.train.evaluation.documents import read_documents
    from loray.train.evaluation.measure import MeasuredModel, measure
    from loray.train.evaluation.perplexity import KeptFigures

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(whole.path)
    if data is None:
        with scratch_folder() as folder:
            path = folder / "python-manual.txt"
            path.write_text("\n\n".join(_manual())[:_CHARACTERS], encoding="utf-8")
            documents = read_documents(str(path), tokenizer)
    else:
        documents = read_documents(data, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = training_dtype(hardware(), use_gpu=device.type == "cuda")
    length = min(_WINDOW, whole.config.max_position_embeddings, documents.longest)
    spec = PerplexitySpec(context_lengths=(length,), stride=length, max_windows=_WINDOWS)
    found: list[Evaluation] = []
    for base in (whole, form):
        told = partial(_told, progress, base.name)
        found += measure(
            base,
            [MeasuredModel("base")],
            dtype=dtype,
            documents=documents,
            perplexity=spec,
            device=device,
            progress=told,
            kept=KeptFigures(Settings.from_env().home),
        )
    return tuple(found)


def _told(progress: Progress, name: str, stage: str, share: float) -> None:
    progress(f"{name}: {stage}", share)


def _manual() -> list[str]:
    """The reference of the language, a text that every Python brings with it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise DataError("this Python has no manual to measure perplexity on: name a text with --data") from e
    return [topics[name] for name in sorted(topics)]


@base.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the base models of this machine."""
    shown = [_as_json(b) for b in list_bases(Settings.from_env().home)]
    columns = ("NAME", "ARCHITECTURE", "PARAMETERS", "SIZE", "CONTEXT", "FINGERPRINT", "SOURCE")
    rows = [
        (
            f["name"],
            f["architecture"],
            count(f["num_parameters"]),
            format_size(f["nbytes"]),
            f["context_length"],
            f["fingerprint"][:12],
            f["source"],
        )
        for f in shown
    ]
    none = "no base models yet; add one with `loray base add smollm2`"
    tell(table(columns, rows, right=("PARAMETERS", "SIZE", "CONTEXT")) if rows else none, shown, as_json)


@base.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Verify all base models.")
@json_option
def verify(name: str | None, every: bool, as_json: bool) -> None:
    """Hash the weights of NAME again and compare with its fingerprint."""
    if (name is None) != every:
        raise click.UsageError("give either NAME or --all")
    home = Settings.from_env().home
    verified: list[Verification] = []
    with progress_bar() as progress:
        for b in list_bases(home) if every else [get_base(home, name or "")]:
            error = None
            try:
                verify_base(b, progress)
            except IntegrityError as e:
                error = str(e)
            verified.append(Verification(b.name, {} if error else {"fingerprint": b.fingerprint}, error))
    report(verified, as_json)


def _as_json(b: BaseModel) -> dict[str, Any]:
    shapes, quantization = expected_shapes(b.config), b.config.quantization
    if b.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return {
        "name": b.name,
        "architecture": b.config.architecture,
        "quantization": None if quantization is None else str(quantization),
        "of": b.of,
        "num_parameters": sum(map(math.prod, shapes.values())),
        "nbytes": sum(info.stop - info.start for info in tensor_infos(b.path)),
        "context_length": b.config.max_position_embeddings,
        "fingerprint": b.fingerprint,
        "source": b.source,
        "path": str(b.path),
    }


def _shown(b: BaseModel) -> Any:
    f = _as_json(b)
    return pairs(
        [
            ("base model", b.name),
            ("architecture", f["architecture"]),
            ("quantised", f["quantization"]),
            ("form of", b.of and b.of[:12]),
            ("parameters", f"{count(f['num_parameters'])} ({format_size(f['nbytes'])})"),
            ("context", f"{f['context_length']} tokens"),
            ("fingerprint", b.fingerprint),
            ("source", b.source),
            ("folder", b.path),
        ]
    )
