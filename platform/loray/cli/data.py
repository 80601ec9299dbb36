"""`loray data`: what is in training data, and what of it a model learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.text import Text

from loray.bases.registry import ensure_base
from loray.cli.output import console, emit, json_option, pairs, progress_bar
from loray.cli.recipes import FIELDS, RecipeSource
from loray.errors import SpecError
from loray.fetching import fetched
from loray.methods import method_of
from loray.recipes.fields import given, merge
from loray.recipes.load import shipped
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import TrainSpec, format_size, printable

if TYPE_CHECKING:
    from loray.train.data.survey import Piece, Survey

_BAR = 40  # characters of the longest bar of the histogram


@click.group()
def data() -> None:
    """Look at training data as a model will see it."""


@data.command()
@click.argument("file", metavar="FILE|URL|RECIPE")
@click.option("--base", help="The base model to train on.")
@click.option("--eval-data", metavar="FILE|URL", help="Held-out data; without it, a part of the data is held out.")
@click.option("--rows", "num_rows", type=click.IntRange(min=0), default=3, show_default=True, help="To print.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any field of a recipe, as data.max_length=2048 or data.columns.prompt=question; may be given several times.",
)
@json_option
def show(
    file: str, base: str | None, eval_data: str | None, num_rows: int, assignments: tuple[str, ...], as_json: bool
) -> None:
    """Print the first rows of FILE, or of the data of a recipe, with what is learned of them, and then of all rows:
    their format and lengths, how many are cut, which stand there twice, and which are held out and trained on.

    What is learned is green; where there are no colours it is between ⟦ and ⟧. What is cut is struck through, or
    behind ✂.
    """
    from transformers import AutoTokenizer

    from loray.train.data.survey import survey

    settings = Settings.from_env()
    is_recipe = file.endswith((".yaml", ".yml")) or f"{file}.yaml" in shipped()
    options = {"base": base, "data": None if is_recipe else file, "eval_data": eval_data}
    named = [f"{FIELDS[name]}={value}" for name, value in options.items() if value is not None]
    over = merge(given(named if is_recipe else ["name=data", *named]), given(assignments))
    recipe = RecipeSource(file if is_recipe else None, over, ()).load(settings.home)
    spec, model = recipe.spec, ensure_base(settings.home, recipe.spec.base)
    if spec.batch.order == "concat":
        raise SpecError(
            "batch.order concat joins texts and cuts nothing off: take --set batch.order=packed to look at them"
        )
    max_length = resolve(spec, model.config).row_length
    sources, tokenizer = recipe.data(), AutoTokenizer.from_pretrained(model.path)
    adapter = method_of(spec.adapter).tokenised(spec.adapter, lambda: tokenizer)
    with fetched(sources.paths, settings, sources.columns) as copies, progress_bar() as progress:
        found = survey(
            sources,
            tokenizer,
            max_length=max_length,
            seed=spec.seed,
            formats=spec.objective.formats,
            invocation=adapter.invoked_by,
            num_shown=num_rows,
            fetched=copies,
            progress=progress,
        )
    if as_json:
        emit(_as_json(found, spec, max_length))
        return
    to = console()
    is_coloured = to.color_system is not None and not to.no_color
    for number, row in enumerate(found.shown, start=1):
        names = ["chosen", "rejected"] if found.are_pairs else [f"answer {i}" for i in range(1, len(row) + 1)]
        for sequence, name in zip(row, names if len(row) > 1 else [""], strict=True):
            to.rule(f"row {number} {name}".rstrip(), align="left", style="dim")
            to.print(_rendered(sequence, is_coloured=is_coloured), soft_wrap=True)
    to.rule(style="dim")
    _summarise(found, max_length, to)


def _rendered(sequence: tuple[Piece, ...], *, is_coloured: bool) -> Text:
    text = Text()
    for i, piece in enumerate(sequence):
        said = printable(piece.text)
        if is_coloured:
            text.append(said, f"{'green' if piece.is_learned else ''}{' strike' if piece.is_cut else ''}".strip())
            continue
        is_edge = piece.is_cut and (i == 0 or not sequence[i - 1].is_cut)
        text.append(f"{'✂' if is_edge else ''}{f'⟦{said}⟧' if piece.is_learned else said}")
    return text


def _summarise(found: Survey, max_length: int, to: Console) -> None:
    is_exact = found.num_sampled == found.num_rows
    p50, p99 = np.quantile(found.lengths_R, (0.5, 0.99), method="higher")
    about = "" if is_exact else "about "
    known = "" if is_exact else f"; from {found.num_sampled:,} rows that were tokenised"
    cut = "none"
    if found.cut.rows:
        cut = (
            f"{about}{found.cut.rows:.1%} of the rows, {found.cut.tokens:.1%} of the tokens, at {max_length:,} tokens; "
            f"data.max_length={found.cut.length_99} keeps 99 % of the rows whole"
        )
    twice = "none"
    if found.num_duplicates:
        worst = ", ".join(f"{duplicate.place}: {duplicate.times} times" for duplicate in found.duplicates)
        twice = f"{found.num_duplicates:,} rows stand there before ({worst})"
    both = f", {found.num_in_both:,} of them also among those to train on" if found.num_in_both else ""
    to.print(
        pairs(
            [
                ("rows", f"{found.num_rows:,}, {format_size(found.num_bytes)}"),
                ("format", found.rendering),
                (
                    "tokens",
                    f"{about}{int(found.lengths_R.sum()):,}; a row has {about}{p50:,} in the median, 99 % at most "
                    f"{p99:,}, the longest {found.lengths_R.max():,}{known}",
                ),
                ("learned", f"{about}{found.learned:.1%} of them"),
                ("cut", cut),
                ("duplicates", twice),
                ("held out", f"{found.num_held_out:,} rows{both}"),
            ]
        ),
        soft_wrap=True,
    )
    bars = _histogram(found)
    most = max(count for _, count in bars)
    to.print("\nrows by tokens, at most", style="dim")
    for stop, count in bars:
        to.print(f"{stop:>10,}  {'█' * -(-_BAR * count // most)} {count:,}", highlight=False)
    if warning := found.cut.warning(max_length):
        to.print(f"warning: {warning}", style="yellow", soft_wrap=True, highlight=False)


def _histogram(found: Survey) -> list[tuple[int, int]]:
    """(most tokens, rows) of each power of two from the shortest row to the longest."""
    powers = np.ceil(np.log2(np.maximum(found.lengths_R, 1))).astype(np.int64)
    counts = np.bincount(powers)
    return [(1 << p, int(counts[p])) for p in range(int(powers.min()), len(counts))]


def _as_json(found: Survey, spec: TrainSpec, max_length: int) -> dict[str, Any]:
    plain = found._asdict()
    del plain["lengths_R"]
    quantiles = np.quantile(found.lengths_R, (0.5, 0.9, 0.99, 1.0), method="higher").tolist()
    return plain | {
        "base": spec.base,
        "max_length": max_length,
        "num_tokens": int(found.lengths_R.sum()),
        "lengths": dict(zip(("p50", "p90", "p99", "max"), map(int, quantiles), strict=True)),
        "histogram": [{"at_most": stop, "rows": count} for stop, count in _histogram(found)],
        "cut": found.cut._asdict(),
        "duplicates": [duplicate._asdict() for duplicate in found.duplicates],
        "shown": [[[piece._asdict() for piece in sequence] for sequence in row] for row in found.shown],
    }
