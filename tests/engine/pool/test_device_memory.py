"""What a GPU's memory is divided into, and a pool's bytes on a device that is made up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from loray.bases.config import LayerSpec, ModelConfig
from loray.engine.memory.limits import max_model_len
from loray.engine.pool import device_memory
from loray.engine.pool.device_memory import (
    SCORED_BYTES,
    DeviceMemory,
    activation_bytes,
    capture_bytes,
    check_plan,
    logits_bytes,
    plan_memory,
    prompt_logprobs_bytes,
    sized,
    usable_bytes,
)
from loray.errors import SpecError
from loray.spec import RopeParameters, ServeSpec

MIB, GIB = 1 << 20, 1 << 30
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeParameters(rope_theta=5e5),
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    eos_token_ids=(2,),
    layers=(LayerSpec(),) * 32,
)
SPEC = ServeSpec(device="cuda", max_num_batched_tokens=2048, max_num_seqs=256)
BASE = 15 * GIB


def spec(**fields: object) -> ServeSpec:
    return SPEC.model_copy(update=fields)


def test_activations_are_the_wider_of_attention_and_mlp() -> None:
    mlp = 4 * 4096 + 3 * 14_336
    assert activation_bytes(SPEC, CONFIG) == 2048 * (2 * mlp + 4 * 1024)
    assert activation_bytes(spec(max_num_batched_tokens=4096), CONFIG) == 2 * activation_bytes(SPEC, CONFIG)
    attention = 4 * 4096 + 6 * 4096 + 4 * 1024
    narrow = replace(CONFIG, intermediate_size=1024)
    assert activation_bytes(spec(dtype="float32"), narrow) == 2048 * (4 * attention + 4 * 1024)


def test_logits_and_recordings_with_their_tables() -> None:
    assert logits_bytes(SPEC, CONFIG) == 256 * 128_256 * (2 + 12)
    assert logits_bytes(spec(tensor_parallel_size=2), CONFIG) == 256 * 128_256 * (2 + 16)
    beside = 32 * 128_256 * 9
    assert prompt_logprobs_bytes(SPEC, CONFIG) == SCORED_BYTES * 3 // 2 + beside
    large = replace(CONFIG, vocab_size=8 * MIB)  # a row alone is more
    assert prompt_logprobs_bytes(SPEC, large) == 32 * MIB * 3 // 2 + 32 * 8 * MIB * 9
    tables = 8 * MIB + 8 * 256 * 512
    assert capture_bytes(SPEC, CONFIG) == GIB + tables
    assert capture_bytes(spec(graph_record_s=0.0), CONFIG) == tables
    assert capture_bytes(spec(max_model_len=33, graph_bytes=MIB), CONFIG) == MIB + 8 * MIB + 8 * 256 * 3


@pytest.mark.parametrize(
    ("free", "taken", "utilization", "usable"),
    [
        (65 * GIB, BASE, 0.9, 72 * GIB),  # of the whole device, what is loaded included
        (65 * GIB, BASE, 0.5, 40 * GIB),
        (20 * GIB, BASE, 0.9, BASE + 19 * GIB),  # others have the rest: 0.95 of what they leave
        (65 * GIB, BASE, 1.0, BASE + int(0.95 * 65 * GIB)),
    ],
)
def test_how_much_is_usable(free: int, taken: int, utilization: float, usable: int) -> None:
    assert usable_bytes(DeviceMemory(80 * GIB, free, taken), utilization) == usable


def test_the_pool_has_what_is_left() -> None:
    memory = DeviceMemory(80 * GIB, 64 * GIB, BASE)
    scratch: Mapping[str, int] = {"partial sums": 128 * MIB, "staging": 64 * MIB}
    plan = plan_memory(SPEC, CONFIG, memory, held={"FlashInfer": 128 * MIB}, scratch=scratch)
    assert plan.usable == 72 * GIB
    assert plan.needs == {
        "base": BASE - 128 * MIB,
        "FlashInfer": 128 * MIB,
        "activations": activation_bytes(SPEC, CONFIG),
        "logits": logits_bytes(SPEC, CONFIG),
        "prompt logprobs": prompt_logprobs_bytes(SPEC, CONFIG),
        "partial sums": 128 * MIB,
        "staging": 64 * MIB,
        "recordings": capture_bytes(SPEC, CONFIG),
    }
    assert plan.pool == 72 * GIB - sum(plan.needs.values())
    text = plan.text()
    assert text.startswith("77.3 GB may be used: base 16.0 GB, FlashInfer 134.2 MB, activations 251.7 MB, logits 459.")
    assert text.endswith(f"pool {plan.pool / 1e9:.1f} GB")
    check_plan(plan, SPEC, memory, least=plan.pool)


def test_where_nothing_is_left_it_says_what_to_do() -> None:
    memory = DeviceMemory(16 * GIB, GIB // 2, BASE)
    plan = plan_memory(SPEC, CONFIG, memory)
    assert plan.pool < 0
    with pytest.raises(
        SpecError, match=r"the pool would have 0 MiB .*\(536.9 MB of them free, .* 0\.9; .*lower max_num"
    ):
        check_plan(plan, SPEC, memory, least=4 * MIB)
    fits = DeviceMemory(80 * GIB, 64 * GIB, BASE)
    plan = plan_memory(SPEC, CONFIG, fits)._replace(pool=3 * MIB)
    with pytest.raises(SpecError, match=r"the pool would have 3 MiB of the GPU's 85\.9 GB"):
        check_plan(plan, SPEC, fits, least=4 * MIB)


GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "device_memory", lambda device: (80 * GIB, 64 * GIB, BASE))
    monkeypatch.setattr(device_memory, "workspace_bytes", dict)


def test_a_cpu_has_its_default() -> None:
    cpu = torch.device("cpu")
    assert sized(ServeSpec(), CONFIG, cpu).pool_bytes == 512 << 20
    assert sized(ServeSpec(pool_bytes=1 << 20), CONFIG, cpu).pool_bytes == 1 << 20


def test_a_gpu_gives_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = sized(SPEC, CONFIG, GPU).pool_bytes
    assert found is not None
    assert 54 * GIB < found < 56 * GIB
    assert f"partial sums 134.2 MB, staging 67.1 MB, cuBLAS 67.1 MB, recordings 1.1 GB, pool {found / 1e9:.1f} GB" in (
        caplog.text
    )
    assert max_model_len(SPEC, 8192, None) == 8192  # where only the replicas know their pool


def test_what_is_given_wins(caplog: pytest.LogCaptureFixture) -> None:
    given = SPEC.model_copy(update={"pool_bytes": 20 * GIB})
    with caplog.at_level(logging.INFO):
        assert sized(given, CONFIG, GPU) is given
    assert "pool 21.5 GB, which is given" in caplog.text
    assert "large steps" not in caplog.text
    sized(given.model_copy(update={"pool_bytes": 60 * GIB}), CONFIG, GPU)
    assert "large steps may find no memory" in caplog.text


def test_ranks_have_what_the_least_of_them_has() -> None:
    spec = SPEC.model_copy(update={"tensor_parallel_size": 2})
    asked: list[int] = []
    found = sized(spec, CONFIG, GPU, lambda num: asked.append(num) or 5 * GIB)  # type: ignore[func-returns-value]
    assert found.pool_bytes == 10 * GIB
    assert 54 * GIB < asked[0] < 56 * GIB
