"""The masks of matchers against brute force, and on a GPU."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from tokenizers import Tokenizer

from loray.bases.registry import BaseModel
from loray.engine.request import Request
from loray.engine.sampling.sampler import process
from loray.spec import Constraint, GenerateRequest, SamplingParams
from tests.engine.sampling.constraints import EOS, LANGUAGES, PROMPT, Ready, token_bytes


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
    for _ in range(12):
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


def test_a_request_follows_its_own_output(worded: BaseModel) -> None:
    """Matchers share what was compiled, but not where they are; one that is late reads several tokens."""
    tokenizer, ready = Tokenizer.from_file(str(worded.path / "tokenizer.json")), Ready(worded)
    ids = tokenizer.encode('{"a": [1, 2, "x"]}').ids
    schema = Constraint.from_schema({"type": "object"})
    first, second, late = ready.start(schema), ready.start(schema), ready.start(schema, *ids[:5])
    beginning = ready.allowed(second)[0]
    for i, token in enumerate(ids):
        (allowed,) = ready.allowed(first)
        assert token in allowed
        first.output_ids.append(token)
        if i == 4:
            assert ready.allowed(late, first) == [ready.allowed(first)[0]] * 2
    assert ready.allowed(second, first)[0] == beginning
    assert EOS in ready.allowed(first)[0]
    ready.grammars.forget(first)
    assert ready.grammars.masks([first]) is None


def test_masks_apply_to_the_rows_of_their_requests(worded: BaseModel) -> None:
    ready = Ready(worded)
    rows = [ready.start(constraint) for constraint, _ in LANGUAGES.values()]
    masks = ready.masks(rows)
    logits_SV = torch.randn(len(rows) + 1, worded.config.vocab_size)
    requests = [rows[2], Request(GenerateRequest("f", PROMPT, SamplingParams()), 9), *rows[:2], *rows[3:]]
    here = process(logits_SV, requests, (EOS,), masks)
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

    def num_held() -> int:
        gc.collect()
        return sum(isinstance(o, Request) and o.spec.params.structured is constraint for o in gc.get_objects())

    request = ready.start(constraint)
    request.output_ids.append(EOS)
    ready.grammars.advance([request])
    ready.grammars.end_step()
    assert num_held() == 1
    ready.grammars.forget(request)
    del request
    while ready.grammars._computing is not None:
        ready.grammars.take(lambda request: None)
    assert num_held() == 0
