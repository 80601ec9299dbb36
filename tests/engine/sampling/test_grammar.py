"""The masks of matchers against brute force, answers against their schemas, and what else is in the batch."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from loray.bases.registry import BaseModel
from loray.engine.request import Request
from loray.spec import Constraint, GenerateRequest, SamplingParams
from tests.fixtures.constraints import EOS, LANGUAGES, PROMPT, Ready, answers, random_schema, token_bytes
from tests.fixtures.engines import make_engine, request
from tests.fixtures.peft_adapters import Adapters
from tests.fixtures.sampling_mixes import processed


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_are_those_of_brute_force(worded: BaseModel, name: str) -> None:
    """A token is allowed if the text with it is the beginning of a text of the language. Where only one byte can come
    next, llguidance allows the one token that the tokenizer would write there.
    """
    constraint, texts = LANGUAGES[name]
    encoded = [t.encode() for t in texts]
    prefixes = {t[:n] for t in encoded for n in range(len(t) + 1)}
    tokens, ready = token_bytes(str(worded.path / "tokenizer.json")), Ready(worded)
    rng = random.Random(0)
    for _ in range(6):
        made, text = ready.start(constraint), b""
        while True:
            expected = {t for t, b in tokens.items() if b and text + b in prefixes}
            expected |= {EOS} if text in encoded else set()
            (got,) = ready.allowed(made)
            assert got
            assert got <= expected
            forced = (
                text not in encoded
                and len({p[len(text)] for p in prefixes if p[: len(text)] == text and p != text}) == 1
            )
            assert forced or got == expected, text
            token = rng.choice(sorted(got))
            if token == EOS:
                break
            made.output_ids.append(token)
            text += tokens[token]
        assert text in encoded


def test_masks_apply_to_the_rows_of_their_requests(worded: BaseModel) -> None:
    ready = Ready(worded)
    rows = [ready.start(constraint) for constraint, _ in LANGUAGES.values()]
    masks = ready.masks(rows)
    logits_SV = torch.randn(len(rows) + 1, worded.config.vocab_size)
    requests = [rows[2], Request(GenerateRequest("f", PROMPT, SamplingParams()), 9), *rows[:2], *rows[3:]]
    here = processed(logits_SV, requests, masks)
    for i in (0, *range(2, len(requests))):
        (allowed,) = ready.allowed(requests[i])
        finite = set(here[i].isfinite().nonzero().flatten().tolist())
        assert finite == {t for t in allowed if t < worded.config.vocab_size}
        assert torch.equal(here[i][list(finite)], logits_SV[i][list(finite)])
    assert torch.equal(here[1], logits_SV[1])
    assert torch.isinf(here[0]).any()


def test_a_turn_of_the_thread_goes_on_while_requests_come_and_leave(worded: BaseModel) -> None:
    ids = Tokenizer.from_file(str(worded.path / "tokenizer.json")).encode('{"a": [1, 2, "x"]}').ids
    ready, alone = Ready(worded), Ready(worded)
    schema = Constraint.from_schema({"type": "object"})
    first, late, left = (ready.start(schema) for _ in range(3))

    def expected(request: Request) -> set[int]:
        (allowed,) = alone.allowed(alone.start(schema, *request.output_ids))
        return allowed

    for i, token in enumerate(ids):
        first.output_ids.append(token)
        left.output_ids.append(token)
        ready.grammars.advance([first, late, left])
        ready.grammars.end_step()
        late.output_ids += ids[:3] if i == 2 else []
        if i == 3:
            ready.grammars.forget(left)
        new = ready.start(schema)
        assert ready.allowed(first, late, new) == [expected(r) for r in (first, late, new)], i
    assert len(late.output_ids) == 3


def test_a_request_that_has_ended_is_kept_by_nothing(worded: BaseModel) -> None:
    ready, constraint = Ready(worded), Constraint.from_choice(["yes"])

    request = ready.start(constraint)
    of_request = weakref.ref(request.spec.params)
    request.output_ids.append(EOS)
    ready.grammars.advance([request])
    ready.grammars.end_step()
    ready.grammars.forget(request)
    del request
    while ready.grammars._computing is not None:
        ready.grammars.take(lambda request: None)
    gc.collect()
    assert of_request() is None


_WAVE = 256  # requests at once; the engine refuses more than 512 that wait
_NUM_SCHEMAS = int(os.environ.get("TEST_SCHEMAS", "200"))  # for the real model


def check_against_schemas(
    base: BaseModel, num_schemas: int, prompt: Sequence[int], whitespace: str | None, **spec: Any
) -> None:
    schemas = {str(seed): random_schema(seed) for seed in range(num_schemas)}
    sampled: dict[str, Any] = {"temperature": 1.0, "max_tokens": 300}
    asked = [
        request(name, prompt, seed=int(name), structured=Constraint.from_schema(s, whitespace=whitespace), **sampled)
        for name, s in schemas.items()
    ]
    tokenizer, ended = Tokenizer.from_file(str(base.path / "tokenizer.json")), 0
    engine = make_engine(base, **spec)
    waves = [asked[first : first + _WAVE] for first in range(0, num_schemas, _WAVE)]
    for name, (ids, end) in itertools.chain.from_iterable(answers(engine, wave).items() for wave in waves):
        assert end in ("stop", "length"), (schemas[name], end)
        if end == "stop":
            ended += 1
            assert ids[-1] == EOS
            Draft202012Validator(schemas[name]).validate(json.loads(tokenizer.decode(ids[:-1])))
    assert ended > num_schemas * 0.5, f"only {ended} of {num_schemas} ended"


def test_answers_validate(worded: BaseModel) -> None:
    check_against_schemas(worded, 40, PROMPT, "", pool_bytes=32 << 20)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_answers_of_the_real_model_validate(smollm2: BaseModel) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2.path / "tokenizer.json"))
    prompt = tokenizer.encode("<|im_start|>user\nGive me an example as JSON.<|im_end|>\n<|im_start|>assistant\n").ids
    check_against_schemas(smollm2, _NUM_SCHEMAS, prompt, None, dtype="bfloat16", pool_bytes=512 << 20)


FREE: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 0.4, "logprobs": 2},
]


def test_other_rows_do_not_change(worded: BaseModel) -> None:
    free = [request(f"free-{i}", (1, 50 + i, 60), seed=i, max_tokens=16, **k) for i, k in enumerate(FREE * 2)]
    alone = answers(make_engine(worded), free)
    held = [
        request(f"held-{i}", PROMPT, temperature=1.0, seed=i, max_tokens=25, structured=constraint)
        for i, (constraint, _) in enumerate(LANGUAGES.values())
    ]
    mixed = [r for pair in itertools.zip_longest(held, free) for r in pair if r is not None]
    together = answers(make_engine(worded), mixed)
    assert {name: got for name, got in together.items() if name.startswith("free")} == alone
    tokenizer = Tokenizer.from_file(str(worded.path / "tokenizer.json"))
    for i, (_, texts) in enumerate(LANGUAGES.values()):
        ids, end = together[f"held-{i}"]
        assert end == "stop"
        assert tokenizer.decode(ids[:-1]) in texts


def test_forced_tokens_are_those_that_would_be_sampled(worded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer steps. With log-probabilities, or where a parameter may exclude them, each token has its step."""
    names = ["first name", "date of birth", "favourite colours"]
    schema = {"type": "object", "properties": {n: {"enum": ["somewhere else", 12]} for n in names}, "required": names}
    compact = Constraint.from_schema(schema | {"additionalProperties": False}, whitespace="")
    kinds: list[dict[str, Any]] = [{}, {"max_tokens": 9}, {"stop_token_ids": (1,)}, {"min_tokens": 30}]
    sampled: dict[str, Any] = {"temperature": 1.0, "structured": compact, "max_tokens": 80}
    asked = [request(str(i), PROMPT, seed=i, **sampled | kind) for i, kind in enumerate(kinds)]
    slow: list[dict[str, Any]] = [{"logprobs": 0}, {"bad_words": ((500, 501),)}]
    asked += [request(f"slow-{i}", PROMPT, seed=0, **sampled | kind) for i, kind in enumerate(slow)]
    engine, plain = make_engine(worded), make_engine(worded)
    monkeypatch.setattr(plain._grammars, "_forced", lambda request: ())
    expected = answers(plain, asked)
    assert answers(engine, asked[:4]) == {name: got for name, got in expected.items() if "slow" not in name}
    assert expected["1"][1] == "length"
    num_steps, num_tokens = engine.stats().num_steps, len(expected["0"][0])
    assert num_steps < num_tokens / 2
    before = num_steps
    assert answers(engine, asked[4:])["slow-0"] == expected["0"]
    assert engine.stats().num_steps - before >= num_tokens


def test_a_matcher_that_cannot_go_on_ends_its_request_alone(worded: BaseModel) -> None:
    """Also between others in the batch; their rows are those of a batch without it."""
    yes = Constraint.from_choice(["yes"])
    asked = [
        request("a", PROMPT, structured=yes),
        request("stuck", PROMPT, structured=Constraint.from_grammar('start: "a" x\nx: x')),
        request("endless", PROMPT, structured=Constraint.from_grammar('start: "a" x\nx: "(" x ")"')),
        request("b", PROMPT, structured=yes),
    ]
    out = answers(make_engine(worded), asked)
    for name in ("stuck", "endless"):
        assert "cannot be held to its constraint any further" in out[name][1]
        assert "\n" not in out[name][1]
        assert len(out[name][0]) == 1
    assert out["a"] == out["b"] == (out["a"][0], "stop")


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 20}, {"ignore_eos": False}], ids=str)
def test_a_complete_answer_ends_whatever_is_asked(worded: BaseModel, params: dict[str, Any]) -> None:
    out = answers(make_engine(worded), [request("a", PROMPT, structured=Constraint.from_choice(["yes"]), **params)])
    ids, end = out["a"]
    assert end == "stop"
    assert ids[-1] == EOS
    assert token_bytes(str(worded.path / "tokenizer.json"))[ids[0]] in (b"yes", b"y")


def test_min_tokens_lengthens_where_the_constraint_can(worded: BaseModel) -> None:
    engine = make_engine(worded)
    asked = request("a", PROMPT, structured=Constraint.from_regex("[a-z]{1,99}"), min_tokens=12, max_tokens=12)
    assert len(answers(engine, [asked])["a"][0]) == 12


def test_what_contradicts_ends_its_request_alone(worded: BaseModel) -> None:
    yes = Tokenizer.from_file(str(worded.path / "tokenizer.json")).encode("yes").ids
    choice = Constraint.from_choice(["yes"])
    asked = [
        request("a", PROMPT, structured=choice, allowed_token_ids=(500, 501)),
        request("b", PROMPT, structured=choice, bad_words=(tuple(yes),)),
        request("c", PROMPT, allowed_token_ids=(500,), max_tokens=3),
        request("d", PROMPT, structured=choice, allowed_token_ids=(*yes, EOS)),
    ]
    out = answers(make_engine(worded), asked)
    assert "no token is left" in out["a"][1]
    assert "no token is left" in out["b"][1]
    assert out["c"] == ([500, 500, 500], "length")
    assert out["d"] == ([*yes, EOS], "stop")


def test_a_compiler_that_fails_ends_its_request_alone(worded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(worded)

    def fail(constraint: Constraint) -> None:
        raise BaseException("panicked")  # as Rust's panics are in Python

    monkeypatch.setattr(engine._grammars._compilations, "_compile", fail)
    out = answers(engine, [request("bad", PROMPT, structured=Constraint.from_regex("a")), request("free", PROMPT)])
    assert "panicked" in out["bad"][1]
    assert out["free"][1] == "length"


def test_what_is_refused_before_it_can_run_holds_nothing(base: BaseModel, adapters: Adapters) -> None:
    """Its constraint is wrong, or its client has left; it has an adapter."""
    engine = make_engine(base, list(adapters.values()))
    fields: dict[str, Any] = {"adapter": adapters["r2"], "max_tokens": 4}
    asked = [request(f"{i}", (1, 2), structured=Constraint.from_choice(["yes"]), **fields) for i in range(4)]
    asked += [
        request("bad", (1, 2), structured=Constraint.from_regex("("), **fields),
        request("gone", (1, 2), **fields),
    ]
    engine.add(asked[0])
    engine.cancel("0")
    out = answers(engine, asked)
    assert "regular expression cannot" in out["bad"][1]
    assert sum(ids[-1:] == [258] for ids, _ in out.values()) >= 1
    assert not engine.adapter_manager.waiters()
    engine.close()
