"""Files, globs, folders, saved data sets and mixtures give their rows; what cannot be read is named, with its line."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loray.errors import DataError
from loray.recipes.sources import matches, uploaded_files
from loray.spec import BatchSpec, DataSpec
from loray.train.data import read
from loray.train.data.batches import BatchStream, SourceShare, plan_epoch
from loray.train.data.rows import Dataset
from tests.fixtures.training_data import TOKENIZER, jsonl, listed, load, save_to_disk, whole

TEXTS = [f"text {i}" for i in range(9)]


def texts_of(data: Dataset) -> list[str]:
    return [whole(data.train, i).removesuffix("<|im_end|>") for i in range(len(data.train.lengths))]


# -- files that cannot be read


def test_missing_files_unknown_schemes_and_unknown_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        load(str(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match=r"has no data file: a folder holds \.jsonl"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="cannot open data file"):
        load("nowhere://bucket/data.jsonl")
    with pytest.raises(DataError, match="columns question, answer; loray reads `messages`"):
        load(jsonl(tmp_path, {"question": "a", "answer": "b"}))
    with pytest.raises(DataError, match=r"data\.format chat needs `messages`"):
        load(jsonl(tmp_path, {"text": "a"}), format="chat")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="has no rows"):
        load(str(tmp_path / "empty.parquet"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\n", "is empty"),
        (b'{"text": "a"}\n\n{"text": "b"}\n{"text": "a"\n', r"data\.jsonl, line 4: not valid JSON"),
        (b'{"text": "a"}\n\n[1]\n', r"data\.jsonl, line 3: a row must be an object, not list"),
        (b'{"text": "a"}\n{"text": 3}\n', r"data\.jsonl, line 2: `text` must be a string, not int"),
        (
            b'{"text": "a"}\n{"other": "a"}\n',
            r"data\.jsonl, line 2: the row has no `text` but other: all rows",
        ),
        (b'{"text": "a"}\n{"text": null}\n', r"data\.jsonl, line 2: `text` must be a string, not NoneType"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"data\.jsonl, line 3: not UTF-8: .* write the file as UTF-8"),
        (bytes(range(256)), "neither JSON, Parquet nor named .csv"),
        (b"PAR1 but no more", "not a readable Parquet file"),
        (b'[{"text": "a"}, 3]', "row 2: a row must be an object, not int"),
        (b'[{"text": "a"}, {"text": 3}]', "row 2: `text` must be a string, not int"),
        (b'[{"text": "a"},\n{"text": }]', "row 2: not valid JSON"),
        (b'[{"text": "a"},\n', "row 2: the array does not end"),
        (b"[]", "row 1: the array does not end|has no rows"),
    ],
)
def test_a_bad_line_is_numbered(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_errors_are_numbered_through_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(read, "PART_BYTES", 100)
    records: list[dict[str, Any]] = [{"prompt": "p" * (i % 7), "completion": "c" * (i * 13 % 90)} for i in range(50)]
    path = jsonl(tmp_path, *records[:45], {"prompt": "p", "completion": None}, *records[45:])
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([*records[:45], {"prompt": "p"}]), tmp_path / "x", row_group_size=7)
        path = str(tmp_path / "x")
    if kind == "json":
        path = str(tmp_path / "x")
        Path(path).write_text(json.dumps([*records[:45], {"prompt": "p", "completion": None}, *records[45:]], indent=1))
    assert load(path, max_rows=45).report.num_documents == 45
    with pytest.raises(DataError, match=r"(line|row) 46: `completion` must be a string"):
        load(path)


HEADED = "prompt,completion\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        (HEADED, "has no rows"),
        (HEADED + "a,b\n\nc,d,e\n", r"data\.csv, line 4: the row has 3 fields and the header 2"),
        (HEADED + 'a,b\n"c\nd",e\nf\n', r"data\.csv, line 5: the row has 1 fields"),
        (HEADED + 'a,b\n"c"x,d\n', r"data\.csv, line 3: not valid CSV"),
        (HEADED + "a,b\n\udcff,d\n", r"data\.csv, line 3: not UTF-8"),
    ],
)
def test_a_bad_line_of_a_table_is_numbered(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.csv").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "data.csv"))


CELLS = ["plain", 'with "quotes"', "with, commas; and\ttabs", "with\nline\n\nends", "", "ünïcode", " spaces "]


@pytest.mark.parametrize("dialect", [",", ";", "\t"])
@pytest.mark.parametrize("begins", ["", "\ufeff", "\n"])
@pytest.mark.parametrize("part_bytes", [1, 40, 1 << 20])
def test_tables_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str, begins: str, part_bytes: int
) -> None:
    """CSV as spreadsheets write it: fields that hold the delimiter, quotes or line ends, in parts of any size."""
    monkeypatch.setattr(read, "PART_BYTES", part_bytes)
    rows = [(a, b) for a in CELLS for b in CELLS if a or b]  # where both are empty, nothing is learned
    path = tmp_path / ("data.tsv" if dialect == "\t" else "data.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(begins)
        writer = csv.writer(file, delimiter=dialect, lineterminator="\r\n")
        writer.writerows([("id", "prompt", "completion"), *((i, *row) for i, row in enumerate(rows))])
    expected = [f"{prompt}{completion}<|im_end|>" for prompt, completion in rows]
    data = load(str(path), format="raw")
    assert [whole(data.train, i) for i in range(len(rows))] == expected
    assert load(str(path), format="raw", max_rows=11).report.num_documents == 11


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("part_bytes", [1, 40, 1 << 20])
def test_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, part_bytes: int) -> None:
    monkeypatch.setattr(read, "PART_BYTES", part_bytes)
    texts = [*filter(None, CELLS), "]", '"[{', "\\", "a" * 200, "\u2028", "😀"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": text} for text in texts], indent=indent, ensure_ascii=False), encoding="utf-8")
    assert texts_of(load(str(path))) == texts
    assert load(str(path), max_rows=3).report.num_documents == 3
    path.write_text(json.dumps([{"größe": text} for text in texts], ensure_ascii=False), encoding="utf-8")
    assert texts_of(load(str(path), columns={"text": "größe"})) == texts


def test_strings_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    assert texts_of(load(jsonl(tmp_path, {"text": "2024-01-01"}, {"text": "2024-01-02"})))[1] == "2024-01-02"


# -- sources of several files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.jsonl, b.parquet, sub/c.jsonl with three texts each, and files that are no data."""
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path, *({"text": t} for t in TEXTS[:3]), name="a.jsonl")
    pq.write_table(pa.table({"text": TEXTS[3:6]}), tmp_path / "b.parquet")
    jsonl(tmp_path / "sub", *({"text": t} for t in TEXTS[6:]), name="c.jsonl")
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl", "sub/_part.jsonl"):
        (tmp_path / name).write_text("no data")
    return tmp_path


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("", TEXTS),
        ("sub", TEXTS[6:]),
        ("*.jsonl", TEXTS[:3]),
        ("**/*.jsonl", TEXTS[:3] + TEXTS[6:]),
        ("[ab].*", TEXTS[:6]),
        (["sub/c.jsonl", "a.jsonl"], TEXTS[6:] + TEXTS[:3]),
        ([{"path": "sub"}, "*.parquet"], TEXTS[6:] + TEXTS[3:6]),
    ],
)
def test_files_of_a_source(folder: Path, train: Any, expected: list[str]) -> None:
    def under(source: Any) -> Any:
        return source | {"path": f"{folder}/{source['path']}"} if isinstance(source, dict) else f"{folder}/{source}"

    if "**" in train or "[ab]" in train:
        (folder / "sub" / "_part.jsonl").unlink()  # a glob takes what it names
    data = load([under(s) for s in train] if isinstance(train, list) else under(train))
    assert texts_of(data) == expected
    assert data.report.num_documents == len(expected)
    assert data.shares == ()


def test_errors_name_the_file(folder: Path) -> None:
    jsonl(folder / "sub", {"text": "d"}, {"text": 3}, name="d.jsonl")
    with pytest.raises(DataError, match=r"sub/d\.jsonl, line 2: `text` must be a string"):
        load(str(folder))
    with pytest.raises(DataError, match=r"\*\.txt has no data file"):
        load(f"{folder}/*.txt")


def test_the_fingerprint_is_that_of_all_files(folder: Path) -> None:
    one, all_of_them = load(f"{folder}/a.jsonl"), load(str(folder))
    assert load(f"{folder}/*.jsonl").fingerprint == load([f"{folder}/a.jsonl"]).fingerprint == one.fingerprint
    assert all_of_them.fingerprint != one.fingerprint
    jsonl(folder / "sub", {"text": "other"}, name="c.jsonl")
    assert load(str(folder)).fingerprint != all_of_them.fingerprint


def test_the_first_rows_of_each_source(folder: Path) -> None:
    assert texts_of(load([str(folder), f"{folder}/sub"], max_rows=4)) == TEXTS[:4] + TEXTS[6:]


def test_saved_data_sets(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "plain", TEXTS)
    assert texts_of(load(str(tmp_path / "plain"))) == TEXTS[::2] + TEXTS[1::2]
    save_to_disk(tmp_path / "splits" / "train", TEXTS, shards=1)
    save_to_disk(tmp_path / "splits" / "test", TEXTS[:2], shards=1)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    data = load(str(tmp_path / "splits"), eval=f"{tmp_path}/splits/test")
    assert (texts_of(data), len(data.evaluation)) == (TEXTS, 2)
    uploaded = [path.relative_to(tmp_path).as_posix() for path in uploaded_files(str(tmp_path / "splits"))]
    train = [f"splits/train/{name}" for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")]
    assert uploaded == ["splits/dataset_dict.json", *train]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"save it after flatten_indices\(\)"),
        ({"_data_files": [{"filename": "../../secret"}]}, r"names '\.\./\.\./secret', which is no file of that folder"),
        ({"_data_files": None}, "lists no _data_files"),
        ({"_data_files": [{"filename": "none.arrow"}]}, r"none\.arrow does not exist"),
        ({}, "is not a readable Arrow file"),
    ],
)
def test_data_sets_that_cannot_be_read(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    save_to_disk(tmp_path / "saved", TEXTS, **state)
    if not state:
        for shard in (tmp_path / "saved").glob("*.arrow"):
            shard.write_bytes(b"no arrow")
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.jsonl", "*.jsonl", True),
        ("x/a.jsonl", "*.jsonl", False),
        ("x/y/a.jsonl", "**/*.jsonl", True),
        ("a.jsonl", "**/*.jsonl", True),
        ("x/a.jsonl", "[xy]/a.*", True),
        ("../a.jsonl", "**/*.jsonl", False),
        (".x/a.jsonl", "*/*.jsonl", False),
    ],
)
def test_globs_of_a_bucket(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


# -- mixtures


def test_weights_are_times_an_epoch(folder: Path) -> None:
    train = [{"path": f"{folder}/a.jsonl", "weight": 2}, {"path": f"{folder}/b.parquet", "weight": 0.34}]
    data = load([*train, f"{folder}/sub"])
    assert data.shares == (SourceShare(3, 2.0), SourceShare(3, 0.34), SourceShare(3, 1.0))
    spec = BatchSpec(rows=1)
    seen: Counter[int] = Counter()
    for epoch in range(60):
        plan = list(plan_epoch([8] * 9, spec, max_length=64, seed=0, epoch=epoch, shares=data.shares))
        rows = [document for batch in plan for row in batch for document in row]
        assert Counter(row // 3 for row in rows) == {0: 6, 1: 1, 2: 3}
        assert Counter(rows)[0] == Counter(rows)[2] == 2
        assert plan == list(plan_epoch([8] * 9, spec, max_length=64, seed=0, epoch=epoch, shares=data.shares))
        seen.update(rows)
    assert min(seen[row] for row in (3, 4, 5)) > 10  # another part each epoch
    stream = BatchStream(data.train, spec, max_length=64, seed=0, per_step=1, shares=data.shares)
    assert stream.num_steps(2) == 20


def test_a_source_is_joined_for_itself(folder: Path) -> None:
    weighted = {"path": f"{folder}/a.jsonl", "weight": 3}
    data = load((weighted, f"{folder}/sub"), max_length=16, options={"joined": True})
    streams = [TOKENIZER.eos_token.join(texts) for texts in (TEXTS[:3], TEXTS[6:])]
    expected = [ids[at : at + 16] for ids in TOKENIZER(streams)["input_ids"] for at in range(0, len(ids), 16)]
    assert [row for row, _ in listed(data.train)] == expected
    assert data.shares == (SourceShare(2, 3.0), SourceShare(2, 1.0))


def test_several_sources_are_written_in_a_recipe() -> None:
    spec = DataSpec.parse({"train": ["a", {"path": "b", "weight": 2}], "eval": ["c", "d"]}, source="test")
    assert spec.paths == ("a", "b", "c", "d")
    assert spec.with_paths(str.upper).paths == ("A", "B", "C", "D")
    assert spec.with_paths(str.upper).train_sources[1].weight == 2
    assert DataSpec(train="a").with_paths(str.upper) == DataSpec(train="A")
