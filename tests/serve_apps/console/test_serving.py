"""The overview, pages of serving, and the playground."""

from __future__ import annotations

import re

from loray.recipes.load import load_recipe
from loray.schemas.status import AdapterPlacement
from loray.spec import Stretch
from tests.fixtures.versions import digest
from tests.serve_apps.console.site import METRICS, URL, ConsoleSite


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


LATER = (Stretch("kv", 55), Stretch("layered", 40), Stretch("free", 5))


def test_replicas_adapters_and_reasons(console: ConsoleSite) -> None:
    page = console.get("/serving").text
    for shown in ("r1", "n2", "90 %", "tone@2", "legal@1", "its pool has the adapter", "75.0 %"):
        assert shown in page, shown
    assert "a bound on load" not in page  # no request went elsewhere
    console.engines.down = True
    assert "Not seen" in console.get("/serving/live").text


def test_pages_follow_the_load(console: ConsoleSite) -> None:
    """What a look shows is the state at that look: tiers, blocks, steps, reasons and demand."""
    (one, two), before = console.engines.status().replicas, console.get("/serving/live").text
    assert _tiers(before, "cold@1") == ["", "loading"]
    assert _tiers(before, "legal@1") == ["pool", ""]
    assert _blocks(before, "r1") == [30, 0, 0, 10, 0, 60]
    assert "data-curve" not in before  # there was one look
    console.engines.replicas = (
        one.model_copy(update={"blocks": {"free": 5, "kv": 55, "layered": 40}, "layout": LATER, "num_running": 17}),
        two.model_copy(update={"adapters_in_pool": ("cold@1",), "adapters_loading": (), "num_output_tokens": 1700}),
    )
    console.engines.metrics = (
        METRICS.replace('{reason="overflow"} 0', '{reason="overflow"} 40')
        .replace('le="0.01"} 60', 'le="0.01"} 0')
        .replace('le="0.02"} 100', 'le="0.02"} 0')
    )
    console.now += 4
    after = console.get("/serving/live").text
    assert _tiers(after, "cold@1") == ["", "pool"]
    assert _tiers(after, "legal@2") == []
    assert _blocks(after, "r1") == [55, 0, 40, 0, 0, 5]
    assert 'class="blocks-kv" d="M0.0 0h200.0v10h-200.0zM800.0 0h100.0v10h-100.0z"' in before
    assert 'class="blocks-layered" d="M550.0 0h400.0v10h-400.0z"' in after
    assert "a bound on load was reached" in after
    assert (before.count("8.33 ms"), after.count("20 ms")) == (1, 2)
    assert "[[-4.0, 0.0], [6, 20], [3, 3]]" in after
    assert "<td>4 s</td><td>6</td><td>3</td>" in after
    assert "<td>300</td></tr>" in after  # 1,200 tokens more in 4 s


def test_one_replica(console: ConsoleSite) -> None:
    page = console.get("/serving/replicas/r1").text
    assert console.engines.layouts == ["r1"]
    assert 'data-live="/api/v1/console/serving/replicas/r1/live"' in page
    assert 'href="/api/v1/console/serving/replicas/r1"' in console.get("/serving").text
    for shown in ("3 running, 1 waiting", "30.0 %", "90 times in the pool", "≤ 20 ms</th><td>40<", "legal@1"):
        assert shown in page, shown
    assert _rows(page) == [("0 to 19", "kv"), ("20 to 79", "free"), ("80 to 89", "kv"), ("90 to 99", "flat")]
    assert re.search(r'class="strip".*<path class="blocks-free" d="M200.0 0h600.0v10h-600.0z"', page, re.DOTALL)
    changed = {"blocks": {"free": 95, "kv": 5}, "layout": (Stretch("free", 95), Stretch("kv", 5))}
    console.engines.replicas = (console.engines.status().replicas[0].model_copy(update=changed),)
    part = console.get("/serving/replicas/r1/live").text
    assert (_rows(part), "<main" in part) == ([("0 to 94", "free"), ("95 to 99", "kv")], False)
    console.engines.replicas = (console.engines.replicas[0].model_copy(update={"layout": ()}),)
    part = console.get("/serving/replicas/r1/live").text
    assert ("the engine did not say in time" in part, "strip" in part) == (True, False)
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
    assert console.engines.layouts is None  # which replicas there are, was not known
    assert "The 50 that most replicas hold, of 1,050" in page
    console.get("/serving/live")
    assert console.engines.layouts == [f"r{n}" for n in range(50)]
    assert "The first 50 of 60 replicas" in page
    assert page.count("<tr>") < 210
    one = console.get("/serving/replicas/r59").text
    assert "These are the first 50 of 1,001" in one


def _tiers(page: str, adapter: str) -> list[str]:
    """The adapter's row of the heat map."""
    row = re.search(rf'<th scope="row">{adapter}</th>(.*?)</tr>', page)
    return [] if row is None else re.findall(r"<td[^>]*>(\w*)</td>", row[1])


def _rows(page: str) -> list[tuple[str, str]]:
    """The replica's blocks by position."""
    return re.findall(r'<th scope="row">([\d to]+)</th><td><svg[^>]*><rect class="blocks-(\w+)"', page)


def _blocks(page: str, replica: str) -> list[int]:
    """The replica's row of the table of blocks."""
    row = re.search(rf'<th scope="row">{replica}</th><td>.*?</svg>(.*?)</tr>', page, re.DOTALL)
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
