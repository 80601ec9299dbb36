"""A seed gives the same tokens in whatever way the engine runs the request."""

from __future__ import annotations

import random
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.spec import GenerateRequest
from tests.engine.harness import fill_up, make_engine, request, run

BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, d, fp32
KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 0.4},
    {"temperature": 0.0, "presence_penalty": 0.5},
]


def seeded() -> list[GenerateRequest]:
    rng = random.Random(0)
    return [
        request(str(i), [rng.randrange(256) for _ in range(5 + 3 * i)], seed=i, max_tokens=24, **KINDS[i % len(KINDS)])
        for i in range(15)
    ]


@pytest.fixture(scope="module")
def alone(base: BaseModel) -> dict[str, list[int]]:
    engine = make_engine(base)
    tokens = {name: tokens for r in seeded() for name, tokens in run(engine, [r]).items()}
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
def test_tokens_do_not_depend_on_the_company(
    base: BaseModel, alone: dict[str, list[int]], spec: dict[str, Any]
) -> None:
    for seed in range(2):
        engine = make_engine(base, **spec)
        fill_up(engine)
        requests = seeded()
        random.Random(seed).shuffle(requests)
        assert run(engine, requests) == alone
        assert bool(engine.stats().num_preemptions) == ("pool_bytes" in spec)


def test_without_a_seed_every_request_is_its_own(base: BaseModel) -> None:
    engine = make_engine(base)
    out = run(engine, [request(str(i), range(20), temperature=1.0, max_tokens=12) for i in range(6)])
    assert len({tuple(tokens) for tokens in out.values()}) == 6
    assert run(engine, [request("0", range(20), temperature=1.0, max_tokens=12)])["0"] != out["0"]
