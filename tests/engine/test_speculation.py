"""With guesses an engine gives the same tokens, in the same bits, as without: whatever a request asks for, for adapters
of all methods in one batch, while requests are preempted and cancelled.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig

from loray.bases.registry import BaseModel, add_base
from loray.engine.engine import Engine
from loray.engine.request import Request
from loray.spec import Constraint, GenerateRequest, TokenLogprobs
from tests.fixtures import quantized as q
from tests.fixtures.engines import BLOCK_BYTES, empty, fill_up, ids, make_engine, outputs, request, run, submit
from tests.fixtures.guesses import Told, guess_freely
from tests.fixtures.peft_adapters import (
    ALL,
    ATTENTION,
    LINEAR_ROPE,
    NORMS,
    Adapters,
    Oracle,
    TestAdapter,
    make_adapters,
)
from tests.fixtures.sampling_mixes import params
from tests.fixtures.tiny import write_checkpoint

INVOCATION = [300, 301]
SCHEMA = {"type": "array", "items": {"enum": ["a long word", {"key": None}, 17]}, "minItems": 1}
CONSTRAINTS = [Constraint.from_schema(SCHEMA, whitespace=""), Constraint.from_regex("[a-z ]{5,90}")]
INVOKED: dict[str, Any] = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATION}


@pytest.fixture(scope="module")
def of_all_methods(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    configs: dict[str, Any] = {
        "r16": (LoraConfig(r=16, target_modules=ALL), None),
        "dora": (LoraConfig(r=6, use_dora=True, target_modules=ALL), None),
        "alora": (LoraConfig(r=8, target_modules=ALL, **INVOKED), None),
        "longlora": (LoraConfig(r=8, target_modules=ATTENTION, modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
        "vera": (VeraConfig(r=16, target_modules=["q_proj", "v_proj"], save_projection=False), None),
        "miss": (MissConfig(r=8, target_modules=ATTENTION), None),
        "ia3": (IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]), None),
        "road": (RoadConfig(variant="road_4", group_size=8, target_modules=ALL), None),
    }
    return make_adapters(base, tmp_path_factory.mktemp("adapters"), configs, std=0.08)


Results = dict[str, list[tuple[Any, ...]]]


def results(engine: Engine, requests: Sequence[GenerateRequest]) -> Results:
    """All that each request is told: tokens with their scores and what ended it, then the scores of its prompt."""
    out: Results = {r.request_id: [] for r in requests}
    scores: dict[str, list[TokenLogprobs]] = {r.request_id: [] for r in requests}
    submit(engine, requests)  # how full the pool is must not hang on how fast adapters are read
    for o in outputs(engine):
        scores[o.request_id] += o.prompt_logprobs or ()
        if o.token_id is not None or o.error is not None:
            out[o.request_id].append((o.token_id, o.logprobs, o.finish_reason, repr(o.error)))
    return {name: [*own, (None, *scores[name])] for name, own in out.items()}


def random_requests(rng: random.Random, models: Sequence[TestAdapter | None], num: int) -> list[GenerateRequest]:
    """Greedy and sampled, with penalties, stop tokens, constraints, scores of tokens and of the prompt."""
    system = ids(40)
    made = []
    for i in range(num):
        adapter, own = models[i % len(models)], params(rng, 256) if rng.random() < 0.6 else {}
        prompt = [*system[: rng.choice((0, 16, 40))], *(rng.randrange(256) for _ in range(rng.randint(1, 20)))]
        if adapter is not None and adapter.ref.invocation_tokens is not None and rng.random() < 0.8:
            prompt += [*INVOCATION, 7]
        if rng.random() < 0.2:
            own = {"structured": rng.choice(CONSTRAINTS), "temperature": rng.choice([0.0, 1.0])}
        own["stop_token_ids"] = tuple(rng.sample(range(256), 3)) if rng.random() < 0.3 else ()
        own["prompt_logprobs"] = rng.choice([None, None, None, 1])
        own |= {"seed": i, "max_tokens": rng.choice([1, 2, 12, 30]), "ignore_eos": rng.random() < 0.5}
        made.append(request(str(i), prompt, adapter, **own))
    return made


def answers_of(results: Results) -> dict[str, list[int]]:
    return {name: [token for token, *_ in own if token is not None] for name, own in results.items()}


@pytest.mark.parametrize("num", [90, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_requests_are_answered_as_without_guesses(
    base: BaseModel, of_all_methods: list[TestAdapter], num: int
) -> None:
    rng = random.Random(num)
    requests = random_requests(rng, [None, *of_all_methods], num)
    plain = make_engine(base, of_all_methods)
    tight = make_engine(base, of_all_methods, pool_bytes=44 * BLOCK_BYTES, max_num_batched_tokens=64, max_num_seqs=12)
    fill_up(tight)
    for start in range(0, num, 250):
        part = requests[start : start + 250]
        expected = results(plain, part)
        Told(tight, answers_of(expected))
        assert results(tight, part) == expected
    stats = tight.stats()
    assert 0.3 < stats.num_accepted_tokens / stats.num_draft_tokens < 0.9
    assert stats.num_steps < stats.num_output_tokens
    assert stats.num_preemptions > 0
    assert stats.num_output_tokens == plain.stats().num_output_tokens
    empty(tight)


def check_random_requests(base: BaseModel, *, seed: int, kv_cache_dtype: str = "auto", **options: Any) -> None:
    requests = random_requests(random.Random(seed), [None], 16)
    expected = results(make_engine(base, kv_cache_dtype=kv_cache_dtype), requests)
    engine = make_engine(base, max_num_seqs=6, kv_cache_dtype=kv_cache_dtype, **options)
    Told(engine, answers_of(expected))
    assert results(engine, requests) == expected
    assert engine.stats().num_accepted_tokens > 0
    empty(engine)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a window": ("MistralForCausalLM", {"sliding_window": 24}),
    "Gemma 2": ("Gemma2ForCausalLM", {}),
    "Gemma 3": ("Gemma3ForCausalLM", {}),
    "Phi 3": ("Phi3ForCausalLM", {}),
    "Qwen 2": ("Qwen2ForCausalLM", {}),
    "Qwen 3": ("Qwen3ForCausalLM", {}),
    "Mixtral": ("MixtralForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_of_every_family_answer_as_without_guesses(tiny_base: Callable[..., BaseModel], family: str) -> None:
    architecture, config = FAMILIES[family]
    base = tiny_base(architecture, **config)
    check_random_requests(base, seed=1, pool_bytes=40 * BLOCK_BYTES)


def test_keys_and_values_in_int8_answer_as_without_guesses(base: BaseModel) -> None:
    check_random_requests(base, seed=3, pool_bytes=24 * BLOCK_BYTES, kv_cache_dtype="int8")


FORMS: dict[str, tuple[dict[str, Any], Callable[..., q.Made]]] = {
    "int8": (q.compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"), q.int8_rows),
    "fp8": (q.compressed_tensors("float-quantized", type="float", strategy="tensor"), q.fp8_whole),
    "NF4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, q.nf4),
    "int4": ({"quant_method": "gptq", "bits": 4, "group_size": q.GROUP, "desc_act": False}, q.gptq),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_bases_answer_as_without_guesses(tmp_path: Path, form: str) -> None:
    folder = write_checkpoint(tmp_path / "form", dtype=torch.float32)
    q.store(folder, *FORMS[form])
    base = add_base(str(folder), home=tmp_path / "home")
    check_random_requests(base, seed=2)


def test_an_engine_that_repeats_itself_takes_fewer_steps(base: BaseModel, adapters: Adapters) -> None:
    """Each request is asked twice, and the second answer guessed from the first. Blocks of what was accepted are found
    again, and hold what they should.
    """
    prompt, models = ids(40), [None, *adapters.values()]
    plain, engine = make_engine(base, list(adapters.values())), make_engine(base, list(adapters.values()))
    guess_freely(engine)
    expected = run(plain, [request(str(i), prompt, a, max_tokens=100) for i, a in enumerate(models)], together=True)
    assert run(engine, [request(str(i), prompt, a, max_tokens=100) for i, a in enumerate(models)]) == expected
    before = engine.stats()
    again = {name: [request(name, prompt, models[int(name)], max_tokens=100)] for name in expected}
    assert {name: run(engine, asked)[name] for name, asked in again.items()} == expected
    stats = engine.stats()
    num_right = stats.num_accepted_tokens - before.num_accepted_tokens
    assert 0 < num_right <= stats.num_draft_tokens - before.num_draft_tokens
    assert stats.num_steps - before.num_steps == sum(map(len, expected.values())) - num_right
    assert num_right > 0.6 * sum(map(len, expected.values()))
    longer = [request(f"{i}", [*prompt, *expected[str(i)][:60]], a) for i, a in enumerate(models)]
    assert run(engine, longer) == run(plain, longer)
    assert engine.stats().prefix_cache_hits - stats.prefix_cache_hits >= len(models) * 80
    empty(engine)


def test_a_request_may_be_cancelled_and_end_among_its_guesses(base: BaseModel) -> None:
    requests = [request(str(i), ids(9, seed=i), max_tokens=40) for i in range(6)]
    plain, engine = make_engine(base), make_engine(base)
    expected = run(plain, requests)
    stopped = [
        request(f"stopped {name}", ids(9, seed=int(name)), max_tokens=40, stop_token_ids=(tokens[17],))
        for name, tokens in expected.items()
    ]
    expected |= run(plain, stopped)
    Told(engine, expected, wrong=0.0)
    got: dict[str, list[int]] = {name: [] for name in expected}
    for output in outputs(engine, *requests, *stopped):
        assert output.token_id is not None
        got[output.request_id].append(output.token_id)
        if output.request_id == "3" and len(got["3"]) >= 10:
            engine.cancel("3")
    cancelled = got.pop("3")
    assert 10 <= len(cancelled) < 40
    assert cancelled == expected.pop("3")[: len(cancelled)]
    assert got == expected
    empty(engine)


def test_guesses_behind_the_end_are_not_accepted(base: BaseModel) -> None:
    """Each step of a single request gives it a token beside those that are accepted, but the last one that of none."""
    answer = run(make_engine(base), [request("whole", ids(9), max_tokens=40)])["whole"]
    engine, stops = make_engine(base), answer[6:16]
    Told(engine, {str(stop): answer for stop in stops}, wrong=0.0)
    for stop in stops:
        own = run(engine, [request(str(stop), ids(9), max_tokens=40, stop_token_ids=(stop,))])
        assert own[str(stop)] == answer[: answer.index(stop) + 1]
    stats = engine.stats()
    assert stats.num_accepted_tokens > 0
    assert 0 <= stats.num_steps + stats.num_accepted_tokens - stats.num_output_tokens <= len(stops)


def test_what_is_drawn_has_the_distribution_of_the_model(base: BaseModel) -> None:
    """The first two tokens, of which the second is a guess that is often wrong: χ² of the most likely pairs."""
    num, temperature, prompt = 1600, 0.7, ids(12)
    oracle = Oracle(base, [])
    first_V = (oracle.logits(prompt, None)[-1] / temperature).softmax(-1)
    likely = first_V.topk(4).indices.tolist()
    expected: dict[tuple[int, int], float] = {}
    for one in likely:
        second_V = (oracle.logits([*prompt, one], None)[-1] / temperature).softmax(-1)
        for two in second_V.topk(4).indices.tolist():
            expected[one, two] = float(first_V[one] * second_V[two]) * num
    engine = make_engine(base, max_queued=num)
    engine._runner._sampler._salt = bytes(16)
    best = run(make_engine(base), [request("best", prompt, max_tokens=4)])["best"]
    requests = [request(str(i), prompt, max_tokens=4, temperature=temperature) for i in range(num)]
    Told(engine, dict.fromkeys((r.request_id for r in requests), best))
    drawn = Counter(tuple(tokens[:2]) for tokens in run(engine, requests).values())
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    pairs = [pair for pair, mean in expected.items() if mean >= 5]
    assert len(pairs) >= 4
    means = [expected[pair] for pair in pairs]
    found = [drawn[pair] for pair in pairs]
    means, found = [*means, num - sum(means)], [*found, num - sum(found)]
    chi2 = sum((n - mean) ** 2 / mean for n, mean in zip(found, means, strict=True))
    assert chi2 < len(pairs) + 4 * (2 * len(pairs)) ** 0.5


def test_masks_that_are_late_are_not_waited_for(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their guesses count for nothing, and the request guesses nothing until its masks are quick again."""
    requests = [request(name, ids(9), structured=CONSTRAINTS[1], max_tokens=40) for name in ("one", "other")]
    expected = run(make_engine(base), requests)
    engine = make_engine(base)
    Told(engine, expected, wrong=0.0)
    grammars, late = engine._grammars, list[tuple[Future[None], Future[None]]]()
    begin, take = grammars._thread.begin_guesses, grammars.take

    def begin_late(*arguments: Any) -> Future[None]:
        late.append((begin(*arguments), Future()))
        return late[-1][1]

    def take_late(prepared: Callable[[Request], None]) -> list[tuple[Request, Exception]]:
        if late and not late[-1][1].done():
            late[-1][1].set_result(late[-1][0].result())
        return take(prepared)

    monkeypatch.setattr(grammars._thread, "begin_guesses", begin_late)
    monkeypatch.setattr(grammars, "take", take_late)
    assert run(engine, requests) == expected
    assert 1 <= len(late) < 8
    assert engine.stats().num_accepted_tokens == 0


def test_speculation_is_off_where_it_is_not_wanted(base: BaseModel) -> None:
    assert make_engine(base).scheduler.speculation is None
    for dtype in ("float32", "float16"):  # the kernels for CPUs have no float16
        engine = make_engine(base, speculation="auto", dtype=dtype)
        is_exact = engine._model.is_batch_invariant
        assert (engine.scheduler.speculation is not None) == is_exact == (dtype == "float32")
