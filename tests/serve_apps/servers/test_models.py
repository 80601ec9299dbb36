"""Names of models over HTTP: versions, aliases, what was just published, what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from loray.catalog import AdapterVersion
from tests.fixtures.asking import answer, eventually, status
from tests.fixtures.cluster import Served


def test_every_name_of_a_model(client: openai.OpenAI, server: Served, tone: list[AdapterVersion]) -> None:
    server.catalog.aliases.move("tone", "canary", 1)
    by_version = {v.version: answer(client, v.label) for v in tone}
    base = answer(client, "tiny")
    assert len({base, *by_version.values()}) == 4  # every adapter has its own output
    assert answer(client, "tone") == by_version[3]
    assert eventually(lambda: answer(client, "tone@canary") == by_version[1])
    models = [m.id for m in client.models.list()]
    assert models[0] == "tiny"
    assert "tone" in models
    labels = {label for r in status(server)["replicas"] for label in r["adapters_in_pool"]}
    assert {v.label for v in tone} <= labels


def test_promote_changes_the_next_answer_and_rollback_restores_it(
    client: openai.OpenAI, server: Served, tone: list[AdapterVersion]
) -> None:
    answers = {v.version: answer(client, v.label) for v in tone}
    server.catalog.aliases.move("tone", "prod", 2)
    assert eventually(lambda: answer(client, "tone") == answers[2])
    server.catalog.aliases.move("tone", "prod", 1)
    assert eventually(lambda: answer(client, "tone@prod") == answers[1])
    server.catalog.aliases.rollback("tone", "prod")
    assert eventually(lambda: answer(client, "tone") == answers[2])


def test_what_was_just_published_answers_at_once(
    client: openai.OpenAI, publish_lora: Callable[[str, int], AdapterVersion]
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        answer(client, "fresh")
    assert missing.value.code == "model_not_found"
    publish_lora("fresh", 7)
    assert answer(client, "fresh") != answer(client, "tiny")


def test_a_damaged_adapter_fails_alone(
    client: openai.OpenAI, server: Served, publish_lora: Callable[[str, int], AdapterVersion]
) -> None:
    version = publish_lora("damaged", 9)
    sha256 = version.manifest.files["adapter_model.safetensors"]
    (blob,) = Path(server.settings.store.removeprefix("file://")).rglob(sha256)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(data))
    with pytest.raises(openai.InternalServerError, match="damaged") as e:
        answer(client, "damaged")
    assert e.value.code == "adapter_damaged"
    assert answer(client, "tiny")
