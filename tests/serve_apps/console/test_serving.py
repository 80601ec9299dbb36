"""The overview, pages of serving, and the playground."""

from __future__ import annotations

import re

from loray.recipes.load import load_recipe
from loray.schemas.status import AdapterPlacement
from serve_apps.console.serving import places_of
from tests.fixtures.versions import digest
from tests.serve_apps.console.site import METRICS, URL, ConsoleSite, ScriptedGateway


def test_what_is_served(console: ConsoleSite) -> None:
    page = console.get().text
    for shown in ("Healthy", "smollm2", "2 of 3", "the working set outgrows two pools", "100 ms", "200 ms", "tone@2"):
        assert shown in page, shown
    assert "4 in pools, 2 on hosts" in page
    assert "No job is running" in page


def test_jobs_that_run(console: ConsoleSite) -> None:
    recipe = load_recipe("lora_smollm2").spec
    console.catalog.jobs.add("train_1", name=recipe.name, recipe=recipe)
    console.catalog.jobs.start("train_1")
    assert '/jobs/train_1"' in console.get("/live").text


def test_nothing_answers(console: ConsoleSite) -> None:
    console.engines.down = True
    page = console.get()
    assert (page.status_code, "Not serving" in page.text) == (200, True)


def test_a_tenant_sees_its_own(console: ConsoleSite) -> None:
    admin = console.key("admin")
    console.engines.keys = {admin}
    console.log_in(console.key("infer", "publish", tenant="acme"))
    page = console.get().text
    assert "shown to administrators" in page
    assert "vault" in page
    assert not [word for word in ("tone", "2 of 3", "legal") if word in page]
    console.log_in(admin)
    assert "2 of 3" in console.get().text


def test_replicas_adapters_and_reasons(console: ConsoleSite) -> None:
    page = console.get("/serving").text
    for shown in ("r1", "n2", "90 %", "tone@2", "legal@1", "its pool has the adapter", "75.0 %"):
        assert shown in page, shown
    assert "a bound on load" not in page  # no request went elsewhere
    console.engines.down = True
    assert "Not seen" in console.get("/serving/live").text


def test_pages_follow_the_load(console: ConsoleSite) -> None:
    """What a look shows is the state at that look: tiers, blocks, steps and reasons."""
    (one, two), before = console.engines.status().replicas, console.get("/serving/live").text
    assert _tiers(before, "cold@1") == ["", "loading"]
    assert _tiers(before, "legal@1") == ["pool", ""]
    assert _blocks(before, "r1") == [30, 0, 0, 10, 0, 60]
    console.engines.replicas = (
        one.model_copy(update={"blocks": {"free": 5, "kv": 55, "layered": 40}, "num_running": 17}),
        two.model_copy(update={"adapters_in_pool": ("cold@1",), "adapters_loading": ()}),
    )
    console.engines.metrics = (
        METRICS.replace('{reason="overflow"} 0', '{reason="overflow"} 40')
        .replace('le="0.01"} 60', 'le="0.01"} 0')
        .replace('le="0.02"} 100', 'le="0.02"} 0')
    )
    after = console.get("/serving/live").text
    assert _tiers(after, "cold@1") == ["", "pool"]
    assert _tiers(after, "legal@2") == []
    assert _blocks(after, "r1") == [55, 0, 40, 0, 0, 5]
    assert "a bound on load was reached" in after
    assert (before.count("8.33 ms"), after.count("20 ms")) == (1, 2)


def test_one_replica(console: ConsoleSite) -> None:
    page = console.get("/serving/replicas/r1").text
    assert 'data-live="/api/v1/console/serving/replicas/r1/live"' in page
    assert 'href="/api/v1/console/serving/replicas/r1"' in console.get("/serving").text
    for shown in ("3 running, 1 waiting", "30.0 %", "90 times in the pool", "≤ 20 ms</th><td>40<", "legal@1"):
        assert shown in page, shown
    changed = {"blocks": {"free": 95, "kv": 5}}
    console.engines.replicas = (console.engines.status().replicas[0].model_copy(update=changed),)
    part = console.get("/serving/replicas/r1/live").text
    assert ("95.0 %" in part, "5.0 %" in part, "30.0 %" in part, "<main" in part) == (True, True, False, False)
    gone = console.get("/serving/replicas/r2")
    assert (gone.status_code, "it may have ended" in gone.text) == (404, True)
    console.engines.down = True
    assert "Not seen" in console.get("/serving/replicas/r1").text


def test_many_replicas_with_many_adapters_are_a_bounded_page(console: ConsoleSite) -> None:
    (replica, _) = console.engines.status().replicas
    console.engines.replicas = tuple(
        replica.model_copy(update={"replica": f"r{n}", "adapters_in_pool": tuple(f"a-{n + m}@1" for m in range(1000))})
        for n in range(60)
    )
    page = console.get("/serving").text
    assert "The 50 that most replicas hold, of 1,050" in page
    assert "The first 50 of 60 replicas" in page
    assert page.count("<tr>") < 210
    one = console.get("/serving/replicas/r59").text
    assert "These are the first 50 of 1,001" in one


def test_what_more_replicas_hold_comes_first() -> None:
    rows, num_held = places_of(ScriptedGateway().status().replicas, 4)
    assert num_held == 5
    assert [row.adapter for row in rows] == ["dates@1", "tone@2", "cold@1", "legal@1"]
    assert rows[0].tiers == ("host", "host")
    assert rows[2].tiers == ("", "loading")


def _tiers(page: str, adapter: str) -> list[str]:
    """The adapter's row of the heat map."""
    row = re.search(rf'<th scope="row">{adapter}</th>(.*?)</tr>', page)
    return [] if row is None else re.findall(r"<td[^>]*>(\w*)</td>", row[1])


def _blocks(page: str, replica: str) -> list[int]:
    """The replica's row of the table of blocks."""
    row = re.search(rf'<th scope="row">{replica}</th>(.*?)</tr>', page)
    assert row is not None
    return [int(count) for count in re.findall(r"<td>(\d+)</td>", row[1])]


def test_the_playground_asks_with_the_key_of_its_session(console: ConsoleSite) -> None:
    key = console.key("infer")
    console.log_in(key)
    assert 'value="tone"' in console.get("/playground", model="tone").text
    assert 'value="legal"' in console.get("/playground/models", search="leg").text
    assert console.get("/playground/tier", model="smollm2").json() == {"tier": ""}
    assert console.get("/playground/tier", model="tone@1").json() == {"tier": "in the store"}
    console.placements.found = [placed("r1", "host"), placed("r2", "pool"), placed("r3", "none")]
    assert console.get("/playground/tier", model="tone@1").json() == {"tier": "in a replica's pool"}
    body = {"model": "tone", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    token = console.get().text.partition('"X-CSRF-Token": "')[2].partition('"')[0]
    headers = {"X-CSRF-Token": token, "Content-Type": "application/json"}
    answer = console.http.post(f"{URL}/playground/chat", json=body, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert console.engines.asked == [(f"Bearer {key}", body)]
    assert console.http.post(f"{URL}/playground/chat", json=body).status_code == 403


def placed(replica: str, tier: str) -> AdapterPlacement:
    return AdapterPlacement(
        replica=replica,
        node="n",
        digest=digest(1),
        name="tone",
        version=1,
        nbytes=1,
        tier=tier,
        uses=1,
        last_used_at=1.0,
        num_tokens=1,
    )
