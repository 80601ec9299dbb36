"""Pages of serving, and the playground."""

from __future__ import annotations

from serve_apps.console.pages.serving import heat_map
from tests.serve_apps.console.site import URL, ConsoleSite, ScriptedGateway


def test_replicas_adapters_and_reasons(console: ConsoleSite) -> None:
    page = console.get("/serving").text
    for shown in ("r1", "n2", "40 %", "90 %", "tone@2", "legal@1", "its pool has the adapter", "75.0 %"):
        assert shown in page, shown
    assert "a bound on load" not in page  # no request went elsewhere
    console.engines.down = True
    assert "Not seen" in console.get("/serving/live").text


def test_what_more_replicas_hold_comes_first() -> None:
    rows, num_held = heat_map(ScriptedGateway().status().replicas, 4)
    assert num_held == 4
    assert [row.adapter for row in rows] == ["dates@1", "tone@2", "legal@1", "legal@2"]
    assert rows[0].tiers == ("host", "host")
    assert rows[3].tiers == ("", "pool")


def test_many_replicas_with_many_adapters_are_a_bounded_page(console: ConsoleSite) -> None:
    (replica, _) = console.engines.status().replicas
    replicas = [
        replica.model_copy(update={"replica": f"r{n}", "adapters_in_pool": tuple(f"a-{n + m}@1" for m in range(1000))})
        for n in range(40)
    ]
    rows, num_held = heat_map(replicas, 100)
    assert (len(rows), num_held, len(rows[0].tiers)) == (100, 1040, 40)
    console.engines.replicas = tuple(replicas)
    page = console.get("/serving").text
    assert "of 1,032" in page
    assert "Of the first 32 replicas" in page
    assert page.count("<tr>") < 150


def test_the_playground_asks_with_the_key_of_its_session(console: ConsoleSite) -> None:
    key = console.key("infer")
    console.log_in(key)
    assert 'value="tone"' in console.get("/playground", model="tone").text
    assert 'value="legal"' in console.get("/playground/models", search="leg").text
    body = {"model": "tone", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    token = console.get().text.partition('"X-CSRF-Token": "')[2].partition('"')[0]
    headers = {"X-CSRF-Token": token, "Content-Type": "application/json"}
    answer = console.http.post(f"{URL}/playground/chat", json=body, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert console.engines.asked == [(f"Bearer {key}", body)]
    assert console.http.post(f"{URL}/playground/chat", json=body).status_code == 403
