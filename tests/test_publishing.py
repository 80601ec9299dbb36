"""Publishing: all or nothing, and completed when it is repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.adapters.manifest import ManifestDetails, digest, read_manifest
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.errors import BaseMismatch, BaseNotFound, CatalogError, ConflictError, SpecError
from loray.publishing import Destination, base_of, publish
from loray.spec import Evaluation
from loray.store import AdapterStore, LocalStore
from tests.tiny import write_checkpoint

PeftFolder = Callable[..., Path]


@pytest.fixture
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(LocalStore(tmp_path / "store"))


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url)
    yield catalog
    catalog.close()


def test_published(base: BaseModel, peft_folder: PeftFolder, store: AdapterStore, catalog: Catalog) -> None:
    folder = peft_folder(base)
    measured = Evaluation(metric="loss", value=1.5, dataset="held-out")
    to = Destination("tone", store, catalog, aliases=["prod"])
    version = publish(folder, base, to, ManifestDetails(job_id="j1", evaluations=[measured]))
    assert (version.label, version.aliases) == ("tone@1", ("prod",))
    assert version.manifest == read_manifest(folder) == store.manifest(version.digest)
    assert version.digest == digest(version.manifest) == catalog.resolve("tone").digest
    assert version.ref == catalog.resolve("tone@1")
    assert catalog.snapshot().bases == {base.name: base.fingerprint}


def test_refused_before_anything_is_stored(
    base: BaseModel,
    tiny_base: Callable[..., BaseModel],
    peft_folder: PeftFolder,
    store: AdapterStore,
    catalog: Catalog,
) -> None:
    folder = peft_folder(base)
    catalog.add_base("taken", "0" * 64)
    before = catalog.change_counter()
    other = tiny_base(hidden_size=32)
    for name, on, aliases, error in [
        ("a b", base, [], SpecError),
        ("tone", base, ["9"], SpecError),
        ("taken", base, [], ConflictError),
        ("tone", other, [], BaseMismatch),
    ]:
        with pytest.raises(error):
            publish(folder, on, Destination(name, store, catalog, aliases=aliases))
    assert list(store.objects.list()) == []
    assert catalog.change_counter() == before


def test_cut_off_and_repeated(
    base: BaseModel, peft_folder: PeftFolder, store: AdapterStore, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = peft_folder(base)

    def fail(*_: object, **__: object) -> None:
        raise CatalogError("the database went away")

    with monkeypatch.context() as m:
        m.setattr(catalog, "register", fail)
        with pytest.raises(CatalogError):
            publish(folder, base, Destination("tone", store, catalog))
    assert catalog.adapters() == ()
    stored = list(store.objects.list())
    version = publish(folder, base, Destination("tone", store, catalog))
    assert version.version == 1
    assert list(store.objects.list()) == stored
    store.verify(version.digest)


def test_the_only_base_is_not_taken_for_another(tmp_path: Path, peft_folder: PeftFolder) -> None:
    base = add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=tmp_path / "home", name="only")
    config = peft_folder(base) / "adapter_config.json"
    for named in (None, "", "only", str(base.path)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        assert base_of(config.parent, tmp_path / "home") == base
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/elses"}))
    with pytest.raises(BaseNotFound, match=r"somebody/elses.*name one with --base: only"):
        base_of(config.parent, tmp_path / "home")
