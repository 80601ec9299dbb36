"""The real base model, nine strong adapters of every method and the base in one batch, against transformers + PEFT.

Our fp32 logits must be within 1e-4 of PEFT's in fp64. PEFT's own in fp32 are up to 8e-5 away from that, so between two
fp32 programs the distances may add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.spec import RopeParameters
from tests.engine.adapters import NORMS, Oracle, TestAdapter, make_adapter
from tests.engine.harness import Spy, make_engine, request, run

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
LINEAR = RopeParameters(rope_type="linear", rope_theta=100000.0, factor=2.0)
NUM_TOKENS = 18  # past a block, whatever the prompt
TIE = 1e-4
POOL = 384 << 20  # all adapters and requests

CONFIGS: dict[str, tuple[Any, RopeParameters | None]] = {
    "lora-8": (LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION), None),
    "lora-16": (LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"]), None),
    "lora-32": (LoraConfig(r=32, lora_alpha=16, target_modules=ATTENTION), None),
    "lora-64": (LoraConfig(r=64, lora_alpha=16, target_modules=ALL), None),
    "rslora-16": (LoraConfig(r=16, lora_alpha=4, use_rslora=True, target_modules=ALL), None),
    "vera-256": (VeraConfig(r=256, target_modules=ATTENTION, save_projection=False), None),
    "vera-256b": (VeraConfig(r=256, target_modules=ATTENTION, save_projection=False), None),
    "vera-all": (VeraConfig(r=128, target_modules=ALL, save_projection=False), None),
    "longlora": (LoraConfig(r=8, target_modules=ATTENTION, modules_to_save=["embed_tokens", *NORMS]), LINEAR),
}
ALONE = [0, *(1 + list(CONFIGS).index(name) for name in ("lora-64", "vera-256", "longlora"))]  # one of each method
PROMPTS = [
    "The three largest oceans are",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "Question: what is 12 times 7?\nAnswer:",
]


@dataclass(frozen=True)
class Case:
    base: BaseModel
    adapters: list[TestAdapter]
    prompts: list[list[int]]
    mixed: dict[str, list[int]]
    logits: dict[str, torch.Tensor]

    def model(self, i: int) -> TestAdapter | None:
        return None if i == 0 else self.adapters[i - 1]

    def requests(self, order: list[int], num_tokens: int = NUM_TOKENS) -> list[Any]:
        return [request(str(i), self.prompts[i], self.model(i), max_tokens=num_tokens) for i in order]


@pytest.fixture(scope="module")
def case(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [
        make_adapter(smollm2, folder / name, config, seed=40 + i, rope=rope, num_token_rows=5000, extras_std=0.02)
        for i, (name, (config, rope)) in enumerate(CONFIGS.items())
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    ids = [tokenizer(PROMPTS[i % len(PROMPTS)])["input_ids"] for i in range(len(adapters) + 1)]
    ids[-1] = ids[-1] * 12  # the LongLoRA adapter gets a long prompt, for more than one step
    case = Case(smollm2, adapters, ids, {}, {})
    engine = make_engine(smollm2, adapters, pool_bytes=POOL, max_num_batched_tokens=64)
    assert len(ids[-1]) > 64
    spy = Spy(engine)
    case.mixed.update(run(engine, case.requests(list(range(len(ids)))), together=True))
    assert engine.stats().max_adapters_in_step >= 8
    case.logits.update({name: torch.stack(rows) for name, rows in spy.logits.items()})
    return case


@pytest.fixture(scope="module")
def oracles(case: Case) -> list[Oracle]:
    """In fp32 and in fp64."""
    return [Oracle(case.base, case.adapters, dtype) for dtype in (torch.float32, torch.float64)]


@pytest.mark.parametrize("i", range(len(CONFIGS) + 1), ids=["base", *CONFIGS])
def test_logits_in_the_mixed_batch_are_pefts(case: Case, oracles: list[Oracle], i: int) -> None:
    adapter, whole = case.model(i), case.prompts[i] + case.mixed[str(i)]
    answers = slice(len(case.prompts[i]) - 1, None)
    expected, exact = (oracle.logits(whole[:-1], adapter)[answers] for oracle in oracles)
    ours, pefts = (float((x.double() - exact).abs().max()) for x in (case.logits[str(i)], expected))
    between = float((case.logits[str(i)] - expected).abs().max())
    print(f"from fp64: ours {ours:.1e}, PEFT {pefts:.1e}; between them {between:.1e}")
    assert ours < 1e-4
    assert between < 1e-4 + pefts
    ties = _ties(expected)
    different = (expected.argmax(-1) != torch.tensor(case.mixed[str(i)])).nonzero().flatten().tolist()
    assert set(different) <= ties, f"tokens differ at {different}, ties are at {sorted(ties)}"


def test_tokens_do_not_depend_on_order_or_company(case: Case) -> None:
    n = len(case.prompts)
    shuffled = run(
        make_engine(case.base, case.adapters, pool_bytes=POOL, max_num_batched_tokens=512),
        case.requests([(7 * i + 3) % n for i in range(n)]),
        together=True,
    )
    alone_engine = make_engine(case.base, case.adapters, pool_bytes=POOL)
    alone: dict[str, list[int]] = {}
    for i in ALONE:
        alone |= run(alone_engine, case.requests([i], NUM_TOKENS // 2))
    with_ties = {i: ties for i in range(n) if (ties := _ties(case.logits[str(i)]))}
    for other in (shuffled, alone):
        for i, tokens in other.items():
            first = next((k for k, token in enumerate(tokens) if token != case.mixed[i][k]), None)
            assert first is None or first in with_ties.get(int(i), ())
    print(f"ties: {with_ties}")
    assert len(with_ties) <= 1  # the others are compared to their end, whatever the machine's rounding
    assert len({tuple(t[: NUM_TOKENS // 2]) for t in case.mixed.values()}) == n


def _ties(logits: torch.Tensor) -> set[int]:
    top = logits.topk(2, dim=-1).values
    return set((top[:, 0] - top[:, 1] < TIE).nonzero().flatten().tolist())
