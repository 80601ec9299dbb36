"""Random requests by schema: what may not be answered, and a short run against `loray serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.fuzz import Found, Gap, Place, Plan, Seen, Took, run, tree
from tests.faults.hostile import Asked, Callers, Sent, Told, draw, problem
from tests.faults.world import adapter_configs
from tests.fixtures.publisher import publish_copies
from tests.fixtures.standalone import standalone

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
        ("507 Full", "507"),
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
    parts, end = [(1.0, head), *zip((3.0, 3.1, 3.5), chunks, strict=True)], (3.6, b"0\r\n\r\n")
    seen = Seen()
    seen.read("steady", [*parts, end], 0.5)
    assert (seen.failed, seen.firsts) == ([], [2.5])
    assert seen.gaps == [Gap(pytest.approx(0.1), 3.0), Gap(pytest.approx(0.4), 3.1)]
    seen.read("steady", [*parts[:-1], end], 0.5)
    assert seen.failed == ["steady: 200, ended after 2 b''"]


def gaps(*seconds: float) -> Seen:
    return Seen(gaps=[Gap(s, 10.0) for s in seconds], firsts=[0.0])


def test_what_is_a_failure() -> None:
    def failures(alone_s: float, beside_s: float, growth: int = 0, **told: Any) -> list[str]:
        return Found(gaps(alone_s), gaps(beside_s), Told(**told), [Took("gateway", growth)]).failures()

    assert failures(0.01, 0.15) == []
    assert failures(0.01, 0.2) == ["0.200 s without a token, of 0.150 s"]
    assert failures(0.16, 0.2) == []
    assert failures(0, 0, growth=300_000_000) == ["gateway grew by 300 MB, of 200 MB"]
    assert failures(0, 0, wrong=["500: GET"]) == ["answer 500: GET"]


def test_the_report_says_what_was_under_way_in_a_gap() -> None:
    sent = [
        Sent(3, "GET /a", "none", 200, 9.0, 10.1),
        Sent(4, "GET /a", "none", 401, 9.5, 9.9),
        Sent(5, "POST /b", "infer", 200, 8.0, 11.0),
    ]
    found = Found(gaps(0.1), gaps(0.3, 0.2), Told(sent=sent, seconds=2.0), [Took("gateway", 5_000_000, 1.0)])
    lines = found.lines()
    assert "   300 ms  5 POST /b 200; 3 GET /a 200" in lines
    assert f"{'GET /a':<70}200: 1  401: 1" in lines
    assert "   5.0 MB   0.50  gateway" in lines


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_requests_beside_streams(tmp_path: Path) -> None:
    """Pauses are for a machine on which nothing else runs."""
    sizes = {"pool_bytes": 16 << 20, "max_num_seqs": 16, "max_queued": 64}
    with standalone(tmp_path, **sizes) as server:
        served, pid = server.served, server.process.pid
        names = publish_copies(tmp_path, served.base, served.settings, adapter_configs(), 4)
        place = Place(served.url, served.catalog, served.base.name, names, lambda: tree(pid), tmp_path)
        found = run(place, Plan(num=200, alone_s=2.0, num_tokens=60), lambda text: None)
        assert found.failures(max_gap_s=60.0) == []
        assert len(found.told.sent) > 150
        assert len(found.beside.firsts) >= 10
        assert "Traceback" not in server.log
