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

from tests.faults.client import Client, Reply
from tests.faults.requests import Answer, Kind, difference, read, undisturbed

MAX_RETRIES = 5
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_LOOK_S = 0.02
_METRICS_S = 20.0
_RESUMES = "loray_resumes_total{"

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
    end: End = "refused"
    detail: str = ""
    tries: list[str] = field(default_factory=list)


@dataclass
class Load:
    """`urls`: of the application that each kind is for. `usual`: the kinds of those at a constant rate. `seen`: of
    requests that have ended.
    """

    key: str
    urls: Mapping[Kind, str]
    usual: Sequence[Kind]
    references: dict[Kind, Answer] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    num_running: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _free: dict[str, list[Client]] = field(default_factory=dict)  # connections that are used again

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def learn(self) -> None:
        """Asks for each kind once, undisturbed: its answers later must be the same."""
        for url in dict.fromkeys(self.urls.values()):
            self.references |= await undisturbed(url, [k for k, of in self.urls.items() if of == url], self.headers)

    async def run(self, per_second: float, seed: int, is_over: Callable[[], bool]) -> None:
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
            self._ask(kind, stream=chance.random() < 0.6)
        await asyncio.gather(*self._tasks)
        for free in self._free.values():
            while free:
                free.pop().close()

    async def begin(self, kinds: Sequence[Kind], timeout_s: float) -> int:
        """Streams of these kinds, all at once. Waits until each has its first token, or one has ended. Returns how many
        have begun and go on.
        """
        seen = [self._ask(kind, stream=True) for kind in kinds]
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(s.first is None for s in seen) and not any(s.ended for s in seen):
                    await asyncio.sleep(_LOOK_S)
        return sum(s.first is not None and not s.ended for s in seen)

    def _ask(self, kind: Kind, *, stream: bool) -> Seen:
        seen = Seen(time.monotonic())
        task = asyncio.create_task(self._request(kind, seen, stream=stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return seen

    async def _request(self, kind: Kind, seen: Seen, *, stream: bool) -> None:
        pause_s = _FIRST_PAUSE_S
        self.num_running += 1
        try:
            while True:
                tried = time.monotonic()
                again = await self._try(kind, seen, stream=stream)
                if again is None or len(seen.tries) == MAX_RETRIES:
                    return
                now = time.monotonic()
                seen.tries.append(f"{tried - seen.begun:.1f} to {now - seen.begun:.1f} s: {seen.detail}")
                await asyncio.sleep(again or pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self.num_running -= 1
            seen.ended = time.monotonic()
            seen.wait_s = max(seen.wait_s, (seen.first or seen.ended) - seen.begun)
            self.seen.append(seen)

    async def _try(self, kind: Kind, seen: Seen, *, stream: bool) -> float | None:
        """Seconds after which to try again, 0 where the server says none; None: the request has ended."""
        last: float | None = None

        def came(reply: Reply, data: bytes) -> None:
            nonlocal last
            if reply.status == 200 and (not stream or b'data: {"id"' in data):  # no comment, no error
                now = time.monotonic()
                seen.first = seen.first or now
                seen.wait_s = max(seen.wait_s, now - (last or now))
                last = now

        free = self._free.setdefault(self.urls[kind], [])
        client = free.pop() if free else Client(self.urls[kind])
        body = json.dumps(kind.body | {"stream": stream}).encode()
        reply = await client.ask(kind.path, self.headers, body, on_data=came)
        free.append(client)
        if reply.end != "whole":
            seen.end, seen.detail = "cut" if seen.first is not None and stream else "refused", reply.why
            return None if seen.end == "cut" else 0.0
        if reply.status != 200:
            seen.end, seen.detail = "refused", f"{reply.status} {reply.body[:300]!r}"
            return float(reply.headers.get("retry-after", 0)) if reply.status in _RETRIED else None
        self._judge(kind, reply, seen)
        return 0.0 if seen.end == "error" and seen.first is None else None

    def _judge(self, kind: Kind, reply: Reply, seen: Seen) -> None:
        try:
            answer = read(reply)
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


class Resumes:
    """Answers that went on at another replica, as all gateways have counted them.

    A gateway's count ends with it, and one that does not answer in time is left out of an exposition. So the largest
    count of each gateway is kept.
    """

    def __init__(self, urls: Sequence[str], key: str) -> None:
        """`urls`: of the applications."""
        self._urls, self._headers = urls, {"Authorization": f"Bearer {key}"}
        self._most: dict[str, float] = {}

    def read(self, exposition: str) -> int:
        """How many there have been by now. In Prometheus' text format a series is one gateway's."""
        for line in exposition.splitlines():
            if line.startswith(_RESUMES):
                series, _, count = line.rpartition(" ")
                self._most[series] = max(float(count), self._most.get(series, 0.0))
        return int(sum(self._most.values()))

    async def ask(self) -> int:
        """How many there have been by now. One application that does not answer counts as before."""
        text = ""
        async with httpx.AsyncClient(headers=self._headers, timeout=_METRICS_S) as client:
            for url in self._urls:
                with suppress(httpx.TransportError):
                    response = await client.get(f"{url}/metrics")
                    if not response.is_server_error:
                        text += response.raise_for_status().text + "\n"
        return self.read(text)
