"""A coding agent's loop with tools over /v1/messages: its requests as Anthropic's client 2.14 has sent them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from loray.bases.registry import BaseModel
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import ScriptedEngines, delta, gateway_app

# A count of tokens, and four turns: `answer` is what the model wrote, with calls as Hermes writes them.
RECORDED = json.loads((Path(__file__).parent / "coding_agent.json").read_text(encoding="utf-8"))
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def message_of(stream: str) -> Any:
    """The message as the client puts it together."""
    message: Any = None
    buffers: dict[int, bytes] = {}
    for event in stream.removesuffix("\n\n").split("\n\n"):
        _, data = event.split("\n")
        body = json.loads(data.removeprefix("data: "))
        if body["type"] != "ping":
            message = accumulate_event(event=EVENT.validate_python(body), current_snapshot=message, json_bufs=buffers)
    return message


def without_ids(content: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in block.items() if key not in ("id", "caller")} for block in content]


def test_a_recorded_loop(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base(max_position_embeddings=1 << 14)
    engines = ScriptedEngines()
    prompts: list[tuple[int, ...]] = []
    count, *turns = RECORDED
    with TestClient(gateway_app(base, sqlite_catalog(tmp_path), engines)) as client:

        def send(request: Any) -> Any:
            response = client.post(
                request["path"], json=request["body"] | {"model": base.name}, headers=request["headers"]
            )
            assert response.status_code == 200, response.text
            return response

        counted = send(count).json()["input_tokens"]
        for i, turn in enumerate(turns):
            text = turn["answer"]
            engines.script = [delta(text[at : at + 7]) for at in range(0, len(text), 7)] + [delta("", "stop")]
            message = message_of(send(turn).text)
            prompts.append(engines.requests[-1].prompt_ids)
            is_last = i + 1 == len(turns)
            assert message.stop_reason == ("end_turn" if is_last else "tool_use")
            if not is_last:  # the client has sent it back
                answered = turns[i + 1]["body"]["messages"][-2]
                written = json.loads(json.dumps([block.to_dict() for block in message.content]))
                assert (answered["role"], without_ids(answered["content"])) == ("assistant", without_ids(written))
    assert counted == len(prompts[0])
    # Each prompt begins with the one before, so that the prefix cache has it.
    assert all(later[: len(prompt)] == prompt for prompt, later in pairwise(prompts))
    assert [request.params.max_tokens for request in engines.requests] == [(1 << 14) - len(p) for p in prompts]
