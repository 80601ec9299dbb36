"""The device's chooser, its kernels compiled for the CPU, against the sampler in torch: the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.sampler import Sampled, Sampler
from loray.errors import RequestError
from loray.spec import GenerateRequest, SamplingParams
from loray_kernels import BackendUnavailable, Ops, TokenEdits, backend
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.ops import CudaOps
from tests.engine.sampling.mixes import EOS, check
from tests.fixtures.shim import NotingLauncher

VOCAB = 1000
REFERENCE = backend("reference")


@pytest.fixture
def launcher() -> NotingLauncher:
    try:
        return NotingLauncher()
    except BackendUnavailable as e:
        pytest.skip(str(e))


@pytest.fixture
def ops(launcher: NotingLauncher) -> Ops:
    return CudaOps(Gather(launcher), cast(Any, None))


def make(number: int = 0, output_ids: Sequence[int] = (), prompt_ids: Sequence[int] = (1,), **params: Any) -> Request:
    spec = GenerateRequest(str(number), tuple(prompt_ids), SamplingParams(max_tokens=100, seed=number, **params))
    return Request(spec, number, output_ids=list(output_ids))


@pytest.mark.parametrize("rounded", [False, True], ids=["", "many equal logits"])
@pytest.mark.parametrize(("vocab", "spread", "num", "num_steps"), [(VOCAB, 3.0, 40, 4), (20_000, 0.2, 12, 1)])
def test_tokens_are_the_references(
    ops: Ops, vocab: int, spread: float, num: int, num_steps: int, rounded: bool
) -> None:
    """With a large vocabulary and a flat distribution, more tokens are left than can be compared with each other."""
    check(ops, REFERENCE, vocab=vocab, spread=spread, num=num, num_steps=num_steps, rounded=rounded)


def test_a_step_has_two_launches_whatever_its_rows_want(ops: Ops, launcher: NotingLauncher) -> None:
    sampler, logits_SV = Sampler(ops, (EOS,)), torch.randn(3, VOCAB)
    sampler(logits_SV, [make(0), make(1, temperature=0), make(2, min_p=0.1)])
    assert launcher.kernels == ["sample_fp32"]
    launcher.kernels.clear()
    sampler(logits_SV, [make(0), make(1, top_k=3, logprobs=2, repetition_penalty=1.1), make(2, logit_bias={3: 1.0})])
    assert launcher.kernels == ["sample_fp32", "choose_fp32"]
    launcher.kernels.clear()
    sampler(logits_SV[:2], [make(0, top_p=0.5), make(1, temperature=0, logprobs=0)])
    assert launcher.kernels == ["choose_fp32"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_rows_without_a_token_are_told_and_leave_the_others_alone(ops: Ops, temperature: float, broken: float) -> None:
    own: dict[str, Any] = {"temperature": temperature, "top_p": 0.9, "logprobs": 2}
    requests = [make(i, **own) for i in range(3)] + [make(3, allowed_token_ids=(4,), bad_words=((4,),), **own)]
    logits_SV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = Sampler(REFERENCE)(logits_SV, requests[:3])()
    logits_SV[1] = broken
    got = Sampler(ops)(logits_SV, requests)()
    assert isinstance(got[3], RequestError)
    assert got[1] is None
    for i in (0, 2):
        mine, theirs = got[i], expected[i]
        assert isinstance(mine, Sampled)
        assert isinstance(theirs, Sampled)
        assert mine.token == theirs.token


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_no_scores_of_an_earlier_step_are_left(ops: Ops, broken: float) -> None:
    """A token that is not allowed has a logit that is not finite; the row has a token, and no log-probabilities."""
    logits_SV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(ops)
    sampler(logits_SV, [make(0, logprobs=3)])()
    logits_SV[0, 7] = broken
    for own in (sampler, Sampler(REFERENCE)):
        (sampled,) = own(logits_SV, [make(1, logprobs=3, allowed_token_ids=(4,))])()
        assert isinstance(sampled, Sampled)
        assert sampled.token == 4
        assert sampled.logprobs is not None
        assert all(math.isnan(x) for x in (sampled.logprobs.logprob, *(x for _, x in sampled.logprobs.top)))


def test_all_tokens_alike(ops: Ops) -> None:
    """They are taken by their ids: the share of the mass is the share of the ids."""
    vocab, logits_SV = 5000, torch.zeros(3, 5000)
    requests = [make(i, top_p=0.5, **({"top_k": 3000} if i else {})) for i in range(3)]
    for i, sampled in enumerate(Sampler(ops)(logits_SV, requests)()):
        assert isinstance(sampled, Sampled)
        kept = (3000 if i else vocab) / 2
        assert sampled.token == int(Sampler(ops)._uniform(requests[i]) * kept)
    got, add_waiter = (Sampler(own)(logits_SV, requests)() for own in (ops, REFERENCE))
    assert [cast(Sampled, s).token for s in got] == [cast(Sampled, s).token for s in add_waiter]


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
    request = make(0, temperature=0, min_tokens=5, logit_bias={EOS: 100.0})
    words = np.full((1, -(-VOCAB // 32)), -1, dtype=np.int32)
    for ended, ends in ((frozenset([request]), True), (frozenset[Request](), False)):
        (sampled,) = Sampler(ops, (EOS,))(torch.zeros(1, VOCAB), [request], Masks([request], words, ended))()
        assert isinstance(sampled, Sampled)
        assert (sampled.token == EOS) == ends
