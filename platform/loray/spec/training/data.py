"""The rows of a run: where they come from, and how they become micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from loray.spec.fields import Frozen


class DataSource(Frozen):
    """`path`: a file, a glob, a folder, or a data set that Hugging Face's `datasets` saved; here or on s3://. Or a data
    set of its hub, hf://org/name[/configuration][@revision][:split].

    `weight`: how often an epoch has the rows of this source: 2 has each twice, 0.25 a quarter, another one each epoch.
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)


SourcePath = Annotated[str, Field(min_length=1)]
Paths = Annotated[tuple[SourcePath, ...], Field(min_length=1)]
Mixture = Annotated[tuple[SourcePath | DataSource, ...], Field(min_length=1)]


class DataSpec(Frozen):
    """JSONL, Parquet or saved data sets with columns `messages` (chat), `prompt` and `completion`, or `text`, and for
    DPO `prompt`, `chosen` and `rejected` (preference); `auto` looks which. `train` and `eval` are one source (see
    DataSource) or several.
    """

    train: SourcePath | Mixture
    eval: SourcePath | Paths | None = None
    eval_fraction: float = Field(default=0.05, ge=0, lt=1, description="held out of `train` where `eval` is not given")
    format: Literal["auto", "chat", "prompt_completion", "text", "preference"] = "auto"
    max_length: int | None = Field(
        default=None, gt=1, description="None: LongLoRA's context; else 1024 tokens, or the base's window if shorter"
    )
    max_rows: int | None = Field(default=None, gt=0, description="the first ones of every source of `train`")

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return _sources(self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """Empty where rows are held out of `train`."""
        return () if self.eval is None else _sources(self.eval)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all sources."""
        return tuple(source.path for source in (*self.train_sources, *self.eval_sources))

    def with_paths(self, change: Callable[[str], str]) -> Self:
        """The same with every path changed."""
        ours = {field: getattr(self, field) for field in ("train", "eval")}
        return self.model_copy(update={field: _changed(sources, change) for field, sources in ours.items()})


def _sources(given: str | tuple[str | DataSource, ...]) -> tuple[DataSource, ...]:
    several = (given,) if isinstance(given, str) else given
    return tuple(DataSource(path=source) if isinstance(source, str) else source for source in several)


def _changed(
    given: str | DataSource | tuple[str | DataSource, ...] | None, change: Callable[[str], str]
) -> str | DataSource | tuple[object, ...] | None:
    match given:
        case None:
            return None
        case str():
            return change(given)
        case DataSource():
            return given.model_copy(update={"path": change(given.path)})
        case _:
            return tuple(_changed(source, change) for source in given)


class BatchSpec(Frozen):
    """Exactly one of `rows` and `tokens` (a budget, padding included) says how large a micro-batch is. A row of DPO is
    a pair: two sequences.

    order  shuffled, length_grouped: a document or a window of it is a row. packed: whole documents fill a row, each
           with positions and attention of its own. concat, of texts: they are joined by the end-of-sequence token and
           cut at the longest row, with one attention and running positions, as LongLoRA's paper does. None: concat
           for LongLoRA on texts, else shuffled
    """

    rows: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    accumulation: int = Field(default=1, gt=0)
    order: Literal["shuffled", "length_grouped", "packed", "concat"] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("give exactly one of rows and tokens")
        return self
