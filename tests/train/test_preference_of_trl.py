"""Losses, gradients and rewards of DPO are those of TRL's DPOTrainer, in fp32 on one batch, from the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.methods.attach import peft_config
from loray.spec import REWARDS, TrainSpec
from loray.train.data.batches import collate_pairs
from loray.train.model import build_model
from loray.train.objectives import PreferenceObjective, objective_of
from tests.fixtures.tiny import byte_tokenizer
from tests.train.pairs import MAX_LENGTH, make_pairs, pair, paired
from tests.train.test_loop import TINY

NUM_PAIRS = 6
trl = pytest.importorskip("trl", reason="pip install trl")

# TRL sets it under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")


class Result(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]
    rewards: tuple[float, ...]


def drawn(name: str, like: torch.Tensor) -> torch.Tensor:
    """Weights of a trained adapter, by the parameter's name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.2 * torch.randn(like.shape, generator=generator)


def ours(spec: TrainSpec, base: BaseModel, folder: Path) -> Result:
    model = build_model(base, spec)
    objective = objective_of(model, spec)
    assert isinstance(objective, PreferenceObjective)
    parameters = objective.trained_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(drawn(name, parameter))
    data = make_pairs(folder, spec, number=NUM_PAIRS)
    loss = objective(collate_pairs(data.train, tuple((i,) for i in range(NUM_PAIRS)))) / NUM_PAIRS
    loss.backward()
    rewards = tuple(s / NUM_PAIRS for s in objective.take())
    return Result(float(loss.detach()), {n: p.grad for n, p in parameters.items() if p.grad is not None}, rewards)


def theirs(spec: TrainSpec, base: BaseModel, folder: Path) -> Result:
    from datasets import Dataset

    objective: Any = spec.objective
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        beta=objective.beta,
        loss_type=[objective.loss_type],
        label_smoothing=objective.label_smoothing,
        max_length=MAX_LENGTH,
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
        peft_config=peft_config(spec.adapter),
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


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("lora", {"beta": 0.1}),
        ("vera", {"beta": 0.3}),
        ("dora", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("lora", {"loss_type": "ipo", "beta": 0.2}),
        ("vera", {"loss_type": "hinge"}),
    ],
)
def test_loss_and_gradients_are_those_of_trl(
    method: str, objective: dict[str, Any], base: BaseModel, tmp_path: Path
) -> None:
    spec = paired(method, objective, data={"train": "x", "eval_fraction": 0})
    mine, expected = ours(spec, base, tmp_path), theirs(spec, base, tmp_path)
    assert mine.loss == pytest.approx(expected.loss, abs=1e-5)
    assert mine.rewards == pytest.approx(expected.rewards, abs=1e-5)
    assert mine.gradients.keys() == expected.gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in mine.gradients.values())
    errors = {name: gradient - expected.gradients[name] for name, gradient in mine.gradients.items()}
    assert norm(errors) < 1e-5 * norm(expected.gradients)
    for name, error in errors.items():
        assert error.norm() < 1e-4 * expected.gradients[name].norm(), name


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())
