"""ORPO, SimPO and KTO: losses and gradients in fp64 from logits by TRL's formulas, and in fp32 by TRL itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.methods import method_of
from loray.spec import KtoSpec, OrpoSpec, SimpoSpec, TrainSpec
from loray.train.data.batches import TrainBatch, collate_pairs
from loray.train.model import build_model
from loray.train.objectives import Objective, log_odds, objective_of
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import (
    MAX_PAIR_LENGTH,
    answer,
    assert_equal,
    curve,
    make_data,
    masters,
    pair,
    paired,
    run,
)

NUM_ROWS = 6
OBJECTIVES: dict[str, dict[str, Any]] = {
    "orpo": {"type": "orpo", "beta": 0.3},
    "simpo": {"type": "simpo", "beta": 2.0, "simpo_gamma": 0.7},
    "cpo": {"type": "simpo", "beta": 0.5, "simpo_gamma": 0.2, "cpo_alpha": 0.4},
    "kto": {"type": "kto", "beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}
DATA = {"train": "x", "eval_fraction": 0}


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def drawn(name: str, like: Tensor) -> Tensor:
    """Weights of a trained adapter, by the parameter's name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.2 * torch.randn(like.shape, generator=generator)


def made(kind: str, base: BaseModel, folder: Path) -> tuple[TrainSpec, Objective, TrainBatch]:
    """An objective around a model of an adapter with drawn weights in fp64, and a batch with a reference."""
    spec = paired("lora", OBJECTIVES[kind], data=DATA)
    model = build_model(base, spec).double()
    objective = objective_of(model, spec)
    batch = collate_pairs(make_data(folder, spec, num_pairs=NUM_ROWS).train, tuple((i,) for i in range(NUM_ROWS)))
    with torch.no_grad():
        for name, parameter in sorted(objective.trained_parameters().items()):
            if "lora_B" in name:
                parameter.zero_()
        reference_B = answer_log_probs(token_log_probs(model, batch), batch) + 0.1 * torch.arange(2 * NUM_ROWS)
        for name, parameter in objective.trained_parameters().items():
            parameter.copy_(drawn(name, parameter))
    return spec, objective, batch._replace(reference_B=reference_B if spec.objective.has_reference else None)


def score_with(objective: Objective) -> Any:
    return torch.no_grad()(lambda batch: objective(batch, {}))


def computed(objective: Objective, batches: list[TrainBatch]) -> Result:
    """One step over these micro-batches, as the loop computes it."""
    totals: dict[str, float] = {}
    for batch in batches:
        counts = objective.counts(batch, score_with(objective))
        totals = {kind: totals.get(kind, 0) + count for kind, count in counts.items()}
    loss = torch.stack([objective(objective.learned(batch), totals) for batch in batches]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return Result(
        float(loss.detach()), gradients_of(objective), dict(zip(objective.metrics, objective.take(), strict=True))
    )


def gradients_of(objective: Objective) -> dict[str, Tensor]:
    found = {}
    for name, parameter in objective.trained_parameters().items():
        assert parameter.grad is not None
        found[name], parameter.grad = parameter.grad, None
    return found


# -- by the formulas, from logits -------------------------------------------------------------------------------------


def token_log_probs(model: Any, batch: TrainBatch) -> Tensor:
    """log p of each token after the first one, (B, T − 1), by a softmax over the whole vocabulary."""
    logits_BTV = model(**batch.model_inputs(torch.device("cpu")), use_cache=False).logits[:, :-1]
    ids_BT = batch.input_ids_BT[:, 1:]
    return logits_BTV.log_softmax(-1).gather(-1, ids_BT[..., None]).squeeze(-1)


def lengths_of(i: int, side: int, *, single: bool) -> tuple[int, int]:
    """Tokens of a row's prompt, and of the answer that this sequence has, with its end: a byte is a token."""
    if not single:
        return len(pair(i)["prompt"]), len(pair(i)["chosen" if side == 0 else "rejected"]) + 1
    other = (i - side) % NUM_ROWS
    return len(answer(i)["prompt"]), len(answer(other)["completion"]) + 1


def spans(batch: TrainBatch) -> list[tuple[int, int]]:
    single = batch.desirable_P is not None
    return [lengths_of(i, side, single=single) for side in (0, 1) for i in range(NUM_ROWS)]


def answer_log_probs(log_probs_BT: Tensor, batch: TrainBatch, *, mean: bool = False) -> Tensor:
    """(B,), of answers alone."""
    rows = [row[prompt - 1 : prompt - 1 + size] for row, (prompt, size) in zip(log_probs_BT, spans(batch), strict=True)]
    assert all(len(row) == size for row, (_, size) in zip(rows, spans(batch), strict=True))
    return torch.stack([row.mean() if mean else row.sum() for row in rows])


def chosen_nll(log_probs_BT: Tensor, batch: TrainBatch, *, prompts: bool) -> Tensor:
    """The mean cross-entropy over all tokens of chosen answers, with those of prompts but each first one or without."""
    rows = zip(log_probs_BT[:NUM_ROWS], spans(batch), strict=False)
    return -torch.cat([row[0 if prompts else prompt - 1 : prompt - 1 + size] for row, (prompt, size) in rows]).mean()


def oracle(spec: Any, model: Any, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs_BT = token_log_probs(model, batch)
    match spec:
        case OrpoSpec():
            chosen_P, rejected_P = answer_log_probs(log_probs_BT, batch, mean=True).chunk(2)
            odds_P = (chosen_P.exp() / (1 - chosen_P.exp())) / (rejected_P.exp() / (1 - rejected_P.exp()))
            ratios_P = torch.log(torch.sigmoid(torch.log(odds_P)))
            nll = chosen_nll(log_probs_BT, batch, prompts=True)
            further = {"nll_loss": nll, "log_odds_ratio": ratios_P.mean(), "log_odds_chosen": odds_P.log().mean()}
            return nll - spec.beta * ratios_P.mean(), rewards(spec.beta * chosen_P, spec.beta * rejected_P) | further
        case SimpoSpec():
            chosen_P, rejected_P = (spec.beta * answer_log_probs(log_probs_BT, batch, mean=True)).chunk(2)
            nll = chosen_nll(log_probs_BT, batch, prompts=False)
            losses_P = -torch.log(torch.sigmoid(chosen_P - rejected_P - spec.simpo_gamma))
            return losses_P.mean() + spec.cpo_alpha * nll, rewards(chosen_P, rejected_P) | {"nll_loss": nll}
        case _:
            assert isinstance(spec, KtoSpec)
            assert batch.reference_B is not None
            ratios_P, unrelated_P = (answer_log_probs(log_probs_BT, batch) - batch.reference_B).chunk(2)
            kl = unrelated_P.mean().clamp(min=0).detach()
            good = torch.tensor([bool(answer(i)["label"]) for i in range(NUM_ROWS)])
            won, lost = ratios_P[good], ratios_P[~good]
            losses = [
                spec.desirable_weight * (1 - torch.sigmoid(spec.beta * (won - kl))),
                spec.undesirable_weight * (1 - torch.sigmoid(spec.beta * (kl - lost))),
            ]
            chosen, rejected = spec.beta * won.mean(), spec.beta * lost.mean()
            found = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
            return torch.cat(losses).mean(), found | {"kl": kl}


def rewards(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    told = (chosen_P > rejected_P).double()
    parts = chosen_P, rejected_P, told, chosen_P - rejected_P
    names = "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"
    return {name: part_P.mean() for name, part_P in zip(names, parts, strict=True)}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_formulas(kind: str, base: BaseModel, tmp_path: Path) -> None:
    spec, objective, batch = made(kind, base, tmp_path)
    mine = computed(objective, [batch])
    loss, metrics = oracle(spec.objective, objective.model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert mine.loss == pytest.approx(float(loss.detach()), abs=1e-9)
    assert mine.metrics == pytest.approx({name: float(value.detach()) for name, value in metrics.items()}, abs=1e-9)
    assert_close(mine.gradients, gradients_of(objective), 1e-9)
    assert any(gradient.abs().max() > 1e-3 for gradient in mine.gradients.values())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_loss_does_not_depend_on_how_its_rows_are_shared(kind: str, base: BaseModel, tmp_path: Path) -> None:
    """Micro-batches of other sizes have other numbers of tokens, of pairs, and of desirable answers."""
    _, objective, batch = made(kind, base, tmp_path)
    whole = computed(objective, [batch])
    parts = [taken(batch, rows) for rows in ([0], [1, 2, 3], [4, 5])]
    shared = computed(objective, parts)
    assert shared.loss == pytest.approx(whole.loss, rel=1e-6)
    assert shared.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert_close(shared.gradients, whole.gradients, 1e-5)


def taken(batch: TrainBatch, rows: list[int]) -> TrainBatch:
    both = [*rows, *(NUM_ROWS + i for i in rows)]
    of_rows = {name: getattr(batch, name) for name in ("input_ids_BT", "labels_BT", "document_ids_BT", "following_BT")}
    fields = {name: tensor[both] for name, tensor in of_rows.items()}
    reference_B = None if batch.reference_B is None else batch.reference_B[both]
    desirable_P = None if batch.desirable_P is None else batch.desirable_P[rows]
    return batch._replace(**fields, reference_B=reference_B, desirable_P=desirable_P, num_pairs=len(rows))


def test_odds_of_answers_that_are_certain_are_finite() -> None:
    means_B = torch.tensor([0.0, -1e-3, -50.0, -50.0, -1e-3, 0.0], requires_grad=True)
    odds_P = log_odds(means_B)
    odds_P.sum().backward()  # type: ignore[no-untyped-call]
    assert odds_P.isfinite().all()
    assert means_B.grad is not None
    assert means_B.grad.isfinite().all()
    assert float(odds_P.detach()[1]) == pytest.approx(0.0, abs=1e-3)


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], error: float) -> None:
    assert ours.keys() == theirs.keys()
    size = math.sqrt(sum(float(t.square().sum()) for t in theirs.values()))
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm()) < error * size, name


# -- by TRL -----------------------------------------------------------------------------------------------------------


def trainer_of(spec: TrainSpec, base: BaseModel, folder: Path) -> Any:
    trl = pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset

    objective: Any = spec.objective
    arguments = {
        "output_dir": str(folder),
        "max_length": MAX_PAIR_LENGTH,
        "per_device_train_batch_size": NUM_ROWS,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    fields, tokenizer = objective.model_dump(exclude={"type"}), byte_tokenizer()
    tokenizer.bos_token = None  # which ORPOTrainer and CPOTrainer put before prompts, also where no tokenizer does
    match spec.objective:
        case OrpoSpec():
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        case SimpoSpec():
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer

            arguments["loss_type"] = "simpo"
        case _:
            Config, Trainer = trl.KTOConfig, trl.KTOTrainer
    rows = [answer(i) if spec.objective.type == "kto" else pair(i) for i in range(NUM_ROWS)]
    return Trainer(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32),
        args=Config(**arguments, **fields),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=method_of(spec.adapter).peft_config(spec.adapter),
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's, about itself
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients_are_those_of_trl(kind: str, base: BaseModel, tmp_path: Path) -> None:
    spec = paired("lora", OBJECTIVES[kind], data=DATA)
    trainer = trainer_of(spec, base, tmp_path / "trl")
    parameters = {
        n.removeprefix("base_model.model."): p for n, p in trainer.model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(drawn(name, parameter))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()

    model = build_model(base, spec)
    objective = objective_of(model, spec)
    batch = collate_pairs(make_data(tmp_path, spec, num_pairs=NUM_ROWS).train, tuple((i,) for i in range(NUM_ROWS)))
    if spec.objective.has_reference:
        with torch.no_grad():  # an adapter whose B is zero is the base
            batch = batch._replace(reference_B=objective_of(build_model(base, spec), spec)(batch, {}))
    with torch.no_grad():
        for name, parameter in objective.trained_parameters().items():
            parameter.copy_(drawn(name, parameter))
    mine = computed(objective, [batch])
    assert mine.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    stored = vars(trainer)["_metrics" if kind == "kto" else "_stored_metrics"]["train"]
    told = {
        name: float(stored[name][0])
        for name in mine.metrics
        if name in stored and (kind, name) != ("simpo", "nll_loss")
    }
    assert len(told) >= 4
    assert {name: mine.metrics[name] for name in told} == pytest.approx(told, abs=1e-5)
    assert_close(mine.gradients, {name: p.grad for name, p in parameters.items()}, 1e-5)


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["orpo", "simpo", "kto"])
def test_held_out_answers_are_told_apart(kind: str, base: BaseModel, tmp_path: Path) -> None:
    spec = paired("lora", {"type": kind}, max_steps=24, optimizer={"learning_rate": 1e-2, "warmup_steps": 2})
    _, reporter = run(spec, base, tmp_path)
    before, after = (e for e in reporter.events if e["event"] == "eval")
    assert after["eval_loss"] < before["eval_loss"]
    assert after["rewards/margins"] > before["rewards/margins"] + 0.05
    assert after.get("rewards/accuracies", 1.0) > 0.8
    assert set(spec.objective.metrics) <= after.keys()
    if kind == "kto":
        assert (before["kl"], before["eval_loss"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0.5, abs=1e-5))


@pytest.mark.parametrize("kind", ["orpo", "kto"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(kind: str, base: BaseModel, tmp_path: Path) -> None:
    spec = paired("lora", {"type": kind}, max_steps=4, checkpoint={"interval_steps": 2})
    _, unbroken = run(spec, base, tmp_path)
    _, resumed = run(spec, base, tmp_path, name="resumed", resume_from=unbroken.checkpoints[0].path)
    assert curve(resumed) == curve(unbroken)[2:]
    assert_equal(masters(resumed), masters(unbroken))


@pytest.mark.parametrize("kind", ["orpo", "simpo", "kto"])
def test_accumulation_and_checkpointing_change_nothing(kind: str, base: BaseModel, tmp_path: Path) -> None:
    objective = {"type": kind}
    _, whole = run(paired("lora", objective, batch={"rows": 4}, max_steps=2), base, tmp_path, name="whole")
    parts = paired("lora", objective, batch={"rows": 1, "accumulation": 4}, gradient_checkpointing=True, max_steps=2)
    _, shared = run(parts, base, tmp_path)
    for ours, theirs in zip(curve(shared), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("desirable", "weight", "message"),
    [
        (0.5, 1.0, None),
        (0.25, 3.5, None),
        (0.25, 1.0, "desirable_weight is best 3 to 4 times objective.undesirable_weight, and is 1 times"),
        (0.8, 1.0, "80% of the rows are desirable: objective.desirable_weight is best 0.25 to 0.34 times"),
        (1.0, 1.0, "100% of the rows are desirable, and KTO learns from the difference"),
    ],
)
def test_weights_that_do_not_fit_the_rows_are_said(desirable: float, weight: float, message: str | None) -> None:
    warning = KtoSpec(desirable_weight=weight).warning(desirable)
    assert warning is None if message is None else message in str(warning)


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (
            {"type": "kto"},
            {"data": {"train": "x", "format": "preference"}},
            "is for objective.type dpo or orpo or simpo",
        ),
        ({"type": "orpo"}, {"batch": {"rows": 2, "order": "packed"}}, "joins rows, and objective.type orpo compares"),
        ({"type": "simpo", "label_smoothing": 0.1}, {}, "label_smoothing"),
        ({"type": "kto", "desirable_weight": 0}, {}, "desirable_weight"),
    ],
)
def test_what_does_not_go_together_is_refused(objective: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        paired("lora", objective, **fields)
    assert message in str(error.value)
