"""Preference pairs: both formats from every kind of file, targets, truncation, splits, and rows that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loray.errors import DataError
from loray.spec import DataSpec
from loray.train.data.batches import IGNORED, collate_pairs, plan_epoch
from loray.train.data.rows import Dataset, load_data
from tests.fixtures.tiny import byte_tokenizer
from tests.train.data.test_data import jsonl, learned, whole
from tests.train.test_loop import recipe

TEXT = {"prompt": "2+2=", "chosen": " 4", "rejected": " five", "score": 1}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CHAT = {"prompt": TURNS, "chosen": answer("yes"), "rejected": answer("no"), "messages": TURNS[:2]}


def load(train: Any, *, max_length: int = 512, seed: int = 0, paired: bool = True, **fields: Any) -> Dataset:
    spec = DataSpec(train=train, **({"eval_fraction": 0} | fields))
    options: dict[str, Any] = {"max_length": max_length, "max_eval_rows": 4, "seed": seed, "paired": paired}
    return load_data(spec, byte_tokenizer(), **options)


def test_texts_are_two_rows_of_which_the_answers_are_learned(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path, TEXT))
    assert [whole(data.train, i) for i in (0, 1)] == ["2+2= 4<|im_end|>", "2+2= five<|im_end|>"]
    assert [learned(data.train, i) for i in (0, 1)] == [" 4<|im_end|>", " five<|im_end|>"]
    report = data.report
    assert (report.format, report.num_rows, report.num_documents, report.num_targets) == ("preference", 1, 1, 9)
    assert (data.is_paired, data.lengths.tolist()) == (True, [2 * 10])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "preference"])
def test_only_the_last_turn_of_a_chat_is_learned(tmp_path: Path, kind: str) -> None:
    source, fields = jsonl(tmp_path, CHAT), {}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([CHAT]), source)
    elif kind == "preference":
        fields = {"format": kind}
    data = load(source, **fields)
    assert [learned(data.train, i) for i in (0, 1)] == ["yes<|im_end|>", "no<|im_end|>"]
    assert whole(data.train, 0).count("<|im_start|>assistant\n") == 2
    assert data.report.format == "preference"


def test_texts_and_messages_may_follow_each_other(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path, CHAT, TEXT, CHAT))
    answers = [learned(data.train, i).removesuffix("<|im_end|>") for i in range(6)]
    assert answers == ["yes", "no", " 4", " five", "yes", "no"]


def test_pairs_are_cut_at_their_end_and_dropped_where_nothing_is_left(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abc", "chosen": "defgh", "rejected": "x"},
        {"prompt": "abcdefg", "chosen": "h", "rejected": "i"},  # no room for an answer
        {"prompt": "abc", "chosen": "wxyz1", "rejected": "wxyz2"},  # equal as far as they go
        {"prompt": "a", "chosen": "same", "rejected": "same"},
    ]
    data = load(jsonl(tmp_path, *rows), max_length=7)
    assert [whole(data.train, i) for i in range(len(data.train.lengths))] == ["abcdefg", "abcx<|im_end|>"]
    report = data.report
    assert (report.num_rows, report.num_truncated, report.num_without_targets) == (1, 1, 3)
    with pytest.raises(DataError, match=r"no row .* within 7 tokens"):
        load(jsonl(tmp_path, rows[1]), max_length=7)


def test_pairs_stay_together_in_splits_and_batches(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02}", "chosen": "+" * (1 + i % 4), "rejected": "-" * (1 + i % 3)} for i in range(20)]
    source = [{"path": jsonl(tmp_path, *rows), "weight": 2.0}]
    data = load(source, eval_fraction=0.3)
    held_out = [whole(data.evaluation, i) for i in range(len(data.evaluation.lengths))]
    assert (len(held_out), data.report.num_eval_rows, data.report.num_rows) == (8, 4, 14)
    assert all(a[:2] == b[:2] and "+" in a and "-" in b for a, b in zip(held_out[::2], held_out[1::2], strict=True))
    assert [share.num_rows for share in data.shares] == [14]
    batch = recipe(batch={"tokens": 2 * 3 * 7, "order": "length_grouped"}).batch
    plan = plan_epoch(data.lengths, batch, max_length=512, seed=0, epoch=0, shares=data.shares)
    drawn = [pair for micro_batch in plan for (pair,) in micro_batch]
    assert np.bincount(drawn).tolist() == [2] * 14
    made = collate_pairs(data.train, plan[0])
    assert (made.num_pairs, len(made.input_ids_BT)) == (len(plan[0]), 2 * len(plan[0]))
    assert made.input_ids_BT.numel() <= 42
    answers = made.labels_BT.masked_fill(made.labels_BT == 258, IGNORED)  # 258 ends each
    assert {chr(x) for x in answers[: made.num_pairs].flatten().tolist() if x > 0} == {byte("+")}
    assert {chr(x) for x in answers[made.num_pairs :].flatten().tolist() if x > 0} == {byte("-")}


def byte(text: str) -> str:
    (token,) = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return chr(token)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TEXT | {"chosen": None}, "`chosen` must be a string, or all three lists of messages, not NoneType"),
        (TEXT | {"rejected": answer("a")}, "`rejected` must be a string, or all three lists of messages, not list"),
        (CHAT | {"chosen": "yes"}, "`prompt` must be a string, or all three lists of messages, not list"),
        (CHAT | {"prompt": []}, "`prompt` must be a list of at least one message"),
        (CHAT | {"prompt": TURNS[:2]}, "`prompt` must end before the answer"),
        (CHAT | {"rejected": [*TURNS, *answer("no")]}, "`rejected` must be one assistant message: put the"),
        (CHAT | {"rejected": [{"role": "assistant"}]}, "a message's `content` must be a string"),
    ],
)
def test_wrong_rows_are_numbered(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    first = TEXT if isinstance(row["prompt"], str) else CHAT
    with pytest.raises(DataError) as error:
        load(jsonl(tmp_path, first, row))
    assert f" 2: {message}" in str(error.value)


def test_pairs_and_objectives_belong_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="columns prompt, completion; DPO reads `prompt`, `chosen` and `rejected`"):
        load(jsonl(tmp_path, {"prompt": "a", "completion": "b"}))
    with pytest.raises(DataError, match=r"columns prompt, .*; pairs are for objective: \{type: dpo\}"):
        load(jsonl(tmp_path, TEXT), paired=False)
    assert load(jsonl(tmp_path, CHAT | {"messages": TURNS[:2]}), paired=False).report.format == "chat"
