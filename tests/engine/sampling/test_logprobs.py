"""Log-probabilities of prompts against transformers + PEFT: chunked, preempted, in a batch, never from a cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.model import decoder
from loray.engine.sampling import logprobs
from loray.errors import IntegrityError, RequestError
from loray.spec import GenerateRequest, TokenLogprobs
from tests.fixtures.engines import BLOCK_BYTES, fill_up, ids, make_engine, outputs, request
from tests.fixtures.peft_adapters import Oracle, make_adapter

Scores = dict[str, tuple[TokenLogprobs, ...]]


def run(engine: Engine, requests: Sequence[GenerateRequest]) -> tuple[Scores, dict[str, list[int]]]:
    """The tokens of each request, and its prompt_logprobs, whose last part must come with the first token."""
    scores: Scores = {}
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for out in outputs(engine, *requests):
        assert out.error is None
        if out.prompt_logprobs is not None:
            assert not tokens[out.request_id]
            assert len(out.prompt_logprobs) <= engine.spec.max_num_batched_tokens
            scores[out.request_id] = (*scores.get(out.request_id, ()), *out.prompt_logprobs)
        tokens[out.request_id] += [] if out.token_id is None else [out.token_id]
    return scores, tokens


class Case:
    """A base with an adapter, and what PEFT says of prompts."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"])
        self.base, self.adapter = base, make_adapter(base, folder, config, seed=3, std=0.12)
        self.oracle = Oracle(base, [self.adapter])

    def engine(self, **spec: Any) -> Engine:
        return make_engine(self.base, [self.adapter], **spec)

    def batch(self, **params: int) -> list[GenerateRequest]:
        """Requests with prompt_logprobs, with and without an adapter, of many lengths; and requests without."""
        scored = [
            request(f"scored-{i}", ids(n, i), self.adapter if i % 2 else None, prompt_logprobs=i % 4, **params)
            for i, n in enumerate((1, 2, 17, 40, 64, 65, 90))
        ]
        other = request("other", ids(33, 50), self.adapter, max_tokens=20)
        return [*scored[:3], other, *scored[3:], request("b", ids(9, 51))]

    def unscored(self, prefix: str = "") -> list[GenerateRequest]:
        asked = self.batch()
        return [request(prefix + r.request_id, r.prompt_ids, self.adapter if r.adapter else None) for r in asked]

    def check(self, engine: Engine, **params: int) -> dict[str, list[int]]:
        """The batch's scores are PEFT's; its tokens."""
        requests = self.batch(**params)
        scores, tokens = run(engine, requests)
        assert scores.keys() == {r.request_id for r in requests if r.params.prompt_logprobs is not None}
        for r in requests:
            if r.params.prompt_logprobs is None:
                continue
            got = scores[r.request_id]
            logits = self.oracle.logits(r.prompt_ids, self.adapter if r.adapter else None)
            expected = logits.log_softmax(-1)[:-1]
            own = expected.gather(1, torch.tensor(r.prompt_ids[1:]).long()[:, None])
            assert [lp.logprob for lp in got] == pytest.approx(own.flatten().tolist(), abs=1e-4)
            assert [lp.rank for lp in got] == ((expected > own).sum(1) + 1).tolist()
            best = expected.topk(r.params.prompt_logprobs)
            assert [[t for t, _ in lp.top] for lp in got] == best.indices.tolist()
            assert [v for lp in got for _, v in lp.top] == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
        return tokens


@pytest.fixture(scope="module")
def case(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(base, tmp_path_factory.mktemp("adapters") / "a")


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunked"])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_scores_are_those_of_peft(case: Case, budget: int, max_tokens: int) -> None:
    engine = case.engine(max_num_batched_tokens=budget, max_num_seqs=min(budget, 32))
    tokens = case.check(engine, max_tokens=max_tokens)
    assert {len(t) for name, t in tokens.items() if name.startswith("scored")} == {max_tokens}
    unscored = run(case.engine(), case.unscored())[1]
    assert all(unscored[name][: len(t)] == t[:8] for name, t in tokens.items())
    assert engine.stats().num_output_tokens == sum(len(t) for t in tokens.values())


def test_preemption_neither_loses_nor_repeats_a_score(case: Case) -> None:
    tight: dict[str, Any] = {"pool_bytes": 14 * BLOCK_BYTES, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    engine = case.engine(max_model_len=128, **tight)
    fill_up(engine)
    case.check(engine, max_tokens=30)
    assert engine.stats().num_preemptions > 0


def test_logits_of_a_prompt_are_held_in_bounded_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "SCORED_BYTES", 4 * case.base.config.vocab_size * 7 + 1)
    engine = case.engine(max_num_batched_tokens=64, max_num_seqs=4)
    seen, logits = [], engine._model._logits
    engine._model._logits = lambda x_RD: seen.append(len(x_RD)) or logits(x_RD)  # type: ignore[method-assign,func-returns-value]
    case.check(engine, max_tokens=3)
    assert max(seen) == 7


def test_nothing_is_read_before_the_step_has_been_queued(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device every read waits for it."""
    monkeypatch.setattr(decoder, "SCORED_BYTES", 4 * case.base.config.vocab_size * 40)
    monkeypatch.setattr(logprobs, "_ROWS", 16)
    add, slices = logprobs.PromptScores.add, []
    adding = threading.local()  # adapters are read meanwhile, by a thread that loads them

    def without_reads(scores: logprobs.PromptScores, logits_RV: torch.Tensor) -> None:
        adding.now = True
        add(scores, logits_RV)
        adding.now = False
        slices.append(len(scores._found))

    def refused(read: Callable[..., object]) -> Callable[..., object]:
        def checked(*arguments: object, **options: object) -> object:
            assert not getattr(adding, "now", False), "a tensor is read"
            return read(*arguments, **options)

        return checked

    for name in ("tolist", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refused(getattr(torch.Tensor, name)))
    monkeypatch.setattr(logprobs.PromptScores, "add", without_reads)
    case.check(case.engine(), max_tokens=2)
    assert max(slices) > 3


def test_what_the_prefix_cache_holds_is_computed_for_its_scores(case: Case) -> None:
    engine = case.engine()
    for again in range(2):
        run(engine, case.unscored(str(again)))
    case.check(engine, max_tokens=2)
    assert engine.stats().prefix_cache_hits > 0
    known = request("neither", case.batch()[-2].prompt_ids, max_tokens=0)  # all of it known, none asked
    assert run(engine, [known])[1] == {"neither": []}


def test_a_prompt_whose_scores_are_not_finite_fails_alone(case: Case) -> None:
    engine = case.engine()
    run(engine, [request("first", ids(64, 2), prompt_logprobs=0, max_tokens=1)])  # a step may now have 64 such tokens
    forward = engine._model.forward

    def broken(batch, pool, on_scored, *others):  # type: ignore[no-untyped-def]
        slices = []
        logits = forward(batch, pool, slices.append)
        rows = torch.cat(slices)
        rows[0] = float("nan")  # the first scored token
        on_scored(rows)
        return logits

    engine._model.forward = broken  # type: ignore[method-assign]
    for name, n in (("a", 20), ("b", 30)):
        engine.add(request(name, ids(n, 1), prompt_logprobs=1, max_tokens=1))
    ended = {out.request_id: out for out in engine.step()}
    assert isinstance(ended["a"].error, IntegrityError)
    assert ended["b"].finish_reason == "length"
    assert not engine.has_work
    engine.check_integrity()


def test_a_token_id_ends_the_text_and_must_exist(base: BaseModel) -> None:
    prompt = ids(12, 7)
    free = run(make_engine(base), [request("r", prompt)])[1]["r"]
    stop = next(t for t in free if t != free[0])
    engine = make_engine(base)
    (cut,) = run(engine, [request("r", prompt, stop_token_ids=(stop,))])[1].values()
    assert cut == free[: free.index(stop) + 1]
    (later,) = run(engine, [request("r", prompt, stop_token_ids=(stop,), min_tokens=len(cut))])[1].values()
    assert len(later) > len(cut)
    for params in ({"stop_token_ids": (5000,)}, {"logit_bias": {320: 1.0}}):
        with pytest.raises(RequestError, match="outside the vocabulary"):
            engine.check(request("r", prompt, **params))
