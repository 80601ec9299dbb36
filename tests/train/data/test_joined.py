"""Joined texts, token for token against the rule of LongLoRA's published code, alone, resumed and over workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from loray.errors import DataError
from loray.spec import BatchSpec, DataSpec
from loray.train.data.batches import IGNORED, BatchStream, Cursor, TrainBatch
from loray.train.data.rows import Dataset, load_data
from tests.fixtures.tiny import byte_tokenizer

N = 32
LENGTHS = [3, 0, 70, 31, 1, 32, 200, 5, 64, 17]
TEXTS = ["".join(chr(97 + (7 * i + t) % 26) for t in range(n)) for i, n in enumerate(LENGTHS)]


def tokenizer(*, begins: bool) -> Any:
    """With `begins` as Llama's: a token before every text."""
    fast = byte_tokenizer()
    if begins:
        special = [("<|im_start|>", 257)]
        fast.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=special)
    return fast


def papers_rows(tokenizer: Any, texts: list[str], row_length: int) -> list[list[int]]:
    """LongLoRA's fine-tune.py, which pads the last row to the context, where there is no label."""
    ids = tokenizer(tokenizer.eos_token.join(texts))["input_ids"]
    return [ids[at : at + row_length] for at in range(0, len(ids), row_length)]


def load(folder: Path, texts: list[str], *, begins: bool = False, **fields: Any) -> Dataset:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = DataSpec(train=str(path), **({"eval_fraction": 0} | fields))
    return load_data(spec, tokenizer(begins=begins), max_length=N, max_eval_rows=99, seed=0, joined=True)


def rows_of(rows: Any) -> list[list[int]]:
    return [rows.row(i)[0].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[6:7], TEXTS[::-1], ["a" * 31, "b"]])
def test_rows_are_the_papers(tmp_path: Path, texts: list[str], begins: bool) -> None:
    data = load(tmp_path, texts, begins=begins)
    expected = papers_rows(tokenizer(begins=begins), texts, N)
    assert rows_of(data.train) == [row for row in expected if len(row) > 1]  # a single token predicts nothing
    assert data.train.lengths.tolist() == [len(row) for row in expected if len(row) > 1]
    for i in range(len(data.train.lengths)):
        targets = data.train.row(i)[1]
        assert not targets[0]
        assert targets[1:].all()
    assert data.report.num_documents == len(texts)
    assert data.report.num_targets == sum(len(row) - 1 for row in expected)


def test_texts_are_held_out_before_they_are_joined(tmp_path: Path) -> None:
    data = load(tmp_path, TEXTS, eval_fraction=0.3)
    found = [text for rows in (data.train, data.evaluation) for text in _texts(rows_of(rows))]
    assert sorted(found) == sorted(TEXTS)
    assert data.report.num_eval_rows == len(data.evaluation) > 1


def _texts(rows: list[list[int]]) -> list[str]:
    return str(byte_tokenizer().decode([token for row in rows for token in row])).split("<|im_end|>")


def test_the_end_of_a_single_text_is_held_out(tmp_path: Path) -> None:
    data = load(tmp_path, TEXTS[6:7], eval_fraction=0.3)
    expected = papers_rows(byte_tokenizer(), TEXTS[6:7], N)
    assert rows_of(data.train) + rows_of(data.evaluation) == expected
    assert len(data.evaluation) == 2


def test_only_texts_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    spec = DataSpec(train=str(path), eval_fraction=0)
    options: dict[str, Any] = {"max_length": N, "max_eval_rows": 1, "seed": 0}
    with pytest.raises(
        DataError, match=r"pairs\.jsonl holds rows of format prompt_completion, and .* concat joins texts"
    ):
        load_data(spec, byte_tokenizer(), joined=True, **options)
    assert not load_data(spec, byte_tokenizer(), joined=None, **options).is_joined


# -- as batches -------------------------------------------------------------------------------------------------------


def steps(data: Dataset, *, rank: int = 0, size: int = 1, done: int = 0) -> Iterator[list[TrainBatch]]:
    spec = BatchSpec(rows=2, order="concat")
    cursor = Cursor(0, done)
    stream = BatchStream(data.train, spec, max_length=N, seed=5, per_step=2, cursor=cursor, rank=rank, size=size)
    while True:
        yield stream.next_step()


def tokens_of(batches: list[TrainBatch]) -> list[list[int]]:
    rows = []
    for batch in batches:
        real_BT = torch.ones_like(batch.input_ids_BT) if batch.attention_mask_BT is None else batch.attention_mask_BT
        for ids_T, labels_T, real_T in zip(batch.input_ids_BT, batch.labels_BT, real_BT, strict=True):
            n = int(real_T.sum())
            assert labels_T[: n - 1].tolist() == ids_T[1:n].tolist()  # across the joints, too
            assert (labels_T[n - 1 :] == IGNORED).all()
            rows.append(ids_T[:n].tolist())
        assert batch.position_ids_BT is None  # they run through a row, and it is one document
    return rows


def test_an_epoch_has_every_row_once_in_a_drawn_order(tmp_path: Path) -> None:
    data = load(tmp_path, TEXTS)
    expected = papers_rows(byte_tokenizer(), TEXTS, N)
    num_steps = -(-len(expected) // 4)
    stream = steps(data)
    drawn = [row for _ in range(num_steps) for row in tokens_of(next(stream))]
    first_epoch = drawn[: len(expected)]
    assert sorted(first_epoch) == sorted(expected)
    assert first_epoch != expected


@pytest.mark.parametrize("size", [1, 2])
def test_workers_and_resumed_runs_have_the_same_rows(tmp_path: Path, size: int) -> None:
    data = load(tmp_path, TEXTS)
    whole = steps(data)
    expected = [sorted(tokens_of(next(whole))) for _ in range(6)]

    def together(done: int) -> Iterator[list[list[int]]]:
        ranks = [steps(data, rank=rank, size=size, done=done) for rank in range(size)]
        while True:
            yield sorted(row for rank in ranks for row in tokens_of(next(rank)))

    assert list(islice(together(0), 6)) == expected
    assert list(islice(together(4), 4)) == expected[2:]


def test_a_text_may_be_much_longer_than_a_row(tmp_path: Path) -> None:
    texts = ["y", "x" * 10_000, "z"]
    assert rows_of(load(tmp_path, texts).train) == papers_rows(byte_tokenizer(), texts, N)
