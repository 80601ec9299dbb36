"""Requests over HTTP at their times, or so many at once, and what each of them was answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster.trace import Asked, random_prompts
from benchmarks.serving.systems.client import Received, ask, read_events

HUNG_S = 60.0  # after which a client gives up
_NAN = float("nan")
_WARMING_RATE, _WARMING_PROMPT = 20.0, 8


@dataclass(slots=True)
class Answer:
    """One request. Times are seconds after the start of its part.

    at      when it was due; what it was sent later counts as latency
    status  HTTP's; 0: none came
    first, last    when its first token and its last byte came
    retry_after_s  what a refusal says, in milliseconds if it does; NaN: nothing
    error   why it is not a whole answer; empty: it is
    """

    at: float
    model: str
    status: int = 0
    first: float = _NAN
    last: float = _NAN
    retry_after_s: float = _NAN
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.at

    @property
    def seconds(self) -> float:
        """Until its end."""
        return self.last - self.at


@dataclass(frozen=True, slots=True)
class Client:
    """Of the endpoint at `port` of this machine, with a key or, where it is empty, without."""

    port: int
    key: str = ""

    async def open_loop(
        self, models: Sequence[str], asked: Sequence[Asked], prompts: Sequence[Sequence[int]]
    ) -> list[Answer]:
        """Sends each at its time, whoever still waits. `models`: by the requests' number of an adapter. `prompts` are
        made beforehand, see `random_prompts`: that takes long enough to hold up others of the same event loop.
        """
        began = time.perf_counter()

        async def one(request: Asked, prompt: Sequence[int]) -> Answer:
            await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - began)))
            return await self.ask(models[request.adapter], prompt, request.num_output, began, request.at)

        return await asyncio.gather(*(one(*pair) for pair in zip(asked, prompts, strict=True)))

    async def warm(self, models: Sequence[str]) -> None:
        """Asks each for one token, 20 a second. SystemExit where one does not answer."""
        asked = [Asked(i / _WARMING_RATE, i, _WARMING_PROMPT, 1) for i in range(len(models))]
        answers = await self.open_loop(models, asked, random_prompts(asked, "each"))
        if failed := [answer.error for answer in answers if answer.error]:
            raise SystemExit(f"{len(failed)} adapters could not be loaded: {failed[0]}")

    async def ask(
        self, model: str, prompt: Sequence[int], num_output: int, began: float, at: float | None = None
    ) -> Answer:
        """`began`: of time.perf_counter(), when the part began; `at`: when it was due, by default now."""
        answer = Answer(time.perf_counter() - began if at is None else at, model)
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": num_output}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        try:
            async with asyncio.timeout(HUNG_S):
                received = await ask(self.port, "/v1/completions", body, self._headers)
            read(received, answer, began)
        except TimeoutError:
            answer.error, answer.last = f"no end within {HUNG_S:.0f} s", time.perf_counter() - began
        except OSError as e:
            answer.error, answer.last = repr(e), time.perf_counter() - began
        return answer

    @property
    def _headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def read(received: Received, answer: Answer, began: float) -> None:
    """Writes down in `answer` what has come."""
    if not received.parts:
        answer.error, answer.last = "the server closed the connection", time.perf_counter() - began
        return
    answer.last = received.parts[-1][0] - began
    head = b"".join(data for _, data in received.parts).partition(b"\r\n\r\n")[0].decode("latin-1")
    status, *lines = head.split("\r\n")
    answer.status = int(status.split()[1])
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "retry-after" and math.isnan(answer.retry_after_s):
            answer.retry_after_s = float(value)
        elif name.lower() == "retry-after-ms":  # OpenAI's client prefers it
            answer.retry_after_s = float(value) / 1000
    try:
        events = [(at, choice) for at, event in read_events(received) for choice in event["choices"]]
    except (RuntimeError, ValueError) as e:
        answer.error = str(e)
        return
    if events:
        answer.first = events[0][0] - began
    if not events or not events[-1][1].get("finish_reason"):
        answer.error = "the stream ended before its last event"
