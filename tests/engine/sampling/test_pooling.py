"""Embeddings against the pooled hidden states of transformers + PEFT: chunked, preempted, in a batch with answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.engine.engine import Engine
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import IntegrityError, RequestError
from loray.methods.weights import LoraWeights
from loray.spec import AdapterRef, Constraint, GenerateRequest, Pooling, PoolingParams
from tests.fixtures.draws import Normal
from tests.fixtures.engines import BLOCK_BYTES, fill_up, ids, make_engine, outputs, request, run
from tests.fixtures.gateway import adapter_ref
from tests.fixtures.peft_adapters import ATTENTION, Adapters, Oracle, TestAdapter, make_adapter
from tests.fixtures.tiny import write_checkpoint

LENGTHS = (1, 2, 17, 40, 64, 65, 90)


@pytest.fixture(scope="module")
def every(base: BaseModel, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    """LoRA, LongLoRA with norms and embedding rows, VeRA, DoRA, IA³ and aLoRA."""
    folder = tmp_path_factory.mktemp("pooled")
    configs: dict[str, Any] = {
        "dora": LoraConfig(r=4, target_modules=ATTENTION, use_dora=True),
        "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "alora": LoraConfig(r=4, target_modules=ATTENTION, alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM"),
    }
    more = [make_adapter(base, folder / name, config, seed=7, std=0.12) for name, config in configs.items()]
    return [adapters["r5"], adapters["longlora"], adapters["vera-a"], *more]


@pytest.fixture(scope="module")
def oracle(base: BaseModel, every: list[TestAdapter]) -> Oracle:
    return Oracle(base, every)


def expected(oracle: Oracle, ids: Sequence[int], adapter: TestAdapter | None, pooling: Pooling) -> Tensor:
    """What transformers says, (hidden size,)."""
    model = oracle._models[adapter.ref.digest if adapter else None]
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    x_TD = out.hidden_states[-1][0].float()  # after the final norm
    return normalize(x_TD[-1] if pooling == "last" else x_TD.mean(0), dim=0)


def embed(name: str, ids: Sequence[int], adapter: TestAdapter | None, pooling: Pooling) -> GenerateRequest:
    return replace(request(name, ids, adapter, max_tokens=0), pooling=PoolingParams(kind=pooling))


def batch(every: Sequence[TestAdapter]) -> list[tuple[GenerateRequest, TestAdapter | None]]:
    """For each adapter and the base both poolings, and answers between them."""
    found: list[tuple[GenerateRequest, TestAdapter | None]] = []
    for i, adapter in enumerate([None, *every]):
        for pooling in ("last", "mean"):
            prompt = ids(LENGTHS[(i + len(pooling)) % len(LENGTHS)], i)
            if adapter is not None and adapter.ref.invocation_tokens is not None:
                prompt = [*ids(21, 3), 7, 8, *ids(9, 4)]
            found.append((embed(f"{i}-{pooling}", prompt, adapter, pooling), adapter))  # type: ignore[arg-type]
        found.append((request(f"{i}-answer", ids(20 + i, i), adapter, max_tokens=6), adapter))
    return found


def check(engine: Engine, oracle: Oracle, every: Sequence[TestAdapter]) -> None:
    asked = batch(every)
    vectors: dict[str, tuple[float, ...]] = {}
    tokens: dict[str, list[int | None]] = {}
    for out in outputs(engine, *(r for r, _ in asked)):
        assert out.error is None
        if out.embedding is not None:
            assert (out.token_id, out.finish_reason) == (None, "stop")
            vectors[out.request_id] = out.embedding
        else:
            tokens.setdefault(out.request_id, []).append(out.token_id)
    assert set(tokens) == {r.request_id for r, _ in asked if r.pooling is None}
    for r, adapter in asked:
        if r.pooling is not None:
            found, wanted = torch.tensor(vectors[r.request_id]), expected(oracle, r.prompt_ids, adapter, r.pooling.kind)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=r.request_id)
            assert float(found.norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("budget", [16, 512])
def test_embeddings_are_pooled_hidden_states_with_adapters_of_each_method(
    base: BaseModel, every: list[TestAdapter], oracle: Oracle, budget: int
) -> None:
    check(make_engine(base, every, max_num_batched_tokens=budget, max_num_seqs=8), oracle, every)


def test_preemption_changes_no_embedding(base: BaseModel, oracle: Oracle) -> None:
    engine = make_engine(base, pool_bytes=16 * BLOCK_BYTES, max_num_batched_tokens=24, max_num_seqs=8)
    fill_up(engine)
    answers = [request(f"long-{i}", ids(30, 90 + i), max_tokens=60) for i in range(3)]
    embeddings = [embed(str(n), ids(n, n), None, "mean") for n in (90, 65, 64)]
    found = {out.request_id: out.embedding for out in outputs(engine, *answers, *embeddings)}
    assert engine.stats().num_preemptions > 0
    for r in embeddings:
        wanted = expected(oracle, r.prompt_ids, None, "mean")
        torch.testing.assert_close(torch.tensor(found[r.request_id]), wanted, atol=1e-4, rtol=0)


def test_the_last_token_is_found_behind_a_cached_prefix_and_no_embedding_leaves_blocks(
    base: BaseModel, oracle: Oracle
) -> None:
    engine, prompt = make_engine(base), ids(70, 5)
    kept = engine.scheduler.prefix_cache
    run(engine, [embed("first", prompt, None, "last")])
    assert kept.num_idle == 0
    run(engine, [request("answer", prompt, max_tokens=1)])
    num_kept = kept.num_idle
    cases: tuple[tuple[Pooling, int], ...] = (("mean", 0), ("last", 64), ("mean", 0))
    for i, (pooling, num_cached) in enumerate(cases):
        (out,) = outputs(engine, embed(str(i), prompt, None, pooling))
        assert (out.num_cached_tokens, kept.num_idle) == (num_cached, num_kept)
        assert out.embedding is not None
        wanted = expected(oracle, prompt, None, pooling)
        torch.testing.assert_close(torch.tensor(out.embedding), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dimensions", [None, 24])
@pytest.mark.parametrize("kind", ["last", "mean"])
def test_embeddings_are_cut_and_scaled_where_that_is_wanted(
    base: BaseModel, oracle: Oracle, kind: Pooling, dimensions: int | None
) -> None:
    engine, prompt = make_engine(base, max_num_batched_tokens=32), ids(70, 5)
    with torch.inference_mode():
        out = oracle._models[None](input_ids=torch.tensor([prompt]), output_hidden_states=True)
    x_TD = out.hidden_states[-1][0]
    cut_D = (x_TD[-1] if kind == "last" else x_TD.mean(0))[:dimensions]
    for scaled, wanted in ((True, normalize(cut_D, dim=0)), (False, cut_D)):
        pooling = PoolingParams(kind=kind, dimensions=dimensions, normalize=scaled)
        (found,) = outputs(engine, replace(embed("a", prompt, None, kind), pooling=pooling))
        torch.testing.assert_close(torch.tensor(found.embedding), wanted, atol=1e-4, rtol=1e-4)


def test_hidden_states_that_are_not_finite_fail_their_request_alone(base: BaseModel, adapters: Adapters) -> None:
    engine, broken = make_engine(base, list(adapters.values())), adapters["r2"]

    def load(ref: AdapterRef, packer: Packer) -> PackedAdapter:
        weights = broken.load(base)
        for module in weights.modules.values():
            assert isinstance(module, LoraWeights)
            module.b_OR.mul_(1e38)
        return packer.pack(weights)

    engine._loads._load = load
    both = [embed("broken", ids(20), broken, "mean"), embed("fine", ids(20), None, "mean")]
    found = {out.request_id: out for out in outputs(engine, *both)}
    assert isinstance(found["broken"].error, IntegrityError)
    assert "hidden states that are not finite" in str(found["broken"].error)
    assert found["fine"].embedding is not None


@pytest.mark.parametrize(
    "params",
    [{"max_tokens": 1}, {"prompt_logprobs": 0}, {"structured": Constraint(kind="regex", text="a")}],
)
def test_an_embedding_has_no_answer(base: BaseModel, params: dict[str, Any]) -> None:
    asked = replace(request("r", ids(4), **{"max_tokens": 0, **params}), pooling=PoolingParams(kind="last"))
    with pytest.raises(RequestError, match="an embedding has n"):
        make_engine(base).check(asked)


def test_a_model_without_a_head_and_an_adapter_of_it(tmp_path: Path) -> None:
    """As sentence-transformers saves both: no names begin with `model.`."""
    whole = write_checkpoint(tmp_path / "whole", "Qwen3ForCausalLM", tie_word_embeddings=True)
    model, folder = AutoModel.from_pretrained(whole), tmp_path / "headless"
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    model.save_pretrained(folder)
    base = add_base(str(folder), home=tmp_path / "home")
    assert base.config.architecture == "Qwen3ForCausalLM"
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="FEATURE_EXTRACTION"))
    draw = Normal(3)
    with torch.no_grad():
        for _, parameter in sorted(tuned.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.12 * draw(*parameter.shape))
    tuned.save_pretrained(tmp_path / "adapter")
    weights = read_adapter(tmp_path / "adapter", base.config)
    assert len(weights.modules) == len(ATTENTION) * base.config.num_layers
    ref = adapter_ref("a" * 64, base_fingerprint=base.fingerprint, context_length=512, nbytes=1 << 16)
    served = TestAdapter(ref, tmp_path / "adapter", None)
    (out,) = outputs(make_engine(base, [served]), embed("a", ids(40), served, "last"))
    with torch.inference_mode():
        wanted = normalize(tuned(input_ids=torch.tensor([ids(40)])).last_hidden_state[0, -1], dim=0)
    torch.testing.assert_close(torch.tensor(out.embedding), wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["last", "mean"])
def test_embeddings_in_bf16_are_as_close_as_transformers(smollm2: BaseModel, tmp_path: Path, kind: Pooling) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = make_adapter(smollm2, tmp_path / "tuned", config, seed=1)
    exact, rounded = Oracle(smollm2, [tuned]), Oracle(smollm2, [tuned], torch.bfloat16)
    engine = make_engine(smollm2, [tuned], dtype="bfloat16", pool_bytes=64 << 20)
    for adapter in (None, tuned):
        for num_tokens in (5, 14, 60):
            prompt = ids(num_tokens, num_tokens)
            (out,) = outputs(engine, embed("a", prompt, adapter, kind))
            truth, theirs = (expected(oracle, prompt, adapter, kind) for oracle in (exact, rounded))
            found = torch.tensor(out.embedding)
            assert float(found @ truth) > min(0.9999, 1 - 2 * (1 - float(theirs @ truth)))
