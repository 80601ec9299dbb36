"""Training data in buckets: with whose options a URL is opened, what is read of it, and what errors say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.workers.tokens import open_tokens
from loray.catalog import Catalog
from loray.errors import DataError, SpecError
from loray.fetching import HubSource, _location, _without_options, fetched, parse_hub
from loray.locations import S3Location, parse_location
from loray.publishing.user_files import FileWriter
from loray.recipes.sources import find_files
from loray.settings import Settings
from loray.spec import DataSpec, TrainSpec
from loray.store import open_store
from loray.store.objects import ObjectEntry
from loray.store.s3 import S3Store
from loray.train.checkpoint import RunState, check_resumable
from loray.train.data.rows import Dataset, load_data
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.recipes import RECIPE
from tests.fixtures.s3 import CountedS3, S3Server, counted_s3
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import save_to_disk, whole

SPEC = TrainSpec.model_validate(RECIPE | {"data": {"train": "x"}})
OPTIONS = "endpoint_url=http://minio:9000&region=eu-1&credentials_file=/etc/keys"


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("s3://training/sets/acme/a.jsonl", OPTIONS),
        ("s3://training/sets2/acme/a.jsonl", ""),
        ("s3://training/sets", ""),
        ("s3://training/sets/a.jsonl?region=eu-2", "region=eu-2"),
        ("s3://adapters/a.jsonl", "endpoint_url=http://store:1"),
        ("s3://elsewhere/a.jsonl", ""),
    ],
)
def test_options_are_those_of_the_place(tmp_path: Path, source: str, options: str) -> None:
    env = {"LORAY_HOME": str(tmp_path), "LORAY_STORE": "s3://adapters/x?endpoint_url=http://store:1"}
    settings = Settings.from_env(env | {"LORAY_DATA": f"s3://training/sets?{OPTIONS}"})
    assert _location(source, settings).url == source.partition("?")[0] + (f"?{options}" if options else "")


def test_an_uploaded_file_is_fetched_when_it_is_read(tmp_path: Path) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path), "LORAY_CATALOG": sqlite_catalog(tmp_path)})
    with closing(Catalog(settings.catalog)) as catalog:
        with FileWriter(catalog, open_store(settings.store)) as writer:
            writer.write(b'{"text": "a"}\n')
            file = writer.finish("a.jsonl", "fine-tune")
        source = f"files://{file.id}"
        catalog.files.delete(file.id)  # a job that was admitted reads it all the same
        with fetched([source], settings) as copies:
            (found,) = find_files(source, copies[source])
            assert Path(found.path).read_bytes() == b""
            assert Path(found.fetched()).read_bytes() == b'{"text": "a"}\n'
            assert str(found) == source
    with pytest.raises(DataError, match=r"files://file-x: there is no file"), fetched(["files://file-x"], settings):
        pass


def test_a_tenants_data_is_fetched_with_the_options_of_the_deployment(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url("training", "sets")
    source = f"{url.partition('?')[0]}/acme/a.jsonl"
    S3Store(s3_of(url)).put_if_absent("acme/a.jsonl", b"{}")
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path), "LORAY_DATA": url})
    with fetched([source], settings) as copies:
        (file,) = find_files(source, copies[source])
        assert Path(file.fetched()).read_bytes() == b"{}"
    other = [source.replace("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match=r"b\.jsonl does not exist$"), fetched(other, settings):
        pass
    wrong = replace(s3_of(url), credentials_file=tmp_path / "zq-keys").url
    with (
        pytest.raises(DataError, match=rf"data file {source}: .*\(credentials_file\) cannot be read") as error,
        fetched([source], replace(settings, data=wrong)),
    ):
        pass
    assert "zq-keys" not in str(error.value)


def test_an_error_calls_options_by_their_names() -> None:
    location = s3_of(f"s3://training/sets?{OPTIONS}&kms_key_id=k-77")
    shown = _without_options("no route to http://minio:9000 or minio with /etc/keys and k-77", location)
    assert shown == "no route to (endpoint_url) or (the endpoint's host) with (credentials_file) and (kms_key_id)"


# -- what is read ------------------------------------------------------------------------------------------------------


class Data:
    """Sources in a bucket, and the requests for them. Tokens and notes are in another bucket."""

    def __init__(self, server: S3Server, counted: CountedS3, tmp_path: Path) -> None:
        self.location = s3_of(server.url("training", "sets"))
        self.store, self._counted = S3Store(self.location), counted
        self.settings = Settings.from_env({"LORAY_STORE": server.url("tokens"), "LORAY_HOME": str(tmp_path / "home")})

    def put(self, name: str, *texts: str) -> None:
        self.store.delete(name)
        self.store.put_if_absent(name, b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))

    def source(self, name: str) -> str:
        return replace(self.location, prefix=f"sets/{name}", endpoint_url=self._counted.url).url

    def load(self, *names: str, home: str = "home", **options: Any) -> tuple[Dataset, list[str]]:
        """The data, and the keys of what was read of it, by a driver with this home."""
        self._counted.read.clear()
        settings = replace(self.settings, home=self.settings.home.parent / home)
        spec = DataSpec(train=tuple(self.source(name) for name in names), eval_fraction=0)
        with fetched([source.path for source in spec.train_sources], settings) as copies:
            options |= {"max_length": 40, "max_eval_rows": 1, "seed": 0, "cache": open_tokens(settings)}
            data = load_data(spec, byte_tokenizer(), fetched=copies, **options)
        return data, sorted({key.rpartition("/sets/")[2] for key in self._counted.read})


@pytest.fixture
def data(s3_server: S3Server, tmp_path: Path) -> Iterator[Data]:
    with counted_s3(s3_server.local) as counted:
        found = Data(s3_server, counted, tmp_path)
        found.put("web/a.jsonl", *(f"text {i}" for i in range(100)))
        found.put("web/b.jsonl", "one", "two")
        found.put("c.jsonl", "three")
        found.put("web/read_me.txt", "no data")
        yield found


@pytest.mark.parametrize("home", ["home", "of another machine"])
def test_a_second_run_reads_no_object(data: Data, home: str) -> None:
    first, read = data.load("web", "c.jsonl")
    assert read == ["c.jsonl", "web/a.jsonl", "web/b.jsonl"]
    again, read = data.load("web", "c.jsonl", home=home)
    assert read == []
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)
    assert rows(again) == rows(first)


@pytest.mark.parametrize("source", ["web", "web/*.jsonl"])
def test_a_changed_object_is_read_alone(data: Data, source: str) -> None:
    first, _ = data.load(source)
    data.put("web/b.jsonl", "one", "2nd")  # of the same size
    changed, read = data.load(source)
    assert read == ["web/b.jsonl"]
    assert rows(changed) == rows(first) - {"two<|im_end|>"} | {"2nd<|im_end|>"}
    assert changed.fingerprint != first.fingerprint
    data.put("web/d.jsonl", "four")
    added, read = data.load(source)
    assert read == ["web/d.jsonl"]
    assert added.report.num_documents == 103


def test_other_tokens_are_made_of_known_objects(data: Data) -> None:
    data.load("web")
    joined, read = data.load("web", joined=True)
    assert read == ["web/a.jsonl", "web/b.jsonl"]
    assert data.load("web", joined=True)[1] == []
    assert joined.is_joined


def test_a_resumed_run_refuses_changed_objects(data: Data) -> None:
    first, again = data.load("web")[0], data.load("web")[0]
    known: dict[str, Any] = {"recipe": SPEC, "base_fingerprint": "0" * 64, "row_length": first.max_length}
    state = RunState(**known, data_fingerprint=first.fingerprint)
    check_resumable(state, SPEC, "0" * 64, again.fingerprint)
    data.put("web/b.jsonl", "one", "2nd")
    with pytest.raises(SpecError, match="the data files' contents changed since"):
        check_resumable(state, SPEC, "0" * 64, data.load("web")[0].fingerprint)


def test_an_object_that_changes_while_it_is_read_is_refused(data: Data) -> None:
    sources = [data.source("c.jsonl")]
    with fetched(sources, data.settings) as copies:
        data.put("c.jsonl", "THREE")
        (file,) = find_files(sources[0], copies[sources[0]])
        with pytest.raises(DataError, match="was changed while it was read; start again"):
            file.fetched()


def test_what_is_no_path_is_no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On AWS a key may be what leads out of the folder of copies."""
    keys = ("x//etc/a.jsonl", "x/b//c.jsonl", "x/../d.jsonl", "x/./e.jsonl", "x/ok.jsonl")
    monkeypatch.setattr(S3Store, "entry", lambda store, key: None)
    monkeypatch.setattr(S3Store, "entries", lambda store, prefix: [ObjectEntry(key, 1, 0.0, "e") for key in keys])
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    for source in ("s3://bucket/x?region=eu-1", "s3://bucket/x/**/*?region=eu-1"):
        with fetched([source], settings) as copies:
            assert [Path(file.path).name for file in find_files(source, copies[source])] == ["ok.jsonl"]


def rows(data: Dataset) -> set[str]:
    tokenizer = byte_tokenizer()
    return {tokenizer.decode(data.train.row(i)[0]) for i in range(len(data.train.lengths))}


def s3_of(url: str) -> S3Location:
    location = parse_location(url)
    assert isinstance(location, S3Location)
    return location


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
