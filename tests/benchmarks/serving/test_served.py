"""The benchmark over HTTP: what the client reads, a long prompt among others, processor time, targets."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence

import pytest

from benchmarks.machine import MachineRates
from benchmarks.serving.figures import report, served
from benchmarks.serving.figures.floors import ModelSize
from benchmarks.serving.figures.mixed import MixedFigures, median_of, mixed_figures
from benchmarks.serving.figures.results import Results
from benchmarks.serving.figures.rows import Latencies, Row, median_row
from benchmarks.serving.replay import UNKNOWN_ID, Record
from benchmarks.serving.systems.client import Received, ask, read_body, read_events
from benchmarks.serving.systems.cpu import by_role
from benchmarks.serving.systems.server import OpenAiSession
from benchmarks.serving.workload import MixedLoad, TimedRequest, generate

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    body = {"choices": [{"text": text, "finish_reason": finish}]}
    return f"data: {json.dumps(body)}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def received(*parts: bytes) -> Received:
    """Part i came at second i."""
    return Received([(float(i), data) for i, data in enumerate(parts)])


def test_events_have_the_time_of_their_last_byte() -> None:
    one, two, three = event("a"), event("b"), event("c", "length")
    whole = HEAD + chunk(one) + chunk(b": waiting\n\n" + two + three[:5]) + chunk(three[5:] + b"data: [DONE]\n\n") + END
    expected = ["a", "b", "c"]
    for size in (1, 7, 64, len(whole)):
        parts = [whole[i : i + size] for i in range(0, len(whole), size)]
        events = list(read_events(received(*parts)))
        assert [e["choices"][0]["text"] for _, e in events] == expected
        end = (len(HEAD) + len(chunk(one)) - 2 - 1) // size
        assert events[0][0] == end


def test_a_cut_answer_an_error_and_another_status_are_errors() -> None:
    whole = HEAD + chunk(event("a")) + END
    for cut in (5, len(HEAD) + 3, len(HEAD) + 20):
        with pytest.raises(RuntimeError, match="closed the connection"):
            list(read_events(received(whole[:cut])))
    with pytest.raises(RuntimeError, match="lost"):
        list(read_events(received(HEAD + chunk(b'data: {"error": "lost"}\n\n') + END)))
    with pytest.raises(RuntimeError, match="429: full"):
        list(read_body(received(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull")))


def test_a_session_counts_tokens_streamed_and_whole() -> None:
    """Of a real socket; the server sends two tokens in one event at the end."""
    bodies: list[dict[str, object]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length"))
        body = json.loads(await reader.readexactly(length))
        bodies.append(body | {"tenant": "X-Tenant-Id: t" in head})
        if body["stream"]:
            writer.write(HEAD + chunk(event("a")))
            await writer.drain()
            await asyncio.sleep(0)
            writer.write(chunk(event("b c", "length")) + END)
        else:
            text = json.dumps({"choices": [{"text": "a b c"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        writer.close()

    async def run() -> tuple[list[tuple[float, list[int]]], ...]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            session = OpenAiSession(port, "base", ["x"], None, 0.0, dict)
            requests = [TimedRequest(0.0, None, (1,), 3, "t"), TimedRequest(0.0, 0, (1,), 3, streamed=False)]
            answers = [await session._ask(0, r) for r in requests]
            return tuple(list(session._read(a, r)) for a, r in zip(answers, requests, strict=True))

    streamed, whole = asyncio.run(run())
    assert [len(ids) for _, ids in streamed] == [1, 2]
    assert [ids for _, ids in whole] == [[UNKNOWN_ID] * 3]
    assert [(b["model"], b["stream"], b["tenant"]) for b in bodies] == [("base", True, True), ("x", False, False)]


def test_asking_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match="Connect call failed"):
        asyncio.run(ask(1, "/", {}, {}))


def test_a_mixed_load_is_a_stream_a_long_prompt_and_short_ones_of_two_tenants() -> None:
    load = MixedLoad(100, num_short=4, every_s=0.5, stream_tokens=20)
    requests = generate(load, 512)
    assert [(r.at, len(r.prompt_ids), r.tenant) for r in requests] == [
        (0.0, 64, "c"), (1.0, 100, "a"), (1.5, 3, "a"), (2.0, 3, "b"), (2.5, 3, "a"), (3.0, 3, "b")
    ]  # fmt: skip
    assert [len(r.prompt_ids) for r in generate(MixedLoad(100, alone=True), 512)] == [100]
    assert generate(load, 512, 1) != requests


def records_of(requests: Sequence[TimedRequest], *times: list[float]) -> list[Record]:
    return [Record(r.at, None, len(r.prompt_ids), t, [1] * len(t)) for r, t in zip(requests, times, strict=True)]


def test_mixed_figures_by_hand() -> None:
    """What comes after the long one's first token does not count, nor does a gap before the long one came."""
    requests = generate(MixedLoad(100, num_short=4, every_s=0.5, stream_tokens=20), 512)
    records = records_of(requests, [0.1, 0.9, 1.2, 1.6, 3.0], [2.8], [1.75], [2.6], [2.7], [9.0])
    found = mixed_figures(requests, records)
    assert found is not None
    assert found == pytest.approx(MixedFigures(1.8, 0.25, 0.6, 0.25, 1.4))
    assert median_of([found, found._replace(long=2.0), found._replace(long=9.0)]).long == 2.0
    records[2].error = "refused"
    assert mixed_figures(requests, records) is None
    alone = generate(MixedLoad(100, alone=True), 512)
    only = mixed_figures(alone, records_of(alone, [3.0]))
    assert only is not None
    assert only.long == 3.0
    assert math.isnan(only.gap)


def test_processes_have_roles() -> None:
    found = by_role(
        [
            ("ray::ServeReplica:loray:gateway", 1.0),
            ("ray::ServeReplica:loray:engine-smollm2.generate_to", 5.0),
            ("ray::ServeReplica:loray:engine-smollm2", 5.0),
            ("ray::ServeController.listen_for_change", 2.0),
            ("/x/haproxy -f y", 3.0),
            ("/x/raylet/raylet --a", 4.0),
        ]
    )
    assert found == {"gateway": 1.0, "engine": 10.0, "controller": 2.0, "proxy": 3.0, "ray": 4.0}


def row(case: str, system: str, throughput: float, itl_s: float = 0.012, **more: float) -> Row:
    figures = Latencies(throughput, 100.0, 0.1, 0.2, itl_s, 0.02, 1.0, 0)
    found = median_row(case, system, [(figures, None)], peak_bytes=0, load_before=0.0, start_s=0.0)
    return Row(**{name: getattr(found, name) for name in Row.__dataclass_fields__} | more)


def test_targets_over_http() -> None:
    results = Results({}, MachineRates(1e9, 1e9), ModelSize(1, 1))
    for found in (
        row("base", "loray", 460.0),
        row("base", "loray-beside", 420.0, idle_cores=0.08),
        row("base", "loray-serve", 430.0),
        row("base", "loray-up", 380.0, idle_cores=0.09, cpu_ms={"engine": 4.0, "gateway": 0.1}),
        row("base, whole", "loray-up", 390.0),
        row("one stream", "loray-serve", 80.0, 0.0125),
        row("n=32", "loray-up", 300.0),
        row("n=32", "vllm", 60.0),
    ):
        results.rows[found.case, found.system] = found
    results.mixed["long prompt among others", "loray-up"] = MixedFigures(14.0, 0.3, 0.6, 0.3, 0.1)
    by_name = {v.name: v for v in served.verdicts(results)}
    serve = by_name["base: tokens/s of loray-serve by loray's"]
    assert (serve.reached, serve.is_met) == (pytest.approx(430 / 460), True)
    assert by_name["base: tokens/s of loray-serve by vllm's"].recorded
    assert by_name["base: tokens/s of loray-up by loray-beside's"].reached == pytest.approx(380 / 420)
    assert not by_name["n=32: tokens/s of loray-up by vllm's"].is_met
    assert by_name["base: tokens/s of loray-up, whole by streamed"].is_met
    assert by_name["loray-up: cores when idle"].reached == 0.09
    assert by_name["one stream: ms a token of loray-serve"].is_met
    assert not by_name["long prompt among others: first token of another tenant's short one, s, loray-up"].is_met
    text = report.summary(results, served.verdicts(results))
    assert "loray-up 380.0 tok/s (0.83 of loray, 0.90 of loray-beside)" in text
    assert "base, loray-up: ms of a core for each output token: engine 4.00, gateway 0.10" in text
    assert "longest gap of a stream 100 ms" in text
