"""Rows: target spans, lengths, splits, texts that are joined as LongLoRA's published code does, preference pairs."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from tokenizers.processors import TemplateProcessing

from loray.errors import DataError, StoreError
from loray.spec import OBJECTIVES, ObjectiveType
from loray.train.data.batches import IGNORED, collate_pairs, plan_epoch
from loray.train.data.rows import Cut, Dataset, StreamRows
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import recipe
from tests.fixtures.training_data import TOKENIZER, jsonl, learned, listed, load, whole


def test_truncation_is_counted_and_rows_without_targets_are_dropped(tmp_path: Path) -> None:
    rows = [("p", "c" * 20), ("p" * 20, "c"), ("p", "c")]
    path = jsonl(tmp_path, *({"prompt": prompt, "completion": completion, "id": 7} for prompt, completion in rows))
    data = load(path, max_length=10, format="raw")
    assert data.report.cut == Cut(2 / 3, (12 + 12) / (22 + 22 + 3), 22)
    assert (data.report.num_truncated, data.report.num_without_targets) == (1, 1)
    assert data.report.num_rows == len(data.train) == 2
    assert data.train.lengths.max() == 10
    assert data.report.num_targets == 9 + 2
    assert (whole(data.train, 1), learned(data.train, 1)) == ("pc<|im_end|>", "c<|im_end|>")
    with pytest.raises(DataError, match=r"raise data\.max_length"):
        load(jsonl(tmp_path, {"prompt": "p" * 20, "completion": "c"}), max_length=10, format="raw")


def test_the_fingerprint_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "abc"})
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert load(path).fingerprint == load(f"file://{path}").fingerprint == digest
    assert load(path, eval=path).fingerprint == hashlib.sha256(f"{digest}\n{digest}\n".encode()).hexdigest()


def test_a_single_text_holds_out_its_end(tmp_path: Path) -> None:
    text = "".join(chr(33 + i // 10) for i in range(399))
    data = load(jsonl(tmp_path, {"text": text}), eval_fraction=0.25, max_length=100)
    assert len(data.train) == 3
    assert whole(data.evaluation, 0) == text[300:] + "<|im_end|>"
    with pytest.raises(DataError, match=r"give data\.eval"):
        load(jsonl(tmp_path, {"prompt": "a", "completion": "b"}), eval_fraction=0.1)


def test_evaluation_rows_are_drawn_up_to_the_limit_and_whole_windows_preferred(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": chr(97 + i) * 80} for i in range(20)))
    assert len(load(path, eval=path, max_eval_rows=7).evaluation) == 7
    data = load(path, eval=path, max_length=32, options={"whole_windows": True})
    assert set(data.evaluation.lengths.tolist()) == {32}


# -- joined texts


N = 32
LENGTHS = [3, 0, 70, 31, 1, 32, 200, 5, 64, 17]
TEXTS = ["".join(chr(97 + (7 * i + t) % 26) for t in range(n)) for i, n in enumerate(LENGTHS)]


def papers_rows(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """LongLoRA's fine-tune.py, which pads the last row to the context, where there is no label."""
    ids = tokenizer(tokenizer.eos_token.join(texts))["input_ids"]
    return [ids[at : at + N] for at in range(0, len(ids), N)]


def load_joined(folder: Path, texts: list[str], tokenizer: Any = TOKENIZER, **fields: Any) -> Dataset:
    path = jsonl(folder, *({"text": text} for text in texts))
    return load(path, tokenizer, max_length=N, options={"joined": True}, **fields)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[6:7], TEXTS[::-1], ["a" * 31, "b"], ["y", "x" * 10_000]])
def test_joined_rows_are_the_papers(tmp_path: Path, texts: list[str], begins: bool) -> None:
    """`begins`: with a token before every text, as Llama's."""
    tokenizer = byte_tokenizer()
    if begins:
        special = [("<|im_start|>", 257)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=special
        )
    data = load_joined(tmp_path, texts, tokenizer)
    expected = papers_rows(tokenizer, texts)
    # A single token predicts nothing.
    assert listed(data.train) == [(row, [False, *[True] * (len(row) - 1)]) for row in expected if len(row) > 1]
    assert data.report.num_documents == len(texts)
    assert data.report.num_targets == sum(len(row) - 1 for row in expected)


def test_the_end_of_a_single_joined_text_is_held_out(tmp_path: Path) -> None:
    data = load_joined(tmp_path, TEXTS[6:7], eval_fraction=0.3)
    assert [row for row, _ in listed(data.train) + listed(data.evaluation)] == papers_rows(TOKENIZER, TEXTS[6:7])
    assert len(data.evaluation) == 2


def test_only_texts_are_joined(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"holds rows of format prompt_completion, and .* concat joins texts"):
        load(path, options={"joined": True})
    assert not load(path, options={"joined": None}).is_joined


# -- preference pairs


TEXT = {"prompt": "2+2=", "chosen": " 4", "rejected": " five", "score": 1}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CHAT = {"prompt": TURNS, "chosen": answer("yes"), "rejected": answer("no"), "messages": TURNS[:2]}


def load_pairs(train: Any, *, objective: ObjectiveType = "dpo", **fields: Any) -> Dataset:
    return load(train, options={"formats": OBJECTIVES[objective].formats, "max_eval_rows": 4}, **fields)


def load_raw(train: Any, **fields: Any) -> Dataset:
    return load_pairs(train, format="raw", **fields)


def test_texts_are_two_rows_of_which_the_answers_are_learned(tmp_path: Path) -> None:
    data = load_raw(jsonl(tmp_path, TEXT))
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
    data = load_pairs(source, **fields)
    assert [learned(data.train, i) for i in (0, 1)] == ["yes<|im_end|>", "no<|im_end|>"]
    assert whole(data.train, 0).count("<|im_start|>assistant\n") == 2
    assert data.report.format == "preference"


def test_texts_and_messages_may_follow_each_other(tmp_path: Path) -> None:
    data = load_pairs(jsonl(tmp_path, CHAT, TEXT, CHAT))
    answers = [learned(data.train, i).removesuffix("<|im_end|>") for i in range(6)]
    assert answers == ["yes", "no", " 4", " five", "yes", "no"]


def test_pairs_are_cut_at_their_end_and_dropped_where_nothing_is_left(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abc", "chosen": "defgh", "rejected": "x"},
        {"prompt": "abcdefg", "chosen": "h", "rejected": "i"},  # no room for an answer
        {"prompt": "abc", "chosen": "wxyz1", "rejected": "wxyz2"},  # equal as far as they go
        {"prompt": "a", "chosen": "same", "rejected": "same"},
    ]
    data = load_raw(jsonl(tmp_path, *rows), max_length=7)
    assert [whole(data.train, i) for i in range(len(data.train.lengths))] == ["abcdefg", "abcx<|im_end|>"]
    report = data.report
    assert (report.num_rows, report.num_truncated, report.num_without_targets) == (1, 1, 3)
    with pytest.raises(DataError, match=r"no row .* within 7 tokens"):
        load_raw(jsonl(tmp_path, rows[1]), max_length=7)


def test_pairs_stay_together_in_splits_and_batches(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02}", "chosen": "+" * (1 + i % 4), "rejected": "-" * (1 + i % 3)} for i in range(20)]
    data = load_raw([{"path": jsonl(tmp_path, *rows), "weight": 2.0}], eval_fraction=0.3)
    held_out = [whole(data.evaluation, i) for i in range(len(data.evaluation.lengths))]
    assert (len(held_out), data.report.num_eval_rows, data.report.num_rows) == (8, 4, 14)
    assert all(a[:2] == b[:2] and "+" in a and "-" in b for a, b in zip(held_out[::2], held_out[1::2], strict=True))
    assert [share.num_rows for share in data.shares] == [14]
    batch = recipe(batch={"tokens": 2 * 3 * 7, "order": "length_grouped"}).batch
    plan = plan_epoch(data.lengths, batch, max_length=512, seed=0, epoch=0, shares=data.shares)
    assert np.bincount([pair for micro_batch in plan for (pair,) in micro_batch]).tolist() == [2] * 14
    made = collate_pairs(data.train, plan[0])
    assert (made.num_pairs, len(made.input_ids_BT)) == (len(plan[0]), 2 * len(plan[0]))
    assert made.input_ids_BT.numel() <= 42
    answers = made.labels_BT.masked_fill(made.labels_BT == 258, IGNORED)  # 258 ends each
    for labels, sign in ((answers[: made.num_pairs], "+"), (answers[made.num_pairs :], "-")):
        assert {x for x in labels.flatten().tolist() if x > 0} == set(
            TOKENIZER(sign, add_special_tokens=False)["input_ids"]
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TEXT | {"chosen": None}, "`chosen` must be a string or a list of messages, not NoneType"),
        (TEXT | {"rejected": 3}, "`rejected` must be a string or a list of messages, not int"),
        (TEXT | {"prompt": None}, "`prompt` is missing: give it, or put its messages before both answers"),
        (CHAT | {"prompt": []}, "`prompt` must be a list of at least one message"),
        (CHAT | {"prompt": TURNS[:2]}, "`prompt` must end before the answer"),
        (CHAT | {"rejected": [*TURNS[1:], *answer("no")]}, "`rejected` must be one assistant message: put the"),
        (CHAT | {"rejected": [{"role": "assistant"}]}, "a message's `content` must be a string"),
    ],
)
def test_wrong_pairs_are_numbered(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    first = CHAT if isinstance(row["prompt"], list) else TEXT
    with pytest.raises(DataError) as error:
        load_pairs(jsonl(tmp_path, first, row))
    assert f" 2: {message}" in str(error.value)


def test_pairs_and_objectives_belong_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"columns prompt, completion; loray reads `chosen` and `rejected` .* sft"):
        load_pairs(jsonl(tmp_path, {"prompt": "a", "completion": "b"}))
    with pytest.raises(DataError, match=r"columns prompt, .*; these are for objective\.type dpo or orpo or simpo"):
        load_pairs(jsonl(tmp_path, TEXT), objective="sft")
    chats = load_pairs(jsonl(tmp_path, CHAT | {"messages": TURNS[:2]}), objective="sft")
    assert chats.report.format == "chat"


# -- answers that are no pairs


ANSWERS = [{"prompt": f"{i}:", "completion": "abcdefg"[: 2 + i], "label": i != 1} for i in range(4)]


def test_an_answer_has_the_one_before_it_beside_it(tmp_path: Path) -> None:
    data = load_raw(jsonl(tmp_path, *ANSWERS), objective="kto")
    end = "<|im_end|>"
    rows = [whole(data.train, i) for i in range(8)]
    assert rows[::2] == [f"0:ab{end}", f"1:abc{end}", f"2:abcd{end}", f"3:abcde{end}"]
    assert rows[1::2] == [f"0:abcde{end}", f"1:ab{end}", f"2:abc{end}", f"3:abcd{end}"]
    assert [learned(data.train, i) for i in (0, 1)] == [f"ab{end}", f"abcde{end}"]
    assert data.train.lengths.tolist() == [5, 8, 6, 5, 7, 6, 8, 7]
    assert (data.is_paired, data.lengths.tolist()) == (True, [16, 12, 14, 16])
    report = data.report
    assert (report.format, report.num_rows, report.num_tokens) == ("unpaired_preference", 4, 26)
    assert data.length_counts == {5: 1, 6: 1, 7: 1, 8: 1}
    batch = collate_pairs(data.train, ((1,), (3,)))
    assert (batch.num_pairs, batch.desirable_P.tolist()) == (2, [False, True])


def test_answers_are_cut_at_one_length_and_measured_among_themselves(tmp_path: Path) -> None:
    without_room = {"prompt": "x" * 9, "completion": "y", "label": True}
    data = load_raw(jsonl(tmp_path, *ANSWERS, without_room), max_length=6, objective="kto")
    assert (data.report.num_rows, data.report.num_without_targets, data.report.num_truncated) == (4, 1, 2)
    assert data.train.lengths.tolist() == [5, 6, 6, 5, 6, 6, 6, 6]
    assert whole(data.train, 1) == "0:abcd"
    assert max(data.train.lengths) == 6
    held_out = load_raw(jsonl(tmp_path, *ANSWERS, *ANSWERS), eval_fraction=0.25, objective="kto")
    assert (len(held_out.evaluation), held_out.evaluation.desirable.shape) == (4, (2,))
    assert [len(held_out.evaluation.row(i)[0]) for i in range(4)] == held_out.evaluation.lengths.tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, "`label` must be true, where the answer is desirable, or false, not 1"),
        ({"label": None}, "`label` must be true"),
        ({"completion": None}, "`completion` must be a string"),
        ({"completion": [*TURNS[1:], *answer("b")]}, "`completion` must be one assistant message: put the"),
    ],
)
def test_wrong_answers_are_numbered(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_pairs(jsonl(tmp_path, ANSWERS[0], ANSWERS[1] | row), objective="kto")
    assert f" 2: {message}" in str(error.value)


def test_labels_of_csv_are_words_and_answers_go_through_the_template(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("prompt,completion,label\na,b,true\nc,d,False\n")
    data = load_pairs(str(path), objective="kto")
    assert data.train.desirable.tolist() == [True, False]
    assert whole(data.train, 1) == whole(data.train, 0).replace("b<|im_end|>", "d<|im_end|>")
    assert learned(data.train, 0) == "b<|im_end|>"


class Lengths:
    """Rows without tokens."""

    desirable = None

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        raise NotImplementedError

    def let_go(self) -> None:
        """There are no files."""


def test_lengths_are_counted_where_they_are(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path, *({"text": "t" * (i % 7)} for i in range(50))))
    assert data.length_counts == Counter(data.train.lengths.tolist())
    many = replace(data, train=Lengths(np.random.default_rng(0).integers(2, 60, 200_000)))
    tracemalloc.start()
    try:
        counts = many.length_counts
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(counts.values()) == 200_000
    assert peak < 50_000


def test_rows_are_mapped_from_files_by_every_process(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path, *({"text": "t" * (1 + i % 7)} for i in range(500))))
    assert isinstance(data.train, StreamRows)
    pickled = pickle.dumps(data.train)
    assert len(pickled) < 1500
    again = pickle.loads(pickled)
    assert all(isinstance(column, np.memmap) for column in (again.starts, again.lengths))
    assert [whole(again, i) for i in range(9)] == [whole(data.train, i) for i in range(9)]
    again.let_go()
    assert whole(again, 3) == whole(data.train, 3)
    assert pickle.loads(pickle.dumps(again.select(np.arange(2)))).lengths.tolist() == data.train.lengths[:2].tolist()
    for column in again.columns:
        again.tokens.cache.path(column, ".npy").unlink()
    with pytest.raises(StoreError, match="was removed while a run reads it"):
        pickle.loads(pickled)
