"""Data sets of the Hugging Face hub: what is asked for, what is read of it, and what to do without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.driver.data import HubSource, fetched, parse_hub
from loray.errors import DataError
from loray.settings import Settings
from loray.spec import DataSpec
from loray.train.data.rows import load_data
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import save_to_disk, whole


class Found:
    """As what `datasets` loads."""

    column_names = ("text", "image")

    def __init__(self, selected: tuple[str, ...] = ()) -> None:
        self.selected = selected

    def select_columns(self, columns: list[str]) -> Found:
        return Found(tuple(columns))

    def save_to_disk(self, folder: str) -> None:
        save_to_disk(Path(folder), list(self.selected), shards=1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A module `datasets`; what was asked of it."""
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Found:
        asked.append((name, config, revision, split))
        if name == "org/offline":
            raise ConnectionError("Couldn't reach 'org/offline' on the Hub (LocalEntryNotFoundError)\nand more")
        return Found()

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://org/name", HubSource("org/name", None, None, "train")),
        ("hf://org/name:test[:10%]", HubSource("org/name", None, None, "test[:10%]")),
        ("hf://org/a.b-c/en@refs-1:train+test", HubSource("org/a.b-c", "en", "refs-1", "train+test")),
    ],
)
def test_names(source: str, expected: HubSource) -> None:
    assert parse_hub(source) == expected


@pytest.mark.parametrize("source", ["hf://name", "hf://org/../x", "hf://org/name:", "hf://org/name/a/b"])
def test_what_is_no_name(source: str) -> None:
    with pytest.raises(DataError, match="write hf://org/name"):
        parse_hub(source)


def test_a_data_set_is_read_as_a_saved_one(tmp_path: Path, asked: list[Any]) -> None:
    source = "hf://org/name:test[:10%]"
    with fetched([source, source], Settings.from_env({"LORAY_HOME": str(tmp_path)})) as copies:
        spec = DataSpec(train=source, eval_fraction=0)
        data = load_data(spec, byte_tokenizer(), max_length=9, max_eval_rows=1, seed=0, fetched=copies)
    assert asked == [("org/name", None, None, "test[:10%]")]
    assert whole(data.train, 0) == "text<|im_end|>"  # the one column that is read


def test_what_to_do_without_a_network(tmp_path: Path, asked: list[Any]) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    with (
        pytest.raises(DataError, match=r"hf://org/offline cannot be loaded: Couldn't reach .*\. Check .* save_to_disk"),
        fetched(["hf://org/offline"], settings),
    ):
        pass


def test_what_to_do_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    with pytest.raises(DataError, match=r"pip install 'loray\[datasets\]'"), fetched(["hf://org/name"], settings):
        pass
