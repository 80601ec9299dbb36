"""Losses and their gradients: against the formulas as written, one answer after the other, and against TRL's GRPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.spec.datums import Datum, TokenLoss
from loray.train.rl.losses import FlatDatums, token_losses
from tests.fixtures.tiny import byte_tokenizer

LENGTHS = (5, 1, 9, 4)
PROMPT = 2  # positions of each datum before its answer, where it is longer
CPU = torch.device("cpu")

Sequence = Mapping[str, Tensor]


def drawn(seed: int = 0, spread: float = 0.6) -> tuple[tuple[Datum, ...], Tensor, Tensor]:
    """Data with prompts of weight 0, log-probabilities (N,) of a trainer, and of a reference."""
    random = np.random.default_rng(seed)
    datums = []
    for length in LENGTHS:
        weights = random.uniform(0.2, 1.5, length)
        weights[: min(PROMPT, length - 1)] = 0.0
        datums.append(
            Datum(
                token_ids=np.arange(length),
                target_ids=np.arange(length),
                weights=weights,
                logprobs=-random.uniform(0.1, 3.0, length),
                advantages=np.full(length, random.normal()),
            )
        )
    lq_N = np.concatenate([as_doubles(datum.logprobs) for datum in datums])
    lp_N, reference_N = (torch.from_numpy(lq_N + random.normal(0, spread, len(lq_N))) for _ in range(2))
    return tuple(datums), lp_N.requires_grad_(), reference_N


def as_doubles(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def parts(datums: tuple[Datum, ...], lp_N: Tensor, reference_N: Tensor) -> list[Sequence]:
    """Each datum's positions that have a weight, as the formulas know them."""
    found = []
    for datum, lp_T, lr_T in zip(datums, lp_N.split(LENGTHS), reference_N.split(LENGTHS), strict=True):
        own = {
            name: torch.from_numpy(as_doubles(getattr(datum, field)))
            for name, field in (("w", "weights"), ("lq", "logprobs"), ("A", "advantages"))
        }
        answer_T = own["w"] != 0
        found.append({name: value[answer_T] for name, value in {**own, "lp": lp_T, "lr": lr_T}.items()})
    return found


def ppo(s: Sequence) -> Tensor:
    ratio_T = torch.exp(s["lp"] - s["lq"])
    return -torch.minimum(ratio_T * s["A"], torch.clamp(ratio_T, 0.8, 1.2) * s["A"])


def capped(s: Sequence) -> Tensor:
    ratio_T = torch.exp(s["lp"] - s["lq"])
    return -(ratio_T.clamp(max=1.1) / ratio_T).detach() * ratio_T * s["A"]


def gspo(s: Sequence) -> Tensor:
    mean = (s["lp"] - s["lq"]).mean().detach()
    ratio_T = torch.exp(mean) * torch.exp(s["lp"] - s["lp"].detach())
    return -torch.minimum(ratio_T * s["A"], torch.clamp(ratio_T, 0.8, 1.2) * s["A"])


FORMULAS: dict[str, tuple[TokenLoss, Callable[[Sequence], Tensor]]] = {
    "cross_entropy": (TokenLoss(type="cross_entropy"), lambda s: -s["lp"]),
    "importance_sampling": (
        TokenLoss(type="importance_sampling"),
        lambda s: -torch.exp(s["lp"] - s["lq"]) * s["A"],
    ),
    "importance_sampling, capped": (TokenLoss(type="importance_sampling", ratio_cap=1.1), capped),
    "ppo": (TokenLoss(type="ppo"), ppo),
    "cispo": (
        TokenLoss(type="cispo", clip_high=1.3),
        lambda s: -torch.clamp(torch.exp(s["lp"] - s["lq"]), 0.0, 1.3).detach() * s["A"] * s["lp"],
    ),
    "gspo": (TokenLoss(type="gspo"), gspo),
    "dro": (TokenLoss(type="dro", beta=0.3), lambda s: -(s["A"] * s["lp"] - 0.15 * (s["lp"] - s["lq"]) ** 2)),
}


def ratio(s: Sequence) -> Tensor:
    return torch.exp(s["lp"] - s["lq"])


def of_sequence(s: Sequence) -> Tensor:
    return torch.exp((s["lp"] - s["lq"]).mean()).expand_as(s["lp"])


def where_unclipped(s: Sequence, ratio_T: Tensor) -> Tensor:
    return torch.where(ratio_T * s["A"] <= ratio_T.clamp(0.8, 1.2) * s["A"], -ratio_T * s["A"], 0.0)


# The table of gradients: of a position's loss for its lp.
SLOPES: dict[str, Callable[[Sequence], Tensor]] = {
    "cross_entropy": lambda s: -torch.ones_like(s["lp"]),
    "importance_sampling": lambda s: -ratio(s) * s["A"],
    "ppo": lambda s: where_unclipped(s, ratio(s)),
    "cispo": lambda s: -ratio(s).clamp(0.0, 1.3) * s["A"],
    "gspo": lambda s: where_unclipped(s, of_sequence(s)),
    "dro": lambda s: -s["A"] + 0.3 * (s["lp"] - s["lq"]),
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("kl", [0.0, 0.07])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_and_gradients_are_those_of_the_formulas(kind: str, kl: float, seed: int) -> None:
    loss, formula = FORMULAS[kind]
    loss = loss.model_copy(update={"kl": kl, "divisor": 7.0})
    datums, lp_N, reference_N = drawn(seed)
    total, told = token_losses(loss, lp_N, FlatDatums.of(datums, CPU, reference_N))
    (gradient_N,) = torch.autograd.grad(total, lp_N)

    answers = parts(datums, lp_N, reference_N)
    sums = []
    for s in answers:
        k3_T = torch.exp(s["lr"] - s["lp"]) - (s["lr"] - s["lp"]) - 1
        sums.append((s["w"] * (formula(s) + kl * k3_T)).sum())
    expected = torch.stack(sums).sum() / 7
    (expected_N,) = torch.autograd.grad(expected, lp_N)
    assert total.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(gradient_N, expected_N, rtol=1e-10, atol=1e-12)
    assert int(told["tokens"]) == sum(len(s["w"]) for s in answers)
    assert ("kl" in told) == bool(kl)


@pytest.mark.parametrize("kind", SLOPES)
def test_gradients_are_those_of_the_table(kind: str) -> None:
    datums, lp_N, reference_N = drawn(3)
    total, told = token_losses(FORMULAS[kind][0], lp_N, FlatDatums.of(datums, CPU))
    (gradient_N,) = torch.autograd.grad(total, lp_N)
    weighted = [(s["w"] * SLOPES[kind](s)).detach() for s in parts(datums, lp_N, reference_N)]
    flat_N = torch.from_numpy(np.concatenate([d.weights for d in datums])) != 0
    torch.testing.assert_close(gradient_N[flat_N], torch.cat(weighted), rtol=1e-10, atol=1e-12)
    assert not gradient_N[~flat_N].any()
    if kind in ("ppo", "gspo"):
        assert int(told["clipped"]) == int((torch.cat(weighted) == 0).sum()) > 0


def test_finite_differences() -> None:
    for loss, _ in FORMULAS.values():
        if loss.type in ("cispo", "gspo") or loss.ratio_cap:
            continue  # whose gradient is not that of their value
        datums, lp_N, reference_N = drawn(2)
        batch = FlatDatums.of(datums, CPU, reference_N)
        torch.autograd.gradcheck(lambda lp_N, loss=loss, batch=batch: token_losses(loss, lp_N, batch)[0], lp_N)


def with_fields(datum: Datum, **fields: Any) -> Datum:
    return Datum(datum.token_ids, datum.target_ids, datum.weights, datum.logprobs, datum.advantages, **fields)


def test_a_position_may_have_its_own_bounds() -> None:
    datums, lp_N, reference_N = drawn(1)
    loss, none, any_ratio = TokenLoss(type="ppo"), np.zeros(LENGTHS[2]), np.full(LENGTHS[2], 1e9)
    mixed = (*datums[:2], with_fields(datums[2], clip_low=none, clip_high=any_ratio), datums[3])
    total, _ = token_losses(loss, lp_N, FlatDatums.of(mixed, CPU))
    unbounded = parts(datums, lp_N, reference_N)
    others = [unbounded.pop(i) for i in (3, 1, 0)]
    expected = -(unbounded[0]["w"] * ratio(unbounded[0]) * unbounded[0]["A"]).sum()
    expected = expected + sum((s["w"] * ppo(s)).sum() for s in others)
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)
    assert total.item() != token_losses(loss, lp_N, FlatDatums.of(datums, CPU))[0].item()


def test_a_mask_says_which_positions_are_the_sequence() -> None:
    datums, lp_N, _ = drawn()
    masks = [np.arange(length) >= PROMPT + 1 for length in LENGTHS]
    masked = [with_fields(datum, mask=mask) for datum, mask in zip(datums, masks, strict=True)]
    total, _ = token_losses(TokenLoss(type="gspo", clip_low=0.0, clip_high=1e9), lp_N, FlatDatums.of(masked, CPU))
    expected = 0.0
    for datum, mask, lp_T in zip(datums, masks, lp_N.detach().split(LENGTHS), strict=True):
        own = (lp_T.numpy() - as_doubles(datum.logprobs))[mask]
        weight = float((as_doubles(datum.weights) * as_doubles(datum.advantages)).sum())
        expected -= weight * (math.exp(own.mean()) if len(own) else 1.0)
    assert total.item() == pytest.approx(expected, rel=1e-10)


def test_values_of_the_engine_with_gradients_of_the_trainer() -> None:
    datums, lp_N, _ = drawn()
    scored = tuple(with_fields(datum, values=datum.logprobs) for datum in datums)
    total, told = token_losses(TokenLoss(type="ppo"), lp_N, FlatDatums.of(scored, CPU))
    (gradient_N,) = torch.autograd.grad(total, lp_N)
    weighted_N = torch.from_numpy(np.concatenate([as_doubles(d.weights) * as_doubles(d.advantages) for d in datums]))
    torch.testing.assert_close(gradient_N, -weighted_N, rtol=1e-10, atol=1e-12)  # of ratios that are exactly 1
    assert total.item() == pytest.approx(-weighted_N.sum().item(), rel=1e-12)
    assert int(told["clipped"]) == 0


@pytest.mark.parametrize("kind", FORMULAS)
def test_positions_without_weight_hold_anything(kind: str) -> None:
    loss, _ = FORMULAS[kind]
    datums, lp_N, reference_N = drawn()
    batch = FlatDatums.of(datums, CPU, reference_N)
    unused_N = batch.weights_N == 0
    wild_N = torch.where(unused_N, 1e6, lp_N.detach()).requires_grad_()
    loss = loss.model_copy(update={"kl": 0.1})
    wild = token_losses(loss, wild_N, batch._replace(reference_N=torch.where(unused_N, math.inf, reference_N)))
    assert wild[0].item() == token_losses(loss, lp_N, batch)[0].item()
    (gradient_N,) = torch.autograd.grad(wild[0], wild_N)
    assert gradient_N.isfinite().all()


def test_parts_of_the_data_add_up() -> None:
    datums, lp_N, _ = drawn()
    for loss, _ in FORMULAS.values():
        whole, _ = token_losses(loss, lp_N, FlatDatums.of(datums, CPU))
        several = [
            token_losses(loss, lp_T, FlatDatums.of((datum,), CPU))[0].item()
            for datum, lp_T in zip(datums, lp_N.split(LENGTHS), strict=True)
        ]
        assert sum(several) == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's, about itself
def test_grpo_is_trls(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "beta": 0.07,
        "use_bias_correction_kl": False,  # the paper's
        "loss_type": "grpo",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=byte_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    datums, lp_N, reference_N = drawn(5)
    longest = max(LENGTHS)

    def padded(parts: Any) -> Tensor:
        return torch.stack([torch.nn.functional.pad(torch.as_tensor(part), (0, longest - len(part))) for part in parts])

    lp_BT = padded(lp_N.split(LENGTHS))
    mask_BT = padded([(as_doubles(d.weights) != 0).astype(np.int64) for d in datums])
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (lp_BT, torch.zeros_like(lp_BT), None)
    )
    ids_BT = torch.zeros(len(datums), longest, dtype=torch.long)
    expected = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids_BT[:, :1],
            "prompt_mask": torch.ones(len(datums), 1, dtype=torch.long),
            "completion_ids": ids_BT,
            "completion_mask": mask_BT,
            "advantages": torch.tensor([float(d.advantages[0]) for d in datums], dtype=torch.float64),
            "old_per_token_logps": padded([as_doubles(d.logprobs) for d in datums]),
            "ref_per_token_logps": padded(reference_N.split(LENGTHS)),
        },
    )
    (expected_N,) = torch.autograd.grad(expected, lp_N, retain_graph=True)

    # Means over answers of means over their tokens: each token weighs 1 by the answer's length.
    means = tuple(
        Datum(d.token_ids, d.target_ids, (weights != 0) / (weights != 0).sum(), d.logprobs, d.advantages)
        for d in datums
        for weights in (as_doubles(d.weights),)
    )
    loss = TokenLoss(type="ppo", kl=0.07, divisor=len(datums))
    total, _ = token_losses(loss, lp_N, FlatDatums.of(means, CPU, reference_N))
    (gradient_N,) = torch.autograd.grad(total, lp_N)
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(gradient_N, expected_N.double(), rtol=1e-6, atol=1e-6)
