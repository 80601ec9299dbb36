"""Each sampling parameter against transformers' logits processors on the same logits, and draws against seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loray.engine.request import Request
from loray.engine.sampling.sampler import Sampler, _best, candidates, process
from loray.spec import GenerateRequest, SamplingParams
from loray_kernels import backend
from loray_kernels.sampling import draw

VOCAB = 8192  # more than the candidates that are looked at before a row is sorted, and many groups of them
EOS = 2
OPS = backend("auto")


def logits(seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def make(arrival: int = 0, output_ids: Sequence[int] = (), prompt_ids: Sequence[int] = (1,), **params: Any) -> Request:
    spec = GenerateRequest(f"r{arrival}", tuple(prompt_ids), SamplingParams(max_tokens=100, **params))
    return Request(spec, arrival, output_ids=list(output_ids))


def distributions(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    out_RV = torch.zeros_like(logits_RV)
    for rows, p_NC, ids_NC in candidates(logits_RV, logits_RV.amax(dim=1), params):
        out_RV[rows] = torch.zeros_like(out_RV[rows]).scatter(1, ids_NC, p_NC)
    return out_RV / out_RV.sum(dim=1, keepdim=True)


CUTS: list[tuple[dict[str, Any], list[Any]]] = [
    ({}, []),
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"top_k": 5}, [TopKLogitsWarper(5)]),
    ({"top_k": 700}, [TopKLogitsWarper(700)]),
    ({"top_k": VOCAB + 1}, []),
    ({"temperature": 1.3, "top_p": 0.8}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
    ({"temperature": 2.0, "top_p": 0.999}, [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.999)]),
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"min_p": 0.01, "top_p": 0.7}, [MinPLogitsWarper(0.01), TopPLogitsWarper(0.7)]),
    (
        {"temperature": 0.9, "top_k": 300, "top_p": 0.9},
        [TemperatureLogitsWarper(0.9), TopKLogitsWarper(300), TopPLogitsWarper(0.9)],
    ),
    (
        {"temperature": 0.5, "min_p": 0.05, "top_k": 20, "top_p": 0.9},
        [TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.05), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
    ),
]


@pytest.mark.parametrize("spread", [3.0, 0.3])
def test_distributions_are_those_of_transformers(spread: float) -> None:
    """All in one batch: rows that need few candidates and rows that have to be sorted."""
    logits_RV = torch.stack([logits(seed, spread=spread) for seed in range(len(CUTS))])
    got_RV = distributions(logits_RV, [SamplingParams(**params) for params, _ in CUTS])
    for i, (params, warpers) in enumerate(CUTS):
        expected = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits_RV[i : i + 1])[0]
        off = (got_RV[i] - expected.softmax(-1)).abs() - 1e-4 * expected.softmax(-1)
        assert off.max() < 1e-7, (params, off.max())


def test_processors_are_those_of_transformers_and_openai() -> None:
    prompt, output = [5, 6, 7], [7, 8, 8, 9]
    ids = torch.tensor([prompt + output])
    common: dict[str, Any] = {"prompt_ids": prompt, "output_ids": output}
    requests = [
        make(**common),
        make(**common, repetition_penalty=1.3),
        make(**common, repetition_penalty=0.8),
        make(**common, min_tokens=5, stop_token_ids=(11,)),
        make(**common, min_tokens=4, stop_token_ids=(11,)),
        make(**common, min_tokens=5, stop_token_ids=(11,), ignore_eos=True),
        make(**common, logit_bias={3: -100.0, 8: 2.5}),
        make(**common, presence_penalty=0.5, frequency_penalty=0.25),
        make(**common, logit_bias={8: 4.0}, repetition_penalty=1.5, frequency_penalty=1.0, min_tokens=9),
    ]
    x = logits(vocab=20)
    by_hand = x.clone()
    by_hand[[7, 8, 9]] -= torch.tensor([0.75, 1.0, 0.75])
    bias = SequenceBiasLogitsProcessor({(8,): 4.0})
    early = MinNewTokensLengthLogitsProcessor(3, 9, EOS)
    mixed = RepetitionPenaltyLogitsProcessor(1.5)(ids, bias(ids, early(ids, x[None])))[0]
    mixed[[7, 8, 9]] -= torch.tensor([1.0, 2.0, 1.0])
    expected = [
        x,
        RepetitionPenaltyLogitsProcessor(1.3)(ids, x[None].clone())[0],
        RepetitionPenaltyLogitsProcessor(0.8)(ids, x[None].clone())[0],
        MinNewTokensLengthLogitsProcessor(3, 5, [EOS, 11])(ids, x[None].clone())[0],
        x,
        MinNewTokensLengthLogitsProcessor(3, 5, [11])(ids, x[None].clone())[0],
        SequenceBiasLogitsProcessor({(3,): -100.0, (8,): 2.5})(ids, x[None].clone())[0],
        by_hand,
        mixed,
    ]
    before_SV = x.repeat(len(requests), 1)
    got_SV = process(before_SV, requests, (EOS,))
    torch.testing.assert_close(got_SV, torch.stack(expected))
    assert torch.equal(before_SV, x.repeat(len(requests), 1))
    assert process(before_SV, requests[:1] * len(requests), (EOS,)) is before_SV


def tokens_of(logits_SV: Tensor, requests: Sequence[Request]) -> list[int]:
    out = Sampler(OPS, (EOS,))(logits_SV, requests)()
    return [sampled.token for sampled in out if sampled is not None]


def test_greedy_goes_by_the_processed_logits() -> None:
    x = torch.tensor([[0.0, 3.0, 4.0, 1.0]])
    assert tokens_of(x, [make(temperature=0)]) == [2]
    assert tokens_of(x, [make(temperature=0, min_tokens=1)]) == [1]
    assert tokens_of(x, [make(temperature=0, logit_bias={3: 10.0})]) == [3]


def mixed_requests() -> list[Request]:
    """All kinds of cuts, penalties and seeds."""
    kinds = [params for params, _ in CUTS] + [
        {"temperature": 0.0},
        {"repetition_penalty": 1.2, "top_p": 0.9},
        {"frequency_penalty": 0.5},
    ]
    return [make(i, output_ids=range(i, 3 * i), seed=i % 5 - 2, **kinds[i % len(kinds)]) for i in range(3 * len(kinds))]


def test_a_rows_token_does_not_depend_on_the_batch() -> None:
    requests = mixed_requests()
    logits_SV = torch.stack([logits(i) for i in range(len(requests))])
    together = tokens_of(logits_SV, requests)
    assert [tokens_of(logits_SV[i : i + 1], [r])[0] for i, r in enumerate(requests)] == together
    for seed in range(3):
        order = random.Random(seed).sample(range(len(requests)), 20)
        assert tokens_of(logits_SV[order], [requests[i] for i in order]) == [together[i] for i in order]


def draws(n: int, seed: int | None, **params: Any) -> list[int]:
    """The same logits at n positions, as if the request had drawn before."""
    sampler = Sampler(OPS)
    requests = [make(0, output_ids=[0] * i, seed=seed, **params) for i in range(n)]
    return [s.token for s in sampler(logits(vocab=50, spread=1.0).repeat(n, 1), requests)() if s is not None]


def test_seeds() -> None:
    assert draws(30, 5) == draws(30, 5)
    assert draws(30, 5) != draws(30, 6)
    assert draws(30, None) != draws(30, None)
    sampler = Sampler(OPS)
    rows = [make(i, seed=None) for i in range(30)]
    assert len({s.token for s in sampler(logits().repeat(30, 1), rows)() if s is not None}) > 5


@pytest.mark.parametrize("params", [{}, {"top_k": 30}], ids=["by vocabulary", "by candidates"])
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    expected = distributions(logits(vocab=50, spread=1.0)[None], [SamplingParams(**params)])[0]
    counts = torch.bincount(torch.tensor(draws(4000, 1, **params)), minlength=50) / 4000
    assert (counts - expected).abs().max() < 0.03


@pytest.mark.parametrize("num_columns", [1, 511, 512, 513, 1300])
def test_a_draw_inverts_the_cumulative_distribution(num_columns: int) -> None:
    """Also at both ends; a column without weight is never drawn."""
    generator = torch.Generator().manual_seed(num_columns)
    p = torch.rand(num_columns, generator=generator)
    p[torch.rand(num_columns, generator=generator) < 0.5] = 0
    p[num_columns // 2] = 1.0
    ends = torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)
    uniform = torch.cat((ends, torch.rand(500, generator=generator, dtype=torch.float64)))
    got = draw(p.repeat(len(uniform), 1), uniform)
    mass = p.double().cumsum(0)
    expected = torch.searchsorted(mass, uniform * mass[-1], right=True)
    assert (p[got] > 0).all()
    assert got[0] == p.nonzero()[0]
    assert got[1] == p.nonzero()[-1]
    assert (got == expected).float().mean() > 0.99


def test_logprobs_are_of_the_unchanged_distribution() -> None:
    requests = [make(i, temperature=0, logit_bias={7: 50.0}, logprobs=n) for i, n in enumerate((3, None, 0, 20))]
    logits_SV = torch.stack([logits(i) for i in range(4)])
    out = [s for s in Sampler(OPS)(logits_SV, requests)() if s is not None]
    for i, sampled in enumerate(out):
        expected = logits_SV[i].log_softmax(-1)
        asked = requests[i].spec.params.logprobs
        assert sampled.token == 7
        if asked is None:
            assert sampled.logprobs is None
            continue
        assert sampled.logprobs is not None
        assert sampled.logprobs.logprob == pytest.approx(float(expected[7]))
        assert sampled.logprobs.rank == int((expected > expected[7]).sum()) + 1
        assert [t for t, _ in sampled.logprobs.top] == expected.topk(asked).indices.tolist()
        assert [lp for _, lp in sampled.logprobs.top] == pytest.approx(expected.topk(asked).values.tolist())


@pytest.mark.parametrize("vocab", [50, 8192, 8200])
def test_candidates_are_the_best(vocab: int) -> None:
    p_NV = torch.stack([logits(i, vocab) for i in range(5)]).softmax(1)
    p_NV[:, ::7] = p_NV.amax(dim=1, keepdim=True) / 3  # ties
    for width in (1, 20, 50):
        values, ids = _best(p_NV, width)
        assert torch.equal(values, p_NV.topk(width).values)
        assert torch.equal(p_NV.gather(1, ids), values)
        assert all(len(set(row)) == width for row in ids.tolist())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_token_and_leaves_the_others_alone(broken: float) -> None:
    requests = [make(i, seed=i, logprobs=1, temperature=i % 2) for i in range(4)]
    logits_SV = torch.stack([logits(i) for i in range(4)])
    expected = Sampler(OPS)(logits_SV, requests)()
    logits_SV[:2, 17] = broken
    assert Sampler(OPS)(logits_SV, requests)() == [None, None, *expected[2:]]
    assert Sampler(OPS)(logits_SV[:0], [])() == []
