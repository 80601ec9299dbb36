"""Which decode steps are recorded before the first request, within which limits, and what serves the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray_kernels import Decoding, KvLayout, Parts, Ranks, Recorded, RecordedStep, RecordLimits
from loray_kernels.cuda import graphs
from loray_kernels.cuda.graphs import DecodeGraphs, Form, Recording
from tests.engine.harness import Spy, make_engine, request, run
from tests.kernels.cuda.shim_ops import ShimOps, use_shim_ops


class Counting:
    """A Recorder that records nothing; every recording takes as many bytes as it has rows."""

    def __init__(self, memory: int = 1 << 40) -> None:
        self.used, self._memory = 0, memory

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        out = run()
        if self.used + len(out) > self._memory:
            raise torch.OutOfMemoryError
        self.used += len(out)
        return Recording(lambda: None, out)

    def num_bytes(self) -> int:
        return self.used


def decode_graphs(recorder: Counting, agree: Callable[[bool], bool] = bool) -> DecodeGraphs:
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=16)

    def forward(step: RecordedStep) -> Tensor:
        return step.token_ids_S[:, None].expand(-1, 5).float()

    decoding = Decoding(layout, 9, 40, (), torch.device("cpu"), Ranks(agree=agree))
    return DecodeGraphs(forward, decoding, recorder)


def record(steps: DecodeGraphs, seconds: float = 1e9, num_bytes: int = 1 << 40) -> tuple[Recorded, list[Recorded]]:
    progress: list[Recorded] = []
    return steps.record(RecordLimits(seconds, num_bytes), progress.append), progress


def test_all_sizes_kinds_and_contexts_that_requests_can_have_are_recorded_large_ones_first() -> None:
    steps = decode_graphs(Counting())  # nine requests of up to 640 tokens, which are three splits
    done, progress = record(steps)
    forms = list(steps._recorded)
    assert forms == list(steps.forms())
    assert {f.size for f in forms} == {1, 2, 4, 8, 16}
    assert {f.splits for f in forms} == {1, 4}
    assert {f.kind for f in forms} == set(graphs.KINDS)
    assert [f.size for f in forms] == sorted((f.size for f in forms), reverse=True)
    assert [p.num_recorded for p in progress] == list(range(1, len(forms) + 1))
    assert done == progress[-1]
    assert (done.num_recorded, done.num_wanted, done.num_bytes) == (60, 60, 12 * (1 + 2 + 4 + 8 + 16))


def test_results_of_all_recordings_are_in_one_tensor() -> None:
    steps = decode_graphs(Counting())
    record(steps)
    assert len({r.out.untyped_storage().data_ptr() for r in steps._recorded.values()}) == 1


def test_recording_ends_at_its_limits() -> None:
    steps = decode_graphs(Counting())
    assert record(steps, num_bytes=12 * 16 + 3 * 8)[0].num_recorded == 12 + 3
    assert record(decode_graphs(Counting()), seconds=0.0)[0].num_recorded == 0
    steps = decode_graphs(Counting(memory=50))
    done, progress = record(steps)
    assert (done.num_recorded, done.num_bytes) == (3, 48)
    assert progress[-1] == done


def test_recording_ends_where_another_rank_ends_it() -> None:
    """After its first form it has no room for the second: this rank drops its own, too."""
    answers = iter([True, True, True, False])

    def agree(holds: bool) -> bool:
        assert holds
        return next(answers)

    steps = decode_graphs(Counting(), agree)
    assert record(steps)[0].num_recorded == 1
    assert list(steps._recorded) == list(steps.forms())[:1]
    assert next(answers, None) is None


def test_recording_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(graphs.time, "monotonic", lambda: next(now))
    assert record(decode_graphs(Counting()), seconds=5.0)[0].num_recorded == 5


def test_a_step_is_served_by_the_next_larger_recording_of_its_kind() -> None:
    steps = decode_graphs(Counting())
    record(steps, num_bytes=12 * 16 + 3 * 8)  # all of 16 rows; of 8 rows the base's, and LoRA with four splits
    assert steps._serving_of(Form(1, Parts.NONE, 1)) == Form(8, Parts.NONE, 1)
    assert steps._serving_of(Form(1, Parts.LORA, 1)) == Form(8, Parts.LORA, 4)
    assert steps._serving_of(Form(1, Parts.VERA, 1)) == Form(16, Parts.VERA, 1)
    assert steps._serving_of(Form(16, Parts.NONE, 4)) == Form(16, Parts.NONE, 4)
    nothing = decode_graphs(Counting())
    record(nothing, seconds=0.0)
    assert nothing._serving_of(Form(1, Parts.NONE, 1)) is None


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM")


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    monkeypatch.setattr(graphs, "SIZES", (1, 2, 4))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    monkeypatch.setattr(graphs, "SPLITS", (4,))
    return use_shim_ops(monkeypatch)


def test_an_engine_records_before_its_first_request_and_never_later(
    base: BaseModel, ops: ShimOps, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all is recorded, where only the largest size is, and where nothing is."""
    requests = [request(str(i), range(3, 9 + i), max_tokens=3 + i) for i in range(3)]
    limits: list[tuple[dict[str, Any], int, list[int]]] = [
        ({}, 3, [4, 4, 2, 1]),
        ({"graph_bytes": 1}, 1, [4, 4, 4, 4]),
        ({"graph_record_s": 0.0}, 0, []),
    ]
    results = []
    for own, num_recorded, replayed in limits:
        ops.may_record, ops.replayed = True, []
        caplog.clear()
        with caplog.at_level("INFO"):
            engine = make_engine(base, **({"max_num_seqs": 4, "graph_record_s": 1e9} | own))
        assert f"recorded decode steps: {num_recorded} of 3" in caplog.text
        assert ("are not recorded" in caplog.text) == (num_recorded < 3)
        assert not engine.scheduler.step_time.is_known
        assert engine.stats().num_steps == 0
        ops.may_record = False
        spy = Spy(engine)
        tokens = run(engine, requests)
        assert ops.replayed == replayed
        results.append((tokens, {name: torch.stack(rows) for name, rows in spy.logits.items()}))
    for tokens, logits in results[1:]:
        assert tokens == results[0][0]
        for name, want in results[0][1].items():
            torch.testing.assert_close(logits[name], want, atol=1e-5, rtol=1e-5)
