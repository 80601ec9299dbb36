"""One gateway of two bases, on scripted engines: every name finds its base. And the threads that encode prompts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily

from loray.bases.registry import BaseModel, get_bases
from loray.catalog import Catalog
from loray.errors import ContextLengthExceeded, RequestError, SpecError
from loray.schemas.openai import ChatCompletionRequest, parse
from loray.schemas.status import AutoscalingStatus
from loray.spec import AutoscalingSpec, Principal, ServeSpec
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer
from serve_apps.gateway.bases import PromptEncoder, ServedBase
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import (
    CHAT,
    GatewayClient,
    ScriptedEngines,
    adapter_ref,
    delta,
    error_of,
    fleet_app,
    register,
)
from tests.fixtures.tiny import CHAT_TEMPLATE, byte_tokenizer


class Fleet:
    """Two bases, `one` with an adapter `of-one` and `two` with `of-two`; each says its name."""

    def __init__(self, one: BaseModel, two: BaseModel, catalog: Catalog) -> None:
        self.one, self.two = one, two
        register(catalog, "of-one", one.fingerprint)
        register(catalog, "of-two", two.fingerprint, context_length=128)
        register(catalog, "alien", "f" * 64)
        self.engines = {base.name: ScriptedEngines([delta(base.name, "stop")]) for base in (one, two)}
        limits = {one.name: None, two.name: 200}
        self.served = [
            ServedBase.open(ServeSpec(base=b.name, max_model_len=limits[b.name]), b, self.engines[b.name])
            for b in (one, two)
        ]
        self.client: GatewayClient

    def said(self, model: str) -> str:
        response = self.client.complete(model=model)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


@pytest.fixture
def fleet(
    base: BaseModel,
    tiny_base: Callable[..., BaseModel],
    catalog: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Fleet]:
    monkeypatch.setattr("serve_apps.gateway.bases.FRESH_S", 0.0)
    made = Fleet(base, tiny_base(max_position_embeddings=256), catalog)
    with GatewayClient(fleet_app(made.served, sqlite_catalog(tmp_path)), raise_server_exceptions=False) as client:
        made.client, client.base = client, base.name
        yield made


def test_a_name_goes_to_its_base(fleet: Fleet) -> None:
    one, two = fleet.one.name, fleet.two.name
    asked = (one, "of-one", "of-one@1", f"{one}:of-one", two, "of-two", f"{two}:of-two", f"{two}:{two}")
    assert [fleet.said(model) for model in asked] == [one] * 4 + [two] * 4
    requests = fleet.engines[two].requests
    assert [r.adapter and r.adapter.name for r in requests] == [None, "of-two", "of-two", None]
    chat = fleet.client.chat(model="of-two").json()
    plain = fleet.client.complete(model=one).json()
    assert chat["choices"][0]["message"]["content"] == two
    assert chat["system_fingerprint"].endswith(fleet.two.fingerprint[:12])
    assert plain["system_fingerprint"].endswith(fleet.one.fingerprint[:12])


def test_each_base_has_its_own_limit(fleet: Fleet) -> None:
    cards = {card["id"]: card for card in fleet.client.get("/v1/models").json()["data"]}
    assert list(cards) == [fleet.one.name, fleet.two.name, "of-one", "of-two"]
    assert [card["parent"] for card in cards.values()] == [None, None, fleet.one.name, fleet.two.name]
    assert [card["max_model_len"] for card in cards.values()] == [512, 200, 512, 128]
    too_long: dict[str, Any] = {"prompt": [7] * 150, "max_tokens": 100}
    assert fleet.client.complete(**too_long, model=fleet.one.name).status_code == 200
    refused = fleet.client.complete(**too_long, model=fleet.two.name)
    assert error_of(refused, 400)["code"] == "context_length_exceeded"


def test_pages_of_models_go_over_all_bases(fleet: Fleet) -> None:
    seen: list[str] = []
    while page := fleet.client.get("/v1/models", params={"limit": 1} | ({"after": seen[-1]} if seen else {})).json():
        seen += [card["id"] for card in page["data"]]
        if not page["has_more"]:
            break
    assert seen == [fleet.one.name, fleet.two.name, "of-one", "of-two"]
    assert fleet.client.get(f"/v1/models/{fleet.two.name}").json()["root"] == fleet.two.name
    assert fleet.client.get("/v1/models/of-two").json()["parent"] == fleet.two.name


def test_an_adapter_of_a_base_that_is_not_served(fleet: Fleet) -> None:
    error = error_of(fleet.client.complete(model="alien"), 404)
    assert error["code"] == "base_mismatch"
    assert f"{fleet.one.name} and {fleet.two.name}, which this deployment serves" in error["message"]
    for name, code in (("of-two", "base_mismatch"), (fleet.two.name, "model_not_found")):
        assert error_of(fleet.client.complete(model=f"{fleet.one.name}:{name}"), 404)["code"] == code


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/responses", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": CHAT}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_there_is_no_default_base(fleet: Fleet, path: str, body: dict[str, Any]) -> None:
    error = error_of(fleet.client.post(path, json=body), 400)
    assert error["param"] == "model"
    assert f"{fleet.one.name} and {fleet.two.name}" in error["message"]


def test_messages_name_what_the_key_is_for(fleet: Fleet) -> None:
    directory = fleet.client.app.state.gateway.directory  # type: ignore[attr-defined]
    one, two = fleet.one.name, fleet.two.name
    asked = (None, frozenset((two, "of-one")), frozenset(("of-one",)))
    assert [directory.base_names(Principal(models=m)) for m in asked] == [f"{one} and {two}", two, ""]


def test_health_and_status_say_which_base(fleet: Fleet) -> None:
    one, two = fleet.one.name, fleet.two.name
    status = fleet.client.get("/status").json()
    assert [(b["base"], b["status"], b["num_replicas"], b["num_adapters"]) for b in status["bases"]] == [
        (one, "ok", 1, 1),
        (two, "ok", 1, 1),
    ]
    assert ([r["base"] for r in status["replicas"]], status["totals"]["num_running"]) == ([one, two], 2)
    fleet.engines[two].replicas = []
    assert fleet.client.get("/health").json() == {"status": "degraded", "num_unavailable": 1}
    status = fleet.client.get("/status").json()
    assert (status["status"], [b["status"] for b in status["bases"]]) == ("degraded", ["ok", "degraded"])
    assert fleet.said(one) == one
    fleet.engines[one].replicas = []
    assert error_of(fleet.client.get("/health"), 503)["code"] == "engine_unavailable"


def test_a_base_that_is_asleep_is_well(fleet: Fleet) -> None:
    one, two = fleet.one.name, fleet.two.name
    served = fleet.served[1]
    asleep = AutoscalingSpec(min_replicas=0)
    served.spec = served.spec.model_copy(update={"autoscaling": asleep})
    engines = fleet.engines[two]
    engines.replicas, engines.cold = [], True
    engines.scaling = AutoscalingStatus(target=0, reason="no request", time=1.0)
    assert fleet.client.get("/health").json() == {"status": "ok"}
    status = fleet.client.get("/status").json()
    assert (status["status"], [b["status"] for b in status["bases"]]) == ("ok", ["ok", "asleep"])
    text = fleet.client.get("/metrics").text
    assert [f'loray_replicas_wanted{{base="{name}"}} {n}.0' in text for name, n in ((one, 1), (two, 0))] == [True] * 2
    engines.scaling = AutoscalingStatus(target=1, reason="a request waits", time=2.0)
    assert fleet.client.get("/health").json() == {"status": "ok"}  # the next request waits with it
    engines.failed = True
    assert fleet.client.get("/health").json() == {"status": "degraded", "num_unavailable": 1}
    assert fleet.client.get("/status").json()["bases"][1]["status"] == "degraded"


def test_metrics_say_which_base(fleet: Fleet) -> None:
    for base in (fleet.one, fleet.two):
        family = CounterMetricFamily("loray_generation_tokens", "Tokens generated.", labels=["replica"])
        family.add_metric(["r"], 3)
        fleet.engines[base.name].families.append([family])
    fleet.engines[fleet.two.name].families.append(None)
    text = fleet.client.get("/metrics").text
    for base, num_silent in ((fleet.one, 0), (fleet.two, 1)):
        assert f'loray_generation_tokens_total{{base="{base.name}",replica="r"}} 3.0' in text
        assert f'loray_replicas_reporting{{base="{base.name}"}} 1.0' in text
        assert f'loray_replicas_silent{{base="{base.name}"}} {num_silent}.0' in text
        assert f'loray_catalog_adapters{{base="{base.name}",gateway="local"}} 1.0' in text


def test_one_model_is_served_once(tmp_path: Path, base: BaseModel) -> None:
    (tmp_path / "bases").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bases" / name).symlink_to(base.path)
    with pytest.raises(SpecError, match="the bases a and b are the same model"):
        get_bases(tmp_path, ["a", "b"])
    assert [found.name for found in get_bases(tmp_path, ["b"])] == ["b"]


# -- prompts -----------------------------------------------------------------------------------------------------------

LIMIT = 1 << 20


class Watched(Tokenizer):
    """The tiny tokenizer, with the names of the threads that encode. Encoding "wait…" waits for `release`."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.release = threading.Event()
        super().__init__(byte_tokenizer().backend_tokenizer)
        self.threads.clear()

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        self.threads.append(threading.current_thread().name)
        if text.startswith("wait"):
            self.release.wait(60)
        return super().encode(text, special=special)


@pytest.fixture
def tokenizer() -> Watched:
    return Watched()


@pytest.fixture
def encoder(tokenizer: Watched, tiny_base: Callable[..., BaseModel]) -> PromptEncoder:
    return PromptEncoder(tiny_base(), tokenizer, ChatTemplates({"default": CHAT_TEMPLATE}))


async def encoded(encoder: PromptEncoder, *contents: str, limit: int = LIMIT, **options: Any) -> tuple[int, ...]:
    messages = [{"role": "user", "content": content} for content in contents]
    request = parse(ChatCompletionRequest, {"model": "m", "messages": messages})
    dialect = await encoder.dialect(None, None, "acme", with_tools=False)
    return await encoder.chat(request, dialect, limit, "acme", **options)


async def test_short_ones_are_encoded_at_once(encoder: PromptEncoder, tokenizer: Watched) -> None:
    assert await encoder.texts(["ab", (5, 6)], LIMIT, "acme") == [(64, 65), (5, 6)]
    await encoded(encoder, "hi")
    assert set(tokenizer.threads) == {"MainThread"}


async def test_many_short_ones_are_long_together(encoder: PromptEncoder, tokenizer: Watched) -> None:
    assert len(await encoder.texts(["x" * 4000] * 5, LIMIT, "acme")) == 5
    assert set(tokenizer.threads) == {"tokenizer_0"}


@pytest.mark.parametrize("contents", [["x" * 20_000], ["x"] * 1000])
async def test_long_chats_are_rendered_in_a_thread_too(
    encoder: PromptEncoder, tokenizer: Watched, contents: list[str]
) -> None:
    ids = await encoded(encoder, *contents)
    text = byte_tokenizer().apply_chat_template(
        [{"role": "user", "content": c} for c in contents], tokenize=False, add_generation_prompt=True
    )
    assert list(ids) == byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.threads == ["tokenizer_0"]


async def test_very_long_ones_delay_only_each_other(encoder: PromptEncoder, tokenizer: Watched) -> None:
    very_long = [asyncio.create_task(encoder.texts(["wait" + "x" * 200_000], LIMIT, "acme")) for _ in range(8)]
    await asyncio.sleep(0)
    await asyncio.gather(
        encoder.texts(["x"], LIMIT, "acme"), *(encoder.texts(["x" * 20_000], LIMIT, "acme") for _ in range(4))
    )
    assert not any(task.done() for task in very_long)
    tokenizer.release.set()
    assert [len(ids[0]) for ids in await asyncio.gather(*very_long)] == [200_004] * 8


async def test_what_cannot_fit_is_not_encoded(encoder: PromptEncoder, tokenizer: Watched) -> None:
    most = 10 * len("<|endoftext|>")  # the longest token
    for ask in (encoder.texts(["x" * (most + 1)], 10, "acme"), encoded(encoder, "x" * most, "x", limit=10)):
        with pytest.raises(ContextLengthExceeded, match=f"10 tokens, which have {most} characters at most"):
            await ask
    with pytest.raises(ContextLengthExceeded, match="11 messages"):
        await encoded(encoder, *["x"] * 11, limit=10)
    assert tokenizer.threads == []
    assert len((await encoder.texts(["x" * most], 10, "acme"))[0]) == most


async def test_of_a_longer_prompt_the_end_is_kept(encoder: PromptEncoder, tokenizer: Watched) -> None:
    most = 10 * len("<|endoftext|>")
    prompts: list[str | tuple[int, ...]] = ["x" * 10 * most + "abc", (1, 2, 3, 4), (5,)]
    assert await encoder.texts(prompts, 10, "acme", keep=3) == [(64, 65, 66), (2, 3, 4), (5,)]
    whole = await encoded(encoder, "hi", limit=100)
    assert await encoded(encoder, "hi", limit=100, keep=5) == whole[-5:]


async def test_a_template_that_refuses(tokenizer: Watched, tiny_base: Callable[..., BaseModel]) -> None:
    templates = ChatTemplates({"default": "{{ raise_exception('no users') }}"})
    encoder = PromptEncoder(tiny_base(), tokenizer, templates)
    with pytest.raises(RequestError, match="refuses these messages: no users"):
        await encoded(encoder, "x" * 20_000)
    with pytest.raises(RequestError, match="has no chat template; use /v1/completions"):
        await encoded(PromptEncoder(tiny_base(), tokenizer, ChatTemplates({})), "x")


async def test_an_adapters_template_is_rendered(encoder: PromptEncoder) -> None:
    adapter = adapter_ref("0" * 64, tool_parser="mistral")
    dialect = await encoder.dialect(adapter, "{{ messages[0].content }}!", "acme", with_tools=False)
    assert dialect.form == "mistral"
    request = parse(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "ab"}]})
    assert await encoder.chat(request, dialect, LIMIT, "acme") == (64, 65, 0)
    encoder.close()
