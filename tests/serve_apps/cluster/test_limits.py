"""A key with limits, at a deployment of two gateways, as an HTTP client meets it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import Limits
from tests.fixtures.cluster import RayCluster, Served, deployed

pytestmark = pytest.mark.cluster

NUM_GATEWAYS = 2
TOLERANCE = 0.05
LIMIT = 100  # requests a minute
PARALLEL = 20
PROMPT = [7] * 9
SHORT: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "ignore_eos": True}
NUM_TOKENS = len(PROMPT) + 1
LIMITS = {
    "requests": Limits(rpm_limit=LIMIT),
    "tokens": Limits(tpm_limit=LIMIT * NUM_TOKENS),
    "parallel": Limits(max_parallel_requests=PARALLEL),
}


@dataclass(frozen=True)
class Door:
    """`keys`: a key for each of LIMITS, and `admin`."""

    url: str
    keys: dict[str, str]

    @asynccontextmanager
    async def as_(self, name: str) -> Any:
        unlimited, headers = httpx.Limits(), {"Authorization": f"Bearer {self.keys[name]}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120, limits=unlimited) as client:
            yield client


@pytest.fixture(scope="module")
def door(ray_cluster: RayCluster, served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    home = tmp_path_factory.mktemp("limited")
    (home / "bases").symlink_to(served.base.path.parent)
    settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_LOG_LEVEL": "WARNING"})
    with closing(Catalog(settings.catalog)) as catalog:  # its own, because others ask `served` without keys
        keys = {name: catalog.keys.create(name, limits=limits).secret for name, limits in LIMITS.items()}
        keys["admin"] = catalog.keys.create("admin", scopes=["admin"]).secret
    fields = {"num_gateways": NUM_GATEWAYS, "max_num_seqs": 2 * PARALLEL, "max_queued": 512, "pool_bytes": 96 << 20}
    with deployed(ray_cluster, served, "limited", settings=settings, **fields) as app:
        yield Door(app.url, keys)


def check_refusal(refused: httpx.Response) -> None:
    assert refused.status_code == 429, refused.text
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1


async def served_by(door: Door, code: int) -> dict[str, float]:
    """Gateway → how many of its answers to completions had this status."""
    async with door.as_("admin") as client:
        text = (await client.get("/metrics")).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "loray_http_requests_total" and labels["route"] == "/v1/completions":
                found |= {labels["gateway"]: sample.value} if labels["code"] == str(code) else {}
    return found


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_a_limit_a_minute_is_exact_within_five_per_cent(door: Door, kind: str) -> None:
    asked = 2 * LIMIT

    async def ask() -> list[httpx.Response]:
        turns = asyncio.Semaphore(8)
        async with door.as_(kind) as client:

            async def one() -> httpx.Response:
                async with turns:
                    return await client.post("/v1/completions", json=SHORT)

            return await asyncio.gather(*(one() for _ in range(asked)))

    began = time.monotonic()
    answers = asyncio.run(ask())
    minutes = (time.monotonic() - began) / 60
    admitted = [answer for answer in answers if answer.status_code == 200]
    expected = min(asked, LIMIT * (1 + minutes))  # what has come back while the requests were sent
    assert abs(len(admitted) - expected) <= TOLERANCE * expected + NUM_GATEWAYS, (len(admitted), expected)
    limit = LIMIT * (NUM_TOKENS if kind == "tokens" else 1)
    for answer in answers:
        if answer.status_code != 200:
            check_refusal(answer)
        assert answer.headers[f"x-ratelimit-limit-{kind}"] == str(limit)
        assert 0 <= int(answer.headers[f"x-ratelimit-remaining-{kind}"]) < limit
        assert answer.headers[f"x-ratelimit-reset-{kind}"]
    assert len(asyncio.run(served_by(door, 200))) == NUM_GATEWAYS


@dataclass
class Held:
    """Streams: how many were asked for and have begun, how many have not ended, and the most of these at once."""

    asked: int = 0
    begun: int = 0
    now: int = 0
    most: int = 0
    refused: list[httpx.Response] = field(default_factory=list)

    async def hold(self, client: httpx.AsyncClient) -> None:
        body = SHORT | {"max_tokens": 4000, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self.refused.append(response)
                return
            self.begun += 1
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                async for _ in response.aiter_raw():
                    pass
            finally:
                self.now -= 1


def test_parallel_requests_are_exact_within_five_per_cent(door: Door) -> None:
    async def run() -> None:
        held = Held()
        async with door.as_("parallel") as client, asyncio.timeout(300):
            asking: set[asyncio.Task[None]] = set()

            def ask() -> None:
                held.asked += 1
                task = asyncio.create_task(held.hold(client))
                asking.add(task)
                task.add_done_callback(asking.discard)

            while held.now < (1 - TOLERANCE) * PARALLEL:  # what one gateway does not use moves to the other
                if len(asking) < 2 * PARALLEL:
                    ask()
                await asyncio.sleep(0.05)
            for _ in range(PARALLEL):
                ask()
            while held.begun + len(held.refused) < held.asked:
                await asyncio.sleep(0.05)
            assert held.refused
            under_way = list(asking)
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            assert held.most <= PARALLEL + NUM_GATEWAYS
            for refused in held.refused:
                check_refusal(refused)
            while (await client.post("/v1/completions", json=SHORT)).status_code != 200:
                await asyncio.sleep(0.1)  # until the gateways have seen that their clients have left

    asyncio.run(run())
