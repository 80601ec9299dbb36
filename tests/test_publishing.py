"""Publishing: all or nothing, and completed when it is repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.adapters.manifest import ManifestDetails, describe, digest, read_manifest
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.errors import BaseMismatch, BaseNotFound, CatalogError, ConflictError, IntegrityError, SpecError
from loray.publishing import Destination, base_of, import_folder, publish
from loray.spec import Evaluation
from loray.store import AdapterStore, LocalStore
from tests.fixtures.tiny import write_checkpoint

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


def test_an_adapter_carries_how_it_speaks(
    base: BaseModel, peft_folder: PeftFolder, store: AdapterStore, catalog: Catalog, tmp_path: Path
) -> None:
    folder, template = peft_folder(base), "{{ messages }}\r\n{{ tools }}é"
    (folder / "chat_template.jinja").write_bytes(template.encode())
    to = Destination("tone", store, catalog)
    version = import_folder(folder, base, to, tool_parser="mistral")
    assert (version.manifest.tool_parser, version.manifest.chat_template) == ("mistral", template)
    ref = catalog.resolve("tone")
    assert ref == version.ref
    snapshot = catalog.snapshot()
    assert (ref.tool_parser, snapshot.templates) == ("mistral", {ref.chat_template: template})
    again = import_folder(folder, base, Destination("again", store, catalog))
    assert again.digest != version.digest
    assert catalog.snapshot(snapshot).templates == catalog.snapshot().templates == snapshot.templates

    fetched = tmp_path / "fetched"
    store.fetch(version.digest, fetched)
    assert (fetched / "chat_template.jinja").read_bytes() == template.encode()
    changed = json.loads((fetched / "loray.json").read_text()) | {"chat_template": "{{ messages }}"}
    (fetched / "loray.json").write_text(json.dumps(changed))
    with pytest.raises(IntegrityError, match=r"chat_template is not the text of chat_template\.jinja"):
        read_manifest(fetched)


def test_the_bases_own_template_is_no_adapters(base: BaseModel, peft_folder: PeftFolder) -> None:
    folder = peft_folder(base)
    (folder / "chat_template.jinja").write_bytes((base.path / "chat_template.jinja").read_bytes())
    manifest = describe(folder, base)
    assert manifest.chat_template is None
    assert "chat_template.jinja" in manifest.files
    assert manifest.ref("0" * 64, "a", 1).chat_template is None


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
