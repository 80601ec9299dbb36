"""What is measured before publishing: documents for perplexity, read whole, tokenised as in training, and cut into
overlapping windows; and a few prompts of held-out rows.

Shapes: N tokens of a document.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.recipes.sources import Copy, SourceFiles, find_files, without_options
from loray.spec import PERPLEXITY, ColumnNames, EvaluationSpec, Subject
from loray.train.data.batches import TokenizedRows
from loray.train.data.formats import file_column
from loray.train.data.read import read_columns, read_head, read_text
from loray.train.data.tokenize import check_tokenizer, prompt_ids

_TEXT = "text"


class Documents(NamedTuple):
    """`name` is for people; `sha256` is over the tokens of all documents and their lengths."""

    name: str
    ids_N: tuple[NDArray[np.int32], ...]
    sha256: str

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.ids_N)

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.ids_N)


def read_documents(
    sources: str | Sequence[str],
    tokenizer: Any,
    *,
    where: Mapping[str, str] = MappingProxyType({}),
    max_tokens: int | None = None,
    columns: ColumnNames | None = None,
    fetched: Mapping[str, Copy] = MappingProxyType({}),
) -> Documents:
    """Read the documents of one source or several, as a recipe names them: JSONL, JSON arrays, CSV, Parquet or saved
    data sets with a column `text`, or what `columns` call it; a `.txt` file is one document.

    where       only rows whose columns have these values
    max_tokens  number of tokens to keep, from the beginning; None: all
    fetched     copies on this machine of remote sources
    Raises DataError.
    """
    named = [sources] if isinstance(sources, str) else list(sources)
    files = [file for source in named for file in find_files(source, fetched.get(source))]
    texts = [text for file in files for text in _texts(file, where, columns)]
    if not texts:
        rule = " and ".join(f"{column}={value}" for column, value in where.items())
        raise DataError(f"{', '.join(named)} has no document" + (f" where {rule}" if rule else ""))
    check_tokenizer(tokenizer)
    documents, left = [], sys.maxsize if max_tokens is None else max_tokens
    for ids in token_ids(tokenizer, texts):
        documents.append(np.array([*ids, tokenizer.eos_token_id][:left], np.int32))
        left -= len(documents[-1])
        if left <= 0:
            break
    names = [PurePosixPath(without_options(source)).name for source in named]
    name = ", ".join([*names, *(f"{column}={value}" for column, value in where.items())])
    return Documents(name, tuple(documents), _sha256(documents))


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Tokenise each text, as in training and serving, without an end-of-sequence token."""
    for text in texts:  # one at a time: the tokenizer's memory for a long text is many times the text
        yield from prompt_ids(tokenizer, [text])


def cut_windows(
    documents: Documents, context_length: int, *, stride: int, max_windows: int | None
) -> tuple[NDArray[np.int32], ...]:
    """Cut windows of `context_length` tokens, which start at 0, stride, 2 · stride … of a document and end within it,
    as views of the documents. `max_windows` of them are evenly spread from the first to the last; None: all.

    Raises DataError where no document is long enough.
    """
    starts = [(ids, start) for ids in documents.ids_N for start in range(0, len(ids) - context_length + 1, stride)]
    if not starts:
        raise DataError(
            f"no document of {documents.name} has {context_length:,} tokens, the longest has {documents.longest:,}; "
            "give longer documents, or a shorter context length"
        )
    count = len(starts) if max_windows is None else min(max_windows, len(starts))
    chosen = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, count).round()]
    return tuple(ids[start : start + context_length] for ids, start in chosen)


def stage_name(subject: Subject, what: str, context_length: int) -> str:
    """Name what is measured of one model at one length."""
    return f"{subject.replace('_', ' ')}, {what} at {context_length:,} tokens"


def stage_tokens(subjects: Iterable[Subject], spec: EvaluationSpec, documents: Documents | None) -> dict[str, int]:
    """Count the tokens that go through each model for what `spec` asks before publishing, by the name of the stage."""
    lengths: dict[int, int] = {}
    if (perplexity := spec.perplexity) is not None and documents is not None:
        stride, most = perplexity.stride, perplexity.max_windows
        for n in perplexity.context_lengths:
            lengths[n] = n * len(cut_windows(documents, n, stride=stride, max_windows=most))
    found: dict[str, int] = {}
    for subject in subjects:
        found |= {stage_name(subject, PERPLEXITY, n): tokens for n, tokens in lengths.items()}
        for task in spec.retrieval:
            each = len(task.depths) * task.samples
            found |= {stage_name(subject, task.task, n): n * each for n in task.context_lengths}
    return found


def _texts(file: SourceFiles, where: Mapping[str, str], columns: ColumnNames | None) -> list[str]:
    name, path = file.name, Path(file.fetched())
    if not path.is_file():
        raise DataError(f"{name} is not a file; name one with documents: JSONL, Parquet or .txt")
    if path.suffix == ".txt" and not where:
        return [text for text in [read_text(name, path)] if text]
    column = _TEXT if columns is None else file_column(_TEXT, read_head(SourceFiles(name, str(path))).names, columns)
    records = read_columns(name, path, [column, *where])
    texts = [r[column] for r in records if all(str(r[c]) == v for c, v in where.items())]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{name}: `{column}` must be a string in every row, not {type(text).__name__}")
    return [text for text in texts if text]


def _sha256(documents: Sequence[NDArray[np.int32]]) -> str:
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4").tobytes())
    return digest.hexdigest()


# -- prompts ----------------------------------------------------------------------------------------------------------

_MOST_PROMPTS, _MAX_PROMPT = 3, 1024  # tokens of one


class HeldOutPrompt(NamedTuple):
    """The tokens of a held-out row up to its first answer, and those of that answer."""

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def held_out_prompts(rows: TokenizedRows, sequences_per_row: int) -> tuple[HeldOutPrompt, ...]:
    """Choose up to three prompts, evenly spread over the held-out rows; none where rows are texts, which have no
    prompt. Of a pair of answers the first sequence counts, which has the chosen one; of single answers that are each
    desirable or not, the desirable ones.
    """
    found = []
    for i in range(0, len(rows), sequences_per_row):
        if rows.desirable is not None and not rows.desirable[i // sequences_per_row]:
            continue
        ids, targets = rows.row(i)
        first = int(targets.argmax()) if targets.any() else 0
        if 1 < first <= _MAX_PROMPT:  # the first token of any row is no target
            length = int((~targets[first:]).argmax()) or len(ids) - first
            found.append(HeldOutPrompt(tuple(ids[:first].tolist()), tuple(ids[first : first + length].tolist())))
    chosen = np.linspace(0, len(found) - 1, min(_MOST_PROMPTS, len(found))).round().astype(int)
    return tuple(found[i] for i in chosen)
