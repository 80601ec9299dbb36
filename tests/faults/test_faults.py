"""The faults of `make chaos`: whose fault a request is, what a client may not see, and what lies on the wire."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from tests.faults.__main__ import divided, main
from tests.faults.faults import Fault, lose_gcs
from tests.faults.load import Load, Resumes, Seen
from tests.faults.requests import Answer, Kind, make_kinds
from tests.faults.verdicts import Window, continued, divide, failures, left_behind, table
from tests.faults.world import Wire, World, until


def fault(**fields: Any) -> Fault:
    return Fault("a fault", lambda world: lambda: None, 0, **({"limit_s": 10.0} | fields))


def seen(ended: float, **fields: Any) -> Seen:
    return Seen(**({"begun": ended - 1, "ended": ended, "first": ended - 0.5, "end": "whole"} | fields))


def test_a_request_belongs_to_the_last_fault_before_its_end() -> None:
    windows = [Window(fault(), 10.0), Window(fault(), 30.0)]
    divide([seen(9.0), seen(10.5), seen(29.0), seen(31.0, begun=12.0), seen(60.0)], windows)
    assert [[s.ended for s in w.seen] for w in windows] == [[10.5, 29.0], [31.0, 60.0]]
    assert [w.row["under_way"] for w in windows] == [1, 1]
    assert len({len(line) for line in table(windows)}) == 1


@pytest.mark.parametrize(
    ("fields", "cuts", "expected"),
    [
        ({}, False, []),
        ({"wait_s": 10.1, "tries": ["503"]}, False, ["10.1 s without a token, whole; tried 503"]),
        ({"detail": "503", "end": "refused", "tries": ["503"] * 5}, True, ["refused after 5 retries: 503"]),
        ({"end": "wrong", "detail": "choice 0"}, True, ["wrong after 0 retries: choice 0"]),
        ({"end": "cut"}, True, []),
        ({"end": "cut"}, False, ["cut after 0 retries: "]),
    ],
)  # fmt: skip
def test_what_no_client_may_see(fields: dict[str, Any], cuts: bool, expected: list[str]) -> None:
    window = Window(fault(cuts=cuts), 0.0, seen=[seen(5.0, **fields)])
    assert failures([window]) == [f"a fault: {text}" for text in expected]


def test_a_request_from_one_fault_to_the_next_may_see_what_either_allows() -> None:
    long = seen(35.0, begun=12.0, wait_s=20.0, end="cut")
    first, second = Window(fault(cuts=True, limit_s=25.0), 10.0, next_begun=30.0), Window(fault(), 30.0, seen=[long])
    assert failures([first, second]) == []
    first.next_begun = 11.0
    assert len(failures([first, second])) == 2


def test_the_share_of_answers_that_went_on() -> None:
    first, second = Window(fault(), 0.0, resumed=3), Window(fault(), 20.0, resumed=97)
    assert continued([Window(fault(), 0.0)]) is None
    assert failures([Window(fault(loses=True), 0.0, missing="ranks")])[0] == "ranks"
    assert "no answer went on" in failures([Window(fault(loses=True), 0.0)])[0]
    assert continued([first, second]) == 1.0
    second.seen.append(seen(30.0, end="error"))  # counted as resumed, and then it failed
    assert continued([first, second]) == 0.99
    assert failures([first, second]) == []
    second.seen.append(seen(30.0, end="error"))
    assert failures([first, second]) == ["98.0% of the streams that lost their replica went on, of 99%"]


def test_a_gateway_that_ends_or_is_silent_does_not_take_its_resumes_with_it() -> None:
    resumes = Resumes([], "")

    def count(**gateways: int) -> int:
        lines = [f'loray_resumes_total{{base="tiny",reason="lost",gateway="{g}"}} {n}.0' for g, n in gateways.items()]
        return resumes.read("\n".join(["# TYPE loray_resumes_total counter", *lines, 'loray_replicas_wanted{b="t"} 3']))

    assert count(a=2, b=3) == 5
    assert count(b=4) == 6  # a is silent, or has ended
    assert count(a=2, b=4, c=1) == 7  # c has replaced one


def test_two_ranks_get_no_fat_answers() -> None:
    kinds = make_kinds(["tiny"], 300, random.Random(0))
    found = divided(kinds)
    assert list(found) == kinds
    of_two = [kind for kind in kinds if found[kind]]
    assert len(of_two) == 270 // 6
    assert not any(kind.is_fat for kind in of_two)


def test_what_is_left_behind_is_what_no_process_of_its_kind_had_before() -> None:
    before = {"loray gateway a": {"task T": 2}, "loray gateway b": {"task T": 1}, "cluster": {"Replica": 3, "Owner": 1}}
    after = {
        "loray gateway new": {"task T": 2, "requests": 0},
        "parallel gateway a": {"task T": 3, "requests": 1},
        "cluster": {"Replica": 4, "Owner": 1},
    }
    assert left_behind(before, after) == [
        "left behind: parallel gateway a: 3 task T of 2",
        "left behind: parallel gateway a: 1 requests of 0",
        "left behind: cluster: 4 Replica of 3",
    ]


Handler = Callable[[Any, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def served(answer: Handler) -> AsyncIterator[str]:
    """The URL of a server that answers the body of each request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
        await answer(json.loads(await reader.readexactly(int(length))), writer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(("other", "num_begun"), [("late", 2), ("refused", 1)])
def test_streams_begin_together(other: str, num_begun: int) -> None:
    """Unless one has ended before another begins: then nothing is waited for."""
    kinds = [Kind("/v1/completions", {"name": name}) for name in ("long", other)]

    async def run() -> None:
        has_begun, go_on = asyncio.Event(), asyncio.Event()

        async def answer(body: Any, writer: asyncio.StreamWriter) -> None:
            if body["name"] != "long":
                await has_begun.wait()
            if body["name"] == "refused":
                writer.write(b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n")
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            writer.write(b'data: {"id": 1, "choices": []}\n\n')
            has_begun.set()
            await go_on.wait()
            writer.write(b"data: [DONE]\n\n")

        async with served(answer) as url:
            load = Load("k", dict.fromkeys(kinds, url), kinds, dict.fromkeys(kinds, Answer()))
            assert await load.begin(kinds, 10) == load.num_running == num_begun
            go_on.set()
            await load.run(1, 0, lambda: True)
        assert sorted(s.end for s in load.seen) == ["whole" if num_begun == 2 else "refused", "whole"]

    asyncio.run(run())


def test_a_request_that_is_made_again_says_when_and_why() -> None:
    kind = Kind("/v1/completions", {})
    answers = [b"503 Busy\r\nRetry-After: 0.001", b"400 Bad"]

    async def answer(body: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + answers.pop(0) + b"\r\nContent-Length: 0\r\n\r\n")

    async def run() -> Seen:
        async with served(answer) as url:
            load = Load("k", {kind: url}, [kind])
            await load.begin([kind], 10)
            await load.run(1, 0, lambda: True)
        return load.seen[0]

    one = asyncio.run(run())
    assert one.end == "refused"
    (tried,) = one.tries
    assert re.fullmatch(r"0\.\d to \d\.\d s: 503 b''", tried)


def test_a_wire_carries_is_slow_and_refuses_as_its_server_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire = Wire(server.getsockname()[1])
        threading.Thread(target=_echo, args=(server,), daemon=True).start()
        with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as client:
            _ask(client)
            wire.delay_s = 0.1
            assert _ask(client) >= 0.2  # there and back
    with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as client, suppress(ConnectionError):
        assert client.recv(1) == b""
    wire.close()


def _echo(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(100):
            connection.sendall(data)


def _ask(client: socket.socket) -> float:
    begun = time.monotonic()
    client.sendall(b"hello")
    assert client.recv(100) == b"hello"
    return time.monotonic() - begun


def test_the_dashboard_stands_still_until_the_gcs_listens_again(tmp_path: Path) -> None:
    gcs, head, dashboard = (subprocess.Popen(["sleep", "60"]) for _ in range(3))
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:
        local = SimpleNamespace(pid=head.pid, gcs_address=f"127.0.0.1:{server.getsockname()[1]}")
        world = SimpleNamespace(gcs=gcs, local=local, folder=tmp_path, pids=lambda title: [dashboard.pid])
        for process in (gcs, head, dashboard):
            stack.callback(process.wait)
            stack.callback(process.kill)
        until(lambda: psutil.Process(gcs.pid).cmdline() != [], "the GCS has a command line", 10)
        repair = lose_gcs(cast("World", world))
        until(lambda: psutil.Process(dashboard.pid).status() == psutil.STATUS_STOPPED, "the dashboard stands", 10)
        repair()
        stack.callback(world.gcs.wait)
        stack.callback(world.gcs.kill)
        assert world.gcs is not gcs
        until(lambda: psutil.Process(dashboard.pid).status() != psutil.STATUS_STOPPED, "the dashboard goes on", 10)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_of_a_real_cluster() -> None:
    """In a process of its own: Ray reads its token once."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults", "--minutes", "0.7", "--adapters", "12"]
    done = subprocess.run([*command, "--only", "replica, kill", "--only", "S3, kill"], capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    assert "passed" in said


def test_the_names_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) >= 19
    assert main(["--only", "no such fault"]) == 2
    assert capsys.readouterr().err.splitlines()[-len(names) :] == names
