"""The loop on a tiny model: it learns, resumes bit for bit, skips what is not finite, keeps the best."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jobs.driver.prepare import check_initial
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import SpecError, TrainingError
from loray.methods.attach import InitialAdapter
from loray.recipes.defaults import defaults_of
from loray.spec import Method
from loray.train import checkpoint, loop
from loray.train import objectives as loss_module
from loray.train.checkpoint import ADAPTER, FolderReporter, Metrics, save_adapter
from loray.train.data.rows import RowSource, load_data
from loray.train.loop import train
from loray.train.objectives import batch_loss
from loray.train.progress import HeldOut, TimeLeft
from tests.fixtures.adapters import ADAPTERS, in_peft, trained
from tests.fixtures.adapters import recipe as adapter_recipe
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import METHODS, assert_equal, curve, make_data, masters, recipe, run


def loss_of(model: Any, rows: RowSource) -> float:
    """By whole logits of each row."""
    total, num_targets = 0.0, 0
    for i in range(len(rows.lengths)):
        ids = torch.tensor(rows.row(i)[0].astype("int64"))[None]
        num_targets += ids.shape[1] - 1
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return total / num_targets


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_and_leaves_an_adapter(method: str, base: BaseModel, tmp_path: Path) -> None:
    """With other bases' draws the loss falls to 0.81 to 0.90 of the untrained one's, LongLoRA's below 0.6."""
    optimizer = {"learning_rate": 1e-1 if method in ("vera", "ia3") else 2e-2, "warmup_steps": 2}
    spec = recipe(method, max_steps=60, optimizer=optimizer)
    state, reporter = run(spec, base, tmp_path)
    start = reporter.events[0]
    assert (state.step, start["event"], start["num_steps"]) == (60, "start", 60)
    assert 0 < start["trainable_share"] == start["num_trainable"] / start["num_parameters"] < 1
    untrained = state.baselines[-1]
    assert untrained.subject == ("base_scaled" if method == "longlora" else "base")
    assert state.eval_loss is not None
    assert state.eval_loss < 0.95 * untrained.value
    num_modules = len(read_adapter(reporter.best.path / ADAPTER, base.config).modules)
    assert num_modules == base.config.num_layers * len(spec.adapter.target_modules)
    assert checkpoint.read_state(reporter.best.path).evaluations()[-1].value == state.eval_loss


@pytest.mark.parametrize(
    ("method", "dtype", "order"),
    [
        ("lora", "bfloat16", "packed"),
        ("dora", "bfloat16", "shuffled"),
        ("vera", "float32", "length_grouped"),
        ("longlora", "bfloat16", "shuffled"),
        ("ia3", "bfloat16", "packed"),
        ("road", "float32", "shuffled"),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    method: str, dtype: str, order: str, base: BaseModel, tmp_path: Path
) -> None:
    batch = {"rows": 2, "accumulation": 2, "order": order}
    spec = recipe(method, dtype=dtype, batch=batch, checkpoint={"interval_steps": 3})
    _, unbroken = run(spec, base, tmp_path)
    assert [c.step for c in unbroken.checkpoints] == [3, 6, 8]
    _, resumed = run(spec, base, tmp_path, resume_from=unbroken.checkpoints[0].path, name="resumed")
    assert resumed.events[0]["step"] == 3
    assert curve(resumed) == curve(unbroken)[3:]
    assert resumed.checkpoints[-1].eval_loss == unbroken.checkpoints[-1].eval_loss
    assert_equal(masters(resumed), masters(unbroken))
    state, again = run(spec, base, tmp_path, resume_from=resumed.checkpoints[-1].path, name="again")
    assert (state.step, [e["event"] for e in again.events]) == (8, ["start"])  # nothing is left to do


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("Gemma2ForCausalLM", "lora"),
        ("Gemma3ForCausalLM", "longlora"),
        ("MistralForCausalLM", "vera"),
        ("Phi3ForCausalLM", "dora"),
        ("Phi3ForCausalLM", "vera"),
    ],
)
def test_a_familys_run_learns_and_another_goes_on_from_it(
    tiny_base: Callable[..., BaseModel], architecture: str, method: str, tmp_path: Path
) -> None:
    """With windows shorter than rows, and S2-Attn beside them; from soft-capped logits; on modules that are one."""
    base = tiny_base(architecture, **({"sliding_window": 24} if architecture == "MistralForCausalLM" else {}))
    optimizer = {"learning_rate": 1e-1 if method == "vera" else 2e-2, "warmup_steps": 2}
    spec = recipe(method, max_steps=24, optimizer=optimizer)
    state, reporter = run(spec, base, tmp_path)
    assert state.eval_loss is not None
    assert state.eval_loss < 0.97 * state.baselines[-1].value
    folder = reporter.best.path / ADAPTER
    check_initial(spec.adapter, read_adapter(folder, base.config), base.config, "first@1")
    spec = spec.model_copy(update={"init_adapter": "first@1", "max_steps": 1})
    again, _ = run(spec, base, tmp_path, initial=InitialAdapter("0" * 64, folder), name="again")
    (parent,) = again.baselines
    assert parent.value == pytest.approx(reporter.best.eval_loss, rel=1e-4)


@pytest.mark.parametrize(("min_delta", "last"), [(100.0, 3), (0.0, 8)])
def test_a_run_ends_early_where_the_held_out_loss_stops_falling(
    min_delta: float, last: int, base: BaseModel, tmp_path: Path
) -> None:
    """No loss falls by 100, and at this rate every one falls by more than nothing. A resumed run knows that it had
    ended.
    """
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


def test_accumulation_does_not_change_the_gradient(base: BaseModel, tmp_path: Path) -> None:
    """Micro-batches of unequal numbers of targets: only a division by the step's own count gives this."""
    plain: dict[str, Any] = {"adapter": {"method": "lora", "rank": 4}, "max_steps": 3}
    _, whole = run(recipe(**plain, batch={"rows": 8}), base, tmp_path, name="a")
    _, parts = run(recipe(**plain, batch={"rows": 2, "accumulation": 4}), base, tmp_path, name="b")
    for a, b in zip(curve(whole), curve(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_held_out_loss_is_what_transformers_computes(base: BaseModel, tmp_path: Path) -> None:
    spec = recipe("longlora", max_steps=1)
    state, _ = run(spec, base, tmp_path)
    assert [b.subject for b in state.baselines] == ["base", "base_scaled"]
    linear = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
    for baseline, rope in zip(state.baselines, ({}, linear), strict=True):
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, **rope)
        assert baseline.value == pytest.approx(loss_of(model, make_data(tmp_path, spec).evaluation), rel=1e-5)
    assert state.baselines[0].value != state.baselines[1].value


def test_the_best_checkpoint_is_kept(base: BaseModel, tmp_path: Path) -> None:
    spec = recipe(
        max_steps=12,
        optimizer={"learning_rate": 0.3, "schedule": "constant", "max_grad_norm": None},
        evaluation={"interval_steps": 2},
    )
    state, reporter = run(spec, base, tmp_path, reporter=FolderReporter(tmp_path / "kept", keep=1))
    losses = {e["step"]: e["eval_loss"] for e in reporter.events if e["event"] == "eval" and e["step"]}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    assert reporter.best.eval_loss == min(losses.values()) == state.best_eval_loss
    assert {c.step for c in reporter.checkpoints} == {reporter.best.step, 12}
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == sorted(c.path.name for c in reporter.checkpoints)


def test_epochs_give_the_number_of_steps(base: BaseModel, tmp_path: Path) -> None:
    state, _ = run(recipe(max_steps=None, num_epochs=1), base, tmp_path)
    assert (state.step, state.epoch, state.index) == (8, 0, 16)  # 32 rows in micro-batches of 2, two a step


def test_speed_is_wall_time_from_step_to_step(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))  # seconds: read at the start, after each step and while held-out rows are measured
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    _, reporter = run(recipe(max_steps=3), base, tmp_path)
    steps = [e for e in reporter.events if e["event"] == "step"]
    tokens = [steps[0]["num_tokens"], *(b["num_tokens"] - a["num_tokens"] for a, b in pairwise(steps))]
    assert [e["tokens_per_s"] for e in steps] == [n / 10 for n in tokens]
    evaluation = 70  # of the base, in three batches; that of the adapter after the last step will take as long
    assert [e["eta_s"] for e in steps] == [20 + evaluation, 10 + evaluation, evaluation]


def test_a_deterministic_run_has_torchs_deterministic_algorithms_and_leaves_them_as_they_were(
    base: BaseModel, tmp_path: Path
) -> None:
    seen = set[bool]()

    class Looks(FolderReporter):
        def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
            seen.add(torch.are_deterministic_algorithms_enabled())
            super().report(metrics, checkpoint)

    curves = []
    for wanted in (True, False):
        spec, looks = recipe("longlora", max_steps=2, deterministic=wanted), Looks(tmp_path / f"run-{wanted}")
        curves.append(curve(run(spec, base, tmp_path, reporter=looks)[1]))
        assert seen == {wanted}
        assert not torch.are_deterministic_algorithms_enabled()
        seen.clear()
    assert curves[0] == curves[1]  # on a CPU, where all algorithms are


# -- steps and parameters that are not finite: skipped, counted, and never published


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: Callable[[int], bool]) -> None:
    """Losses of those training micro-batches become nan."""
    calls = iter(range(1 << 20))

    def poisoned(model: Any, batch: Any) -> Tensor:
        loss = batch_loss(model, batch)
        return loss * math.nan if model.training and bad_calls(next(calls)) else loss

    monkeypatch.setattr(loss_module, "batch_loss", poisoned)


def test_bad_steps_are_skipped_and_counted(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call in (3, 8))  # steps 2 and 5, two micro-batches each
    state, reporter = run(recipe(), base, tmp_path)
    assert state.skipped_steps == 2
    assert [e["skipped_steps"] for e in reporter.events if e["event"] == "step"] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(bool(tensor.isfinite().all()) for tensor in masters(reporter).values())
    assert state.eval_loss is not None


def test_the_limit_stops_the_run_with_the_last_good_state_kept(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe(max_nonfinite_steps=2)
    poison(monkeypatch, lambda call: call >= 6)  # from step 4 on
    reporter = FolderReporter(tmp_path / "stopped", keep=9)
    with pytest.raises(TrainingError, match="stopped at step 5: 2 steps had a loss or gradient that is not finite"):
        run(spec, base, tmp_path, reporter=reporter)
    assert [c.step for c in reporter.checkpoints] == [5]
    assert len(masters(reporter)) == 28
    read_adapter(reporter.best.path / ADAPTER, base.config)
    assert all(bool(tensor.isfinite().all()) for tensor in masters(reporter).values())
    monkeypatch.setattr(loss_module, "batch_loss", batch_loss)
    state, _ = run(spec, base, tmp_path, resume_from=reporter.best.path, name="resumed")
    assert (state.step, state.skipped_steps) == (8, 2)


EXPLODING = {"optimizer": {"learning_rate": 1e36, "schedule": "constant"}, "max_nonfinite_steps": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_nonfinite_steps": 3}, "stopped at step 3"),
        ({"max_steps": 3}, "every step had a loss or gradient that is not finite"),
        (EXPLODING, r"stopped at step \d: 2 steps had"),  # an update breaks the parameters
        (EXPLODING | {"data": {"train": "x", "eval_fraction": 0.0, "max_length": 64}}, r"stopped at step \d: 2 steps"),
    ],
)
def test_a_run_that_never_took_a_good_step_leaves_nothing(
    fields: dict[str, Any], message: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "optimizer" not in fields:
        poison(monkeypatch, lambda call: True)
    reporter = FolderReporter(tmp_path / "run")
    with pytest.raises(TrainingError, match=message):
        run(recipe(**fields), base, tmp_path, reporter=reporter)
    assert reporter.checkpoints == []


def test_a_run_that_ends_broken_has_no_result_unless_the_best_is_kept(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, math.nan] * 2)  # the baseline, step 2, step 4
    monkeypatch.setattr(loop, "held_out_loss", lambda *_, **__: HeldOut(next(losses), {}))
    every_2 = {"interval_steps": 2}
    state, reporter = run(recipe(max_steps=4, evaluation=every_2), base, tmp_path)
    assert (state.step, state.eval_loss) == (4, None)
    assert [(c.step, c.eval_loss) for c in reporter.checkpoints] == [(2, 4.0)]
    with pytest.raises(TrainingError, match="held-out loss after the last step is not finite"):
        run(recipe(max_steps=4, evaluation=every_2 | {"keep_best": False}), base, tmp_path, name="latest")


def test_a_base_that_is_broken_itself_is_not_trained(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "held_out_loss", lambda *_, **__: HeldOut(math.inf, {}))
    with pytest.raises(TrainingError, match="held-out loss of base is inf before any training"):
        run(recipe(), base, tmp_path)


# -- a run that starts from another one's adapter: at its loss, under its RoPE, resumed without it


@pytest.mark.parametrize("method", list(METHODS))
def test_it_starts_where_the_other_ended(method: str, base: BaseModel, tmp_path: Path) -> None:
    _, first = run(recipe(method, max_steps=4), base, tmp_path, name="first")
    folder = first.checkpoints[-1].path / ADAPTER
    spec = recipe(method, max_steps=4, seed=3, init_adapter="first@1", checkpoint={"interval_steps": 2})
    initial, rows = InitialAdapter("0" * 64, folder), make_data(tmp_path, spec).evaluation
    state, second = run(spec, base, tmp_path, name="second", initial=initial)
    (parent,) = state.baselines
    assert (parent.subject, state.parent) == ("parent", "0" * 64)
    like = type("Like", (), {"config": trained(base, spec).config})
    assert parent.value == pytest.approx(loss_of(in_peft(base, like, folder), rows), rel=1e-5)
    resume_from = second.checkpoints[0].path
    _, again = run(spec, base, tmp_path, name="again", initial=initial, resume_from=resume_from)
    assert curve(again) == curve(second)[2:]
    assert_equal(masters(again), masters(second))
    with pytest.raises(SpecError, match="init_adapter is first@1: the files of an adapter go with it"):
        run(spec, base, tmp_path)


@pytest.mark.parametrize("method", ["lora", "longlora"])
def test_at_the_default_rate_stage_two_beats_stage_one_on_its_own_rows(
    method: Method, base: BaseModel, tmp_path: Path
) -> None:
    """Alphabets forward, then backward: the loss of the parent on backward ones is that of stage one."""
    rates = (defaults_of(method, is_continued=is_on)["optimizer.learning_rate"].value for is_on in (False, True))
    new, on = (
        recipe(method, max_steps=20, optimizer={"learning_rate": rate, "warmup_ratio": 0.05}, **fields)
        for rate, fields in zip(rates, ({}, {"init_adapter": "first@1"}), strict=True)
    )
    _, first = run(new, base, tmp_path, name="first")
    texts = ["".join(chr(122 - (i + t) % 26) for t in range(20 + i)) for i in range(40)]
    (tmp_path / "back.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = on.data.model_copy(update={"train": str(tmp_path / "back.jsonl")})
    data = load_data(source, byte_tokenizer(), max_length=64, max_eval_rows=8, seed=0)
    initial = InitialAdapter("0" * 64, first.checkpoints[-1].path / ADAPTER)
    state = train(on, base, data, reporter=FolderReporter(tmp_path / "second"), workdir=tmp_path, initial=initial)
    (parent,) = state.baselines
    assert state.eval_loss is not None
    assert state.eval_loss < 0.99 * parent.value


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rslora", {"use_rslora": False}, "its update is scaled by 1.5"),
        ("vera", {"projection_prng_key": 4}, r"random pair is another one \(projection_prng_key\)"),
        ("vera", {"rank": 8}, "its rank is 24"),
        ("vera", {"method": "lora"}, "its method is vera"),
        ("road", {"group_size": 16}, "its group_size is 32"),
        ("road of four", {"variant": "road_1"}, "its variant is road_4"),
    ],
)
def test_what_differs_is_named(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    base, spec = tiny_base(), adapter_recipe(ADAPTERS[name])
    save_adapter(trained(base, spec), spec.adapter, tmp_path)
    weights = read_adapter(tmp_path, base.config)
    check_initial(spec.adapter, weights, base.config, "first@1")
    changed = {k: v for k, v in ADAPTERS[name]["adapter"].items() if "prng" not in k or fields.keys() != {"method"}}
    other = adapter_recipe({"adapter": changed | fields})
    with pytest.raises(SpecError, match=f"init_adapter first@1 is another adapter .*{message}"):
        check_initial(other.adapter, weights, base.config, "first@1")


def test_the_time_left_counts_evaluations_and_what_is_measured_after_the_run() -> None:
    """Steps of 2 s, evaluations of 10 s for 100 tokens each 5 steps, and 300 tokens that are measured at the end."""
    left = TimeLeft(12, 5, 100, 300)
    left.evaluated(10.0)  # of the base, before the first step
    left.stepped(2.0, 64)
    assert left.after(1) == 11 * 2 + 3 * 10 + 30  # after steps 5, 10 and 12
    for _ in range(2, 6):
        left.stepped(2.0, 64)
    assert left.after(5) == 7 * 2 + 3 * 10 + 30
    left.evaluated(10.0)
    left.stepped(12.0, 64)  # with the evaluation before it
    assert left.after(6) == 6 * 2 + 2 * 10 + 30
    for _ in range(7, 13):
        left.stepped(2.0, 64)
    assert left.after(12) == 10 + 30
    blind = TimeLeft(4, None, 0, 96)
    blind.stepped(3.0, 32)
    assert blind.after(1) == 3 * 3 + 96 * (3 / 32) / 3


def test_a_long_evaluation_tells_how_far_it_is(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_TOLD_S", 0.0)
    _, reporter = run(recipe(max_steps=1), base, tmp_path)
    told = [e for e in reporter.events if e["event"] == "progress"]
    assert {e["stage"] for e in told} == {"evaluating held-out rows"}
    assert [e["done"] / e["total"] for e in told] == [1 / 3, 2 / 3, 1.0] * 2
