"""DPO on tiny models: TRL's loss and gradients, pairs that are told apart, runs that resume, adapters that load."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.spec import REWARDS
from loray.train import checkpoint
from loray.train.data.batches import BatchStream, collate_pairs
from loray.train.model import build_model
from loray.train.objectives import log_probs, objective_of
from tests.train.pairs import curve, make_pairs, paired, run
from tests.train.test_loop import TINY, masters


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_pairs_that_were_not_seen_are_told_apart_by_an_adapter_that_peft_loads(
    method: str, base: BaseModel, tmp_path: Path
) -> None:
    optimizer = {"learning_rate": 1e-1 if method == "vera" else 1e-2, "warmup_steps": 2}
    spec = paired(method, max_steps=48, optimizer=optimizer)
    reporter = run(spec, base, tmp_path)
    before, after = (e for e in reporter.events if e["event"] == "eval")
    assert (before["subject"], before["eval_loss"]) == ("base", pytest.approx(math.log(2), abs=1e-6))
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert after["rewards/accuracies"] > 0.8  # of eight pairs
    assert after["eval_loss"] < 0.6
    state = checkpoint.read_state(reporter.best.path)
    measured = {e.metric: e.value for e in state.evaluations() if e.subject == "adapter"}
    assert measured == {"loss": after["eval_loss"]} | {name: after[name] for name in REWARDS}

    held_out = collate_pairs(make_pairs(tmp_path, spec).evaluation, tuple((i,) for i in range(8)))
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        reference_B, _ = log_probs(plain, held_out)
        tuned = PeftModel.from_pretrained(plain, reporter.best.path / checkpoint.ADAPTER).eval().base_model.model
        chosen_P, rejected_P = (0.1 * (log_probs(tuned, held_out)[0] - reference_B)).chunk(2)
    figures = float(chosen_P.mean()), float(rejected_P.mean()), float((chosen_P - rejected_P).mean())
    told = after["rewards/chosen"], after["rewards/rejected"], after["rewards/margins"]
    assert figures == pytest.approx(told, abs=1e-4)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("vera", "float32")])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    method: str, dtype: str, base: BaseModel, tmp_path: Path
) -> None:
    spec = paired(method, dtype=dtype, max_steps=6, checkpoint={"interval_steps": 3})
    unbroken = run(spec, base, tmp_path)
    resumed = run(spec, base, tmp_path, "resumed", resume_from=unbroken.checkpoints[0].path)
    assert curve(resumed) == curve(unbroken)[3:]
    theirs = masters(unbroken)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in masters(resumed).items())
    with pytest.raises(SpecError, match="objective changed since"):
        run(paired(method, {"beta": 0.2}, dtype=dtype), base, tmp_path, resume_from=unbroken.checkpoints[0].path)


def test_accumulation_and_checkpointing_change_nothing(base: BaseModel, tmp_path: Path) -> None:
    few = {"max_steps": 3}
    whole = run(paired(batch={"rows": 4}, **few), base, tmp_path, "whole")
    parts = run(paired(batch={"rows": 1, "accumulation": 4}, gradient_checkpointing=True, **few), base, tmp_path)
    for ours, theirs in zip(curve(parts), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_batch_that_fills_up_a_step_counts_nothing(base: BaseModel, tmp_path: Path) -> None:
    spec = paired(batch={"rows": 2})
    data = make_pairs(tmp_path, spec)
    stream = BatchStream(data.train, spec.batch, max_length=48, seed=0, per_step=3, rank=1, size=2, paired=True)
    batch, filler = stream.next_step()
    assert (batch.num_terms, filler.num_terms, filler.num_tokens) == (2, 0, 0)
    model = build_model(base, spec)
    objective = objective_of(model, spec)
    loss = objective(filler)
    loss.backward()
    assert loss.item() == 0.0
    assert objective.take() == (0.0,) * 4 == objective.take()
    assert all(not p.grad.any() for p in objective.trained_parameters().values() if p.grad is not None)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_the_reference_is_the_base_and_the_adapter_stays_trained(
    method: str, base: BaseModel, tmp_path: Path
) -> None:
    spec = paired(method)
    batch = collate_pairs(make_pairs(tmp_path, spec).train, ((0,), (1,)))
    model = build_model(base, spec)
    objective = objective_of(model, spec)
    with torch.no_grad():
        for parameter in objective.trained_parameters().values():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    objective(batch).backward()
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        expected_B = 0.1 * (log_probs(model, batch)[0] - log_probs(plain, batch)[0])
    chosen, rejected = (float(part.sum()) for part in expected_B.chunk(2))
    assert objective.take()[:2] == pytest.approx((chosen, rejected), abs=1e-5)
    assert all(p.requires_grad and p.grad is not None for p in objective.trained_parameters().values())
