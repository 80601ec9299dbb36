"""Folders over HTTP: file by file, checked as a whole before they have a name, continued, and back as an archive."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loray.adapters.manifest import describe, read_manifest, verify_folder
from loray.bases.registry import BaseModel
from loray.client import CatalogClient
from loray.errors import (
    AdapterNotFound,
    ConflictError,
    DataError,
    IntegrityError,
    LorayError,
    NotFoundError,
    SpecError,
    StoreError,
    UnsupportedError,
)
from loray.files import unpack_tar
from loray.publishing import uploads as uploading
from loray.publishing.uploads import MAX_OPEN
from tests.fixtures.api import Api


@pytest.fixture
def folder(base: BaseModel, peft_folder: Callable[..., Path]) -> Path:
    return peft_folder(base)


def send(client: CatalogClient, folder: Path, key: str | None = None) -> str:
    upload = client.begin_upload(key)
    for path in sorted(folder.iterdir()):
        client.put_file(upload.id, path)
    return upload.id


def staged(api: Api) -> list[str]:
    return [key for key in api.services.store.objects.list("uploads/") if "/files/" in key]


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_there_and_back(
    api: Api, client: CatalogClient, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    folder = peft_folder(base, method)
    id = send(client, folder)
    assert {f.name: f.nbytes for f in client.upload(id).files} == {p.name: p.stat().st_size for p in folder.iterdir()}
    assert tuple(api.catalog.snapshot().models()) == ()
    version = client.register("tone", upload=id, aliases=["prod"], base=base.name, description="mine", licence="MIT")
    assert (version.label, version.aliases, version.manifest.description) == ("tone@1", ("prod",), "mine")
    assert staged(api) == []
    api.services.store.verify(version.digest)
    with client.download("tone", 1) as archive:
        unpack_tar(archive, tmp_path / "got")
    assert verify_folder(tmp_path / "got") == read_manifest(tmp_path / "got") == version.manifest
    for path in folder.iterdir():
        assert (tmp_path / "got" / path.name).read_bytes() == path.read_bytes()
    again = client.register("again", upload=send(client, tmp_path / "got"))  # with its manifest: the same digest
    assert again.digest == version.digest


def test_an_upload_is_continued_and_published_once(
    api: Api, client: CatalogClient, base: BaseModel, folder: Path
) -> None:
    id = client.begin_upload("my key").id
    client.put_file(id, folder / "adapter_config.json")
    with pytest.raises(LorayError, match=r"the upload lacks adapter_model\.safetensors"):
        client.register("tone", upload=id, base=base.name)
    continued = client.begin_upload("my key")
    assert (continued.id, [f.name for f in continued.files]) == (id, ["adapter_config.json"])
    client.put_file(id, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + "\n")
    replaced = client.put_file(id, folder / "adapter_config.json")
    assert replaced in client.upload(id).files
    assert len(staged(api)) == 2
    with pytest.raises(LorayError, match="cannot tell which base model the upload was trained on"):
        client.register("tone", upload=id)
    first = client.register("tone", upload=id, base=base.name)
    assert client.begin_upload("my key").published
    assert client.register("tone", upload=id) == first  # the first answer was lost
    assert client.register("other", upload=id).digest == first.digest
    with pytest.raises(ConflictError, match="is published already"):
        client.put_file(id, folder / "adapter_config.json")
    client.delete_upload(id)
    with pytest.raises(NotFoundError, match="there is no upload"):
        client.upload(id)


def test_a_publication_that_was_cut_off_after_its_registration_makes_one_version(
    api: Api, client: CatalogClient, base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the server was killed there; the second attempt comes in another second."""
    id = send(client, folder, "my key")
    begun = api.settings.home / "store" / "uploads" / "default" / id / "state" / "begun"
    os.utime(begun, (1_700_000_000, 1_700_000_000))
    objects, put = api.services.store.objects, api.services.store.objects.put_if_absent

    def cut_off(key: str, data: bytes | Path) -> bool:
        if key.endswith("/published"):
            raise StoreError("the server ends here")
        return put(key, data)

    monkeypatch.setattr(objects, "put_if_absent", cut_off)
    with CatalogClient("http://test", transport=api.transport, retry_s=0) as hasty, pytest.raises(StoreError):
        hasty.register("tone", upload=id, base=base.name)
    monkeypatch.undo()
    assert not client.upload(id).published
    version = client.register("tone", upload=id, base=base.name)
    assert [v.version for v in client.versions("tone")] == [1]
    assert version.manifest.created_at == "2023-11-14T22:13:20+00:00"


@pytest.mark.parametrize("at", ["files", "get_to"])
def test_a_publication_that_is_asked_for_twice_at_once_is_made_once(
    api: Api, client: CatalogClient, base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The second request overtakes the first, whose client has sent it again: after it has looked, or read a file."""
    id = send(client, folder)
    target: Any = uploading.Uploads if at == "files" else api.services.store.objects
    step = getattr(target, at)
    overtaken: list[str] = []

    def overtaking(*args: Any) -> Any:
        found = step(*args) if at == "files" else None
        if not overtaken:
            overtaken.append("now")
            overtaken.append(client.register("tone", upload=id, base=base.name).digest)
        return found if at == "files" else step(*args)

    monkeypatch.setattr(target, at, overtaking)
    assert client.register("tone", upload=id, base=base.name).digest == overtaken[1]
    assert [v.version for v in client.versions("tone")] == [1]
    assert client.upload(id).published
    assert staged(api) == []


def test_an_upload_whose_adapter_is_gone_is_open_again(
    api: Api, client: CatalogClient, base: BaseModel, folder: Path
) -> None:
    id = send(client, folder, "my key")
    digest = client.register("tone", upload=id, base=base.name).digest
    api.services.store.objects.delete(api.services.store.keys_of(digest)[1])
    with pytest.raises(SpecError, match="the upload lacks"):
        client.register("other", upload=id, base=base.name)
    assert send(client, folder, "my key") == id
    assert list(api.services.store.objects.list("uploads/default/open/")) == [f"uploads/default/open/{id}"]
    assert client.register("other", upload=id, base=base.name).digest == digest
    assert list(api.services.store.objects.list("uploads/default/open/")) == []
    api.services.store.verify(digest)


def test_what_is_refused_has_no_name(api: Api, client: CatalogClient, base: BaseModel, folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    id = send(client, folder)
    with pytest.raises(DataError, match=r"^the upload/adapter_model\.safetensors is damaged.*its header describes"):
        client.register("tone", upload=id, base=base.name)
    assert tuple(api.catalog.snapshot().models()) == ()
    assert [key for key in api.services.store.objects.list() if not key.startswith("uploads/")] == []
    with pytest.raises(AdapterNotFound):
        client.adapter("tone")


def test_files_that_no_adapter_has(client: CatalogClient, tmp_path: Path) -> None:
    id = client.begin_upload().id
    for name, message in [("adapter_model.bin", "pickles are never read"), ("run.py", "no file of an adapter")]:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UnsupportedError, match=message):
            client.put_file(id, tmp_path / name)
    assert client.upload(id).files == ()


def test_uploads_in_flight_are_limited(api: Api, client: CatalogClient) -> None:
    ids = [client.begin_upload(f"key {i}").id for i in range(MAX_OPEN)]
    assert client.begin_upload("key 1").id == ids[1]
    with pytest.raises(ConflictError, match="uploads are not published yet"):
        client.begin_upload()
    client.delete_upload(ids[0])
    client.begin_upload()
    objects, state = api.services.store.objects, f"uploads/default/{ids[1]}/state"
    objects.delete(f"{state}/begun")  # as if a server was killed before it had written that
    assert client.begin_upload("key 1").id == ids[1]
    objects.put_if_absent(f"{state}/published", b"0" * 64)  # and after
    assert client.begin_upload().id not in ids
    with pytest.raises(ConflictError, match="uploads are not published yet"):
        client.begin_upload()


def test_an_upload_begins_without_a_look_at_those_that_are_published(
    api: Api, client: CatalogClient, base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = api.services.store.objects
    for _ in range(3):
        client.register("tone", upload=send(client, folder), base=base.name)
    waiting, seen, list_all = client.begin_upload(), list[str](), objects.list

    def listing(prefix: str = "") -> Iterator[str]:
        for key in list_all(prefix):
            seen.append(key)
            yield key

    monkeypatch.setattr(objects, "list", listing)
    new = client.begin_upload()
    assert [key for key in seen if new.id not in key] == [f"uploads/default/open/{waiting.id}"]


def test_registrations_that_are_not_valid(api: Api) -> None:
    nothing = "0" * 32
    for body in (
        {},
        {"digest": nothing * 2, "upload": nothing},
        {"digest": nothing * 2, "base": "x"},
        {"upload": "../../x"},
        {"upload": nothing, "tool_parser": "none of them"},
    ):
        assert api.http.post("/adapters/tone/versions", json=body).status_code == 422


def test_archives_that_are_not_whole(tmp_path: Path, base: BaseModel, folder: Path) -> None:
    describe(folder, base)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.add(folder, "a")
    with pytest.raises(IntegrityError, match="not a plain file"):
        unpack_tar(io.BytesIO(made.getvalue()), tmp_path / "x")
    with pytest.raises(IntegrityError, match="cannot be read"):
        unpack_tar(io.BytesIO(b"nothing"), tmp_path / "x")
    (tmp_path / "y").mkdir()
    with pytest.raises(ConflictError, match="exists already"):
        unpack_tar(io.BytesIO(), tmp_path / "y")
    assert not (tmp_path / "x").exists()
