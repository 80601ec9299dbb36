"""Requests with every sampling parameter, drawn at random, and two samplers side by side on the same logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.sampler import Sampled, Sampler
from loray.spec import GenerateRequest, SamplingParams
from loray_kernels import Ops

EOS = 2


def params(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Each part with some probability, so that many requests have several, and some have none."""
    tokens = range(vocab)
    parts: list[dict[str, Any]] = [
        {"temperature": rng.choice([0.0, 0.4, 1.7])},
        {"top_k": rng.choice([1, 7, 64, vocab // 2, vocab + 1])},
        {"top_p": rng.choice([0.3, 0.9, 0.999])},
        {"min_p": rng.choice([0.001, 0.1])},
        {"repetition_penalty": rng.choice([0.7, 1.3])},
        {"presence_penalty": rng.uniform(-2, 2), "frequency_penalty": rng.uniform(-1, 2)},
        {"logit_bias": {rng.choice(tokens): rng.uniform(-100, 8) for _ in range(12)}},
        {"allowed_token_ids": tuple(rng.sample(tokens, vocab // rng.choice([3, 20])))},
        {"bad_words": ((5,), (5, 8), (rng.choice(tokens),)), "min_tokens": 3},
        {"logprobs": rng.choice([0, 3, 20])},
    ]
    return {name: value for part in parts if rng.random() < 0.35 for name, value in part.items()}


def make(rng: random.Random, number: int, vocab: int) -> tuple[Request, Request]:
    """The same request for each of two samplers."""
    prompt = tuple(rng.choices(range(vocab), k=rng.choice([3, 200])))
    own = SamplingParams(max_tokens=100, seed=number, **params(rng, vocab))
    spec = GenerateRequest(str(number), prompt, own)
    return Request(spec, number), Request(spec, number)


def masks_of(rng: random.Random, rows: Sequence[Request], vocab: int) -> Masks | None:
    held = [r for r in rows if rng.random() < 0.2]
    if not held:
        return None
    bits = np.random.default_rng(rng.randrange(1000)).random((len(held), -(-vocab // 32), 32)) < 0.6
    words = (bits.astype(np.int64) << np.arange(32)).sum(2).astype(np.uint32).view(np.int32)
    return Masks(held, words, frozenset(held[:1]))


def check(
    ops: Ops, reference: Ops, *, vocab: int, spread: float, num: int, num_steps: int, rounded: bool, device: str = "cpu"
) -> None:
    """Requests join and leave the batch; each sampler has a history of them. `rounded`: many logits are equal."""
    rng, generator = random.Random(vocab + num), torch.Generator().manual_seed(vocab)
    samplers = Sampler(ops, (EOS,)), Sampler(reference, (EOS,))
    pairs = [make(rng, n, vocab) for n in range(num)]
    for _ in range(num_steps):
        part = rng.sample(pairs, num - num // 4)
        logits_SV = spread * torch.randn((len(part), vocab), generator=generator)
        logits_SV = logits_SV.bfloat16().float() if rounded else logits_SV
        there_SV = logits_SV.to(device, copy=True)
        seed = rng.random()
        masks = [masks_of(random.Random(seed), rows, vocab) for rows in zip(*part, strict=True)]
        got = samplers[0](there_SV, [a for a, _ in part], masks[0])()
        add_waiter = samplers[1](logits_SV, [b for _, b in part], masks[1])()
        assert torch.equal(there_SV.cpu(), logits_SV), "the logits have not been put back"
        for (a, b), mine, theirs in zip(part, got, add_waiter, strict=True):
            compare(mine, theirs, logits_SV, a.spec.params)
            for request, sampled in ((a, mine), (b, theirs)):
                if isinstance(sampled, Sampled):
                    request.output_ids.append(sampled.token)


def compare(got: Any, add_waiter: Any, logits_SV: Tensor, own: SamplingParams) -> None:
    assert type(got) is type(add_waiter), own
    if not isinstance(add_waiter, Sampled):
        return
    assert got.token == add_waiter.token, own
    if add_waiter.logprobs is None:
        assert got.logprobs is None
        return
    assert got.logprobs.rank == add_waiter.logprobs.rank
    for mine, theirs in zip(
        (got.logprobs.logprob, *(value for _, value in got.logprobs.top)),
        (add_waiter.logprobs.logprob, *(value for _, value in add_waiter.logprobs.top)),
        strict=True,
    ):
        assert abs(mine - theirs) < 1e-5
    values = [value for _, value in add_waiter.logprobs.top]
    if len({round(value, 4) for value in values}) == len(values):  # else equals may stand in any order
        assert [t for t, _ in got.logprobs.top][:-1] == [t for t, _ in add_waiter.logprobs.top][:-1]
