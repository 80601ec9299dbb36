"""The runner on a gateway of its own: each custom_id is answered exactly once, whatever is killed in between."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.catalog.batches import Batch
from loray.catalog.database import writing
from loray.catalog.schema import batches
from loray.errors import CatalogError, EngineError, StoreError
from loray.publishing.user_files import FileWriter, read_lines
from loray.spec import Principal
from loray.store.objects import LocalStore
from serve_apps.batches import BaseLoad, BatchRunner, LineAnswer
from serve_apps.batches import runner as module
from serve_apps.batches.validation import Line
from tests.fixtures.catalogs import sqlite_catalog

ENDPOINT = "/v1/completions"
IDLE = BaseLoad(0.0, False)


class Gateway:
    """Answers lines with what `script` makes of them; an answer of None never comes."""

    def __init__(self, script: Callable[[dict[str, Any]], LineAnswer | Exception | None] | None = None) -> None:
        self.script = script or (lambda body: LineAnswer(200, json.dumps({"text": body["prompt"]}), "req-1"))
        self.asked: list[tuple[str, str]] = []  # tenant, prompt
        self.load = IDLE
        self.at_once = self.most_at_once = 0

    async def run_line(self, key_id: str | None, tenant: str, endpoint: str, body: bytes) -> LineAnswer:
        assert endpoint == ENDPOINT
        given = json.loads(body)
        self.asked.append((tenant, given["prompt"]))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0)
            answer = self.script(given)
            if answer is None:
                await asyncio.Event().wait()
            if isinstance(answer, Exception):
                raise answer
            assert answer is not None
            return answer
        finally:
            self.at_once -= 1

    async def bases_of(self, key_id: str | None, tenant: str, models: Collection[str]) -> Mapping[str, str | None]:
        return dict.fromkeys(models, "base")

    async def loads(self) -> Mapping[str, BaseLoad]:
        return {"base": self.load}


class Site:
    def __init__(self, folder: Path) -> None:
        self.url = sqlite_catalog(folder)
        self.catalog = Catalog(self.url)
        self.store = LocalStore(folder / "store")
        for tenant in ("acme", "beta"):
            self.catalog.tenants.create(tenant)

    def create(self, num_lines: int, tenant: str = "acme", **fields: Any) -> str:
        catalog = self.catalog.view(Principal(tenant=tenant, key_id="key-1"))
        with FileWriter(catalog, self.store) as writer:
            for i in range(num_lines):
                body = {"model": f"m{i % 3}", "prompt": f"{i}"} | fields
                line = {"custom_id": f"id-{i}", "method": "POST", "url": ENDPOINT, "body": body}
                writer.write(json.dumps(line).encode() + b"\n")
            file = writer.finish("in.jsonl", "batch")
        return catalog.batches.create(file.id, ENDPOINT).id

    def get(self, batch_id: str, tenant: str = "acme") -> Batch:
        return self.catalog.view(Principal(tenant=tenant)).batches.get(batch_id)

    def rows(self, file_id: str | None, tenant: str = "acme") -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = self.catalog.view(Principal(tenant=tenant)).files.get(file_id)
        assert file.purpose == "batch_output"
        return [json.loads(line) for line in read_lines(self.store, file)]

    @asynccontextmanager
    async def running(self, gateway: Gateway, **given: Any) -> AsyncIterator[BatchRunner]:
        options: dict[str, Any] = {"catalog": lambda: self.catalog, "store": lambda: self.store} | given
        runner = BatchRunner(options["catalog"], options["store"], gateway)
        task = asyncio.create_task(runner.run())
        try:
            yield runner
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def until(self, batch_id: str, *states: str, tenant: str = "acme") -> Batch:
        async with asyncio.timeout(30):
            while (batch := self.get(batch_id, tenant)).state not in states:
                await asyncio.sleep(0.01)
        return batch


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name, value in (("TICK_S", 0.02), ("RENEW_S", 0.05), ("_RETRY_S", 0.02), ("_LONGEST_RETRY_S", 0.05)):
        monkeypatch.setattr(module, name, value)
    return Site(tmp_path)


def ids(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["custom_id"] for row in rows)


def all_ids(num_lines: int) -> Counter[str]:
    return Counter(f"id-{i}" for i in range(num_lines))


async def test_from_input_to_output(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that fail are in the error file, and refusals are asked again."""
    monkeypatch.setattr(module, "PART_LINES", 40)
    refused: set[str] = set()

    def script(body: dict[str, Any]) -> LineAnswer | Exception:
        prompt = body["prompt"]
        if int(prompt) % 10 == 3:
            return LineAnswer(404, '{"error": {"message": "no such model"}}', "req-2")
        if int(prompt) % 25 == 7 and prompt not in refused:
            refused.add(prompt)
            return EngineError("away") if prompt == "7" else LineAnswer(429, "{}", refusal="limit", retry_after_s=0.01)
        return LineAnswer(200, json.dumps({"text": prompt}), "req-1")

    async with site.running(Gateway(script)):
        batch = await site.until(site.create(100), "completed", "failed")
        async with asyncio.timeout(30):
            while list(site.store.list("files/acme/.batches/")):  # which are removed after the batch has ended
                await asyncio.sleep(0.01)
    assert (batch.total, batch.completed, batch.failed) == (100, 90, 10)
    done, failed = site.rows(batch.output_file_id), site.rows(batch.error_file_id)
    assert ids(done + failed) == all_ids(100)
    assert {row["custom_id"] for row in failed} == {f"id-{i}" for i in range(3, 100, 10)}
    row = next(row for row in done if row["custom_id"] == "id-12")
    assert row["id"].startswith("batch_req_")
    assert row["response"] == {"status_code": 200, "request_id": "req-1", "body": {"text": "12"}}
    assert row["error"] is None
    assert failed[0]["response"]["body"] == {"error": {"message": "no such model"}}
    assert not list(site.store.list("files/acme/.batches/"))
    order = [batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert order == sorted(time for time in order if time is not None)


async def test_a_wrong_input(site: Site) -> None:
    async with site.running(Gateway()):
        batch = await site.until(site.create(3, stream=True), "failed")
    assert [error.line for error in batch.errors] == [1, 2, 3]
    assert batch.failed_at is not None


async def test_lines_of_one_model_follow_each_other(site: Site) -> None:
    gateway = Gateway()
    async with site.running(gateway):
        await site.until(site.create(30), "completed")
    models = [int(prompt) % 3 for _, prompt in gateway.asked]
    assert models == sorted(models)


async def test_killed_runners_leave_each_line_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is killed in the middle: with no word to the catalog, as by a signal, and the next one takes its lease."""
    monkeypatch.setattr(module, "CHUNK_LINES", 5)
    batch_id, asked = site.create(60), 0
    for _ in range(4):
        gateway = Gateway()
        gateway.script = lambda body, g=gateway: (  # type: ignore[misc]
            LineAnswer(200, json.dumps({"text": body["prompt"]})) if len(g.asked) <= 13 else None
        )
        runner = BatchRunner(lambda: site.catalog, lambda: site.store, gateway)
        leading = asyncio.create_task(runner.run())
        async with asyncio.timeout(30):
            while len(gateway.asked) <= 13:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(module._Answering, "_store", _never)
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        monkeypatch.undo()
        for name, value in (("TICK_S", 0.02), ("RENEW_S", 0.05), ("CHUNK_LINES", 5)):
            monkeypatch.setattr(module, name, value)
        asked += len(gateway.asked)
    gateway = Gateway()
    async with site.running(gateway):
        batch = await site.until(batch_id, "completed")
    assert ids(site.rows(batch.output_file_id)) == all_ids(60)
    assert (batch.completed, batch.failed) == (60, 0)
    assert asked + len(gateway.asked) <= 60 + 4 * (5 + 4 + 5)  # answers that were not kept, and lines under way


async def _never(_: object) -> None:
    await asyncio.sleep(0)


async def test_two_runners_that_both_believe_to_lead(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has lost its lease writes answers, but ends nothing, and no line is in the output twice."""
    monkeypatch.setattr(module, "CHUNK_LINES", 5)
    batch_id = site.create(40)
    late = Gateway()
    async with site.running(late) as first:
        async with asyncio.timeout(30):
            while len(late.asked) < 8:
                await asyncio.sleep(0)
        site.catalog.leases.leave(first.lease)
        async with site.running(Gateway()):
            batch = await site.until(batch_id, "completed")
    assert ids(site.rows(batch.output_file_id)) == all_ids(40)


@pytest.mark.parametrize("what", ["catalog", "store"])
async def test_catalog_or_store_away_for_a_while(site: Site, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LINES", 5)
    batch_id, is_away, gateway = site.create(40), False, Gateway()
    found = {"catalog": site.catalog, "store": site.store}

    def away(name: str) -> Any:
        if is_away and name == what:
            raise CatalogError("away") if what == "catalog" else StoreError("away")
        return found[name]

    async with site.running(gateway, catalog=lambda: away("catalog"), store=lambda: away("store")):
        async with asyncio.timeout(30):
            while len(gateway.asked) < 10:
                await asyncio.sleep(0)
        is_away = True
        await asyncio.sleep(0.2)
        assert len(gateway.asked) < 40
        is_away = False
        batch = await site.until(batch_id, "completed")
    assert ids(site.rows(batch.output_file_id)) == all_ids(40)


async def test_cancelled_in_the_middle(site: Site) -> None:
    """What was answered is there; what runs is cancelled."""
    gateway = Gateway(lambda body: LineAnswer(200, "{}") if int(body["prompt"]) < 6 else None)
    batch_id = site.create(20, model="m")
    async with site.running(gateway):
        async with asyncio.timeout(30):
            while gateway.at_once < 4:
                await asyncio.sleep(0.01)
        site.catalog.view(Principal(tenant="acme")).batches.cancel(batch_id)
        batch = await site.until(batch_id, "cancelled")
        assert gateway.at_once == 0
    assert ids(site.rows(batch.output_file_id)) == all_ids(6)
    assert (batch.total, batch.completed, batch.error_file_id) == (20, 6, None)


async def test_expired(site: Site) -> None:
    gateway = Gateway(lambda body: LineAnswer(200, "{}") if int(body["prompt"]) < 6 else None)
    batch_id = site.create(20, model="m")
    async with site.running(gateway):
        async with asyncio.timeout(30):
            while gateway.at_once < 4:
                await asyncio.sleep(0.01)
        with writing(site.catalog._db.engine) as c:
            c.execute(batches.update().values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
        batch = await site.until(batch_id, "expired")
    assert ids(site.rows(batch.output_file_id)) == all_ids(6)
    rest = site.rows(batch.error_file_id)
    assert ids(rest) == all_ids(20) - all_ids(6)
    assert all(row["response"] is None and row["error"]["code"] == "batch_expired" for row in rest)
    assert (batch.completed, batch.failed) == (6, 14)


async def test_a_revoked_key_cancels_its_batches(site: Site) -> None:
    def script(body: dict[str, Any]) -> LineAnswer:
        if int(body["prompt"]) < 5:
            return LineAnswer(200, "{}")
        return LineAnswer(401, "{}", refusal="revoked")

    batch_id = site.create(20, model="m")
    async with site.running(Gateway(script)):
        batch = await site.until(batch_id, "cancelled")
    assert [error.code for error in batch.errors] == ["key_revoked"]
    assert ids(site.rows(batch.output_file_id)) == all_ids(5)


async def test_a_budget_that_is_used_up_is_waited_for(site: Site) -> None:
    refusal = LineAnswer(429, '{"error": {"message": "all used"}}', refusal="budget", retry_after_s=100)
    has_budget = False
    batch_id = site.create(10)
    async with site.running(Gateway(lambda _: LineAnswer(200, "{}") if has_budget else refusal)):
        async with asyncio.timeout(30):
            while not (batch := site.get(batch_id)).errors:
                await asyncio.sleep(0.01)
        assert batch.errors[0][:2] == ("budget_used_up", "the batch waits: all used")
        has_budget = True
        batch = await site.until(batch_id, "completed")
    assert batch.completed == 10
    assert not batch.errors


class Asking:
    """Stands in for the lines of one batch, and notes whose turn it is."""

    may_begin, num_waiting = True, 0

    def __init__(self, site: Site, tenant: str, turns: list[str]) -> None:
        self.batch = site.get(site.create(1, tenant), tenant)
        self.tasks: set[asyncio.Task[None]] = set()
        self.changed, self._turns = asyncio.Event(), turns

    async def run(self, lines: module.BaseLines, line: Line) -> None:
        self._turns.append(self.batch.tenant)


async def test_two_tenants_share_equally(site: Site) -> None:
    turns: list[str] = []
    lines = module.BaseLines()
    lines.rate.limit = 0
    for tenant, number in (("acme", 30), ("beta", 10)):
        asking: Any = Asking(site, tenant, turns)
        lines.push(asking, [Line(i, f"{i}", "m", b"{}") for i in range(number)])
    lines.rate.limit = 2
    lines.begin()
    async with asyncio.timeout(30):
        while lines.is_busy:
            await asyncio.sleep(0)
    assert turns == ["acme", "beta"] * 10 + ["acme"] * 20


async def test_people_come_first(site: Site) -> None:
    """While they wait, lines become fewer."""
    gateway = Gateway()
    async with site.running(gateway) as runner:
        await site.until(site.create(20), "completed")
        assert gateway.most_at_once <= 5
        gateway.load = BaseLoad(0.6, False)
        rate = runner.bases["base"].rate
        gateway.script = lambda _: None
        site.create(100)
        async with asyncio.timeout(30):
            while rate.limit > 2:
                await asyncio.sleep(0.01)
        assert len(gateway.asked) <= 20 + 5


async def test_a_base_that_wakes_up_is_not_given_up(site: Site) -> None:
    gateway = Gateway(lambda _: LineAnswer(503, "{}", refusal="overloaded", retry_after_s=0.01))
    gateway.load = BaseLoad(5.0, True)
    async with site.running(gateway) as runner:
        batch_id = site.create(10)
        async with asyncio.timeout(30):
            while len(gateway.asked) < 12:
                await asyncio.sleep(0.01)
        gateway.script, gateway.load = (lambda _: LineAnswer(200, "{}")), IDLE
        await site.until(batch_id, "completed")
        assert runner.bases["base"].rate.limit >= 1
