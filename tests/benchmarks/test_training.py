"""The benchmark of training: all systems compute the same, and rows report what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training import __main__ as train
from benchmarks.training import many, many_memory
from benchmarks.training.cases import PRESETS, Activations, Attention, Memory, Step, Target
from benchmarks.training.steps import RowStep
from benchmarks.training.workers.attention import VARIANTS
from benchmarks.training.workers.many import main as time_many
from benchmarks.training.workers.trainer import main as time_beside_trainer
from benchmarks.training.workers.vera import main as time_vera
from loray.bases.registry import BaseModel
from loray.train.data.batches import TrainBatch
from loray.train.hooks import DENSE
from loray.train.model import build_model
from loray.train.objectives import batch_loss


def qkv(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, num_tokens, 16, generator=generator, dtype=dtype) for heads in (8, 4, 4)]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_dense_variant_is_dense_causal_attention(name: str) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(24))
    torch.testing.assert_close(VARIANTS[name](q, k, v), exact(q, k, v))


def test_the_dense_side_of_a_step_is_the_model_with_dense_attention(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    recipe = RowStep(64, "longlora", checkpointing=True).recipe.model_copy(update={"dtype": "float32"})
    model = build_model(base, recipe)
    ids_BT = torch.arange(64)[None]
    batch = TrainBatch(ids_BT, ids_BT, None, None, num_tokens=64, num_targets=64)
    s2 = batch_loss(model, batch)
    model.set_attn_implementation("sdpa")
    expected = batch_loss(model, batch)
    model.set_attn_implementation(DENSE)
    torch.testing.assert_close(batch_loss(model, batch), expected)
    assert not torch.allclose(s2, expected)


def test_the_sides_of_a_vera_step_train_the_same(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(std=0.1)
    found = time_vera(base.path.parent.parent, base.name, 64, 16, 3)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(found["losses"], 3)
    ours, peft, bf16 = found["losses"].values()
    assert ours == pytest.approx(peft, abs=0.02)
    assert ours == pytest.approx(bf16, abs=0.02)
    assert len(set(ours)) == 4


@pytest.mark.parametrize("adapters", ["lora:2,4,4", "vera:16x2", "lora:2x2+vera:16"])
def test_the_ways_of_many_adapters_train_the_same(tiny_base: Callable[..., BaseModel], adapters: str) -> None:
    base = tiny_base(std=0.1)
    home = base.path.parent.parent
    found = [time_many(home, base.name, way, "float32", adapters, 1, 2, 24, 3) for way in many.WAYS]
    ours, *others = ([*losses.values()] for way in found for losses in [way["losses"][-1]])
    assert all(ours == pytest.approx(losses, abs=1e-4) for losses in others)
    assert ours != pytest.approx([*found[0]["losses"][0].values()], abs=1e-4)
    assert all(len(way["seconds"]) == 3 for way in found)


def test_one_of_some_adapters_trains_as_beside_all(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(std=0.1)
    home = base.path.parent.parent
    all_of, some = (
        time_many(home, base.name, "bank", "float32", "lora:2,4x2+vera:8x3", every, 1, 8, 1) for every in (1, 3)
    )
    for every, few in zip(all_of["losses"], some["losses"], strict=True):
        assert {name: every[name] for name in few} == pytest.approx(few, abs=1e-5)
        assert list(few) == ["0", "3", "6"]


def test_the_memory_of_many_adapters_is_that_of_a_whole_run(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base()
    found = many_memory.measure(str(base.path.parent.parent), base.name, 3, 8, 3, 1)
    assert found["num_succeeded"] == len(found["seconds"]) == 3
    assert 0 < found["before_bytes"] <= found["rounds_bytes"] <= found["peak_bytes"]
    assert found["items"]["adapters: weights, masters, gradients, moments"] > 0


@pytest.mark.slow
def test_the_table_of_many_adapters(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(std=0.1)
    cases = (many.Case("2 LoRA", "lora:4x2", 1, 16, (1e9, 0.0)),)
    monkeypatch.setattr(many, "CASES", cases)
    report = many.main(["--base", str(base.path), "--home", str(tmp_path), "--rounds", "1"])
    ((name, _, _, _, target, _, _, peft, _, apart, _),) = report.rows
    assert (name, target, peft) == ("2 LoRA", "≥ 1e+09 MISSED", "≥ 0")
    assert isinstance(apart, float)
    assert apart < 0.02
    assert set(report.more["2 LoRA"]) == set(many.WAYS)


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about their own ways
def test_the_sides_of_a_step_beside_trainer_train_the_same(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(std=0.1)
    found = time_beside_trainer(base.path.parent.parent, base.name, "lora", 2, 32, 3)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(found["losses"], 3)
    assert found["losses"]["ours"] == pytest.approx(found["losses"]["trainer"], abs=0.03)
    assert len(set(found["losses"]["ours"])) == 4


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
    )
    monkeypatch.setattr(train, "PRESETS", PRESETS | {"default": every})
    base = tiny_base()
    out = tmp_path / "rows.json"
    arguments = ["--base", str(base.path), "--home", str(tmp_path / "home"), "--repeats", "1", "--json", str(out)]
    rows = train.main(arguments)
    text = capsys.readouterr().out
    assert [row["case"] for row in rows] == [case.name for case in every]
    assert "MISSED" in text.split("attention 0k")[1].splitlines()[0]
    assert rows[-1]["halo_bytes"] > 0
    assert rows[1]["dense"]["step_s"] > 0
    assert json.loads(out.read_text())["rows"] == rows
