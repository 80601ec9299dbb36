"""What a request used is in the catalog soon after, on both servers."""

from __future__ import annotations

import httpx

from tests.fixtures.cluster import Served
from tests.serve_apps.asking import eventually

TENANT = "counted"  # of this test alone: others' events may still be on their way


def test_usage_of_requests(server: Served) -> None:
    def used() -> tuple[int, int, int]:
        params = {"group_by": "model", "tenant": TENANT}
        items = httpx.get(f"{server.url}/api/v1/usage", params=params, timeout=30).raise_for_status().json()["items"]
        names = ("num_requests", "num_prompt_tokens", "num_output_tokens")
        return tuple(sum(row[name] for row in items) for name in names)  # type: ignore[return-value]

    before = used()
    body = {"model": server.base.name, "prompt": "abc", "max_tokens": 4, "ignore_eos": True}
    for _ in range(3):
        response = httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"X-Tenant-Id": TENANT}, timeout=60
        ).raise_for_status()
    usage = response.json()["usage"]
    wanted = (3, 3 * usage["prompt_tokens"], 3 * usage["completion_tokens"])
    assert eventually(lambda: tuple(a - b for a, b in zip(used(), before, strict=True)) == wanted)
