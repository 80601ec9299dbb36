"""Questions that tests ask a server, and waiting for an answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import openai

from tests.fixtures.cluster import Served

PROMPT = "What is the capital of France?"
GREEDY: Any = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
LONG: Any = {"max_tokens": 480, "extra_body": {"ignore_eos": True}}
CHAT: Any = [{"role": "user", "content": "hi"}]


def answer(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text


def answer_of(served: Served, model: str) -> str:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        return answer(client, model)


def status(served: Served) -> Any:
    return httpx.get(f"{served.url}/status", timeout=30).json()


def eventually(what: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (good := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return good
