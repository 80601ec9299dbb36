"""Random requests by schema: what may not be answered, and a short run against `loray serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.copies import publish_copies
from benchmarks.fuzzing.callers import Callers
from benchmarks.fuzzing.requests import Asked, draw
from benchmarks.fuzzing.sender import Told, problem
from benchmarks.fuzzing.streams import Seen
from benchmarks.fuzzing.trial import Found, Place, Plan, run
from benchmarks.processes import tree
from benchmarks.serving.systems.client import Received
from tests.standalone import standalone

DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "t", "version": "1"},
    "paths": {
        "/things/{name}": {
            "put": {
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"type": "object", "required": ["model"]}}},
                },
                "responses": {"200": {"description": "so"}},
            }
        },
        "/health": {"get": {"responses": {"200": {"description": "so"}}}},
    },
}
CALLERS = Callers(
    {"none": {}, "infer": {"Authorization": "Bearer k"}},
    {"none": {"name": ["a/b"]}, "infer": {"name": ["a/b"]}},
    ["tiny"],
    {},
)


def test_requests_are_equal_for_equal_seeds() -> None:
    found = draw({"/api": DOCUMENT}, CALLERS, 60, 3)
    assert found == draw({"/api": DOCUMENT}, CALLERS, 60, 3) != draw({"/api": DOCUMENT}, CALLERS, 60, 4)
    assert {one.operation for one in found} == {"PUT /api/things/{name}", "GET /api/health"}
    assert {one.caller for one in found} == {"none", "infer"}
    assert all(one.headers.get("Authorization") == ("Bearer k" if one.caller == "infer" else None) for one in found)
    assert any(one.target.startswith("/api/things/a%2Fb") for one in found)
    assert [Asked.from_json(one.to_json()) for one in found] == found


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("200 OK", None),
        ("404 Not Found", None),
        ("503 Busy\r\nRetry-After: 1", None),
        ("507 Full", None),
        ("503 Busy", "503 without Retry-After"),
        ("500 Oh", "500"),
        ("504 Late", "504"),
    ],
)
def test_what_no_request_may_be_answered(head: str, expected: str | None) -> None:
    assert problem(f"HTTP/1.1 {head}\r\n\r\n".encode()) == expected


def test_pauses_are_between_tokens() -> None:
    events = [b'data: {"choices": [{"finish_reason": null}]}\n\n'] * 2
    events += [b'data: {"choices": [{"finish_reason": "length"}]}\n\n']
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [(1.0, head), *zip((3.0, 3.1, 3.5), chunks, strict=True)]
    seen = Seen()
    seen.read("steady", Received(parts), 0.5)
    assert (seen.num, seen.failed, seen.first_s) == (1, [], 2.5)
    assert seen.longest_s == pytest.approx(0.4)
    seen.read("steady", Received(parts[:-1]), 0.5)
    assert seen.failed == ["steady: ended before its last event, after 2"]


def test_what_is_a_failure() -> None:
    def failures(alone_s: float, beside_s: float, growth: int = 0, **told: Any) -> list[str]:
        return Found(Seen(longest_s=alone_s), Seen(longest_s=beside_s), Told(**told), (growth, "gateway")).failures()

    assert failures(0.01, 0.15) == []
    assert failures(0.01, 0.2) == ["0.200 s without a token, of 0.150 s"]
    assert failures(0.16, 0.2) == []
    assert failures(0, 0, growth=300_000_000) == ["gateway grew by 300 MB, of 200 MB"]
    assert failures(0, 0, wrong=["500: GET"], num_wrong=3) == ["answer 500: GET", "2 more answers"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_requests_beside_streams(tmp_path: Path) -> None:
    """Pauses are for a machine on which nothing else runs."""
    from peft import LoraConfig

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    sizes = {"pool_bytes": 16 << 20, "max_num_seqs": 16, "max_queued": 64}
    with standalone(tmp_path, **sizes) as server:
        served, pid = server.served, server.process.pid
        names = publish_copies(tmp_path, served.base, served.settings, [config], 4)
        place = Place(served.spec.port, served.catalog, served.base.name, names, lambda: tree(pid), tmp_path)
        found = run(place, Plan(num=200, alone_s=2.0, num_tokens=60), lambda text: None)
        assert found.failures(max_pause_s=60.0) == []
        assert sum(found.told.statuses.values()) > 150
        assert found.beside.num >= 10
        assert "Traceback" not in server.log
