"""The overview: the state of serving as far as the key may see it, newest versions, running jobs."""

from __future__ import annotations

import asyncio

import httpx

from loray.recipes.load import load_recipe
from serve_apps.console import GatewayClient
from tests.serve_apps.console.site import ConsoleSite, ScriptedGateway


def test_what_is_served(console: ConsoleSite) -> None:
    page = console.get().text
    for shown in ("Healthy", "smollm2", "2 of 3", "the working set outgrows two pools", "100 ms", "200 ms", "tone@2"):
        assert shown in page, shown
    assert "4 in pools, 2 on hosts" in page
    assert "No job is running" in page


def test_jobs_that_run(console: ConsoleSite) -> None:
    recipe = load_recipe("lora_smollm2").spec
    console.catalog.add_job("train_1", name=recipe.name, recipe=recipe)
    console.catalog.start_job("train_1")
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


def test_tokens_a_second_are_of_the_last_minute() -> None:
    now, engines = 0.0, ScriptedGateway()
    gateway = GatewayClient("http://gateway", httpx.ASGITransport(engines.app), clock=lambda: now)

    async def look() -> None:
        nonlocal now
        await gateway.status(None)
        assert gateway.demand.tokens_per_s() is None
        for _ in range(100):
            now, engines.num_tokens = now + 2, engines.num_tokens + 60
            await gateway.status(None)
        assert gateway.demand.tokens_per_s() == 30
        now, engines.num_tokens = now + 2, 10  # the replica began anew
        await gateway.status(None)
        assert gateway.demand.tokens_per_s() == (29 * 60 + 10) / 60
        await gateway.close()

    asyncio.run(look())
