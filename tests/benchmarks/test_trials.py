"""The trials of a cluster: what clients note of answers, and the verdicts."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster.trace import Asked
from benchmarks.cluster.trials import flood, store
from benchmarks.cluster.trials.__main__ import main
from benchmarks.cluster.trials.client import Answer, Client, read
from benchmarks.cluster.trials.flooder import Flood, Told, flooding
from benchmarks.cluster.trials.tails import Tail
from benchmarks.processes import real_time
from benchmarks.serving.systems.client import Received

REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\ncontent-length: 4\r\n\r\nbusy"


def stream(*events: dict[str, Any]) -> bytes:
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + body


TOKEN = {"choices": [{"text": "a", "finish_reason": None}]}
END = {"choices": [{"text": "b", "finish_reason": "length"}]}
WHOLE = stream(TOKEN, END)


def came(data: bytes, at: float = 12.0) -> Answer:
    answer = Answer(1.0, "a")
    read(Received([(at, data)] if data else []), answer, began=10.0)
    return answer


def test_a_whole_answer_has_the_times_of_its_first_token_and_its_end() -> None:
    answer = came(WHOLE)
    assert (answer.status, answer.error) == (200, "")
    assert answer.ttft == answer.seconds == pytest.approx(1.0)


def test_what_is_no_whole_answer_says_why() -> None:
    refused = came(REFUSAL)
    assert (refused.status, refused.retry_after_s, refused.seconds) == (503, 2.0, pytest.approx(1.0))
    assert "busy" in refused.error
    assert came(stream(TOKEN)).error == "the stream ended before its last event"
    assert "stopped" in came(stream(TOKEN, {"error": {"message": "stopped"}})).error
    assert came(b"").error == "the server closed the connection"
    assert math.isnan(came(b"").ttft)


@asynccontextmanager
async def served(*answers: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """The port of a server whose last answer repeats, and the requests that have come."""
    left, seen = list(answers), list[bytes]()
    handlers: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.create_task(handle(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], seen
        await asyncio.sleep(0.1)  # connections that were made last are accepted
        await asyncio.gather(*handlers)


def test_an_open_loop_sends_each_and_names_the_key() -> None:
    async def run() -> tuple[list[Answer], list[bytes]]:
        async with served(REFUSAL, WHOLE) as (port, seen):
            client = Client(port, "sk")
            asked = [Asked(0.0, 0, 3, 2), Asked(0.05, 1, 3, 2)]
            return await client.open_loop(["a", "b"], asked, [[1, 2, 3], [4, 5, 6]]), seen

    answers, seen = asyncio.run(run())
    assert sorted(a.status for a in answers) == [200, 503]
    assert [a.model for a in answers] == ["a", "b"]
    assert all(b"Authorization: Bearer sk" in head for head in seen)


def test_a_flood_goes_on_until_its_block_ends_and_tells_what_came() -> None:
    async def run() -> Told:
        async with served(REFUSAL.replace(b"503", b"429").replace(b": 2", b": 0"), WHOLE) as (port, seen):
            with flooding(Flood(port, "sk", ["a"], at_once=2, num_prompt=3, num_output=2)) as told:
                while len(seen) < 8:
                    await asyncio.sleep(0.01)
            return told

    told = asyncio.run(run())
    assert told.num_refused == 1
    assert told.num_answered >= 4
    assert told.seconds > 0
    assert 0 < told.cores < 2


def answers(num: int, ttft: float, **fields: Any) -> list[Answer]:
    return [Answer(float(i), "a", 200, first=i + ttft, last=i + ttft + 1, **fields) for i in range(num)]


def test_a_tail_counts_what_failed_apart() -> None:
    tail = Tail.of([*answers(9, 0.1), Answer(0.0, "a", 503, error="away")])
    assert (tail.num, tail.num_failed) == (10, 1)
    assert (tail.p50_s, tail.p99_s) == pytest.approx((0.1, 0.1))


def missed(verdicts: list[tuple[str, bool]]) -> list[str]:
    return [text for text, reached in verdicts if not reached]


def away(**fields: Any) -> store.Found:
    refused = [Answer(0.0, "c", 503, last=0.2, retry_after_s=1.0, error="away")]
    defaults: dict[str, Any] = {
        "before": Tail(10, 0, 0.01, 0.02),
        "during": Tail(10, 0, 0.01, 0.025),
        "refused": refused,
        "return_s": 1.0,
        "back_s": 3.0,
    }
    return store.Found(**defaults | fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ""),
        ({"during": Tail(10, 0, 0.01, 0.027)}, "at most 1.3: 1.35"),
        ({"during": Tail(10, 1, 0.01, 0.02)}, "1 of 20"),
        ({"refused": []}, "0 of 0"),
        ({"refused": [Answer(0.0, "c", 503, last=0.2, error="away")]}, "0 of 1"),
        ({"refused": [Answer(0.0, "c", 503, last=30.0, retry_after_s=1.0, error="away")]}, "30.00 s"),
        ({"back_s": math.inf}, "never"),
    ],
)
def test_what_is_asked_of_a_store_that_is_away(fields: dict[str, Any], said: str) -> None:
    found = missed(away(**fields).verdicts())
    assert (said in found[0]) if said else not found


def test_clients_run_first_where_the_user_may() -> None:
    with real_time() as may:
        assert os.sched_getscheduler(0) == (os.SCHED_RR if may else os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_is_asked_of_a_flood() -> None:
    told = Told({"200": 7, "429": 3}, 40.0, 4.0)
    parts = [
        flood.Part("none", Tail(200, 0, 0.01, 0.02), 1.0, 0.001, Told(), [0.02], []),
        flood.Part("without limits", Tail(200, 2, 0.02, 0.031), 2.0, 0.001, told, [0.02, 0.03], ["429"]),
        flood.Part("within limits", Tail(200, 0, 0.02, 0.029), 1.1, 0.001, told, [], []),
    ]
    found = flood.Found(parts)
    assert [text.split(":")[0] for text in missed(found.verdicts())] == ["without limits"] * 2
    assert found.table()[2].split()[-6:] == ["7", "3", "2.00", "0.10", "1.0", "ms"]
    assert [part["ratio"] for part in found.to_json()["parts"]] == pytest.approx([1.0, 1.55, 1.45])


def test_the_rounds_of_a_part_have_one_tail() -> None:
    failed = Answer(0.0, "a", 503, error="away")
    rounds = [
        flood.Round(answers(150, 0.1), 1.0, 0.002, Told({"200": 5}, 40.0, 4.0)),
        flood.Round([*answers(49, 0.1), *answers(2, 0.3), failed], 1.5, 0.001, Told({"200": 2, "429": 3}, 60.0, 2.0)),
    ]
    part = flood.Part.of("loud", rounds)
    assert (part.tail.num, part.tail.num_failed, part.errors) == (202, 1, ["away"])
    assert (part.tail.p99_s, *part.p99s) == pytest.approx((0.1, 0.1, 0.3))
    assert (part.cores, part.late_s) == (1.25, 0.002)
    assert part.flood == Told({"200": 7, "429": 3}, 100.0, 6.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options",
    [
        ["store", "--adapters", "12", "--seconds", "5"],
        ["flood", "--rounds", "1", "--requests", "20", "--at-once", "60"],
    ],
)
def test_a_short_trial_of_a_real_cluster(options: list[str], tmp_path: Path) -> None:
    """All but times, which a busy machine decides. In a process of its own: Ray reads its token once."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cluster.trials", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode in (0, 1), (done.stdout + done.stderr).decode()
    asked = json.loads(file.read_text())["asked"]
    assert all(reached for text, reached in asked.items() if "p99" not in text), asked


@pytest.mark.parametrize("option", ["--rounds", "--requests", "--replicas"])
def test_a_trial_of_nothing_is_refused_before_anything_starts(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["flood", option, "0"])
    assert f"argument {option}: 0 is below 1" in capsys.readouterr().err
