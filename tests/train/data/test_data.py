"""Reading, tokenising and splitting: formats, exact target spans, truncation, errors that name the line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loray.errors import DataError
from loray.spec import DataSpec
from loray.train.data import read
from loray.train.data.batches import RowSource, pack_rows
from loray.train.data.rows import Dataset, load_data
from tests.fixtures.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def jsonl(folder: Path, *records: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def load(train: str, *, max_length: int = 512, seed: int = 0, max_eval_rows: int = 100, **fields: Any) -> Dataset:
    spec = DataSpec(train=train, **({"eval_fraction": 0} | fields))
    return load_data(spec, TOKENIZER, max_length=max_length, max_eval_rows=max_eval_rows, seed=seed)


def learned(rows: RowSource, i: int) -> str:
    ids, targets = rows.row(i)
    return str(TOKENIZER.decode(ids[targets].tolist()))


def whole(rows: RowSource, i: int) -> str:
    return str(TOKENIZER.decode(rows.row(i)[0].tolist()))


# -- formats ----------------------------------------------------------------------------------------------------------


def test_prompt_completion_learns_the_completion_and_the_end(tmp_path: Path) -> None:
    rows = load(jsonl(tmp_path, {"prompt": "2+2=", "completion": " 4", "id": 7})).train
    assert whole(rows, 0) == "2+2= 4<|im_end|>"
    assert learned(rows, 0) == " 4<|im_end|>"


def test_text_learns_everything_but_its_first_token(tmp_path: Path) -> None:
    rows = load(jsonl(tmp_path, {"text": "abc"})).train
    assert learned(rows, 0) == "bc<|im_end|>"


def test_chat_learns_each_assistant_turn_up_to_its_end(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "eins"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "zwei"},
        {"role": "user", "content": "never answered"},
    ]
    rows = load(jsonl(tmp_path, {"messages": messages})).train
    assert learned(rows, 0) == "eins<|im_end|>zwei<|im_end|>"
    expected = TOKENIZER.apply_chat_template(messages[:5], tokenize=False).removesuffix("\n")
    assert whole(rows, 0) == expected


def test_a_template_that_rewrites_earlier_turns_gives_one_row_per_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (  # as Qwen3's: reasoning only in the last turn
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = jsonl(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]})
    spec = DataSpec(train=path, eval_fraction=0)
    rows = load_data(spec, tokenizer, max_length=512, max_eval_rows=1, seed=0).train
    assert [learned(rows, i) for i in range(len(rows))] == ["<think></think>b<|im_end|>", "<think></think>d<|im_end|>"]
    assert "b<|im_end|>" in whole(rows, 1)
    assert "<think></think>b" not in whole(rows, 1)


def test_a_template_that_contradicts_its_generation_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}>>{% endif %}"
    path = jsonl(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(DataError, match=r"line 1.*differently from its generation prompt"):
        load_data(DataSpec(train=path, eval_fraction=0), tokenizer, max_length=64, max_eval_rows=1, seed=0)


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"ä{i}"}]}
        for i in range(5)
    ]
    pq.write_table(pa.Table.from_pylist([r | {"extra": 1} for r in records]), tmp_path / "data.parquet")
    a, b = load(jsonl(tmp_path, *records)), load(str(tmp_path / "data.parquet"))
    assert whole(a.train, 4) == whole(b.train, 4)
    assert learned(a.train, 4) == learned(b.train, 4) == "ä4<|im_end|>"
    assert a.report == b.report
    assert a.fingerprint != b.fingerprint


def test_uris_are_read_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "abc"})
    assert whole(load(f"file://{path}").train, 0) == whole(load(path).train, 0)


def test_strings_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "2024-01-01"}, {"text": "2024-01-02"})
    assert whole(load(path).train, 1) == "2024-01-02<|im_end|>"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_errors_are_numbered_through_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(read, "PART_BYTES", 100)
    records = [{"prompt": "p" * (i % 7), "completion": "c" * (i * 13 % 90)} for i in range(50)]
    path = jsonl(tmp_path, *records[:45], {"prompt": "p", "completion": None}, *records[45:])
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([*records[:45], {"prompt": "p"}]), tmp_path / "x", row_group_size=7)
        path = str(tmp_path / "x")
    assert load(path, max_rows=45).report.num_documents == 45
    with pytest.raises(DataError, match=r"(line|row) 46: `completion` must be a string"):
        load(path)


def test_rows_are_views_until_they_are_packed() -> None:
    rows = pack_rows([([i] * (i + 1), [True] * (i + 1)) for i in range(5)])
    some = rows.select(np.array([3, 1]))
    assert some.ids_N is rows.ids_N
    assert some.lengths.tolist() == [4, 2]
    packed = pack_rows([some.row(i) for i in range(len(some))])
    assert packed.ids_N.tolist() == [3, 3, 3, 3, 1, 1]
    assert packed.targets_N.tolist() == [False, True, True, True, False, True]


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_long_texts_become_windows_that_lose_nothing(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(250))
    rows = load(jsonl(tmp_path, {"text": text}), max_length=100).train
    assert rows.lengths.tolist() == [100, 100, 51]
    assert "".join(whole(rows, i) for i in range(3)) == text + "<|im_end|>"


def test_truncation_is_counted_and_rows_without_targets_are_dropped(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"prompt": "p", "completion": "c" * 20},
        {"prompt": "p" * 20, "completion": "c"},
        {"prompt": "p", "completion": "c"},
    )
    data = load(path, max_length=10)
    assert data.report.num_truncated == 1
    assert data.report.num_without_targets == 1
    assert data.report.num_rows == len(data.train) == 2
    assert data.train.lengths.max() == 10
    assert data.report.num_targets == 9 + 2


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raise data\.max_length"):
        load(jsonl(tmp_path, {"prompt": "p" * 20, "completion": "c"}), max_length=10)


# -- splits and fingerprints ------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "abc"})
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert load(path).fingerprint == digest
    assert load(path, eval=path).fingerprint == hashlib.sha256(f"{digest}\n{digest}\n".encode()).hexdigest()


def test_the_split_follows_the_seed_and_documents_stay_whole(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": chr(97 + i) * 95} for i in range(20)))
    data = load(path, eval_fraction=0.2, max_length=32)
    held_out = {whole(data.evaluation, i)[0] for i in range(len(data.evaluation))}
    trained = {whole(data.train, i)[0] for i in range(len(data.train))}
    assert len(held_out) == 4
    assert not held_out & trained
    assert len(data.train) + len(data.evaluation) == 20 * 3
    again, other = load(path, eval_fraction=0.2, max_length=32), load(path, eval_fraction=0.2, max_length=32, seed=1)
    np.testing.assert_array_equal(again.evaluation.ids_N, data.evaluation.ids_N)
    assert not np.array_equal(other.evaluation.ids_N, data.evaluation.ids_N)


def test_a_single_text_holds_out_its_end(tmp_path: Path) -> None:
    text = "".join(chr(33 + i // 10) for i in range(399))
    data = load(jsonl(tmp_path, {"text": text}), eval_fraction=0.25, max_length=100)
    assert len(data.train) == 3
    assert whole(data.evaluation, 0) == text[300:] + "<|im_end|>"


def test_a_single_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give data\.eval"):
        load(jsonl(tmp_path, {"prompt": "a", "completion": "b"}), eval_fraction=0.1)


def test_evaluation_rows_are_drawn_up_to_the_limit_and_whole_windows_preferred(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": chr(97 + i) * 80} for i in range(20)))
    assert len(load(path, eval=path, max_eval_rows=7).evaluation) == 7
    spec = DataSpec(train=path, eval=path)
    data = load_data(spec, TOKENIZER, max_length=32, max_eval_rows=100, seed=0, whole_windows=True)
    assert set(data.evaluation.lengths.tolist()) == {32}


def test_max_rows(tmp_path: Path) -> None:
    assert load(jsonl(tmp_path, *({"text": "abc"} for _ in range(9))), max_rows=4).report.num_documents == 4
