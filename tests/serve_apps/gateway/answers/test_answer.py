"""Answers on a connection that the test controls: what is sent and when, and that every stream is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from loray.errors import EngineError
from loray.schemas.openai.formats import CompletionFormat
from loray.spec import Delta, FinishReason, TokenDelta
from serve_apps.gateway.answers.answer import AnswerResponse, ChoiceStream, Deadline
from serve_apps.gateway.answers.writers import WAITING, Events, Whole

FORMAT = CompletionFormat("cmpl-1", 1, "m", "f")


class Client:
    """The server's side of one HTTP connection."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.has_left, self.reads = asyncio.Event(), asyncio.Event()
        self.reads.set()
        self.changed = asyncio.Condition()

    async def receive(self) -> Any:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.messages.append(message)
        async with self.changed:
            self.changed.notify_all()

    async def sent(self, text: str) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: text in self.text)

    @property
    def text(self) -> str:
        return "".join(m["body"].decode() for m in self.messages if m["type"] == "http.response.body")

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}


class Letters:
    """Writes token n as the n-th letter."""

    def push(self, tokens: TokenDelta) -> Delta:
        return Delta("".join(chr(96 + t) for t in tokens.token_ids), tokens.token_ids, None, tokens.finish_reason, 1, 1)


class Engine:
    """Streams whose tokens the test gives. Counts those that are open."""

    def __init__(self) -> None:
        self.num_open = 0
        self.queues: list[asyncio.Queue[Any]] = []

    def stream(self) -> ChoiceStream:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self.queues.append(queue)

        async def tokens() -> AsyncGenerator[TokenDelta, None]:
            self.num_open += 1
            try:
                while True:
                    item = await queue.get()
                    if isinstance(item, Exception):
                        raise item
                    while not queue.empty():  # as replicas do: what was not read in time is one delta
                        more = queue.get_nowait()
                        item = TokenDelta(item.token_ids + more.token_ids, more.finish_reason)
                    yield item
                    if item.finish_reason:
                        return
            finally:
                self.num_open -= 1

        return ChoiceStream(tokens(), Letters())

    def give(self, *token_ids: int, finish: FinishReason | None = None, choice: int = 0) -> None:
        self.queues[choice].put_nowait(TokenDelta(token_ids, finish))


@asynccontextmanager
async def answering(
    *, writer: Any = Events, num_choices: int = 1, timeout_s: float | None = None, heartbeat_s: float | None = None
) -> AsyncIterator[tuple[Engine, Client, asyncio.Task[None]]]:
    """An answer that the test ends. No stream is open afterwards."""
    engine, client = Engine(), Client()
    choices = [engine.stream() for _ in range(num_choices)]
    deadline = None
    if timeout_s is not None:
        deadline = Deadline(asyncio.get_running_loop().time() + timeout_s, timeout_s)
    made = writer(FORMAT, num_choices, num_choices)
    answer = AnswerResponse(choices, made, request_id="id", deadline=deadline, heartbeat_s=heartbeat_s)
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(answer({"type": "http"}, client.receive, client.send))
    async with asyncio.timeout(20):
        yield engine, client, task
        await asyncio.wait([task])
    assert engine.num_open == 0
    if others := asyncio.all_tasks() - before:
        await asyncio.wait(others, timeout=20)
    assert task.cancelled() or task.exception() is None


async def test_events_go_out_one_by_one_and_what_waits_is_merged() -> None:
    async with answering() as (engine, client, _):
        engine.give(1)
        await client.sent('"text":"a"')
        client.reads.clear()  # from here the client reads nothing
        for token in (2, 3, 4, 5):
            engine.give(token)
            for _ in range(10):
                await asyncio.sleep(0)
        client.reads.set()
        engine.give(6, finish="length")
    texts = [e.split('"text":"')[1].split('"')[0] for e in client.text.split("\n\n") if "text" in e]
    assert texts == ["a", "b", "cdef"]
    assert client.text.endswith("data: [DONE]\n\n")
    assert client.headers["x-request-id"] == "id"
    assert client.headers["content-type"].startswith("text/event-stream")
    assert client.messages[-1]["more_body"] is False


@pytest.mark.parametrize("writer", [Events, Whole])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("has_started", [False, True])
async def test_a_client_that_leaves_closes_the_streams(writer: Any, num_choices: int, has_started: bool) -> None:
    async with answering(writer=writer, num_choices=num_choices) as (engine, client, _):
        while engine.num_open < num_choices:
            await asyncio.sleep(0)
        if has_started:
            engine.give(1)
            if writer is Events:
                await client.sent("a")
        client.has_left.set()
    assert ("a" in client.text) == (has_started and writer is Events)
    assert not client.messages or client.messages[-1]["more_body"]


async def test_cancelling_the_request_closes_the_streams() -> None:
    async with answering(num_choices=2) as (engine, client, task):
        while engine.num_open < 2:
            await asyncio.sleep(0)
        task.cancel()
    assert client.messages == []


async def test_choices_are_merged_as_they_come_and_one_error_ends_all() -> None:
    async with answering(num_choices=3) as (engine, client, _):
        engine.give(2, choice=1)
        await client.sent('"index":1,"text":"b"')
        engine.give(1, choice=0)
        await client.sent('"index":0,"text":"a"')
        engine.queues[0].put_nowait(EngineError("lost"))
    assert client.text.count("data: ") == 3
    assert '"message":"lost"' in client.text.split("\n\n")[-2]


async def test_an_error_before_the_first_event_has_its_status() -> None:
    async with answering() as (engine, client, _):
        engine.queues[0].put_nowait(EngineError("lost"))
    assert client.status == 503
    assert client.headers["x-request-id"] == "id"


async def test_heart_beats_while_nothing_comes() -> None:
    async with answering(heartbeat_s=0.01) as (engine, client, _):
        await client.sent(WAITING * 2)
        engine.give(1)
        await client.sent("a")
        await client.sent("}\n\n" + WAITING)
        engine.queues[0].put_nowait(EngineError("lost"))
    assert client.status == 200  # the first heart-beat has fixed it
    assert '"message":"lost"' in client.text
    assert all(line.startswith((":", "data: ")) for line in client.text.split("\n\n")[:-1])


async def test_a_client_that_does_not_read_gets_no_heart_beats() -> None:
    async with answering(heartbeat_s=0.01) as (engine, client, _):
        client.reads.clear()
        engine.give(1)
        await asyncio.sleep(0.05)
        client.reads.set()
        engine.give(2, finish="length")
    assert WAITING not in client.text.partition("data: ")[0]


@pytest.mark.parametrize("writer", [Events, Whole])
@pytest.mark.parametrize("num_choices", [1, 2])
async def test_a_deadline_before_the_first_event(writer: Any, num_choices: int) -> None:
    async with answering(writer=writer, num_choices=num_choices, timeout_s=0.02) as (_, client, task):
        await asyncio.wait([task])
    assert client.status == 504
    assert '"code":"deadline_exceeded"' in client.text
    assert "0.02 s" in client.text


async def test_a_deadline_later_is_the_last_event() -> None:
    async with answering(timeout_s=0.5) as (engine, client, _):
        engine.give(1)
    assert client.status == 200
    assert '"code":"deadline_exceeded"' in client.text.split("\n\n")[-2]
    assert client.messages[-1]["more_body"] is False


async def test_a_deadline_ends_an_answer_that_is_not_read() -> None:
    async with answering(timeout_s=0.5) as (engine, client, _):
        client.reads.clear()
        engine.give(1)
    assert client.messages == []
