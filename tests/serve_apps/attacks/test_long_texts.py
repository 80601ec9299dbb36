"""However many very long texts a tenant sends, another tenant's waits for at most one of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import Overloaded
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer
from serve_apps.gateway import bases
from serve_apps.gateway.bases import PromptEncoder
from tests.fixtures.tiny import CHAT_TEMPLATE, byte_tokenizer
from tests.serve_apps.attacks.front import front
from tests.serve_apps.gateway.scripted import ScriptedEngines

LIMIT = 1 << 20
REST = "x" * 140_000  # behind the first letter of who asks


class Held(Tokenizer):
    """The tiny tokenizer, which encodes nothing long before `release` is set. `order`: first letters of long texts."""

    def __init__(self) -> None:
        self.order = ""
        self.release = threading.Event()
        super().__init__(byte_tokenizer().backend_tokenizer)

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        if len(text) >= len(REST):
            self.order += text[0]
            assert self.release.wait(60)
            return (1,)
        return super().encode(text, special=special)


@pytest.fixture
def tokenizer() -> Iterator[Held]:
    tokenizer = Held()
    yield tokenizer
    tokenizer.release.set()


@pytest.fixture
def encoder(tokenizer: Held, tiny_base: Callable[..., BaseModel]) -> Iterator[PromptEncoder]:
    encoder = PromptEncoder(tiny_base(), tokenizer, ChatTemplates({"default": CHAT_TEMPLATE}))
    yield encoder
    encoder.close()


def test_tenants_have_their_very_long_texts_encoded_in_turn(encoder: PromptEncoder, tokenizer: Held) -> None:
    async def run() -> None:
        flood = [asyncio.create_task(encoder.texts(["f" + REST], LIMIT, "flood")) for _ in range(8)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(encoder.texts([name[0] + REST], LIMIT, name)) for name in ("acme", "beta")]
        await asyncio.sleep(0)
        tokenizer.release.set()
        await asyncio.gather(*flood, *others)

    asyncio.run(run())
    assert sorted(tokenizer.order) == sorted("ab" + 8 * "f")
    assert tokenizer.order.index("a") <= 2  # after the one that is encoded, and the flood's turn at most
    assert tokenizer.order.index("b") <= 3


def test_nobody_waits_for_ever(encoder: PromptEncoder, tokenizer: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder._long_texts, "_most", bases.LONG_TEXTS._replace(wait_s=0.01))

    async def run() -> None:
        held = asyncio.create_task(encoder.texts(["f" + REST], LIMIT, "flood"))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="1 very long texts are under way, and tenant acme had no turn in 0"):
            await encoder.texts(["a" + REST], LIMIT, "acme")
        tokenizer.release.set()
        assert await held == [(1,)]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "num"),
    [
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, 2),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, 1),
        ("/detokenize", {"tokens": [64, 65]}, 1),
        ("/v1/completions", {"prompt": "x", "bad_words": ["y"]}, 2),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": {"name": "look"}}],
                "tool_choice": "required",
            },
            3,  # with the tools' grammar and without bad words
        ),
    ],
)
def test_every_text_is_the_caller_s(
    tiny_base: Callable[..., BaseModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    num: int,
) -> None:
    base, run, asked = tiny_base(), PromptEncoder._run, list[str]()

    def noting(self: PromptEncoder, tenant: str, *rest: Any) -> Any:
        asked.append(tenant)
        return run(self, tenant, *rest)

    monkeypatch.setattr(PromptEncoder, "_run", noting)
    with front(base, tmp_path, ("acme",), ScriptedEngines()) as gateway:
        answer = gateway.post("acme", path, **body)
    assert asked == ["acme"] * num, answer.text
