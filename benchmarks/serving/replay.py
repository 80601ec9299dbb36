"""Send a workload's requests to a system and record when each token arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from benchmarks.serving.workload import TimedRequest

UNKNOWN_ID = -1  # of a token whose id the system does not send
T = TypeVar("T")
Submit = Callable[[int, TimedRequest], AsyncIterator[list[int]]]
Ask = Callable[[int, TimedRequest], Awaitable[T]]
Read = Callable[[T, TimedRequest], Iterable[tuple[float, list[int]]]]


@dataclass(slots=True)
class Record:
    """One request. `sent` and `times`, of each output token, are seconds after the start of the pass.

    In an open loop `sent` is the time at which the request was due, so that a late sending counts as latency.
    """

    sent: float
    adapter: int | None
    num_inputs: int
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


async def replay(requests: Sequence[TimedRequest], at_once: int | None, submit: Submit) -> list[Record]:
    """`submit(index, request)` yields the ids of new tokens as they arrive. An error ends only its request."""

    async def run(index: int, record: Record, began: float) -> None:
        async for ids in submit(index, requests[index]):
            record.times.extend([time.perf_counter() - began] * len(ids))
            record.ids.extend(ids)

    return await _replay(requests, at_once, run)


async def replay_whole(
    requests: Sequence[TimedRequest], at_once: int | None, ask: Ask[T], read: Read[T]
) -> list[Record]:
    """The same with answers that are read when all have come: `ask(index, request)` gives an answer, and
    `read(answer, request)` the ids in it with the values of time.perf_counter() at which they came.
    """
    answers: dict[int, T] = {}
    start = 0.0

    async def run(index: int, record: Record, began: float) -> None:
        nonlocal start
        start = began
        answers[index] = await ask(index, requests[index])

    records = await _replay(requests, at_once, run)
    for index, answer in answers.items():
        record = records[index]
        try:
            for at, ids in read(answer, requests[index]):
                record.times.extend([at - start] * len(ids))
                record.ids.extend(ids)
        except Exception as e:  # noqa: BLE001 - it is the result of this request
            record.error = f"{type(e).__name__}: {e}"
    return records


async def _replay(
    requests: Sequence[TimedRequest], at_once: int | None, run: Callable[[int, Record, float], Awaitable[None]]
) -> list[Record]:
    began = time.perf_counter()
    records: list[Record | None] = [None] * len(requests)

    async def one(i: int) -> None:
        request = requests[i]
        sent = request.at if at_once is None else time.perf_counter() - began
        record = records[i] = Record(sent, request.adapter, len(request.prompt_ids))
        try:
            await run(i, record, began)
        except Exception as e:  # noqa: BLE001 - it is the result of this request
            record.error = f"{type(e).__name__}: {e}"

    if at_once is None:

        async def timed(i: int) -> None:
            await asyncio.sleep(max(0.0, requests[i].at - (time.perf_counter() - began)))
            await one(i)

        await asyncio.gather(*(timed(i) for i in range(len(requests))))
    else:
        todo = iter(range(len(requests)))

        async def loop() -> None:
            for i in todo:
                await one(i)

        await asyncio.gather(*(loop() for _ in range(at_once)))
    assert all(r is not None for r in records)
    return [r for r in records if r is not None]
