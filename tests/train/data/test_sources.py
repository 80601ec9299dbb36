"""Several files, globs, folders, saved data sets and mixtures give the rows that their files give one by one."""

from __future__ import annotations

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
from loray.train.data.batches import BatchStream, SourceShare, plan_epoch
from loray.train.data.rows import Dataset, load_data
from tests.fixtures.tiny import byte_tokenizer
from tests.train.data.test_data import jsonl

TOKENIZER = byte_tokenizer()
TEXTS = [f"text {i}" for i in range(9)]


def load(train: Any, **fields: Any) -> Dataset:
    spec = DataSpec(train=train, **({"eval_fraction": 0} | fields))
    return load_data(spec, TOKENIZER, max_length=64, max_eval_rows=99, seed=0)


def texts_of(data: Dataset) -> list[str]:
    rows = data.train
    return [str(TOKENIZER.decode(rows.row(i)[0].tolist(), skip_special_tokens=True)) for i in range(len(rows.lengths))]


def save_to_disk(folder: Path, texts: list[str], *, shards: int = 2, **state: Any) -> None:
    """As Hugging Face's `datasets` does: shards that are Arrow streams, and what describes them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pa.table({"text": texts[i::shards], "meta": [1] * len(texts[i::shards])})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    described = {"_data_files": [{"filename": name} for name in names], "_split": None} | state
    (folder / "state.json").write_text(json.dumps(described))
    (folder / "dataset_info.json").write_text("{}")


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
    with pytest.raises(DataError, match=r"\*\.csv has no data file"):
        load(f"{folder}/*.csv")


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
    ],
)
def test_data_sets_that_cannot_be_read(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    save_to_disk(tmp_path / "saved", TEXTS, **state)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "saved"))


def test_a_damaged_shard(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", TEXTS, shards=1)
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    shard.write_bytes(b"no arrow")
    with pytest.raises(DataError, match="is not a readable Arrow file"):
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


# -- mixtures ---------------------------------------------------------------------------------------------------------


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
    spec = DataSpec(train=(weighted, f"{folder}/sub"), eval_fraction=0)  # type: ignore[arg-type]
    data = load_data(spec, TOKENIZER, max_length=16, max_eval_rows=1, seed=0, joined=True)
    streams = [TOKENIZER.eos_token.join(texts) for texts in (TEXTS[:3], TEXTS[6:])]
    expected = [ids[at : at + 16] for ids in TOKENIZER(streams)["input_ids"] for at in range(0, len(ids), 16)]
    assert [data.train.row(i)[0].tolist() for i in range(len(data.train.lengths))] == expected
    assert data.shares == (SourceShare(2, 3.0), SourceShare(2, 1.0))


def test_several_sources_are_written_in_a_recipe() -> None:
    spec = DataSpec.parse({"train": ["a", {"path": "b", "weight": 2}], "eval": ["c", "d"]}, source="test")
    assert spec.paths == ("a", "b", "c", "d")
    assert spec.with_paths(str.upper).paths == ("A", "B", "C", "D")
    assert spec.with_paths(str.upper).train_sources[1].weight == 2
    assert DataSpec(train="a").with_paths(str.upper) == DataSpec(train="A")
