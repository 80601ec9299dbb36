"""The disk of the API's machine and a tenant's part of the store: what comes is counted before it is written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.types import Message

from loray.bases.registry import BaseModel
from loray.errors import Overloaded
from loray.publishing import Destination, import_folder
from loray.scratch import Scratch
from loray.spec import Limits, Principal
from serve_apps.places import MostPlaces, Places
from tests.fixtures.api import Api, _loop

IN_TIME_S = 20.0


def acme(api: Api, limits: Limits) -> dict[str, str]:
    """Headers of a key of a tenant with these limits."""
    api.catalog.tenants.create("acme", limits)
    return {"Authorization": f"Bearer {api.catalog.keys.create('x', tenant='acme', scopes=['publish']).secret}"}


# -- what a tenant stores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_bytes", "status"), [(799, 200), (800, 200), (801, 403)])
def test_files_are_counted_with_what_is_stored_and_with_other_uploads(api: Api, num_bytes: int, status: int) -> None:
    key = acme(api, Limits(max_stored_bytes=1000))
    first, second = (api.http.post("/uploads", headers=key).json()["id"] for _ in range(2))
    assert api.http.put(f"/uploads/{first}/files/README.md", content=b"x" * 200, headers=key).status_code == 200
    answer = api.http.put(f"/uploads/{second}/files/README.md", content=b"x" * num_bytes, headers=key)
    assert answer.status_code == status
    assert [f["nbytes"] for f in api.http.get(f"/uploads/{second}", headers=key).json()["files"]] == (
        [num_bytes] if status == 200 else []
    )
    again = api.http.put(f"/uploads/{first}/files/README.md", content=b"y" * 199, headers=key)
    assert again.status_code == 200  # which takes the place of the other


def test_a_tenant_publishes_no_more_than_it_may_store(
    api: Api, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    """Also what a job has trained: it fails with the sum, and so does a registration of what others have shared."""
    base = tiny_base()
    api.catalog.bases.add(base.name, base.fingerprint)
    api.catalog.tenants.create("acme", Limits(max_stored_bytes=1000))
    driver = api.catalog.view(Principal(tenant="acme", scopes=frozenset({"publish", "promote", "train"})))
    with pytest.raises(Exception, match=r"tenant acme stores 0 B and would store [\d.]+ kB more; max_stored_bytes"):
        import_folder(peft_folder(base), base, Destination("tone", api.services.store, driver))
    assert tuple(driver.snapshot().models()) == ()


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_a_file_without_a_length_is_refused(api: Api) -> None:
    upload = api.http.post("/uploads").json()["id"]
    status, read = put(api, upload, [b"x"] * 9, None)
    assert (status, read) == (411, 0)


def test_a_file_has_no_more_bytes_than_it_said(api: Api) -> None:
    """The disk was reserved for those."""
    upload = api.http.post("/uploads").json()["id"]
    assert put(api, upload, [b"x" * 10] * 9, 25) == (413, 3)
    assert api.services.scratch.held("default") == 0


def put(api: Api, upload: str, chunks: list[bytes], length: int | None) -> tuple[int, int]:
    """Status of the answer, and how many chunks were taken, of a body that says to be so long."""
    taken, statuses = 0, []

    async def receive() -> Message:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    async def answered(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    path = f"/api/v1/uploads/{upload}/files/README.md"
    headers = [(b"host", b"test"), *([] if length is None else [(b"content-length", str(length).encode())])]
    scope = {"type": "http", "method": "PUT", "path": path, "headers": headers, "query_string": b"", "scheme": "http"}
    scope |= {"raw_path": path.encode(), "server": ("test", 80), "client": ("127.0.0.1", 1), "http_version": "1.1"}
    asyncio.run_coroutine_threadsafe(api.app(scope, receive, answered), _loop()).result(IN_TIME_S)
    return statuses[0], taken


def test_of_two_files_that_fit_alone_one_waits_for_the_other(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.services.scratch = Scratch(1000)
    upload = api.http.post("/uploads").json()["id"]
    begun, ends = threading.Event(), threading.Event()
    check = api.catalog.adapters.check_stored_bytes.__func__  # type: ignore[attr-defined]

    def slow(*args: object) -> None:
        begun.set()
        ends.wait(IN_TIME_S)
        check(*args)

    monkeypatch.setattr(type(api.catalog.adapters), "check_stored_bytes", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(api.http.put, f"/uploads/{upload}/files/README.md", content=b"x" * 600)
        assert begun.wait(IN_TIME_S)
        refused = api.http.put(f"/uploads/{upload}/files/LICENSE", content=b"x" * 600)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert (
            "600 bytes do not fit on this server's disk (LORAY_SCRATCH_BYTES) beside the 600 of others"
            in refused.json()["detail"]
        )
        ends.set()
        assert first.result(IN_TIME_S).status_code == 200
    assert api.http.put(f"/uploads/{upload}/files/LICENSE", content=b"x" * 600).status_code == 200


@pytest.mark.parametrize("pages", ["", "/console"])
def test_a_download_has_a_place_until_its_client_has_it_or_leaves_and_nothing_of_the_disk(
    api: Api, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], pages: str
) -> None:
    base = tiny_base()
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    path = f"{pages}/adapters/tone/versions/1/download"
    whole = api.http.get(path)
    assert whole.status_code == 200
    held: list[tuple[int, int]] = []
    api.services.scratch = Scratch(0)

    async def leaves(message: Message) -> None:
        if message["type"] == "http.response.body":
            held.append((api.services.scratch.held(), api.services.downloads._taken["tenant default"]))
            raise OSError("the client has left")

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": f"/api/v1{path}", "headers": [(b"host", b"test")]}
    scope |= {"query_string": b"", "raw_path": path.encode(), "scheme": "http", "http_version": "1.1"}
    scope |= {"server": ("test", 80), "client": ("127.0.0.1", 1)}
    with pytest.raises(BaseException, match="left"):
        asyncio.run_coroutine_threadsafe(api.app(scope, receive, leaves), _loop()).result(IN_TIME_S)
    assert held == [(0, 1)]
    assert api.services.downloads._taken == {}
    api.services.downloads = Places("downloads", MostPlaces(total=1, of_tenant=0, wait_s=0.01))
    assert api.http.get(path).status_code == 503


def test_publishing_needs_place_for_two_copies(
    api: Api, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    base = tiny_base()
    upload, folder = api.http.post("/uploads").json()["id"], peft_folder(base)
    for file in folder.iterdir():
        api.http.put(f"/uploads/{upload}/files/{file.name}", content=file.read_bytes())
    api.services.scratch = Scratch(2 * sum(file.stat().st_size for file in folder.iterdir()) - 1)
    refused = api.http.post("/adapters/tone/versions", json={"upload": upload})
    assert (refused.status_code, "LORAY_SCRATCH_BYTES" in refused.json()["detail"]) == (503, True)


def test_a_budget_is_free_again() -> None:
    scratch = Scratch(10)
    with scratch.folder(4, "a") as folder, scratch.reserve(6):
        assert folder.is_dir()
        assert (scratch.held("a"), scratch.held()) == (4, 6)
        with pytest.raises(Overloaded), scratch.reserve(1):
            pass
    with scratch.reserve(10):
        pass
    assert not folder.exists()
    assert Scratch().max_bytes > 0
