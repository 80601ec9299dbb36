"""Ray's job server as a client sees it, with a scripted client of Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from jobs.submission import server as module
from jobs.submission.commands import Submission
from jobs.submission.server import RayJobServer
from loray.errors import ClusterError, ConflictError

JOB = Submission(entrypoint="true", runtime_env={}, metadata={})
LATE = "Request failed with status code 500: No available agent to submit job, please try again later.."


def server_of(**methods: Any) -> RayJobServer:
    server = RayJobServer(lambda: "http://nowhere")
    server._clients["http://nowhere"] = SimpleNamespace(**methods)
    return server


def test_a_job_waits_for_rays_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, waited = [], []

    def submit_job(**fields: Any) -> str:
        asked.append(fields["entrypoint"])
        if len(asked) < 4:
            raise RuntimeError(LATE)
        return "job"

    monkeypatch.setattr(module.time, "sleep", waited.append)
    assert server_of(submit_job=submit_job).submit(JOB) == "job"
    assert (len(asked), len(waited)) == (4, 3)


def test_a_job_that_has_ended_meanwhile_is_not_submitted_and_an_agent_that_never_starts_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def submit_job(**fields: Any) -> str:
        asked.append(fields["submission_id"])
        raise RuntimeError(LATE)

    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with pytest.raises(ConflictError, match="has ended before"):
        server_of(submit_job=submit_job).submit(JOB, "job", lambda: len(asked) < 3)
    assert asked == ["job"] * 3
    monkeypatch.setattr(module, "AGENT_S", -1.0)
    with pytest.raises(ClusterError, match="loray logs cluster"):
        server_of(submit_job=submit_job).submit(JOB)


def test_jobs_are_asked_for_together() -> None:
    listed = [
        SimpleNamespace(submission_id=id, status=SimpleNamespace(value="RUNNING"), message=None)
        for id in ("a", "b", "c", None)
    ]
    found = server_of(list_jobs=lambda: listed).find_all(["a", "c", "gone"])
    assert {id: job.status for id, job in found.items()} == {"a": "RUNNING", "c": "RUNNING"}


def test_a_log_comes_in_pieces_or_its_end_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is asked for all lines, and the pieces are text although they cut a character."""
    asked: list[dict[str, object]] = []
    log = "é\n".encode() * (module.PIECE_BYTES // 3 + 1)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        if request.url.params["submission_id"] == "lost":
            return httpx.Response(500, text="gone")
        return httpx.Response(200, content=iter([log]))

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(module.httpx, "stream", client.stream)
    server = server_of(
        _headers={},
        get_address=lambda: "http://ray",
        get_job_info=lambda job_id: SimpleNamespace(driver_node_id=None if job_id == "new" else "node"),
    )
    pieces = list(server.logs("job"))
    assert ("".join(pieces), max(map(len, pieces)) <= module.PIECE_BYTES, len(pieces)) == (log.decode(), True, 2)
    assert server.tail("job", 2) == log.decode()  # of which Ray sends the end alone
    assert [int(str(params["lines"])) for params in asked] == [-1, 2]
    assert (list(server.logs("new")), server.tail("new", 2)) == ([], "")
    with pytest.raises(ClusterError, match="gone"):
        server.logs("lost")
    client.close()


def test_a_job_that_is_followed_ends_with_all_its_lines_although_rays_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the lines end with: the stream makes each a newline, and the log of bytes has them as they are."""
    log = "first\r\nsecond\rthird\nlast\r\n"
    closed, looks = [], iter(["RUNNING", "RUNNING", "SUCCEEDED"])

    async def stream(job_id: str) -> AsyncIterator[str]:
        try:
            yield "first\nsecond\n"
            await asyncio.Event().wait()
        finally:
            closed.append(job_id)

    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=log.encode())))
    monkeypatch.setattr(module.httpx, "stream", client.stream)
    monkeypatch.setattr(module, "_END_LOOK_S", 0.0)
    job = SimpleNamespace(driver_node_id="node", message=None)
    server = server_of(
        _headers={},
        get_address=lambda: "http://ray",
        get_job_info=lambda _: SimpleNamespace(**vars(job), status=SimpleNamespace(value=next(looks, "SUCCEEDED"))),
        tail_job_logs=stream,
    )

    async def follow() -> list[str]:
        return [piece async for piece in server.follow("job")]

    assert asyncio.run(follow()) == ["first\nsecond\n", "third\nlast\n"]
    assert closed == ["job"]
    client.close()


@pytest.mark.parametrize("error", [None, "the connection was lost"])
def test_what_rays_stream_says_while_a_job_runs_is_passed_on(error: str | None) -> None:
    async def stream(job_id: str) -> AsyncIterator[str]:
        yield "a line\n"
        if error is not None:
            raise RuntimeError(error)

    server = server_of(tail_job_logs=stream)
    pieces = []

    async def follow() -> None:
        async for piece in server.follow("job"):
            pieces.append(piece)

    if error is None:
        asyncio.run(follow())
    else:
        with pytest.raises(RuntimeError, match=error):
            asyncio.run(follow())
    assert pieces == ["a line\n"]
