"""The loop on a tiny model: it learns, resumes bit for bit, skips what is not finite, keeps the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import IntegrityError, SpecError, TrainingError
from loray.spec import TrainSpec
from loray.train import checkpoint, loop
from loray.train.checkpoint import FolderReporter, RunState
from loray.train.data.rows import Dataset, load_data
from loray.train.loop import train
from tests.fixtures.tiny import byte_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "rank": 4, "dropout": 0.1}},
    "dora": {"adapter": {"method": "dora", "rank": 4}},
    "vera": {"adapter": {"method": "vera", "rank": 16, "dropout": 0.1}},
    "longlora": {
        "adapter": {"method": "longlora", "rank": 4},
        "rope_scaling": {"factor": 2, "original_context": 32},
        "attention": {"type": "s2", "group_size": 16},
    },
}
TINY: dict[str, Any] = {"std": 0.05}


def recipe(method: str = "lora", **fields: Any) -> TrainSpec:
    data: dict[str, Any] = {
        "name": "test",
        "base": "tiny",
        "data": {"train": "data.jsonl", "eval_fraction": 0.2, "max_length": 64},
        "batch": {"rows": 2, "accumulation": 2},
        "optimizer": {"learning_rate": 2e-2, "warmup_steps": 2},
        "max_steps": 8,
        "dtype": "float32",
    }
    return TrainSpec.parse(data | METHODS[method] | fields, source="test")


def make_data(folder: Path, spec: TrainSpec) -> Dataset:
    """Arithmetic progressions of letters, documents of 20 to 64 tokens."""
    path = folder / "data.jsonl"
    texts = ["".join(chr(97 + (i + t * (1 + i % 3)) % 26) for t in range(20 + (7 * i) % 44)) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = spec.data.model_copy(update={"train": str(path)})
    return load_data(source, byte_tokenizer(), max_length=64, max_eval_rows=6, seed=spec.seed)


def run(
    spec: TrainSpec, base: BaseModel, folder: Path, *, resume_from: Path | None = None, name: str = "run"
) -> tuple[RunState, FolderReporter]:
    reporter = FolderReporter(folder / name, keep=9)
    state = train(spec, base, make_data(folder, spec), reporter=reporter, workdir=folder, resume_from=resume_from)
    return state, reporter


def curve(reporter: FolderReporter) -> list[tuple[float, ...]]:
    return [(e["step"], e["loss"], e["lr"], e["grad_norm"]) for e in reporter.events if e["event"] == "step"]


def masters(reporter: FolderReporter) -> dict[str, torch.Tensor]:
    state = torch.load(reporter.checkpoints[-1].path / "optimizer.pt", weights_only=True)
    tensors: dict[str, torch.Tensor] = state["masters"]
    return tensors


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_and_leaves_an_adapter(
    method: str, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    """With other bases' draws the loss falls to 0.81 to 0.90 of the untrained one's, LongLoRA's below 0.6."""
    base = tiny_base(**TINY)
    optimizer = {"learning_rate": 1e-1 if method == "vera" else 2e-2, "warmup_steps": 2}
    state, reporter = run(recipe(method, max_steps=60, optimizer=optimizer), base, tmp_path)
    assert state.step == 60
    start = reporter.events[0]
    assert start["event"] == "start"
    assert start["num_steps"] == 60
    assert 0 < start["trainable_share"] == start["num_trainable"] / start["num_parameters"] < 1
    untrained = state.baselines[-1]
    assert untrained.subject == ("base_scaled" if method == "longlora" else "base")
    assert state.eval_loss is not None
    assert state.eval_loss < 0.95 * untrained.value
    weights = read_adapter(reporter.best.path / checkpoint.ADAPTER, base.config)
    assert len(weights.modules) == 8
    assert checkpoint.read_state(reporter.best.path).evaluations()[-1].value == state.eval_loss


@pytest.mark.parametrize(
    ("method", "dtype", "order"),
    [
        ("lora", "bfloat16", "packed"),
        ("dora", "bfloat16", "shuffled"),
        ("vera", "float32", "length_grouped"),
        ("longlora", "bfloat16", "shuffled"),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    method: str, dtype: str, order: str, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = tiny_base(**TINY)
    spec = recipe(
        method, dtype=dtype, batch={"rows": 2, "accumulation": 2, "order": order}, checkpoint={"interval_steps": 3}
    )
    _, unbroken = run(spec, base, tmp_path)
    assert [c.step for c in unbroken.checkpoints] == [3, 6, 8]
    _, resumed = run(spec, base, tmp_path, resume_from=unbroken.checkpoints[0].path, name="resumed")
    assert resumed.events[0]["step"] == 3
    assert curve(resumed) == curve(unbroken)[3:]
    assert resumed.checkpoints[-1].eval_loss == unbroken.checkpoints[-1].eval_loss
    theirs = masters(unbroken)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in masters(resumed).items())


def test_a_finished_run_has_nothing_left_to_do(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base(**TINY)
    _, first = run(recipe(max_steps=2), base, tmp_path)
    state, again = run(recipe(max_steps=2), base, tmp_path, resume_from=first.checkpoints[-1].path, name="again")
    assert state.step == 2
    assert [e["event"] for e in again.events] == ["start"]


@pytest.mark.parametrize(("min_delta", "last"), [(100.0, 3), (0.0, 8)])
def test_a_run_ends_early_where_the_held_out_loss_stops_falling(
    min_delta: float, last: int, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    """No loss falls by 100, and at this rate every one falls by more than nothing. A resumed run knows that it had
    ended.
    """
    base = tiny_base(**TINY)
    spec = recipe(
        optimizer={"learning_rate": 2e-3, "warmup_steps": 2},
        evaluation={"interval_steps": 1},
        checkpoint={"interval_steps": 8},
        early_stopping={"patience": 2, "min_delta": min_delta},
    )
    state, reporter = run(spec, base, tmp_path)
    assert (state.step, reporter.checkpoints[-1].step) == (last, last)
    ends = [e for e in reporter.events if e["event"] == "early_stop"]
    assert [(e["step"], e["num_steps"], e["num_stale"]) for e in ends] == ([(3, 8, 2)] if last == 3 else [])
    if ends:
        assert ends[0]["best_eval_loss"] == state.best_eval_loss
        _, again = run(spec, base, tmp_path, resume_from=reporter.checkpoints[-1].path, name="again")
        assert [e["event"] for e in again.events] == ["start"]
        patient = spec.model_copy(update={"early_stopping": None})
        longer, _ = run(patient, base, tmp_path, resume_from=reporter.checkpoints[-1].path, name="longer")
        assert longer.step == 8


def test_accumulation_does_not_change_the_gradient(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    """Micro-batches of unequal numbers of targets: only a division by the step's own count gives this."""
    base = tiny_base(**TINY)
    plain = {"method": "lora", "rank": 4}
    _, whole = run(recipe(adapter=plain, batch={"rows": 8}, max_steps=3), base, tmp_path, name="a")
    _, parts = run(recipe(adapter=plain, batch={"rows": 2, "accumulation": 4}, max_steps=3), base, tmp_path, name="b")
    for a, b in zip(curve(whole), curve(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_held_out_loss_is_what_transformers_computes(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base(**TINY)
    spec = recipe("longlora", max_steps=1)
    state, _ = run(spec, base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    scaled = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.float32, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    )
    rows = make_data(tmp_path, spec).evaluation
    for baseline, reference in zip(state.baselines, (model, scaled), strict=True):
        total, num_targets = 0.0, 0
        for i in range(len(rows)):
            ids = torch.tensor(rows.row(i)[0].astype("int64"))[None]
            num_targets += ids.shape[1] - 1
            with torch.no_grad():
                logits = reference(ids).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        assert baseline.value == pytest.approx(total / num_targets, rel=1e-5)
    assert [b.subject for b in state.baselines] == ["base", "base_scaled"]
    assert state.baselines[0].value != state.baselines[1].value


def test_the_best_checkpoint_is_kept(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    spec = recipe(
        max_steps=12,
        optimizer={"learning_rate": 0.3, "schedule": "constant", "max_grad_norm": None},
        evaluation={"interval_steps": 2},
    )
    reporter = FolderReporter(tmp_path / "kept", keep=1)
    base = tiny_base(**TINY)
    state = train(spec, base, make_data(tmp_path, spec), reporter=reporter, workdir=tmp_path)
    losses = {e["step"]: e["eval_loss"] for e in reporter.events if e["event"] == "eval" and e["step"]}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    assert reporter.best.eval_loss == min(losses.values()) == state.best_eval_loss
    assert {c.step for c in reporter.checkpoints} == {reporter.best.step, 12}
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == sorted(c.path.name for c in reporter.checkpoints)


def test_epochs_give_the_number_of_steps(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    state, _ = run(recipe(max_steps=None, num_epochs=1), tiny_base(**TINY), tmp_path)
    assert state.step == 8  # 32 rows in micro-batches of 2, two a step
    assert (state.epoch, state.index) == (0, 16)


# -- steps that are not finite ----------------------------------------------------------------------------------------


EXPLODING: dict[str, Any] = {"learning_rate": 1e36, "schedule": "constant"}


def test_what_may_be_published(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    state, _ = run(recipe(max_steps=1), tiny_base(**TINY), tmp_path)
    checkpoint.check_publishable(state)
    without_held_out = state.model_copy(update={"baselines": (), "eval_loss": None})
    checkpoint.check_publishable(without_held_out)
    with pytest.raises(TrainingError, match="no finite held-out loss; nothing was published"):
        checkpoint.check_publishable(state.model_copy(update={"eval_loss": None}))
    with pytest.raises(TrainingError, match="every step up to 1 was skipped"):
        checkpoint.check_publishable(state.model_copy(update={"skipped_steps": 1}))


def test_speed_is_wall_time_from_step_to_step(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))  # seconds: read at the start and after each step
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    _, reporter = run(recipe(max_steps=3), tiny_base(**TINY), tmp_path)
    steps = [e for e in reporter.events if e["event"] == "step"]
    tokens = [steps[0]["num_tokens"], *(b["num_tokens"] - a["num_tokens"] for a, b in pairwise(steps))]
    assert [e["tokens_per_s"] for e in steps] == [n / 10 for n in tokens]
    assert [e["eta_s"] for e in steps] == [20, 10, 0]


# -- resuming what does not fit ---------------------------------------------------------------------------------------


def test_another_recipe_is_not_resumed(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base(**TINY)
    _, first = run(recipe(max_steps=1), base, tmp_path)
    saved = first.checkpoints[0].path
    with pytest.raises(SpecError, match="cannot resume from step 1: adapter, seed changed"):
        run(recipe("vera", seed=1), base, tmp_path, resume_from=saved)
    with pytest.raises(SpecError, match=r"a step's micro-batches \(batch\.accumulation × num_workers ÷ parallel"):
        run(recipe(num_workers=2), base, tmp_path, resume_from=saved)
    checkpoint.check_resumable(
        checkpoint.read_state(saved),
        recipe(num_workers=2, batch={"rows": 2, "accumulation": 1}),
        base.fingerprint,
        make_data(tmp_path, recipe()).fingerprint,
    )
    moved = recipe(max_steps=2, data={"train": "/elsewhere.jsonl", "eval_fraction": 0.2, "max_length": 64})
    state, _ = run(moved, base, tmp_path, resume_from=saved, name="moved")
    assert state.step == 2


def test_a_damaged_checkpoint_is_named(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match="not a complete checkpoint"):
        run(recipe(), tiny_base(**TINY), tmp_path, resume_from=tmp_path / "empty")
