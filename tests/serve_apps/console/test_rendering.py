"""Live parts as server-sent events: the part, then what has changed, as long as the key may see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from loray.schemas.status import Status
from loray.spec import OPERATOR
from serve_apps.console.backend import COOKIE
from serve_apps.console.rendering import Streams
from tests.serve_apps.console.site import HTMX, URL, ConsoleSite

STREAM = HTMX | {"Accept": "text/event-stream"}


class FewLooks(Streams):
    """Its streams end after five looks, however long these take."""

    def __init__(self) -> None:
        super().__init__(interval_s=0.01, length_s=600.0)
        self._num_looks = 0

    async def _has_ended(self) -> bool:
        self._num_looks += 1
        return await super()._has_ended() or self._num_looks % 5 == 0


@pytest.fixture
def quick(console: ConsoleSite) -> ConsoleSite:
    console.services.streams = FewLooks()
    return console


def parts(text: str) -> list[str]:
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event.startswith("data: ")]


def test_what_has_changed_is_sent_again(quick: ConsoleSite, monkeypatch: pytest.MonkeyPatch) -> None:
    state, looks = quick.engines.status, 0

    def status() -> Status:
        nonlocal looks
        looks += 1
        found = state()
        return found if looks < 3 else found.model_copy(update={"status": "degraded"})

    monkeypatch.setattr(quick.engines, "status", status)
    answer = quick.http.get(f"{URL}/serving/replicas/r1/live", headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    assert (len(parts(answer.text)), ": the same" in answer.text) == (1, True)  # which does not show it
    answer = quick.http.get(f"{URL}/live", headers=STREAM)
    assert ["Degraded" in part for part in parts(answer.text)][:1] == [True]
    looks = 0
    assert ["Healthy" in part for part in parts(quick.http.get(f"{URL}/live", headers=STREAM).text)] == [True, False]
    plain = quick.http.get(f"{URL}/live", headers=HTMX)
    assert (plain.headers["content-type"], "data: " in plain.text) == ("text/html; charset=utf-8", False)


def test_a_stream_ends_with_its_session(quick: ConsoleSite, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.log_in(quick.key("admin"))
    cookie, state, looks = quick.http.cookies[COOKIE], quick.engines.status, 0
    sessions = quick.unmounted.state.console.sessions

    def status() -> Status:
        nonlocal looks
        looks += 1
        if looks == 2:
            sessions.end(cookie, OPERATOR)
        return state()

    monkeypatch.setattr(quick.engines, "status", status)
    answer = quick.http.get(f"{URL}/live", headers=STREAM)
    assert (answer.status_code, looks) == (200, 2)
    assert quick.http.get(f"{URL}/live", headers=STREAM).status_code == 401


def test_a_server_that_stops_ends_its_streams() -> None:
    streams = Streams(interval_s=60.0, length_s=600.0)

    async def look() -> str:
        return "part"

    async def read(events: AsyncIterator[str]) -> list[str]:
        return [event async for event in events]

    async def stopped() -> list[str]:
        reading = asyncio.ensure_future(read(streams.events("part", look)))
        await asyncio.sleep(0)
        streams.end()
        return await asyncio.wait_for(reading, 5)

    assert asyncio.run(stopped()) == ['data: "part"\n\n']
