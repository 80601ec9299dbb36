"""From rows to token ids with targets, the tokens that the model learns to predict.

chat               targets are assistant turns, rendered with the checkpoint's own chat template
prompt_completion  targets are the completion and the end-of-sequence token
text               all tokens are targets, cut into consecutive windows of `max_length` tokens, or joined: see `joined`

The token ids are those that serving has: the text before a target is tokenised apart from it, as a prompt is.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from loray.errors import DataError
from loray.train.data.files import RowFile, problem

_TEXTS_AT_ONCE = 256  # documents per call of the tokenizer, which runs threads


class Example(NamedTuple):
    """`targets[i]` is True if token i is predicted from those before it. `document` is the index of the input row."""

    ids: list[int]
    targets: list[bool]
    document: int
    truncated: bool = False


class Rows(Protocol):
    """Rows of tokens."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of row i, and which of them are targets."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Row i is [starts[i], starts[i] + lengths[i]) of N tokens. Some of them may belong to no row."""

    ids_N: NDArray[np.int32]
    targets_N: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        part = slice(self.starts[i], self.starts[i] + self.lengths[i])
        return self.ids_N[part], self.targets_N[part]

    def select(self, indices: NDArray[np.int64]) -> TokenRows:
        """These rows, without a copy of the tokens."""
        return TokenRows(self.ids_N, self.targets_N, self.starts[indices], self.lengths[indices])


def pack_rows(rows: Sequence[tuple[Any, Any]]) -> TokenRows:
    """TokenRows of (ids, targets) pairs. The first token of a row is never a target."""
    lengths = np.array([len(ids) for ids, _ in rows], np.int64)
    starts = np.cumsum(lengths) - lengths
    ids_N = np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows]) if rows else np.empty(0, np.int32)
    targets_N = np.concatenate([np.asarray(t, np.bool_) for _, t in rows]) if rows else np.empty(0, np.bool_)
    targets_N[starts] = False
    return TokenRows(ids_N, targets_N, starts, lengths)


class RowSpool:
    """Rows in temporary files, five bytes per token, which are read as memory-mapped TokenRows.

    Use it in a `with` block. The files have no name: the system removes them with the last array that maps them.
    """

    def __enter__(self) -> RowSpool:
        self._files = ExitStack()
        self._ids = self._files.enter_context(tempfile.TemporaryFile(prefix="loray-rows-"))
        self._targets = self._files.enter_context(tempfile.TemporaryFile(prefix="loray-rows-"))
        self._lengths = array("q")
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def add(self, ids: list[int], targets: list[bool]) -> int:
        """Append a row. Returns its number of targets; the first token is never one."""
        mask = np.array(targets, np.bool_)
        mask[:1] = False
        self._ids.write(np.array(ids, np.int32).tobytes())
        self._targets.write(mask.tobytes())
        self._lengths.append(len(ids))
        return int(mask.sum())

    def rows(self) -> TokenRows:
        """All rows. They remain valid after the block."""
        lengths = np.array(self._lengths, np.int64)
        total = int(lengths.sum())
        ids_N, targets_N = _mapped(self._ids, np.int32, total), _mapped(self._targets, np.bool_, total)
        return TokenRows(ids_N, targets_N, np.cumsum(lengths) - lengths, lengths)


def _mapped(file: IO[bytes], dtype: Any, size: int) -> NDArray[Any]:
    file.flush()
    return np.memmap(file, dtype, "r", shape=(size,)).view(np.ndarray) if size else np.empty(0, dtype)


def tokenize(rows: RowFile, tokenizer: Any, max_length: int | None) -> Iterator[Example]:
    """Examples of at most `max_length` tokens, in order, at least one per row. None, for texts: each whole, and without
    what the tokenizer puts before it. Raises DataError for a malformed row.
    """
    check_tokenizer(tokenizer)
    if rows.format == "chat" and not tokenizer.chat_template:
        raise DataError(f"{rows.source} holds chats, but the base model has no chat template; use prompt/completion")
    for first, records in rows.parts():
        for number, record in enumerate(records, start=first + 1):
            if wrong := problem(record, rows.format):
                raise DataError(f"{rows.source}, row {number}: {wrong}")
        if max_length is None:
            examples = _whole_texts(records, tokenizer)
        elif rows.format == "text":
            examples = _texts(records, tokenizer, max_length)
        elif rows.format == "prompt_completion":
            examples = _prompts(records, tokenizer, max_length)
        else:
            examples = _chats(records, tokenizer, max_length, rows, first)
        for example in examples:
            yield example._replace(document=first + example.document)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise DataError where the tokenizer has no end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the base model's tokenizer has no end-of-sequence token; set one in its tokenizer_config.json")


def _texts(records: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Iterator[Example]:
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        texts = [r["text"] for r in records[start : start + _TEXTS_AT_ONCE]]
        for i, ids in enumerate(prompt_ids(tokenizer, texts)):
            ids = [*ids, tokenizer.eos_token_id]
            for at in range(0, len(ids), max_length):
                window = ids[at : at + max_length]
                yield Example(window, [True] * len(window), start + i)


def _whole_texts(records: list[dict[str, Any]], tokenizer: Any) -> Iterator[Example]:
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        for i, ids in enumerate(_ids(tokenizer, [r["text"] for r in records[start : start + _TEXTS_AT_ONCE]])):
            yield Example([*ids, tokenizer.eos_token_id], [True] * (len(ids) + 1), start + i)


def _prompts(records: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Iterator[Example]:
    for start in range(0, len(records), _TEXTS_AT_ONCE):
        part = records[start : start + _TEXTS_AT_ONCE]
        prompts = prompt_ids(tokenizer, [r["prompt"] for r in part])
        completions = _ids(tokenizer, [r["completion"] for r in part])
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            yield _join([(prompt, False), ([*completion, tokenizer.eos_token_id], True)], start + i, max_length)


def _chats(
    records: list[dict[str, Any]], tokenizer: Any, max_length: int, rows: RowFile, first: int
) -> Iterator[Example]:
    for document, record in enumerate(records):
        try:
            conversations = list(_chat(record["messages"], tokenizer))
        except (DataError, TemplateError) as e:
            raise DataError(f"{rows.source}, row {first + document + 1}: {e}") from e
        for segments in conversations:
            yield _join(segments, document, max_length)


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> Iterator[list[tuple[list[int], bool]]]:
    """Segments (ids, is target) of one conversation, cut at the start and the end of each assistant turn.

    To find the cuts, the conversation is rendered up to each turn; the result must be a prefix of the whole. A template
    that changes earlier turns (Qwen3 drops their reasoning) has no such prefixes: then every assistant turn becomes an
    example of its own, with the tokens that a server has at that point.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise DataError("the conversation has no assistant turn to learn from")
    if turns[0] == 0:
        raise DataError("the conversation starts with the assistant; put a user or system message first")
    spans = []
    for i in turns:
        before = _render(tokenizer, messages[:i], add_generation_prompt=True)
        after = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not after.startswith(before):
            raise DataError("the chat template renders an assistant turn differently from its generation prompt")
        spans.append((before, after))
    whole = _render(tokenizer, messages[: turns[-1] + 1], add_generation_prompt=False)
    conversations = [spans] if all(whole.startswith(after) for _, after in spans) else [[span] for span in spans]
    for conversation in conversations:
        segments: list[tuple[list[int], bool]] = []
        done = 0
        for before, after in conversation:
            answer = after[len(before) :]
            # The target ends with the end-of-sequence token: text that a template adds after it is never generated.
            upto_eos, eos, _ = answer.rpartition(tokenizer.eos_token)
            learned = upto_eos + eos if eos else answer
            prompt, turn = _ids(tokenizer, [before[done:], learned])
            segments += [(prompt, False), (turn, True)]
            done = len(before) + len(learned)
        yield segments


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


def _join(segments: list[tuple[list[int], bool]], document: int, max_length: int) -> Example:
    ids = [token for part, _ in segments for token in part]
    targets = [target for part, target in segments for _ in part]
    return Example(ids[:max_length], targets[:max_length], document, truncated=len(ids) > max_length)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prompt_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids with the beginning-of-sequence token, without an end-of-sequence token that the tokenizer adds."""
    out = []
    for text, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True):
        appended = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
        out.append(ids[:-1] if appended else ids)
    return out
