"""The whole loop on one Ray cluster: train, publish, resolve, generate over HTTP, promote and roll back.

Served tokens and logprobs are compared with those of transformers + PEFT on the files in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from loray.adapters.manifest import verify_folder
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.publishing import Destination, publish
from loray.spec import AdapterManifest, AdapterRef, GenerateRequest, ServeSpec
from serve_apps.replica.startup import adapter_loader
from tests.fixtures.asking import eventually
from tests.fixtures.cluster import Served
from tests.fixtures.engines import GREEDY, Spy, run
from tests.fixtures.peft_adapters import Oracle, TestAdapter, make_adapter
from tests.fixtures.recipes import write
from tests.fixtures.runs import train_here
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.cluster

PROMPT = "the adapter says: abcdefghijklm"
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def trained(
    served: Served, command_job: Trained, api_job: Trained, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """Method → name and digest of an adapter. The cluster has trained LoRA and LongLoRA, this process the others.
    Every text of the data has the invocation, and the prompt ends in it.
    """
    adapters: dict[str, dict[str, Any]] = {
        "vera": {"method": "vera", "rank": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        "alora": {"method": "alora", "rank": 8, "invocation": PROMPT[-2:]},
    }
    found: dict[str, tuple[str, str]] = {}
    for method, adapter in adapters.items():
        folder = tmp_path_factory.mktemp(method)
        recipe = write(
            folder,
            name=f"loop-{method}",
            base=served.base.name,
            adapter=adapter,
            dtype="float32",
            max_steps=4,
            optimizer={"learning_rate": 0.1, "schedule": "constant"},
            evaluation={"keep_best": False},
            data={"train": "data.jsonl", "eval_fraction": 0.1, "max_length": 64},
        )
        train_here(recipe, served.settings, folder)
        version = served.catalog.adapters.version(f"loop-{method}", 1)
        found[method] = version.name, version.digest
    ends = {"lora": command_job.events[-1], "longlora": api_job.events[-1]}
    assert [end["event"] for end in ends.values()] == ["published"] * 2, f"{command_job.log}\n{api_job.log}"
    return {method: (end["name"], end["digest"]) for method, end in ends.items()} | found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        yield client


def ask(client: openai.OpenAI, model: str) -> Any:
    options: Any = {"temperature": 0, "max_tokens": NUM_TOKENS, "logprobs": 1, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model=model, prompt=PROMPT, **options).choices[0]


def from_the_store(served: Served, ref: AdapterRef, folder: Path) -> tuple[TestAdapter, AdapterManifest]:
    served.store.fetch(ref.digest, folder)
    manifest = verify_folder(folder)
    return TestAdapter(ref, folder, manifest.rope_parameters), manifest


class Computed(NamedTuple):
    """`logits` (tokens, vocabulary): those from which each token was chosen."""

    tokens: list[int]
    logits: Tensor


def engine_logits(served: Served, refs: list[AdapterRef | None], ids: tuple[int, ...]) -> list[Computed]:
    """Greedy tokens and their logits, for all adapters in one batch; adapters are loaded as a replica loads them."""
    spec = ServeSpec(base=served.base.name, dtype="float32", pool_bytes=4 << 20)
    engine = build_engine(spec, served.base, adapter_loader(served.base, served.settings))
    spy = Spy(engine)
    params = GREEDY.model_copy(update={"max_tokens": NUM_TOKENS})
    try:
        tokens = run(engine, [GenerateRequest(str(i), ids, params, ref) for i, ref in enumerate(refs)])
    finally:
        engine.close()
    return [Computed(tokens[str(i)], torch.stack(spy.logits[str(i)])) for i in range(len(refs))]


def test_every_method_is_served_as_peft_computes_it(
    client: openai.OpenAI, served: Served, trained: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer(PROMPT)["input_ids"])
    refs = {method: served.catalog.adapters.resolve(name) for method, (name, _) in trained.items()}
    assert {method: ref.digest for method, ref in refs.items()} == {
        method: digest for method, (_, digest) in trained.items()
    }
    adapters = {method: from_the_store(served, ref, tmp_path / method) for method, ref in refs.items()}
    for method, (_, manifest) in adapters.items():
        assert manifest.method == method
        assert manifest.recipe is not None
        assert manifest.dtype_reason == "the recipe says so"
        assert (manifest.rope_parameters is not None) == (method == "longlora")
        assert (manifest.projection is not None) == (method == "vera")
        assert (manifest.invocation_tokens == ids[-2:]) == (method == "alora")
    assert adapters["longlora"][1].context_length == 128

    oracle = Oracle(served.base, [adapter for adapter, _ in adapters.values()])
    base, *computed = engine_logits(served, [None, *refs.values()], ids)
    for (method, (adapter, _)), (tokens, logits) in zip(adapters.items(), computed, strict=True):
        expected = oracle.logits([*ids, *tokens[:-1]], adapter)[len(ids) - 1 :]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert expected.argmax(-1).tolist() == tokens
        assert (logits[0] - base.logits[0]).abs().max() > 0.1, f"{method} does next to nothing: nothing is shown"

        answer = ask(client, trained[method][0])  # over HTTP, from the replica in its own process
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        drawn = expected.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs.token_logprobs), drawn, atol=1e-4, rtol=1e-4)


def test_workers_of_the_cluster_measure_before_publishing(api_job: Trained) -> None:
    *_, measured, published = api_job.events
    assert (measured["event"], published["event"]) == ("measure", "published")
    assert (published["aliases"], published["refusal"]) == (["measured"], None)
    assert len([e for e in published["evaluations"] if e["metric"] == "perplexity"]) == 6


def test_promote_changes_the_next_answer_and_rollback_restores_it(
    client: openai.OpenAI, served: Served, trained: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    name, _ = trained["vera"]
    folder = tmp_path / "second"
    make_adapter(served.base, folder, LoraConfig(r=8, target_modules=["q_proj", "o_proj"]), seed=5, std=0.3)
    served.catalog.aliases.move(name, "prod", 1)
    second = publish(folder, served.base, Destination(name, served.store, served.catalog))
    first, new = (ask(client, f"{name}@{version}").logprobs for version in (1, second.version))
    assert first != new

    def is_answered_by(logprobs: Any) -> bool:
        return eventually(lambda: ask(client, name).logprobs == logprobs)

    assert is_answered_by(first)
    served.catalog.aliases.move(name, "prod", second.version)
    assert is_answered_by(new)
    served.catalog.aliases.rollback(name, "prod")
    assert is_answered_by(first)


def test_an_adapter_of_another_base_is_not_found(
    client: openai.OpenAI, served: Served, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    other = tiny_base(num_hidden_layers=3)
    publish(peft_folder(other), other, Destination("loop-alien", served.store, served.catalog))
    with pytest.raises(openai.NotFoundError, match="trained on another base") as e:
        ask(client, "loop-alien")
    assert e.value.code == "base_mismatch"
    assert "loop-alien" not in [m.id for m in client.models.list()]
