"""Schedules, fp32 masters, clipping, parameter groups, skipped steps, and states, on one rank."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loray.spec import OptimizerSpec
from loray.train.mesh import World
from loray.train.optimizer import OptimizerState, StepResult, check_fits, is_decayed, learning_rate
from loray.train.strategies import ddp as buckets
from loray.train.strategies.ddp import DataParallel


def spec(**fields: Any) -> OptimizerSpec:
    return OptimizerSpec(**({"learning_rate": 1e-2} | fields))


class Given(nn.Module):
    """A loss whose gradient for each parameter is what the batch says. Names may have dots."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters

    def forward(self, gradients: dict[str, float], totals: dict[str, float]) -> Tensor:
        return torch.stack([(self._named[n].float() * g).sum() for n, g in gradients.items()]).sum()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return self._named


def strategy(parameters: dict[str, nn.Parameter], state: OptimizerState | None = None, **fields: Any) -> DataParallel:
    given: Any = Given(parameters)
    recipe: Any = SimpleNamespace(optimizer=spec(**fields))
    return DataParallel(given, recipe, World(), torch.device("cpu"), state)


def step(ddp: DataParallel, gradient: float | dict[str, float], *, lr: float = 1e-2, times: int = 1) -> StepResult:
    batch: Any = gradient if isinstance(gradient, dict) else {"w": gradient}
    for i in range(times):
        ddp.forward_backward(batch, totals={}, last=i == times - 1)
    return ddp.step(lr)


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_is_linear_and_the_last_step_still_moves(schedule: str) -> None:
    rates = [learning_rate(s, 20, spec(schedule=schedule, warmup_steps=4)) for s in range(1, 21)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4] == pytest.approx(0.01)
    assert all(b <= a for a, b in pairwise(rates[4:]))
    assert rates[-1] > 0
    if schedule == "constant":
        assert rates[-1] == 0.01


def test_warmup_ratio_rounds_up_and_cosine_is_half_way_down_in_the_middle() -> None:
    assert learning_rate(1, 25, spec(warmup_ratio=0.1)) == pytest.approx(0.01 / 3)
    assert learning_rate(1, 25, spec()) == 0.01
    assert learning_rate(11, 20, spec(schedule="cosine")) == pytest.approx(0.005)


# -- masters ----------------------------------------------------------------------------------------------------------


def test_small_steps_add_up_on_a_bf16_parameter() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ddp = strategy({"w": parameter})
    for _ in range(50):
        step(ddp, -1.0, lr=1e-3)  # far less than the 0.008 between bf16 numbers above one
    torch.testing.assert_close(parameter.float(), torch.full((4,), 1.05), atol=4e-3, rtol=0)


def test_fp32_parameters_follow_torch_exactly() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    ddp = strategy({"w": ours}, weight_decay=0.1, max_grad_norm=None)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for i in range(5):
        step(ddp, math.sin(i))
        theirs.grad = torch.full_like(theirs, math.sin(i))
        reference.step()
    assert torch.equal(ours, theirs)


def test_micro_batches_are_summed_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    assert step(strategy({"w": parameter}), 1.0, times=300).grad_norm == 300  # in bf16 the sum would stop at 256


def test_clipping_scales_the_global_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ELEMENTS", 4)  # the norm is over all buckets
    clipped, small = ({n: nn.Parameter(torch.zeros(3)) for n in "vw"} for _ in range(2))
    one, other = strategy(clipped, max_grad_norm=1.0, eps=1.0), strategy(small, max_grad_norm=None, eps=1.0)
    norm = math.sqrt(3 * 3.0**2 + 3 * 4.0**2)
    assert step(one, {"v": 3.0, "w": 4.0}).grad_norm == pytest.approx(norm)
    step(other, {"v": 3.0 / norm, "w": 4.0 / norm})
    for name, parameter in clipped.items():
        torch.testing.assert_close(parameter, small[name])


# -- parameter groups -------------------------------------------------------------------------------------------------


def test_embeddings_and_norms_are_not_decayed() -> None:
    names = {
        "model.layers.0.self_attn.q_proj.lora_A.default.weight": True,
        "model.layers.0.self_attn.q_proj.vera_lambda_d.default": True,
        "model.embed_tokens.modules_to_save.default.weight": False,
        "model.layers.0.input_layernorm.modules_to_save.default.weight": False,
        "model.norm.modules_to_save.default.weight": False,
    }
    assert {name: is_decayed(name) for name in names} == names
    parameters = {name: nn.Parameter(torch.ones(2)) for name in names}
    step(strategy(parameters, weight_decay=0.5), dict.fromkeys(names, 0.0), lr=0.1)
    assert {name: bool((p < 1).all()) for name, p in parameters.items()} == names


@pytest.mark.parametrize(
    ("fields", "ratios"),
    [
        (
            {"loraplus_lr_ratio": 16},
            {
                "layers.0.q_proj.lora_A.default.weight": 1,
                "layers.0.q_proj.lora_B.default.weight": 16,
                "embed_tokens": 1,
            },
        ),
        ({"vera_d_lr_ratio": 0.25}, {"layers.0.q_proj.vera_lambda_d": 0.25, "layers.0.q_proj.vera_lambda_b": 1}),
    ],
)
def test_loras_b_and_veras_d_have_rates_of_their_own(fields: dict[str, Any], ratios: dict[str, float]) -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ratios}
    ddp = strategy(parameters, **fields, eps=1e-12, max_grad_norm=None)
    for lr in (1e-3, 5e-4):  # Adam's first steps are as long as the rate where the gradient does not change
        before = {name: p.detach().clone() for name, p in parameters.items()}
        step(ddp, dict.fromkeys(ratios, 0.1), lr=lr)
        moved = [float((before[name] - parameters[name].detach())[0]) for name in ratios]
        assert moved == pytest.approx([lr * ratio for ratio in ratios.values()], rel=1e-3)


# -- skipped steps and states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(grad: float) -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    skips, never = strategy({"w": a}), strategy({"w": b})
    for ddp in (skips, never):
        step(ddp, 0.3)
    assert step(skips, grad).skipped
    for ddp in (skips, never):
        assert not step(ddp, 0.2).skipped
    assert torch.equal(a, b)


def test_a_state_restores_masters_and_moments_bit_for_bit() -> None:
    a = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ddp = strategy({"w": a})
    for i in range(3):
        step(ddp, 0.1 * i)
    state = ddp.state()
    assert state is not None
    assert state.num_updates == 3
    copied = OptimizerState(*({n: t.clone() for n, t in tensors.items()} for tensors in state[:3]), num_updates=3)
    b = nn.Parameter(a.detach().clone())
    restored = strategy({"w": b}, copied)
    for i in range(3):
        step(ddp, 0.3 * i)
        step(restored, 0.3 * i)
    assert torch.equal(a, b)
    ours, theirs = ddp.state(), restored.state()
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(x["w"], y["w"]) for x, y in zip(ours[:3], theirs[:3], strict=True))
    assert ours.num_updates == theirs.num_updates == 6


def test_another_runs_state_is_refused() -> None:
    state = strategy({"w": nn.Parameter(torch.ones(3))}).state()
    assert state is not None
    for other in ({"v": nn.Parameter(torch.ones(3))}, {"w": nn.Parameter(torch.ones(2))}):
        with pytest.raises(ValueError, match="other parameters"):
            check_fits(state, other)
