"""Sampling by a call from inside the cluster: its requests, its answer, its limits; and nobody over HTTP names its
adapters.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import (
    AdapterGone,
    BaseMismatch,
    BaseNotFound,
    ContextLengthExceeded,
    LorayError,
    PermissionDenied,
    RateLimited,
    RequestError,
)
from loray.publishing import Destination, ephemeral, publish
from loray.settings import Settings
from loray.spec import (
    GenerateRequest,
    Limits,
    SampleCall,
    SampledSequence,
    SampleResult,
    SamplingParams,
    ServeSpec,
    TokenDelta,
    TokenLogprobs,
    UsageEvent,
)
from loray.store import AdapterStore, open_store
from serve_apps.accounting.accounts import RequestUsage, UsageMeter
from serve_apps.gateway.app import create_app
from serve_apps.gateway.bases import ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.rollouts import Rollouts
from serve_apps.replica.loading import AdapterLoader
from serve_apps.replica.startup import start_engine
from serve_apps.standalone.server import LocalEngineClient
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import ScriptedEngines, adapter_ref, delta
from tests.fixtures.keys import access_of

PROMPT = tuple(range(40))


def tokens(*ids: int, reason: Any = None, cached: int = 0) -> TokenDelta:
    """Each with the log-probability −id and one alternative."""
    logprobs = tuple(TokenLogprobs(-float(i), ((i, -float(i)),), 1) for i in ids)
    return TokenDelta(ids, reason, cached, logprobs or None)


class KeptUsage(UsageMeter):
    """Keeps the accounts that it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[RequestUsage] = []

    def open(self, *args: Any, **options: Any) -> RequestUsage:
        self.opened.append(super().open(*args, **options))
        return self.opened[-1]

    @property
    def event(self) -> UsageEvent:
        event = self.opened[-1].event
        assert event is not None
        return event


class Site:
    def __init__(self, base: BaseModel, catalog: Catalog, url: str, engines: ScriptedEngines) -> None:
        self.base, self.catalog, self.engines, self.usage = base, catalog, engines, KeptUsage()
        access = access_of(url)
        served = ServedBase.open(ServeSpec(base=base.name), base, engines)
        self.gateway = Gateway([served], ModelResolver([base], access.follower), accounts=self.usage)
        self.app = create_app(self.gateway, access)
        self.rollouts: Rollouts = self.app.state.rollouts
        self.ref = adapter_ref(
            "a" * 64, name="~run", version=3, base_fingerprint=base.fingerprint, context_length=256, holders=("own",)
        )

    def call(self, **fields: Any) -> SampleCall:
        params = SamplingParams(**{"max_tokens": 8} | fields.pop("params", {}))
        given = {"base": self.base.name, "adapter": self.ref, "prompt_ids": PROMPT, "params": params} | fields
        return SampleCall(**given)

    def sample(self, **fields: Any) -> SampleResult:
        return asyncio.run(self.rollouts.sample(self.call(**fields)))


@pytest.fixture
def site_of(base: BaseModel, catalog: Catalog, tmp_path: Path) -> Callable[..., Site]:
    def make(*script: TokenDelta | Exception) -> Site:
        return Site(base, catalog, sqlite_catalog(tmp_path), ScriptedEngines(script))

    return make


def test_a_call_becomes_the_requests_of_its_samples(site_of: Callable[..., Site]) -> None:
    site = site_of(tokens(1), tokens(2, reason="length", cached=32))
    asked = {"seed": 7, "temperature": 0.5, "prompt_logprobs": 0}
    result = site.sample(num_samples=3, tenant="acme", salt="s", holders=("trainer", "own"), params=asked)
    requests = site.engines.requests
    assert [r.params.seed for r in requests] == [7, 8, 9]
    assert [r.params.prompt_logprobs for r in requests] == [0, None, None]
    assert {(r.params.logprobs, r.params.temperature, r.tenant, r.priority) for r in requests} == {
        (0, 0.5, "acme", 100)
    }
    assert {(r.cache_salt, r.prompt_ids) for r in requests} == {("acme/s", PROMPT)}
    assert {r.adapter for r in requests} == {replace(site.ref, holders=("own", "trainer"))}
    assert len({r.request_id for r in requests}) == 3
    assert {r.output_kind for r in requests} == {"final"}
    assert result.sequences == (SampledSequence((1, 2), (-1.0, -2.0), "length", 32),) * 3
    assert site.engines.fits == [False] * 3


def test_the_answer_has_what_was_asked_for(site_of: Callable[..., Site]) -> None:
    prompt = tuple(TokenLogprobs(-0.5 * i, ((i, -0.5 * i), (9, -3.0)), 1) for i in range(1, 40))
    first = tokens(5)._replace(prompt_logprobs=prompt)
    result = site_of(first, tokens(6, reason="stop")).sample(params={"prompt_logprobs": 2, "logprobs": 1})
    assert result.sequences == (SampledSequence((5, 6), (-5.0, -6.0), "stop", 0, (((5, -5.0),), ((6, -6.0),))),)
    assert result.prompt_logprobs == tuple(-0.5 * i for i in range(1, 40))
    assert result.prompt_top[0] == ((1, -0.5), (9, -3.0))
    scored = site_of(TokenDelta((), "length", 0, None, prompt))
    assert scored.sample(adapter=None, params={"max_tokens": 0, "prompt_logprobs": 0}) == SampleResult(
        (SampledSequence((), (), "length"),), tuple(-0.5 * i for i in range(1, 40))
    )
    (request,) = scored.engines.requests
    assert (request.adapter, request.params.logprobs) == (None, None)


def test_tokens_up_to_the_one_that_completes_a_stop_string_are_the_answer(site_of: Callable[..., Site]) -> None:
    text = delta("one two three").token_ids
    site = site_of(tokens(*text[:5]), tokens(*text[5:]), tokens(0, reason="length"))
    (sequence,) = site.sample(params={"stop": ("two",)}).sequences
    assert (sequence.token_ids, sequence.stop_reason) == (text[:7], "stop")
    assert sequence.logprobs == tuple(-float(i) for i in text[:7])
    assert site.engines.requests[0].output_kind == "delta"  # no token is computed in vain
    assert site.engines.closed == [site.engines.requests[0].request_id]


class Gated(ScriptedEngines):
    """Each request waits for its turn before its first token, and again before its last."""

    def __init__(self, script: Sequence[TokenDelta | Exception]) -> None:
        super().__init__(script)
        self.turns: list[asyncio.Event] = []

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        turn = asyncio.Event()
        self.turns.append(turn)
        async for item in super().generate(request, fit=fit):
            await turn.wait()
            turn.clear()
            yield item


def drive(site: Site, steps: Callable[[Gated, asyncio.Task[Any]], Coroutine[Any, Any, None]], **fields: Any) -> Any:
    async def run() -> Any:
        assert isinstance(site.engines, Gated)
        async with site.app.router.lifespan_context(site.app):  # so that a call asks no database
            call = asyncio.create_task(site.rollouts.sample(site.call(**fields)))
            await steps(site.engines, call)
            return await call

    return asyncio.run(run())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def gated(base: BaseModel, catalog: Catalog, tmp_path: Path) -> Site:
    return Site(base, catalog, sqlite_catalog(tmp_path), Gated([tokens(1), tokens(2, reason="length")]))


def test_the_others_follow_the_first_samples_first_token(gated: Site) -> None:
    async def steps(engines: Gated, call: asyncio.Task[Any]) -> None:
        await settle()
        assert len(engines.turns) == 1
        engines.turns[0].set()
        await settle()
        assert len(engines.turns) == 4
        for _ in range(2):
            for turn in engines.turns:
                turn.set()
            await settle()

    assert len(drive(gated, steps, num_samples=4).sequences) == 4


def test_no_more_answers_are_with_the_engines_than_they_run(gated: Site) -> None:
    places = gated.gateway.bases[gated.base.name].num_at_once

    async def steps(engines: Gated, call: asyncio.Task[Any]) -> None:
        await settle()
        while not call.done():
            assert len(engines.turns) - len(engines.closed) <= places
            for turn in engines.turns:
                turn.set()
            await settle()

    assert len(drive(gated, steps, num_samples=places + 3).sequences) == places + 3


def test_one_that_fails_ends_the_call(gated: Site) -> None:
    async def steps(engines: Gated, call: asyncio.Task[Any]) -> None:
        await settle()
        engines.turns[0].set()
        await settle()
        engines.turns[0].set()
        await settle()

    gated.engines.script = [tokens(1), AdapterGone("retired")]
    with pytest.raises(AdapterGone, match="retired"):
        drive(gated, steps, num_samples=3)
    assert sorted(gated.engines.closed) == sorted(r.request_id for r in gated.engines.requests)
    assert (gated.usage.event.outcome, gated.usage.event.num_prompt_tokens) == ("adapter_gone", 40)


def test_a_caller_that_leaves_ends_its_requests(gated: Site) -> None:
    async def steps(engines: Gated, call: asyncio.Task[Any]) -> None:
        await settle()
        call.cancel()

    with pytest.raises(asyncio.CancelledError):
        drive(gated, steps)
    assert len(gated.engines.closed) == 1
    assert (gated.usage.event.outcome, gated.usage.event.num_prompt_tokens) == ("cancelled", 0)


def test_it_is_charged_as_any_request_of_the_tenant(site_of: Callable[..., Site]) -> None:
    site = site_of(tokens(1, cached=16), tokens(2, reason="stop", cached=16))
    site.sample(num_samples=3, tenant="acme", params={"prompt_logprobs": 0})
    event = site.usage.event
    assert (event.tenant, event.model, event.digest, event.outcome) == ("acme", "~run", "a" * 64, "ok")
    assert (event.num_prompt_tokens, event.num_cached_tokens, event.num_output_tokens) == (40, 16, 6)


def test_limits_of_tenant_and_key(site_of: Callable[..., Site], catalog: Catalog) -> None:
    site = site_of(tokens(1, reason="stop"))
    catalog.tenants.create("acme", Limits(tpm_limit=60))
    key = catalog.keys.create("k", tenant="acme", scopes=["infer"], limits=Limits(rpm_limit=1)).key
    with pytest.raises(RateLimited):
        site.sample(tenant="acme", num_samples=4)  # 40 of the prompt and 4 × 8
    site.sample(tenant="acme", key_id=key.id)
    with pytest.raises(RateLimited):
        site.sample(tenant="acme", key_id=key.id)
    site.sample(tenant="other")
    catalog.tenants.update("acme", blocked=True)
    with pytest.raises(PermissionDenied, match="blocked"):
        site.sample(tenant="acme")
    assert len(site.engines.requests) == 2


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"base": "other"}, BaseNotFound, "base 'other' is not served here, but tiny"),
        ({"num_samples": 0}, RequestError, "ask for 1 to 1024"),
        ({"prompt_ids": ()}, RequestError, "the prompt is empty"),
        ({"prompt_ids": tuple(range(250))}, ContextLengthExceeded, "maximum context length is 256"),
        ({"adapter": adapter_ref("b" * 64)}, BaseMismatch, "a@1 was trained on another base"),
    ],
)
def test_wrong_calls(site_of: Callable[..., Site], fields: dict[str, Any], error: type[LorayError], words: str) -> None:
    with pytest.raises(error, match=words):
        site_of().sample(**fields)


def test_retired_on_every_replica(site_of: Callable[..., Site]) -> None:
    site = site_of()
    asyncio.run(site.rollouts.retire(["a" * 64, "b" * 64]))
    assert site.engines.retired == ["a" * 64, "b" * 64]


def test_nobody_samples_it_over_http(site_of: Callable[..., Site], catalog: Catalog) -> None:
    """Neither another tenant, nor the one whose run it is: only the trainer has the reference."""
    site = site_of(tokens(1, reason="stop"))
    site.sample(tenant="acme")
    keys = {}
    for tenant in ("acme", "beta"):
        catalog.tenants.create(tenant)
        keys[tenant] = catalog.keys.create(tenant, tenant=tenant, scopes=["infer"]).secret
    keys["admin"] = catalog.keys.create("admin", scopes=["admin"]).secret
    num_asked = len(site.engines.requests)
    with TestClient(site.app) as client:
        for secret in keys.values():
            headers = {"Authorization": f"Bearer {secret}"}
            for model in ("~run", "~run@3", "acme/~run", "a" * 64):
                for path, body in {"completions": {"prompt": "a"}, "embeddings": {"input": "a"}}.items():
                    answer = client.post(f"/v1/{path}", json={"model": model, **body}, headers=headers)
                    assert answer.status_code == 404, answer.text
            assert "~" not in client.get("/v1/models", headers=headers).text
    assert len(site.engines.requests) == num_asked


def test_a_rollout_of_an_engine_of_this_process(
    base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """From a trainer's files to tokens, as by HTTP under the name under which they are published."""
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    folder = peft_folder(base)
    read = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    ref, files = ephemeral(read, base, run="run", step=1, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    catalog, loader = Catalog(settings.catalog), AdapterLoader(base, settings)
    publish(folder, base, Destination("tone", AdapterStore(open_store(settings.store)), catalog))
    stream = start_engine(ServeSpec(base=base.name, dtype="float32", pool_bytes=1 << 20, num_threads=1), base, loader)
    engines: Any = LocalEngineClient(stream)
    try:
        site = Site(base, catalog, settings.catalog, engines)
        site.ref = ref
        with pytest.raises(AdapterGone, match="publish it again"):
            site.sample()
        loader.cache.put(ref.digest, files)
        asked = {"seed": 5, "max_tokens": 12, "ignore_eos": True}
        result = site.sample(num_samples=3, params=asked)
        assert len({s.token_ids for s in result.sequences}) == 3
        assert [s.num_cached_tokens for s in result.sequences] == [0, 32, 32]
        assert {len(s.logprobs) for s in result.sequences} == {12}
        first, *_ = result.sequences
        scored = site.sample(prompt_ids=PROMPT + first.token_ids, params={"max_tokens": 0, "prompt_logprobs": 0})
        assert scored.prompt_logprobs is not None
        assert scored.prompt_logprobs[-12:] == first.logprobs
        with TestClient(site.app, base_url="http://127.0.0.1") as client:
            body = {"model": "tone", "prompt": list(PROMPT), "logprobs": 0, "return_token_ids": True} | asked
            (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert choice["logprobs"]["token_logprobs"] == list(first.logprobs)
        asyncio.run(engines.retire([ref.digest]))
        assert not asyncio.run(stream.adapters([ref.digest]))
    finally:
        stream.stop()
        catalog.close()
