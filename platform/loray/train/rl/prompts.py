"""Prompts of reinforcement learning: rows of the data as a reward reads them, and as the model is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from loray.errors import DataError, SpecError
from loray.recipes.sources import Copy, SourceFiles, find_files
from loray.spec import ColumnNames, DataSource, DataSpec, lacking
from loray.train.data.formats import file_column, messages_of, text_of
from loray.train.data.read import BadRow, RowFile, cut, located, read_head, read_parts, records_of
from loray.train.data.rows import held_out_documents, num_held_out
from loray.train.data.tokenize import check_tokenizer, prompt_ids, token_ids
from loray.train.rl.rewards import Said

Message = dict[str, Any]


class Prompt(NamedTuple):
    """A row as the reward has it, and its prompt's tokens."""

    row: Mapping[str, Any]
    ids: tuple[int, ...]


class Prompts(NamedTuple):
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


class Speech:
    """Turns what is said to a model into tokens, by its chat template; without one, or with `raw`, as it stands."""

    def __init__(self, tokenizer: Any, *, raw: bool = False, system: str | None = None) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer, self._system = tokenizer, system
        self._is_raw = raw or not tokenizer.chat_template

    def prompt(self, said: Said | Sequence[Message]) -> tuple[int, ...]:
        """Tokenise what an answer follows: a text or messages; tokens stay as they are. Raises ValueError."""
        ids = () if isinstance(said, str) else tuple(i for i in said if isinstance(i, int))
        if ids:
            return ids
        if self._is_raw:
            if not isinstance(said, str):
                raise ValueError("messages need a chat template, which the base does not have: give `prompt` as a text")
            return tuple(prompt_ids(self._tokenizer, [said])[0])
        messages: list[Any] = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return tuple(token_ids(self._tokenizer, [self._render(messages, prompt=True)])[0])

    def observation(self, said: Said, *, ended: bool) -> tuple[int, ...]:
        """Tokenise what follows an answer, up to where the next one begins. `ended`: the answer has its end-of-sequence
        token. The tokens before stay as they were sampled.
        """
        if not isinstance(said, str):
            return tuple(int(i) for i in said)
        if self._is_raw:
            return tuple(token_ids(self._tokenizer, [said])[0])
        mark, eos = "\u241eanswer\u241e", self._tokenizer.eos_token
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        whole = self._render([*turns, {"role": "user", "content": said}], prompt=True)
        after = whole.partition(mark)[2]
        if ended and after.startswith(eos):
            after = after[len(eos) :]
        return tuple(token_ids(self._tokenizer, [after])[0])

    def text(self, answer_ids: Sequence[int]) -> str:
        """Read an answer as a reward has it."""
        text: str = self._tokenizer.decode(list(answer_ids), skip_special_tokens=True)
        return text

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return text


def read_prompts(
    spec: DataSpec,
    speech: Speech,
    *,
    max_length: int,
    max_eval_rows: int,
    seed: int,
    needed: Sequence[str] = (),
    fetched: Mapping[str, Copy] = MappingProxyType({}),
) -> Prompts:
    """Read the rows of `spec.train` and `spec.eval`, or hold `eval_fraction` of the first out. `needed`: the fields
    that a reward reads of each. Raises DataError, also where a prompt has more than `max_length` tokens.
    """

    def read(source: DataSource) -> list[Prompt]:
        return _read(find_files(source.path, fetched.get(source.path)), spec, speech, max_length, needed)

    train: list[Prompt] = []
    for source in spec.train_sources:
        if source.weight != 1:
            raise SpecError(f"prompts are drawn one after the other: leave the weight of {source.path} out")
        train += read(source)[: spec.max_rows]
    if spec.eval is not None:
        held_out = [prompt for source in spec.eval_sources for prompt in read(source)]
    elif spec.eval_fraction and len(train) > 1:
        chosen = held_out_documents(len(train), num_held_out(len(train), spec.eval_fraction), seed)
        held_out = [train[i] for i in chosen]
        train = [train[i] for i in np.setdiff1d(np.arange(len(train)), chosen)]
    else:
        held_out = []
    return Prompts(tuple(train), tuple(held_out[:max_eval_rows]))


def _read(
    files: Iterable[SourceFiles], spec: DataSpec, speech: Speech, max_length: int, needed: Sequence[str]
) -> list[Prompt]:
    prompts = []
    for found in files:
        kind, names = read_head(found)
        names = tuple(dict.fromkeys(names))
        column = _column(names, spec.columns)
        if column is None:
            raise DataError(f"{found} has neither `messages` nor `prompt`, but {', '.join(names)}; see data.columns")
        file = RowFile(found, "text", kind, tuple((name, name) for name in names), (column[1],))
        for part, content in read_parts(cut(file).parts):
            try:
                for index, row in records_of(content):
                    if (problem := lacking(needed, row)) is not None:
                        raise BadRow(index, problem)
                    prompts.append(_prompt(row, *column, speech, max_length, index))
            except BadRow as e:
                raise located(e, part) from e
    return prompts


def _column(names: Sequence[str], columns: ColumnNames | None) -> tuple[str, str] | None:
    """Find which of the two the file has, and what it is called there."""
    for name in ("messages", "prompt"):
        if (theirs := file_column(name, names, columns)) in names:
            return name, theirs
    return None


def _prompt(row: Mapping[str, Any], name: str, column: str, speech: Speech, max_length: int, index: int) -> Prompt:
    try:
        given = row[column]
        if name == "prompt" and isinstance(given, str):
            ids = speech.prompt(text_of(given, column))
        else:
            messages = messages_of(given, column)
            while messages and messages[-1]["role"] == "assistant":  # the data's own answer
                messages.pop()
            if not messages:
                raise ValueError("a conversation needs a message that the model answers")
            ids = speech.prompt(messages)
    except Exception as e:  # of the template too, which raises what it likes
        raise BadRow(index, str(e)) from e
    if len(ids) > max_length:
        raise BadRow(index, f"the prompt has {len(ids)} tokens, more than data.max_length ({max_length})")
    return Prompt(row, ids)
