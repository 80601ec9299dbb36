"""Clients at a constant rate, who wait for nobody, and streams that begin together. Each behaves as OpenAI's client:
what was refused before it began is tried again, after as long as the server says.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import httpx

from tests.serve_apps.chaos.answers import Answer, difference, read
from tests.serve_apps.chaos.kinds import Kind

MAX_RETRIES = 5
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_TIMEOUT_S = 120.0
_LOOK_S = 0.02

End = Literal["whole", "cut", "error", "refused", "wrong"]


@dataclass(slots=True)
class Seen:
    """What one client saw of one request. Seconds of `time.monotonic`.

    cut      its connection ended after the first token; `error`: so did its stream, with an event that says why
    refused  no answer after all retries; `detail`: the last reason
    wait_s   the longest time without a token, or until the first one
    tries    those that were made again: from when to when, in seconds after `begun`, and why
    """

    begun: float
    ended: float = 0.0
    first: float | None = None
    wait_s: float = 0.0
    num_retries: int = 0
    end: End = "refused"
    detail: str = ""
    tries: list[str] = field(default_factory=list)


@dataclass
class Load:
    """`prefixes`: of the application that each kind is for. `usual`: the kinds of those at a constant rate. `seen`: of
    requests that have ended.
    """

    url: str
    key: str
    prefixes: Mapping[Kind, str]
    usual: Sequence[Kind]
    references: dict[Kind, Answer] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    num_running: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def learn(self) -> None:
        """Asks for each kind once, undisturbed: its answers later must be the same."""
        async with self.client() as client:
            for kind in self.prefixes:
                response = await client.post(self._path(kind), json=kind.body)
                assert response.status_code == 200, response.text
                self.references[kind] = read(response.content, response.headers["content-type"], kind)

    async def run(self, client: httpx.AsyncClient, per_second: float, seed: int, is_over: Callable[[], bool]) -> None:
        """Requests of the usual kinds, the first ones most often (a power law), at random times, until `is_over`; then
        waits until all have ended.
        """
        chance = random.Random(seed)
        weights = [1 / (1 + rank) for rank in range(len(self.usual))]
        due = time.monotonic()
        while not is_over():
            due += chance.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            (kind,) = chance.choices(self.usual, weights)
            self._ask(client, kind, stream=chance.random() < 0.6)
        await asyncio.gather(*self._tasks)

    async def begin(self, client: httpx.AsyncClient, kinds: Sequence[Kind], timeout_s: float) -> int:
        """Streams of these kinds, all at once. Waits until each has its first token, or one has ended. Returns how many
        have begun and go on.
        """
        seen = [self._ask(client, kind, stream=True) for kind in kinds]
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(s.first is None for s in seen) and not any(s.ended for s in seen):
                    await asyncio.sleep(_LOOK_S)
        return sum(s.first is not None and not s.ended for s in seen)

    def _ask(self, client: httpx.AsyncClient, kind: Kind, *, stream: bool) -> Seen:
        seen = Seen(time.monotonic())
        task = asyncio.create_task(self._request(client, kind, seen, stream=stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return seen

    async def _request(self, client: httpx.AsyncClient, kind: Kind, seen: Seen, *, stream: bool) -> None:
        pause_s = _FIRST_PAUSE_S
        self.num_running += 1
        try:
            while True:
                tried = time.monotonic()
                again = await self._try(client, kind, seen, stream=stream)
                if again is None or seen.num_retries == MAX_RETRIES:
                    return
                seen.num_retries += 1
                now = time.monotonic()
                seen.tries.append(f"{tried - seen.begun:.1f} to {now - seen.begun:.1f} s: {seen.detail}")
                await asyncio.sleep(again or pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self.num_running -= 1
            seen.ended = time.monotonic()
            seen.wait_s = max(seen.wait_s, (seen.first or seen.ended) - seen.begun)
            self.seen.append(seen)

    async def _try(self, client: httpx.AsyncClient, kind: Kind, seen: Seen, *, stream: bool) -> float | None:
        """Seconds after which to try again, 0 where the server says none; None: the request has ended."""
        body, last = bytearray(), None
        try:
            async with client.stream("POST", self._path(kind), json=kind.body | {"stream": stream}) as response:
                async for chunk in response.aiter_raw():
                    now = time.monotonic()
                    if response.status_code == 200 and (not stream or b'data: {"id"' in chunk):  # no comment, no error
                        seen.first = seen.first or now
                        seen.wait_s = max(seen.wait_s, now - (last or now))
                        last = now
                    body += chunk
        except httpx.HTTPError as e:
            seen.end, seen.detail = ("cut", repr(e)) if seen.first is not None and stream else ("refused", repr(e))
            return None if seen.end == "cut" else 0.0
        if response.status_code != 200:
            seen.end, seen.detail = "refused", f"{response.status_code} {bytes(body[:300])!r}"
            return float(response.headers.get("Retry-After", 0)) if response.status_code in _RETRIED else None
        self._judge(kind, bytes(body), response.headers["content-type"], seen)
        if seen.end == "error" and seen.first is None:
            return 0.0
        return None

    def _judge(self, kind: Kind, body: bytes, content_type: str, seen: Seen) -> None:
        try:
            answer = read(body, content_type, kind)
            different = difference(answer, self.references[kind], is_part=answer.error is not None)
        except (AssertionError, ValueError, KeyError) as e:
            different, answer = repr(e), Answer()
        if different is not None:
            seen.end, seen.detail = "wrong", different
        elif answer.error is not None:
            seen.end, seen.detail = "error", json.dumps(answer.error)
        elif not answer.is_done:
            seen.end, seen.detail = "cut", "the stream ended before its last event"
        else:
            seen.end = "whole"

    def _path(self, kind: Kind) -> str:
        return f"{self.url}{self.prefixes[kind]}{kind.path}"

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(headers=headers, timeout=_TIMEOUT_S, limits=limits)
