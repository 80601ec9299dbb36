"""Requests that take long, and many of them: publications, followers of logs. Others find their places and threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import httpx
import pytest
from starlette.types import Message

from loray.errors import Overloaded, RateLimited
from loray.schemas.resources import RECIPE_EXAMPLE
from loray.service import CatalogService
from loray.spec import Principal, TrainSpec
from serve_apps import auth
from serve_apps.api.routes import jobs as job_routes
from serve_apps.auth import KEY_BURST, KEY_RATE, TENANT_BURST, RateLimits
from tests.fixtures.api import Api, _loop

RECIPE = TrainSpec.parse(RECIPE_EXAMPLE, source="the example")
IN_TIME_S = 20.0  # a bound for what takes milliseconds, where nothing holds it up


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def of(tenant: str, key: str | None = None) -> Principal:
    return Principal(tenant=tenant, key_id=key, scopes=frozenset({"publish", "train"}))


# -- publications -----------------------------------------------------------------------------------------------------


def test_a_key_is_revoked_while_publications_have_all_their_places(
    api: Api, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, end = threading.Semaphore(0), threading.Event()

    def publish(*_: object, **__: object) -> None:
        begun.release()
        end.wait()
        raise Overloaded("the test ends")

    monkeypatch.setattr(CatalogService, "register", publish)
    leaked = api.catalog.keys.create("leaked").key
    admin = authorized_admin(api)
    asked = [
        pool.submit(api.http.post, "/adapters/x/versions", json={"upload": "0" * 32}, headers=admin) for _ in range(40)
    ]
    try:
        assert begun.acquire(timeout=IN_TIME_S)
        revoked = pool.submit(api.http.delete, f"/keys/{leaked.id}", headers=admin)
        assert revoked.result(IN_TIME_S).status_code == 200
        refused = wait(asked, IN_TIME_S, FIRST_COMPLETED).done.pop().result()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    finally:
        end.set()


def authorized_admin(api: Api) -> dict[str, str]:
    return {"Authorization": f"Bearer {api.catalog.keys.create('root', scopes=['admin']).secret}"}


# -- logs -------------------------------------------------------------------------------------------------------------


def test_a_key_follows_four_logs_and_a_tenant_sixteen(api: Api, pool: ThreadPoolExecutor) -> None:
    started, ends = threading.Semaphore(0), asyncio.Event()

    async def follow(job_id: str) -> AsyncIterator[str]:
        started.release()
        await ends.wait()
        yield "the end\n"

    api.jobs.follow = follow  # type: ignore[method-assign]
    api.catalog.tenants.create("acme")
    job = api.catalog.view(of("acme")).jobs.add("job-1", name="tone", recipe=RECIPE)
    api.jobs.say(job.id, "RUNNING")
    keys = [api.catalog.keys.create(f"key {i}", tenant="acme", scopes=["train"]) for i in range(5)]
    url, asked = f"/jobs/{job.id}/logs?follow=true", []
    try:
        for key in keys[:4]:
            headers = {"Authorization": f"Bearer {key.secret}"}
            asked += [pool.submit(api.http.get, url, headers=headers) for _ in range(4)]
            for _ in range(4):
                assert started.acquire(timeout=IN_TIME_S)
            refused = api.http.get(url, headers=headers)
            assert (refused.status_code, "followers of logs" in refused.json()["detail"]) == (429, True)
        refused = api.http.get(url, headers={"Authorization": f"Bearer {keys[4].secret}"})
        assert "16 followers of logs are under way for tenant acme" in refused.json()["detail"]
    finally:
        _loop().call_soon_threadsafe(ends.set)
    assert {answer.result(IN_TIME_S).text for answer in asked} == {"the end\n"}
    assert api.http.get(url, headers={"Authorization": f"Bearer {keys[4].secret}"}).status_code == 200


def test_a_log_is_followed_for_an_hour(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow(job_id: str) -> AsyncIterator[str]:
        yield "a line\n"
        await asyncio.Event().wait()

    api.jobs.follow = follow  # type: ignore[method-assign]
    monkeypatch.setattr(job_routes, "LONGEST_FOLLOWED_S", 0.05)
    job = api.catalog.jobs.add("job-1", name="tone", recipe=RECIPE)
    api.jobs.say(job.id, "RUNNING")
    said = api.http.get(f"/jobs/{job.id}/logs?follow=true").text
    assert said == "a line\n… the log goes on; follow it again\n"


def test_a_log_of_any_length_passes_through_in_pieces(api: Api) -> None:
    """Half a gigabyte, of which never more than a few pieces are in memory."""
    sent, most = [0], [0]

    def logs(job_id: str) -> Iterator[str]:
        for _ in range(8192):
            sent[0] += 1
            yield "x" * (64 << 10)

    async def answered(message: Message) -> None:
        received[0] += len(message.get("body", b""))
        most[0] = max(most[0], sent[0] * (64 << 10) - received[0])

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    received = [0]
    api.jobs.logs = logs  # type: ignore[method-assign]
    job = api.catalog.jobs.add("job-1", name="tone", recipe=RECIPE)
    api.jobs.say(job.id, "RUNNING")
    path = f"/api/v1/jobs/{job.id}/logs"
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"host", b"test")], "scheme": "http", "http_version": "1.1"}
    scope |= {"server": ("test", 80), "client": ("127.0.0.1", 1)}
    asyncio.run_coroutine_threadsafe(api.app(scope, receive, answered), _loop()).result(10 * IN_TIME_S)
    assert (received[0], most[0] <= 1 << 20) == (512 << 20, True)


def test_the_last_lines_of_a_log(api: Api) -> None:
    api.jobs.logs = lambda job_id: iter(("a\nb", "\nc\n"))  # type: ignore[method-assign]
    job = api.catalog.jobs.add("job-1", name="tone", recipe=RECIPE)
    api.jobs.say(job.id, "RUNNING")
    assert api.http.get(f"/jobs/{job.id}/logs").text == "a\nb\nc\n"
    assert api.http.get(f"/jobs/{job.id}/logs?tail=2").text == "b\nc\n"
    assert api.http.get(f"/jobs/{job.id}/logs?tail=0").status_code == 422


# -- rates ------------------------------------------------------------------------------------------------------------


def test_rates_of_a_key_and_of_its_tenant() -> None:
    counted = RateLimits()
    for _ in range(int(KEY_BURST)):
        counted.take(of("acme", "key-1"), 0.0)
    with pytest.raises(RateLimited, match="key key-1 may ask 20 times a second") as refused:
        counted.take(of("acme", "key-1_2"), 0.0)  # a rotated key
    assert refused.value.retry_after_s == 1 / KEY_RATE
    for number in range(int(TENANT_BURST - KEY_BURST)):
        counted.take(of("acme", f"other-{number}"), 0.0)
    with pytest.raises(RateLimited, match="tenant acme may ask 200 times a second"):
        counted.take(of("acme", "another"), 0.0)
    counted.take(of("beta", "key-2"), 0.0)
    counted.take(of("acme", "key-1"), 1 / KEY_RATE)
    for principal in (Principal(), Principal(key_id="root")):  # without keys, and an administrator
        for _ in range(1000):
            counted.take(principal, 0.0)


def test_advice_has_a_rate_of_its_own() -> None:
    counted = RateLimits()
    for _ in range(30):
        counted.take_advice(of("acme", "key-1"), 0.0)
    with pytest.raises(RateLimited, match="for advice, key key-1 may ask 30 times a minute") as refused:
        counted.take_advice(of("acme", "key-1_2"), 0.0)
    assert refused.value.retry_after_s == 2.0
    counted.take(of("acme", "key-1"), 0.0)
    counted.take_advice(of("acme", "key-2"), 0.0)
    counted.take_advice(of("acme", "key-1"), 2.0)
    for _ in range(100):
        counted.take_advice(Principal(key_id="root"), 0.0)


def test_a_loop_of_plans_and_recommendations_is_slowed_down(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "ADVICE_RATE", 0.001)
    monkeypatch.setattr(auth, "ADVICE_BURST", 2.0)
    api.catalog.tenants.create("acme")
    secret = api.catalog.keys.create("x", tenant="acme", scopes=["infer", "train"]).secret
    key = {"Authorization": f"Bearer {secret}"}
    form = key | {"Content-Type": "application/x-www-form-urlencoded"}
    recipe = {"name": "tone", "data.train": "/rows.jsonl", "base": "nothing"}

    def answers() -> list[httpx.Response]:
        return [
            api.http.get("/recommend?context_length=2048&num_tasks=9", headers=key),
            api.http.post("/console/jobs/plan", data=recipe, headers=form),
        ]

    assert not any("for advice, key" in answer.text for answer in answers())
    refused = answers()
    assert [answer.status_code for answer in refused] == [429, 200]  # the last shows it where a plan would be
    assert all("for advice, key" in answer.text for answer in refused)
    assert api.http.get("/adapters", headers=key).status_code == 200


def test_buckets_that_are_full_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_KEPT", 8)
    counted = RateLimits()
    for number in range(100):
        counted.take(of(f"tenant-{number}", f"key-{number}"), 10.0 * number)
    assert len(counted._buckets) <= 8


def test_a_loop_of_requests_is_slowed_down(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "KEY_RATE", 0.25)
    monkeypatch.setattr(auth, "KEY_BURST", 3.0)
    api.catalog.tenants.create("acme")
    key = {"Authorization": f"Bearer {api.catalog.keys.create('x', tenant='acme', scopes=['publish']).secret}"}
    answers = [api.http.get("/adapters", headers=key) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 3 + [429]
    assert answers[-1].headers["retry-after"] in ("3", "4")
    assert api.http.get("/adapters", headers=authorized_admin(api)).status_code == 200
