"""Schedules, fp32 masters, clipping, decay groups, skipped steps, and saved states."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from loray.spec import OptimizerSpec
from loray.train.data_parallel import World
from loray.train.optimizer import MasterAdamW, is_decayed, learning_rate


def spec(**fields: Any) -> OptimizerSpec:
    return OptimizerSpec(**({"learning_rate": 1e-2} | fields))


def optimizer(parameters: dict[str, nn.Parameter], **fields: Any) -> MasterAdamW:
    return MasterAdamW(parameters.items(), spec(**fields), World())


def step(adam: MasterAdamW, parameter: nn.Parameter, grad: float, *, lr: float = 1e-2, finite: bool = True) -> Any:
    parameter.grad = torch.full_like(parameter, grad)
    adam.collect()
    return adam.step(lr, loss_is_finite=finite)


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


def test_warmup_ratio_rounds_up() -> None:
    assert learning_rate(1, 25, spec(warmup_ratio=0.1)) == pytest.approx(0.01 / 3)
    assert learning_rate(1, 25, spec()) == 0.01


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert learning_rate(11, 20, spec(schedule="cosine")) == pytest.approx(0.005)


# -- masters ----------------------------------------------------------------------------------------------------------


def test_small_steps_add_up_on_a_bf16_parameter() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adam = optimizer({"w": parameter})
    for _ in range(50):
        step(adam, parameter, -1.0, lr=1e-3)  # far less than the 0.008 between bf16 numbers above one
    torch.testing.assert_close(parameter.float(), torch.full((4,), 1.05), atol=4e-3, rtol=0)


def test_fp32_parameters_follow_torch_exactly() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    adam = optimizer({"w": ours}, weight_decay=0.1, max_grad_norm=None)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for i in range(5):
        step(adam, ours, math.sin(i))
        theirs.grad = torch.full_like(theirs, math.sin(i))
        reference.step()
    assert torch.equal(ours, theirs)


def test_micro_batches_are_summed_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    adam = optimizer({"w": parameter})
    for _ in range(300):  # in bf16 the sum would stop at 256
        parameter.grad = torch.ones_like(parameter)
        adam.collect()
    assert adam.step(0.0, loss_is_finite=True).grad_norm == 300


def test_clipping_scales_the_global_norm() -> None:
    clipped, small = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    one, other = (
        optimizer({"w": clipped}, max_grad_norm=1.0, eps=1.0),
        optimizer({"w": small}, max_grad_norm=None, eps=1.0),
    )
    assert step(one, clipped, 3.0).grad_norm == pytest.approx(6.0)
    step(other, small, 0.5)
    torch.testing.assert_close(clipped, small)


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
    adam = optimizer(parameters, weight_decay=0.5)
    adam.step(0.1, loss_is_finite=True)
    assert {name: bool((p < 1).all()) for name, p in parameters.items()} == names


# -- skipped steps and states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grad", "finite"), [(math.nan, True), (math.inf, True), (1.0, False)])
def test_a_step_that_is_not_finite_changes_nothing(grad: float, finite: bool) -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    skips, never = optimizer({"w": a}), optimizer({"w": b})
    for adam, parameter in ((skips, a), (never, b)):
        step(adam, parameter, 0.3)
    assert step(skips, a, grad, finite=finite).skipped
    for adam, parameter in ((skips, a), (never, b)):
        assert not step(adam, parameter, 0.2).skipped
    assert torch.equal(a, b)


def test_a_state_restores_parameters_and_moments_bit_for_bit() -> None:
    a = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    adam = optimizer({"w": a})
    for i in range(3):
        step(adam, a, 0.1 * i)
    b = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    restored = optimizer({"w": b})
    restored.load_state_dict(copy.deepcopy(adam.state_dict()))  # as through a file
    assert torch.equal(a, b)
    for i in range(3):
        step(adam, a, 0.3 * i)
        step(restored, b, 0.3 * i)
    assert torch.equal(a, b)
    assert torch.equal(adam.state_dict()["masters"]["w"], restored.state_dict()["masters"]["w"])


def test_another_runs_state_is_refused() -> None:
    state = optimizer({"w": nn.Parameter(torch.ones(3))}).state_dict()
    with pytest.raises(ValueError, match="other parameters"):
        optimizer({"v": nn.Parameter(torch.ones(3))}).load_state_dict(state)
