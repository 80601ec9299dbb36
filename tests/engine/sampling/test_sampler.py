"""Sampling parameters against transformers on the same logits, seeds, what is kept of a request, and the device."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
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

from loray.bases.registry import BaseModel
from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.sampler import Sampled, Sampler
from loray.errors import RequestError
from loray.spec import GenerateRequest, SamplingParams
from loray_kernels import Ops, TokenEdits, backend
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.sampling import candidates, draw
from tests.fixtures.engines import BLOCK_BYTES, fill_up, make_engine, request, run
from tests.fixtures.sampling_mixes import check, processed
from tests.fixtures.shim import NotingLauncher, or_skip

VOCAB = 8192  # more than the candidates that are looked at before a row is sorted, and many groups of them
EOS = 2
OPS = backend("auto")


def logits(seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def make(number: int = 0, output_ids: Sequence[int] = (), prompt_ids: Sequence[int] = (1,), **params: Any) -> Request:
    spec = GenerateRequest(f"r{number}", tuple(prompt_ids), SamplingParams(max_tokens=100, **params))
    return Request(spec, number, output_ids=list(output_ids))


def distributions(logits_RV: Tensor, params: Sequence[dict[str, Any]]) -> Tensor:
    out_RV = torch.zeros_like(logits_RV)
    sampler, rows = Sampler(OPS), [make(i, **own) for i, own in enumerate(params)]
    changes = [sampler._change(row, logits_RV.shape[1], may_end=False) for row in rows]
    for places, p_NC, ids_NC in candidates(logits_RV, sampler._draws(rows, range(len(rows)), None), changes):
        out_RV[places] = torch.zeros_like(out_RV[places]).scatter(1, ids_NC, p_NC)
    return out_RV / out_RV.sum(dim=1, keepdim=True)


WARPERS: dict[str, Any] = {
    "temperature": TemperatureLogitsWarper,
    "min_p": MinPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
}
CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 700},
    {"top_k": VOCAB + 1},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 0.01, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 300, "top_p": 0.9},
    {"temperature": 0.5, "min_p": 0.05, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize("spread", [3.0, 0.3])
def test_distributions_are_those_of_transformers(spread: float) -> None:
    """All in one batch: rows that need few candidates and rows that have to be sorted."""
    logits_RV = torch.stack([logits(seed, spread=spread) for seed in range(len(CUTS))])
    got_RV = distributions(logits_RV, CUTS)
    for i, params in enumerate(CUTS):
        warpers = [warper(params[name]) for name, warper in WARPERS.items() if name in params]
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
    got_SV = processed(before_SV, requests)
    torch.testing.assert_close(got_SV, torch.stack(expected))
    assert torch.equal(before_SV, x.repeat(len(requests), 1))


def tokens_of(logits_SV: Tensor, requests: Sequence[Request]) -> list[int]:
    out = Sampler(OPS, (EOS,))(logits_SV, requests)()
    return [sampled.token for sampled in out if sampled is not None]


def mixed_requests() -> list[Request]:
    """All kinds of cuts, penalties and seeds."""
    kinds = [*CUTS, {"temperature": 0.0}, {"repetition_penalty": 1.2, "top_p": 0.9}, {"frequency_penalty": 0.5}]
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
    expected = distributions(logits(vocab=50, spread=1.0)[None], [params])[0]
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


FEW = 300  # tokens
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
    return [make(i, prompt_ids=rng.choices(range(FEW), k=40), **params) for i, params in enumerate(PARAMS * 2)]


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_what_is_kept_of_a_request_gives_the_logits_of_its_whole_output(batch: int) -> None:
    """Rows join and leave the batch, as when requests are preempted; the last ones have many distinct tokens."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(0)
    rows = requests(0)
    for _ in range(120):
        part = rng.sample(rows, batch)
        logits_SV = 3 * torch.randn((batch, FEW), generator=generator)
        got_SV = processed(logits_SV, part)
        for i, row in enumerate(part):
            assert torch.equal(got_SV[i], by_hand(logits_SV[i], row)), row.spec.params
            row.output_ids.append(rng.choice([2, 5, 6, 8, 9, 11, rng.randrange(FEW)]))


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
    processed(torch.randn(1, FEW), [request])
    request.output_ids.read = 0  # type: ignore[attr-defined]
    for token in range(50):
        processed(torch.randn(1, FEW), [request])
        request.output_ids.append(token)
    processed(torch.randn(1, FEW), [request])
    assert request.output_ids.read == 50  # type: ignore[attr-defined]


REFERENCE = backend("reference")


# The device's chooser, its kernels compiled for the CPU, against the sampler in torch: the same tokens.


def seeded(number: int, **params: Any) -> Request:
    return make(number, seed=number, **params)


@pytest.fixture
def launcher() -> NotingLauncher:
    return or_skip(NotingLauncher)


@pytest.fixture
def ops(launcher: NotingLauncher) -> Ops:
    return CudaOps(launcher, cast(Any, None))


@pytest.mark.parametrize("rounded", [False, True], ids=["", "many equal logits"])
@pytest.mark.parametrize(("vocab", "spread", "num", "num_steps"), [(1000, 3.0, 40, 4), (20_000, 0.2, 12, 1)])
def test_tokens_are_the_references(
    ops: Ops, vocab: int, spread: float, num: int, num_steps: int, rounded: bool
) -> None:
    """With a large vocabulary and a flat distribution, more tokens are left than can be compared with each other."""
    check(ops, REFERENCE, vocab=vocab, spread=spread, num=num, num_steps=num_steps, rounded=rounded)


def test_a_step_has_two_launches_whatever_its_rows_want(ops: Ops, launcher: NotingLauncher) -> None:
    sampler, logits_SV = Sampler(ops, (EOS,)), torch.randn(3, 1000)
    sampler(logits_SV, [seeded(0), seeded(1, temperature=0), seeded(2, min_p=0.1)])
    assert launcher.kernels == ["sample_fp32"]
    launcher.kernels.clear()
    sampler(
        logits_SV, [seeded(0), seeded(1, top_k=3, logprobs=2, repetition_penalty=1.1), seeded(2, logit_bias={3: 1.0})]
    )
    assert launcher.kernels == ["sample_fp32", "choose_fp32"]
    launcher.kernels.clear()
    sampler(logits_SV[:2], [seeded(0, top_p=0.5), seeded(1, temperature=0, logprobs=0)])
    assert launcher.kernels == ["choose_fp32"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_device", [False, True])
def test_rows_without_a_token_are_told_and_leave_the_others_alone(
    ops: Ops, temperature: float, broken: float, on_device: bool
) -> None:
    own: dict[str, Any] = {"temperature": temperature, "top_p": 0.9, "logprobs": 2}
    rows = [seeded(i, **own) for i in range(3)] + [seeded(3, allowed_token_ids=(4,), bad_words=((4,),), **own)]
    logits_SV = torch.stack([logits(i, 1000) for i in range(4)])
    expected = Sampler(REFERENCE)(logits_SV, rows[:3])()
    logits_SV[1] = broken
    got = Sampler(ops if on_device else OPS)(logits_SV, rows)()
    assert isinstance(got[3], RequestError)
    assert got[1] is None
    assert [got[i].token for i in (0, 2)] == [expected[i].token for i in (0, 2)]  # type: ignore[union-attr]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_no_scores_of_an_earlier_step_are_left(ops: Ops, broken: float) -> None:
    """A token that is not allowed has a logit that is not finite; the row has a token, and no log-probabilities."""
    logits_SV = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(ops)
    sampler(logits_SV, [seeded(0, logprobs=3)])()
    logits_SV[0, 7] = broken
    for own in (sampler, Sampler(REFERENCE)):
        (sampled,) = own(logits_SV, [seeded(1, logprobs=3, allowed_token_ids=(4,))])()
        assert isinstance(sampled, Sampled)
        assert sampled.token == 4
        assert sampled.logprobs is not None
        assert all(math.isnan(x) for x in (sampled.logprobs.logprob, *(x for _, x in sampled.logprobs.top)))


def test_all_tokens_alike(ops: Ops) -> None:
    """They are taken by their ids: the share of the mass is the share of the ids."""
    vocab, logits_SV = 5000, torch.zeros(3, 5000)
    requests = [seeded(i, top_p=0.5, **({"top_k": 3000} if i else {})) for i in range(3)]
    for i, sampled in enumerate(Sampler(ops)(logits_SV, requests)()):
        assert isinstance(sampled, Sampled)
        kept = (3000 if i else vocab) / 2
        assert sampled.token == int(Sampler(ops)._uniform(requests[i]) * kept)
    got, expected = (Sampler(own)(logits_SV, requests)() for own in (ops, REFERENCE))
    assert [cast(Sampled, s).token for s in got] == [cast(Sampled, s).token for s in expected]


def test_only_what_is_new_is_sent() -> None:
    edits = TokenEdits()
    edits.set_all("bias", np.array([7, 9]), np.array([1.5, -2.0]))
    edits.set_all("factor", np.array([9, 11]), np.array([1.2, 1.2]))
    assert edits.take_new(everything=True).tolist() == [
        (0, 7, 1.5, 1.0, 0.0),
        (1, 9, -2.0, pytest.approx(1.2), 0.0),
        (2, 11, 0.0, pytest.approx(1.2), 0.0),
    ]
    assert len(edits.take_new(everything=False)) == 0
    edits.set(9, None, -0.5)
    edits.set(9, None, -1.0)
    edits.set(8, 1.2, -0.5)
    new = sorted(edits.take_new(everything=False).tolist())
    assert new == [(1, 9, -2.0, pytest.approx(1.2), -1.0), (3, 8, 0.0, pytest.approx(1.2), -0.5)]
    capacity = edits.capacity
    for token in range(100, 300):
        edits.set(token, None, 1.0)
    assert edits.capacity > capacity
    assert edits.take_new(everything=True)["token"].tolist() == [7, 9, 11, 8, *range(100, 300)]


def test_a_request_that_has_ended_may_end_before_its_minimum(ops: Ops) -> None:
    request = seeded(0, temperature=0, min_tokens=5, logit_bias={EOS: 100.0})
    words = np.full((1, -(-1000 // 32)), -1, dtype=np.int32)
    for ended, ends in ((frozenset([request]), True), (frozenset[Request](), False)):
        (sampled,) = Sampler(ops, (EOS,))(torch.zeros(1, 1000), [request], Masks([request], words, ended))()
        assert isinstance(sampled, Sampled)
        assert (sampled.token == EOS) == ends


KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 0.4},
    {"temperature": 0.0, "presence_penalty": 0.5},
]


def seeded_requests() -> list[GenerateRequest]:
    rng = random.Random(0)
    return [
        request(str(i), [rng.randrange(256) for _ in range(5 + 3 * i)], seed=i, max_tokens=24, **KINDS[i % len(KINDS)])
        for i in range(15)
    ]


@pytest.fixture(scope="module")
def alone(base: BaseModel) -> dict[str, list[int]]:
    engine = make_engine(base)
    tokens = {name: tokens for r in seeded_requests() for name, tokens in run(engine, [r]).items()}
    assert sum(len(set(t)) for t in tokens.values()) > 150  # drawn, not repeated
    return tokens


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"max_num_batched_tokens": 24, "max_num_seqs": 6},
        {"pool_bytes": 14 * BLOCK_BYTES, "max_model_len": 128, "enable_prefix_caching": False},
    ],
    ids=["batched", "chunked", "preempted"],
)
def test_a_seed_gives_the_same_tokens_in_whatever_way_the_engine_runs_the_request(
    base: BaseModel, alone: dict[str, list[int]], spec: dict[str, Any]
) -> None:
    for seed in range(2):
        engine = make_engine(base, **spec)
        fill_up(engine)
        requests = seeded_requests()
        random.Random(seed).shuffle(requests)
        assert run(engine, requests) == alone
        assert bool(engine.stats().num_preemptions) == ("pool_bytes" in spec)
