"""Objectives: the chunked loss against torch's, DPO against TRL's, pairs that are told apart and resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.methods import method_of
from loray.planning import devices
from loray.spec import ATTENTION_MODULES, REWARDS, TrainSpec
from loray.train import checkpoint
from loray.train.data.batches import IGNORED, BatchStream, collate_pairs
from loray.train.model import build_model
from loray.train.objectives import PreferenceObjective, cross_entropy, log_probs, objective_of
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import MAX_PAIR_LENGTH, METHODS, assert_equal, curve, make_data, masters, pair, paired, run


def draw(
    num: int, width: int = 16, vocab: int = 50, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    hidden_ND = torch.randn(num, width, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, width, generator=generator).to(dtype)
    return hidden_ND, weight_VD, torch.randint(0, vocab, (num,), generator=generator)


@pytest.mark.parametrize("num", [0, 1, 7, 40])
@pytest.mark.parametrize("chunk_elements", [1, 350, 1 << 20])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_equal_to_torch(num: int, chunk_elements: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOSS_CHUNK_ON_CPU", chunk_elements)
    hidden_ND, weight_VD, labels_N = draw(num)
    total = cross_entropy(hidden_ND, weight_VD, labels_N, soft_cap).sum()
    (grad,) = torch.autograd.grad(total / 3, hidden_ND)
    logits_NV = hidden_ND @ weight_VD.T
    if soft_cap is not None:
        logits_NV = soft_cap * (logits_NV / soft_cap).tanh()
    expected = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected / 3, hidden_ND)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_fp32() -> None:
    hidden_ND, weight_VD, labels_N = draw(512, dtype=torch.bfloat16)
    total = cross_entropy(hidden_ND, weight_VD, labels_N).sum()
    assert total.dtype == torch.float32
    expected = F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    total.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == torch.bfloat16


def test_nothing_is_kept_without_gradients() -> None:
    hidden_ND, weight_VD, labels_N = draw(4)
    with torch.no_grad():
        assert not cross_entropy(hidden_ND, weight_VD, labels_N).requires_grad


def test_a_trained_head_is_refused() -> None:
    hidden_ND, weight_VD, labels_N = draw(4)
    with pytest.raises(ValueError, match="output head"):
        cross_entropy(hidden_ND, weight_VD.requires_grad_(), labels_N)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_pairs_that_were_not_seen_are_told_apart_by_an_adapter_that_peft_loads(
    method: str, base: BaseModel, tmp_path: Path
) -> None:
    optimizer = {"learning_rate": 1e-1 if method == "vera" else 1e-2, "warmup_steps": 2}
    spec = paired(method, max_steps=48, optimizer=optimizer)
    _, reporter = run(spec, base, tmp_path)
    before, after = (e for e in reporter.events if e["event"] == "eval")
    assert (before["subject"], before["eval_loss"]) == ("base", pytest.approx(math.log(2), abs=1e-6))
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert after["rewards/accuracies"] > 0.8  # of eight pairs
    assert after["eval_loss"] < 0.6
    state = checkpoint.read_state(reporter.best.path)
    measured = {e.metric: e.value for e in state.evaluations() if e.subject == "adapter"}
    assert measured == {"loss": after["eval_loss"]} | {name: after[name] for name in REWARDS}

    held_out = collate_pairs(make_data(tmp_path, spec).evaluation, tuple((i,) for i in range(8)))
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        reference_B, _ = log_probs(plain, held_out)
        tuned = PeftModel.from_pretrained(plain, reporter.best.path / checkpoint.ADAPTER).eval().base_model.model
        chosen_P, rejected_P = (0.1 * (log_probs(tuned, held_out)[0] - reference_B)).chunk(2)
    figures = float(chosen_P.mean()), float(rejected_P.mean()), float((chosen_P - rejected_P).mean())
    told = after["rewards/chosen"], after["rewards/rejected"], after["rewards/margins"]
    assert figures == pytest.approx(told, abs=1e-4)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("vera", "float32")])
def test_a_resumed_run_of_pairs_is_the_unbroken_one_bit_for_bit(
    method: str, dtype: str, base: BaseModel, tmp_path: Path
) -> None:
    spec = paired(method, dtype=dtype, max_steps=6, checkpoint={"interval_steps": 3})
    _, unbroken = run(spec, base, tmp_path)
    _, resumed = run(spec, base, tmp_path, name="resumed", resume_from=unbroken.checkpoints[0].path)
    assert curve(resumed) == curve(unbroken)[3:]
    assert_equal(masters(resumed), masters(unbroken))
    with pytest.raises(SpecError, match="objective changed since"):
        run(paired(method, {"beta": 0.2}, dtype=dtype), base, tmp_path, resume_from=unbroken.checkpoints[0].path)


def test_accumulation_and_checkpointing_change_nothing(base: BaseModel, tmp_path: Path) -> None:
    few = {"max_steps": 3}
    _, whole = run(paired(batch={"rows": 4}, **few), base, tmp_path, name="whole")
    _, parts = run(paired(batch={"rows": 1, "accumulation": 4}, gradient_checkpointing=True, **few), base, tmp_path)
    for ours, theirs in zip(curve(parts), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_batch_that_fills_up_a_step_counts_nothing(base: BaseModel, tmp_path: Path) -> None:
    spec = paired(batch={"rows": 2})
    data = make_data(tmp_path, spec)
    stream = BatchStream(data.train, spec.batch, max_length=48, seed=0, per_step=3, rank=1, size=2, paired=True)
    batch, filler = stream.next_step()
    objective = objective_of(build_model(base, spec), spec)
    counts = [objective.counts(made, lambda made: objective(made, {})) for made in (batch, filler)]
    assert (counts, filler.num_tokens) == ([{"pairs": 2}, {"pairs": 0}], 0)
    loss = objective(filler._replace(reference_B=torch.zeros(4)), {"pairs": 2})
    loss.backward()
    assert loss.item() == 0.0
    assert objective.take() == (0.0,) * 4 == objective.take()
    assert all(not p.grad.any() for p in objective.trained_parameters().values() if p.grad is not None)


NUM_PAIRS = 6


class Result(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]
    rewards: tuple[float, ...]


def drawn(name: str, like: torch.Tensor) -> torch.Tensor:
    """Weights of a trained adapter, by the parameter's name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.2 * torch.randn(like.shape, generator=generator)


def ours(spec: TrainSpec, base: BaseModel, folder: Path, dtype: torch.dtype = torch.float32) -> Result:
    model = build_model(base, spec).to(dtype)
    objective = objective_of(model, spec)
    assert isinstance(objective, PreferenceObjective)
    batch = collate_pairs(make_data(folder, spec, num_pairs=NUM_PAIRS).train, tuple((i,) for i in range(NUM_PAIRS)))
    parameters = objective.trained_parameters()
    with torch.no_grad():
        batch = batch._replace(reference_B=objective(batch, {}))
        for name, parameter in parameters.items():
            parameter.copy_(drawn(name, parameter))
    loss = objective(batch, {"pairs": NUM_PAIRS})
    loss.backward()
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return Result(float(loss.detach()), gradients, objective.take())


def theirs(spec: TrainSpec, base: BaseModel, folder: Path) -> Result:
    trl = pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset

    objective: Any = spec.objective
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        beta=objective.beta,
        loss_type=[objective.loss_type],
        label_smoothing=objective.label_smoothing,
        max_length=MAX_PAIR_LENGTH,
        per_device_train_batch_size=NUM_PAIRS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([pair(i) for i in range(NUM_PAIRS)]),
        processing_class=byte_tokenizer(),
        peft_config=method_of(spec.adapter).peft_config(spec.adapter),
    )
    parameters = {_name_of(n): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(drawn(name, parameter))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    rewards = tuple(trainer._metrics["train"][name][0] for name in REWARDS)
    return Result(float(loss.detach()), {n: p.grad for n, p in parameters.items()}, rewards)


def _name_of(name: str) -> str:
    """PEFT's name as ours: VeRA's vectors have no adapter's name."""
    name = name.removeprefix("base_model.model.")
    return name.removesuffix(".default") if ".vera_lambda_" in name else name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")  # TRL sets it
@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("lora", {"beta": 0.1}),
        ("vera", {"beta": 0.3}),
        ("lora", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("lora", {"loss_type": "ipo", "beta": 0.2}),
        ("vera", {"loss_type": "hinge"}),
    ],
)
def test_loss_and_gradients_are_those_of_trl(
    method: str, objective: dict[str, Any], base: BaseModel, tmp_path: Path
) -> None:
    # On attention, whose few products leave fp32 the digits that are compared.
    adapter = METHODS[method]["adapter"] | {"dropout": 0.0, "target_modules": ATTENTION_MODULES}
    spec = paired(method, objective, adapter=adapter, data={"train": "x", "eval_fraction": 0})
    mine, expected = ours(spec, base, tmp_path), theirs(spec, base, tmp_path)
    assert mine.loss == pytest.approx(expected.loss, abs=1e-5)
    assert mine.rewards == pytest.approx(expected.rewards, abs=1e-5)
    assert mine.gradients.keys() == expected.gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in mine.gradients.values())
    errors = {name: gradient - expected.gradients[name] for name, gradient in mine.gradients.items()}
    assert norm(errors) < 1e-5 * norm(expected.gradients)
    for name, error in errors.items():
        assert error.norm() < 1e-4 * expected.gradients[name].norm(), name


def by_formulas(spec: TrainSpec, base: BaseModel, folder: Path) -> Result:
    """TRL's losses in fp64, from the logits of two models: TRL itself takes log-probabilities in fp32."""
    objective: Any = spec.objective
    batch = collate_pairs(make_data(folder, spec, num_pairs=NUM_PAIRS).train, tuple((i,) for i in range(NUM_PAIRS)))
    policy, reference = (build_model(base, spec).double() for _ in range(2))
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(drawn(name, parameter))
    is_answer_BT = batch.labels_BT != IGNORED

    def scores(model: Any) -> Tensor:
        log_probs_BTV = model(**batch.model_inputs(torch.device("cpu")), use_cache=False).logits.log_softmax(-1)
        found_BT = log_probs_BTV.gather(-1, batch.labels_BT.clamp(min=0)[..., None]).squeeze(-1)
        return (found_BT * is_answer_BT).sum(1)

    scores_B = scores(policy) - scores(reference).detach()
    chosen_P, rejected_P = scores_B.chunk(2)
    sizes_P = is_answer_BT.sum(1).chunk(2)
    delta_P, beta, flipped = chosen_P - rejected_P, objective.beta, objective.label_smoothing
    is_told_P, told_wrongly_P = torch.sigmoid(beta * delta_P), torch.sigmoid(-beta * delta_P)
    losses_P = {
        "sigmoid": -is_told_P.log(),
        "hinge": (1 - beta * delta_P).clamp(min=0),
        "ipo": (chosen_P / sizes_P[0] - rejected_P / sizes_P[1] - 1 / (2 * beta)) ** 2,
        "robust": (-(1 - flipped) * is_told_P.log() + flipped * told_wrongly_P.log()) / (1 - 2 * flipped),
    }[objective.loss_type]
    losses_P.mean().backward()  # type: ignore[no-untyped-call]
    rewards = [beta * chosen_P, beta * rejected_P, (delta_P > 0).double(), beta * delta_P]
    means = tuple(float(reward_P.mean().detach()) for reward_P in rewards)
    return Result(
        float(losses_P.mean().detach()), {n: p.grad for n, p in parameters.items() if p.grad is not None}, means
    )


@pytest.mark.parametrize(
    "objective",
    [
        {"beta": 0.1},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "ipo", "beta": 0.2},
        {"loss_type": "hinge"},
    ],
    ids=["sigmoid", "robust", "ipo", "hinge"],
)
def test_loss_and_gradients_in_fp64_are_those_of_trls_formulas(
    objective: dict[str, Any], base: BaseModel, tmp_path: Path
) -> None:
    spec = paired("lora", objective, data={"train": "x", "eval_fraction": 0})
    mine, expected = ours(spec, base, tmp_path, torch.float64), by_formulas(spec, base, tmp_path)
    assert mine.loss == pytest.approx(expected.loss, abs=1e-9)
    assert mine.rewards == pytest.approx(expected.rewards, abs=1e-9)
    assert mine.gradients.keys() == expected.gradients.keys()
    for name, gradient in mine.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=1e-9, atol=1e-9)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())
