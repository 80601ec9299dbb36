"""What is kept of a request gives the logits that its whole prompt and output would give, to the last bit."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling import sampler as logits_module
from loray.engine.sampling.sampler import BadWords, Occurrences, process
from loray.spec import GenerateRequest, SamplingParams

VOCAB, EOS = 300, 2
PARAMS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "frequency_penalty": 0.3},
    {"presence_penalty": 0.7, "frequency_penalty": -0.1},
    {"min_tokens": 5, "stop_token_ids": (3,), "logit_bias": {4: 1.5, 2: -3.0}},
    {"min_tokens": 3},
    {"allowed_token_ids": (1, 2, 7, 7, 9), "presence_penalty": 0.1},
    {"bad_words": ((5,), (6, 8), (6, 9, 11))},
    {},
]


def by_hand(logits_V: Tensor, request: Request) -> Tensor:
    """All of prompt and output again, one entry after the other."""
    p, output = request.spec.params, request.output_ids
    x = logits_V.clone()
    if p.allowed_token_ids is not None:
        x = torch.full_like(x, -math.inf)
        for t in p.allowed_token_ids:
            x[t] = logits_V[t]
    for word in p.bad_words:
        if len(word) == 1 or tuple(output[-(len(word) - 1) :]) == word[:-1]:
            x[word[-1]] = -math.inf
    if len(output) < p.min_tokens:
        x[[*p.stop_token_ids, EOS]] = -math.inf
    for token, added in p.logit_bias.items():
        x[token] += added
    for token in {*request.spec.prompt_ids, *output} if p.repetition_penalty != 1 else ():
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, count in Counter(output).items():
        x[token] += -(p.frequency_penalty * count + p.presence_penalty)
    return x


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            GenerateRequest(f"r{i}", tuple(rng.choices(range(VOCAB), k=40)), SamplingParams(max_tokens=300, **params)),
            i,
        )
        for i, params in enumerate(PARAMS * 2)
    ]


@pytest.mark.parametrize("many", [4096, 60], ids=["looked up", "also whole rows"])
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_logits_are_those_of_the_whole_output(batch: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join and leave the batch, as when requests are preempted; the last ones have many distinct tokens."""
    monkeypatch.setattr(logits_module, "_MANY", many)
    rng, generator = random.Random(1), torch.Generator().manual_seed(0)
    rows = requests(0)
    for _ in range(120):
        part = rng.sample(rows, batch)
        logits_SV = 3 * torch.randn((batch, VOCAB), generator=generator)
        got_SV = process(logits_SV, part, (EOS,))
        for i, request in enumerate(part):
            assert torch.equal(got_SV[i], by_hand(logits_SV[i], request)), request.spec.params
            request.output_ids.append(rng.choice([2, 5, 6, 8, 9, 11, rng.randrange(VOCAB)]))


def test_a_minimum_length_costs_nothing_when_it_is_reached() -> None:
    (request,) = requests(0)[4:5]
    logits_SV = torch.randn(1, VOCAB)
    assert process(logits_SV, [request], (EOS,)) is not logits_SV
    request.output_ids += [7, 8, 9]
    assert process(logits_SV, [request], (EOS,)) is logits_SV
    assert not request.changes_logits


def test_only_new_tokens_are_read() -> None:
    class Counted(list[int]):
        read = 0

        def __getitem__(self, key: Any) -> Any:
            value = super().__getitem__(key)
            self.read += len(value) if isinstance(value, list) else 1
            return value

        def __iter__(self) -> Any:
            raise AssertionError("the whole output is read")

    (request,) = requests(0)[1:2]
    request.output_ids = Counted(range(200))
    process(torch.randn(1, VOCAB), [request], (EOS,))
    request.output_ids.read = 0  # type: ignore[attr-defined]
    for token in range(50):
        process(torch.randn(1, VOCAB), [request], (EOS,))
        request.output_ids.append(token)
    process(torch.randn(1, VOCAB), [request], (EOS,))
    assert request.output_ids.read == 50  # type: ignore[attr-defined]


def test_occurrences_grow() -> None:
    rng = random.Random(2)
    tokens = [rng.randrange(400) for _ in range(3000)]
    got = Occurrences(tokens[:100])
    for token in tokens[100:]:
        got.set_value(token, float(got.add(token)))
    assert got.tokens.tolist() == list(dict.fromkeys(tokens))
    late = Counter(tokens[100:])
    expected = {t: float(n) for t, n in Counter(tokens).items() if t in late}
    assert {t: v for t, v in zip(got.tokens.tolist(), got.values.tolist(), strict=True) if v} == expected


def test_bad_words_need_all_their_tokens() -> None:
    words: Sequence[tuple[int, ...]] = [(5,), (6, 8), (6, 7, 8), (9, 6, 8, 1)]
    bad = BadWords(words)
    assert bad.after([]) == [5]
    assert bad.after([6]) == [5, 8]
    assert bad.after([6, 7]) == [5, 8]
    assert bad.after([9, 6, 8]) == [5, 1]
    assert bad.after([3, 6, 8]) == [5]
