"""A tenant whose chat templates are slow delays neither base templates nor those of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import Overloaded, RequestError
from loray.schemas.openai import ChatCompletionRequest, parse
from loray.text.templates import ChatTemplate, ChatTemplates, IsolatedRenderer
from loray.text.tokenizer import Tokenizer
from serve_apps.gateway import bases
from serve_apps.gateway.bases import PromptEncoder
from tests.fixtures.tiny import CHAT_TEMPLATE, byte_tokenizer

SLOW, OWN = "slow", "{{ messages[0].content }}"


@pytest.fixture
def held() -> threading.Event:
    """Set while a rendering of SLOW holds a thread."""
    return threading.Event()


@pytest.fixture
def release(held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Renderings of SLOW end when this is set."""
    event = threading.Event()

    def render(self: IsolatedRenderer, template: ChatTemplate, messages: Any, **options: Any) -> str:
        if template.source == SLOW:
            held.set()
            assert event.wait(60)
        return template.render(messages, **options)

    monkeypatch.setattr(IsolatedRenderer, "render", render)
    yield event
    event.set()


@pytest.fixture
def encoder(tiny_base: Callable[..., BaseModel]) -> Iterator[PromptEncoder]:
    tokenizer = Tokenizer(byte_tokenizer().backend_tokenizer)
    encoder = PromptEncoder(tiny_base(), tokenizer, ChatTemplates({"default": CHAT_TEMPLATE}))
    yield encoder
    encoder.close()


async def ask(encoder: PromptEncoder, template: str | None, tenant: str, num_characters: int = 10) -> int:
    message = {"role": "user", "content": "x" * num_characters}
    request = parse(ChatCompletionRequest, {"model": "m", "messages": [message]})
    dialect = await encoder.dialect(None, template, tenant, with_tools=False)
    return len(await encoder.chat(request, dialect, 1 << 20, tenant))


def num_free(encoder: PromptEncoder) -> int:
    """Places of renderings."""
    return bases.OWN_TEMPLATES.total - encoder._own_templates._taken[""]


def test_a_tenant_with_slow_templates_holds_one_place(
    encoder: PromptEncoder, held: threading.Event, release: threading.Event
) -> None:
    async def run() -> None:
        attack = [asyncio.create_task(ask(encoder, SLOW, "greedy")) for _ in range(10)]
        async with asyncio.timeout(30):
            while not held.is_set():
                await asyncio.sleep(0)
            assert await ask(encoder, None, "other", 5_000) > 5_000
            assert await ask(encoder, None, "greedy", 5_000) > 5_000
            assert await ask(encoder, OWN, "other") == 10
        assert not any(task.done() for task in attack)
        release.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*attack)

    asyncio.run(run())


def test_where_all_places_are_held_the_others_have_their_turn_next(
    encoder: PromptEncoder, release: threading.Event
) -> None:
    order: list[str] = []

    async def run() -> None:
        async def one(template: str, tenant: str) -> None:
            await ask(encoder, template, tenant)
            order.append(tenant)

        for tenant in ("first", "second"):
            assert await ask(encoder, OWN, tenant) == 10
        held = [asyncio.create_task(one(SLOW, tenant)) for tenant in ("first", "second", "first", "first")]
        while num_free(encoder) or not encoder._own_templates._waiting:
            await asyncio.sleep(0)
        other = asyncio.create_task(one(OWN, "other"))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(other, *held)

    asyncio.run(run())
    assert order.index("other") <= 2


def test_nobody_waits_for_ever(
    encoder: PromptEncoder, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder._own_templates, "_most", bases.OWN_TEMPLATES._replace(wait_s=0.01))

    async def run() -> None:
        held = [asyncio.create_task(ask(encoder, SLOW, tenant)) for tenant in ("first", "second")]
        while num_free(encoder):
            await asyncio.sleep(0)
        for tenant in ("first", "other"):
            with pytest.raises(Overloaded, match=f"tenant {tenant} had no turn"):
                await ask(encoder, OWN, tenant)
        held[0].cancel()  # its client has left; the place is held until its thread has ended
        await asyncio.sleep(0)
        assert not num_free(encoder)
        release.set()
        await held[1]
        while num_free(encoder) < bases.OWN_TEMPLATES.total:
            await asyncio.sleep(0)
        assert not encoder._own_templates._waiting
        assert await ask(encoder, OWN, "other") == 10

    asyncio.run(run())


def test_a_template_that_does_not_end_is_stopped_and_then_refused() -> None:
    renderer = IsolatedRenderer()
    endless = ChatTemplate("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}")
    for _ in range(3):
        with pytest.raises(RequestError, match="too much time"):
            renderer.render(endless, [{"role": "user", "content": "x"}])
    renderer.close()
