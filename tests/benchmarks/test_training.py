"""The benchmark of training: all systems compute the same, and rows report what was measured."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import watch
from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.training import __main__ as train
from benchmarks.training import cases, dense
from benchmarks.training.cases import PRESETS, Activations, Attention, Memory, Step, Traffic
from benchmarks.training.rows import Setting, Target
from benchmarks.training.steps import Case, Measured
from benchmarks.training.workers.attention import main as time_attention
from benchmarks.training.workers.traffic import main as count_traffic
from benchmarks.training.workers.trainer import main as time_beside_trainer
from benchmarks.training.workers.vera import main as time_vera
from loray.bases.registry import BaseModel
from loray.train.data.batches import TrainBatch
from loray.train.hooks import DENSE
from loray.train.model import build_model
from loray.train.objectives import batch_loss
from tests.fixtures.ranks import Ranks


def qkv(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, num_tokens, 16, generator=generator, dtype=dtype) for heads in (8, 4, 4)]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("name", dense.VARIANTS)
def test_every_dense_variant_is_dense_causal_attention(name: str) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(24))
    torch.testing.assert_close(dense.VARIANTS[name](q, k, v), exact(q, k, v))


def test_the_dense_side_of_a_step_is_the_model_with_dense_attention(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    recipe = Case(64, "longlora", checkpointing=True).recipe.model_copy(update={"dtype": "float32"})
    model = build_model(base, recipe)
    ids_BT = torch.arange(64)[None]
    batch = TrainBatch(ids_BT, ids_BT, None, None, num_tokens=64, num_targets=64)
    s2 = batch_loss(model, batch).total
    model.set_attn_implementation("sdpa")
    expected = batch_loss(model, batch).total
    model.set_attn_implementation(DENSE)
    torch.testing.assert_close(batch_loss(model, batch).total, expected)
    assert not torch.allclose(s2, expected)


def test_the_fastest_dense_variant_takes_turns_with_s2_attention() -> None:
    found: dict[str, Any] = time_attention(256, 64, 9, 3, 16, 2)
    assert len(found["s2"]) == 4
    times = {name: [sum(pair) for pair in pairs] for name, pairs in found["dense"].items()}
    assert {name: len(pairs) for name, pairs in times.items()} == {
        name: 3 if name == found["fastest"] else 1 for name in dense.VARIANTS
    }
    assert min(times, key=lambda name: times[name][0]) == found["fastest"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group_size", [16, 32, 48])
def test_counted_traffic_is_what_the_formulas_say(ranks: Ranks, size: int, group_size: int) -> None:
    found = ranks(size, count_traffic, 128, group_size)
    assert {name: max(rank[name] for rank in found) for name in found[0]} == Traffic(128, size, group_size).expected()


def test_limits_of_attention_are_those_of_the_arithmetic(monkeypatch: pytest.MonkeyPatch, smollm2: BaseModel) -> None:
    times = {"s2": [[1.0, 2.0], [1.5, 2.5], [0.5, 1.5]], "fastest": "folded"}
    times |= {"dense": {"folded": [[4.0, 9.0], [3.0, 8.0], [5.0, 7.0]], "repeated": [[5.0, 9.0]]}}
    monkeypatch.setattr(cases.workers, "run", lambda commands, threads: [times])
    row = Attention(16384, Target("≥", 4.0)).run(Setting(smollm2, 2))
    assert row.reached == pytest.approx(12 / 3)
    assert row.figures["limit"] == pytest.approx(144 / 33.5, rel=1e-3)
    assert row.figures["group_size"] == 4096
    assert "folded; repeated 14.00" in row.note


def test_steps_compare_equal_recipes(monkeypatch: pytest.MonkeyPatch, smollm2: BaseModel) -> None:
    measured = []

    def measure(case: Case, base: BaseModel, num_steps: int, *, num_threads: int | None) -> Measured:
        measured.append(case)
        return Measured(6 << 30, 5 << 30, 0, step_s=330.0 if case.dense else 120.0)

    monkeypatch.setattr(cases.steps, "measure", measure)
    row = Step(16384).run(Setting(smollm2, 2))
    assert {case.dense for case in measured} == {True, False}
    assert measured[0].recipe == measured[1].recipe
    assert measured[0].recipe.gradient_checkpointing
    assert row.reached == pytest.approx(330 / 120)
    assert 2 < row.figures["by_flops"] < 3
    assert Memory(32768).run(Setting(smollm2, 2)).reached == pytest.approx(6)


def test_activations_are_beside_those_of_one_rank(monkeypatch: pytest.MonkeyPatch, smollm2: BaseModel) -> None:
    monkeypatch.setattr(
        cases.steps, "measure", lambda case, *_, **__: Measured(0, 1200 // case.sequence + 50, 0, step_s=1.0)
    )
    setting = Setting(smollm2, 2)
    shares = [Activations(8192, size).run(setting).reached for size in (1, 2, 4)]
    assert shares == pytest.approx([1, 650 / 1250, 350 / 1250])


def test_presets_have_the_targets() -> None:
    targets = {case.name: str(case.target) for preset in PRESETS.values() for case in preset if case.target}
    assert (
        targets
        | {
            "attention 8k": "≥ 3.2",
            "attention 16k": "≥ 4",
            "step 16k": "≥ 2.5",
            "memory 32k": "≤ 6",
            "memory 100k": "≤ 14",
            "VeRA r256, 512": "≥ 1.3",
            "sequence 8k P=2": "≤ 0.6",
            "sequence 8k P=4": "≤ 0.35",
        }
        == targets
    )


def test_the_sides_of_a_vera_step_train_the_same(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(std=0.1)
    found = time_vera(base.path.parent.parent, base.name, 64, 16, 3)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(found["losses"], 3)
    ours, peft, bf16 = found["losses"].values()
    assert ours == pytest.approx(peft, abs=0.02)
    assert ours == pytest.approx(bf16, abs=0.02)
    assert len(set(ours)) == 4


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about their own ways
def test_the_sides_of_a_step_beside_trainer_train_the_same(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(std=0.1)
    found = time_beside_trainer(base.path.parent.parent, base.name, "lora", 2, 32, 3)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(found["losses"], 3)
    assert found["losses"]["ours"] == pytest.approx(found["losses"]["trainer"], abs=0.03)
    assert len(set(found["losses"]["ours"])) == 4


def test_memory_of_a_process() -> None:
    reset_peak()
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as block:  # by mmap, since the allocator may hold resident pages
        for _ in range(64):
            block.write(b"1" * (1 << 20))
    assert peak_bytes() - before > 60 << 20
    reset_peak()
    assert peak_bytes() - before < 60 << 20


def test_the_load_of_other_processes_is_measured() -> None:
    with watch() as disturbance:
        sum(range(1_000_000))
    assert disturbance.load >= 0
    assert disturbance.cores >= 0


@pytest.mark.slow
def test_the_command_end_to_end(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every kind of case once, in processes of its own."""
    every = (
        Attention(512, Target("≥", 1e9)),
        Step(256),
        Memory(256),
        *(Activations(256, n) for n in (1, 2)),
        Traffic(256, 2, 64),
    )
    monkeypatch.setattr(train, "PRESETS", PRESETS | {"default": every})
    base = tiny_base()
    out = tmp_path / "rows.json"
    arguments = ["--base", str(base.path), "--home", str(tmp_path / "home"), "--repeats", "1", "--json", str(out)]
    rows = train.main(arguments)
    text = capsys.readouterr().out
    assert [row["case"] for row in rows] == [case.name for case in every]
    assert "MISSED" in text.split("attention 0k")[1].splitlines()[0]
    assert rows[-1]["is_met"]
    assert rows[-2]["halo_bytes"] > 0
    assert rows[1]["dense"]["step_s"] > 0
    assert json.loads(out.read_text())["rows"] == rows
