"""The rule by which rows are made, plainly: all documents as lists of tokens in memory, each segment tokenised alone.

The oracle of `loray.train.data`, which never has all tokens: for tokenizers that join nothing over a segment's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]
Row = tuple[list[int], list[bool]]  # token ids, and which are targets


class Rows(NamedTuple):
    """Rows to train on, each with its source, and rows to hold out."""

    trained: list[Row]
    sources: list[int]
    held_out: list[Row]


def rows_of(
    sources: Sequence[Sequence[Record]],
    tokenizer: Any,
    *,
    max_length: int,
    fraction: float,
    seed: int,
    joined: bool,
    raw: bool = False,
    evaluation: Sequence[Record] | None = None,
) -> Rows:
    """`evaluation` None: `fraction` of the documents is held out. `raw`: prompts go through no template."""
    num_documents = sum(map(len, sources))
    held_out = set[int]()
    if evaluation is None and fraction:
        order = np.random.default_rng([seed, 1]).permutation(num_documents)
        held_out = set(order[: min(max(1, round(num_documents * fraction)), num_documents - 1)].tolist())
    make = _joined if joined else partial(_apart, raw=raw)
    trained, number_of, out = [], [], []
    first = 0
    kept_out: list[list[Record]] = []
    for number, records in enumerate(sources):
        kept = [record for i, record in enumerate(records, start=first) if i not in held_out]
        kept_out.append([record for i, record in enumerate(records, start=first) if i in held_out])
        first += len(records)
        rows = make(kept, tokenizer, max_length)
        trained += rows
        number_of += [number] * len(rows)
    for records in kept_out if evaluation is None else [list(evaluation)]:
        out += make(records, tokenizer, max_length)
    usable = [i for i, row in enumerate(trained) if any(row[1])]
    return Rows([trained[i] for i in usable], [number_of[i] for i in usable], [row for row in out if any(row[1])])


def _joined(records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Row]:
    if not records:
        return []
    ids = tokenizer(tokenizer.eos_token.join(record["text"] for record in records))["input_ids"]
    rows = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return [_row(row, [True] * len(row)) for row in rows]


def _apart(records: Sequence[Record], tokenizer: Any, max_length: int, *, raw: bool) -> list[Row]:
    rows: list[Row] = []
    for record in records:
        if "messages" in record:
            rows.append(_cut(_chat(record["messages"], tokenizer), max_length))
        elif "prompt" in record and not raw:
            pair = (("user", record["prompt"]), ("assistant", record["completion"]))
            messages = [{"role": role, "content": content} for role, content in pair]
            rows.append(_cut(_chat(messages, tokenizer), max_length))
        elif "prompt" in record:
            completion = [*_ids(tokenizer, record["completion"]), tokenizer.eos_token_id]
            rows.append(_cut([(_prompt(tokenizer, record["prompt"]), False), (completion, True)], max_length))
        else:
            ids = [*_prompt(tokenizer, record["text"]), tokenizer.eos_token_id]
            windows = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
            rows += [_row(window, [True] * len(window)) for window in windows]
    return rows


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[list[int], bool]]:
    segments, done, whole = [], 0, _render(tokenizer, messages, prompt=False)
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        start = len(_render(tokenizer, messages[:i], prompt=True))
        stop = whole.index(tokenizer.eos_token, start + len(messages[i]["content"])) + len(tokenizer.eos_token)
        segments += [(_ids(tokenizer, whole[done:start]), False), (_ids(tokenizer, whole[start:stop]), True)]
        done = stop
    return segments


def _cut(segments: list[tuple[list[int], bool]], max_length: int) -> Row:
    ids = [token for part, _ in segments for token in part]
    return _row(ids[:max_length], [target for part, target in segments for _ in part][:max_length])


def _row(ids: list[int], targets: list[bool]) -> Row:
    return ids, [False, *targets[1:]]


def _render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
