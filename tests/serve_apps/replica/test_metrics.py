"""A replica's metrics compared with the requests to a real engine, and its status."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig
from prometheus_client.core import Metric as Family

from loray.bases.registry import BaseModel
from loray.engine.request import TokenOutput
from loray.errors import ContextLengthExceeded, EngineError
from loray.schemas.status import AdapterPlacement
from loray_kernels import KvLayout
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.replica import EngineReplica
from tests.fixtures.engines import hold, request
from tests.fixtures.peft_adapters import TestAdapter, make_adapter
from tests.fixtures.replica import observed


def values(families: Sequence[Family]) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels, in alphabetical order of the labels; without `replica`."""
    return {
        (s.name, *(s.labels[label] for label in sorted(s.labels) if label != "replica")): s.value
        for family in families
        for s in family.samples
    }


@pytest.fixture(scope="module")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return [make_adapter(base, tmp_path_factory.mktemp("a") / name, config, seed=i) for i, name in enumerate("ab")]


async def test_counts_are_what_was_asked(
    base: BaseModel, adapters: list[TestAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool holds one full context, so a request of that length evicts every adapter. The host holds one adapter."""
    monkeypatch.setattr("serve_apps.replica.replica._replica_id", lambda: "r1")
    a, b = adapters
    c = base.config
    layout = KvLayout(c.num_layers, 16, c.num_kv_heads, c.head_dim)
    pool_bytes = c.max_position_embeddings // 16 * layout.num_layers * layout.layer_share * 4
    with observed(base, adapters, pool_bytes=pool_bytes, host_bytes=max(a.ref.nbytes, b.ref.nbytes)) as asked:
        await asked.ask(10, a)  # from the store
        await asked.ask(20, a)  # in the pool
        await asked.ask(500)  # evicts it
        await asked.ask(30, a)  # on the host
        await asked.ask(40, b, max_tokens=1)  # from the store; the host's copy of `a` makes room
        await asked.ask(500)  # evicts both; `a` is not on the host either
        await asked.ask(50, b)  # on the host
        await asked.ask(60, a)  # from the store again
        with pytest.raises(ContextLengthExceeded):
            await asked.ask(510, a)
        stats = await asked.settled(8)
        found = values(asked.metrics.families(stats, "r1"))

        def of(name: str, *labels: str) -> float:
            return found[f"loray_{name}", *labels]

        for name, num in (("time_to_first_token_seconds", 6), ("e2e_request_latency_seconds", 6)):
            assert (of(f"{name}_count", "lora"), of(f"{name}_count", "base")) == (num, 2)
        assert of("request_queue_time_seconds_count", "lora") == 6
        assert of("inter_token_latency_seconds_count", "lora") == 5 * 3
        assert of("inter_token_latency_seconds_count", "base") == 2 * 3
        assert of("request_prompt_tokens_sum", "lora") == 10 + 20 + 30 + 40 + 50 + 60
        assert of("request_generation_tokens_sum", "lora") == 5 * 4 + 1
        assert of("prompt_tokens_total") == 210 + 1000
        assert of("generation_tokens_total") == 21 + 8
        assert of("request_success_total", "length", "lora") == 6
        assert of("request_errors_total", "ContextLengthExceeded", "lora") == 1
        assert [of("adapter_requests_total", tier) for tier in ("pool", "host", "store")] == [1, 2, 3]
        assert of("adapter_loads_total") == of("adapter_load_seconds_count") == 3
        assert of("adapter_loaded_bytes_total") > 0
        assert [of("adapter_evictions_total", tier) for tier in ("pool", "host")] == [3, 2]
        assert of("engine_steps_total") == of("engine_step_seconds_count") == of("engine_step_adapters_count")
        # The last token of a request is never computed, only returned.
        computed = of("prompt_tokens_total") - of("prefix_cache_hits_total")
        assert of("engine_step_tokens_sum") == computed + of("generation_tokens_total") - 8
        assert of("prefix_cache_queries_total") == of("prompt_tokens_total")
        assert [of("adapters", tier) for tier in ("pool", "host", "loading")] == [2, 0, 0]
        assert sum(of("pool_blocks", kind) for kind in ("free", "kv", "cached", "layered", "flat", "run")) == 32
        assert of("pool_blocks", "layered") == 32 - of("pool_blocks", "free") - of("pool_blocks", "cached") > 0
        assert of("kv_cache_usage_ratio") == of("num_requests_running") == 0
        replica: Any = SimpleNamespace(_stream=asked.stream)
        of_a, of_b = sorted(await EngineReplica.adapters(replica), key=lambda found: found.name)
        assert time.time() - 120 < of_a.last_used_at <= time.time()
        assert of_a == AdapterPlacement(
            digest=a.ref.digest,
            name="a",
            version=1,
            nbytes=a.ref.nbytes,
            tier="pool",
            uses=4,
            last_used_at=of_a.last_used_at,
            num_tokens=120 + 16,
            replica="r1",
            node=socket.gethostname(),
        )
        assert (of_b.tier, of_b.uses, of_b.num_tokens) == ("pool", 2, 90 + 5)
        assert [p.name for p in await EngineReplica.adapters(replica, [b.ref.digest, "0" * 64])] == ["b"]


async def test_a_cancelled_request_is_an_abort_and_not_an_error(base: BaseModel) -> None:
    with observed(base) as asked:
        async with aclosing(asked.streams.generate(request("r", [1, 2, 3], max_tokens=400), fit=False)) as deltas:
            await anext(deltas)
        await asked.stream.adapters()  # returns after the cancellation that was posted before it
        await asked.settled(0)
        stands, go_on = hold(asked.stream._engine)
        waiting = asyncio.create_task(asked.ask(3, max_tokens=400))
        assert await asyncio.to_thread(stands.wait, 60)
        waiting.cancel()
        await asyncio.wait([waiting])
        go_on.set()
        found = values(asked.metrics.families(await asked.settled(0), "r1"))
        assert found["loray_request_success_total", "abort", "base"] == 2
        assert not [key for key in found if key[0] == "loray_request_errors_total"]
        assert not [key for key in found if key[0] == "loray_e2e_request_latency_seconds_count"]


async def test_what_a_stop_string_ends_has_stopped_and_what_nobody_wants_was_aborted(base: BaseModel) -> None:
    """Stop strings are found by the reader of the tokens, which then closes the stream."""
    with observed(base) as asked:
        for name, stop in (("with", ("x",)), ("without", ())):
            r = request(name, [1, 2, 3], max_tokens=400, stop=stop)
            async with aclosing(asked.streams.generate(r, fit=False)) as deltas:
                await anext(deltas)
        while asked.streams._left:
            await asyncio.sleep(0)
        found = values(asked.metrics.request_families())
        assert found["loray_request_success_total", "stop", "base"] == 1
        assert found["loray_request_success_total", "abort", "base"] == 1
        assert found["loray_e2e_request_latency_seconds_count", "base"] == 1


def test_latencies_are_between_the_steps() -> None:
    moments = iter([10.0, 10.0, 10.5, 10.75, 12.0])
    metrics = ReplicaMetrics(clock=lambda: next(moments))
    first, second = (metrics.arrived(request(name, [1, 2, 3])) for name in ("a", "b"))
    metrics.stepped([(first, TokenOutput("a", 7)), (second, TokenOutput("b", 7))])
    metrics.stepped([(first, TokenOutput("a", 7)), (second, TokenOutput("b", 7, finish_reason="length"))])
    metrics.stepped([(first, TokenOutput("a", 7, finish_reason="stop"))])
    metrics.ended(first, "stop")
    metrics.ended(second, "length")
    found = values(metrics.request_families())
    assert found["loray_time_to_first_token_seconds_sum", "base"] == 2 * 0.5
    assert found["loray_inter_token_latency_seconds_sum", "base"] == 2 * 0.25 + 1.25
    assert found["loray_inter_token_latency_seconds_bucket", "0.3", "base"] == 2
    assert found["loray_inter_token_latency_seconds_count", "base"] == 3
    assert found["loray_e2e_request_latency_seconds_sum", "base"] == 2.0 + 0.75
    assert found["loray_request_generation_tokens_sum", "base"] == 3 + 2
    assert found["loray_request_success_total", "stop", "base"] == 1
    assert ("loray_request_success_total", "abort", "base") not in found


def test_what_another_replica_has_begun_has_no_first_token_here() -> None:
    metrics = ReplicaMetrics()
    times = metrics.arrived(replace(request("a", [1, 2, 3]), output_ids=(7, 7)))
    metrics.stepped([(times, TokenOutput("a", 7))])
    metrics.stepped([(times, TokenOutput("a", 7, finish_reason="length"))])
    metrics.ended(times, "length")
    found = values(metrics.request_families())
    assert ("loray_time_to_first_token_seconds_count", "base") not in found
    assert found["loray_inter_token_latency_seconds_count", "base"] == 1
    assert found["loray_request_generation_tokens_sum", "base"] == 4


@pytest.mark.parametrize(("error", "kind"), [(EngineError("x"), "EngineError"), (KeyError("x"), "internal")])
def test_errors_have_the_name_of_their_class(error: Exception, kind: str) -> None:
    metrics = ReplicaMetrics()
    metrics.ended(metrics.arrived(request("r", [1])), error)
    found = values(metrics.request_families())
    assert found["loray_request_errors_total", kind, "base"] == 1
    assert not [key for key in found if key[0] == "loray_request_success_total"]
