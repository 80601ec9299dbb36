"""Requests over HTTP at their times, whoever still waits; and what came of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cluster.trace import Asked, random_prompts
from benchmarks.processes import real_time
from benchmarks.serving.systems.client import Received, ask, read_events
from serve_apps.python_gc import freeze_garbage

_NAN = float("nan")


@dataclass(slots=True)
class Seen:
    """One request. Times are seconds after the start of its part.

    at      when it was due; what it was sent later counts as latency
    routed  when a replica had accepted it
    loads   the requests on each replica when its own was chosen, itself included, as loray's router knew them; `load`:
            on its own
    """

    at: float
    adapter: int
    num_prompt: int
    num_output: int
    probe: bool = False
    first: float = _NAN
    last: float = _NAN
    routed: float = _NAN
    replica: str = ""
    loads: tuple[int, ...] = ()
    load: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.at


class Placement(NamedTuple):
    """`at`: seconds of time.perf_counter(), which all processes of a machine share."""

    at: float
    replica: str
    loads: dict[str, int]


def send(port: int, names: Sequence[str], asked: Sequence[Asked], part: str, record: Path) -> list[Seen]:
    """One part of the trace. `names` are the adapters'; `record` is the file that the router writes."""
    began, found = answered(port, names, asked, part)
    placements = read_placements(record, part)
    for index, seen in enumerate(found):
        place(seen, placements.get(index), began)
    return found


def answered(port: int, names: Sequence[str], asked: Sequence[Asked], part: str) -> tuple[float, list[Seen]]:
    """When it began, in seconds of time.perf_counter(), and what came of the requests, without their replicas."""
    freeze_garbage()  # a collection would hold up the client
    with real_time():
        began, answers = asyncio.run(_open_loop(port, names, asked, part))
    found = []
    for one, answer in zip(asked, answers, strict=True):
        seen = Seen(*one)
        try:
            times = _times(answer)
            seen.first, seen.last = times[0] - began, times[-1] - began
        except (OSError, RuntimeError, ValueError) as e:
            seen.error = f"{type(e).__name__}: {e}"
        found.append(seen)
    return began, found


def place(seen: Seen, where: Placement | None, began: float) -> None:
    """Takes over what the router wrote down of the request. An answer of an unknown replica is an error."""
    if where is None:
        seen.error = seen.error or "the router wrote down no replica for it"
        return
    seen.routed, seen.replica = where.at - began, where.replica
    seen.loads, seen.load = tuple(where.loads.values()), where.loads.get(where.replica, 0)


def read_placements(record: Path, part: str) -> dict[int, Placement]:
    """By the request's number in its part. The last counts where one was tried again."""
    found = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        name, at, replica, loads = json.loads(line)
        kind, _, number = name.partition(".")
        if kind == part:
            found[int(number)] = Placement(at, replica, loads)
    return found


async def _open_loop(
    port: int, names: Sequence[str], asked: Sequence[Asked], part: str
) -> tuple[float, list[Received | Exception]]:
    """When it began, in seconds of time.perf_counter(), and the answers, unread."""

    async def one(index: int, request: Asked, prompt: list[int]) -> Received:
        body: dict[str, Any] = {
            "model": names[request.adapter],
            "prompt": prompt,
            "max_tokens": request.num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - began)))
        return await ask(port, "/v1/completions", body, {"X-Request-Id": f"{part}.{index}"})

    prompts = random_prompts(asked, part)
    began = time.perf_counter()
    tasks = [one(index, request, prompt) for index, (request, prompt) in enumerate(zip(asked, prompts, strict=True))]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return began, [_not_base(answer) for answer in answers]


def _not_base(answer: Received | BaseException) -> Received | Exception:
    if isinstance(answer, BaseException) and not isinstance(answer, Exception):
        raise answer
    return answer


def _times(answer: Received | Exception) -> list[float]:
    """Of its tokens' events. RuntimeError where there is none or its end is missing."""
    if isinstance(answer, Exception):
        raise answer
    events = [(at, choice) for at, event in read_events(answer) for choice in event["choices"]]
    if not events or not events[-1][1].get("finish_reason"):
        raise RuntimeError("the stream ended before its last event")
    return [at for at, _ in events]
