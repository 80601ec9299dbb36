"""Tokens in shards: the rows of the plain rule, whatever the parts; nothing is made twice; a killed run's count."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from loray.errors import DataError
from loray.spec import BatchSpec, DataSpec
from loray.train.data import read
from loray.train.data.batches import BatchStream, pack_rows
from loray.train.data.rows import Dataset, load_data
from loray.train.data.shards import FolderCache, ShardIndex
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import Counted, listed, write
from tests.train.data import in_memory

PLAIN, BEGINNING = byte_tokenizer(), byte_tokenizer()  # the other one has a token before every text
BEGINNING.backend_tokenizer.post_processor = TemplateProcessing(
    single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
)
texts = st.text(st.characters(codec="utf-8"), max_size=40)


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    turns = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    return {
        "messages": [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
    }


RECORDS = {
    "text": st.builds(lambda text: {"text": text}, texts),
    "prompt_completion": st.builds(lambda a, b: {"prompt": a, "completion": b}, texts, texts),
    "chat": chats(),
}


@pytest.mark.parametrize("form", ["text", "joined", "prompt_completion", "raw", "chat"])
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_are_those_of_the_plain_rule(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, form: str, data: st.DataObject
) -> None:
    """For sources of every kind of file, parts of any size, weights, and rows held out or given."""
    folder = tmp_path_factory.mktemp("data")
    records = RECORDS[{"joined": "text", "raw": "prompt_completion"}.get(form, form)]
    kinds = st.sampled_from(["jsonl", "parquet", "arrow"])
    sources = data.draw(st.lists(st.lists(records, min_size=1, max_size=9), min_size=1, max_size=3))
    paths = [write(folder / f"{i}.{data.draw(kinds)}", found) for i, found in enumerate(sources)]
    held_out = data.draw(st.none() | st.lists(records, min_size=1, max_size=4))
    single = sum(map(len, sources)) == 1
    plain: dict[str, Any] = {
        "max_length": data.draw(st.integers(8, 60)) + 30 * (form == "prompt_completion"),  # the template's
        "fraction": 0.0 if single else data.draw(st.sampled_from([0.0, 0.3])),
        "seed": data.draw(st.integers(0, 3)),
    }
    tokenizer = BEGINNING if data.draw(st.booleans()) else PLAIN
    order = "concat" if form == "joined" else data.draw(st.sampled_from(["shuffled", "packed"]))
    monkeypatch.setattr(read, "PART_BYTES", data.draw(st.sampled_from([1, 100, 400, 8 << 20])))
    expected = in_memory.rows_of(
        sources, tokenizer, joined=form == "joined", raw=form == "raw", evaluation=held_out, **plain
    )
    spec = DataSpec(
        train=tuple({"path": path, "weight": 2.0} for path in paths),  # type: ignore[arg-type]
        eval=None if held_out is None else write(folder / "eval.jsonl", held_out),
        eval_fraction=plain["fraction"],
        format="raw" if form == "raw" else "auto",
    )

    def load() -> Dataset:
        return load_data(
            spec,
            tokenizer,
            max_length=plain["max_length"],
            max_eval_rows=99,
            seed=plain["seed"],
            joined=form == "joined",
        )

    if not expected.trained or (held_out is not None and not expected.held_out):
        with pytest.raises(DataError, match=r"raise data\.max_length"):
            load()
        return
    found = load()
    assert listed(found.train) == expected.trained
    assert listed(found.evaluation) == expected.held_out
    assert [share.num_rows for share in found.shares] == np.bincount(expected.sources, minlength=len(paths)).tolist()
    assert found.report.num_tokens == sum(len(ids) for ids, _ in expected.trained)
    assert found.report.num_targets == sum(sum(targets) for _, targets in expected.trained)
    plans = [
        BatchStream(rows, BatchSpec(rows=2, order=order), max_length=plain["max_length"], seed=1, per_step=2)
        for rows in (pack_rows(expected.trained), pickle.loads(pickle.dumps(found.train)))
    ]
    for mine, theirs in zip(*(plan.next_step() for plan in plans), strict=True):
        assert mine.input_ids_BT.equal(theirs.input_ids_BT)
        assert mine.labels_BT.equal(theirs.labels_BT)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ten parts."""
    monkeypatch.setattr(read, "PART_BYTES", 50)
    return write(tmp_path / "data.jsonl", [{"text": f"text {i} " + "x" * 40} for i in range(10)])


def load(path: str, folder: Path, run: Counted, tokenizer: Any = None, **options: Any) -> Dataset:
    options = {"max_length": 20, "max_eval_rows": 9, "seed": 0} | options
    spec = DataSpec(train=path, eval_fraction=0.2)
    return load_data(spec, tokenizer or byte_tokenizer(), cache=FolderCache(folder), run=run, **options)


def test_nothing_is_tokenised_twice(tmp_path: Path, source: str) -> None:
    first, again = Counted(), Counted()
    found = load(source, tmp_path / "cache", first)
    copied = write(tmp_path / "copy.jsonl", [])
    shutil.copy(source, copied)
    for path, options in ((source, {"max_length": 33, "seed": 4}), (copied, {})):  # rows are cut from the same tokens
        load(path, tmp_path / "cache", again, **options)
    assert (first.done, again.done) == (10, 0)
    assert listed(load(copied, tmp_path / "cache", again).train) == listed(found.train)


def test_what_changes_the_tokens_is_tokenised_again(tmp_path: Path, source: str) -> None:
    load(source, tmp_path / "cache", Counted())
    with Path(source).open("a") as file:
        file.write('{"text": "added"}\n')
    grown, joined, other = Counted(), Counted(), Counted()
    load(source, tmp_path / "cache", grown)
    load(source, tmp_path / "cache", joined, joined=True)
    load(source, tmp_path / "cache", other, BEGINNING)
    assert (grown.done, joined.done, other.done) == (1, 10, 10)


def test_the_shards_of_a_killed_run_count(tmp_path: Path, source: str) -> None:
    rest = Counted()
    with pytest.raises(KeyboardInterrupt):
        load(source, tmp_path / "cache", Counted(most=4))
    found = load(source, tmp_path / "cache", rest)
    assert rest.done == 6
    assert listed(found.train) == listed(load(source, tmp_path / "other", Counted()).train)


@pytest.mark.parametrize("damage", ["*.npy", "*.index"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, source: str, damage: str) -> None:
    expected = listed(load(source, tmp_path / "cache", Counted()).train)
    shards = sorted(index.with_suffix(damage[1:]) for index in (tmp_path / "cache").rglob("*.index"))
    for number, path in enumerate(shards[:3]):
        path.write_bytes(path.read_bytes()[: (0, 30, -1)[number]])
    again = Counted()
    assert listed(load(source, tmp_path / "cache", again).train) == expected
    assert again.done == 3
    assert not list((tmp_path / "cache").rglob(".*"))


def test_equal_parts_are_one_shard(tmp_path: Path, source: str) -> None:
    path = write(tmp_path / "same.parquet", [{"text": "a"}] * 5)
    run, spec = Counted(), DataSpec(train=(path, path, path), eval_fraction=0)
    options: dict[str, Any] = {"max_length": 9, "max_eval_rows": 1, "seed": 0}
    found = load_data(spec, byte_tokenizer(), cache=FolderCache(tmp_path / "cache"), run=run, **options)
    assert (run.done, len(found.train.lengths)) == (3, 15)  # three parts


def test_an_index_keeps_what_it_holds() -> None:
    arrays = [np.array(a, np.int32) for a in ([3, 5], [0, 0], [[1, 2], [2, 3], [0, 4]], [2, 1])]
    index = ShardIndex(*arrays, is_text=False, num_documents=1, desirable_E=np.array([True, False]))
    again = ShardIndex.from_bytes(index.to_bytes())
    assert again.mask().tolist() == [False, True, True, True, True, True, True, False]
    for mine, theirs in zip(index, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
