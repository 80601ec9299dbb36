"""aLoRA: an adapter is the base before its invocation, as in PEFT, and shares the base's blocks there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.request import Request
from loray.spec import NEVER, GenerateRequest
from tests.fixtures.engines import BLOCK_BYTES, Spy, fill_up, ids, make_engine, outputs, request, run
from tests.fixtures.peft_adapters import ALL, Oracle, TestAdapter, make_adapter

INVOCATION = (300, 7, 301)
NUM_ADAPTERS = 6
# By what they are: the first has no invocation, the last has two. A block has 16 tokens.
PROMPTS: dict[str, list[int]] = {
    "none": ids(40),
    "a part of one": [*ids(20), *INVOCATION[:2], *ids(9, seed=1)],
    "at the beginning": [*INVOCATION, *ids(37)],
    "in the middle of a block": [*ids(37), *INVOCATION, *ids(5, seed=1)],
    "at the beginning of a block": [*ids(32), *INVOCATION, *ids(5, seed=1)],
    "across blocks": [*ids(47), *INVOCATION, *ids(20, seed=1)],
    "at the end": [*ids(50), *INVOCATION],
    "twice": [*ids(18), *INVOCATION, *ids(30, seed=1), *INVOCATION, *ids(4, seed=2)],
}


@pytest.fixture(scope="module")
def invoked(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    folder: Path = tmp_path_factory.mktemp("alora")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", alora_invocation_tokens=[*INVOCATION]
    )
    return [make_adapter(base, folder / f"a{i}", config, seed=i, std=0.12) for i in range(NUM_ADAPTERS)]


def test_the_last_invocation_counts(invoked: list[TestAdapter]) -> None:
    found = {name: invoked[0].ref.active_from(prompt) for name, prompt in PROMPTS.items()}
    assert [*found.values()] == [NEVER, NEVER, 0, 37, 32, 47, 50, 51]
    assert replace(invoked[0].ref, invocation_tokens=None).active_from(PROMPTS["twice"]) == 0


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
def test_logits_are_pefts(base: BaseModel, invoked: list[TestAdapter], budget: int) -> None:
    """Of answers and of the prompt's tokens, all prompts in one batch with LoRA's and the base's."""
    oracle, engine = Oracle(base, invoked), make_engine(base, invoked, max_num_batched_tokens=budget)
    spy = Spy(engine)
    asked = [
        request(name, prompt, invoked[i % 2], prompt_logprobs=0, max_tokens=4)
        for i, (name, prompt) in enumerate(PROMPTS.items())
    ]
    scored: dict[str, list[float]] = {}
    answers: dict[str, list[int]] = {}
    for out in outputs(engine, *asked, request("base", PROMPTS["twice"], max_tokens=4)):
        assert out.error is None
        scored.setdefault(out.request_id, []).extend(part.logprob for part in out.prompt_logprobs or ())
        answers.setdefault(out.request_id, []).extend([] if out.token_id is None else [out.token_id])
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        whole = [*prompt, *answers[name]]
        expected = oracle.logits(whole, invoked[i % 2])
        torch.testing.assert_close(torch.stack(spy.logits[name]), expected[len(prompt) - 1 : -1], atol=1e-4, rtol=1e-4)
        logprobs = expected[: len(prompt) - 1].log_softmax(1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored[name]), logprobs, atol=1e-4, rtol=1e-4)
    assert answers["twice"] != answers["base"]


def cached(engine: Engine, asked: GenerateRequest) -> tuple[list[int], int]:
    """Its tokens, and how many of its prompt were found in the cache."""
    found = list(outputs(engine, asked))
    assert all(out.error is None for out in found)
    return [out.token_id for out in found if out.token_id is not None], found[-1].num_cached_tokens


def test_every_adapter_shares_the_blocks_before_its_invocation(base: BaseModel, invoked: list[TestAdapter]) -> None:
    """Answers are those without the cache, token for token; only what follows the invocation is each adapter's."""
    read = ids(200)
    prompt, without = [*read, *INVOCATION, *ids(6, seed=1)], make_engine(base, invoked, enable_prefix_caching=False)
    engine = make_engine(base, invoked)
    assert cached(engine, request("base", read)) == (run(without, [request("b", read)])["b"], 0)
    num_blocks = len(engine.scheduler.prefix_cache.blocks())
    for i, adapter in enumerate(invoked, 1):
        expected = run(without, [request("r", prompt, adapter)])["r"]
        assert cached(engine, request("r", prompt, adapter)) == (expected, 192)
        assert cached(engine, request("r", prompt, adapter)) == (expected, 208)  # its own, with the invocation
        assert len(engine.scheduler.prefix_cache.blocks()) == num_blocks + i
    # The next turn's invocation comes later: what was the adapter's in this one is the base's in that.
    again = [*prompt, *ids(30, seed=3), *INVOCATION]
    expected = run(without, [request("r", again, invoked[0])])["r"]
    assert cached(engine, request("r", again, invoked[0])) == (expected, 192)
    assert cached(engine, request("r", again, invoked[1]))[1] == len(again) // 16 * 16 - 16
    # A prompt that does not invoke it is the base's.
    assert cached(engine, request("r", read, invoked[2])) == cached(engine, request("b", read))


def test_an_answer_goes_on_elsewhere_and_after_preemption(base: BaseModel, invoked: list[TestAdapter]) -> None:
    """What an answer contains activates nothing anew, also where its tokens come from another engine."""
    asked = request("r", PROMPTS["twice"], invoked[0], max_tokens=24)
    answer = run(make_engine(base, invoked), [asked])["r"]
    begun = (*INVOCATION, *answer[3:7])
    assert Request(replace(asked, output_ids=begun), 0).active_from == Request(asked, 0).active_from
    engine = make_engine(base, invoked)
    for num in (1, 10):
        assert run(engine, [replace(asked, output_ids=tuple(answer[:num]))])["r"] == answer[num:]
    small = make_engine(base, invoked, pool_bytes=14 * BLOCK_BYTES, max_num_seqs=4, enable_prefix_caching=False)
    fill_up(small)
    same: Sequence[GenerateRequest] = [replace(asked, request_id=str(i)) for i in range(3)]
    assert run(small, same) == {str(i): answer for i in range(3)}
    assert small.stats().num_preemptions > 0
