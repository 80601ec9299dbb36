"""The Python in README and docs/, as it stands there, on a server with the tiny base."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import openai
import pytest
from pydantic import BaseModel, Field

from loray.publishing import Destination, publish
from tests.cli.documented import blocks
from tests.conftest import REPOSITORY
from tests.fixtures.cluster import Served

# The pages with Python, and which of the names below their blocks use.
PAGES = ("README.md", "docs/guide/api.md", "docs/howto/canary.md")
FINE_TUNING = "docs/guide/training.md"  # which tests/serve_apps/gateway/fine_tuning/test_jobs.py runs
REWARDS = "docs/guide/train-and-serve.md"
NAMES = ("support-tone", "dates")
# The base is random: without these it may go on to the end of its context.
SHORTER = {
    "messages=messages, t": "max_tokens=8, messages=messages, t",
    '@prod", messages=': '@prod", max_tokens=8, messages=',
    "time.sleep(10)": "time.sleep(0.1)",
    ".message.reasoning_content": ".message",  # which a base that does not think leaves out
    "instructions=": "max_output_tokens=8, instructions=",
}


# UUIDs instead of dates: a random base also writes 29 February of years without one, which the format allows.
class Meeting(BaseModel):
    number: UUID
    is_over: bool


@pytest.fixture(scope="module")
def names(served_alone: Served, peft_folder: Callable[..., Path]) -> None:
    base, catalog = served_alone.base, served_alone.catalog
    for name in NAMES:
        publish(peft_folder(base), base, Destination(name, served_alone.store, catalog))
        catalog.aliases.move(name, "prod", 1)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, served_alone: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = {"model": "dates", "max_tokens": 2, "messages": [{"role": "user", "content": "When?"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    Path("questions.jsonl").write_text(json.dumps(line) + "\n")
    code = "".join(_python(REPOSITORY / page))
    for text, other in (SHORTER | {"http://127.0.0.1:8000": served_alone.url}).items():
        code = code.replace(text, other)
    with openai.OpenAI(base_url=f"{served_alone.url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        given: dict[str, Any] = {"client": client, "BaseModel": BaseModel, "Field": Field, "date": UUID}
        given |= {"Path": Path, "time": time}
        given |= {"Meeting": Meeting, "conversation_id": "c1", "run": lambda call: call.function.arguments}
        given["messages"] = [{"role": "user", "content": "When was Ada born?"}]
        exec(compile(code, page, "exec", dont_inherit=True), given)
        if given["client"] is not client:
            given["client"].close()
    if "answer" in given and "Person" in given:
        assert isinstance(given["answer"].choices[0].message.parsed, given["Person"])


def test_rewards() -> None:
    (code,) = _python(REPOSITORY / REWARDS)
    given: dict[str, Any] = {}
    exec(compile(code, REWARDS, "exec", dont_inherit=True), given)
    assert given["short"]({}, "word") == -0.04
    guess = given["Guess"]()
    asyncio.run(guess.start({"number": 7}))
    turns = [asyncio.run(guess.step(answer)) for answer in ("3", " 7")]
    assert [(turn.reward, turn.done) for turn in turns] == [(0.0, False), (1.0, True)]


def test_every_page_with_python_is_run() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]
    assert {str(page.relative_to(REPOSITORY)) for page in pages if _python(page)} == {*PAGES, FINE_TUNING, REWARDS}
    assert not [text for text in SHORTER if not any(text in code for page in pages for code in _python(page))]


def _python(page: Path) -> list[str]:
    found = blocks(page.read_text(encoding="utf-8"))
    return [block.text for block in found if block.language == "python" and not block.is_marked]
