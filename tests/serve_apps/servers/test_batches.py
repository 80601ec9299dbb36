"""Batches with OpenAI's client, unmodified, from the upload to the output."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest

from loray.catalog import AdapterVersion
from tests.fixtures.cluster import Served

CHAT = "/v1/chat/completions"
TIMEOUT_S = 90.0


def upload(client: openai.OpenAI, lines: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return client.files.create(file=("lines.jsonl", text.encode()), purpose="batch").id


def chat(custom_id: str, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body | fields}


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while (batch := client.batches.retrieve(batch_id)).status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch


def rows(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_from_upload_to_output(client: openai.OpenAI, server: Served, tone: list[AdapterVersion]) -> None:
    models = [server.base.name, *(version.label for version in tone)]
    lines = [chat(f"{model} {i}", model) for model in models for i in range(5)] + [chat("nobody", "no-such-model")]
    file = upload(client, lines)
    created = client.batches.create(
        input_file_id=file, endpoint=CHAT, completion_window="24h", metadata={"of": "a test"}
    )
    assert (created.object, created.status, created.metadata) == ("batch", "validating", {"of": "a test"})
    batch = ended(client, created.id)
    assert batch.status == "completed", batch
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (21, 20, 1)
    found = rows(client, batch.output_file_id)
    assert sorted(row["custom_id"] for row in found) == sorted(line["custom_id"] for line in lines[:-1])
    texts: dict[str, set[str]] = {}
    for row in found:
        assert row["response"]["status_code"] == 200
        answer = row["response"]["body"]
        assert answer["object"] == "chat.completion"
        texts.setdefault(answer["model"], set()).add(answer["choices"][0]["message"]["content"])
    for model, answers in texts.items():
        body = chat("", model)["body"]
        assert answers == {client.chat.completions.create(**body).choices[0].message.content}
    (failed,) = rows(client, batch.error_file_id)
    assert failed["custom_id"] == "nobody"
    assert failed["response"]["body"]["error"]["code"] == "model_not_found"
    assert created.id in [one.id for one in client.batches.list(limit=100)]
    usage = server.catalog.usage.sums(["tenant"])
    assert sum(row.num_batch_tokens for row in usage) >= 0


def test_other_endpoints(client: openai.OpenAI, server: Served) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/responses": {"input": "a", "max_output_tokens": 2},
    }
    for endpoint, body in bodies.items():
        line = {"custom_id": "1", "method": "POST", "url": endpoint, "body": {"model": server.base.name} | body}
        file = upload(client, [line])
        batch = client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]
        batch = ended(client, batch.id)
        assert batch.status == "completed", batch
        assert len(rows(client, batch.output_file_id)) == 1


def test_what_is_refused(client: openai.OpenAI, server: Served) -> None:
    wrong = upload(client, [chat("1", server.base.name), chat("1", server.base.name)])
    batch = client.batches.create(input_file_id=wrong, endpoint=CHAT, completion_window="24h")
    batch = ended(client, batch.id)
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [("duplicate_custom_id", 2)]
    given: dict[str, Any] = {"input_file_id": wrong, "endpoint": CHAT, "completion_window": "24h"}
    for fields, param in (({"completion_window": "1h"}, "completion_window"), ({"endpoint": "/v1/x"}, "endpoint")):
        with pytest.raises(openai.BadRequestError) as error:
            client.batches.create(**given | fields)
        assert error.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(**given | {"input_file_id": "file-x"})
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError) as unknown:
            call("batch-x")
        assert unknown.value.code == "batch_not_found"


def test_cancelled(client: openai.OpenAI, server: Served) -> None:
    file = upload(client, [chat(f"{i}", server.base.name, max_tokens=200, ignore_eos=True) for i in range(200)])
    batch = client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status == "cancelling"
    assert ended(client, batch.id).status == "cancelled"
    with pytest.raises(openai.APIStatusError):
        client.batches.cancel("batch-x")
