"""Publishing: all or nothing, completed when it is repeated, also where publishers die or race at S3."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from loray.adapters.manifest import ManifestDetails, describe, digest, read_manifest, with_manifest
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.errors import (
    AdapterNotFound,
    BaseMismatch,
    BaseNotFound,
    CatalogError,
    ConflictError,
    IntegrityError,
    SpecError,
)
from loray.locations import S3Location
from loray.publishing import Destination, base_of, import_folder, publish
from loray.spec import Evaluation
from loray.store import AdapterStore, LocalStore
from loray.store.s3 import S3Store
from tests.fixtures.calls import refused
from tests.fixtures.tiny import write_checkpoint


@dataclass(frozen=True)
class Place:
    """`folder()`: a new adapter of the base."""

    base: BaseModel
    folder: Callable[[], Path]
    store: AdapterStore
    catalog: Catalog

    def to(self, name: str = "tone", **fields: Any) -> Destination:
        return Destination(name, self.store, self.catalog, **fields)


@pytest.fixture
def place(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], tmp_path: Path, catalog_url: str
) -> Iterator[Place]:
    base, store = tiny_base(), AdapterStore(LocalStore(tmp_path / "store"))
    with closing(Catalog(catalog_url)) as catalog:
        yield Place(base, lambda: peft_folder(base), store, catalog)


def test_published(place: Place) -> None:
    folder, catalog = place.folder(), place.catalog
    measured = Evaluation(metric="loss", value=1.5, dataset="held-out")
    details = ManifestDetails(job_id="j1", evaluations=[measured])
    version = publish(folder, place.base, place.to(aliases=["prod"]), details)
    assert (version.label, version.aliases) == ("tone@1", ("prod",))
    assert version.manifest == read_manifest(folder) == place.store.manifest(version.digest)
    assert version.digest == digest(version.manifest) == catalog.adapters.resolve("tone").digest
    assert version.ref == catalog.adapters.resolve("tone@1")
    assert catalog.snapshot().bases == {place.base.name: place.base.fingerprint}


def test_an_adapter_carries_how_it_speaks(place: Place, tmp_path: Path) -> None:
    folder, catalog, template = place.folder(), place.catalog, "{{ messages }}\r\n{{ tools }}é"
    (folder / "chat_template.jinja").write_bytes(template.encode())
    version = import_folder(folder, place.base, place.to(), tool_parser="mistral")
    assert (version.manifest.tool_parser, version.manifest.chat_template) == ("mistral", template)
    ref, snapshot = catalog.adapters.resolve("tone"), catalog.snapshot()
    assert ref == version.ref
    assert (ref.tool_parser, snapshot.templates) == ("mistral", {ref.chat_template: template})
    assert import_folder(folder, place.base, place.to("again")).digest != version.digest
    assert catalog.snapshot(snapshot).templates == catalog.snapshot().templates == snapshot.templates

    fetched = tmp_path / "fetched"
    place.store.fetch(version.digest, fetched)
    assert (fetched / "chat_template.jinja").read_bytes() == template.encode()
    changed = json.loads((fetched / "loray.json").read_text()) | {"chat_template": "{{ messages }}"}
    (fetched / "loray.json").write_text(json.dumps(changed))
    refused(IntegrityError, r"chat_template is not the text of chat_template\.jinja", read_manifest, fetched)


def test_an_adapter_carries_its_invocation(place: Place, tmp_path: Path) -> None:
    folder, catalog = place.folder(), place.catalog
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": [257, 97]}))
    version = import_folder(folder, place.base, place.to())
    publish(place.folder(), place.base, place.to("plain"))
    ref = catalog.adapters.resolve("tone")
    assert ref == version.ref == version.manifest.ref(ref.digest, "tone", 1)
    assert (ref.method, ref.invocation_tokens, catalog.adapters.resolve("plain").invocation_tokens) == (
        "alora",
        (257, 97),
        None,
    )
    fetched = tmp_path / "fetched"
    place.store.fetch(version.digest, fetched)
    kept = json.loads((fetched / "loray.json").read_text())
    (fetched / "loray.json").write_text(json.dumps(kept | {"invocation_tokens": [97]}))
    weights = read_adapter(fetched, place.base.config)
    refused(IntegrityError, "other alora_invocation_tokens", with_manifest, weights, read_manifest(fetched), "tone@1")
    (fetched / "loray.json").write_text(json.dumps(kept | {"method": "lora"}))
    refused(IntegrityError, "invocation_tokens are an alora adapter's", read_manifest, fetched)


def test_the_bases_own_template_is_no_adapters(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    base = tiny_base()
    folder = peft_folder(base)
    (folder / "chat_template.jinja").write_bytes((base.path / "chat_template.jinja").read_bytes())
    manifest = describe(folder, base)
    assert manifest.chat_template is manifest.ref("0" * 64, "a", 1).chat_template is None
    assert "chat_template.jinja" in manifest.files


def test_refused_before_anything_is_stored(place: Place, tiny_base: Callable[..., BaseModel]) -> None:
    folder, other = place.folder(), tiny_base(hidden_size=32)
    place.catalog.bases.add("taken", "0" * 64)
    before = place.catalog.change_counter()
    refused(SpecError, "", publish, folder, place.base, place.to("a b"))
    refused(SpecError, "", publish, folder, place.base, place.to(aliases=["9"]))
    refused(ConflictError, "", publish, folder, place.base, place.to("taken"))
    refused(BaseMismatch, "", publish, folder, other, place.to())
    assert list(place.store.objects.list()) == []
    assert place.catalog.change_counter() == before


def test_cut_off_and_repeated(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, register = place.folder(), Mock(side_effect=CatalogError("the database went away"))
    with monkeypatch.context() as m:
        m.setattr("loray.catalog.adapters.Adapters.register", register)
        refused(CatalogError, "", publish, folder, place.base, place.to())
    assert tuple(place.catalog.snapshot().models()) == ()
    stored = list(place.store.objects.list())
    version = publish(folder, place.base, place.to())
    assert version.version == 1
    assert list(place.store.objects.list()) == stored
    place.store.verify(version.digest)


def test_the_only_base_is_not_taken_for_another(tmp_path: Path, peft_folder: Callable[..., Path]) -> None:
    base = add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=tmp_path / "home", name="only")
    config = peft_folder(base) / "adapter_config.json"
    for named in (None, "", "only", str(base.path)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        assert base_of(config.parent, tmp_path / "home") == base
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/elses"}))
    refused(BaseNotFound, r"somebody/elses.*name one with --base: only", base_of, config.parent, tmp_path / "home")


_TIMEOUT_S = 60
_CONFLICT = 3  # a child's exit code


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Forked from a process that has imported what is slow to import, and has neither threads nor connections."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "boto3.s3.transfer", "loray.adapters.peft_format", "sqlalchemy"])
    return context


@pytest.fixture(scope="module")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "catalog.db"
    Catalog(f"sqlite:///{path}").close()
    return path


@dataclass(frozen=True)
class Publication:
    """What a publisher is to publish, and where."""

    folder: Path
    base: BaseModel
    location: S3Location
    catalog_file: Path
    parts_from: int | None = None
    version: int | None = None

    @property
    def catalog(self) -> Catalog:
        return Catalog(f"sqlite:///{self.catalog_file}")

    def run(self, kill_at: int | None = None, store: S3Store | None = None) -> None:
        """In this process, which is killed at the given step: before each request and transaction, and at the end."""
        store = store or S3Store(self.location)
        if self.parts_from is not None:
            store._parts_from = self.parts_from
        catalog = self.catalog
        if kill_at is not None:
            steps = itertools.count()
            store._client.meta.events.register("before-send.s3", _killing_send(steps, kill_at))
            for part, name in ((catalog.bases, "add"), (catalog.adapters, "register")):
                setattr(part, name, _killing_call(getattr(part, name), steps, kill_at))
        adapters = AdapterStore(store)
        publish(self.folder, self.base, Destination("a", adapters, catalog, version=self.version))
        if kill_at is not None:
            _step(steps, kill_at)
        catalog.close()


def _killing_send(steps: Iterator[int], kill_at: int) -> Callable[..., Any]:
    from botocore.httpsession import URLLib3Session

    session = URLLib3Session()

    def send(request: Any, **_: Any) -> Any:
        _step(steps, kill_at)
        return session.send(request)

    return send


def _killing_call(function: Callable[..., Any], steps: Iterator[int], kill_at: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _step(steps, kill_at)
        return function(*args, **kwargs)

    return call


def _step(steps: Iterator[int], kill_at: int) -> None:
    """SIGKILL where this is the step. What others see is what was there after the step before."""
    if next(steps) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def _race(publication: Publication, barrier: Any) -> None:
    barrier.wait(_TIMEOUT_S)
    try:
        publication.run()
    except ConflictError:
        os._exit(_CONFLICT)


def _ended(children: Sequence[BaseProcess]) -> list[int | None]:
    """Exit codes; None of one that hung. None is left running."""
    try:
        for child in children:
            child.join(_TIMEOUT_S)
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()
            child.join()


def check_what_readers_see(publication: Publication, objects: S3Store) -> int | None:
    """The newest version of the name; every object in sight must be whole."""
    store = AdapterStore(objects)
    for key in objects.list("manifests/"):
        store.verify(Path(key).stem)
    for key in objects.list("blobs/"):
        assert hashlib.sha256(objects.get(key)).hexdigest() == Path(key).name
    catalog = publication.catalog
    try:
        ref = catalog.adapters.resolve("a")
    except AdapterNotFound:
        return None
    finally:
        catalog.close()
    store.verify(ref.digest)
    return ref.version


@pytest.fixture
def at_s3(
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    s3_location: S3Location,
    empty_catalog: Path,
    tmp_path: Path,
) -> Callable[..., Publication]:
    """`at_s3("place", seed=1)`: below that prefix, with an empty catalog there if it is new."""

    def make(name: str, seed: int = 0, **fields: Any) -> Publication:
        base, file = tiny_base(), tmp_path / f"{name}.db"
        if not file.exists():
            shutil.copy(empty_catalog, file)
        location = replace(s3_location, prefix=f"{s3_location.prefix}/{name}")
        return Publication(peft_folder(base, "lora", seed), base, location, file, **fields)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("parts_from", [None, 1], ids=["whole", "in parts"])
def test_killed_at_every_step(
    processes: ForkServerContext, at_s3: Callable[..., Publication], parts_from: int | None
) -> None:
    seen: list[int | None] = []
    for step in itertools.count():
        publication = at_s3(str(step), parts_from=parts_from)
        child = processes.Process(target=publication.run, args=(step,))
        child.start()
        (exitcode,) = _ended([child])
        assert exitcode in (0, -signal.SIGKILL)
        objects = S3Store(publication.location)
        seen.append(check_what_readers_see(publication, objects))
        if exitcode == 0:
            break
        replace(publication, parts_from=None).run(store=objects)  # again, and not killed
        assert check_what_readers_see(publication, objects) == 1
        assert list(publication.catalog.adapters.get("a").versions) == [1]
        assert len(list(objects.list("manifests/"))) == 1
    assert len(seen) > (16 if parts_from else 8)
    assert seen == [None] * (len(seen) - 2) + [1, 1]  # it appears in the last transaction, before the last step


def test_two_publishers_of_one_version(processes: ForkServerContext, at_s3: Callable[..., Publication]) -> None:
    barrier = processes.Barrier(2)
    rivals = [at_s3("one", seed, version=7) for seed in (1, 2)]
    children = [processes.Process(target=_race, args=(rival, barrier)) for rival in rivals]
    for child in children:
        child.start()
    exitcodes = _ended(children)
    assert sorted(exitcodes, key=str) == [0, _CONFLICT]
    objects = S3Store(rivals[0].location)
    assert check_what_readers_see(rivals[0], objects) == 7
    loser = rivals[exitcodes.index(_CONFLICT)]
    refused(ConflictError, "7", loser.run, store=objects)
    replace(loser, version=None).run(store=objects)  # as the next version it is welcome
    assert check_what_readers_see(loser, objects) == 8
