"""What a trainer relies on: scoring gives the bits of decoding, and versions that are retired leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.memory.adapter_manager import Tier
from loray.errors import AdapterGone
from loray.spec import AdapterRef, GenerateRequest
from loray_kernels.cpu.ops import CpuOps
from tests.fixtures.engines import ids, make_engine, outputs, request, run, submit
from tests.fixtures.peft_adapters import ATTENTION, Adapters, TestAdapter, make_adapter

SAMPLED: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "logprobs": 0}


def sampled(engine: Engine, requests: Sequence[GenerateRequest]) -> dict[str, tuple[list[int], list[float]]]:
    """The tokens of each request, and their log-probabilities; those of its prompt where it is only scored."""
    found: dict[str, tuple[list[int], list[float]]] = {r.request_id: ([], []) for r in requests}
    submit(engine, requests)
    for out in outputs(engine):
        assert out.error is None, out.error
        tokens, logprobs = found[out.request_id]
        if out.token_id is not None:
            assert out.logprobs is not None
            tokens.append(out.token_id)
            logprobs.append(out.logprobs.logprob)
        logprobs += [token.logprob for token in out.prompt_logprobs or ()]
    return found


def num_differing(base: BaseModel, adapter: TestAdapter | None, dtype: str, num: int, length: int, **spec: Any) -> int:
    """Sample `num` answers of `length` tokens in one batch, score each, and count the tokens whose bits differ."""
    engine = make_engine(base, [] if adapter is None else [adapter], dtype=dtype, **spec)
    assert isinstance(engine._model.ops, CpuOps), "only the C++ kernels give a token the same bits in any batch"
    asked = [
        request(str(i), ids(9 + 5 * i % 40, seed=i), adapter, **SAMPLED, max_tokens=length, seed=i) for i in range(num)
    ]
    answers = sampled(engine, asked)
    assert len({tuple(tokens) for tokens, _ in answers.values()}) == num
    scoring = {"temperature": 1.0, "max_tokens": 0, "prompt_logprobs": 0}
    scored = sampled(
        engine,
        [request(f"s{r.request_id}", [*r.prompt_ids, *answers[r.request_id][0]], adapter, **scoring) for r in asked],
    )
    again = [(answers[r.request_id][1], scored[f"s{r.request_id}"][1][-length:]) for r in asked]
    engine.close()
    return sum(a != b for decoded, score in again for a, b in zip(decoded, score, strict=True))


@pytest.fixture(scope="module")
def rollout_adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestAdapter | None]:
    return _adapters(base, tmp_path_factory.mktemp("rollouts"), std=0.12)


def _adapters(base: BaseModel, folder: Path, std: float) -> dict[str, TestAdapter | None]:
    from peft import LoraConfig, VeraConfig

    configs = {
        "lora": LoraConfig(r=16, target_modules=ATTENTION),
        "vera": VeraConfig(r=256, target_modules=["q_proj", "v_proj"], save_projection=False),
    }
    made = {name: make_adapter(base, folder / name, config, seed=3, std=std) for name, config in configs.items()}
    return {"base": None, **made}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["base", "lora", "vera"])
def test_scoring_has_the_bits_of_decoding(
    base: BaseModel, rollout_adapters: dict[str, TestAdapter | None], method: str, dtype: str
) -> None:
    assert num_differing(base, rollout_adapters[method], dtype, num=5, length=20, max_num_batched_tokens=48) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_has_the_bits_of_decoding_in_10_000_tokens(smollm2: BaseModel, tmp_path: Path, dtype: str) -> None:
    for adapter in _adapters(smollm2, tmp_path, std=0.02).values():
        assert num_differing(smollm2, adapter, dtype, num=24, length=72, pool_bytes=256 << 20, max_num_seqs=24) == 0


def test_resumed_elsewhere_an_answer_has_the_same_logprobs(base: BaseModel, adapters: Adapters) -> None:
    """As `ResumableAnswer` makes the attempts: the second engine goes on under the digest of the first."""
    adapter = adapters["r8"]
    whole = request("a", ids(20), adapter, **SAMPLED, max_tokens=12, seed=4)
    tokens, logprobs = sampled(make_engine(base, [adapter]), [whole])["a"]
    for num in (1, 7):
        rest = replace(whole, output_ids=tuple(tokens[:num]))
        assert sampled(make_engine(base, [adapter]), [rest])["a"] == (tokens[num:], logprobs[num:])


# -- versions ---------------------------------------------------------------------------------------------------------


def version(adapter: TestAdapter, step: int) -> TestAdapter:
    ref = replace(adapter.ref, digest=f"{step:064x}", name="~run", version=step)
    return replace(adapter, ref=ref)


def size_of(engine: Engine) -> dict[str, int]:
    """All that could grow with the number of versions."""
    manager, loads = engine.adapter_manager, engine._loads
    return {
        "resident": len(manager.residents()),
        "known": len(manager.entries) + len(manager._gone) + len(loads._num_blocks) + len(loads._bytes),
        "host bytes": manager.host_used,
        "blocks": engine.pool.geometry.num_blocks - engine.pool.allocator.num_free,
        "prefixes": len(engine.scheduler.prefix_cache.blocks()),
        "told": len(engine.scheduler.prefix_cache.told()),
    }


def test_200_versions_take_the_room_of_a_few(base: BaseModel, adapters: Adapters) -> None:
    versions = {step: version(adapters["r8"], step) for step in range(200)}
    engine = make_engine(base, [*versions.values(), adapters["r2"]])
    run(engine, [request("people", ids(64), adapters["r2"], max_tokens=2)])
    sizes, engine.check_integrity = [], lambda: None  # type: ignore[method-assign]
    for step, adapter in versions.items():
        asked = [request(f"{step}-{i}", ids(40, seed=step), adapter, max_tokens=2) for i in range(2)]
        run(engine, asked, together=True)
        engine.retire([versions[step - 2].ref.digest] if step >= 2 else [])
        sizes.append(size_of(engine))
    early, late = ({name: max(size[name] for size in part) for name in part[0]} for part in (sizes[:10], sizes[10:]))
    assert late == early
    del engine.check_integrity  # type: ignore[method-assign]
    engine.check_integrity()
    (cached,) = outputs(engine, request("again", ids(64), adapters["r2"], max_tokens=1))
    assert cached.num_cached_tokens == 48  # people's prefixes have stayed


def test_a_retired_version_leaves_when_its_requests_have_ended(base: BaseModel, adapters: Adapters) -> None:
    old, new = version(adapters["r8"], 1), version(adapters["r5"], 2)
    engine = make_engine(base, [old, new])
    alone = run(engine, [request("old", ids(40), old, max_tokens=8)])["old"]
    engine.retire([old.ref.digest])
    assert not engine.adapter_manager.entries

    tokens: list[int] = []
    submit(engine, [request("old", ids(40), old, max_tokens=8), request("new", ids(40), new, max_tokens=2)])
    for out in outputs(engine):
        tokens += [out.token_id] if out.request_id == "old" and out.token_id is not None else []
        if len(tokens) == 3:
            engine.retire([old.ref.digest, "0" * 64])
            assert engine.adapter_manager.tier(old.ref) is Tier.POOL
    assert tokens == alone
    assert list(engine.adapter_manager.entries) == [new.ref.digest]
    assert set(engine.scheduler.prefix_cache._root.children) == {new.ref.digest}
    engine.retire([new.ref.digest])
    engine.check_integrity()
    assert engine.pool.allocator.num_free == engine.pool.geometry.num_blocks


def test_a_load_that_nobody_waits_for_is_retired_when_it_ends(base: BaseModel, adapters: Adapters) -> None:
    old = version(adapters["r8"], 1)
    engine = make_engine(base, [old])
    submit(engine, [request("a", ids(8), old)])
    engine.cancel("a")
    engine.retire([old.ref.digest])
    run(engine, [request("b", ids(8))])
    assert not engine.adapter_manager.entries
    assert engine.adapter_manager.host_used == 0


def test_an_adapter_that_is_gone_is_looked_for_again_at_once(base: BaseModel, adapters: Adapters) -> None:
    old = version(adapters["r8"], 1)
    engine, is_there = make_engine(base, [old]), False
    load: Callable[..., Any] = engine._loads._load

    def late(ref: AdapterRef, packer: Any) -> Any:
        if not is_there:
            raise AdapterGone("gone")
        return load(ref, packer)

    engine._loads._load = late
    with pytest.raises(AdapterGone):
        run(engine, [request("a", ids(8), old)])
    is_there = True
    assert len(run(engine, [request("b", ids(8), old, max_tokens=3)])["b"]) == 3
