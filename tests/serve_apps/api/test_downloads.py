"""Versions in every form over HTTP: archives, checkpoints and GGUF that processes make, URLs of a bucket."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from starlette.requests import ClientDisconnect

from loray.adapters.manifest import ManifestDetails, describe, verify_folder
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.client import CatalogClient, catalog
from loray.errors import (
    BaseMismatch,
    ClusterError,
    DeadlineExceeded,
    IntegrityError,
    LorayError,
    RateLimited,
    UnsupportedError,
)
from loray.publishing import Destination, import_folder
from loray.publishing.convert import command_of, environment_of, raise_failure
from loray.publishing.uploads import adapter_as_tar, as_tar
from loray.scratch import Scratch
from loray.spec import Principal
from loray.store import adapters
from serve_apps.api import conversions
from serve_apps.api.conversions import Conversions
from serve_apps.api.services import Services
from serve_apps.api.site import create_app
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.s3 import S3Server
from tests.serve_apps.api.fakes import Api, InProcess, mounted
from tests.serve_apps.api.test_adapters import problem
from tests.store.conftest import damage_object

STILL_THERE = 'import os, sys; open(sys.argv[1], "w").write(str(os.getpid())); sys.stdin.read()'


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "home", sqlite_catalog(tmp_path))
    yield api
    api.close()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def client(api: Api) -> CatalogClient:
    return CatalogClient("http://test", transport=api.transport)


def test_every_form(
    api: Api, client: CatalogClient, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, scratch: Path
) -> None:
    import_folder(peft_folder(base, "vera"), base, Destination("tone", api.services.store, api.catalog))
    client.fetch("tone", 1, tmp_path / "peft")
    digest = api.catalog.version("tone", 1).digest
    assert verify_folder(tmp_path / "peft") == api.services.store.manifest(digest)
    client.fetch("tone", 1, tmp_path / "merged", "merged")
    assert add_base(str(tmp_path / "merged"), home=tmp_path / "other", name="merged").config == base.config
    answer = api.http.get("/adapters/tone/versions/1/download", params={"format": "gguf"})
    assert answer.content[:4] == b"GGUF"
    assert (answer.headers["content-length"], answer.headers["etag"]) == (str(len(answer.content)), f'"{digest}-gguf"')
    assert answer.headers["content-disposition"] == 'attachment; filename="tone-1.gguf"'
    assert list(scratch.iterdir()) == []


def test_forms_that_cannot_be_made(
    api: Api, client: CatalogClient, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, scratch: Path
) -> None:
    folder = peft_folder(base)
    version = import_folder(folder, base, Destination("tone", api.services.store, api.catalog))
    blob = version.manifest.files["adapter_model.safetensors"]
    api.services.store.objects.delete(api.services.store.keys_of(blob)[0])
    with pytest.raises(IntegrityError, match="is missing from the store"):
        client.fetch("tone", 1, tmp_path / "x.gguf", "gguf")  # as the process says it
    shutil.rmtree(api.settings.home / "bases")
    with pytest.raises(BaseMismatch, match="which this machine does not have"):
        client.fetch("tone", 1, tmp_path / "x.gguf", "gguf")
    problem(api.http.get("/adapters/tone/versions/1/download", params={"format": "zip"}), 422)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("code", "output", "error", "said"),
    [
        (1, b'noise\n{"kind": "UnsupportedError", "message": "no"}\n', UnsupportedError, "no"),
        (-9, b"", LorayError, "ended without an answer"),
        (1, b'{"kind": "os", "message": "x"}', LorayError, "x"),
        (1, b"[]", LorayError, "ended without an answer"),
    ],
)
def test_what_a_process_says(code: int, output: bytes, error: type[LorayError], said: str) -> None:
    with pytest.raises(error, match=said):
        raise_failure(code, output)


def test_a_process_ends_with_its_server(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    version = import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    command = command_of("merged", version.ref, tmp_path / "merged")
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment_of(api.settings), check=False)
    assert ended.returncode == 1
    assert not (tmp_path / "merged").exists()
    env = environment_of(replace(api.settings, catalog="postgresql://user:secret@host/x", api_key="sk-lr-secret"))
    assert {name for name in env if name.startswith("LORAY_")} == {"LORAY_HOME", "LORAY_STORE", "LORAY_LOG_LEVEL"}


# -- archives ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in many pieces."""
    monkeypatch.setattr(adapters, "_PIECE_BYTES", 4096)


@pytest.mark.usefixtures("small_pieces")
def test_a_folder_is_sent_from_the_store_without_a_copy(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = peft_folder(base), api.services.store
    (folder / "README.md").write_bytes(b"")
    version = import_folder(folder, base, Destination("tone", store, api.catalog))
    store.fetch(version.digest, tmp_path / "fetched")
    expected = as_tar(tmp_path / "fetched", "tone-1")
    api.services.scratch = Scratch(0)
    for path in ("/adapters/tone/versions/1/download", "/console/adapters/tone/versions/1/download"):
        assert api.http.get(path).content == b"".join(as_tar(tmp_path / "fetched", "tone-1").chunks)
        assert int(api.http.get(path).headers["content-length"]) == expected.num_bytes


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_file_ends_the_connection_before_the_archive(
    api: Api, url: str, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    store = api.services.store
    version = import_folder(peft_folder(base), base, Destination("tone", store, api.catalog))
    damage_object(store.objects, store.keys_of(version.manifest.files["adapter_model.safetensors"])[0])
    with CatalogClient(url) as client, pytest.raises(ClusterError, match="closed connection without sending complete"):
        client.fetch("tone", 1, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert api.services.downloads._taken == {}


@pytest.mark.usefixtures("small_pieces")
def test_what_is_lost_meanwhile_is_noticed(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    store = api.services.store
    version = import_folder(peft_folder(base), base, Destination("tone", store, api.catalog))
    blob = store.keys_of(version.manifest.files["adapter_model.safetensors"])[0]
    whole = store.objects.get(blob)
    for left, error in ((None, "is missing from the store"), (whole[:-1], "differs from its SHA-256")):
        archive = adapter_as_tar(store, version.digest, version.manifest, "tone-1")
        sent = [next(archive.chunks)]
        store.objects.delete(blob)
        if left is not None:
            store.objects.put_if_absent(blob, left)
        with pytest.raises(IntegrityError, match=error):
            sent.extend(archive.chunks)
        assert sum(map(len, sent)) < archive.num_bytes
        store.objects.delete(blob)
        store.objects.put_if_absent(blob, whole)
    store.objects.delete(blob)
    problem(api.http.get("/adapters/tone/versions/1/download"), 500)


def test_who_may_not_know_how_a_version_was_made_does_not_read_it_in_its_folder(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = peft_folder(base), api.services.store
    api.catalog.add_base(base.name, base.fingerprint)
    for tenant in ("acme", "beta"):
        api.catalog.create_tenant(tenant)
    describe(folder, base, ManifestDetails(job_id="train_7", data_fingerprint="5b" * 32, parent="5a" * 32))
    acme = api.catalog.view(Principal(tenant="acme"))
    version = import_folder(folder, base, Destination("tone", store, acme))
    acme.share("tone", "public")
    monkeypatch.setattr(type(store.objects), "presigned", lambda self, key, expires_s: "http://127.0.0.1:1/x")
    told = {}
    for tenant in ("acme", "beta"):
        key = api.catalog.create_key(tenant, tenant=tenant, scopes=["publish"]).secret
        with CatalogClient("http://test", api_key=key, transport=api.transport) as client:
            client.fetch("acme/tone", 1, tmp_path / tenant)  # the store's URLs lead nowhere
            told[tenant] = client.version("acme/tone", 1).manifest
            answer = client._request("GET", "/adapters/tone/versions/1/download?tenant=acme&presigned=true")
            for number in (1, 2):  # names of its own
                told[f"{tenant} {number}"] = client.register(f"copy-{number}", version.digest).manifest
        assert verify_folder(tmp_path / tenant) == told[tenant]
        assert (answer.headers["content-type"] == "application/json") == (tenant == "acme")
    assert told["acme"] == told["acme 1"] == told["acme 2"] == version.manifest
    assert told["beta"] == told["beta 1"] == told["beta 2"]
    assert (told["beta"].job_id, told["beta"].data_fingerprint, told["beta"].parent) == (None, None, None)


# -- processes --------------------------------------------------------------------------------------------------------


class Client:
    """`leaves`: as soon as there is that file."""

    def __init__(self, leaves: Path | None = None) -> None:
        self._leaves = leaves

    async def is_disconnected(self) -> bool:
        return self._leaves is not None and is_written(self._leaves)


@pytest.fixture
def make(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`make(target, tenant=…, client=…)` begins a conversion whose process writes its id to `target`, and waits."""
    version = import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    monkeypatch.setattr(
        conversions, "command_of", lambda form, ref, target, max_bytes: [sys.executable, "-c", STILL_THERE, str(target)]
    )
    monkeypatch.setattr(conversions, "num_cores", lambda: 8)
    made = Conversions(api.settings, lambda: 20 << 30)  # of which 16 are for two of 8

    async def begin(target: Path, tenant: str = "acme", client: Client | None = None) -> None:
        with made.place(tenant):
            asked: Any = client or Client()
            await made.make("gguf", version.ref, target, client=asked)

    return begin


def is_written(pid: Path) -> bool:
    return pid.is_file() and pid.read_text() != ""


def has_ended(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_client_that_leaves_ends_the_process(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ClientDisconnect):
        asyncio.run(make(tmp_path / "pid", client=Client(tmp_path / "pid")))
    assert has_ended(tmp_path / "pid")


def test_a_deadline_ends_the_process(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversions, "DEADLINE_S", 0.0)
    with pytest.raises(DeadlineExceeded, match="longer than 0 s"):
        asyncio.run(make(tmp_path / "pid"))
    monkeypatch.setattr(conversions, "DEADLINE_S", 60.0)
    with pytest.raises(ClientDisconnect):  # its place is free
        asyncio.run(make(tmp_path / "pid", client=Client(tmp_path / "pid")))


def test_few_at_once_and_one_of_a_tenant(make: Callable[..., Any], tmp_path: Path) -> None:
    async def run() -> list[str]:
        running = [asyncio.ensure_future(make(tmp_path / tenant, tenant=tenant)) for tenant in ("acme", "beta")]
        while not all(is_written(tmp_path / tenant) for tenant in ("acme", "beta")):
            await asyncio.sleep(0.01)
        refused = []
        for tenant in ("acme", "gamma"):
            with pytest.raises(RateLimited) as error:
                await make(tmp_path / "more", tenant=tenant)
            refused.append(str(error.value))
        for task in running:
            task.cancel()
        assert [type(e) for e in await asyncio.gather(*running, return_exceptions=True)] == [asyncio.CancelledError] * 2
        return refused

    of_tenant, of_all = asyncio.run(run())
    assert "of this tenant" in of_tenant
    assert "2 conversions" in of_all
    assert all(has_ended(tmp_path / tenant) for tenant in ("acme", "beta"))


# -- buckets ----------------------------------------------------------------------------------------------------------


class Bucket(Api):
    """The API of a server whose store is a bucket. `asked`: what came to it."""

    def __init__(self, home: Path, catalog_url: str, store: str) -> None:
        super().__init__(home, catalog_url)
        self.settings = replace(self.settings, store=store)
        self.services.close()
        self.services = Services(self.settings, self.jobs, self.placements)
        self.asked: list[str] = []
        app = mounted(create_app(self.services, self.access))

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            self.asked.append(f"{scope['path'].rpartition('/')[2]}?{scope['query_string'].decode()}")
            await app(scope, receive, send)

        self.transport = InProcess(noting)


@pytest.fixture
def bucket(tmp_path: Path, s3_server: S3Server) -> Iterator[Bucket]:
    api = Bucket(tmp_path / "home", sqlite_catalog(tmp_path), s3_server.url("downloads", "adapters"))
    yield api
    api.close()


def test_bytes_come_from_the_bucket(
    bucket: Bucket,
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, store = tiny_base(), bucket.services.store
    version = import_folder(peft_folder(base), base, Destination("tone", store, bucket.catalog))
    monkeypatch.setenv("LORAY_API_KEY", "sk-lr-" + "A" * 43)  # which the bucket must not be sent: it would refuse it
    client = CatalogClient("http://test", transport=bucket.transport)
    client.fetch("tone", 1, tmp_path / "got")
    assert verify_folder(tmp_path / "got") == version.manifest
    assert read_adapter(tmp_path / "got", base.config).modules
    assert bucket.asked == ["download?presigned=true"]
    found = json.loads(client._request("GET", "/adapters/tone/versions/1/download?presigned=true").content)
    sizes = {file["name"]: file["nbytes"] for file in found["files"]}
    assert sizes == {path.name: path.stat().st_size for path in (tmp_path / "got").iterdir()}
    assert list(sizes.values()) == sorted(sizes.values())
    for file in found["files"]:
        query = parse_qs(urlsplit(file["url"]).query)
        assert query["X-Amz-Expires"] == ["300"]
        assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]

    blob = store.keys_of(version.manifest.files["adapter_config.json"])[0]
    store.objects.delete(blob)
    store.objects.put_if_absent(blob, b"{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json differs from its SHA-256"):
        client.fetch("tone", 1, tmp_path / "changed")
    store.objects.delete(blob)
    with pytest.raises(IntegrityError, match="is missing from the store"):
        client.fetch("tone", 1, tmp_path / "missing")
    assert not [path for path in tmp_path.iterdir() if path.name in ("changed", "missing") or path.name[0] == "."]


def test_a_bucket_that_only_the_server_reaches(
    bucket: Bucket,
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, store = tiny_base(), bucket.services.store
    version = import_folder(peft_folder(base), base, Destination("tone", store, bucket.catalog))
    client = CatalogClient("http://test", transport=bucket.transport)
    monkeypatch.setattr(type(store.objects), "presigned", lambda self, key, expires_s: "http://127.0.0.1:1/x")
    client.fetch("tone", 1, tmp_path / "got")
    assert verify_folder(tmp_path / "got") == version.manifest
    assert bucket.asked == ["download?presigned=true", "download?format=peft"]


def test_names_of_files_are_plain(tmp_path: Path) -> None:
    for name in ("../x", "/etc/x", ".bashrc", "", "a/b"):
        file = catalog.PresignedFileResource(name=name, sha256="0" * 64, nbytes=1, url="http://127.0.0.1:1")
        with pytest.raises(IntegrityError, match="not a plain one"):
            catalog._read_from_store(file, tmp_path)
