"""Each sampling parameter against transformers' logits processors on the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from loray.engine.request import GenerateRequest, Request
from loray.engine.sampler import Sampler, distribution, penalised
from loray.spec import SamplingParams


def logits(seed: int = 0, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.3, "top_p": 0.8}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
            [TemperatureLogitsWarper(0.9), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_distribution_is_that_of_transformers(params: dict[str, float], warpers: list) -> None:  # type: ignore[type-arg]
    for seed in range(20):
        expected = logits(seed)[None]
        for warper in warpers:
            expected = warper(torch.zeros(1, 1, dtype=torch.long), expected)
        got = distribution(logits(seed), SamplingParams(**params))  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected[0].softmax(-1), atol=1e-6, rtol=1e-5)


def test_penalties_are_openais() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits()
    expected[3] -= 0.5 + 3 * 0.25
    expected[7] -= 0.5 + 0.25
    torch.testing.assert_close(penalised(logits(), [3, 7, 3, 3], params), expected)
    torch.testing.assert_close(penalised(logits(), [], params), logits())


def draw(params: SamplingParams, n: int, request_id: str = "r") -> list[int]:
    sampler, request = Sampler(), Request(GenerateRequest(request_id, (1,), params), 0)
    return [sampler(logits()[None], [request])[0][0] for _ in range(n)]


def test_a_seed_gives_the_same_draws_whatever_the_request_is_called() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    assert draw(params, 30, "a") == draw(params, 30, "b")
    assert draw(params, 30) != draw(SamplingParams(temperature=1.0, seed=6), 30)


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.0, seed=1)
    counts = torch.bincount(torch.tensor(draw(params, 4000)), minlength=50) / 4000
    assert (counts - logits().softmax(-1)).abs().max() < 0.03


def test_logprobs_are_of_the_unchanged_distribution() -> None:
    request = Request(GenerateRequest("r", (1,), SamplingParams(temperature=0, logprobs=3)), 0)
    ((token, logprobs),) = Sampler()(logits()[None], [request])
    expected = logits().log_softmax(-1)
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(float(expected[token]))
    assert [t for t, _ in logprobs.top] == expected.topk(3).indices.tolist()
